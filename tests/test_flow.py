"""The flow beneath ingestion: what waits before a stage, stages that work at the same time, and blocking calls."""

from __future__ import annotations

import _thread
import asyncio
import contextvars
import queue
import threading
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_index_milvus_async_ext._flow.intake import Intake
from llama_index_milvus_async_ext._flow.loops import forget_closed
from llama_index_milvus_async_ext._flow.stages import Stage, Stopwatch, flow
from llama_index_milvus_async_ext._flow.threads import OwnThread, WaitingThread
from llama_index_milvus_async_ext._flow.uninterrupted import uninterrupted
from tests.conftest import examples
from tests.waiting import beside, blocked_until, press_ctrl_c, run_at_once, until

numbers = st.integers(1, 20)

# --- the intake


@settings(max_examples=examples(500), deadline=None)
@given(numbers, numbers, numbers, st.lists(numbers, max_size=40), st.integers(1, 4), st.randoms(use_true_random=False))
def test_an_intake_loses_nothing_keeps_the_order_and_never_sticks(
    most: int, least: int, capacity: int, weights: list[int], workers: int, chance: Any
) -> None:
    intake: Intake[tuple[int, int]] = Intake(most, least, capacity, lambda item: item[1])
    to_come = list(enumerate(weights))
    taken: list[tuple[int, int]] = []
    at_work = 0
    is_closed = False
    while not (intake.is_over and not at_work):
        possible = []
        if to_come and intake.has_room:
            possible.append("put")
        if not to_come and not is_closed:
            possible.append("close")
        if intake.is_ready and at_work < workers:
            possible.append("take")
        if at_work:
            possible.append("end")
        assert possible, "everybody waits for everybody else"
        action = chance.choice(possible)
        if action == "put":
            intake.put(to_come.pop(0))
        elif action == "close":
            intake.close()
            is_closed = True
        elif action == "take":
            batch = intake.take()
            at_work += 1
            assert batch
            assert len(batch) == 1 or sum(weight for _, weight in batch) <= most
            taken += batch
        else:
            intake.end()
            at_work -= 1
    assert taken == list(enumerate(weights))


def test_an_idle_stage_takes_what_is_there_and_a_busy_one_waits_for_a_batch_that_is_worth_it() -> None:
    intake: Intake[str] = Intake(most=10, least=3, capacity=10, weigh=lambda _: 1)
    intake.put("a")
    assert intake.is_ready and intake.take() == ["a"]
    intake.put("b")
    intake.put("c")
    assert not intake.is_ready, "too few while the stage is at work"
    intake.put("d")
    assert intake.is_ready and intake.take() == ["b", "c", "d"]
    intake.put("e")
    intake.close()
    assert intake.is_ready, "nothing more comes that could be waited for"


def test_a_full_intake_takes_no_more_until_a_batch_is_taken() -> None:
    intake: Intake[int] = Intake(most=5, least=5, capacity=5, weigh=lambda weight: weight)
    intake.put(2)
    assert intake.has_room
    intake.put(7)
    assert not intake.has_room
    assert intake.take() == [2]
    assert not intake.has_room, "7 still wait"
    assert intake.take() == [7], "an item that is heavier than a batch goes alone"
    assert intake.has_room


# --- the stages


async def numbers_up_to(end: int) -> AsyncIterator[int]:
    for number in range(end):
        yield number


async def turns(number: int = 300) -> None:
    """Let everything happen that can happen."""
    for _ in range(number):
        await asyncio.sleep(0)


def others() -> set[asyncio.Task[Any]]:
    return asyncio.all_tasks() - {asyncio.current_task()}  # type: ignore[arg-type]


def passing(done: list[Any] | None = None) -> Callable[[list[Any]], Awaitable[Iterable[Any]]]:
    async def work(items: list[Any]) -> list[Any]:
        if done is not None:
            done.extend(items)
        return items

    return work


