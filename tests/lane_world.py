"""A lane's core with a simulated clock and far end, which checks each request that comes out, and each outcome."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import tenacity

from llama_index_milvus_async_ext._lane.core import Core
from llama_index_milvus_async_ext._lane.effects import Send
from llama_index_milvus_async_ext._lane.entrance import Entrance
from llama_index_milvus_async_ext._lane.items import CancelledCallError, DeadlinePassedError, Failure, Submission
from llama_index_milvus_async_ext._lane.lanes import Flight, Lane
from llama_index_milvus_async_ext.retry import RetryPolicy, Verdict

LAST_ATTEMPT_SECONDS = 0.1
A_MOMENT = 1e-6


class FaultError(Exception):
    """How a request ended, and what that means."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.value)
        self.verdict = verdict


@dataclass(frozen=True, eq=False)
class Value:
    """What is submitted. A request that carries a `bad` one is refused; an `unpreparable` one is in no request."""

    number: int = 0
    key: int | None = None
    nbytes: int = 1
    bad: bool = False
    unpreparable: bool = False

    def __repr__(self) -> str:
        traits = [name for name in ("bad", "unpreparable") if getattr(self, name)]
        return " ".join([f"#{self.number}", *([f"k{self.key}"] if self.key is not None else []), *traits])


def prepare(value: Value) -> tuple[Value, int]:
    if value.unpreparable:
        raise ValueError(f"{value} can't be prepared")
    return value, value.nbytes


@dataclass(eq=False)
class Call:
    """A submission, and what the caller knows of it."""

    lane: Lane[Value, str]
    values: list[Value]
    submitted_at: float
    submission: Submission[str] | None = None
    cancelled: bool = False
    answered: int = 0

    @property
    def open(self) -> bool:
        return not self.answered

    @property
    def outcomes(self) -> Submission[str]:
        assert self.submission is not None
        return self.submission

    @property
    def failures(self) -> list[Failure | None]:
        return [self.outcomes.failure(index) for index in range(len(self.values))]


