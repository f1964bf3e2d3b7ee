"""The lane's shell, in virtual time: whatever arrives, fails or is given up, each item gets its own outcome."""

from __future__ import annotations

import asyncio
import pickle
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tenacity
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_index_milvus_async_ext._lane.effects import Retry
from llama_index_milvus_async_ext._lane.items import CancelledCallError, Submission
from llama_index_milvus_async_ext._lane.lanes import Lane
from llama_index_milvus_async_ext._lane.shell import Shell
from llama_index_milvus_async_ext.retry import RetryPolicy, Verdict
from tests import virtual_time
from tests.conftest import examples
from tests.lane_server import (
    FaultError,
    Item,
    Server,
    applied_unanswered,
    classify,
    denied,
    items,
    lost,
    make_lane,
    not_ready,
    overload,
    raise_broken_promises,
)


@pytest.fixture(autouse=True)
def promises_are_kept() -> Iterator[None]:
    yield
    raise_broken_promises()


def make_shell(on_retry: Callable[[Retry], object] = lambda _: None) -> Shell:
    return Shell(asyncio.get_running_loop(), classify, on_retry, lambda: False)


def submit(
    shell: Shell, lane: Lane[Item, str], values: list[Item], on_done: Callable[[Submission[str]], None] = lambda _: None
) -> Submission[str]:
    keys = [item.key for item in values]
    return shell.submit(lane, values, keys if any(key is not None for key in keys) else None, None, on_done)


async def outcome(shell: Shell, lane: Lane[Item, str], values: list[Item]) -> Submission[str]:
    done: asyncio.Future[Submission[str]] = asyncio.get_running_loop().create_future()
    submit(shell, lane, values, done.set_result)
    return await done


async def drained(shell: Shell) -> None:
    while not shell.core.idle:  # noqa: ASYNC110 - in virtual time it costs nothing
        await asyncio.sleep(1)
    assert shell.core.in_flight == 0 and shell.core.waiting == 0 and not shell._tasks


def now() -> float:
    return asyncio.get_running_loop().time()


def test_what_is_submitted_together_travels_together() -> None:
    async def scenario() -> None:
        server = Server()
        shell, lane = make_shell(), make_lane(server)
        await asyncio.gather(*(outcome(shell, lane, [Item(n)]) for n in range(8)))
        assert [len(batch) for batch in server.batches] == [8]

    virtual_time.run(scenario())


def test_an_idle_lane_sends_at_once_and_a_busy_one_batches_by_itself() -> None:
    async def scenario() -> None:
        server = Server()
        shell, lane = make_shell(), make_lane(server, max_in_flight=1)
        began = now()
        first = asyncio.create_task(outcome(shell, lane, [Item(0)]))
        await asyncio.sleep(0.5)
        rest = [asyncio.create_task(outcome(shell, lane, [Item(n)])) for n in range(1, 6)]
        await asyncio.gather(first, *rest)
        assert [len(batch) for batch in server.batches] == [1, 5]
        assert now() - began == pytest.approx(2.0)

    virtual_time.run(scenario())


def test_a_small_call_does_not_wait_for_a_large_one() -> None:
    async def scenario() -> None:
        server = Server()
        shell, lane = make_shell(), make_lane(server, max_in_flight=1)
        large = asyncio.create_task(outcome(shell, lane, items(800)))
        await asyncio.sleep(0.5)
        began = now()
        await outcome(shell, lane, [Item(1_000)])
        assert now() - began < 3
        await large

    virtual_time.run(scenario())


@pytest.mark.parametrize("fault", [lost, overload, not_ready, applied_unanswered])
def test_a_passing_fault_is_retried_and_told_of(fault: Callable[[], FaultError]) -> None:
    async def scenario() -> None:
        server = Server(script=[fault, fault])
        told: list[Retry] = []
        shell, lane = make_shell(told.append), make_lane(server)
        submission = await outcome(shell, lane, [Item(n, key=n) for n in range(3)])
        assert not submission.failures and submission.retries == 2
        assert sorted(row.name for row in server.rows) == [0, 1, 2], "stored once each"
        assert [retry.attempt for retry in told] == [1, 2]
        assert all(isinstance(retry.error, FaultError) and retry.error.__traceback__ is None for retry in told)

    virtual_time.run(scenario())


def test_a_dead_endpoint_costs_the_deadline_in_all_however_much_waits() -> None:
    async def scenario() -> None:
        policy = RetryPolicy(max_attempts=1_000, deadline_seconds=20)
        server = Server(script=[lost] * 100_000, seconds=1e9)
        shell, lane = make_shell(), make_lane(server, policy=policy, rpc_timeout_seconds=6)
        began = now()
        submissions = await asyncio.gather(*(outcome(shell, lane, items(100)) for _ in range(10)))
        assert now() - began <= 20.11
        failures = [submission.failure(index) for submission in submissions for index in range(100)]
        assert all(failure and failure.ambiguous == (failure.attempts > 0) for failure in failures)

    virtual_time.run(scenario())


