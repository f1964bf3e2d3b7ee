"""The pure core alone, under a simulated clock: whatever comes in any order, it keeps what its docstring promises."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tenacity
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llama_index_milvus_async_ext._lane import core as core_module
from llama_index_milvus_async_ext._lane import entrance as entrance_module
from llama_index_milvus_async_ext._lane import ledger as ledger_module
from llama_index_milvus_async_ext._lane.entrance import Entrance
from llama_index_milvus_async_ext._lane.items import CancelledCallError, DeadlinePassedError
from llama_index_milvus_async_ext._lane.lanes import Flight, GivesWay, Lane
from llama_index_milvus_async_ext._lane.precedence import URGENT_SECONDS
from llama_index_milvus_async_ext.retry import RetryPolicy, Verdict
from tests.conftest import examples
from tests.lane_world import LAST_ATTEMPT_SECONDS, Call, Value, World


@pytest.fixture
def world() -> World:
    return World()


VALUES = st.builds(
    Value,
    key=st.integers(0, 4),
    nbytes=st.sampled_from([1, 1, 1, 3, 30]),
    bad=st.sampled_from([False] * 7 + [True]),
    unpreparable=st.sampled_from([False] * 9 + [True]),
)
FATES = st.sampled_from([None, None, None, None, *Verdict])
ANY = st.integers(0, 11)


class CoreMachine(RuleBasedStateMachine):
    """All that can come to a core, in any order."""

    @initialize(
        capacity=st.integers(2, 9),
        window=st.integers(1, 5),
        per_step=st.integers(1, 4),
        ceilings=st.lists(st.integers(1, 4), min_size=5, max_size=5),
        in_flight=st.lists(st.integers(1, 3), min_size=5, max_size=5),
        attempts=st.integers(1, 4),
        pause=st.sampled_from([0.0, 0.05, 1.0]),
    )
    def begin(
        self,
        capacity: int,
        window: int,
        per_step: int,
        ceilings: list[int],
        in_flight: list[int],
        attempts: int,
        pause: float,
    ) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(entrance_module, "WINDOW", window)
        self.patch.setattr(core_module, "_ITEMS_PER_STEP", per_step)
        self.patch.setattr(ledger_module, "_EXPIRED_PER_STEP", 2)
        self.world = world = World()
        shared = Entrance(capacity)
        patient = RetryPolicy(max_attempts=attempts, deadline_seconds=10, wait=tenacity.wait_fixed(pause))
        hasty = RetryPolicy(max_attempts=3, deadline_seconds=4, wait=tenacity.wait_fixed(1))
        lanes: list[dict[str, Any]] = [
            {"entrance": shared, "max_items": 4, "max_bytes": 20, "policy": patient},
            {"entrance": shared, "max_items": 3, "max_bytes": 5, "policy": hasty},
            {
                "entrance": Entrance(20),
                "abort_when_unwanted": True,
                "spread_above": 2,
                "policy": hasty,
                "kind": "asked",
            },
            {"entrance": Entrance(5), "exclusive": "a file", "policy": patient},
            {"entrance": Entrance(7), "exclusive": "a file", "max_items": 1, "policy": hasty},
        ]
        for number, lane in enumerate(lanes):
            bounds = {"ceiling": ceilings[number], "max_in_flight": in_flight[number], "rpc_timeout_seconds": 3.0}
            world.lane(**(bounds | lane))

    def _lane(self, number: int) -> Lane[Value, str]:
        return self.world.lanes[(0, 1, 0, 1, 0, 1, 2, 2, 3, 4, 0, 1)[number]]

    @rule(lane=ANY, values=st.lists(VALUES, max_size=6))
    def submit(self, lane: int, values: list[Value]) -> None:
        self.world.submit(self._lane(lane), values)

    @rule(lane=ANY, values=st.lists(VALUES, min_size=2, max_size=6))
    def submit_each_by_itself(self, lane: int, values: list[Value]) -> None:
        for value in values:
            self.world.submit(self._lane(lane), [value])

    @rule(lane=ANY, count=st.integers(7, 40), first=st.integers(0, 9))
    def submit_many_of_different_keys(self, lane: int, count: int, first: int) -> None:
        self.world.submit(self._lane(lane), [Value(key=first + n) for n in range(count)])

    @rule()
    def one_step(self) -> None:
        self.world.step()

    @rule()
    def all_steps(self) -> None:
        self.world.settle_down()

    @precondition(lambda self: self.world.out)
    @rule(which=ANY, verdict=FATES, executed=st.booleans())
    def answer(self, which: int, verdict: Verdict | None, executed: bool) -> None:
        flights = list(self.world.out)
        self.world.answer(flights[which % len(flights)], verdict, executed)

    @precondition(lambda self: self.world.out)
    @rule(which=ANY)
    def answer_too_little(self, which: int) -> None:
        flights = list(self.world.out)
        self.world.answer(flights[which % len(flights)], None, missing=1)

    @precondition(lambda self: self.world.calls)
    @rule(which=st.integers(0, 40), settled_too=st.sampled_from([False] * 9 + [True]))
    def cancel(self, which: int, settled_too: bool) -> None:
        calls = [call for call in self.world.calls if settled_too or call.open]
        if calls:
            call = calls[-1 - which % len(calls)]
            event(f"cancelled: {self._state_of(call)}")
            self.world.cancel(call)

    @precondition(lambda self: self.world.out)
    @rule(which=ANY, verdict=FATES)
    def cancel_one_of_a_batch_and_answer_it(self, which: int, verdict: Verdict | None) -> None:
        flight = list(self.world.out)[which % len(self.world.out)]
        for call in self.world.calls:
            if call.open and any(item.flight is flight for item in call.outcomes.live):
                self.world.cancel(call)
                break
        self.world.answer(flight, verdict)

    @rule(seconds=st.sampled_from([0.01, 0.1, 0.5, 1.0, 3.0, 5.0]), executed=st.booleans())
    def time_passes(self, seconds: float, executed: bool) -> None:
        self.world.advance(seconds, executed)

    @rule(executed=st.booleans())
    def time_passes_until_something_is_due(self, executed: bool) -> None:
        self.world.settle_down()
        at = self.world.next_event()
        if at is not None:
            self.world.advance(max(at - self.world.now, 0.0), executed)

    @rule(seconds=st.sampled_from([0.01, 0.08, 0.5, 5.0]))
    def the_loop_is_busy_elsewhere(self, seconds: float) -> None:
        self.world.stall(seconds)

    @rule(sure=st.sampled_from([False] * 9 + [True]))
    def cancel_all(self, sure: bool) -> None:
        if sure:
            self.world.cancel_all()

    @invariant()
    def everything_is_as_it_should_be(self) -> None:
        if hasattr(self, "world"):
            self.world.check()
            if any(call.open and 0 < call.outcomes.entered < len(call.values) for call in self.world.calls):
                event("partly in")

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            self.world.finish()
            self.world.check_that_nothing_is_left()
        finally:
            self.patch.undo()

    def _state_of(self, call: Call) -> str:
        items = list(call.outcomes.live)
        if not call.open:
            return "settled"
        if any(item.flight in self.world.out for item in items):
            return "sent"
        if any(item.flight is not None and item.flight is item.flight.lane.filling for item in items):
            return "filling"
        return "paused" if any(item.flight is not None for item in items) else "waiting"


TestCore = CoreMachine.TestCase
TestCore.settings = settings(max_examples=examples(300), stateful_step_count=50, deadline=None)


# --- each guarantee by itself


def patient(**changes: Any) -> RetryPolicy:
    return RetryPolicy(**({"max_attempts": 1_000, "deadline_seconds": 20, "wait": tenacity.wait_fixed(1)} | changes))


def first(world: World) -> Flight[Value]:
    return next(iter(world.out))


def names(values: Sequence[Value]) -> list[int]:
    return [value.number for value in values]


def sizes(world: World) -> list[int]:
    return [len(values) for _, values in world.requests]


def test_what_is_submitted_together_travels_together(world: World) -> None:
    lane = world.lane()
    for _ in range(8):
        world.submit_many(lane, 1)
    world.finish()
    assert sizes(world) == [8]
    world.check_that_nothing_is_left()


def test_a_busy_lane_batches_by_itself(world: World) -> None:
    lane = world.lane(max_in_flight=1)
    world.submit_many(lane, 1)
    world.settle_down()
    for _ in range(5):
        world.submit_many(lane, 1)
    world.finish()
    assert sizes(world) == [1, 5]


def test_batches_keep_to_items_and_bytes_and_one_item_alone_may_be_larger(world: World) -> None:
    lane = world.lane(max_items=3, max_bytes=10)
    world.submit(lane, [Value(nbytes=4)] * 4)
    world.submit_many(lane, 7)
    world.finish()
    world.submit(lane, [Value(nbytes=5_000), Value()])
    world.finish()
    assert max(sizes(world)) <= 3
    assert [names(values) for _, values in world.requests][-2:] == [[12], [13]]


@pytest.mark.parametrize(
    ("nbytes", "requests"),
    [
        ([4, 6], [[1, 2]]),
        ([4, 6, 1], [[1, 2], [3]]),
        ([4, 7], [[1], [2]]),
        ([4, 7, 3], [[1], [2, 3]]),
        ([10, 1], [[1], [2]]),
        ([11, 1], [[1], [2]]),
        ([0, 10, 0, 1], [[1, 2, 3], [4]]),
        ([1, 1, 1, 1], [[1, 2, 3], [4]]),
    ],
)
def test_a_request_takes_exactly_what_it_may_and_not_one_byte_or_item_more(
    world: World, nbytes: list[int], requests: list[list[int]]
) -> None:
    world.submit(world.lane(max_items=3, max_bytes=10), [Value(nbytes=n) for n in nbytes])
    world.finish()
    assert [names(values) for _, values in world.requests] == requests


def test_what_comes_to_an_idle_lane_is_spread_over_the_free_slots(world: World) -> None:
    lane = world.lane(spread_above=3)
    world.submit_many(lane, 16)
    world.finish()
    for _ in range(5):
        world.submit_many(lane, 1)
    world.finish()
    world.submit_many(lane, 100)
    world.finish()
    assert sizes(world)[:6] == [4, 4, 4, 4, 3, 2]
    assert sizes(world)[6:10] == [8] * 4, "no larger than max_items"


@pytest.mark.parametrize(("count", "requests"), [(3, [3]), (4, [3, 1]), (13, [4, 3, 3, 3]), (32, [8, 8, 8, 8])])
def test_what_is_spread_is_spread_evenly_and_not_thinly(world: World, count: int, requests: list[int]) -> None:
    world.submit_many(world.lane(spread_above=3), count)
    world.finish()
    assert sizes(world) == requests


def test_what_is_spread_is_spread_over_the_slots_that_its_own_lane_may_take(world: World) -> None:
    world.submit_many(world.lane(spread_above=2, max_in_flight=2), 12)
    world.finish()
    assert sizes(world) == [6, 6]


def test_what_comes_while_the_endpoint_is_at_work_is_not_spread(world: World) -> None:
    lane = world.lane(spread_above=3)
    world.submit_many(lane, 1)
    world.settle_down()
    world.submit_many(lane, 8)
    world.finish()
    assert sizes(world) == [1, 8]
    world.submit_many(lane, 8)
    world.finish()
    assert sizes(world)[2:] == [3, 3, 2], "it is again, once it has nothing to do"


def test_a_call_of_nothing_is_answered_at_once(world: World) -> None:
    call = world.submit_many(world.lane(), 0)
    world.perform()
    assert not call.open
    world.check_that_nothing_is_left()


@pytest.mark.parametrize("n", [2, 7, 64, 500, 1_000])
@pytest.mark.parametrize("place", [0.0, 0.33, 1.0])
def test_one_bad_item_fails_alone_and_costs_few_requests(world: World, n: int, place: float) -> None:
    bad = int((n - 1) * place)
    call = world.submit(world.lane(max_items=n, max_in_flight=1), [Value(bad=index == bad) for index in range(n)])
    assert world.finish() <= 2 * math.log2(n) + 2
    assert call.outcomes.failed_indices() == [bad]
    failure = call.failures[bad]
    assert failure is not None and not failure.retryable and not failure.ambiguous


@pytest.mark.parametrize("n", [1, 2, 7, 64, 68, 500, 1_000])
def test_a_batch_of_bad_items_costs_a_bounded_number_of_requests(world: World, n: int) -> None:
    call = world.submit(world.lane(max_items=n, max_in_flight=1), [Value(bad=True)] * n)
    doublings = n.bit_length()
    assert world.finish() <= min(2 * n, 8 * doublings + 8 + doublings)
    alone = {
        index for index, value in enumerate(call.values) if any(carried == [value] for _, carried in world.requests)
    }
    assert [failure.retryable for failure in call.failures if failure] == [index not in alone for index in range(n)]


def test_a_request_that_is_too_large_is_split_until_it_is_not(world: World) -> None:
    call = world.submit_many(world.lane(max_items=16), 16)
    world.finish(lambda values: Verdict.TOO_LARGE if len(values) > 4 else None)
    assert call.outcomes.failed_indices() == [] and call.outcomes.retries == 0
    assert sizes(world) == [16, 8, 4, 4, 8, 4, 4]
    call = world.submit_many(world.lane(), 1)
    assert world.finish(lambda _: Verdict.TOO_LARGE) == 1
    assert call.failures[0] is not None and not call.failures[0].retryable


def test_as_many_bad_items_as_may_be_paid_for_are_each_told_apart(world: World) -> None:
    bad = [index for index in range(64) if index % 5 == 4]
    call = world.submit(world.lane(max_items=64, max_in_flight=1), [Value(bad=index in bad) for index in range(64)])
    world.finish()
    assert call.outcomes.failed_indices() == bad
    assert not any(failure.retryable for failure in call.failures if failure)


def test_an_item_that_cant_be_prepared_costs_no_request_and_no_neighbour(world: World) -> None:
    call = world.submit(world.lane(), [Value(), Value(unpreparable=True), Value()])
    world.finish()
    assert sizes(world) == [2]
    failure = call.failures[1]
    assert failure is not None and isinstance(failure.error, ValueError) and failure.error.__traceback__ is None
    assert (failure.attempts, failure.retryable, failure.ambiguous) == (0, False, False)
    assert call.outcomes.failed_indices() == [1]


def test_an_error_of_one_item_holds_no_frames_and_nor_do_its_causes(world: World) -> None:
    def prepare_badly(value: Value) -> tuple[Value, int]:
        try:
            try:
                raise KeyError("hidden")
            except KeyError:
                raise OSError("cause")  # noqa: B904 - so that it hides the other one
        except OSError as error:
            raise ValueError("effect") from error

    call = world.submit_many(world.lane(prepare=prepare_badly), 1)
    world.finish()
    assert call.failures[0] is not None
    error: BaseException | None = call.failures[0].error
    for kind in (ValueError, OSError, KeyError):
        assert type(error) is kind and error.__traceback__ is None
        error = error.__cause__ or error.__context__


def test_an_item_that_cant_be_prepared_again_costs_its_neighbours_nothing(world: World) -> None:
    unpreparable: set[Value] = set()

    def prepare_once(value: Value) -> tuple[Value, int]:
        if value in unpreparable:
            raise ValueError("gone")
        return value, 1

    lane = world.lane(prepare=prepare_once)
    call = world.submit_many(lane, 3)
    world.settle_down()
    unpreparable.add(call.values[1])
    world.answer(first(world), Verdict.AMBIGUOUS)
    for _ in range(2):
        world.now += 1
        world.settle_down()
    assert sizes(world) == [3, 2]
    world.answer(first(world), None)
    failure = call.outcomes.failure(1)
    assert failure is not None and failure.ambiguous and failure.attempts == 1
    assert call.outcomes.failed_indices() == [1]
    world.check_that_nothing_is_left()


def test_too_few_results_fail_all_and_say_that_they_may_have_been_stored(world: World) -> None:
    call = world.submit_many(world.lane(), 3)
    world.settle_down()
    world.answer(first(world), None, missing=1)
    assert all(failure and failure.ambiguous and not failure.retryable for failure in call.failures)
    world.check_that_nothing_is_left()


def test_equal_keys_go_one_after_the_other_in_the_order_of_submission_across_lanes(world: World) -> None:
    shared = Entrance(100)
    lanes = [world.lane(entrance=shared, max_items=size) for size in (2, 5)]
    for number in range(12):
        world.submit(lanes[number % 2], [Value(key=1), Value(key=number)])
    world.finish()
    assert [value.number for _, values in world.requests for value in values if value.key == 1] == [
        value.number for call in world.calls for value in call.values if value.key == 1
    ]
    assert max(sum(value.key == 1 for value in values) for _, values in world.requests) == 1
    world.check_that_nothing_is_left()


def test_what_has_no_key_waits_behind_nothing(world: World) -> None:
    world.submit(world.lane(), [Value(key=1), Value(), Value(), Value(key=2)])
    world.finish()
    assert sizes(world) == [4]
    world.check_that_nothing_is_left()


def test_a_call_waits_behind_an_equal_key_of_one_that_is_not_in_yet(world: World, monkeypatch: Any) -> None:
    monkeypatch.setattr(entrance_module, "WINDOW", 4)
    shared = Entrance(8)
    large, small = world.lane(entrance=shared, max_items=4, max_in_flight=1), world.lane(entrance=shared)
    slow = world.submit(large, [Value(key=key) for key in range(40)])
    equal, other = world.submit(small, [Value(key=39)]), world.submit(small, [Value(key=100)])
    after_it = world.submit(small, [Value(key=39), Value(key=101)])
    world.settle_down()
    while equal.open:
        if not other.open:
            assert slow.values[39] in world.acknowledged or not world.attempts[equal.values[0]]
        world.answer(first(world), None)
        world.settle_down()
    assert slow.values[39] in world.acknowledged
    world.finish()
    order = [value for _, values in world.requests for value in values]
    assert order.index(other.values[0]) < order.index(slow.values[20]), "what shares no key does not wait"
    assert order.index(equal.values[0]) < order.index(after_it.values[0])


def test_a_call_waits_behind_an_equal_key_of_one_that_is_kept_out(world: World, monkeypatch: Any) -> None:
    monkeypatch.setattr(entrance_module, "WINDOW", 2)
    lane = world.lane(entrance=Entrance(2), max_items=2, max_in_flight=1)
    world.submit(lane, [Value(key=key) for key in range(10)])
    kept_out, behind = world.submit(lane, [Value(key=9), Value(key=100)]), world.submit(lane, [Value(key=100)])
    world.finish()
    order = [value for _, values in world.requests for value in values]
    assert order.index(kept_out.values[1]) < order.index(behind.values[0])


def test_an_item_whose_key_came_before_is_sent_as_an_upsert(world: World) -> None:
    world.submit(world.lane(), [Value(key=1), Value(key=2), Value(key=1)])
    world.finish()
    assert [(len(values), upsert) for (_, values), upsert in zip(world.requests, world.upserts, strict=True)] == [
        (2, False),
        (1, True),
    ]


def test_an_equal_key_far_behind_in_the_same_call_is_sent_as_an_upsert_too(world: World) -> None:
    lane = world.lane(entrance=Entrance(2), max_items=1, max_in_flight=1)
    world.submit(lane, [Value(key=1), Value(key=2), Value(key=3), Value(key=1)])
    world.finish()
    assert world.upserts == [False, False, False, True]


def test_an_equal_key_is_sent_as_an_upsert_though_later_calls_were_looked_at_first(
    world: World, monkeypatch: Any
) -> None:
    monkeypatch.setattr(entrance_module, "WINDOW", 2)
    lane = world.lane(entrance=Entrance(2), ceiling=1, max_in_flight=1, max_items=2)
    world.submit(lane, [Value(key=key) for key in range(9)])
    second = world.submit(lane, [Value(key=1), Value(key=0)])
    world.settle_down()
    world.answer(first(world), Verdict.UNEXPECTED)
    world.settle_down()
    world.submit(lane, [Value(key=key) for key in range(7)])
    world.finish()
    sent = zip(world.requests, world.upserts, strict=True)
    assert all(upsert for (_, values), upsert in sent if set(values).intersection(second.values))


@pytest.mark.parametrize("verdict", [Verdict.TRANSIENT, Verdict.OVERLOAD, Verdict.AMBIGUOUS])
def test_a_passing_fault_is_retried_after_a_pause(world: World, verdict: Verdict) -> None:
    call = world.submit(world.lane(), [Value(key=key) for key in range(3)])
    for attempt in range(2):
        world.settle_down()
        assert len(world.requests) == attempt + 1
        world.answer(first(world), verdict)
        assert world.core.in_flight == 0, "a pause takes no slot"
        world.advance(1)
    world.finish()
    assert not call.outcomes.failed_indices() and call.outcomes.retries == 2
    assert world.upserts == [False] + [verdict is Verdict.AMBIGUOUS] * 2
    assert all(len(rows) == 1 for rows in world.rows.values())


def test_a_retry_of_a_shared_request_counts_for_each_call_in_it_and_once_in_all(world: World) -> None:
    lane = world.lane()
    calls = [world.submit_many(lane, count) for count in (1, 2, 3)]
    alone = world.submit_many(world.lane(), 1)
    fates = iter([Verdict.TRANSIENT, None, Verdict.OVERLOAD, Verdict.AMBIGUOUS])
    world.finish(lambda _: next(fates, None))
    assert [call.outcomes.retries for call in (*calls, alone)] == [3, 3, 3, 0]
    assert dict(world.core.counts) == {"requests": 5, "retries": 3, "items": 4 * 6 + 1}


@pytest.mark.parametrize("verdict", [Verdict.PERMANENT, Verdict.FULL, Verdict.UNEXPECTED])
def test_what_no_other_attempt_mends_is_sent_once(world: World, verdict: Verdict) -> None:
    call = world.submit_many(world.lane(), 3)
    assert world.finish(lambda _: verdict) == 1
    for failure in call.failures:
        assert failure is not None and failure.attempts == 1
        assert failure.retryable == (verdict is Verdict.FULL)
        assert failure.ambiguous == (verdict is Verdict.UNEXPECTED)


def test_what_no_answer_settled_is_ambiguous_though_it_is_rejected_later(world: World) -> None:
    call = world.submit_many(world.lane(), 2)
    world.settle_down()
    world.answer(first(world), Verdict.AMBIGUOUS)
    world.finish(lambda _: Verdict.PERMANENT)
    assert all(failure and failure.ambiguous and not failure.retryable for failure in call.failures)


def test_attempts_are_bounded_but_not_those_rejected_for_overload(world: World) -> None:
    lane = world.lane(policy=patient(max_attempts=3, deadline_seconds=1_000))
    call = world.submit_many(lane, 1)
    assert world.finish(lambda _: Verdict.TRANSIENT) == 3
    assert call.failures[0] is not None and call.failures[0].retryable
    fates = iter([Verdict.OVERLOAD] * 50)
    call = world.submit_many(lane, 1)
    assert world.finish(lambda _: next(fates, None)) == 51
    assert call.failures == [None]


def test_rejections_for_overload_take_no_attempt_from_those_that_count(world: World) -> None:
    fates = iter([Verdict.OVERLOAD] * 5 + [Verdict.TRANSIENT] * 2 + [Verdict.OVERLOAD] * 5)
    call = world.submit_many(world.lane(policy=patient(max_attempts=3)), 1)
    assert world.finish(lambda _: next(fates, None)) == 13
    assert call.failures == [None]
    fates = iter([Verdict.TRANSIENT, Verdict.OVERLOAD, Verdict.TRANSIENT, Verdict.OVERLOAD])
    call = world.submit_many(world.lane(policy=patient(max_attempts=3)), 1)
    assert world.finish(lambda _: next(fates, Verdict.TRANSIENT)) == 5
    assert call.failures[0] is not None and call.failures[0].attempts == 5


def test_the_policy_knows_an_overload_from_another_fault(world: World, monkeypatch: Any) -> None:
    monkeypatch.setattr(random, "random", lambda: 1.0)
    monkeypatch.setattr(random, "uniform", lambda low, high: high)
    world.submit_many(world.lane(policy=RetryPolicy(initial_backoff_seconds=1, max_backoff_seconds=1)), 1)
    fates = iter([Verdict.OVERLOAD, Verdict.TRANSIENT])
    world.finish(lambda _: next(fates, None))
    assert world.pauses == pytest.approx([0.1, 1.0])


def test_a_defect_of_the_users_own_policy_fails_the_items_and_names_their_error(world: World) -> None:
    defect = ValueError("of the policy")

    def stop(_: Any) -> bool:
        raise defect

    call = world.submit(world.lane(policy=patient(stop=stop)), [Value(key=key) for key in range(3)])
    world.settle_down()
    world.answer(first(world), Verdict.BAD_DATA)
    world.settle_down()
    world.answer(first(world), Verdict.AMBIGUOUS)
    failure = call.failures[0]
    assert failure is not None and failure.error is defect and failure.ambiguous and failure.retryable is False
    assert defect.__cause__ is world.errors[call.values[0]][-1] and defect.__traceback__ is None
    world.finish()
    assert call.failures == [failure, None, None], "the other half goes on"
    world.check_that_nothing_is_left()


def test_an_overload_lowers_the_limit_for_all_and_successes_raise_it_again(world: World) -> None:
    lane = world.lane(max_items=1, max_in_flight=8, ceiling=8)
    world.submit_many(lane, 8)
    world.settle_down()
    assert len(world.out) == 8
    for flight in list(world.out):
        world.now += 0.01  # no two answers come at once
        world.answer(flight, Verdict.OVERLOAD)
    assert world.core.limit.current == 5, "one cut for all that were out together"
    world.now += 1
    world.settle_down()
    assert len(world.out) == 5
    for flight in list(world.out):
        world.now += 0.01
        world.answer(flight, Verdict.OVERLOAD)
    assert world.core.limit.current == 3, "and one for those that were sent after it"
    world.submit_many(lane, 200)
    peak = 0
    while not world.core.idle:
        world.settle_down()
        peak = max(peak, len(world.out))
        world.now += 0.1 if world.out else 1
        if world.out:
            world.answer(first(world), None)
    assert peak == world.core.limit.current == 8


def test_endless_overload_ends_at_the_deadline(world: World) -> None:
    call = world.submit_many(world.lane(policy=patient(max_attempts=1)), 1)
    world.finish(lambda _: Verdict.OVERLOAD)
    assert call.failures[0] is not None and call.failures[0].retryable and not call.failures[0].ambiguous
    assert world.now <= 1_000 + 20 + LAST_ATTEMPT_SECONDS


def test_what_is_denied_ends_at_the_deadline_though_requests_of_another_kind_are_answered(world: World) -> None:
    call = world.submit_many(world.lane(policy=patient(max_attempts=1)), 9)  # in two batches, and one that waits
    asked = world.lane(kind="queries", urgent=True)
    while call.open and world.now < 5_000:
        world.submit_many(asked, 1)
        world.settle_down()
        for flight in list(world.out):
            world.answer(flight, None if flight.lane is asked else Verdict.OVERLOAD)
        world.advance(0.5)
    assert all(failure is not None and failure.retryable for failure in call.failures)
    assert world.now <= 1_000 + 20 + LAST_ATTEMPT_SECONDS + 1


def test_what_waits_for_its_turn_is_not_given_up_while_others_are_served(world: World) -> None:
    others = world.lane(ceiling=1, max_items=1, policy=patient(deadline_seconds=5))
    waiting = world.submit_many(world.lane(kind="calls", ceiling=1, policy=patient(deadline_seconds=5)), 1)
    world.submit_many(others, 1)
    calls = [world.submit_many(others, 1) for _ in range(20)]
    while any(call.open for call in (waiting, *calls)):
        world.settle_down()
        world.now += 3
        for flight in [flight for flight in world.out if flight.lane is others] or list(world.out):
            world.answer(flight, None)
    assert waiting.failures == [None]


def test_an_attempt_has_its_own_time_out_or_what_is_left_and_a_last_one_a_little_more(world: World) -> None:
    world.submit_many(world.lane(rpc_timeout_seconds=6, policy=patient(deadline_seconds=20)), 1)
    time_outs = []
    world.settle_down()
    while world.out:
        time_outs.append(world.out[first(world)].timeout_seconds)
        world.now += min(4, time_outs[-1])
        world.answer(first(world), Verdict.TRANSIENT)
        world.advance(1)
    assert time_outs == pytest.approx([6, 6, 6, 5.1, 0.1])
    world.check_that_nothing_is_left()


def test_a_request_may_outlive_the_deadline_by_a_tenth_of_a_second(world: World) -> None:
    for bound, seconds in ((50.0, 20.1), (6.0, 6.0)):
        world.submit_many(world.lane(rpc_timeout_seconds=bound, policy=patient(deadline_seconds=20)), 1)
        world.settle_down()
        assert world.out[first(world)].timeout_seconds == pytest.approx(seconds)
        world.finish()


def test_a_dead_endpoint_costs_the_deadline_in_all_however_much_waits(world: World) -> None:
    lane = world.lane(policy=patient())
    calls = [world.submit_many(lane, 100) for _ in range(10)]
    world.advance(20 + LAST_ATTEMPT_SECONDS)
    failures = [failure for call in calls for failure in call.failures]
    assert len(failures) == 1_000 and all(failures)
    assert all(failure.ambiguous == (failure.attempts > 0) for failure in failures if failure)
    world.check_that_nothing_is_left()


def test_many_that_want_their_last_attempt_in_one_slot_meet_the_deadline_together(world: World) -> None:
    lanes = [world.lane(ceiling=1, max_items=1, policy=patient()) for _ in range(6)]
    for lane in lanes:
        world.submit_many(lane, 1)
    for _ in lanes:
        world.settle_down()
        world.answer(first(world), Verdict.TRANSIENT)
    world.advance(20 + LAST_ATTEMPT_SECONDS)
    world.check()
    world.check_that_nothing_is_left()


def test_one_that_waits_for_a_slot_meets_its_deadline_behind_one_that_has_more_time(world: World) -> None:
    long, short, other = (
        world.lane(ceiling=1, rpc_timeout_seconds=50, policy=patient(deadline_seconds=seconds))
        for seconds in (100, 5, 100)
    )
    for lane in (long, short):
        call = world.submit_many(lane, 1)
        world.settle_down()
        world.answer(first(world), Verdict.TRANSIENT)
    world.submit_many(other, 1)
    world.advance(5 + LAST_ATTEMPT_SECONDS)
    assert not call.open


def test_a_batch_that_was_filled_slowly_has_time_for_its_answer_or_is_not_sent(world: World, monkeypatch: Any) -> None:
    monkeypatch.setattr(core_module, "_ITEMS_PER_STEP", 1)
    for late in (19.98, 20.03, 20.07, 20.2, 50.0):
        lane, began = world.lane(max_items=3), world.now
        call = world.submit_many(lane, 3)
        while lane.filling is None:
            world.step()
        world.now = began + late
        world.finish()
        assert all(failure is None or not failure.attempts for failure in call.failures)
    world.check_that_nothing_is_left()


def test_halves_of_a_refused_batch_meet_the_deadline(world: World) -> None:
    world.submit(world.lane(max_items=64, max_in_flight=1, policy=patient(deadline_seconds=10)), [Value(bad=True)] * 64)
    world.settle_down()
    while world.out:
        world.now += min(2.0, world.out[first(world)].timeout_seconds)
        world.answer(first(world), None)
        world.settle_down()
        world.check()
    world.check_that_nothing_is_left()


def test_an_old_item_of_one_half_does_not_wait_for_the_patience_of_a_new_one_in_the_other(world: World) -> None:
    lane = world.lane(max_in_flight=1, policy=patient(deadline_seconds=20, wait=tenacity.wait_fixed(0.5)))
    world.submit(lane, [Value(key=1)])
    world.settle_down()
    old = world.submit(lane, [Value(key=1)])
    world.advance(5)
    new = world.submit(lane, [Value(key=2)])
    world.settle_down()
    world.answer(first(world), Verdict.PERMANENT)
    world.settle_down()
    assert world.requests[-1][1] == [*new.values, *old.values]
    world.answer(first(world), Verdict.BAD_DATA)
    world.advance(15 + LAST_ATTEMPT_SECONDS)
    assert not old.open and new.open
    world.advance(5)
    assert not new.open
    world.check_that_nothing_is_left()


def test_each_of_a_batch_is_given_up_at_its_own_deadline(world: World) -> None:
    lane = world.lane(max_in_flight=1, rpc_timeout_seconds=50, policy=patient(wait=tenacity.wait_fixed(0.5)))
    world.submit_many(lane, 1)
    world.settle_down()
    calls = []
    for _ in range(3):
        calls.append(world.submit_many(lane, 1))
        world.advance(5)
    world.answer(first(world), Verdict.PERMANENT)
    lasted = []
    while calls:
        world.settle_down()
        if world.out:
            world.answer(first(world), Verdict.TRANSIENT)
        if not calls[0].open:
            lasted.append(world.now - calls.pop(0).submitted_at)
        else:
            world.advance(0.05)
    assert all(20 <= seconds <= 20 + LAST_ATTEMPT_SECONDS + 0.05 for seconds in lasted), lasted


def test_a_half_that_is_given_up_leaves_the_other_its_own_time(world: World) -> None:
    lane = world.lane(ceiling=1, max_in_flight=1, rpc_timeout_seconds=50, policy=patient(deadline_seconds=20))
    other = world.lane(ceiling=1, rpc_timeout_seconds=50, policy=patient(deadline_seconds=100))
    world.submit_many(lane, 1)
    world.settle_down()
    old = world.submit_many(lane, 1)
    world.advance(5)
    new = world.submit_many(lane, 1)
    world.answer(first(world), Verdict.PERMANENT)
    world.settle_down()
    assert world.requests[-1][1] == [*old.values, *new.values]
    world.submit_many(other, 1)
    world.settle_down()
    world.answer(first(world), Verdict.BAD_DATA)
    world.settle_down()
    assert first(world).lane is lane
    world.answer(first(world), Verdict.TRANSIENT)
    world.settle_down()
    assert first(world).lane is other, "and so the half waits for a slot"
    world.advance(15.5)
    assert not old.open and new.open
    world.answer(first(world), None)
    world.settle_down()
    assert world.requests[-1][1] == new.values and len(world.out) == 1
    world.finish()
    assert new.failures == [None]
    world.check_that_nothing_is_left()


def test_a_half_of_which_nothing_can_be_prepared_again_gives_its_slot_up(world: World) -> None:
    refused: set[Value] = set()

    def prepare_once(value: Value) -> tuple[Value, int]:
        if value in refused:
            raise ValueError("gone")
        return value, 1

    call = world.submit_many(world.lane(prepare=prepare_once), 2)
    world.settle_down()
    refused.add(call.values[0])
    world.answer(first(world), Verdict.BAD_DATA)
    world.settle_down()
    world.check()
    assert world.requests[-1][1] == [call.values[1]]
    world.finish()
    assert call.outcomes.failed_indices() == [0]
    world.check_that_nothing_is_left()


def test_halves_of_a_refused_batch_go_on_while_the_endpoint_acknowledges(world: World) -> None:
    lane = world.lane(max_items=64, max_in_flight=1, policy=patient(deadline_seconds=10))
    call = world.submit(lane, [Value(bad=index == 63) for index in range(64)])
    world.settle_down()
    while world.out:
        world.now += 2.0
        world.answer(first(world), Verdict.AMBIGUOUS if world.out[first(world)].timeout_seconds < 2 else None)
        world.settle_down()
    assert call.outcomes.failed_indices() == [63]


def test_a_half_fails_with_the_error_that_it_met_itself(world: World) -> None:
    lane = world.lane(ceiling=1, max_items=4, policy=patient(deadline_seconds=5))
    other = world.lane(ceiling=1, rpc_timeout_seconds=50, policy=patient(deadline_seconds=100))
    call = world.submit_many(lane, 4)
    world.settle_down()
    world.submit_many(other, 1)
    world.answer(first(world), Verdict.BAD_DATA)
    world.settle_down()
    world.answer(first(world), Verdict.TRANSIENT)
    world.advance(10)
    errors = [failure.error for failure in call.failures if failure]
    assert errors[:2] == [world.errors[value][-1] for value in call.values[:2]]
    assert all(isinstance(error, DeadlinePassedError) for error in errors[2:]), "which met none"


def test_a_long_write_that_moves_on_never_meets_the_deadline(world: World) -> None:
    call = world.submit_many(world.lane(max_in_flight=1, policy=patient(deadline_seconds=10)), 200)
    world.settle_down()
    while call.open:
        world.advance(5)
        world.answer(first(world), None)
        world.settle_down()
    assert not call.outcomes.failed_indices() and world.now > 1_100


@pytest.mark.parametrize("verdict", [Verdict.OVERLOAD, Verdict.TRANSIENT, Verdict.AMBIGUOUS])
def test_one_that_is_refused_again_and_again_is_given_up_only_once_nobody_else_has_moved_on_for_so_long(
    world: World, verdict: Verdict
) -> None:
    refused, served = (world.lane(policy=patient(deadline_seconds=10)) for _ in range(2))
    call = world.submit_many(refused, 3)

    def answer_all() -> None:
        world.settle_down()
        for flight in list(world.out):
            world.answer(flight, verdict if flight.lane is refused else None)

    while world.now < 1_050:
        world.submit_many(served, 1)
        answer_all()
        assert call.open
        world.advance(4)
    while call.open:
        answer_all()
        world.advance(0.25)
    last = world.progress["items"][-1]
    assert last + 10 <= world.now <= last + 10 + LAST_ATTEMPT_SECONDS + 0.25


def test_nobody_who_waits_for_a_slot_is_given_up_while_others_are_served(world: World) -> None:
    policy = patient(deadline_seconds=10)
    narrow = [world.lane(ceiling=1, policy=policy) for _ in range(2)]
    long = patient(deadline_seconds=1_000)
    wide = world.lane(ceiling=8, max_in_flight=8, max_items=1, rpc_timeout_seconds=100, policy=long)
    again = world.submit_many(narrow[0], 1)
    world.settle_down()
    world.submit_many(wide, 5)
    world.settle_down()
    rejected, slow, *others = world.out
    world.answer(rejected, Verdict.OVERLOAD)
    new = world.submit_many(narrow[1], 1)
    for flight in others:
        world.advance(7)
        world.answer(flight, None)
    world.advance(9.99)
    assert again.open and new.open and world.now > 1_000 + 3 * 10
    world.answer(slow, None)
    world.finish()
    assert again.failures == new.failures == [None]


def test_one_that_waits_for_a_slot_is_given_up_once_nobody_is_served_for_so_long(world: World) -> None:
    narrow = world.lane(ceiling=1, policy=patient(deadline_seconds=10))
    wide = world.lane(ceiling=8, rpc_timeout_seconds=100, max_items=1, policy=patient(deadline_seconds=100))
    world.submit_many(wide, 2)
    world.settle_down()
    call = world.submit_many(narrow, 1)
    world.advance(7)
    world.answer(first(world), None)
    world.advance(9.99)
    assert call.open
    world.advance(0.02)
    assert not call.open and isinstance(call.failures[0].error, DeadlinePassedError)  # type: ignore[union-attr]


def test_callers_share_a_batch_evenly(world: World) -> None:
    lane = world.lane(max_in_flight=1)
    world.submit_many(lane, 1)
    world.settle_down()
    large, small = world.submit_many(lane, 100), world.submit_many(lane, 4)
    world.answer(first(world), None)
    world.settle_down()
    batch = world.requests[-1][1]
    assert len([value for value in batch if value in small.values]) == 4
    assert len([value for value in batch if value in large.values]) == 4


def test_more_callers_than_divide_a_batch_share_it_too(world: World) -> None:
    lane = world.lane(max_in_flight=1)
    calls = [world.submit_many(lane, 100) for _ in range(3)]
    world.settle_down()
    assert [sum(value in call.values for value in world.requests[0][1]) for call in calls] == [4, 2, 2]
    many, before = world.lane(), len(world.requests)
    calls = [world.submit_many(many, 5) for _ in range(12)]
    world.settle_down()
    assert [sum(value in call.values for value in world.requests[before][1]) for call in calls] == [1] * 8 + [0] * 4


@pytest.mark.parametrize("capacity", [10, 16, 10_000])
def test_a_small_call_is_in_one_of_the_next_batches_of_a_large_one(
    world: World, capacity: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(entrance_module, "WINDOW", 16)
    lane = world.lane(max_in_flight=1, entrance=Entrance(capacity))
    world.submit(lane, [Value(key=key) for key in range(800)])
    world.settle_down()
    small = world.submit(lane, [Value(key=1_000)])
    requests = len(world.requests)
    while small.open:
        world.answer(first(world), None)
        world.settle_down()
    assert len(world.requests) - requests <= capacity // 8 % 1_000 + 3
    world.cancel_all()


def test_lanes_take_turns_for_the_slots(world: World) -> None:
    large, small = world.lane(ceiling=1), world.lane(ceiling=1)
    world.submit_many(large, 800)
    for _ in range(5):
        world.settle_down()
        call = world.submit_many(small, 1)
        requests = len(world.requests)
        while call.open:
            world.answer(first(world), None)
            world.settle_down()
        assert len(world.requests) - requests <= 3


def out_of(world: World, lane: Any) -> int:
    return sum(flight.lane is lane for flight in world.out)


def test_writes_give_way_while_searches_come_and_take_all_slots_again_afterwards(world: World) -> None:
    writes = world.lane(max_items=1, gives_way=GivesWay(2, 1))
    searches = world.lane(max_items=1, urgent=True)
    world.submit_many(writes, 20)
    world.settle_down()
    assert out_of(world, writes) == 4, "nobody searches"
    world.submit_many(searches, 1)
    world.settle_down()
    world.answer(first(world), None)
    world.settle_down()
    assert (out_of(world, writes), out_of(world, searches)) == (3, 1), "what is out is left to end"
    while out_of(world, writes) > 2:
        world.answer(next(flight for flight in world.out if flight.lane is writes), None)
        world.settle_down()
    world.answer(next(flight for flight in world.out if flight.lane is searches), None)
    world.settle_down()
    assert out_of(world, writes) == 2, "another search may come at once"
    assert world.core.next_wake() == pytest.approx(world.now + URGENT_SECONDS)
    world.now += URGENT_SECONDS
    world.settle_down()
    assert out_of(world, writes) == 4
    world.finish()


def test_writes_are_small_while_somebody_searches(world: World) -> None:
    writes = world.lane(max_items=50, gives_way=GivesWay(1, 5))
    searches = world.lane(max_items=1, urgent=True)
    world.submit_many(searches, 1)
    call = world.submit_many(writes, 65)
    world.settle_down()
    search, write = (next(flight for flight in world.out if flight.lane is lane) for lane in (searches, writes))
    for _ in range(2):
        world.now += 2 * URGENT_SECONDS  # however long the search takes
        assert len(write.sent) == 5
        world.answer(write, None)
        world.settle_down()
        [write] = [flight for flight in world.out if flight.lane is writes]
    world.answer(search, None)
    world.now += URGENT_SECONDS
    world.settle_down()
    assert [len(flight.sent) for flight in world.out] == [5, 50]
    world.finish()
    assert not call.open


def test_searches_that_never_end_starve_no_write(world: World) -> None:
    writes = world.lane(max_items=1, gives_way=GivesWay(2, 1))
    searches = world.lane(max_items=1, urgent=True, max_in_flight=4)
    call = world.submit_many(writes, 20)
    for _ in range(200):
        world.submit_many(searches, 1)
        world.settle_down()
        world.answer(first(world), None)
        world.now += URGENT_SECONDS / 10
    assert not call.open
    world.finish()


def test_a_write_that_is_sent_again_gives_way_as_well(world: World) -> None:
    writes = world.lane(max_items=1, gives_way=GivesWay(1, 1), max_in_flight=4, policy=patient(deadline_seconds=100))
    searches = world.lane(max_items=1, urgent=True)
    world.submit_many(writes, 3)
    world.settle_down()
    for flight in list(world.out):
        world.answer(flight, Verdict.TRANSIENT)
    for _ in range(100):
        world.submit_many(searches, 1)
        world.now += URGENT_SECONDS / 2
        world.settle_down()
        assert out_of(world, writes) <= 1
        for flight in [flight for flight in world.out if flight.lane is searches]:
            world.answer(flight, None)
    assert out_of(world, writes) == 1
    world.finish()


def test_what_is_sent_again_comes_first_but_starves_nobody(world: World) -> None:
    policy = RetryPolicy(max_attempts=1_000, deadline_seconds=100, wait=tenacity.wait_fixed(0.5))
    writes, reads = (world.lane(ceiling=8, max_in_flight=8, max_items=1, policy=policy) for _ in range(2))
    world.submit_many(writes, 8)
    world.settle_down()

    def work(seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """A server with one request every tenth of a second, which rejects writes."""
        end = world.now + seconds
        while world.now < end and not until():
            if world.out:
                world.now += 0.1
                world.answer(first(world), Verdict.OVERLOAD if first(world).lane is writes else None)
            else:
                world.now = world.core.next_wake() or world.now
            world.settle_down()

    work(10)
    call = world.submit_many(reads, 1)
    world.settle_down()
    work(10, until=lambda: not call.open)
    assert not call.open
    world.finish()


def refused_once(world: World, lane: Any) -> None:
    """One value of a lane that has been sent, and is to be sent again."""
    world.submit_many(lane, 1)
    world.settle_down()
    world.answer(first(world), Verdict.TRANSIENT)


def order_after(world: World, begun: int) -> list[Lane[Value, str]]:
    """Serve everything, one request at a time; the lanes of the requests, but for the first `begun`."""
    world.finish()
    return [lane for lane, _ in world.requests[begun:]]


@pytest.mark.parametrize("verdict", [Verdict.OVERLOAD, Verdict.TRANSIENT, Verdict.AMBIGUOUS])
def test_what_is_sent_again_goes_first_and_then_what_is_new_in_turns(world: World, verdict: Verdict) -> None:
    again, new = (world.lane(ceiling=1, max_items=1, policy=patient(deadline_seconds=1_000)) for _ in range(2))
    world.submit_many(again, 3)
    for _ in range(3):
        world.settle_down()
        world.answer(first(world), verdict)
    world.submit_many(new, 1)
    world.settle_down()
    world.submit_many(new, 3)
    world.now += 1  # all three want the slot again, while another has it
    assert order_after(world, begun=4) == [again, new, again, new, again, new]
    assert [names(values) for lane, values in world.requests[4:] if lane is again] == [[1], [2], [3]]


@pytest.mark.parametrize("is_sent_again", [True, False])
def test_what_waits_under_a_low_ceiling_is_not_overtaken_by_what_is_new_under_a_higher_one(
    world: World, is_sent_again: bool
) -> None:
    narrow, wide = world.lane(ceiling=1), world.lane(ceiling=4, max_items=1)
    if is_sent_again:
        refused_once(world, narrow)
    world.submit_many(wide, 4)
    world.settle_down()
    begun = len(world.requests)
    if not is_sent_again:
        world.submit_many(narrow, 1)
    world.submit_many(wide, 100)
    world.now += 1
    assert order_after(world, begun)[0] is narrow


def test_what_is_sent_again_keeps_its_order_past_differing_ceilings(world: World) -> None:
    narrow, wide, other = world.lane(ceiling=1), world.lane(ceiling=4), world.lane(ceiling=4, exclusive="a file")
    for lane in (narrow, wide):
        refused_once(world, lane)
    world.submit_many(other, 1)
    world.settle_down()
    world.now += 1
    world.settle_down()
    assert [flight.lane for flight in world.out] == [other], "the one with the low ceiling is first"
    assert order_after(world, begun=3) == [narrow, wide]


def test_what_waits_for_another_request_of_its_file_keeps_nobody_from_being_sent_again(world: World) -> None:
    one, two = (world.lane(exclusive="a file") for _ in range(2))
    free = world.lane()
    for lane in (two, free):
        refused_once(world, lane)
    world.submit_many(one, 1)
    world.settle_down()
    world.now += 1
    world.settle_down()
    assert [flight.lane for flight in world.out] == [one, free]


def test_the_halves_of_a_refused_batch_go_before_others_that_are_sent_again(world: World) -> None:
    again, halved, new = (world.lane(ceiling=1, policy=patient(deadline_seconds=1_000)) for _ in range(3))
    refused_once(world, again)
    world.submit(halved, [Value(), Value(bad=True)])
    world.settle_down()
    world.submit_many(new, 1)
    world.now += 1
    assert order_after(world, begun=2) == [halved, new, halved, again]
    assert [names(values) for lane, values in world.requests if lane is halved] == [[2, 3], [2], [3]]


def test_one_that_wants_a_slot_again_and_is_cancelled_leaves_it_to_the_next(world: World) -> None:
    """Whether it still waits for the slot, or was given it just now."""
    for was_given in (False, True):
        again, other = (world.lane(ceiling=1, abort_when_unwanted=True) for _ in range(2))
        call = world.submit_many(again, 1)
        world.settle_down()
        world.answer(first(world), Verdict.TRANSIENT)
        world.submit_many(other, 1)
        world.settle_down()
        world.now += 1
        world.settle_down()
        world.answer(first(world), None)
        if was_given:
            world.step()
            assert [flight.lane for flight in world.out] == [again]
        later = world.submit_many(other, 1)
        world.cancel(call)
        if was_given:
            world.answer(first(world), Verdict.AMBIGUOUS)  # as it is aborted
        world.settle_down()
        assert [flight.lane for flight in world.out] == [other]
        world.finish()
        assert later.failures == [None]
    world.check_that_nothing_is_left()


def test_a_lane_whose_calls_were_all_cancelled_bars_nobody(world: World) -> None:
    low, high = world.lane(ceiling=1), world.lane(ceiling=4)
    world.submit_many(low, 1)
    world.submit_many(high, 0)
    world.core.limit.allow(4)
    world.settle_down()
    other = world.lane(ceiling=1)
    call = world.submit_many(other, 1)
    world.settle_down()
    world.cancel(call)
    world.submit_many(high, 1)
    world.settle_down()
    assert len(world.out) == 2


def test_lanes_of_one_exclusive_have_one_request_out_and_bar_no_others(world: World) -> None:
    one, two = (world.lane(exclusive="a file", max_items=1) for _ in range(2))
    free = world.lane(max_items=1)
    for lane in (one, two, free):
        world.submit_many(lane, 2)
    world.settle_down()
    assert [flight.lane for flight in world.out] == [one, free, free]
    world.finish()
    world.check_that_nothing_is_left()


def test_who_waits_for_the_end_of_anothers_request_bars_nobody(world: World) -> None:
    one, two = (world.lane(exclusive="a file") for _ in range(2))
    free, newcomer = world.lane(), world.lane()
    for lane in (two, free):
        world.submit_many(lane, 1)
    world.settle_down()
    for flight in list(world.out):
        world.answer(flight, Verdict.TRANSIENT)
    world.submit_many(one, 1)
    world.advance(1)
    assert [flight.lane for flight in world.out] == [one, free]
    world.submit_many(newcomer, 1)
    world.settle_down()
    assert [flight.lane for flight in world.out] == [one, free, newcomer]
    world.finish()
    world.check_that_nothing_is_left()


def test_nobody_with_a_higher_ceiling_overtakes_what_is_to_be_sent_again(world: World) -> None:
    low, high, other = world.lane(ceiling=1), world.lane(), world.lane()
    for lane in (low, high):
        world.submit_many(lane, 1)
        world.settle_down()
    assert len(world.out) == 2
    for flight in list(world.out):
        world.answer(flight, Verdict.TRANSIENT)
    world.submit_many(other, 1)
    world.settle_down()
    world.now += 1
    world.settle_down()
    assert [flight.lane for flight in world.out] == [other]
    world.submit_many(world.lane(), 1)
    world.settle_down()
    assert [flight.lane for flight in world.out] == [other], "nor does what comes now"
    world.answer(first(world), None)
    world.settle_down()
    assert first(world).lane is low and len(world.out) == 3
    world.finish()


def test_nobody_with_a_higher_ceiling_overtakes_who_waits_for_a_slot(world: World) -> None:
    lanes = [world.lane(ceiling=4), world.lane(ceiling=1), world.lane(ceiling=4), world.lane(ceiling=4)]
    for lane in lanes:
        world.submit_many(lane, 1)
        world.settle_down()
    assert [flight.lane for flight in world.out] == lanes[:1]
    world.answer(first(world), None)
    world.settle_down()
    assert [flight.lane for flight in world.out] == lanes[1:]
    world.finish()


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_batch_is_filled_up_past_lanes_that_wait_for_its_slot(world: World, monkeypatch: Any, count: int) -> None:
    monkeypatch.setattr(core_module, "_ITEMS_PER_STEP", 1)
    lanes = [world.lane(ceiling=1) for _ in range(count)]
    for lane in lanes:
        world.submit_many(lane, 3)
    world.finish()
    assert [lane for lane, _ in world.requests] == lanes and sizes(world) == [3] * count
    world.check_that_nothing_is_left()


def test_a_lane_keeps_to_its_share_while_its_batches_pause(world: World) -> None:
    lane, other = world.lane(max_in_flight=2, ceiling=2), world.lane(ceiling=2)
    world.submit_many(lane, 80)
    world.settle_down()
    for flight in list(world.out):
        world.answer(flight, Verdict.TRANSIENT)
    world.settle_down()
    assert not world.out and len(lane.flights) == 2
    world.submit_many(other, 1)
    world.settle_down()
    assert len(world.out) == 1, "a pause keeps no slot from others"
    world.finish()


def test_what_is_cancelled_while_it_waits_was_not_sent_and_what_is_under_way_may_have_been(world: World) -> None:
    lane = world.lane(max_items=4, max_in_flight=1)
    mine, theirs = world.submit_many(lane, 6), world.submit_many(lane, 2)
    world.settle_down()
    batch = world.requests[0][1]
    world.cancel(mine)
    for value, failure in zip(mine.values, mine.failures, strict=True):
        assert failure is not None and isinstance(failure.error, CancelledCallError)
        assert failure.ambiguous == (value in batch) == (failure.attempts > 0)
    world.finish()
    assert not theirs.outcomes.failed_indices()
    world.check_that_nothing_is_left()


def test_at_any_time_it_is_known_which_have_no_outcome(world: World, monkeypatch: Any) -> None:
    monkeypatch.setattr(entrance_module, "WINDOW", 2)
    lane = world.lane(entrance=Entrance(2), max_items=2, max_in_flight=1, rpc_timeout_seconds=50)
    call = world.submit_many(lane, 9)
    assert call.outcomes.unsettled_indices() == set(range(9)), "none is in"
    world.settle_down()
    assert call.outcomes.unsettled_indices() == set(range(9)), "some are in, and some under way"
    world.answer(first(world), None)
    world.settle_down()
    assert call.outcomes.unsettled_indices() == set(range(2, 9))
    world.now += 20.01
    world.settle_down()
    assert call.outcomes.unsettled_indices() == {2, 3}, "those under way; the others were given up"
    world.answer(first(world), None)
    assert call.outcomes.unsettled_indices() == set()


@pytest.mark.parametrize("abort_when_unwanted", [False, True])
def test_a_batch_that_was_given_up_while_it_was_filled_is_not_sent(
    world: World, monkeypatch: Any, abort_when_unwanted: bool
) -> None:
    monkeypatch.setattr(core_module, "_ITEMS_PER_STEP", 2)
    lane = world.lane(abort_when_unwanted=abort_when_unwanted)
    call = world.submit_many(lane, 6)
    while lane.filling is None:
        world.step()
    assert world.core.in_flight == 1
    world.cancel(call)
    world.check()
    assert all(failure and not failure.ambiguous for failure in call.failures)
    world.settle_down()
    assert not world.requests
    world.check_that_nothing_is_left()


def test_a_batch_that_was_given_up_while_it_paused_is_forgotten(world: World) -> None:
    lane = world.lane()
    call = world.submit(lane, [Value(key=1)])
    world.settle_down()
    world.answer(first(world), Verdict.AMBIGUOUS)
    world.cancel(call)
    assert call.failures[0] is not None and call.failures[0].ambiguous
    world.check_that_nothing_is_left()


def test_of_many_batches_that_pause_those_that_nobody_waits_for_are_forgotten(world: World) -> None:
    lane = world.lane(max_items=2, max_in_flight=8, ceiling=8)
    mine, theirs = world.submit_many(lane, 12), world.submit_many(lane, 4)
    world.settle_down()
    assert len(world.out) == 8
    for flight in list(world.out):
        world.answer(flight, Verdict.TRANSIENT)
    world.cancel(mine)
    assert len(lane.flights) == 4
    world.finish()
    assert not theirs.outcomes.failed_indices()
    world.check_that_nothing_is_left()


def test_a_write_that_nobody_waits_for_ends_before_the_next_one_of_its_key(world: World) -> None:
    lane = world.lane()
    given_up = world.submit(lane, [Value(key=1)])
    world.settle_down()
    world.cancel(given_up)
    later = world.submit(lane, [Value(key=1)])
    world.settle_down()
    assert len(world.requests) == 1
    world.finish()
    assert world.rows[id(lane.entrance), 1] == later.values
    world.check_that_nothing_is_left()


def test_a_key_is_free_once_the_batch_of_a_cancelled_item_is_halved(world: World) -> None:
    lane = world.lane(max_in_flight=2)
    cancelled, refused = world.submit(lane, [Value(key=1)]), world.submit(lane, [Value(key=2), Value(key=3)])
    world.settle_down()
    later = world.submit(lane, [Value(key=1)])
    world.cancel(cancelled)
    world.settle_down()
    assert len(world.requests) == 1
    world.answer(first(world), Verdict.BAD_DATA)
    world.settle_down()
    assert [values for _, values in world.requests[1:]] == [refused.values[:1], later.values]
    world.finish()
    world.check_that_nothing_is_left()


def test_a_read_that_nobody_wants_is_aborted_and_one_that_somebody_wants_is_not(world: World) -> None:
    lane = world.lane(abort_when_unwanted=True)
    one, two = world.submit_many(lane, 1), world.submit_many(lane, 1)
    world.settle_down()
    aborted = []
    take = world.core.take_effects

    def taken() -> Any:
        effects = take()
        aborted.extend(effects.aborts)
        return effects

    world.core.take_effects = taken  # type: ignore[method-assign]
    world.cancel(one)
    assert not aborted
    world.cancel(two)
    assert aborted == list(world.out)
    world.finish()
    world.check_that_nothing_is_left()


def test_a_step_looks_at_a_window_of_calls_at_the_most(world: World, monkeypatch: Any) -> None:
    monkeypatch.setattr(entrance_module, "WINDOW", 2)
    lane = world.lane(max_in_flight=1)
    for _ in range(20):
        world.cancel(world.submit_many(lane, 1))
    steps = 0
    while world.step():
        steps += 1
    assert steps == 10
    world.check_that_nothing_is_left()


@pytest.mark.parametrize("unsent", [False, True])
def test_thousands_of_one_key_can_be_cancelled(world: World, unsent: bool) -> None:
    lane = world.lane(max_in_flight=1)
    world.submit_many(lane, 1)
    world.settle_down()
    other = world.submit(lane, [Value(key=0)])
    call = world.submit(lane, [Value(key=1)] * 5_000)
    if not unsent:
        world.settle_down()
    world.cancel(call)
    later = world.submit(lane, [Value(key=1)])
    world.finish()
    assert not other.outcomes.failed_indices() and not later.outcomes.failed_indices()
    world.check_that_nothing_is_left()


def test_thousands_of_lanes_can_be_cancelled(world: World) -> None:
    world.submit_many(world.lane(ceiling=1), 1)
    calls = [world.submit_many(world.lane(ceiling=1), 1) for _ in range(2_000)]
    world.settle_down()
    for call in calls:
        world.cancel(call)
    world.finish()
    world.check_that_nothing_is_left()