async def test_a_flow_hands_everything_through_all_stages() -> None:
    done: list[int] = []

    async def doubled(items: list[int]) -> list[int]:
        return [value for item in items for value in (item, item)]

    stages = [Stage("first", passing(), most=3, least=2, capacity=4), Stage("double", doubled, most=2)]
    stopwatch = Stopwatch()
    await flow(numbers_up_to(50), [*stages, Stage("last", passing(done), at_once=3, most=7)], stopwatch)
    assert sorted(done) == sorted([*range(50), *range(50)])
    assert set(stopwatch.seconds) == {"first", "double", "last"}
    assert not others()


async def test_an_empty_source_ends_a_flow_without_work() -> None:
    stopwatch = Stopwatch()
    await flow(numbers_up_to(0), [Stage("one", passing()), Stage("two", passing())], stopwatch)
    assert not stopwatch.seconds


async def test_a_slow_stage_holds_up_those_before_it_and_the_source() -> None:
    read = 0
    may_go = asyncio.Event()

    async def source() -> AsyncIterator[int]:
        nonlocal read
        for number in range(1_000):
            read += 1
            yield number

    async def slow(items: list[int]) -> list[int]:
        await may_go.wait()
        return items

    stages = [Stage("first", passing(), capacity=5), Stage("slow", slow, at_once=2, capacity=5)]
    task = asyncio.create_task(flow(source(), stages, Stopwatch()))
    await turns()
    # In each intake 5; 2 at work, 1 made by the first stage that nobody takes in, 1 read that nobody takes in.
    assert read <= 5 + 5 + 2 + 1 + 1
    before = read
    await turns()
    assert read == before
    may_go.set()
    await task
    assert read == 1_000


async def test_no_more_batches_are_at_work_than_a_stage_allows() -> None:
    now = most = 0

    async def work(items: list[int]) -> list[int]:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await turns(200)  # as long as it takes the others to begin
        now -= 1
        return items

    await flow(numbers_up_to(60), [Stage("work", work, at_once=3, most=2, capacity=10)], Stopwatch())
    assert most == 3


async def test_an_ordered_stage_keeps_the_order_whichever_batch_is_done_first() -> None:
    done: list[int] = []

    async def the_later_the_quicker(items: list[int]) -> list[int]:
        await turns(200 - 5 * items[0])
        return items

    stages = [
        Stage("any", the_later_the_quicker, at_once=4, capacity=8, ordered=True),
        Stage("last", passing(done), capacity=2),
    ]
    await flow(numbers_up_to(40), stages, Stopwatch())
    assert done == list(range(40))


@pytest.mark.parametrize("where", ["source", "first", "last"])
async def test_an_error_anywhere_ends_the_flow_and_leaves_no_task(where: str) -> None:
    started = ended = 0

    async def source() -> AsyncIterator[int]:
        for number in range(100):
            if where == "source" and number == 50:
                raise LookupError(where)
            yield number

    async def work(name: str, items: list[int]) -> list[int]:
        nonlocal started, ended
        started += 1
        try:
            await turns(3)
            if where == name and items[0] >= 50:
                raise LookupError(where)
            return items
        finally:
            ended += 1

    stages = [Stage(name, lambda items, name=name: work(name, items), at_once=3) for name in ("first", "last")]
    with pytest.raises(LookupError, match=where):
        await flow(source(), stages, Stopwatch())
    assert started == ended
    assert not others()


async def test_a_cancelled_flow_leaves_no_task_however_often_it_is_cancelled() -> None:
    is_ending, may_end = asyncio.Event(), asyncio.Event()

    async def stubborn(items: list[int]) -> list[int]:
        try:
            await asyncio.Event().wait()
        finally:
            is_ending.set()
            await may_end.wait()
        return items

    task = asyncio.create_task(flow(numbers_up_to(10), [Stage("stubborn", stubborn)], Stopwatch()))
    await turns()
    task.cancel()
    await is_ending.wait()
    task.cancel()  # as anyio does, at every turn
    await turns(20)
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not others()


async def test_time_in_which_several_batches_were_at_work_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    stopwatch = Stopwatch()
    with stopwatch("work"):
        now = 1.0
        with stopwatch("work"), stopwatch("other"):
            now = 3.0
        now = 4.0
    now = 10.0
    with stopwatch("work"):
        now = 10.5
    assert stopwatch.seconds == {"work": 4.5, "other": 2.0}