def test_a_long_write_that_moves_on_never_meets_the_deadline() -> None:
    async def scenario() -> None:
        lane = make_lane(Server(seconds=5), policy=RetryPolicy(deadline_seconds=10), max_in_flight=1)
        assert not (await outcome(make_shell(), lane, items(200))).failed_indices()

    virtual_time.run(scenario())


def test_cancelling_frees_slots_and_leaves_other_callers_alone() -> None:
    async def scenario() -> None:
        server = Server()
        shell, lane = make_shell(), make_lane(server, max_items=4, max_in_flight=1)
        mine: list[Submission[str]] = []
        submission = submit(shell, lane, items(6), mine.append)
        others = asyncio.create_task(outcome(shell, lane, items(2, start=100)))
        await asyncio.sleep(0.5)
        shell.cancel(submission)
        assert mine == [submission], "the outcomes are there at once"
        under_way = [item.name for item in server.batches[0] if item.name < 100]
        for index in range(6):
            failure = submission.failure(index)
            assert failure is not None and isinstance(failure.error, CancelledCallError)
            assert failure.ambiguous == (failure.attempts == 1) == (index in under_way)
        assert not (await others).failures
        await drained(shell)

    virtual_time.run(scenario())


def test_a_read_that_nobody_wants_is_aborted() -> None:
    async def scenario() -> None:
        server = Server(seconds=1_000)
        shell, lane = make_shell(), make_lane(server, abort_when_unwanted=True)
        submission = submit(shell, lane, [Item(0)])
        await asyncio.sleep(1)
        assert server.in_flight == 1
        shell.cancel(submission)
        await drained(shell)
        assert server.in_flight == 0 and now() < 1_100

    virtual_time.run(scenario())


def test_a_request_that_ends_before_its_first_step_gives_its_slot_back() -> None:
    async def scenario() -> None:
        server = Server()
        shell, lane = make_shell(), make_lane(server, abort_when_unwanted=True, max_in_flight=1)
        given_up = submit(shell, lane, [Item(0)])
        asyncio.get_running_loop().call_soon(lambda: shell.cancel(given_up))  # after the sending, before the task
        assert not (await outcome(shell, lane, [Item(1)])).failures
        await drained(shell)

    virtual_time.run(scenario())


def test_a_lane_is_found_again_while_it_is_in_use_and_forgotten_when_it_is_idle() -> None:
    async def scenario() -> None:
        shell, server = make_shell(), Server()

        def make() -> Lane[Item, str]:
            return make_lane(server)

        lane = shell.lane("key", make)
        done = asyncio.create_task(outcome(shell, lane, [Item(0)]))
        await asyncio.sleep(0.5)
        assert shell.lane("key", make) is lane
        await done
        await drained(shell)
        assert not shell._lanes
        given_up = shell.lane("key", make)
        shell.cancel(submit(shell, given_up, [Item(0)]))
        await drained(shell)
        assert not shell._lanes
        for aborts in (False, True):
            lane = shell.lane("key", lambda: make_lane(server, abort_when_unwanted=aborts))  # noqa: B023
            under_way = submit(shell, lane, [Item(0)])
            await asyncio.sleep(0.5)
            assert server.in_flight == 1
            shell.cancel(under_way)
            await drained(shell)
            assert not shell._lanes

    virtual_time.run(scenario())


def test_while_it_is_held_nothing_new_is_sent() -> None:
    async def scenario() -> None:
        server = Server()
        shell, lane = make_shell(), make_lane(server)
        shell.hold(True)
        done = asyncio.create_task(outcome(shell, lane, [Item(0)]))
        await asyncio.sleep(5)
        assert not server.batches
        shell.hold(False)
        assert not (await done).failures

    virtual_time.run(scenario())


class PanicError(BaseException):
    """As a library written in Rust raises it."""


def panic(*_: object) -> Any:
    raise PanicError


@pytest.mark.parametrize(
    "policy",
    [
        RetryPolicy(stop=lambda _: 1 / 0),  # type: ignore[arg-type,return-value]
        RetryPolicy(wait=lambda _: None),  # type: ignore[arg-type,return-value]
        RetryPolicy(stop=panic),
        RetryPolicy(wait=panic),
    ],
)
def test_a_defect_in_the_users_stop_or_wait_leaves_nobody_waiting(policy: RetryPolicy) -> None:
    async def scenario() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: None)
        shell, lane = make_shell(), make_lane(Server(script=[lost]), policy=policy)
        submission = await asyncio.wait_for(outcome(shell, lane, items(2)), 500)
        assert submission.failed_indices() == [0, 1]
        assert submission.failures[0].ambiguous
        assert not (await outcome(shell, lane, items(2))).failures, "the next call is none the worse for it"
        await drained(shell)

    virtual_time.run(scenario())


