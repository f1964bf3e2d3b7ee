"""What the submissions that are watched learn of the requests that carried their items."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from llama_index_milvus_async_ext._lane.lanes import Flight


class Trip(NamedTuple):
    """A batch that has come to its end, as one of the submissions in it sees it.

    Attributes:
        items: Items in its last request, those of other submissions included.
        own_items: Items of this submission that were in the batch.
        nbytes: Bytes of payload, of all of them.
        waiting_seconds: From the submission until the batch was first sent.
        sending_seconds: From then until its last answer, further attempts and the pauses before them included.
        attempts: Requests that it took.
        error: How the last one ended, if not well.
    """

    items: int
    own_items: int
    nbytes: int
    waiting_seconds: float
    sending_seconds: float
    attempts: int
    error: BaseException | None


def note_end(flight: Flight[Any]) -> None:
    """Tell those who watch a flight that the requests of its group have ended."""
    if not flight.attempts:  # none was sent
        return
    nbytes = sum(item.nbytes for item in flight.group)
    own = Counter(item.submission for item in flight.group if item.submission.trips is not None)
    for submission, own_items in own.items():
        trip = Trip(
            items=flight.carried,
            own_items=own_items,
            nbytes=nbytes,
            waiting_seconds=flight.started_at - submission.submitted_at,
            sending_seconds=flight.ended_at - flight.started_at,
            attempts=flight.attempts,
            error=flight.error,
        )
        assert submission.trips is not None
        submission.trips.append(trip)
