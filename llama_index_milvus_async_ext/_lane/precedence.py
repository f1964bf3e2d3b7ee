"""Who gives way to whom: as long as somebody waits for answers, only so much that can wait is out."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from llama_index_milvus_async_ext._lane.lanes import Flight, Lane

# How long after an urgent request the next one is expected: clients that search one after the other come in time.
URGENT_SECONDS = 0.1


class Precedence:
    """Lanes that give way to urgent ones, and when they do.

    Args:
        holding: The flights that have a slot.
    """

    def __init__(self, holding: Collection[Flight[Any]]) -> None:
        self.now = 0.0
        self._holding = holding
        self._urgent_until = float("-inf")

    def note(self, lane: Lane[Any, Any], now: float) -> None:
        """Note that a request of this lane is wanted, or has ended."""
        self.now = now
        if lane.urgent:
            self._urgent_until = now + URGENT_SECONDS

    def holds_back(self, lane: Lane[Any, Any]) -> bool:
        """Whether a request of this lane has to wait now."""
        if lane.gives_way is None or not self._is_urgent:
            return False
        return sum(flight.lane.gives_way is not None for flight in self._holding) >= lane.gives_way.requests

    def most_items(self, lane: Lane[Any, Any]) -> int:
        """As many may be in one request of this lane now."""
        if lane.gives_way is None or not self._is_urgent:
            return lane.max_items
        return min(lane.gives_way.items, lane.max_items)

    @property
    def _is_urgent(self) -> bool:
        return self.now < self._urgent_until or any(flight.lane.urgent for flight in self._holding)

    def next_wake(self, waiting: Collection[Lane[Any, Any]]) -> float | None:
        """When those that are held back may go on, if nothing happens."""
        if self.now >= self._urgent_until:  # beside an urgent request, its end is what they wait for
            return None
        return self._urgent_until if any(map(self.holds_back, waiting)) else None
