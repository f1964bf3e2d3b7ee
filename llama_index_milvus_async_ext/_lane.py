"""The lane: many small items from many callers, carried in few large requests, each with its own outcome."""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception

from llama_index_milvus_async_ext._limit import Limit
from llama_index_milvus_async_ext.retry import RetryPolicy, Verdict, classify

_OVERLOAD_PAUSE_SHARE = 0.1
# What an attempt gets at the least, even past the deadline: one of a few milliseconds would not wait for its answer,
# and so leave the outcome unknown of what was refused each time before.
_LEAST_TIMEOUT_SECONDS = 0.1

T = TypeVar("T")
R = TypeVar("R")


class CancelledCallError(Exception):
    """The caller gave up before the item was sent, or before its answer came."""

    def __init__(self, message: str = "the call was cancelled") -> None:
        super().__init__(message)


class DeadlinePassedError(TimeoutError):
    """The item waited for its turn until the deadline, and was never sent."""


@dataclass(frozen=True)
class Failure:
    """Why an item has no result.

    Attributes:
        error: The last error that the item met.
        attempts: Requests that carried the item.
        retryable: Whether the same item may succeed later.
        ambiguous: Whether a request that carried the item may have been executed.
    """

    error: BaseException
    attempts: int
    retryable: bool
    ambiguous: bool


class Submission(Generic[R]):
    """One caller's items, and what became of each; complete when `remaining` is 0."""

    __slots__ = (
        "cancelled",
        "failures",
        "in_ring",
        "items",
        "on_done",
        "ready",
        "remaining",
        "results",
        "retries",
        "submitted_at",
    )

    def __init__(self, on_done: Callable[[Submission[R]], None], submitted_at: float) -> None:
        self.on_done = on_done
        self.submitted_at = submitted_at
        self.items: list[_Item[Any]] = []
        self.ready: deque[_Item[Any]] = deque()  # may be sent now; the others wait behind an item of the same key
        self.results: list[R | None] = []
        self.failures: dict[int, Failure] = {}
        self.remaining = 0
        self.retries = 0
        self.cancelled = False
        self.in_ring = False

    @classmethod
    def failed(cls, count: int, error: BaseException) -> Submission[Any]:
        """A submission that could not be made: each of its items has the same failure."""
        submission: Submission[Any] = cls(lambda _: None, 0.0)
        failure = Failure(error, 0, classify(error).retryable, False)
        submission.failures = dict.fromkeys(range(count), failure)
        return submission


class _Item(Generic[T]):
    __slots__ = (
        "ambiguous",
        "attempts",
        "blocked",
        "flight",
        "follower",
        "index",
        "key",
        "nbytes",
        "payload",
        "repeats",
        "settled",
        "submission",
        "value",
    )

    def __init__(self, value: T, key: Hashable, submission: Submission[Any], index: int) -> None:
        self.value = value
        self.key = key
        self.submission = submission
        self.index = index
        self.payload: Any = None
        self.nbytes = -1  # not prepared yet
        self.attempts = 0
        self.ambiguous = False
        self.settled = False
        self.flight: _Flight[T] | None = None
        self.blocked = False  # waits behind an earlier item of the same key, whose `follower` it is
        self.repeats = False  # came while an earlier item of the same key was unsettled
        self.follower: _Item[T] | None = None


class _Flight(Generic[T]):
    """A batch from its first attempt until each of its items is settled."""

    __slots__ = ("deadline_at", "holds_slot", "sending", "task", "unsettled")

    def __init__(self, deadline_at: float, unsettled: int) -> None:
        self.deadline_at = deadline_at
        self.unsettled = unsettled  # items whose callers still wait
        self.holds_slot = True
        self.sending = False
        self.task: asyncio.Task[None] | None = None


