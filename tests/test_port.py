"""The callers' ways to the I/O thread and back, in real time: loops, threads, cancellation, Ctrl-C, fork and exit."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from llama_index_milvus_async_ext._lane import forks
from llama_index_milvus_async_ext._lane.items import Submission
from llama_index_milvus_async_ext._lane.journey import Request
from llama_index_milvus_async_ext._lane.lanes import Lane
from llama_index_milvus_async_ext._lane.port import LoopPort, run
from llama_index_milvus_async_ext._lane.shell import Shell
from llama_index_milvus_async_ext._lane.thread import IoThread
from llama_index_milvus_async_ext._lane.thread_port import ThreadPort, Voyage
from tests import programs, waiting
from tests.lane_server import Item, Server, classify, items, make_lane, not_ready, raise_broken_promises


def begun(*requests: Request) -> Voyage:
    """Requests that this thread has submitted, and will wait for."""
    voyage = ThreadPort().prepare(*requests)
    voyage.begin()
    return voyage


@pytest.fixture
def io() -> IoThread:
    return IoThread.get()


@pytest.fixture
def shell(io: IoThread) -> Iterator[Shell]:
    shell = Shell(io.loop, classify, lambda _: None, io.takes_turns)
    io.shells.add(shell)
    unhandled: list[dict[str, Any]] = []
    io.loop.set_exception_handler(lambda _, context: unhandled.append(context))
    yield shell
    until = time.monotonic() + 5
    while not shell.core.idle and time.monotonic() < until:
        time.sleep(0.01)
    io.loop.set_exception_handler(None)
    assert shell.core.idle, "something was left under way"
    assert not unhandled, "asyncio would only log it"
    raise_broken_promises()


def request(shell: Shell, lane: Lane[Item, str], values: list[Item]) -> Request:
    keys = [item.key for item in values]
    return Request(shell, lane, values, keys if any(key is not None for key in keys) else None)


def results_of(submissions: list[Submission[Any]]) -> list[Any]:
    return [result for submission in submissions for result in submission.results]


def test_many_loops_in_many_threads_each_get_their_own_results(shell: Shell) -> None:
    server = Server(seconds=0.001)
    lane = make_lane(server, max_items=50)
    answers: list[tuple[int, list[Any]]] = []

    async def call(number: int) -> None:
        answers.append((number, results_of(await LoopPort.current().submit(request(shell, lane, [Item(number)])))))

    async def calls(start: int) -> None:
        for _ in range(3):
            await asyncio.gather(*(call(start + n) for n in range(50)))

    threads = [threading.Thread(target=lambda start=n * 1_000: asyncio.run(calls(start))) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(answers) == 6 * 3 * 50
    assert all(results == [f"result of {number}"] for number, results in answers)
    assert sum(len(batch) for batch in server.batches) == 6 * 3 * 50


def test_blocking_calls_of_many_threads_each_get_their_own_results(shell: Shell) -> None:
    lane = make_lane(Server(seconds=0.001), max_items=50)
    answers: list[tuple[int, list[Any]]] = []

    def call(number: int) -> None:
        for _ in range(20):
            found = run(ThreadPort().submit(request(shell, lane, [Item(number)]), request(shell, lane, [])))
            answers.append((number, results_of(found)))

    threads = [threading.Thread(target=call, args=(n,)) for n in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(answers) == 10 * 20
    assert all(results == [f"result of {number}"] for number, results in answers)


async def test_a_thousand_calls_of_one_turn_cross_over_together(shell: Shell, io: IoThread, monkeypatch: Any) -> None:
    posts, arrivals_ = [], []
    post, receive = io.post, LoopPort._receive
    monkeypatch.setattr(io, "post", lambda *functions: (posts.append(len(functions)), post(*functions)))
    monkeypatch.setattr(LoopPort, "_receive", lambda port: (arrivals_.append(1), receive(port)))
    lane = make_lane(Server(seconds=0.01), max_items=2_000)
    port = LoopPort.current()
    await asyncio.gather(*(port.submit(request(shell, lane, [Item(n)])) for n in range(1_000)))
    assert posts == [250] * 4
    assert len(arrivals_) <= 10, "a few, as one turn of a busy thread is at an end before all have their outcomes"


async def test_a_loop_keeps_its_port_and_another_loop_has_another(shell: Shell) -> None:
    port = LoopPort.current()
    others: list[LoopPort] = []

    async def other() -> None:
        others.append(LoopPort.current())

    thread = threading.Thread(target=lambda: asyncio.run(other()))
    thread.start()
    thread.join()
    assert LoopPort.current() is port and others[0] is not port
    assert port.is_running and not others[0].is_running


async def test_a_submission_of_nothing_comes_back(shell: Shell) -> None:
    lane = make_lane(Server())
    assert await LoopPort.current().submit() == []
    assert results_of(await LoopPort.current().submit(request(shell, lane, []))) == []
    assert begun().wait() == []


async def test_callers_contexts_stay_with_the_callers(shell: Shell) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="of nobody")
    seen = []

    async def send(payloads: list[Item], upsert: bool, timeout: float) -> list[str]:
        seen.append(variable.get())
        return [""] * len(payloads)

    variable.set("of the caller")
    await LoopPort.current().submit(request(shell, make_lane(Server(), send=send), [Item(0)]))
    assert seen == ["of nobody"]


def submissions_of(error: BaseException | None) -> list[Submission[Any]]:
    """What a cancelled call knows. Python 3.10 gives whoever awaits its task another error, behind which it stands."""
    while error is not None and not hasattr(error, "submissions"):
        error = error.__context__
    assert error is not None
    found: list[Submission[Any]] = error.submissions  # type: ignore[attr-defined]
    return found


async def test_a_cancelled_call_knows_all_its_outcomes(shell: Shell) -> None:
    server = Server(seconds=0.2)
    lane = make_lane(server, max_items=2, max_in_flight=1)
    call = asyncio.create_task(
        LoopPort.current().submit(request(shell, lane, items(4)), request(shell, lane, items(1)))
    )
    await waiting.until(lambda: server.in_flight == 1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError) as cancelled:
        await call
    submissions = submissions_of(cancelled.value)
    assert [submission.remaining for submission in submissions] == [0, 0]
    failures = [submission.failure(i) for submission in submissions for i in range(len(submission.results))]
    assert sum(failure.ambiguous for failure in failures) == 2


async def test_a_call_that_is_cancelled_at_every_turn_of_the_loop_knows_all_its_outcomes(shell: Shell) -> None:
    """As anyio does it, until the task has ended."""
    server = Server(seconds=0.2)
    call = asyncio.create_task(LoopPort.current().submit(request(shell, make_lane(server), items(100))))
    await waiting.until(lambda: server.in_flight > 0)
    turns = 0
    while not call.done():
        call.cancel()
        turns += 1
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError) as cancelled:
        await call
    assert submissions_of(cancelled.value)[0].remaining == 0
    assert turns > 1


async def test_a_call_that_is_cancelled_before_it_crossed_over_is_not_sent(shell: Shell) -> None:
    server = Server(seconds=0.01)
    call = asyncio.create_task(LoopPort.current().submit(request(shell, make_lane(server), items(4))))
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError) as cancelled:
        await call
    submission = submissions_of(cancelled.value)[0]
    assert submission.remaining == 0
    sent = sum(len(batch) for batch in server.batches)
    assert sent == sum(failure.attempts for failure in map(submission.failure, range(4)))


async def test_a_timeout_is_a_timeout(shell: Shell) -> None:
    lane = make_lane(Server(seconds=0.3))
    with pytest.raises(asyncio.TimeoutError):
        await asyncio.wait_for(LoopPort.current().submit(request(shell, lane, items(4))), 0.05)


async def test_a_coroutine_that_is_closed_gives_its_call_up(shell: Shell) -> None:
    server = Server(seconds=0.1)
    lane = make_lane(server, max_items=1, max_in_flight=1)
    coroutine = LoopPort.current().submit(request(shell, lane, items(50)))
    coroutine.send(None)
    await waiting.until(lambda: server.in_flight == 1)
    coroutine.close()
    await waiting.until(lambda: shell.core.idle)
    assert len(server.batches) <= 2


def test_a_loop_that_is_closed_before_its_answer_comes_disturbs_nobody(shell: Shell) -> None:
    server = Server(seconds=0.05)
    lane = make_lane(server)
    loop = asyncio.new_event_loop()

    async def begin() -> asyncio.Task[Any]:
        task = asyncio.ensure_future(LoopPort.current().submit(request(shell, lane, items(2))))
        await asyncio.sleep(0.01)
        return task

    task = loop.run_until_complete(begin())
    loop.close()
    assert results_of(begun(request(shell, lane, [Item(7)])).wait()) == ["result of 7"]
    task._log_destroy_pending = False  # type: ignore[attr-defined]


def test_a_loop_that_is_closed_after_its_answer_has_come_is_not_kept(shell: Shell) -> None:
    """While it stood still; and though no other loop comes, of a program that goes on without any."""
    server = Server(seconds=0.01)
    loop = asyncio.new_event_loop()

    async def begin() -> None:
        task = asyncio.ensure_future(LoopPort.current().submit(request(shell, make_lane(server), items(2))))
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        await asyncio.sleep(0)

    loop.run_until_complete(begin())
    waiting.blocked_until(lambda: bool(server.batches) and shell.core.idle)
    results_of(
        begun(request(shell, make_lane(Server(seconds=0.01)), [Item(7)])).wait()
    )  # after which the others have arrived
    loop.close()
    kept = weakref.ref(loop)
    del loop
    gc.collect()
    assert kept() is None


def test_a_loop_that_is_closed_before_its_answer_comes_is_not_kept(shell: Shell) -> None:
    lane, loops = make_lane(Server(seconds=0.02)), []
    for _ in range(5):
        loop = asyncio.new_event_loop()

        async def begin() -> None:
            task = asyncio.ensure_future(LoopPort.current().submit(request(shell, lane, items(2))))
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            await asyncio.sleep(0.005)

        loop.run_until_complete(begin())
        loop.close()
        loops.append(weakref.ref(loop))
        del loop
    assert results_of(begun(request(shell, make_lane(Server()), [Item(7)])).wait()) == ["result of 7"]
    waiting.blocked_until(lambda: shell.core.idle)
    asyncio.run(turn_of_a_port())
    gc.collect()
    assert [each() for each in loops] == [None] * 5


async def turn_of_a_port() -> None:
    LoopPort.current()


def test_what_ends_threads_does_not_end_the_io_thread(io: IoThread, shell: Shell) -> None:
    io.loop.set_exception_handler(lambda *_: sys.exit("and again, in the handler of the loop"))
    io.post(lambda: sys.exit("such as a handler of logs may do"))
    assert results_of(begun(request(shell, make_lane(Server()), items(1))).wait()) == ["result of 0"]
    io.loop.set_exception_handler(None)


def test_what_the_handler_of_logs_ends_is_its_own_record(io: IoThread) -> None:
    def exit_at_once(_: object) -> None:
        sys.exit("fatal: a request failed")

    shell = Shell(io.loop, classify, exit_at_once, io.takes_turns)
    io.shells.add(shell)
    lane = make_lane(Server([not_ready]))
    assert results_of(begun(request(shell, lane, items(1))).wait()) == ["result of 0"]


def test_a_blocking_call_on_the_io_thread_is_refused(io: IoThread, shell: Shell) -> None:
    found: list[BaseException] = []
    called = threading.Event()

    def call() -> None:
        try:
            begun(request(shell, make_lane(Server()), items(1)))
        except RuntimeError as error:
            found.append(error)
        called.set()

    io.post(call)
    assert called.wait(5)
    assert "I/O thread" in str(found[0])


@pytest.mark.parametrize("before", [0, 2], ids=["the first request", "one behind others"])
def test_a_defect_before_the_lane_leaves_nobody_waiting(shell: Shell, io: IoThread, before: int) -> None:
    """It finds the lane in the I/O thread; a caller would not hear of a defect there."""
    found: list[Any] = []

    def find() -> Lane[Item, str]:
        raise ZeroDivisionError

    def call() -> None:
        try:
            others = [request(shell, make_lane(Server(seconds=0.01)), items(1)) for _ in range(before)]
            found.append(begun(*others, Request(shell, find, items(1))).wait())
        except Exception as error:
            found.append(error)

    caller = threading.Thread(target=call, daemon=True)
    io.loop.set_exception_handler(lambda _, context: None)
    try:
        caller.start()
        caller.join(5)
    finally:
        io.loop.set_exception_handler(None)
    assert isinstance(found[0], ZeroDivisionError)


def interrupted(after: float, times: int = 1) -> contextlib.AbstractContextManager[None]:
    """Ctrl-C in the main thread, once it waits."""

    def press() -> None:
        for _ in range(times):
            time.sleep(after)
            waiting.press_ctrl_c()

    return waiting.beside(press)


def test_ctrl_c_ends_a_blocking_call_which_knows_all_its_outcomes(shell: Shell) -> None:
    server = Server(seconds=1.5)
    lane = make_lane(server, max_items=2, max_in_flight=1)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt) as pressed, interrupted(0.1):
        begun(request(shell, lane, items(5))).wait()
    assert time.monotonic() - began < 1.0, "it does not wait for the answer"
    submission = pressed.value.submissions[0]  # type: ignore[attr-defined]
    assert submission.remaining == 0
    assert [submission.failure(index).ambiguous for index in range(5)] == [True, True, False, False, False]
    assert threading.current_thread() not in shell_io(shell).blocked


@pytest.mark.parametrize("moment", ["before it is sent", "as it is sent"])
def test_ctrl_c_while_a_call_is_submitted_leaves_nothing_behind(
    shell: Shell, io: IoThread, monkeypatch: Any, moment: str
) -> None:
    lane = make_lane(Server(seconds=100.0), abort_when_unwanted=True)
    post = io.post

    def press(*functions: Any) -> None:
        monkeypatch.setattr(io, "post", post)
        if moment == "as it is sent":
            post(*functions)
        raise KeyboardInterrupt

    monkeypatch.setattr(io, "post", press)
    with pytest.raises(KeyboardInterrupt) as pressed:
        run(ThreadPort().submit(request(shell, lane, items(5))))
    submissions = pressed.value.submissions  # type: ignore[attr-defined]
    assert len(submissions) == (moment == "as it is sent")
    assert all(submission.remaining == 0 for submission in submissions)
    waiting.blocked_until(lambda: lane.idle)


def test_an_impatient_second_ctrl_c_loses_no_outcome(shell: Shell, io: IoThread) -> None:
    lane = make_lane(Server(seconds=0.5))
    voyage = begun(request(shell, lane, items(5)))
    with pytest.raises(KeyboardInterrupt) as pressed, interrupted(0.14, times=2):
        io.post(lambda: time.sleep(0.4))  # so that the cancellation takes a while
        voyage.wait()
    assert pressed.value.submissions[0].remaining == 0  # type: ignore[attr-defined]


def shell_io(shell: Shell) -> IoThread:
    io = IoThread.get()
    assert shell in io.shells
    return io


# --- sixty thousand values


@pytest.fixture
def cleanups() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("keyed", [False, True])
async def test_sixty_thousand_values_keep_no_turn_of_the_loop_long_and_are_cancelled_promptly(
    shell: Shell, io: IoThread, monkeypatch: Any, keyed: bool, cleanups: contextlib.ExitStack
) -> None:
    longest = 0.0
    run_handle = asyncio.Handle._run

    def timed(handle: asyncio.Handle) -> None:
        nonlocal longest
        began = time.thread_time()
        run_handle(handle)
        if io.is_current:
            longest = max(longest, time.thread_time() - began)

    monkeypatch.setattr(asyncio.Handle, "_run", timed)
    cleanups.callback(gc.enable)
    gc.disable()  # a collection looks through what all tests have left behind: not what is measured here
    server = Server(seconds=0.0)
    lane = make_lane(server, max_items=1_000, max_bytes=10**9)
    values = [Item(n, key=n if keyed else None) for n in range(60_000)]
    submissions = await LoopPort.current().submit(request(shell, lane, values))
    assert not submissions[0].failed_indices()
    assert longest < 0.05

    server.seconds = 1.0
    call = asyncio.create_task(LoopPort.current().submit(request(shell, lane, values)))
    await waiting.until(lambda: server.in_flight == 4)
    began = time.monotonic()
    call.cancel()
    with pytest.raises(asyncio.CancelledError) as cancelled:
        await call
    assert time.monotonic() - began < 0.7, "it does not wait for the answers"
    assert submissions_of(cancelled.value)[0].remaining == 0
    assert longest < 0.05


# --- a fork, and the interpreter's exit

PREAMBLE = """
import asyncio, os, sys, threading, time
import tenacity
from llama_index_milvus_async_ext.retry import RetryPolicy
from tests.lane_server import lost
from tests.test_port import *

