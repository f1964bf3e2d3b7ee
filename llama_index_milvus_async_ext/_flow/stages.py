"""The stages of a flow, run: each takes batches of what the one before has made."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from llama_index_milvus_async_ext._flow.intake import Intake, one

# Of the event loop: enough for a new task to begin, for what it submits to cross to another thread (3), and for what
# a stage that blocks the loop has made to come out of other libraries' tasks (4).
_TURNS = 8
# What a cancellation waits for a request that is under way. Most take a hundredth of that.
_GRACE_SECONDS = 5.0

T = TypeVar("T")


@dataclass(frozen=True)
class Stage:
    """One stage of a flow.

    Attributes:
        name: What it is called, in the seconds that it worked.
        work: Makes of a batch of items those of the next stage; an error of it ends the whole flow.
        at_once: Batches at work at the same time.
        most, least, capacity, weigh: See `Intake`.
        ordered: Whether the next stage gets the items in the order of these, whichever batch is done first.
    """

    name: str
    work: Callable[[list[Any]], Awaitable[Iterable[Any]]]
    at_once: int = 1
    most: int = 1
    least: int = 1
    capacity: int = 1
    weigh: Callable[[Any], int] = one
    ordered: bool = False


class Stopwatch:
    """How long stages were at work: time in which several batches of one were counts once."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._at_work: dict[str, int] = {}
        self._since: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Any:
        """Measure a piece of work of a stage."""
        at_work = self._at_work.get(name, 0)
        self._at_work[name] = at_work + 1
        if not at_work:
            self._since[name] = time.perf_counter()
        try:
            yield
        finally:
            self._at_work[name] -= 1
            if not self._at_work[name]:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - self._since[name]


async def flow(source: AsyncIterator[Any], stages: Sequence[Stage], stopwatch: Stopwatch) -> None:
    """Send what a source yields through stages that all work at the same time.

    When this ends, nothing of it runs any more, however it ends.

    Raises:
        BaseException: The first error of the source or of a stage; the others' work has been cancelled.
    """
    entrances = [_Entrance(stage) for stage in stages]
    exits: list[_Entrance | None] = [*entrances[1:], None]

    async def read() -> None:
        async for item in source:
            await entrances[0].put(item)
        entrances[0].close()

    work = [_work(entrance, following, stopwatch) for entrance, following in zip(entrances, exits, strict=True)]
    await _together(read(), *work)


class _Entrance:
    """The intake of a stage, and those who wait for it."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._intake: Intake[Any] = Intake(stage.most, stage.least, stage.capacity, stage.weigh)
        self._waiters: list[asyncio.Future[None]] = []

    async def put(self, item: Any) -> None:
        """Hand an item in, once there is room."""
        await self._until(lambda: self._intake.has_room)
        self._intake.put(item)
        self._changed()

    async def take(self) -> list[Any]:
        """The next batch, once there is one; empty if none will come."""
        await self._until(lambda: self._intake.is_ready or self._intake.is_over)
        if self._intake.is_over:
            return []
        batch = self._intake.take()
        self._changed()
        return batch

    def end(self) -> None:
        self._intake.end()
        self._changed()

    def close(self) -> None:
        self._intake.close()
        self._changed()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    def _changed(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)


class _Turn:
    """The turn of a batch to be handed on, in an ordered stage after those before it."""

    def __init__(self, earlier: _Turn | None) -> None:
        self._earlier = earlier
        self._is_over = asyncio.Event()

    async def comes(self) -> None:
        if self._earlier is not None:
            await self._earlier._is_over.wait()
            self._earlier = None

    def ends(self) -> None:
        self._is_over.set()


async def _work(entrance: _Entrance, following: _Entrance | None, stopwatch: Stopwatch) -> None:
    stage = entrance.stage
    last: _Turn | None = None
    beginning = asyncio.Lock()

    async def work_on(batch: list[Any]) -> Iterable[Any]:
        try:
            with stopwatch(stage.name):
                return await stage.work(batch)
        finally:
            entrance.end()

    async def worker() -> None:
        nonlocal last
        while True:
            async with beginning:
                await _some_turns()  # work may block this loop: before that, others hand on what they have
                batch = await entrance.take()
                if not batch:
                    return
                last = turn = _Turn(last if stage.ordered else None)
                task = asyncio.ensure_future(work_on(batch))
                try:
                    await _some_turns()  # and if it does, what it has made is handed on before the next begins
                except BaseException as interruption:
                    task.cancel()
                    if not isinstance(interruption, GeneratorExit):  # after which nobody can wait
                        await _cancelled([task])
                    raise
            made = deque(await task)
            del batch, task
            await turn.comes()
            while following is not None and made:  # what is handed on is let go of: it grows on its way
                await following.put(made.popleft())
            turn.ends()

    await _together(*(worker() for _ in range(stage.at_once)))
    if following is not None:
        following.close()


async def _together(*coroutines: Coroutine[Any, Any, None]) -> None:
    """Run coroutines at the same time; when this ends, so have they."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    together = asyncio.gather(*tasks)
    try:
        await together
    except GeneratorExit:  # this has been closed, and can't wait
        together.add_done_callback(_look_at)
        together.cancel()
        raise
    except BaseException:
        await _cancelled(tasks)
        raise


def _look_at(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()


async def _cancelled(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """Cancel tasks and wait for them, also if this one is cancelled again and again."""
    for task in tasks:
        task.cancel()
    while not all(task.done() for task in tasks):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # looked at: the first one has been raised


async def in_full(coroutine: Coroutine[Any, Any, T]) -> T:
    """Await what would go on elsewhere though it were cancelled here: a cancellation waits until it has ended.

    It waits some seconds at the most, and cancels it then.
    """
    task = asyncio.ensure_future(coroutine)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        clock = asyncio.get_running_loop().time
        end = clock() + _GRACE_SECONDS
        while not task.done() and clock() < end:
            with contextlib.suppress(asyncio.CancelledError):  # again and again
                await asyncio.wait([task], timeout=end - clock())
        await _cancelled([task])
        raise


async def _some_turns() -> None:
    for _ in range(_TURNS):
        await asyncio.sleep(0)
