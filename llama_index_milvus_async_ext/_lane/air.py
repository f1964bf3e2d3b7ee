"""Where each flight is: it has a slot, pauses, or wants a slot again."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from llama_index_milvus_async_ext._lane.lanes import Flight

# By how much the last attempt may outlive the deadline, and what an attempt gets at the least: one of a few
# milliseconds would not wait for its answer, and so leave the outcome unknown of what was refused each time before.
GRACE_SECONDS = 0.1
LEAST_TIMEOUT_SECONDS = GRACE_SECONDS / 2


class Air:
    """The flights under way, each in one place.

    A flight has a slot by standing in `holding`, and by nothing else: there is no count of slots to go astray.
    """

    def __init__(self) -> None:
        self.holding: set[Flight[Any]] = set()
        self.again: deque[Flight[Any]] = deque()  # had a slot, and want one again
        self._paused: dict[Flight[Any], float] = {}  # until when

    def hold(self, flight: Flight[Any]) -> None:
        """Give a flight a slot."""
        self.drop(flight)
        self.holding.add(flight)

    def pause(self, flight: Flight[Any], until: float) -> None:
        """Let a flight wait for a time, without a slot."""
        self.drop(flight)
        self._paused[flight] = until

    def queue(self, flight: Flight[Any]) -> None:
        """Let a flight that goes on at once wait for a slot, first in line."""
        self.drop(flight)
        self.again.appendleft(flight)

    def drop(self, flight: Flight[Any]) -> None:
        """Take a flight from where it is, if it is anywhere."""
        self.holding.discard(flight)
        self._paused.pop(flight, None)
        if flight in self.again:
            self.again.remove(flight)

    def wake(self, now: float) -> None:
        """Have those whose pause is over wait for a slot."""
        if self._paused:
            for flight in [flight for flight, until in self._paused.items() if until <= now]:
                del self._paused[flight]
                self.again.append(flight)

    def next_wake(self, progress_of: Callable[[str], float]) -> float | None:
        """When the next pause is over, or the patience of one that waits for a slot."""
        overdue = (flight.deadline_at(progress_of(flight.lane.kind)) + LEAST_TIMEOUT_SECONDS for flight in self.again)
        return min([*self._paused.values(), *overdue], default=None)

    @property
    def under_way(self) -> list[Flight[Any]]:
        """All flights; may be asked from any thread."""
        return [*list(self.holding), *list(self.again), *list(self._paused)]