# --- threads

context: contextvars.ContextVar[str] = contextvars.ContextVar("context", default="nobody's")


async def test_a_thread_of_its_own_makes_all_calls_in_the_callers_context() -> None:
    context.set("the caller's")
    thread = OwnThread("tests-own")
    try:
        first = await thread.call(threading.current_thread)
        assert first is await thread.call(threading.current_thread) is not threading.current_thread()
        assert first.name == "tests-own" and first.daemon
        assert await thread.call(context.get) == "the caller's"
        assert await thread.call(divmod, 7, 2) == (3, 1)
    finally:
        thread.close()
    await until(lambda: not first.is_alive())


async def test_a_thread_that_could_not_be_begun_is_begun_by_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    thread = OwnThread("tests-own")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            await thread.call(len, "abc")
    assert await asyncio.wait_for(thread.call(len, "abc"), 30) == 3
    thread.close()


def test_the_waiting_thread_makes_the_calls_itself_and_the_loop_has_a_copy_of_its_context() -> None:
    token = context.set("the caller's")

    async def seen(thread: WaitingThread) -> tuple[Any, ...]:
        own = threading.current_thread()
        assert context.get() == "the caller's"
        context.set("the loop's")
        return own, await thread.call(threading.current_thread), await thread.call(context.get)

    try:
        own, made_in, seen_there = WaitingThread().run(seen)
    finally:
        context.reset(token)
    assert own is not threading.current_thread() is made_in
    assert seen_there == "the caller's"
    assert not own.is_alive()


async def raising_calls(thread: Any) -> None:
    def raise_it(error: BaseException) -> None:
        raise error

    with pytest.raises(LookupError, match="mine"):
        await thread.call(raise_it, LookupError("mine"))
    with pytest.raises(RuntimeError, match="StopIteration"):  # which no future can hold
        await thread.call(next, iter(()))
    assert await thread.call(len, "abc") == 3, "it goes on"


async def test_the_errors_of_calls_in_a_thread_of_its_own_arrive() -> None:
    thread = OwnThread("tests-own")
    await raising_calls(thread)
    thread.close()


def test_the_errors_of_calls_in_the_waiting_thread_arrive() -> None:
    WaitingThread().run(raising_calls)


@pytest.mark.parametrize("error", [SystemExit(3), asyncio.CancelledError(), GeneratorExit()])
async def test_nobody_waits_for_ever_for_a_call_that_ends_its_thread(error: BaseException) -> None:
    def raise_it() -> None:
        raise error

    thread = OwnThread("tests-own")
    with pytest.raises(RuntimeError, match=type(error).__name__) as raised:
        await asyncio.wait_for(thread.call(raise_it), 30)
    assert raised.value.__cause__ is error
    assert await thread.call(len, "abc") == 3
    thread.close()


def test_what_the_coroutine_raises_is_raised_by_the_waiting_thread() -> None:
    async def fail(thread: WaitingThread) -> None:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        WaitingThread().run(fail)


@pytest.mark.parametrize("interrupt", [press_ctrl_c, _thread.interrupt_main])
def test_an_interruption_waits_until_the_coroutine_it_cancels_has_ended(interrupt: Callable[[], None]) -> None:
    has_ended: list[str] = []
    waits = threading.Event()

    async def wait(thread: WaitingThread) -> None:
        try:
            waits.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await turns()
            has_ended.append("ended")
            raise

    def press() -> None:
        waits.wait(30)
        interrupt()

    with beside(press), pytest.raises(KeyboardInterrupt):
        WaitingThread().run(wait)
    assert has_ended == ["ended"]


def test_an_interruption_within_a_call_cancels_the_coroutine() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    async def call(thread: WaitingThread) -> None:
        await thread.call(interrupt)

    with pytest.raises(KeyboardInterrupt):
        WaitingThread().run(call)
    assert not [each for each in threading.enumerate() if each.name.endswith("-flow")]


