"""A write is well only if every node is written: of what nobody knows whether it is, one is told as loudly."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from llama_index.core.schema import BaseNode, TextNode

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, AsyncMilvusWriter, RetryPolicy, WriteError, WriteReport
from llama_index_milvus_async_ext.report import FailedNode
from tests.conftest import MakeNodes
from tests.fault_proxy import FaultProxy
from tests.faults import LoseAnswer, Nth, Refuse

DIM = 8
ONE = FailedNode(TextNode(id_="one", text="one"), ConnectionError("lost"), 1, True)


@pytest.mark.parametrize(
    "lists",
    [{"failed": [ONE]}, {"unknown": [ONE]}, {"failed": [ONE], "unknown": [ONE]}],
    ids=["failed", "unknown", "both"],
)
def test_a_report_is_ok_only_without_failed_and_without_unknown_nodes(lists: dict[str, list[FailedNode]]) -> None:
    report = WriteReport(written=["other"], **lists)
    merged = WriteReport.merged([WriteReport(written=["first"]), report, WriteReport(written=["last"])], 1.0)
    for each in (report, merged):
        assert not each.ok
        with pytest.raises(WriteError, match="one") as raised:
            each.raise_for_failures()
        assert raised.value.report is each


def test_a_report_of_written_nodes_or_of_nothing_is_ok() -> None:
    for report in (WriteReport(), WriteReport(written=["one"], retries=3), WriteReport.merged([], 0.0)):
        assert report.ok
        report.raise_for_failures()


@pytest.fixture
def store(proxy: FaultProxy, collection_name: str) -> Iterator[AsyncMilvusVectorStore]:
    """A store whose every row is inserted, and sent once."""
    with AsyncMilvusVectorStore(
        proxy.uri,
        collection_name=collection_name,
        dim=DIM,
        consistency_level="Strong",
        upsert_mode=False,
        batch_size=10,
        retry=RetryPolicy(max_attempts=1),
    ) as store:
        yield store


WAYS: dict[str, Callable[[AsyncMilvusVectorStore, list[BaseNode]], Any]] = {
    "add": lambda store, nodes: store.add(nodes),
    "async_add": lambda store, nodes: asyncio.run(store.async_add(nodes)),
    "writer": lambda store, nodes: AsyncMilvusWriter(store)(nodes),
    "async writer": lambda store, nodes: asyncio.run(AsyncMilvusWriter(store).acall(nodes)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("is_stored", [True, False])
def test_whoever_writes_is_told_of_nodes_whose_outcome_nobody_knows(
    store: AsyncMilvusVectorStore, proxy: FaultProxy, make_nodes: MakeNodes, way: str, is_stored: bool
) -> None:
    nodes = make_nodes(30, dim=DIM)
    fault = LoseAnswer() if is_stored else Refuse(grpc.StatusCode.DEADLINE_EXCEEDED)
    proxy.script(fault, method="Insert", on=Nth(2))
    with pytest.raises(WriteError, match="0 failed, 10 unknown") as raised:
        WAYS[way](store, nodes)
    report = raised.value.report
    assert [f.node for f in report.unknown] == nodes[10:20] and not report.failed
    assert report.written == [node.node_id for node in nodes[:10] + nodes[20:]]
    ids = {node.node_id for node in store.get_nodes(node_ids=[node.node_id for node in nodes])}
    lost = {f.node.node_id for f in report.unknown}
    assert ids == {*report.written, *(lost if is_stored else ())}


@pytest.mark.parametrize("is_async", [False, True])
def test_a_writer_that_collects_says_so_in_its_report(
    store: AsyncMilvusVectorStore, proxy: FaultProxy, make_nodes: MakeNodes, is_async: bool
) -> None:
    writer, nodes = AsyncMilvusWriter(store, on_failure="collect"), make_nodes(5, dim=DIM)
    proxy.script(LoseAnswer(), method="Insert")
    passed_on = asyncio.run(writer.acall(nodes)) if is_async else writer(nodes)
    assert passed_on == nodes
    assert writer.last_report is not None and not writer.last_report.ok
    assert [f.node for f in writer.last_report.unknown] == nodes
