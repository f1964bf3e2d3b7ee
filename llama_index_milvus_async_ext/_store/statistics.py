"""What has gone to a store's endpoint, in numbers."""

from __future__ import annotations

from dataclasses import dataclass

from llama_index_milvus_async_ext._lane.core import Core


@dataclass(frozen=True)
class StoreStatistics:
    """What has gone to a store's endpoint, and what is on its way there now.

    Stores of one address share an endpoint's limit, and these numbers.

    Attributes:
        requests: Requests sent, repeated ones included.
        rows: Rows in them.
        queries: Queries in them.
        retries: Requests that were sent again.
        in_flight: Requests without an answer yet.
        waiting: Rows, queries and other calls that wait to be sent.
        limit: Requests that may be in flight now; falls when the server is overloaded, and grows back.
    """

    requests: int
    rows: int
    queries: int
    retries: int
    in_flight: int
    waiting: int
    limit: int

    @classmethod
    def of(cls, core: Core, max_concurrency: int) -> StoreStatistics:
        """The numbers of a core now, for a store with this bound; from any thread, at any time."""
        counts = core.counts
        return cls(
            requests=counts["requests"],
            rows=counts["rows"],
            queries=counts["queries"],
            retries=counts["retries"],
            in_flight=core.in_flight,
            waiting=core.waiting,
            limit=core.limit.once_allowed(max_concurrency),  # before its first request, the store counts as well
        )
