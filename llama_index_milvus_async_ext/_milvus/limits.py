"""What a store's requests keep to: its bounds, and where its rows go."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from llama_index_milvus_async_ext._milvus import sizes
from llama_index_milvus_async_ext.retry import Attempts, RetryPolicy


# Named tuples, as one of each is made and hashed for each call: a frozen dataclass takes five times as long.
class Limits(NamedTuple):
    """The bounds that a store sets on its requests; see `AsyncMilvusVectorStore` for each."""

    max_concurrency: int
    batch_size: int
    max_batch_bytes: int
    max_batch_queries: int
    rpc_timeout_seconds: float
    retry: RetryPolicy

    @property
    def writes_in_flight(self) -> int:
        """Requests of rows under way at the most."""
        return min(self.max_concurrency, max(sizes.MOST_ROWS_UNDER_WAY // self.batch_size, 1))

    def queries_per_request(self, top_k: int) -> int:
        """Queries in one request at the most, each of which asks for so many hits."""
        return min(self.max_batch_queries, max(sizes.MAX_HITS // top_k, 1))


@dataclass(frozen=True)
class OfInserts(RetryPolicy):
    """A policy for rows that no upsert can replace, as Milvus makes up their keys.

    What may have been executed is not sent again, which would store it twice.

    Attributes:
        given: The user's policy, which decides about all else.
    """

    given: RetryPolicy = field(default_factory=RetryPolicy)

    @classmethod
    def under(cls, given: RetryPolicy) -> OfInserts:
        """The policy, under the user's."""
        return cls(deadline_seconds=given.deadline_seconds, given=given)

    def next_pause(self, attempts: Attempts) -> float | None:
        """As the user's policy says, if the attempt was certainly not executed."""
        return None if attempts.verdict.may_have_been_executed else self.given.next_pause(attempts)


class WriteTarget(NamedTuple):
    """Where rows go, and which columns their parts have."""

    collection: str
    partition: str
    upsert: bool
    text_key: str
    doc_id_field: str
    embedding_field: str | None
    sparse_field: str | None
    filterable: tuple[str, ...] | None
