"""What a store's requests keep to: its bounds, and where its rows go."""

from __future__ import annotations

from typing import NamedTuple

from llama_index_milvus_async_ext._milvus import sizes
from llama_index_milvus_async_ext.retry import RetryPolicy


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
