"""Partitions that a call names: whether they are there, and may be named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llama_index_milvus_async_ext._lane.port import Port
from llama_index_milvus_async_ext._milvus.endpoint import Call, Endpoint
from llama_index_milvus_async_ext._milvus.errors import QueryError
from llama_index_milvus_async_ext._milvus.session import Connected
from llama_index_milvus_async_ext._store import calls

if TYPE_CHECKING:
    from llama_index_milvus_async_ext._store.open_store import OpenStore


async def check_partition(store: OpenStore, connected: Connected, port: Port, name: Any) -> None:
    """Refuse a partition to write to, or to delete from, as `milvus_partition_name`; nothing names the default one.

    Raises:
        QueryError: It is not there, or the collection's rows find their partitions by themselves.
    """
    if not name:
        return
    if not isinstance(name, str):
        raise QueryError(f"milvus_partition_name must be the name of one partition, got {name!r}")
    await _check(store, connected, port, [name])


async def check_partitions(store: OpenStore, connected: Connected, port: Port, names: Any) -> None:
    """Refuse partitions to look in, as `milvus_partition_names`; None names all.

    Raises:
        QueryError: As `check_partition`; or the list is none, or empty: Milvus would look in all partitions then.
    """
    if names is None:
        return
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise QueryError(f"milvus_partition_names must be a list of names of partitions, got {names!r}")
    if not names:
        raise QueryError(
            "milvus_partition_names is empty, and Milvus would look in all partitions: leave it out for that, or name "
            "those to look in"
        )
    await _check(store, connected, port, names)


async def _check(store: OpenStore, connected: Connected, port: Port, names: Sequence[str]) -> None:
    """Refuse partitions that are not there: Milvus Lite would find nothing in them, without a word.

    Those that are known to be there are not asked for again.

    Raises:
        QueryError: One is not there, or the collection's rows find their partitions by themselves.
        MilvusException: They could not be asked for.
    """
    collection = store.collection_name
    schema = await calls.schema(store, connected, port)
    if schema.partition_key is not None:
        schema = await calls.schema_again(store, connected, port, schema)
    if schema.partition_key is not None:  # Lite would put the row elsewhere, without a word
        raise QueryError(
            f"collection {collection!r} has the partition key {schema.partition_key!r}, which decides where each row "
            f"is, so that no partition can be named: leave it out, and filter by {schema.partition_key!r}"
        )
    if schema.partitions.issuperset(names):
        return
    schema.partitions = frozenset(await calls.call(store, connected, port, _partitions(collection)))
    missing = next((name for name in names if name not in schema.partitions), None)
    if missing is not None:
        raise QueryError(
            f"collection {collection!r} has no partition {missing!r}: make it first, by "
            f"store.client.create_partition({collection!r}, {missing!r})"
        )


def _partitions(collection: str) -> Call[list[str]]:
    async def run(endpoint: Endpoint, timeout: float) -> list[str]:
        names = await endpoint.connection.in_thread(
            endpoint.connection.client.list_partitions, collection, timeout=timeout
        )
        return list(names)

    return run
