"""What a store's requests keep to: its bounds, and where its rows go."""

from __future__ import annotations

from typing import NamedTuple

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


class WriteTarget(NamedTuple):
    """Where rows go, and which columns their parts have."""

    collection: str
    partition: str
    upsert: bool
    text_key: str
    doc_id_field: str
    embedding_field: str | None
    sparse_field: str | None
