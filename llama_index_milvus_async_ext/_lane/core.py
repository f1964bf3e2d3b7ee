"""The lane's decisions: what to send, whom to answer, when to look again. No await, no clock, no I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

from llama_index_milvus_async_ext._lane import batching
from llama_index_milvus_async_ext._lane.air import LEAST_TIMEOUT_SECONDS, Air
from llama_index_milvus_async_ext._lane.carrier import Carrier
from llama_index_milvus_async_ext._lane.effects import Effects
from llama_index_milvus_async_ext._lane.items import CancelledCallError, DeadlinePassedError, Submission
from llama_index_milvus_async_ext._lane.lanes import Flight, Lane
from llama_index_milvus_async_ext._lane.ledger import Ledger
from llama_index_milvus_async_ext._lane.limit import Limit
from llama_index_milvus_async_ext._lane.precedence import Precedence
from llama_index_milvus_async_ext._lane.turns import Turns
from llama_index_milvus_async_ext.retry import Verdict

_ITEMS_PER_STEP = 32  # half a millisecond's work for rows of 768 dimensions


class Core:
    """All that goes to one endpoint: its limit, and what waits and is under way.

    Events come in by `submit`, `cancel` and `ended`, with the time; after them, `step` is called until it returns
    False, and what `take_effects` returns is done.

    Guarantees:
        - Each value gets its own result or its own `Failure`, exactly once, in its place.
        - An item that can't be prepared, or that makes requests fail as bad data, fails alone: its batch is halved
          until it stands by itself (at most 2 * log2(n) + 2 requests for one such item among n). To halve a batch may
          cost some 8 * log2(n) + 8 refused requests; what is not told apart by then fails together, as retryable.
        - Items with equal keys are sent one after the other, in the order of submission, never in one request.
        - Callers share a batch evenly, so that a small call does not wait for a large one.
        - No item stays longer than `policy.deadline_seconds`, and a tenth of a second for a last attempt, while the
          endpoint acknowledges nothing; nor, once a request with it has failed, while it acknowledges nothing of its
          kind.
    """

    def __init__(self, classify: Callable[[BaseException], Verdict]) -> None:
        self.limit = Limit()
        self._air = Air()
        self._precedence = Precedence(self._air.holding)
        self._turns = Turns(self.limit, self._air.holding, self._precedence)
        self._ledger = Ledger(self._turns.give_to_next_of_key)
        self._carrier = Carrier(classify, self.limit, self._air, self._turns, self._ledger)
        self._submissions = 0
        self._newcomers_turn = False

    @property
    def counts(self) -> Counter[str]:
        """Requests sent, retries of them, and items in them by kind."""
        return self._carrier.counts

    @property
    def waiting(self) -> int:
        """Values that are neither in a batch under way nor have an outcome; may be asked from any thread."""
        unsettled = sum(submission.remaining for submission in list(self._ledger.open))
        return max(unsettled - sum(flight.unsettled for flight in self._air.under_way), 0)

    @property
    def in_flight(self) -> int:
        """Slots taken; may be asked from any thread."""
        return len(self._air.holding)

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is under way."""
        return not self._ledger.open and not self._air.under_way

    # --- events

    def submit(
        self,
        lane: Lane[Any, Any],
        values: Sequence[Any],
        keys: Sequence[Hashable] | None,
        on_done: Callable[[Submission[Any]], None],
        now: float,
        own_keys: frozenset[Hashable] | None = None,
    ) -> Submission[Any]:
        """Take in values; the submission stands in `Effects.settled`, once, when each has its outcome.

        Args:
            lane: How they are sent.
            values: The values.
            keys: One key per value, or None if no two are ever related.
            on_done: For the shell.
            now: The time.
            own_keys: The keys as a set, for many: to make it takes a while.
        """
        self._submissions += 1
        submission: Submission[Any] = Submission(lane, values, keys, on_done, now, self._submissions, own_keys)
        self._ledger.enter(submission)
        if values:
            self._precedence.note(lane, now)
            self.limit.allow(lane.ceiling)
            lane.entrance.queue(submission)
            self._turns.give_to_entrance(lane.entrance)
        return submission

    def cancel(self, submission: Submission[Any]) -> None:
        """Give up on what a submission still waits for: what is in a request under way becomes ambiguous."""
        self._ledger.drop_waiting(submission, CancelledCallError("the call was cancelled before this was sent"))
        self._turns.give_to_entrance(submission.lane.entrance)
        error = CancelledCallError("the call was cancelled while this was under way")
        items = [item for item in submission.live if item.flight is not None]
        touched = {item.flight for item in items if item.flight is not None}
        out = {item for flight in touched for item in flight.sent}
        for item in items:
            self._ledger.fail(item, error, True, item.ambiguous or item in out)
        for flight in touched:
            if flight.unsettled:
                continue
            if flight in self._air.holding:
                if flight.sent and flight.lane.abort_when_unwanted:
                    self._carrier.aborts.append(flight)
            else:
                self._carrier.finish(flight)

    def cancel_all(self) -> None:
        """Give up on everything: nothing can be sent any more."""
        for submission in list(self._ledger.open):
            self.cancel(submission)

    def ended(
        self, flight: Flight[Any], results: Sequence[Any] | None, error: BaseException | None, now: float
    ) -> None:
        """Note how a request ended: with one result for each of its payloads, or with an error."""
        self._precedence.note(flight.lane, now)
        self._carrier.ended(flight, results, error, now)

    def step(self, now: float) -> bool:
        """Do a small part of what can be done now; whether there is more."""
        self._precedence.now = now
        self._air.wake(now)
        expired, is_more = self._ledger.expire(now, self.limit.progress_at)
        for submission in expired:
            self._turns.give_to_entrance(submission.lane.entrance)
        if is_more:
            return True
        for flight in self._air.again:
            if self._carrier.deadline_at(flight) + LEAST_TIMEOUT_SECONDS <= now:
                error = flight.error or DeadlinePassedError("the deadline passed before the rest of a batch was sent")
                if not self._carrier.without_overdue(flight, flight.alive(), error, now):
                    self._carrier.next_group(flight)
                return True
        if self._turns.serve_entrance():
            return True
        # In turns: who fails again and again does not starve the others.
        if self._newcomers_turn:
            return self._serve_lane((), now) or self._send_again(now)
        return self._send_again(now) or self._serve_lane(self._air.again, now)

    def _send_again(self, now: float) -> bool:
        for flight in self._air.again:
            if self._turns.may_send(flight.lane):
                self._air.hold(flight)
                self._carrier.launch(flight, now)
                self._newcomers_turn = True
                return True
            if not self._turns.waits_for_another(flight.lane):
                break
        return False

    def _serve_lane(self, in_order_behind: Collection[Flight[Any]], now: float) -> bool:
        lane = self._turns.next_lane(in_order_behind)
        if lane is None:
            return False
        if lane.filling is None:
            self._newcomers_turn = False
            self._air.hold(self._turns.begin(lane))
        if batching.fill(lane, _ITEMS_PER_STEP, self._carrier.refuse):
            self._carrier.depart(lane, now)
        self._turns.give(lane)
        self._turns.give_to_entrance(lane.entrance)
        return True

    def next_wake(self) -> float | None:
        """When to call `step` again though nothing happens; None if only an event can change anything."""
        limit = self.limit
        times = [self._air.next_wake(limit.progress_of), self._ledger.next_due(limit.progress_at)]
        times.append(self._turns.next_wake())
        times.append(self._precedence.next_wake([flight.lane for flight in self._air.again]))
        return min((time for time in times if time is not None), default=None)

    def take_effects(self) -> Effects:
        """What is to be done since the last time."""
        carrier, ledger = self._carrier, self._ledger
        effects = Effects(carrier.sends, ledger.settled, carrier.aborts, carrier.retries)
        carrier.sends, ledger.settled, carrier.aborts, carrier.retries = [], [], [], []
        return effects
