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
        most = lane.most_beside_urgent
        if most is None or self.now >= self._urgent_until:
            return False
        return sum(flight.lane.most_beside_urgent is not None for flight in self._holding) >= most

    def next_wake(self, waiting: Collection[Lane[Any, Any]]) -> float | None:
        """When those that are held back may go on, if nothing happens."""
        return self._urgent_until if any(map(self.holds_back, waiting)) else None
