"""Who comes next: lanes that want a slot, in their order."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Hashable
from typing import Any

from llama_index_milvus_async_ext._lane import batching
from llama_index_milvus_async_ext._lane.entrance import Entrance
from llama_index_milvus_async_ext._lane.items import Item
from llama_index_milvus_async_ext._lane.lanes import Flight, Lane
from llama_index_milvus_async_ext._lane.limit import Limit
from llama_index_milvus_async_ext._lane.precedence import Precedence


class Turns:
    """Lanes with something to send, and entrances with somebody to let in, each served in turn.

    Args:
        limit: How many slots there are.
        holding: The flights that have one.
        precedence: Who gives way to whom.
    """

    def __init__(self, limit: Limit, holding: Collection[Flight[Any]], precedence: Precedence) -> None:
        self._limit = limit
        self._holding = holding
        self._precedence = precedence
        self._lanes: deque[Lane[Any, Any]] = deque()
        self._entrances: deque[Entrance] = deque()

    def give(self, lane: Lane[Any, Any]) -> None:
        """Have a lane wait for its turn, if it has something to do."""
        if not lane.has_turn and (lane.filling is not None or (lane.ring and len(lane.flights) < lane.max_in_flight)):
            lane.has_turn = True
            self._lanes.append(lane)

    def give_to_entrance(self, entrance: Entrance) -> None:
        """Have an entrance wait for its turn, if it can let somebody in."""
        if not entrance.has_turn and entrance.is_open:
            entrance.has_turn = True
            self._entrances.append(entrance)

    def give_to_next_of_key(self, item: Item[Any]) -> None:
        """Let the next item of the same key go: this one's request has ended."""
        follower = item.submission.lane.entrance.leave(item)
        if follower is not None:
            submission = follower.submission
            submission.ready.append(follower)
            batching.enqueue(submission)
            self.give(submission.lane)

    def serve_entrance(self) -> bool:
        """Let the next ones in; whether there were any."""
        if not self._entrances:
            return False
        entrance = self._entrances.popleft()
        entrance.has_turn = False
        for submission in entrance.admit():
            batching.enqueue(submission)
            self.give(submission.lane)
        self.give_to_entrance(entrance)
        return True

    def next_lane(self, in_order_behind: Collection[Flight[Any]]) -> Lane[Any, Any] | None:
        """Take the lane whose turn it is; None if nobody can do anything now.

        Slots are given strictly in order, also past differing ceilings, so that nobody starves behind a greedier
        neighbour. A lane that goes on filling has its slot; and one that waits for the end of another lane's request
        lets those behind it go first.

        Args:
            in_order_behind: Flights that want a slot as well, and come first.
        """
        barred = any(not self.waits_for_another(flight.lane) for flight in in_order_behind)
        position = 0
        while position < len(self._lanes):
            lane = self._lanes[position]
            if lane.filling is None:
                while lane.ring and lane.ring[0].given_up:
                    lane.ring.popleft()
                if lane.ring:
                    if barred or self.waits_for_another(lane):
                        position += 1
                        continue
                    if not self.free_slots(lane):
                        barred = True
                        position += 1
                        continue
            del self._lanes[position]
            lane.has_turn = False
            if lane.filling is not None or lane.ring:
                return lane
        return None

    def may_send(self, lane: Lane[Any, Any]) -> bool:
        """Whether a request of this lane may go out now."""
        return self._limit.free(len(self._holding), lane.ceiling) > 0 and not self.waits_for_another(lane)

    def waits_for_another(self, lane: Lane[Any, Any]) -> bool:
        """Whether a request is out beside which this lane may not have one, or others go first."""
        if self._precedence.holds_back(lane):
            return True
        exclusive: Hashable | None = lane.exclusive
        return exclusive is not None and any(flight.lane.exclusive == exclusive for flight in self._holding)

    def free_slots(self, lane: Lane[Any, Any]) -> int:
        """Slots that a lane could take now."""
        return min(self._limit.free(len(self._holding), lane.ceiling), lane.max_in_flight - len(lane.flights))

    def begin(self, lane: Lane[Any, Any]) -> Flight[Any]:
        """A flight to be filled, for the lane whose turn it is."""
        return batching.begin(lane, self.free_slots(lane), self._precedence.most_items(lane))

    def next_wake(self) -> float | None:
        """When a lane that is held back may go on."""
        return self._precedence.next_wake(self._lanes)
