"""Deletes that the next reads of this process see."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import grpc
from pymilvus.client import ts_utils
from pymilvus.grpc_gen import milvus_pb2

from llama_index_milvus_async_ext._milvus.time_left import TimeLeft

if TYPE_CHECKING:
    from llama_index_milvus_async_ext._milvus.connection import Connection


def delete(connection: Connection, collection: str, *, is_lite: bool, timeout: float, **options: Any) -> None:
    """Delete rows, by pymilvus's client, in one attempt; blocks.

    With "Session" consistency a read waits for the time of its process's last write. 2.3 servers give that of an
    upsert, but none of a delete: what was deleted could be found right after. So they are asked what time it is then.

    Args:
        connection: The way to Milvus.
        collection: The collection.
        is_lite: Whether it is Milvus Lite, where all reads see all that came before.
        timeout: In seconds.
        **options: Those of `MilvusClient.delete`.

    Raises:
        MilvusException: Milvus rejected the request, or could not be reached.
    """
    left = TimeLeft(timeout)
    connection.once.delete(collection_name=collection, timeout=left(), **options | {"retry_on_rate_limit": False})
    ask = connection.stub_method("AllocTimestamp")
    if ask is not None and not is_lite:
        with contextlib.suppress(grpc.RpcError):  # an older server has no such method
            answer = ask(milvus_pb2.AllocTimestampRequest(), timeout=left())
            ts_utils.update_collection_ts(collection, answer.timestamp, connection.address, connection.db_name)
