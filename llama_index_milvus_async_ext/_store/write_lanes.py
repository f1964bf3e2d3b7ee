"""The lane that a store's rows take, and what makes rows of its nodes there."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from llama_index_milvus_async_ext._lane.lanes import Lane
from llama_index_milvus_async_ext._milvus.endpoint import Endpoint
from llama_index_milvus_async_ext._milvus.limits import Limits, WriteTarget
from llama_index_milvus_async_ext._milvus.schema import Row, Schema
from llama_index_milvus_async_ext._nodes.rows import RowEncoder
from llama_index_milvus_async_ext._store.making import filterable_of

if TYPE_CHECKING:
    from llama_index_milvus_async_ext._store.open_store import OpenStore

RecentLane = tuple[tuple[Any, ...], Lane[Any, None]]

# What decides which lane a store's rows take, besides their partition.
_SETTINGS_OF = attrgetter(
    *("collection_name", "upsert_mode", "text_key", "doc_id_field", "enable_dense", "embedding_field"),
    *("enable_sparse", "sparse_embedding_field", "sparse_embedding_function", "filterable_metadata"),
    *Limits._fields,
)


def write_lane(
    store: OpenStore, endpoint: Endpoint, schema: Schema, partition: str | None, upsert: bool | None = None
) -> Lane[Any, None]:
    """The lane that a store's rows take now."""
    # The last one, if nothing has changed: comparing the settings takes 0.6 us, looking a lane up by them 2 us.
    key = (endpoint, schema, partition, upsert, _SETTINGS_OF(store))
    private: dict[str, Any] = store.__pydantic_private__ or {}  # as in `OpenStore.live`
    recent: RecentLane | None = private["_recent_write_lane"]
    if recent is None or recent[0] != key:
        target = WriteTarget(
            collection=store.collection_name,
            partition="" if partition is None else partition,  # as its request says it
            upsert=store.upsert_mode if upsert is None else upsert,
            text_key=store.text_key,
            doc_id_field=store.doc_id_field,
            embedding_field=store.embedding_field if store.enable_dense else None,
            sparse_field=store.sparse_embedding_field if store.sparse_encoder is not None else None,
            filterable=filterable_of(store.filterable_metadata),
        )
        lane = endpoint.write_lane(target, schema, store.limits, lambda: _encoder(target, schema))
        recent = private["_recent_write_lane"] = (key, lane)
    return recent[1]


def _encoder(target: WriteTarget, schema: Schema) -> Callable[[Any], tuple[Row, int]]:
    """What turns a node, or a node with its sparse vector and its record, into a row."""
    encoder = RowEncoder(
        schema,
        text_key=target.text_key,
        doc_id_field=target.doc_id_field,
        embedding_field=target.embedding_field,
        sparse_field=target.sparse_field,
        upsert=target.upsert,
        filterable=target.filterable,
    )
    return lambda item: encoder.encode(*item) if type(item) is tuple else encoder.encode(item)