def test_an_interruption_as_the_thread_beside_begins_cancels_the_coroutine(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        if thread.name.endswith("-flow"):
            raise KeyboardInterrupt

    async def main(_: WaitingThread) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        WaitingThread().run(main)
    assert not [each for each in threading.enumerate() if each.name.endswith("-flow")]


def test_an_interruption_before_the_coroutine_has_begun_cancels_it_too() -> None:
    may_begin = threading.Event()

    async def main(_: WaitingThread) -> None:
        await asyncio.Event().wait()

    class Late(WaitingThread):
        def _run(self, make: Any) -> None:  # the loop comes up only after the interruption
            may_begin.wait(30)
            super()._run(make)

        def _cancel(self, beside: threading.Thread) -> None:
            self._is_interrupted = True
            may_begin.set()
            super()._cancel(beside)

    class Interrupting:
        def get(self, timeout: float) -> Any:
            raise KeyboardInterrupt

        def put(self, _: object) -> None: ...

    thread = Late()
    thread._calls = Interrupting()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        thread.run(main)
    assert not [each for each in threading.enumerate() if each.name.endswith("-flow")]


async def test_an_answer_for_which_nobody_waits_any_more_is_dropped() -> None:
    may_return = threading.Event()
    thread = OwnThread("tests-own")
    call = asyncio.ensure_future(thread.call(may_return.wait, 30))
    await turns(5)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    may_return.set()
    assert await thread.call(len, "abc") == 3
    thread.close()


def test_an_answer_to_a_loop_that_is_closed_is_dropped() -> None:
    may_return = threading.Event()
    thread = OwnThread("tests-own")

    async def leave() -> None:
        call = asyncio.ensure_future(thread.call(may_return.wait, 30))
        await turns(5)
        call.cancel()

    asyncio.run(leave())
    may_return.set()
    thread.close()
    blocked_until(lambda: not any(each.name == "tests-own" for each in threading.enumerate()))


# --- loops that are closed


class Loop(asyncio.SelectorEventLoop):
    """As any other, without its sockets: hundreds are made."""

    def __init__(self) -> None:
        self.is_over = False

    def is_closed(self) -> bool:
        return self.is_over

    def __del__(self) -> None: ...


def test_closed_loops_are_forgotten_by_many_threads_at_once() -> None:
    of_loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Any] = weakref.WeakKeyDictionary()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(300):
                loop = Loop()
                of_loops[loop] = loop  # which keeps it
                loop.is_over = True
                forget_closed(of_loops)
        except BaseException as error:
            errors.append(error)

    run_at_once([threading.Thread(target=work) for _ in range(8)], 1e-6)
    forget_closed(of_loops)
    assert not errors and not len(of_loops)


# --- what must not be interrupted


@pytest.mark.parametrize("moment", ["meanwhile", "at the end"])
def test_what_an_interrupted_function_has_made_is_undone(monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    may_end, undone = threading.Event(), queue.SimpleQueue[str]()

    def interrupted(outcome: Future[Any]) -> Any:
        if moment == "at the end":
            may_end.set()
            outcome.result()
        raise KeyboardInterrupt

    def make() -> str:
        may_end.wait(30)
        return "made"

    monkeypatch.setattr("llama_index_milvus_async_ext._flow.uninterrupted.settled", interrupted)
    with pytest.raises(KeyboardInterrupt):
        uninterrupted("tests-make", make, undone.put)
    assert undone.empty() or moment == "at the end"
    may_end.set()
    assert undone.get(timeout=30) == "made"


def test_a_function_that_can_have_no_thread_is_called_in_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading.Thread, "start", raises_no_more_threads)
    assert uninterrupted("tests-make", threading.get_ident) == threading.get_ident()


def raises_no_more_threads(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_a_coroutine_that_can_have_no_thread_says_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(_: WaitingThread) -> None: ...

    monkeypatch.setattr(threading.Thread, "start", raises_no_more_threads)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="can't start new thread"):
        WaitingThread().run(main)
    assert time.monotonic() - began < 5


def test_an_error_of_a_function_that_must_not_be_interrupted_is_raised_as_it_is() -> None:
    context = contextvars.ContextVar("context", default="")
    context.set("mine")
    with pytest.raises(LookupError, match="mine"):
        uninterrupted("tests-make", lambda: (_ for _ in ()).throw(LookupError(context.get())), lambda _: None)