@pytest.mark.parametrize("attempt", [1, 2])
def test_an_item_whose_preparation_panics_fails_alone_at_whatever_attempt(attempt: int) -> None:
    prepared: list[int] = []

    def prepare(item: Item) -> tuple[Item, int]:
        prepared.append(item.name)
        if item.name == 1 and prepared.count(1) == attempt:
            panic()
        return item, item.nbytes

    async def scenario() -> None:
        shell, lane = make_shell(), make_lane(Server(script=[lost] if attempt > 1 else []))
        lane.prepare = prepare
        submission = await asyncio.wait_for(outcome(shell, lane, items(3)), 500)
        assert submission.failed_indices() == [1]
        assert isinstance(submission.failures[1].error.__cause__, PanicError)
        assert not (await outcome(shell, lane, items(3))).failures
        await drained(shell)

    virtual_time.run(scenario())


@pytest.mark.parametrize("error", [ZeroDivisionError, PanicError])
def test_a_defect_in_the_table_of_errors_leaves_nobody_waiting(error: type[BaseException]) -> None:
    def defect(_: BaseException) -> Verdict:
        raise error

    async def scenario() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: None)
        shell = Shell(asyncio.get_running_loop(), defect, lambda _: None, lambda: False)
        submission = await asyncio.wait_for(outcome(shell, make_lane(Server(script=[lost])), items(2)), 500)
        assert submission.failed_indices() == [0, 1]
        assert submission.failures[0].ambiguous
        await drained(shell)

    virtual_time.run(scenario())


def test_a_retry_that_can_not_be_logged_is_made_all_the_same() -> None:
    def fail(_: Retry) -> None:
        raise ZeroDivisionError

    async def scenario() -> None:
        told: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))
        shell, lane = make_shell(fail), make_lane(Server(script=[lost]))
        began = now()
        assert not (await outcome(shell, lane, items(2))).failures
        assert now() - began < 3, "two requests of a second, and a pause of a tenth at the most"
        assert isinstance(told[0], ZeroDivisionError)

    virtual_time.run(scenario())


@pytest.mark.parametrize("error", [ZeroDivisionError, PanicError])
def test_a_defect_in_the_core_leaves_nobody_waiting(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def defect(_: float) -> bool:
        raise error

    async def scenario() -> None:
        told: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))
        shell, lane = make_shell(), make_lane(Server())
        monkeypatch.setattr(shell.core, "step", defect)
        submission = await asyncio.wait_for(outcome(shell, lane, items(2)), 500)
        assert submission.failed_indices() == [0, 1]
        assert isinstance(told[0], error)

    virtual_time.run(scenario())


@st.composite
def arrivals(draw: st.DrawFn) -> Any:
    values = st.tuples(
        st.integers(0, 5),  # key
        st.sampled_from([False] * 8 + [True]),  # bad
        st.sampled_from([False] * 8 + [True]),  # can't be prepared
        st.integers(1, 400),  # bytes
    )
    calls = draw(
        st.lists(
            st.tuples(
                st.floats(0, 20),  # when it comes
                st.lists(values, max_size=20),
                st.one_of(st.none(), st.none(), st.floats(0, 10)),  # when it is given up
            ),
            min_size=1,
            max_size=12,
        )
    )
    faults = st.sampled_from([None] * 6 + [lost, applied_unanswered, overload, not_ready, denied])
    spread_above = draw(st.one_of(st.none(), st.integers(1, 9)))
    bounds = {
        "ceiling": draw(st.integers(1, 5)),
        "max_in_flight": draw(st.integers(1, 6)),
        "spread_above": spread_above,
    }
    return calls, draw(st.lists(faults, max_size=40)), draw(st.booleans()), bounds