class Lane(Generic[T, R]):
    """Items wait here until a slot is free; a free slot takes as many as fit, or its share of them.

        lane = Lane(prepare=encode, send=search, limit=limit, policy=RetryPolicy(), max_items=100, ...)
        submission = lane.submit([query], keys=None, on_done=print)

    There is no timer: an idle lane sends on the next turn of the loop, a busy one batches by itself, because items
    pile up while slots are taken. All calls come from one event loop, and the lane knows nothing of Milvus.

    Guarantees:
        - Each item gets its own result or its own `Failure`, exactly once, in its place.
        - An item that can't be prepared, or that makes requests fail as bad data, fails alone: its batch is halved
          until it stands by itself (at most 2 * log2(n) + 2 requests for one such item among n).
        - Items with equal keys are sent one after the other, in the order of submission, never in one request.
        - Callers share a batch evenly, so that a small call does not wait for a large one.
        - No item stays longer than `policy.deadline_seconds`, and a tenth of a second for a last attempt, while the
          endpoint acknowledges nothing.

    Args:
        prepare: Turns an item's value into its payload and the payload's size in bytes; raises for a bad one.
        send: Sends one request: `send(payloads, upsert, timeout_seconds) -> one result per payload`. It may empty the
            list, to save memory while it waits; another attempt prepares its items anew. `upsert` tells
            that some item may be there already: an earlier attempt may have been executed, or an earlier item had the
            same key.
        limit: The slots of the endpoint.
        policy: When to try again.
        max_items: Items in one request at the most.
        max_bytes: Bytes of payload in one request at the most (one item alone may be larger).
        max_in_flight: Batches of this lane under way at once, those that pause before another attempt included.
        ceiling: Requests in flight to the endpoint, of all lanes, above which this lane does not send.
        rpc_timeout_seconds: Bound on one attempt.
        spread_above: Share what comes to an idle lane out evenly among the free slots, so that the endpoint begins on
            the first part while the others are prepared; but leave requests of this many items whole. None: don't.
        abort_when_unwanted: Whether a request is aborted once all its callers gave up (right for reads; a write is
            left to end, because an aborted write may still be applied, after a later one of the same key).
        on_retry: Told of each pause before another attempt: the error, the attempt's number, the pause in seconds.
    """

    def __init__(
        self,
        *,
        prepare: Callable[[T], tuple[Any, int]],
        send: Callable[[list[Any], bool, float], Awaitable[Sequence[R]]],
        limit: Limit,
        policy: RetryPolicy,
        max_items: int,
        max_bytes: int,
        max_in_flight: int,
        ceiling: int,
        rpc_timeout_seconds: float,
        spread_above: int | None = None,
        abort_when_unwanted: bool = False,
        on_retry: Callable[[BaseException, int, float], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._prepare = prepare
        self._send = send
        self._limit = limit
        self._policy = policy
        self._max_items = max_items
        self._spread_above = max_items if spread_above is None else min(spread_above, max_items)
        self._max_bytes = max_bytes
        self._max_in_flight = max_in_flight
        self._ceiling = ceiling
        self._rpc_timeout_seconds = rpc_timeout_seconds
        self._abort_when_unwanted = abort_when_unwanted
        self._on_retry = on_retry
        self._clock = clock
        self._ring: deque[Submission[R]] = deque()  # submissions with items that may be sent
        self._open: set[Submission[R]] = set()
        self._last_of_key: dict[Hashable, _Item[T]] = {}
        self._flights: set[_Flight[T]] = set()
        self._pump_scheduled = False
        self._waits_for_slot = False
        self._spreads = False
        self._expiry: asyncio.TimerHandle | None = None
        self._idle_waiters: list[asyncio.Future[None]] = []
        self.requests = 0
        self.retries = 0
        self.items_sent = 0

    # --- callers' side

    def submit(
        self,
        values: Sequence[T],
        keys: Iterable[Hashable] | None,
        on_done: Callable[[Submission[R]], None],
    ) -> Submission[R]:
        """Queue items; `on_done` is called once, with the submission, when each of them has its outcome.

        Args:
            values: The items.
            keys: One key per item, or None if no two items are ever related.
            on_done: Called from the loop, perhaps before this method returns.
        """
        submission: Submission[R] = Submission(on_done, self._clock())
        submission.results = [None] * len(values)
        submission.remaining = len(values)
        if not values:
            on_done(submission)
            return submission
        self._open.add(submission)
        if keys is None:
            submission.items = [_Item(value, None, submission, index) for index, value in enumerate(values)]
            submission.ready.extend(submission.items)
        else:
            last_of_key = self._last_of_key
            for index, (value, key) in enumerate(zip(values, keys, strict=True)):
                item = _Item(value, key, submission, index)
                submission.items.append(item)
                earlier = last_of_key.get(key)
                if earlier is None:
                    submission.ready.append(item)
                else:
                    earlier.follower = item
                    item.blocked = item.repeats = True
                last_of_key[key] = item
        self._enqueue(submission)
        self._schedule_pump()
        self._schedule_expiry()
        return submission

    def cancel(self, submission: Submission[R]) -> None:
        """Give up on what a submission still waits for: unsent items fail, those under way become ambiguous."""
        if submission.remaining == 0 or submission.cancelled:
            return
        submission.cancelled = True
        self._drop_waiting(submission, CancelledCallError("the call was cancelled before this was sent"))
        error = CancelledCallError("the call was cancelled while this was under way")
        for item in submission.items:
            flight = item.flight
            if flight is None or item.settled:
                continue
            self._record(item, None, Failure(error, item.attempts, True, item.ambiguous or flight.sending))
            if self._abort_when_unwanted and flight.unsettled == 0 and flight.task is not None:
                flight.task.cancel()

    async def drained(self) -> None:
        """Wait until nothing waits and nothing is under way."""
        while not self.idle:
            waiter = asyncio.get_running_loop().create_future()
            self._idle_waiters.append(waiter)
            await waiter

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is under way."""
        return not self._open and not self._flights

    @property
    def waiting(self) -> int:
        """Items that are neither under way nor settled."""
        unsettled = sum(submission.remaining for submission in self._open)
        return unsettled - sum(flight.unsettled for flight in self._flights)

    # --- batches

    def _schedule_pump(self) -> None:
        # On the next turn of the loop, so that all that is submitted in this one goes together.
        if not self._pump_scheduled:
            self._pump_scheduled = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._pump_scheduled = False
        if not self._flights:
            self._spreads = self._spread_above < self._max_items
        if self._ring and len(self._flights) < self._max_in_flight and not self._waits_for_slot:
            if self._limit.try_acquire(self._granted, self._ceiling):
                self._start_batch()
                self._schedule_pump()  # one batch a turn: it is sent before the next one is prepared
            else:
                self._waits_for_slot = True
        if not self._ring:  # what comes while the endpoint is at work fills requests, of which it manages more rows
            self._spreads = False

    def _granted(self) -> None:
        self._waits_for_slot = False
        if len(self._flights) < self._max_in_flight:
            self._start_batch()
        else:
            self._limit.release()
        self._schedule_pump()

    def _start_batch(self) -> None:
        batch = self._take_batch()
        if not batch:
            self._limit.release()
            return
        earliest = min(item.submission.submitted_at for item in batch)
        deadline_at = max(earliest, self._limit.progress_at) + self._policy.deadline_seconds
        flight: _Flight[T] = _Flight(deadline_at, len(batch))
        for item in batch:
            item.flight = flight
        self._flights.add(flight)
        flight.task = asyncio.get_running_loop().create_task(self._fly(flight, batch))

    def _take_batch(self) -> list[_Item[T]]:
        batch: list[_Item[T]] = []
        nbytes = 0
        most = self._batch_size()
        share = max(most // max(len(self._ring), 1), 1)
        while self._ring and len(batch) < most:
            submission = self._ring.popleft()
            submission.in_ring = False
            ready = submission.ready
            quota = min(share, most - len(batch))
            while ready and quota > 0:
                item = ready.popleft()
                if item.settled:
                    continue
                if item.nbytes < 0 and not self._make_ready(item):
                    continue
                if batch and nbytes + item.nbytes > self._max_bytes:
                    ready.appendleft(item)
                    self._ring.appendleft(submission)
                    submission.in_ring = True
                    return batch
                batch.append(item)
                nbytes += item.nbytes
                quota -= 1
            self._enqueue(submission)
        return batch

    def _batch_size(self) -> int:
        """How many items the batch that is taken now may have."""
        if not self._spreads:
            return self._max_items
        free_slots = min(self._max_in_flight - len(self._flights), self._limit.free(self._ceiling) + 1)  # and its own
        waiting = 0
        for submission in self._ring:
            waiting += len(submission.ready)
            if waiting >= self._max_items * free_slots:  # of many callers, no more are counted than make a difference
                return self._max_items
        return min(max(-(-waiting // free_slots), self._spread_above), self._max_items)

    def _enqueue(self, submission: Submission[R]) -> None:
        if submission.ready and not submission.in_ring:
            submission.in_ring = True
            self._ring.append(submission)

    def _make_ready(self, item: _Item[T]) -> bool:
        try:
            item.payload, item.nbytes = self._prepare(item.value)
        except Exception as error:
            self._record(item, None, Failure(error, 0, False, False))
            self._release_key(item)
            return False
        return True

    async def _fly(self, flight: _Flight[T], batch: list[_Item[T]]) -> None:
        error: BaseException | None = None
        try:
            await self._deliver(flight, batch)
        except asyncio.CancelledError:
            error = CancelledCallError()
        except BaseException as unexpected:  # a defect here must not leave callers waiting
            error = unexpected
        for item in batch:
            if not item.settled:
                item.ambiguous |= item.attempts > 0
                self._fail(item, error or RuntimeError("a request ended without an outcome"), Verdict.AMBIGUOUS)
            item.flight = None
            self._release_key(item)
        self._flights.discard(flight)
        if flight.holds_slot:
            self._limit.release()
        self._schedule_pump()
        if self.idle:
            self._wake_idle()

    async def _deliver(self, flight: _Flight[T], batch: list[_Item[T]]) -> None:
        groups = [batch]
        while groups:
            group = groups.pop()
            try:
                await self._attempts(flight, group)
            except Exception as error:
                verdict = classify(error)
                alive = _unsettled(group)
                if verdict in (Verdict.BAD_DATA, Verdict.TOO_LARGE) and len(alive) > 1:
                    middle = len(alive) // 2
                    groups += [alive[middle:], alive[:middle]]
                    continue
                for item in alive:
                    self._fail(item, error, verdict)

    async def _attempts(self, flight: _Flight[T], group: list[_Item[T]]) -> None:
        """Send a group until it succeeds, or until its error is one that no further attempt will mend."""
        policy = self._policy
        counted = 0
        verdict: Verdict | None = None

        def stop(state: RetryCallState) -> bool:
            if self._clock() >= flight.deadline_at or not _unsettled(group):
                return True
            return counted >= policy.max_attempts

        def wait(state: RetryCallState) -> float:
            bound = min(policy.initial_backoff_seconds * 2.0 ** min(counted - 1, 60), policy.max_backoff_seconds)
            if verdict is Verdict.OVERLOAD:
                # The limit has slowed the lane down already. A rejection costs the server little, and a quota is
                # given out by the second: a long pause would leave some of it unused.
                bound = policy.max_backoff_seconds * _OVERLOAD_PAUSE_SHARE
            pause = random.uniform(0, bound)
            return max(min(pause, flight.deadline_at - self._clock()), 0.0)

        async def pause(seconds: float) -> None:
            # Others use the slot meanwhile; the lane itself starts nothing new in this flight's place.
            self._release_slot(flight)
            await asyncio.sleep(seconds)
            await self._limit.acquire(self._ceiling)
            flight.holds_slot = True

        def before_sleep(state: RetryCallState) -> None:
            self.retries += 1
            for submission in {item.submission for item in group}:
                submission.retries += 1
            error = state.outcome.exception() if state.outcome else None
            if self._on_retry is not None and error is not None:
                self._on_retry(error, state.attempt_number, state.upcoming_sleep)

        # A fresh one for each chain: a shared AsyncRetrying mixes up the state of its users.
        retrying = AsyncRetrying(
            stop=stop,
            wait=wait,
            retry=retry_if_exception(lambda error: classify(error).retryable),
            sleep=pause,
            before_sleep=before_sleep,
            reraise=True,
        )
        async for attempt in retrying:
            with attempt:
                alive = _unsettled(group)
                if not alive:
                    return
                try:
                    results = await self._one_attempt(flight, alive)
                except Exception as error:
                    verdict = classify(error)
                    counted += verdict is not Verdict.OVERLOAD
                    if verdict is Verdict.OVERLOAD:
                        flight.deadline_at = max(flight.deadline_at, self._limit.progress_at + policy.deadline_seconds)
                    for item in alive:
                        item.ambiguous |= verdict is Verdict.AMBIGUOUS
                    raise
                for item, result in zip(alive, results, strict=True):
                    self._record(item, result, None)

    async def _one_attempt(self, flight: _Flight[T], group: list[_Item[T]]) -> Sequence[R]:
        self.requests += 1
        self.items_sent += len(group)
        for item in group:
            item.attempts += 1
        sent_at = self._clock()
        upsert = any(item.ambiguous or item.repeats for item in group)
        remaining = max(flight.deadline_at - sent_at, _LEAST_TIMEOUT_SECONDS)
        timeout = min(self._rpc_timeout_seconds, remaining)
        try:
            flight.sending = True
            # The list is the sender's own, so that it can let go of the payloads as soon as it has sent them.
            results = await self._send([self._payload(item) for item in group], upsert, timeout)
        except Exception as error:
            if classify(error) is Verdict.OVERLOAD:
                self._limit.overloaded(sent_at)
            raise
        finally:
            flight.sending = False
        if len(results) != len(group):
            raise RuntimeError(f"{len(group)} items were sent, but {len(results)} results came back")
        self._limit.succeeded()
        return results

    def _payload(self, item: _Item[T]) -> Any:
        """The item's payload, which is kept for the first attempt only: few need another, and many are under way."""
        payload, item.payload = item.payload, None
        return self._prepare(item.value)[0] if payload is None else payload

    def _release_slot(self, flight: _Flight[T]) -> None:
        if flight.holds_slot:
            flight.holds_slot = False
            self._limit.release()

    # --- outcomes

    def _fail(self, item: _Item[T], error: BaseException, verdict: Verdict) -> None:
        # No rejection settles what an earlier, unanswered attempt left open: it may have met another schema, or another
        # state of the server, and "unknown" is true in any case.
        self._record(item, None, Failure(error, item.attempts, verdict.retryable, item.ambiguous))

    def _record(self, item: _Item[T], result: R | None, failure: Failure | None) -> None:
        if item.settled:
            return
        item.settled = True
        item.payload = None
        if item.flight is not None:
            item.flight.unsettled -= 1
        submission = item.submission
        if failure is None:
            submission.results[item.index] = result
        else:
            submission.failures[item.index] = failure
        submission.remaining -= 1
        if submission.remaining == 0:
            self._open.discard(submission)
            submission.on_done(submission)
            if self.idle:
                self._wake_idle()

    def _release_key(self, item: _Item[T]) -> None:
        """Let the next item of the same key go."""
        if item.key is None:
            return
        follower = item.follower
        while follower is not None and follower.settled:  # given up while it waited
            item, follower = follower, follower.follower
        if follower is None:
            if self._last_of_key.get(item.key) is item:
                del self._last_of_key[item.key]
            return
        follower.blocked = False
        submission = follower.submission
        submission.ready.append(follower)
        self._enqueue(submission)
        self._schedule_pump()

    def _drop_waiting(self, submission: Submission[R], error: Exception) -> None:
        submission.ready.clear()  # it leaves the ring when its turn comes
        for item in submission.items:
            if not item.settled and item.flight is None:
                self._record(item, None, Failure(error, item.attempts, True, False))
                if not item.blocked:  # a blocked one gives its place in the order up when its turn comes
                    self._release_key(item)

    def _wake_idle(self) -> None:
        waiters, self._idle_waiters = self._idle_waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    # --- deadline of what waits

    def _schedule_expiry(self) -> None:
        if self._expiry is None and self._open:
            self._expiry = asyncio.get_running_loop().call_later(self._policy.deadline_seconds, self._expire)

    def _expire(self) -> None:
        self._expiry = None
        patience = self._policy.deadline_seconds
        now = self._clock()
        next_due = now + patience
        for submission in list(self._open):
            due = max(submission.submitted_at, self._limit.progress_at) + patience
            if due > now:
                next_due = min(next_due, due)
            else:
                message = f"nothing was acknowledged for {patience:g} s, and this still waited to be sent"
                self._drop_waiting(submission, DeadlinePassedError(message))
        if self._open:
            self._expiry = asyncio.get_running_loop().call_later(next_due - now, self._expire)


def _unsettled(group: list[_Item[T]]) -> list[_Item[T]]:
    return [item for item in group if not item.settled]
