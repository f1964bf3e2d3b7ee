"""A store's connection, from its opening to its end."""

from __future__ import annotations

import logging
import os
import threading
import weakref

from llama_index.vector_stores.milvus.base import similarity_metrics_map
from pymilvus import AsyncMilvusClient, MilvusClient

from llama_index_milvus_async_ext._endpoint import Endpoint
from llama_index_milvus_async_ext._wire import ConnectionSettings
from llama_index_milvus_async_ext.retry import COLLECTION_NOT_LOADED

logger = logging.getLogger("llama_index_milvus_async_ext")


class Connected:
    """What a store is connected with, in the process that connected it."""

    def __init__(self, endpoint: Endpoint, client: MilvusClient, async_client: AsyncMilvusClient | None) -> None:
        self.pid = os.getpid()
        self.endpoint = endpoint
        self.client = client
        self.async_client = async_client
        self.closed = False
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._calls = 0
        self._ending = False

    @classmethod
    def anew(cls, settings: ConnectionSettings, use_async_client: bool) -> Connected:
        """Connect in this process."""
        endpoint = Endpoint.open(settings, log_retry)
        options = {"dedicated": True, **settings.options}
        async_client = (
            AsyncMilvusClient(uri=endpoint.uri, token=settings.token, **options) if use_async_client else None
        )
        return cls(endpoint, settings.client(endpoint.uri), async_client)

    def __enter__(self) -> None:
        """Begin a call, for whose end `finish` waits."""
        with self._lock:  # the plain lock: a condition's own way in and out costs several times as much
            if self._ending:
                raise RuntimeError("this AsyncMilvusVectorStore is closed; make a new one")
            self._calls += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._calls -= 1
            if self._ending:
                self._idle.notify_all()

    def finish(self) -> None:
        """Let no new call begin, wait for those under way, and close."""
        if self.pid == os.getpid():
            with self._idle:
                self._ending = True
                self._idle.wait_for(lambda: self._calls == 0)
        self.close()

    def close(self) -> None:
        """Close what was opened here; a forked child leaves its parent's connections alone."""
        if self.closed or self.pid != os.getpid():
            return
        self.closed = True
        self.client.close()
        self.endpoint.close()


def close_with(store: object, connected: Connected) -> None:
    """Close the connection of a store that is dropped unclosed; at the interpreter's exit the process does."""
    weakref.finalize(store, connected.close).atexit = False


def fitted(
    endpoint: Endpoint,
    collection: str,
    wanted_fields: list[str],
    embedding_field: str,
    dim: int | None,
    metric: str | None,
) -> tuple[int | None, str | None]:
    """Dimension and metric of an existing collection, checked against those asked for.

    Raises:
        ValueError: The collection has others, or lacks a field.
    """
    client = endpoint.connection.client
    if not client.has_collection(collection):
        return dim, metric
    schema = endpoint.connection.fetch_schema(collection, timeout=30)
    remedy = "choose another collection_name, or overwrite=True to drop the existing collection"
    missing = [name for name in wanted_fields if name not in schema.names]
    if missing:
        raise ValueError(f"collection {collection!r} exists, but has no field {missing[0]!r}; {remedy}")
    stored_dim = schema.params(embedding_field).get("dim")
    if dim is not None and stored_dim is not None and dim != int(stored_dim):
        raise ValueError(f"collection {collection!r} has dimension {stored_dim}, but dim={dim} is asked for; {remedy}")
    stored_metric = None
    # Milvus Lite reads the whole collection to describe an index: seconds, for what only hybrid searches make use of.
    if metric is not None or len(wanted_fields) > 1 or not endpoint.is_lite:
        for index in client.list_indexes(collection, field_name=embedding_field):
            stored_metric = (client.describe_index(collection, index) or {}).get("metric_type")
    asked = similarity_metrics_map.get(metric.lower()) if metric is not None else None
    if asked is not None and stored_metric is not None and asked != stored_metric:
        raise ValueError(
            f"collection {collection!r} is indexed with metric {stored_metric}, but similarity_metric={metric!r} "
            f"is asked for; {remedy}"
        )
    return (int(stored_dim) if stored_dim is not None else dim), metric or stored_metric


def log_retry(error: BaseException, attempt: int, pause: float) -> None:
    # A collection that is not loaded yet is no fault: Milvus loads it after a restart, Milvus Lite when it is told to.
    is_loading = getattr(error, "code", None) == COLLECTION_NOT_LOADED
    level = logging.WARNING if attempt == 1 and not is_loading else logging.DEBUG
    logger.log(level, "request to Milvus: attempt %d failed, next one in %.2f s: %s", attempt, pause, error)
