"""Items, the submissions that they come in, and their outcomes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from llama_index_milvus_async_ext._lane.effects import Retry
    from llama_index_milvus_async_ext._lane.lanes import Flight, Lane
    from llama_index_milvus_async_ext._lane.trips import Trip

T = TypeVar("T")
R = TypeVar("R")


class CancelledCallError(Exception):
    """The caller gave up before the item was sent, or before its answer came."""

    def __init__(self, message: str = "the call was cancelled") -> None:
        super().__init__(message)


class DeadlinePassedError(TimeoutError):
    """The item waited for its turn until the deadline."""


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
    """One caller's items, and what became of each; complete when `remaining` is 0.

    Items are made of its values a few at a time, as they enter: the others wait here, with their caller.
    """

    __slots__ = (
        "entered",
        "failures",
        "given_up",
        "in_ring",
        "is_noted",
        "keys",
        "lane",
        "live",
        "number",
        "on_done",
        "own_keys",
        "ready",
        "remaining",
        "rest",
        "results",
        "retries",
        "submitted_at",
        "trips",
        "values",
    )

    def __init__(
        self,
        lane: Lane[Any, R],
        values: Sequence[Any],
        keys: Sequence[Hashable] | None,
        on_done: Callable[[Submission[R]], None],
        submitted_at: float,
        number: int,
        own_keys: frozenset[Hashable] | None = None,
    ) -> None:
        self.lane = lane
        self.values = values
        self.keys = keys
        self.on_done = on_done
        self.submitted_at = submitted_at
        self.number = number  # of all submissions to this core, in their order
        self.entered = 0  # values that have become items
        self.own_keys = own_keys  # of one that does not enter all at once
        self.is_noted = False  # as a large one, by the entrance
        self.live: set[Item[Any]] = set()  # items without an outcome
        self.ready: deque[Item[Any]] = deque()  # may be sent now; the other live ones wait behind an equal key, or fly
        self.results: list[R | None] = [None] * len(values)
        self.failures: dict[int, Failure] = {}
        self.rest: Failure | None = None  # of the values that never became items, from `entered` on
        self.remaining = len(values)
        self.retries = 0
        self.trips: list[Trip | Retry] | None = None  # what became of its batches, if somebody wants to know
        self.given_up = False
        self.in_ring = False

    def failure(self, index: int) -> Failure | None:
        """Why a value has no result; None if it has one."""
        return self.rest if self.rest is not None and index >= self.entered else self.failures.get(index)

    def failed_indices(self) -> list[int]:
        """The places of all values without a result, in their order."""
        failed = sorted(self.failures)
        return failed if self.rest is None else [*failed, *range(self.entered, len(self.results))]

    def unsettled_indices(self) -> set[int]:
        """The places of all values without an outcome; from any thread, and then perhaps some too many."""
        # In this order: what enters or is settled between the looks is in one of them.
        entered, is_over = self.entered, self.rest is not None
        inside = {item.index for item in list(self.live)}
        return inside if is_over else inside.union(range(entered, len(self.results)))


class Item(Generic[T]):
    """One value on its way."""

    __slots__ = (
        "ambiguous",
        "attempts",
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
        "waits_behind",
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
        self.flight: Flight[T] | None = None
        self.waits_behind = False  # an earlier item of the same key, whose `follower` this is
        self.repeats = False  # came while an earlier item of the same key had no outcome
        self.follower: Item[T] | None = None


def without_frames(error: BaseException) -> BaseException:
    """The error, without its traceback and those of its causes, which hold the rows of other callers."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        current.__traceback__ = None
        current = current.__cause__ or current.__context__
    return error