io = IoThread.get()
shell = Shell(io.loop, classify, lambda _: None, io.takes_turns)
io.shells.add(shell)

def call(count=1, seconds=0.01, **bounds):
    return begun(request(shell, make_lane(Server(seconds=seconds), **bounds), items(count))).wait()
"""


def run_script(script: str) -> subprocess.CompletedProcess[str]:
    return programs.run(PREAMBLE + textwrap.dedent(script))


@pytest.mark.parametrize(
    "script",
    [
        "print(results_of(call()))",
        # a daemon thread still waits
        """
        threading.Thread(target=lambda: call(seconds=100), daemon=True).start()
        print(results_of(call()))
        """,
        # a call was given up by Ctrl-C or a time-out, and its request is still out
        """
        voyage = begun(request(shell, make_lane(Server(seconds=100)), items(1)))
        voyage.cancel()
        print(results_of(call()))
        """,
        # a loop in a daemon thread still waits
        """
        async def wait():
            await LoopPort.current().submit(request(shell, make_lane(Server(seconds=100)), items(1)))

        threading.Thread(target=lambda: asyncio.run(wait()), daemon=True).start()
        time.sleep(0.1)
        print(results_of(call()))
        """,
        # somebody pauses before another attempt
        """
        policy = RetryPolicy(wait=tenacity.wait_fixed(100))
        begun(request(shell, make_lane(Server(script=[lost] * 9, seconds=0), policy=policy), items(1)))
        print(results_of(call(seconds=0.1)))
        """,
        # a thread goes on after the main thread has ended
        """
        def work():
            time.sleep(0.3)
            print(results_of(call()))

        threading.Thread(target=work).start()
        """,
        # so does a loop
        """
        async def work():
            await asyncio.sleep(0.3)
            print(results_of(await LoopPort.current().submit(request(shell, make_lane(Server()), items(1)))))

        threading.Thread(target=lambda: asyncio.run(work())).start()
        """,
        # so does a thread whose call is under way, though a Milvus Lite is served here
        """
        io.serves_in_process = True
        server = Server(seconds=0.3)

        def work():
            print(results_of(begun(request(shell, make_lane(server), items(1))).wait()))

        threading.Thread(target=work).start()
        waiting.blocked_until(lambda: server.in_flight == 1 and io.blocked)
        """,
        # and a loop's
        """
        io.serves_in_process = True
        server = Server(seconds=0.3)

        async def work():
            print(results_of(await LoopPort.current().submit(request(shell, make_lane(server), items(1)))))

        threading.Thread(target=lambda: asyncio.run(asyncio.wait_for(work(), 10))).start()
        waiting.blocked_until(lambda: server.in_flight == 1)
        """,
        # a request fails in the loop's last turn
        """
        failing = asyncio.Event()

        class Closed(Server):
            async def send(self, *_):
                print("['result of 0']", flush=True)
                await failing.wait()
                raise ValueError("closed")

        begun(request(shell, make_lane(Closed()), items(1)))
        begun, go_on = threading.Event(), threading.Event()
        io.loop.call_later(0.1, lambda: (begun.set(), go_on.wait(10)))
        begun.wait(10)
        io.loop.call_soon_threadsafe(failing.set)  # before the end, in the turn that the thread is held in

        def go_on_once_it_ends():
            while not io.ended:
                time.sleep(0.01)
            time.sleep(0.05)  # the thread is told right after
            go_on.set()

        threading.Thread(target=go_on_once_it_ends, daemon=True).start()
        """,
        # a later call gets an error
        """
        import atexit

        atexit.unregister(io.end)

        def late():
            io.end()
            try:
                call()
            except RuntimeError as error:
                assert "exiting" in str(error)
                print(["result of 0"])

        atexit.register(late)
        """,
    ],
)
def test_the_interpreter_exits_at_once_and_in_silence(script: str) -> None:
    began = time.monotonic()
    ended = run_script(script)
    assert (ended.returncode, ended.stdout.strip(), ended.stderr) == (0, "['result of 0']", "")
    assert time.monotonic() - began < 20


def test_a_fork_and_the_opening_of_a_store_wait_for_each_other(io: IoThread) -> None:
    quiet, busy = forks._Quiet(), []

    def fork() -> None:
        quiet.before_fork()
        busy.append(quiet._out)

    def open_a_store() -> None:
        with quiet.busy():
            busy.append(quiet._forks)

    forking, opening = threading.Thread(target=fork), threading.Thread(target=open_a_store)
    with quiet.busy():
        forking.start()
        waiting.blocked_until(lambda: quiet._forks == 1)
    forking.join()
    opening.start()
    opening.join(0.2)
    assert opening.is_alive() and busy == [0]
    quiet.after_fork()
    opening.join()
    assert busy == [0, 0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_an_io_thread_of_its_own() -> None:
    ended = run_script(
        """
        import warnings

        warnings.simplefilter("ignore", DeprecationWarning)
        call()

        async def in_loop(shell):
            return await LoopPort.current().submit(request(shell, make_lane(Server()), items(1)))

        asyncio.run(in_loop(shell))
        child = os.fork()
        if not child:
            assert IoThread.get() is not io
            shell = Shell(IoThread.get().loop, classify, lambda _: None, io.takes_turns)
            print(results_of(call()), results_of(asyncio.run(in_loop(shell))), flush=True)
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
        print(results_of(call()))
        """
    )
    assert ended.stderr == ""
    assert ended.stdout.splitlines() == ["['result of 0'] ['result of 0']", "['result of 0']"]
