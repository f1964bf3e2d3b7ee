"""The lane alone: whatever arrives, fails or is given up, each item gets its own outcome."""

from __future__ import annotations

import asyncio
import math
import random
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_index_milvus_async_ext._lane import Failure, Lane, Submission
from llama_index_milvus_async_ext._limit import Limit
from llama_index_milvus_async_ext.retry import RetryPolicy, RpcFailure, StatusFailure
from tests.virtual_time import run

OK, APPLIED_UNANSWERED, LOST, OVERLOAD, NOT_READY, DENIED = "ok", "applied", "lost", "overload", "not ready", "denied"
ERRORS = {
    APPLIED_UNANSWERED: lambda: RpcFailure("DEADLINE_EXCEEDED", "no answer"),
    LOST: lambda: RpcFailure("UNAVAILABLE", "connection lost"),
    OVERLOAD: lambda: StatusFailure(8, "rate limit"),
    NOT_READY: lambda: StatusFailure(101, "not loaded"),
    DENIED: lambda: StatusFailure(100, "collection not found"),
}


@dataclass
class Server:
    """The far end of a lane, in memory: applies rows as Milvus does, and fails by script.

    It stands for no Milvus: the lane knows nothing of Milvus, and this checks what the lane promises.
    """

    script: list[str] = field(default_factory=list)
    seconds: float = 1.0
    rows: list[Any] = field(default_factory=list)
    batches: list[list[Any]] = field(default_factory=list)
    in_flight: int = 0
    peak: int = 0
    keys_in_flight: set[Any] = field(default_factory=set)

    async def send(self, items: list[Item], upsert: bool, timeout: float) -> list[str]:
        self.batches.append(list(items))
        keys = [item.key for item in items if item.key is not None]
        assert len(set(keys)) == len(keys), "two items of one key in one request"
        assert not self.keys_in_flight.intersection(keys), "two requests with one key at a time"
        self.keys_in_flight.update(keys)
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        try:
            fate = self.script.pop(0) if self.script else OK
            await asyncio.sleep(min(self.seconds, timeout))
            if any(item.bad for item in items) and fate in (OK, APPLIED_UNANSWERED):
                raise StatusFailure(1100, "bad data")
            if fate in (OK, APPLIED_UNANSWERED):
                for item in items:
                    if upsert:
                        self.rows = [row for row in self.rows if row.key != item.key or item.key is None]
                    self.rows.append(item)
            if fate != OK:
                raise ERRORS[fate]()
            return [f"result of {item.name}" for item in items]
        finally:
            self.in_flight -= 1
            self.keys_in_flight.difference_update(keys)


@dataclass(frozen=True)
class Item:
    name: int
    key: Any = None
    bad: bool = False
    unprepared: bool = False
    nbytes: int = 1


def prepare(item: Item) -> tuple[Item, int]:
    if item.unprepared:
        raise ValueError(f"item {item.name} can't be prepared")
    return item, item.nbytes


def make_lane(server: Server, limit: Limit | None = None, **changes: Any) -> Lane[Item, str]:
    loop = asyncio.get_running_loop()
    arguments: dict[str, Any] = {
        "prepare": prepare,
        "send": server.send,
        "limit": limit or Limit(4, clock=loop.time),
        "policy": RetryPolicy(),
        "max_items": 8,
        "max_bytes": 1_000,
        "max_in_flight": 4,
        "ceiling": 4,
        "rpc_timeout_seconds": 30.0,
        "clock": loop.time,
    }
    return Lane(**(arguments | changes))


async def outcome(lane: Lane[Item, str], items: list[Item]) -> Submission[str]:
    done: asyncio.Future[Submission[str]] = asyncio.get_running_loop().create_future()
    keys = [item.key for item in items]
    lane.submit(items, keys if any(key is not None for key in keys) else None, done.set_result)
    return await done


def test_what_is_submitted_together_travels_together() -> None:
    async def scenario() -> None:
        server = Server()
        lane = make_lane(server)
        await asyncio.gather(*(outcome(lane, [Item(n)]) for n in range(8)))
        assert [len(batch) for batch in server.batches] == [8]

    run(scenario())


def test_an_idle_lane_sends_at_once_and_a_busy_one_batches_by_itself() -> None:
    async def scenario() -> None:
        server = Server()
        lane = make_lane(server, max_in_flight=1)
        began = asyncio.get_running_loop().time()
        first = asyncio.create_task(outcome(lane, [Item(0)]))
        await asyncio.sleep(0.5)
        rest = [asyncio.create_task(outcome(lane, [Item(n)])) for n in range(1, 6)]
        await asyncio.gather(first, *rest)
        assert [len(batch) for batch in server.batches] == [1, 5]
        assert asyncio.get_running_loop().time() - began == pytest.approx(2.0)

    run(scenario())


