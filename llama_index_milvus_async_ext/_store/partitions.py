"""Partitions that a call names: whether they are there, and may be named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

from llama_index_milvus_async_ext._lane.port import Port
from llama_index_milvus_async_ext._milvus.endpoint import Call, Endpoint
from llama_index_milvus_async_ext._milvus.errors import QueryError
from llama_index_milvus_async_ext._milvus.literals import shown
from llama_index_milvus_async_ext._milvus.session import Connected
from llama_index_milvus_async_ext._store import calls

if TYPE_CHECKING:
    from llama_index_milvus_async_ext._store.open_store import OpenStore


# The names are taken from a call's options here, and nowhere else: what a call looks in must not be more than it says.
# That none is named is said by None alone: to Milvus an empty name is none as well, so that a delete would reach all.


def named_partition(name: Any) -> str | None:
    """The partition to write to, or to delete from, as a caller names it; None for the default one, or for all.

    Raises:
        QueryError: It is neither None nor a name.
    """
    if name is None or _is_name(name):
        return name
    raise QueryError(
        f"milvus_partition_name must be the name of one partition, got {shown(name)}: leave it out, or give None, to "
        "name none"
    )


def partition_of(options: Mapping[str, Any]) -> str | None:
    """As `named_partition`, of the options of a write or a delete.

    Raises:
        QueryError: It is no name, or stands under the name of what reads take.
    """
    if options.get("milvus_partition_names") is not None:
        raise QueryError("writes and deletes take milvus_partition_name, one name, and not milvus_partition_names")
    return named_partition(options.get("milvus_partition_name"))


def partitions_of(options: Mapping[str, Any]) -> list[str] | None:
    """The partitions to look in, as a list of their own; None for all.

    Raises:
        QueryError: They are no list, or stand under the name of what writes take; or the list is empty: Milvus would
            look in all partitions then.
    """
    if options.get("milvus_partition_name") is not None:
        raise QueryError("reads take milvus_partition_names, a list, and not milvus_partition_name")
    names = options.get("milvus_partition_names")
    if names is None:
        return None
    if not isinstance(names, (list, tuple, set, frozenset)) or not all(map(_is_name, names)):
        raise QueryError(f"milvus_partition_names must be a list of names of partitions, got {shown(names)}")
    if not names:
        raise QueryError(
            "milvus_partition_names is empty, and Milvus would look in all partitions: leave it out for that, or name "
            "those to look in"
        )
    return list(names)


def _is_name(name: object) -> TypeGuard[str]:
    return isinstance(name, str) and name != ""


async def check_partition(store: OpenStore, connected: Connected, port: Port, name: str | None) -> None:
    """As `check_partitions`, for the one to write to, or to delete from; None needs no check."""
    await check_partitions(store, connected, port, None if name is None else [name])


async def check_partitions(store: OpenStore, connected: Connected, port: Port, names: Sequence[str] | None) -> None:
    """Refuse partitions that are not there: Milvus Lite would find nothing in them, without a word.

    Those that a server is known to have are not asked for again.

    Raises:
        QueryError: One is not there, or the collection's rows find their partitions by themselves.
        MilvusException: They could not be asked for.
    """
    if names is None:
        return
    collection = store.collection_name
    schema = await calls.schema(store, connected, port)
    if schema.partition_key is not None:
        schema = await calls.schema_again(store, connected, port, schema)
    if schema.partition_key is not None:  # Lite would put the row elsewhere, without a word
        raise QueryError(
            f"collection {collection!r} has the partition key {schema.partition_key!r}, which decides where each row "
            f"is, so that no partition can be named: leave it out, and filter by {schema.partition_key!r}"
        )
    # A server refuses what was dropped since; Milvus Lite finds nothing there.
    if schema.partitions.issuperset(names) and not connected.endpoint.is_lite:
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
        return list(await endpoint.connection.ask("list_partitions", collection, timeout=timeout))

    return run
