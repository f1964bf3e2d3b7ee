"""Carries flights from their departure to their end, whatever the requests in between come to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from llama_index_milvus_async_ext._flow.foreign import as_error
from llama_index_milvus_async_ext._lane import batching
from llama_index_milvus_async_ext._lane.air import GRACE_SECONDS, LEAST_TIMEOUT_SECONDS, Air
from llama_index_milvus_async_ext._lane.effects import Retry, Send
from llama_index_milvus_async_ext._lane.items import DeadlinePassedError, Item, without_frames
from llama_index_milvus_async_ext._lane.lanes import Flight, Lane
from llama_index_milvus_async_ext._lane.ledger import Ledger
from llama_index_milvus_async_ext._lane.limit import Limit
from llama_index_milvus_async_ext._lane.trips import note_end
from llama_index_milvus_async_ext._lane.turns import Turns
from llama_index_milvus_async_ext.retry import Attempts, Verdict


class UnexpectedAnswerError(RuntimeError):
    """A request was answered, but not for each of its items."""


class Carrier:
    """Decides of each request what to send, and of its end what comes of it: outcomes, another attempt, or halves.

    Args:
        classify: Tells what an error means.
        limit: Told of successes and overloads.
        air: Where flights are.
        turns: Told of lanes that may go on.
        ledger: Told of outcomes.
    """

    def __init__(
        self, classify: Callable[[BaseException], Verdict], limit: Limit, air: Air, turns: Turns, ledger: Ledger
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.sends: list[Send] = []
        self.aborts: list[Flight[Any]] = []
        self.retries: list[Retry] = []
        self._classify = classify
        self._limit = limit
        self._air = air
        self._turns = turns
        self._ledger = ledger

    def depart(self, lane: Lane[Any, Any], now: float) -> None:
        """Send the batch that has been filled."""
        flight, lane.filling = lane.filling, None
        assert flight is not None
        alive = flight.alive()
        if not alive:
            self.finish(flight)
            return
        flight.waits_since = min(item.submission.submitted_at for item in alive)
        flight.refusals_left = 8 * len(alive).bit_length() + 8
        self.launch(flight, now)

    def launch(self, flight: Flight[Any], now: float) -> None:
        """Send the flight's group; it has a slot."""
        lane = flight.lane
        alive = flight.alive()
        payloads = batching.payloads(lane, alive, self.refuse)
        alive = [item for item in alive if not item.settled]
        if not alive:
            self.next_group(flight)
            return
        for item in alive:
            item.attempts += 1
        flight.attempts += 1
        if flight.attempts == 1:
            flight.started_at = now
        flight.sent, flight.sent_at = alive, now
        self.counts["requests"] += 1
        self.counts[lane.kind] += len(alive)
        upsert = any(item.ambiguous or item.repeats for item in alive)
        left = max(self.deadline_at(flight) + GRACE_SECONDS - now, LEAST_TIMEOUT_SECONDS)
        timeout = min(lane.rpc_timeout_seconds, left)
        self.sends.append(Send(flight, payloads, upsert, timeout))

    def _verdict(self, error: BaseException) -> Verdict:
        try:
            return self._classify(error)
        except BaseException:  # a defect there must not leave callers waiting
            return Verdict.UNEXPECTED

    def _halve(self, flight: Flight[Any], alive: list[Item[Any]], error: BaseException) -> None:
        """Some item of the group is at fault: send the halves of it, while that may still be paid for."""
        flight.refusals_left -= 1
        middle = len(alive) // 2
        if not middle or flight.refusals_left < 0:
            self.fail_group(flight, alive, error, retryable=len(alive) > 1)
            return
        for item in set(flight.group).difference(alive):
            self._turns.give_to_next_of_key(item)
        if flight.watched:
            note_end(flight)
        flight.groups += [alive[middle:], alive[:middle]]
        flight.group = []
        self.next_group(flight)

    def _pause(
        self, flight: Flight[Any], alive: list[Item[Any]], error: BaseException, verdict: Verdict, now: float
    ) -> bool:
        """Let the group wait for another attempt, without a slot; False if there is to be none."""
        if not verdict.is_repeated:
            return False
        alive = self.without_overdue(flight, alive, error, now)
        if not alive:
            return False
        attempts = Attempts(
            flight.counted, flight.attempts, flight.started_at, now, flight.idle_seconds, error, verdict
        )
        try:
            pause = flight.lane.policy.next_pause(attempts)
        except BaseException as defect:  # of the user's own `stop` or `wait`
            defect.__cause__ = error
            self.fail_group(flight, alive, without_frames(as_error(defect, "the retry policy")), False)
            return True
        if pause is None:
            return False
        pause = max(min(pause, self.deadline_at(flight) - now), 0.0)
        flight.idle_seconds += pause
        self._air.pause(flight, now + pause)
        self.counts["retries"] += 1
        retry = Retry(error, flight.attempts, pause)
        for submission in {item.submission for item in alive}:
            submission.retries += 1
            if submission.trips is not None:
                submission.trips.append(retry)
        self.retries.append(retry)
        return True

    def deadline_at(self, flight: Flight[Any]) -> float:
        """When the oldest of a flight's items are given up."""
        return flight.deadline_at(self._limit.progress_of(flight.lane.kind))

    def without_overdue(
        self, flight: Flight[Any], alive: list[Item[Any]], error: BaseException, now: float
    ) -> list[Item[Any]]:
        """Give up on those of a group whose own deadline has passed; the others may go on without them."""
        if now < self.deadline_at(flight):
            return alive
        patience = flight.lane.policy.deadline_seconds
        late = DeadlinePassedError("the deadline passed before the rest of a batch was sent again")
        left = []
        later = {item for group in flight.groups for item in group if not item.settled}
        for item in [*alive, *later]:
            if item.submission.submitted_at + patience > now:
                left.append(item)
            else:
                self._ledger.fail(item, late if item in later else error, True, item.ambiguous)
        if left:
            flight.waits_since = min(item.submission.submitted_at for item in left)
        return [item for item in alive if not item.settled]

    def fail_group(self, flight: Flight[Any], alive: list[Item[Any]], error: BaseException, retryable: bool) -> None:
        """Give up on a group."""
        for item in alive:
            self._ledger.fail(item, error, retryable, item.ambiguous)
        self.next_group(flight)

    def refuse(self, item: Item[Any], error: BaseException) -> None:
        """Fail an item that can't be prepared."""
        self._ledger.fail(item, without_frames(as_error(error, "its preparation")), False, item.ambiguous)
        if item.flight is None:
            self._turns.give_to_next_of_key(item)

    def next_group(self, flight: Flight[Any]) -> None:
        """The group's requests have ended: let the next of its keys go, and send what else the flight has."""
        if flight.watched:
            note_end(flight)
        group, flight.group = flight.group, []
        for item in group:
            self._turns.give_to_next_of_key(item)
        if flight.groups:
            flight.group = flight.groups.pop()
            flight.begin_group()
            self._air.queue(flight)
        else:
            self.finish(flight)

    def finish(self, flight: Flight[Any]) -> None:
        """Nobody waits for the flight any more."""
        for item in [*flight.group, *(item for group in flight.groups for item in group)]:
            self._turns.give_to_next_of_key(item)
        self._air.drop(flight)
        flight.lane.flights.discard(flight)
        self._turns.give(flight.lane)

    def ended(
        self, flight: Flight[Any], results: Sequence[Any] | None, error: BaseException | None, now: float
    ) -> None:
        """Note how a request ended: with one result for each of its payloads, or with an error."""
        in_flight = len(self._air.holding)
        sent, flight.sent = flight.sent, []
        flight.ended_at, flight.carried = now, len(sent)
        if error is None and (results is None or len(results) != len(sent)):
            error = UnexpectedAnswerError(f"{len(sent)} items were sent, but {len(results or ())} results came back")
        flight.error = error
        if error is None:
            self._limit.succeeded(flight.lane.kind, in_flight, now)
            for item, result in zip(sent, results or (), strict=True):
                self._ledger.settle(item, result, None)
            self.next_group(flight)
            return
        verdict = self._verdict(error)
        if verdict is Verdict.OVERLOAD:
            self._limit.overloaded(flight.sent_at, now)
        else:
            flight.counted += 1
        for item in sent:
            item.ambiguous |= verdict.may_have_been_executed
        alive = flight.alive()
        if alive and verdict.is_about_items:
            self._halve(flight, alive, error)
        elif alive and not self._pause(flight, alive, error, verdict, now):
            self.fail_group(flight, alive, error, verdict.retryable)
        elif not alive:
            self.next_group(flight)
