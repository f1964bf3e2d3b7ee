"""Lanes, and the flights in which their items go."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from llama_index_milvus_async_ext._lane.entrance import Entrance
from llama_index_milvus_async_ext._lane.items import Item, Submission
from llama_index_milvus_async_ext.retry import RetryPolicy

T = TypeVar("T")
R = TypeVar("R")


class Flight(Generic[T]):
    """A batch, from its taking until each of its items has an outcome.

    Attributes:
        group: The items of the request under way: the whole batch at first, then halves of one that was refused.
        groups: Groups that are still to be sent, the next one last.
        carried: How many items were in its last request.
        ended_at: When that one ended.
        watched: Whether a submission in it wants to know what becomes of its batches.
        sent: Those of the group that the request carries which is out; empty if none is.
        refusals_left: Refused requests that halving may still cost.
        error: Why the group was sent again.
    """

    __slots__ = (
        "attempts",
        "carried",
        "counted",
        "ended_at",
        "error",
        "group",
        "groups",
        "idle_seconds",
        "lane",
        "most",
        "nbytes",
        "quota",
        "refusals_left",
        "sent",
        "sent_at",
        "share",
        "started_at",
        "unsettled",
        "waits_since",
        "watched",
    )

    def __init__(self, lane: Lane[T, Any], most: int, share: int) -> None:
        self.lane = lane
        self.most = most
        self.share = share
        self.quota = share
        self.nbytes = 0
        self.group: list[Item[T]] = []
        self.groups: list[list[Item[T]]] = []
        self.sent: list[Item[T]] = []
        self.sent_at = 0.0
        self.waits_since = 0.0
        self.ended_at = 0.0
        self.carried = 0
        self.watched = False
        self.unsettled = 0
        self.refusals_left = 0
        self.begin_group()

    def begin_group(self) -> None:
        """Count the attempts anew."""
        self.error: BaseException | None = None
        self.attempts = 0
        self.counted = 0
        self.started_at = -1.0
        self.idle_seconds = 0.0

    def deadline_at(self, progress_at: float) -> float:
        """When it is given up, if the endpoint has acknowledged nothing of its kind since `progress_at`."""
        return max(self.waits_since, progress_at) + self.lane.policy.deadline_seconds

    def alive(self) -> list[Item[T]]:
        """Items of the group whose callers still wait."""
        return [item for item in self.group if not item.settled]


class GivesWay(NamedTuple):
    """What a lane is content with while urgent requests come.

    Attributes:
        requests: As many may be out, of all lanes that give way.
        items: As many are in one of them. The endpoint is busy with a request until its end, so small ones leave gaps.
    """

    requests: int
    items: int


@dataclass(eq=False)
class Lane(Generic[T, R]):
    """The settings of requests of one sort, and what waits for them now.

    Attributes:
        kind: What its items are called in statistics.
        prepare: Turns a value into its payload and the payload's size in bytes; raises for a bad one. No I/O.
        send: Sends one request: `send(payloads, upsert, timeout_seconds) -> one result per payload`. It may empty the
            list, to save memory while it waits; another attempt prepares its items anew. `upsert` tells that some
            item may be there already: an earlier attempt may have been executed, or an item of the same key came
            before it.
        entrance: Where submissions wait; lanes that share one apply equal keys in the order of submission.
        policy: When to try again.
        max_items: Items in one request at the most.
        max_bytes: Bytes of payload in one request at the most (one item alone may be larger).
        max_in_flight: Batches of this lane under way at once, those that pause before another attempt included.
        ceiling: Requests in flight to the endpoint, of all lanes, above which this lane does not send.
        rpc_timeout_seconds: Bound on one attempt.
        spread_above: Share what comes to an idle lane out evenly among the free slots, so that the endpoint begins on
            the first part while the others are prepared; but leave requests of this many items whole.
        abort_when_unwanted: Whether a request is aborted once all its callers gave up (right for reads; a write is
            left to end, because an aborted write may still be applied, after a later one of the same key).
        exclusive: Lanes with an equal one, if it is not None, have one request out in all.
        urgent: Whether others give way to its requests.
        gives_way: What it sends while urgent requests come; None: the same as ever.
        key: Under which the shell forgets the lane when it is idle; None: whoever made it keeps it.
    """

    kind: str
    prepare: Callable[[T], tuple[Any, int]]
    send: Callable[[list[Any], bool, float], Coroutine[Any, Any, Sequence[R]]]
    entrance: Entrance
    policy: RetryPolicy
    max_items: int
    max_bytes: int
    max_in_flight: int
    ceiling: int
    rpc_timeout_seconds: float
    spread_above: int | None = None
    abort_when_unwanted: bool = False
    exclusive: Hashable | None = None
    urgent: bool = False
    gives_way: GivesWay | None = None
    key: Hashable | None = None

    ring: deque[Submission[R]] = field(default_factory=deque)  # submissions with items that may be sent
    flights: set[Flight[T]] = field(default_factory=set)
    filling: Flight[T] | None = None
    spreads: bool = False
    has_turn: bool = False
    open: int = 0  # submissions without all their outcomes

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is under way."""
        return not self.open and not self.flights
