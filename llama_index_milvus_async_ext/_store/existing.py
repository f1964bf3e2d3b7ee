"""A collection that is there already, and a store on it, without what upstream's constructor would do."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import tenacity
from llama_index.vector_stores.milvus import IndexManagement, MilvusVectorStore
from llama_index.vector_stores.milvus.base import similarity_metrics_map
from pymilvus.exceptions import MilvusException

from llama_index_milvus_async_ext._milvus.connection import Connection
from llama_index_milvus_async_ext._milvus.errors import COLLECTION_NOT_FOUND
from llama_index_milvus_async_ext._milvus.indexes import metrics
from llama_index_milvus_async_ext._milvus.schema import Schema

# The arguments of upstream's constructor that its fields take as they are, and those that decide what else it does.
_FIELDS = frozenset(MilvusVectorStore.model_fields)
_ARGUMENTS = frozenset(inspect.signature(MilvusVectorStore.__init__).parameters) - {"self", "kwargs"}
_CONNECTION = {"uri", "token", "use_async_client"}
# What upstream's constructor, as it is known here, stores: another version's may do more, and is run.
_KNOWN_PRIVATE = {"_milvusclient", "_async_milvusclient", "_collection_initialized"}


class Existing(NamedTuple):
    """A collection that is there.

    Attributes:
        schema: What it is like.
        metrics: The metric of each index, by its field.
    """

    schema: Schema
    metrics: dict[str, str]


def existing(connection: Connection, collection: str, timeout: float) -> Existing | None:
    """What is known of a collection, asked for now, in as few questions as upstream asks; None if there is none.

    Args:
        connection: The way to it; asked in this thread.
        collection: Its name.
        timeout: Of each question, in seconds: pymilvus would repeat one for minutes.
    """
    try:
        schema = connection.fetch_schema(collection, timeout)
    except MilvusException as error:
        if not connection.client.has_collection(collection, timeout=timeout):
            return None
        if error.code != COLLECTION_NOT_FOUND:
            raise
        schema = connection.fetch_schema(collection, timeout)  # another process has made it meanwhile
    return Existing(schema, metrics(connection, collection, timeout))


def needs_nothing(kind: type[MilvusVectorStore], found: Existing, arguments: dict[str, Any]) -> bool:
    """Whether upstream's constructor would do nothing in Milvus but look.

    Args:
        kind: The store's class.
        found: The collection.
        arguments: The constructor's, but for the connection's.
    """
    makes_an_index = (IndexManagement.CREATE_IF_NOT_EXISTS, IndexManagement.CREATE_IF_NOT_EXISTS.value)
    is_indexed = bool(found.metrics) or arguments["index_management"] not in makes_an_index
    is_known = arguments.keys() == _ARGUMENTS - _CONNECTION and arguments.keys() <= _FIELDS
    return (
        is_indexed
        and kind._create_index_if_required is MilvusVectorStore._create_index_if_required
        and is_known
        and set(MilvusVectorStore.__private_attributes__) == _KNOWN_PRIVATE
        and not arguments["overwrite"]
        and not arguments["collection_properties"]
        and not (arguments["enable_sparse"] and arguments["sparse_embedding_function"] is None)
    )


def make_beside_others(make: Callable[[], None], discard: Callable[[], None]) -> None:
    """Make a collection, which another process may make at the same time: Milvus Lite refuses the second one.

    Args:
        make: Upstream's constructor, which makes a collection that is not there.
        discard: Closes what it leaves when it fails.
    """
    tenacity.Retrying(
        stop=tenacity.stop_after_attempt(3),
        wait=tenacity.wait_fixed(0.2),  # until the other one has made its index as well
        retry=tenacity.retry_if_exception(
            lambda error: isinstance(error, MilvusException) and "already exist" in str(error)
        ),
        before_sleep=lambda _: discard(),
        reraise=True,
    )(make)


def construct(store: MilvusVectorStore, arguments: dict[str, Any]) -> None:
    """What is left of upstream's constructor where `needs_nothing`: it would connect twice more, and ask twice more.

    Args:
        store: The store, whose fields are set.
        arguments: As `needs_nothing`'s.
    """
    fields = {name: value for name, value in arguments.items() if name != "similarity_metric"}
    empty: dict[str, Any] = {
        name: {} for name in ("index_config", "sparse_index_config", "search_config") if not fields[name]
    }
    super(MilvusVectorStore, store).__init__(**fields | empty | {"output_fields": fields["output_fields"] or []})
    store.similarity_metric = similarity_metrics_map.get(arguments["similarity_metric"].lower(), "L2")
    store._collection_initialized = True
