"""The indexes of a collection."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
from pymilvus.exceptions import ErrorCode
from pymilvus.grpc_gen import common_pb2, milvus_pb2

if TYPE_CHECKING:
    from llama_index_milvus_async_ext._milvus.connection import Connection


def metrics(connection: Connection, collection: str, timeout: float) -> dict[str, str]:
    """The metric of each index of a collection, by its field; blocks."""
    described = _described(connection, collection, timeout)
    if described is None:
        client = connection.client
        names = client.list_indexes(collection, timeout=timeout)
        described = [client.describe_index(collection, name, timeout=timeout) or {} for name in names]
    return {index["field_name"]: index.get("metric_type", "") for index in described if index}


def _described(connection: Connection, collection: str, timeout: float) -> list[dict[str, Any]] | None:
    """All of them by one answer; None if that can't be had, and the public client is to ask, with its repeats."""
    describe = connection.stub_method("DescribeIndex")
    if describe is None:
        return None
    request = milvus_pb2.DescribeIndexRequest(collection_name=collection)
    try:
        answer = describe(request, timeout=timeout, metadata=connection.metadata)
    except grpc.RpcError:
        return None
    if answer.status.code == ErrorCode.INDEX_NOT_FOUND or answer.status.error_code == common_pb2.IndexNotExist:
        return []
    if answer.status.code or answer.status.error_code:
        return None
    return [
        {"field_name": index.field_name, **{pair.key: pair.value for pair in index.params}}
        for index in answer.index_descriptions
    ]
