"""Does what a core decides, on the event loop of the I/O thread."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from llama_index_milvus_async_ext._lane.core import Core
from llama_index_milvus_async_ext._lane.effects import Retry, Send
from llama_index_milvus_async_ext._lane.items import Submission, without_frames
from llama_index_milvus_async_ext._lane.lanes import Flight, Lane
from llama_index_milvus_async_ext.retry import Verdict

# How long one turn of the loop decides and prepares: other endpoints, answers and new calls wait that long.
_TURN_SECONDS = 0.004
# While a caller of this process embeds, the I/O thread lets go of Python's lock for a moment after each step. The other
# thread would else get it only after five milliseconds, at each turn of its event loop: embedding and writing took a
# tenth longer. Writing alone takes a tenth longer with the pauses: there are none.
_PAUSE_SECONDS = 1e-6  # the least that lets another thread in; the system makes some 60 microseconds of it


class Shell:
    """Runs the requests of one endpoint; but for `core`'s counts, to be used on its loop only.

    A request is a task, and the end of a task has one owner: its done-callback, which runs however the task ended,
    also if it was cancelled before its first step.

    Args:
        loop: The loop of the I/O thread.
        classify: Tells what an error means.
        on_retry: Told of each pause before another attempt.
        takes_turns: Whether another thread of this process has work for Python.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        classify: Callable[[BaseException], Verdict],
        on_retry: Callable[[Retry], object],
        takes_turns: Callable[[], bool],
    ) -> None:
        self.core = Core(classify)
        self._loop = loop
        self._on_retry = on_retry
        self._takes_turns = takes_turns
        self._lanes: dict[Hashable, Lane[Any, Any]] = {}
        self._tasks: dict[Flight[Any], asyncio.Task[Sequence[Any] | BaseException]] = {}
        self._pump_is_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._held = False
        self._is_over = False

    def lane(self, key: Hashable, make: Callable[[], Lane[Any, Any]]) -> Lane[Any, Any]:
        """The lane of a key, made if need be, and forgotten once it is idle."""
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = make()
            lane.key = key
        return lane

    def submit(
        self,
        lane: Lane[Any, Any],
        values: Sequence[Any],
        keys: Sequence[Hashable] | None,
        own_keys: frozenset[Hashable] | None,
        on_done: Callable[[Submission[Any]], None],
    ) -> Submission[Any]:
        """Take in values; `on_done` is called once, when each has its outcome."""
        submission = self.core.submit(lane, values, keys, on_done, self._loop.time(), own_keys)
        self._schedule()
        return submission

    def cancel(self, submission: Submission[Any]) -> None:
        """Give up on what a submission still waits for; its outcomes are complete when this returns."""
        self.core.cancel(submission)
        self._perform()
        self._schedule()

    def end(self) -> None:
        """Send nothing more, and tell nobody: at the interpreter's exit a traceback is all that could be told."""
        self._is_over = True

    def hold(self, held: bool) -> None:
        """Send nothing new for a while, or go on."""
        self._held = held
        if not held:
            self._schedule()

    # --- turns of the loop

    def _schedule(self) -> None:
        # On the next turn of the loop, so that all that is submitted in this one goes together.
        if not self._pump_is_due:
            self._pump_is_due = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_is_due = False
        if self._held or self._is_over:
            return
        try:
            self._decide()
        except BaseException:  # a defect here must not leave callers waiting
            self.core.cancel_all()
            self._perform()
            raise

    def _decide(self) -> None:
        until = self._loop.time() + _TURN_SECONDS
        takes_turns = self._takes_turns()
        core = self.core
        while core.step(now := self._loop.time()):
            # One batch a turn: it is sent before the next one is prepared.
            if self._perform() or now >= until:
                self._schedule()
                break
            if takes_turns:
                time.sleep(_PAUSE_SECONDS)
        else:
            self._perform()
        self._set_timer(core.next_wake())

    def _set_timer(self, wake_at: float | None) -> None:
        timer = self._timer
        if wake_at is None or (timer is not None and timer.when() <= wake_at):
            return  # one that is too early looks again, and sets the next
        if timer is not None:
            timer.cancel()
        self._timer = self._loop.call_at(wake_at, self._on_time)

    def _on_time(self) -> None:
        self._timer = None
        self._schedule()

    def _perform(self) -> bool:
        """Do what the core wants done; whether something was sent."""
        effects = self.core.take_effects()
        if self._is_over:
            return False
        for send in effects.sends:
            self._send(send)
        for flight in effects.aborts:
            self._tasks[flight].cancel()
        for submission in effects.settled:
            self._forget_if_idle(submission.lane)
            on_done, submission.on_done = submission.on_done, _nobody  # which may hold the submission
            on_done(submission)
        for retry in effects.retries:
            try:
                self._on_retry(retry)
            except BaseException as error:  # of a log handler of the user's, which may be the loop's as well
                with contextlib.suppress(BaseException):
                    self._loop.call_exception_handler({"message": "a retry could not be logged", "exception": error})
        return bool(effects.sends)

    def _send(self, send: Send) -> None:
        flight = send.flight
        task = self._loop.create_task(_answer(send))
        self._tasks[flight] = task
        task.add_done_callback(lambda task: self._ended(flight, task))

    def _ended(self, flight: Flight[Any], task: asyncio.Task[Sequence[Any] | BaseException]) -> None:
        del self._tasks[flight]
        answer = asyncio.CancelledError() if task.cancelled() else task.result()
        if isinstance(answer, BaseException):
            without_frames(answer)
            self.core.ended(flight, None, answer, self._loop.time())
        else:
            self.core.ended(flight, answer, None, self._loop.time())
        self._perform()
        self._forget_if_idle(flight.lane)
        self._schedule()

    def _forget_if_idle(self, lane: Lane[Any, Any]) -> None:
        if lane.key is not None and lane.idle and self._lanes.get(lane.key) is lane:
            del self._lanes[lane.key]


def _nobody(_: Submission[Any]) -> None:
    """In the place of whoever has been told."""


async def _answer(send: Send) -> Sequence[Any] | BaseException:
    """What became of a request: an error, too, is a result of its task.

    As the task's exception, asyncio would print one that came in the loop's last turn, at the interpreter's exit.
    """
    try:
        return await send.flight.lane.send(send.payloads, send.upsert, send.timeout_seconds)
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        return error
