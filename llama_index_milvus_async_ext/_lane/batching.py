"""Takes a batch from what waits in a lane: as many items as fit, the callers sharing it evenly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llama_index_milvus_async_ext._lane.items import Item, Submission
from llama_index_milvus_async_ext._lane.lanes import Flight, Lane


def begin(lane: Lane[Any, Any], free_slots: int, most_items: int) -> Flight[Any]:
    """An empty flight, with the number of items that it should take.

    Args:
        lane: The lane, in whose ring somebody waits.
        free_slots: Slots that the lane could take now, this flight's own included.
        most_items: As many at the most.
    """
    if not lane.flights:
        lane.spreads = lane.spread_above is not None and lane.spread_above < lane.max_items
    most = min(_batch_size(lane, free_slots) if lane.spreads else lane.max_items, most_items)
    flight = Flight(lane, most, max(most // max(len(lane.ring), 1), 1))
    lane.filling = flight
    lane.flights.add(flight)
    return flight


def fill(lane: Lane[Any, Any], budget: int, refuse: Callable[[Item[Any], BaseException], None]) -> bool:
    """Put items into the lane's filling flight.

    Args:
        lane: The lane.
        budget: Items to prepare at the most.
        refuse: Told of an item that can't be prepared.

    Returns:
        Whether the batch is complete; if not, there is more to fill in.
    """
    flight = lane.filling
    assert flight is not None
    ring, group = lane.ring, flight.group
    while ring and len(group) < flight.most:
        if budget <= 0:
            return False
        submission = ring[0]
        ready = submission.ready
        if submission.trips is not None:
            flight.watched = True
        while ready and flight.quota and budget > 0 and len(group) < flight.most:
            item = ready.popleft()
            if item.settled:
                continue
            budget -= 1
            if item.nbytes < 0:
                try:
                    item.payload, item.nbytes = lane.prepare(item.value)
                except BaseException as error:  # whatever the user's own code in it raises
                    refuse(item, error)
                    continue
            if group and flight.nbytes + item.nbytes > lane.max_bytes:
                ready.appendleft(item)
                return True
            group.append(item)
            item.flight = flight
            flight.unsettled += 1
            flight.nbytes += item.nbytes
            flight.quota -= 1
            lane.entrance.inside -= 1
        if not ready:
            ring.popleft()
            submission.in_ring = False
            flight.quota = flight.share
        elif not flight.quota:
            ring.rotate(-1)  # the next caller's turn
            flight.quota = flight.share
    if not ring:  # what comes while the endpoint is at work fills requests, of which it manages more rows
        lane.spreads = False
    return True


def enqueue(submission: Submission[Any]) -> None:
    """Let a submission take part in its lane's batches, if it has items that may be sent."""
    if submission.ready and not submission.in_ring:
        submission.in_ring = True
        submission.lane.ring.append(submission)


def payloads(
    lane: Lane[Any, Any], items: list[Item[Any]], refuse: Callable[[Item[Any], BaseException], None]
) -> list[Any]:
    """The payloads of items, which are kept for their first request only: few need another, and many are under way.

    An item that can't be prepared any more is refused, and settled by that: its payload is left out.
    """
    found = []
    for item in items:
        payload, item.payload = item.payload, None
        if payload is None:
            try:
                payload = lane.prepare(item.value)[0]
            except BaseException as error:
                refuse(item, error)
                continue
        found.append(payload)
    return found


def _batch_size(lane: Lane[Any, Any], free_slots: int) -> int:
    """How many items a batch may have, so that what waits is spread over the free slots."""
    waiting = 0
    for submission in lane.ring:
        waiting += len(submission.ready)
        if waiting >= lane.max_items * free_slots:  # of many callers, no more are counted than make a difference
            return lane.max_items
    assert lane.spread_above is not None
    return min(max(-(-waiting // free_slots), lane.spread_above), lane.max_items)