@settings(max_examples=examples(100), deadline=None)
@given(arrivals(), st.integers(0, 2**32 - 1))
def test_every_item_gets_exactly_its_own_outcome(world: Any, seed: int) -> None:
    calls, script, keyed, bounds = world
    random.seed(seed)

    async def scenario() -> None:
        server = Server(script=list(script), seconds=0.7)
        shell = make_shell()
        lane = make_lane(server, policy=RetryPolicy(max_attempts=4, deadline_seconds=60), **bounds)
        outcomes: dict[int, int] = defaultdict(int)
        submissions: list[tuple[list[Item], Submission[str], bool]] = []

        async def call(number: int, start: float, spec: Any, give_up: float | None) -> None:
            await asyncio.sleep(start)
            values = [
                Item(number * 100 + index, key if keyed else None, *traits) for index, (key, *traits) in enumerate(spec)
            ]
            done = asyncio.Event()

            def settled(_: Submission[str]) -> None:
                outcomes[number] += 1
                done.set()

            submission = submit(shell, lane, values, settled)
            if give_up is not None:
                asyncio.get_running_loop().call_later(give_up, shell.cancel, submission)
            submissions.append((values, submission, give_up is not None))
            await done.wait()

        await asyncio.gather(*(call(n, *spec) for n, spec in enumerate(calls)))
        await drained(shell)
        assert not server.broken

        assert all(count == 1 for count in outcomes.values()) and len(outcomes) == len(calls)
        assert server.peak <= min(bounds["ceiling"], bounds["max_in_flight"])
        assert lane.idle and not lane.entrance.knows_keys
        stored = [row.name for row in server.rows]
        overwritten = {row.name for batch in server.batches for row in batch} - set(stored)
        for values, submission, cancelled in submissions:
            for index, item in enumerate(values):
                failure = submission.failure(index)
                assert (failure is None) == (submission.results[index] == f"result of {item.name}")
                if failure is None:
                    assert not item.bad and not item.unprepared
                    assert item.name in stored or (item.key is not None and item.name in overwritten)
                    assert item.key is None or stored.count(item.name) <= 1
                elif item.unprepared and not cancelled:
                    assert failure.attempts == 0
                elif not failure.ambiguous:
                    assert item.name not in stored, "said to have failed, but stored"

    virtual_time.run(scenario())


# --- the user's own stop and wait


def test_the_users_stop_and_wait_are_asked_with_number_error_and_seconds() -> None:
    asked: list[tuple[int, str, float, float]] = []

    def stop(state: tenacity.RetryCallState) -> bool:
        assert state.outcome is not None and state.seconds_since_start is not None
        error = state.outcome.exception()
        assert isinstance(error, FaultError)
        asked.append((state.attempt_number, error.verdict.name, state.seconds_since_start, state.idle_for))
        return state.attempt_number >= 4

    async def scenario() -> None:
        policy = RetryPolicy(stop=stop, wait=tenacity.wait_fixed(10))
        server = Server(script=[lost, overload, not_ready, lost, lost])
        submission = await outcome(make_shell(), make_lane(server, policy=policy), [Item(0)])
        assert len(server.batches) == 4
        assert submission.failures[0].attempts == 4

    virtual_time.run(scenario())
    assert asked == [
        (1, "AMBIGUOUS", pytest.approx(1), 0),
        (2, "OVERLOAD", pytest.approx(12), 10),
        (3, "TRANSIENT", pytest.approx(23), 20),
        (4, "AMBIGUOUS", pytest.approx(34), 30),
    ]


@pytest.mark.parametrize(
    ("policy", "requests"),
    [
        (RetryPolicy(max_attempts=1), 1),
        (RetryPolicy(max_attempts=3), 3),
        (RetryPolicy(stop=tenacity.stop_after_attempt(5), wait=tenacity.wait_none()), 5),
        (RetryPolicy(stop=tenacity.stop_after_delay(20), wait=tenacity.wait_fixed(4)), 5),  # ends at 1, 6, 11, 16, 21
        (RetryPolicy(stop=tenacity.stop_never, wait=tenacity.wait_fixed(9), deadline_seconds=35), 5),
        (RetryPolicy(wait=tenacity.wait_fixed(-5), max_attempts=2), 2),
    ],
)
def test_a_request_is_repeated_as_often_as_the_policy_says(policy: RetryPolicy, requests: int) -> None:
    async def scenario() -> None:
        server = Server(script=[lost] * 1_000)
        await outcome(make_shell(), make_lane(server, policy=policy), [Item(0)])
        assert len(server.batches) == requests

    virtual_time.run(scenario())


@pytest.mark.parametrize(
    "policy",
    [
        RetryPolicy(),
        RetryPolicy(stop=tenacity.stop_after_delay(60), wait=tenacity.wait_fixed(1)),
        RetryPolicy(stop=tenacity.stop_after_delay(60) | tenacity.stop_after_attempt(3)),
    ],
)
def test_a_policy_is_hashable_and_survives_pickling(policy: RetryPolicy) -> None:
    assert {policy: 1}[policy] == 1
    again = pickle.loads(pickle.dumps(policy))
    assert (again.max_attempts, type(again.stop), type(again.wait)) == (50, type(policy.stop), type(policy.wait))