class World:
    """A core, a clock, and the far end, which keeps count of all that it may have done."""

    def __init__(self) -> None:
        self.core = Core(lambda error: error.verdict)  # type: ignore[attr-defined]
        self.now = 1_000.0
        self.progress: dict[str, list[float]] = defaultdict(list)  # when it acknowledged something of a kind
        self.stalled = 0.0
        self.calls: list[Call] = []
        self.lanes: list[Lane[Value, str]] = []
        self.out: dict[Flight[Value], Send] = {}
        self.carried: dict[Flight[Value], list[Value]] = {}
        self.sent_at: dict[Flight[Value], float] = {}
        self.requests: list[tuple[Lane[Value, str], list[Value]]] = []
        self.upserts: list[bool] = []
        self.pauses: list[float] = []
        self.attempts: Counter[Value] = Counter()
        self.errors: dict[Value, list[FaultError]] = defaultdict(list)
        self.acknowledged: set[Value] = set()
        self.perhaps_applied: set[Value] = set()
        self.rows: dict[tuple[int, int], list[Value]] = defaultdict(list)  # by entrance and key
        self._numbers = 0
        self._first_sent: dict[tuple[int, int], int] = {}
        self._unsettled_before: dict[Value, list[Value]] = {}

    def lane(self, **changes: Any) -> Lane[Value, str]:
        arguments: dict[str, Any] = {
            "kind": "items",
            "prepare": prepare,
            "send": None,
            "entrance": Entrance(10_000),
            "policy": RetryPolicy(max_attempts=3, deadline_seconds=20, wait=tenacity.wait_fixed(1)),
            "max_items": 8,
            "max_bytes": 1_000,
            "max_in_flight": 4,
            "ceiling": 4,
            "rpc_timeout_seconds": 6.0,
        }
        self.lanes.append(Lane(**(arguments | changes)))
        return self.lanes[-1]

    # --- events

    def submit(self, lane: Lane[Value, str], values: Sequence[Value]) -> Call:
        given = []
        for value in values:
            self._numbers += 1
            given.append(Value(self._numbers, value.key, value.nbytes, value.bad, value.unpreparable))
        has_keys = any(value.key is not None for value in given)
        unsettled = list(self._unsettled(lane.entrance)) if has_keys else []
        for value in given if has_keys else ():
            self._unsettled_before[value] = [earlier for earlier in unsettled if earlier.key == value.key]
            unsettled.append(value)
        call = Call(lane, given, self.now)
        self.calls.append(call)
        keys = [value.key for value in given] if has_keys else None
        call.submission = self.core.submit(lane, given, keys, lambda _: self._settled(call), self.now)
        return call

    def submit_many(self, lane: Lane[Value, str], count: int) -> Call:
        return self.submit(lane, [Value()] * count)

    def cancel(self, call: Call) -> None:
        call.cancelled = call.cancelled or call.open
        self.core.cancel(call.outcomes)
        self.perform()
        assert not call.open

    def cancel_all(self) -> None:
        for call in self.calls:
            call.cancelled = call.cancelled or call.open
        self.core.cancel_all()
        self.perform()

    def step(self) -> bool:
        before = self.holding()
        is_more = self.core.step(self.now)
        self.perform()
        begun = self.holding() - before
        for flight in begun:
            assert self.core.in_flight <= min(self.core.limit.current, flight.lane.ceiling)
        return is_more

    def settle_down(self) -> None:
        """Step until there is nothing to do before time passes or an answer comes."""
        for _ in range(100_000):
            if not self.step():
                break
        else:
            raise AssertionError("steps without end")
        wake = self.core.next_wake()
        assert wake is None or wake > self.now, "it wants to be woken in the past, for ever"
        assert wake is not None or self.core.idle or self.out, "nothing will ever wake it"

    def answer(self, flight: Flight[Value], verdict: Verdict | None, executed: bool = True, missing: int = 0) -> None:
        """End a request: with results (all but `missing`) or, for a verdict or a bad value in it, with an error."""
        values, upsert = self.values_of(flight), self.out[flight].upsert
        del self.out[flight], self.sent_at[flight]
        if verdict is None and any(value.bad for value in values):
            verdict = Verdict.BAD_DATA
        if verdict is None:
            self._apply(flight.lane, values, upsert)
            if missing:
                self.perhaps_applied.update(values)
            else:
                self.acknowledged.update(values)
                self.progress[flight.lane.kind].append(self.now)
            results = [f"result of {value.number}" for value in values][missing:]
            self.core.ended(flight, results, None, self.now)
        else:
            error = FaultError(verdict)
            if verdict.may_have_been_executed:
                self.perhaps_applied.update(values)
                if executed:
                    self._apply(flight.lane, values, upsert)
            for value in values:
                self.errors[value].append(error)
            self.core.ended(flight, None, error, self.now)
        self.perform()

    def advance(self, seconds: float, executed: bool = False) -> None:
        """Let time pass: timers fire, and requests end unanswered when their time is over."""
        until = self.now + seconds
        self.settle_down()
        while (at := self.next_event()) is not None and at <= until:
            self.now = max(self.now, at)
            for flight in [flight for flight in self.out if self.ends_at(flight) <= self.now]:
                self.answer(flight, Verdict.AMBIGUOUS, executed)
            self.settle_down()
        self.now = max(self.now, until)
        assert not self.step(), "it did not want to be woken for this"

    def stall(self, seconds: float) -> None:
        """Let time pass in which the core is not asked, perhaps while it fills a batch."""
        self.now += seconds
        self.stalled += seconds

    def next_event(self) -> float | None:
        ends = [self.ends_at(flight) for flight in self.out]
        wake = self.core.next_wake()
        return min([*ends, *([wake] if wake is not None else [])], default=None)

    def ends_at(self, flight: Flight[Value]) -> float:
        return self.sent_at[flight] + self.out[flight].timeout_seconds

    def finish(self, fate: Callable[[list[Value]], Verdict | None] = lambda _: None) -> int:
        """Answer everything, a request a time, until all is done; how many requests that took."""
        requests = len(self.requests)
        for _ in range(100_000):
            self.settle_down()
            if self.out:
                flight = next(iter(self.out))
                self.answer(flight, fate(self.values_of(flight)))
            elif self.core.idle:
                return len(self.requests) - requests
            else:
                wake = self.core.next_wake()
                assert wake is not None, "it hangs"
                self.now = wake
        raise AssertionError("no end in sight")

    # --- what came out

    def holding(self) -> set[Flight[Value]]:
        """Flights with a slot, by count of the world."""
        return {*self.out, *(lane.filling for lane in self.lanes if lane.filling is not None)}

    def values_of(self, flight: Flight[Value]) -> list[Value]:
        return self.carried[flight]

    def perform(self) -> None:
        effects = self.core.take_effects()
        for send in effects.sends:
            self._begin(send)
        for flight in effects.aborts:
            assert flight in self.out and flight.lane.abort_when_unwanted
            assert not any(value in self.unsettled_values() for value in self.values_of(flight))
        for retry in effects.retries:
            self.pauses.append(retry.pause_seconds)
            assert isinstance(retry.error, FaultError) and retry.error.verdict.is_repeated
            assert retry.pause_seconds <= 1
        for submission in effects.settled:
            submission.on_done(submission)

    def _begin(self, send: Send) -> None:
        lane, values = send.flight.lane, list(send.payloads)
        assert send.flight not in self.out
        assert 0 < len(values) <= lane.max_items
        assert sum(value.nbytes for value in values) <= lane.max_bytes or len(values) == 1
        assert LAST_ATTEMPT_SECONDS / 2 - A_MOMENT <= send.timeout_seconds <= lane.rpc_timeout_seconds
        keys = [value.key for value in values if value.key is not None]
        assert len(set(keys)) == len(keys), "two of one key in one request"
        for flight in self.out:
            if flight.lane.entrance is lane.entrance:
                assert not {value.key for value in self.values_of(flight)}.intersection(keys), "requests overlap"
            assert lane.exclusive is None or flight.lane.exclusive != lane.exclusive
        for value in values:
            assert value not in self.acknowledged, "sent again after its acknowledgement"
            if value.key is None:
                continue
            place = id(lane.entrance), value.key
            if not self.attempts[value]:
                assert value.number > self._first_sent.get(place, 0), "not in the order of submission"
                self._first_sent[place] = value.number
            earlier = self._unsettled_before[value]
            if value in self.perhaps_applied or any(self.attempts[other] for other in earlier):
                assert send.upsert, f"{value} may be there already"
        self.attempts.update(values)
        self.requests.append((lane, values))
        self.upserts.append(send.upsert)
        self.out[send.flight] = send
        self.sent_at[send.flight] = self.now
        self.carried[send.flight] = values

    def _apply(self, lane: Lane[Value, str], values: list[Value], upsert: bool) -> None:
        for value in values:
            if value.key is not None:
                rows = self.rows[id(lane.entrance), value.key]
                if upsert:
                    rows.clear()
                rows.append(value)

    def _settled(self, call: Call) -> None:
        call.answered += 1
        assert call.answered == 1, "answered twice"
        submission = call.outcomes
        assert submission.remaining == 0 and not submission.live
        assert len(submission.results) == len(call.values)
        failed = submission.failed_indices()
        under_way = {value for flight in self.out for value in self.values_of(flight)}
        for index, value in enumerate(call.values):
            failure = submission.failure(index)
            assert (failure is not None) == (index in failed)
            if failure is None:
                assert submission.results[index] == f"result of {value.number}"
                assert value in self.acknowledged
                continue
            assert submission.results[index] is None
            assert failure.attempts == self.attempts[value]
            if value in self.perhaps_applied or value in under_way:
                assert failure.ambiguous, f"{value} may have been applied"
            if failure.ambiguous:
                assert failure.attempts > 0
            self._check_cause(call, value, failure)

    def _check_cause(self, call: Call, value: Value, failure: Failure) -> None:
        error = failure.error
        if isinstance(error, FaultError):
            assert error in self.errors[value], "the error of another request"
            assert failure.retryable or not error.verdict.retryable
        elif isinstance(error, ValueError):
            assert not failure.retryable
        elif isinstance(error, CancelledCallError):
            assert call.cancelled and failure.retryable
        elif isinstance(error, DeadlinePassedError):
            assert failure.retryable
            times = [
                call.submitted_at,
                *(at for at in self.progress[call.lane.kind] if at > call.submitted_at),
                self.now,
            ]
            gap = max(later - earlier for earlier, later in itertools.pairwise(times))
            assert gap >= call.lane.policy.deadline_seconds - A_MOMENT, "given up though the endpoint went on"
        else:
            assert type(error).__name__ == "UnexpectedAnswerError" and failure.ambiguous and not failure.retryable

    def _unsettled(self, entrance: Entrance) -> Iterator[Value]:
        for call in self.calls:
            if call.lane.entrance is entrance:
                yield from self._unsettled_of(call)

    def _unsettled_of(self, call: Call) -> Iterator[Value]:
        if call.open:
            submission = call.outcomes
            live = {item.index for item in submission.live}
            for index, value in enumerate(call.values):
                if index in live or index >= submission.entered:
                    yield value

    def unsettled_values(self) -> set[Value]:
        return {value for call in self.calls for value in self._unsettled_of(call)}

    # --- what always holds

    def check(self) -> None:
        core = self.core
        assert core.in_flight == len(self.holding())
        counts = Counter(requests=len(self.requests), retries=len(self.pauses))
        for lane, values in self.requests:
            counts[lane.kind] += len(values)
        assert core.counts == counts
        submissions = [call.outcomes for call in self.calls if call.outcomes.remaining]
        for lane in self.lanes:
            assert len(lane.flights) <= lane.max_in_flight
            assert lane.open == sum(submission.lane is lane for submission in submissions)
        exclusive = [flight.lane.exclusive for flight in self.holding() if flight.lane.exclusive is not None]
        assert len(set(exclusive)) == len(exclusive)
        for entrance in {lane.entrance for lane in self.lanes}:
            inside = sum(item.flight is None for s in submissions if s.lane.entrance is entrance for item in s.live)
            assert entrance.inside == inside <= entrance.capacity
        assert core.waiting == sum(
            sum(item.flight is None for item in s.live) + (0 if s.given_up else len(s.values) - s.entered)
            for s in submissions
        )
        for call in self.calls:
            if call.open:
                since = max([call.submitted_at, *(times[-1] for times in self.progress.values() if times)])
                patience = call.lane.policy.deadline_seconds + LAST_ATTEMPT_SECONDS + self.stalled
                assert self.now <= since + patience + A_MOMENT, "past its deadline"

    def check_that_nothing_is_left(self) -> None:
        core = self.core
        assert core.idle and core.in_flight == 0 and core.waiting == 0
        assert core.next_wake() is None
        assert all(call.answered == 1 for call in self.calls)
        for lane in self.lanes:
            assert lane.idle and lane.open == 0 and not lane.flights and lane.filling is None
            assert not lane.ring and not lane.has_turn
            assert lane.entrance.inside == 0 and not lane.entrance.knows_keys
            assert not lane.entrance.has_turn and not lane.entrance.is_open
        self._check_last_versions()

    def _check_last_versions(self) -> None:
        """Of each key that met no doubt, the row is the last one that was acknowledged, and there is no other."""
        by_key = defaultdict(list)
        for call in self.calls:
            for value in call.values:
                if value.key is not None:
                    by_key[id(call.lane.entrance), value.key].append(value)
        for place, values in by_key.items():
            acknowledged = [value for value in values if value in self.acknowledged]
            if acknowledged and not self.perhaps_applied.intersection(values):
                assert self.rows[place][-1] is acknowledged[-1]