def test_what_waits_is_spread_over_the_free_slots() -> None:
    async def scenario() -> None:
        server = Server()
        lane = make_lane(server, spread_above=3)
        await outcome(lane, [Item(n) for n in range(16)])
        await asyncio.gather(*(outcome(lane, [Item(n)]) for n in range(5)))
        await outcome(lane, [Item(n) for n in range(100)])
        assert [len(batch) for batch in server.batches[:6]] == [4, 4, 4, 4, 3, 2]
        assert [len(batch) for batch in server.batches[6:10]] == [8] * 4, "no larger than max_items"

    run(scenario())


def test_what_comes_while_the_endpoint_is_at_work_is_not_spread() -> None:
    async def scenario() -> None:
        server = Server()
        lane = make_lane(server, spread_above=3)

        async def later(seconds: float) -> None:
            await asyncio.sleep(seconds)
            await outcome(lane, [Item(n) for n in range(8)])

        await asyncio.gather(outcome(lane, [Item(0)]), later(0.5))
        assert [len(batch) for batch in server.batches] == [1, 8]
        await outcome(lane, [Item(n) for n in range(8)])
        assert [len(batch) for batch in server.batches[2:]] == [3, 3, 2], "it is again, once it has nothing to do"

    run(scenario())


def test_batches_keep_to_items_and_bytes() -> None:
    async def scenario() -> None:
        server = Server()
        lane = make_lane(server, max_items=3, max_bytes=10)
        await outcome(lane, [Item(n, nbytes=4) for n in range(4)])
        await outcome(lane, [Item(n) for n in range(7)])
        await outcome(lane, [Item(0, nbytes=5_000)])  # alone it may be larger
        assert [len(batch) for batch in server.batches] == [2, 2, 3, 3, 1, 1]

    run(scenario())


