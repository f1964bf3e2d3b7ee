"""What waits before a stage, and what of it is worth a batch: no await, no clock, no I/O."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


def one(_: object) -> int:
    """The weight of items that all weigh the same."""
    return 1


class Intake(Generic[T]):
    """Items on their way into a stage.

    There is no timer: an idle stage begins with what is there, and while it works, items pile up to batches that are
    worth its while. A full intake takes no more, so that a slow stage holds up those before it.

    Args:
        most: Weight of a batch at the most; a single item may exceed it.
        least: Weight that is worth a batch while the stage is at work on another.
        capacity: Weight that may wait; the item that reaches it is still taken in.
        weigh: The weight of an item, at least 1.
    """

    def __init__(self, most: int, least: int, capacity: int, weigh: Callable[[T], int]) -> None:
        self._most = most
        self._least = min(least, capacity)  # else a full intake would wait for more
        self._capacity = capacity
        self._weigh = weigh
        self._waiting: deque[tuple[T, int]] = deque()
        self._weight = 0
        self._at_work = 0
        self._is_closed = False

    @property
    def has_room(self) -> bool:
        """Whether another item may come."""
        return self._weight < self._capacity

    @property
    def is_ready(self) -> bool:
        """Whether a batch can be taken."""
        return bool(self._waiting) and (not self._at_work or self._is_closed or self._weight >= self._least)

    @property
    def is_over(self) -> bool:
        """Whether nothing more can come."""
        return self._is_closed and not self._waiting

    def put(self, item: T) -> None:
        """Take an item in."""
        weight = self._weigh(item)
        self._waiting.append((item, weight))
        self._weight += weight

    def take(self) -> list[T]:
        """The next batch, which is at work then."""
        batch: list[T] = []
        total = 0
        while self._waiting and (not batch or total + self._waiting[0][1] <= self._most):
            item, weight = self._waiting.popleft()
            batch.append(item)
            total += weight
        self._weight -= total
        self._at_work += 1
        return batch

    def end(self) -> None:
        """The work on a batch has ended."""
        self._at_work -= 1

    def close(self) -> None:
        """Nothing more will come."""
        self._is_closed = True
