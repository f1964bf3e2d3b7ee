"""Whose outcome is still owed: each value gets its own, once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llama_index_milvus_async_ext._lane.items import DeadlinePassedError, Failure, Item, Submission

_EXPIRED_PER_STEP = 500


class Ledger:
    """The submissions without all their outcomes, and when the patience of each ends.

    Args:
        leave: Told of an item whose key the next one of that key may have.
    """

    def __init__(self, leave: Callable[[Item[Any]], None]) -> None:
        self.open: dict[Submission[Any], None] = {}
        self.settled: list[Submission[Any]] = []
        self._leave = leave
        self._due: dict[float, dict[Submission[Any], None]] = {}  # what may wait to be sent, by patience

    def enter(self, submission: Submission[Any]) -> None:
        """Take a submission in."""
        if not submission.values:
            self.settled.append(submission)
            return
        submission.lane.open += 1
        self.open[submission] = None
        self._due.setdefault(submission.lane.policy.deadline_seconds, {})[submission] = None

    def settle(self, item: Item[Any], result: Any, failure: Failure | None) -> None:
        """Note an item's outcome, if it has none yet."""
        if item.settled:
            return
        item.settled = True
        item.payload = None
        submission = item.submission
        submission.live.discard(item)
        if item.flight is None:
            submission.lane.entrance.inside -= 1
        else:
            item.flight.unsettled -= 1
        if failure is None:
            submission.results[item.index] = result
        else:
            submission.failures[item.index] = failure
        self._count(submission, 1)

    def fail(self, item: Item[Any], error: BaseException, retryable: bool, ambiguous: bool) -> None:
        """Note that an item failed.

        No rejection settles what an earlier, unanswered attempt left open: it may have met another schema, or another
        state of the server, and "unknown" is true in any case.
        """
        self.settle(item, None, Failure(error, item.attempts, retryable, ambiguous))

    def drop_waiting(self, submission: Submission[Any], error: BaseException) -> None:
        """Fail what is not in a batch."""
        if submission.given_up:
            return
        submission.given_up = True
        submission.ready.clear()  # it leaves its lane's ring when its turn comes
        never_entered = len(submission.values) - submission.entered
        submission.values, submission.keys = (), None  # the caller's: it goes on without us
        for item in [item for item in submission.live if item.flight is None]:
            self.fail(item, error, True, item.ambiguous)
            if not item.waits_behind:  # one that waits behind another gives its place up when its turn comes
                self._leave(item)
        if never_entered:
            submission.rest = Failure(error, 0, True, False)
            self._count(submission, never_entered)

    def expire(self, now: float, progress_at: float) -> tuple[list[Submission[Any]], bool]:
        """Fail what waited for too long while nothing was acknowledged: some of it, and whether there may be more."""
        expired: list[Submission[Any]] = []
        for patience, waiting in self._due.items():
            while waiting:
                submission = next(iter(waiting))
                if max(submission.submitted_at, progress_at) + patience > now:
                    break
                if len(expired) >= _EXPIRED_PER_STEP:
                    return expired, True
                expired.append(submission)
                del waiting[submission]
                message = f"nothing was acknowledged for {patience:g} s, and this still waited to be sent"
                self.drop_waiting(submission, DeadlinePassedError(message))
        return expired, False

    def next_due(self, progress_at: float) -> float | None:
        """When the next one may expire."""
        oldest = ((patience, next(iter(waiting))) for patience, waiting in self._due.items() if waiting)
        return min((max(s.submitted_at, progress_at) + patience for patience, s in oldest), default=None)

    def _count(self, submission: Submission[Any], outcomes: int) -> None:
        submission.remaining -= outcomes
        if submission.remaining:
            return
        lane = submission.lane
        lane.open -= 1
        del self.open[submission]
        self._due[lane.policy.deadline_seconds].pop(submission, None)
        self.settled.append(submission)