@pytest.mark.parametrize("n", [2, 7, 64, 500])
def test_one_bad_item_fails_alone_and_costs_few_requests(n: int) -> None:
    async def scenario() -> None:
        server = Server()
        lane = make_lane(server, max_items=n)
        submission = await outcome(lane, [Item(i, bad=i == n // 3) for i in range(n)])
        assert set(submission.failures) == {n // 3}
        assert len(server.rows) == n - 1
        assert len(server.batches) <= 2 * math.log2(n) + 2

    run(scenario())


def test_an_item_that_cant_be_prepared_costs_no_request_and_no_neighbour() -> None:
    async def scenario() -> None:
        server = Server()
        lane = make_lane(server)
        submission = await outcome(lane, [Item(0), Item(1, unprepared=True), Item(2)])
        assert [len(batch) for batch in server.batches] == [2]
        failure = submission.failures[1]
        assert isinstance(failure.error, ValueError)
        assert (failure.attempts, failure.retryable, failure.ambiguous) == (0, False, False)

    run(scenario())


def test_a_small_call_does_not_wait_for_a_large_one() -> None:
    async def scenario() -> None:
        server = Server()
        lane = make_lane(server, max_in_flight=1)
        large = asyncio.create_task(outcome(lane, [Item(n) for n in range(800)]))
        await asyncio.sleep(0.5)
        began = asyncio.get_running_loop().time()
        await outcome(lane, [Item(1_000)])
        assert asyncio.get_running_loop().time() - began < 3
        await large

    run(scenario())


def test_items_of_one_key_are_applied_in_order_and_the_last_wins() -> None:
    async def scenario() -> None:
        server = Server()
        lane = make_lane(server)
        one = asyncio.create_task(outcome(lane, [Item(n, key=n % 3) for n in range(9)]))
        two = asyncio.create_task(outcome(lane, [Item(n, key=n % 3) for n in range(9, 12)]))
        await asyncio.gather(one, two)
        sequence = defaultdict(list)
        for batch in server.batches:
            for item in batch:
                sequence[item.key].append(item.name)
        assert all(names == sorted(names) for names in sequence.values())

    run(scenario())


@pytest.mark.parametrize("fate", [LOST, OVERLOAD, NOT_READY, APPLIED_UNANSWERED])
def test_a_passing_fault_is_retried(fate: str) -> None:
    async def scenario() -> None:
        server = Server(script=[fate, fate])
        lane = make_lane(server)
        submission = await outcome(lane, [Item(n, key=n) for n in range(3)])
        assert not submission.failures
        assert submission.retries == 2
        assert sorted(row.name for row in server.rows) == [0, 1, 2], "stored once each"

    run(scenario())


def test_a_permanent_error_is_sent_once() -> None:
    async def scenario() -> None:
        server = Server(script=[DENIED])
        lane = make_lane(server)
        submission = await outcome(lane, [Item(n) for n in range(3)])
        assert len(server.batches) == 1
        assert {f.attempts for f in submission.failures.values()} == {1}
        assert not any(f.retryable or f.ambiguous for f in submission.failures.values())

    run(scenario())


def test_what_no_answer_settled_is_ambiguous_though_it_is_rejected_later() -> None:
    async def scenario() -> None:
        policy = RetryPolicy(max_attempts=2)
        lost = await outcome(make_lane(Server(script=[LOST] * 2), policy=policy), [Item(0)])
        assert lost.failures[0].ambiguous and lost.failures[0].retryable
        rejected = await outcome(make_lane(Server(script=[LOST, OK]), policy=policy), [Item(0, bad=True)])
        assert rejected.failures[0].ambiguous and not rejected.failures[0].retryable
        waiting = await outcome(make_lane(Server(script=[NOT_READY] * 2), policy=policy), [Item(0)])
        assert not waiting.failures[0].ambiguous and waiting.failures[0].retryable

    run(scenario())


def test_overload_is_retried_past_max_attempts_until_the_deadline() -> None:
    async def scenario() -> None:
        policy = RetryPolicy(max_attempts=1, deadline_seconds=60)
        submission = await outcome(make_lane(Server(script=[OVERLOAD] * 10, seconds=0.1), policy=policy), [Item(0)])
        assert not submission.failures
        endless = Server(script=[OVERLOAD] * 100_000, seconds=0.1)
        began = asyncio.get_running_loop().time()
        submission = await outcome(make_lane(endless, policy=policy), [Item(0)])
        assert submission.failures
        assert asyncio.get_running_loop().time() - began <= 61

    run(scenario())


def test_a_dead_endpoint_costs_the_deadline_in_all_however_much_waits() -> None:
    async def scenario() -> None:
        policy = RetryPolicy(max_attempts=1_000, deadline_seconds=20)
        server = Server(script=[LOST] * 100_000, seconds=1e9)
        lane = make_lane(server, policy=policy, rpc_timeout_seconds=6)
        began = asyncio.get_running_loop().time()
        submissions = await asyncio.gather(*(outcome(lane, [Item(n) for n in range(100)]) for _ in range(10)))
        assert asyncio.get_running_loop().time() - began <= 20.1
        failures = [f for s in submissions for f in s.failures.values()]
        assert len(failures) == 1_000
        assert all(f.ambiguous == (f.attempts > 0) for f in failures)

    run(scenario())


def test_a_long_write_that_moves_on_never_meets_the_deadline() -> None:
    async def scenario() -> None:
        policy = RetryPolicy(deadline_seconds=10)
        lane = make_lane(Server(seconds=5), policy=policy, max_in_flight=1)
        submission = await outcome(lane, [Item(n) for n in range(200)])
        assert not submission.failures

    run(scenario())


def test_cancelling_frees_slots_and_leaves_other_callers_alone() -> None:
    async def scenario() -> None:
        server = Server()
        limit = Limit(1)
        lane = make_lane(server, limit=limit, max_items=4)
        mine: list[Submission[str]] = []
        submission = lane.submit([Item(n) for n in range(6)], None, mine.append)
        others = asyncio.create_task(outcome(lane, [Item(100), Item(101)]))
        await asyncio.sleep(0.5)
        lane.cancel(submission)
        assert mine == [submission]
        under_way = {i for i, f in submission.failures.items() if f.ambiguous}
        assert under_way == {item.name for item in server.batches[0] if item.name < 100}
        assert all(f.attempts == 0 for i, f in submission.failures.items() if i not in under_way)
        assert not (await others).failures
        await lane.drained()
        assert limit.in_flight == 0
        assert lane.idle

    run(scenario())


def test_a_read_that_nobody_wants_is_aborted() -> None:
    async def scenario() -> None:
        server = Server(seconds=1_000)
        limit = Limit(1)
        lane = make_lane(server, limit=limit, abort_when_unwanted=True)
        submission = lane.submit([Item(0)], None, lambda _: None)
        await asyncio.sleep(1)
        assert server.in_flight == 1
        lane.cancel(submission)
        await lane.drained()
        assert server.in_flight == 0
        assert limit.in_flight == 0

    run(scenario())


def test_a_thousand_items_of_one_key_can_be_cancelled() -> None:
    async def scenario() -> None:
        lane = make_lane(Server())
        submission = lane.submit([Item(n, key="k") for n in range(5_000)], ["k"] * 5_000, lambda _: None)
        await asyncio.sleep(1.5)
        lane.cancel(submission)
        assert submission.remaining == 0
        later = await outcome(lane, [Item(0, key="k")])
        assert not later.failures
        await lane.drained()
        assert not lane._last_of_key

    run(scenario())


@st.composite
def arrivals(draw: st.DrawFn) -> Any:
    calls = draw(
        st.lists(
            st.tuples(
                st.floats(0, 20),  # when it comes
                st.lists(
                    st.tuples(
                        st.one_of(st.none(), st.integers(0, 5)),  # key
                        st.sampled_from([False] * 8 + [True]),  # bad
                        st.sampled_from([False] * 8 + [True]),  # can't be prepared
                        st.integers(1, 400),  # bytes
                    ),
                    min_size=0,
                    max_size=20,
                ),
                st.one_of(st.none(), st.none(), st.floats(0, 10)),  # when it is given up
            ),
            min_size=1,
            max_size=12,
        )
    )
    fates = st.sampled_from([OK] * 6 + [LOST, APPLIED_UNANSWERED, OVERLOAD, NOT_READY, DENIED])
    spread_above = draw(st.one_of(st.none(), st.integers(1, 9)))
    return calls, draw(st.lists(fates, max_size=40)), draw(st.integers(1, 5)), draw(st.integers(1, 6)), spread_above


@settings(max_examples=200, deadline=None)
@given(arrivals(), st.integers(0, 2**32 - 1))
def test_every_item_gets_exactly_its_own_outcome(world: Any, seed: int) -> None:
    calls, script, maximum, max_in_flight, spread_above = world
    random.seed(seed)

    async def scenario() -> None:
        server = Server(script=list(script), seconds=0.7)
        loop = asyncio.get_running_loop()
        limit = Limit(maximum, clock=loop.time)
        policy = RetryPolicy(max_attempts=4, deadline_seconds=60)
        bounds = {"max_in_flight": max_in_flight, "ceiling": maximum, "spread_above": spread_above}
        lane = make_lane(server, limit=limit, policy=policy, **bounds)
        outcomes: dict[int, int] = defaultdict(int)
        submissions: list[tuple[list[Item], Submission[str], bool]] = []

        async def call(number: int, start: float, spec: Any, give_up: float | None) -> None:
            await asyncio.sleep(start)
            # keys are one caller's or shared by all, at random
            items = [Item(number * 100 + i, k, bad, unp, size) for i, (k, bad, unp, size) in enumerate(spec)]
            done = asyncio.Event()

            def settled(_: Submission[str]) -> None:
                outcomes[number] += 1
                done.set()

            submission = lane.submit(items, [item.key for item in items], settled)
            if give_up is not None:
                loop.call_later(give_up, lane.cancel, submission)
            submissions.append((items, submission, give_up is not None))
            await done.wait()

        await asyncio.gather(*(call(n, *spec) for n, spec in enumerate(calls)))
        await lane.drained()

        assert all(count == 1 for count in outcomes.values()) and len(outcomes) == len(calls)
        assert server.peak <= min(maximum, max_in_flight)
        assert limit.in_flight == 0 and lane.idle and lane.waiting == 0
        stored = [row.name for row in server.rows]
        overwritten = {row.name for batch in server.batches for row in batch} - set(stored)
        for items, submission, cancelled in submissions:
            assert submission.remaining == 0
            for index, item in enumerate(items):
                failure: Failure | None = submission.failures.get(index)
                result = submission.results[index]
                assert (failure is None) == (result == f"result of {item.name}")
                if failure is None:
                    assert not item.bad and not item.unprepared
                    if item.key is None:
                        assert stored.count(item.name) >= 1
                    else:
                        assert stored.count(item.name) <= 1
                        assert item.name in stored or item.name in overwritten
                elif item.unprepared and not cancelled:
                    assert failure.attempts == 0
                elif not failure.ambiguous:
                    assert item.name not in stored, "said to have failed, but stored"

    run(scenario())
