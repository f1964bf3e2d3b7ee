"""Reports: what a write made in parts, or shared, or made again, says of all of it together."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from llama_index.core.schema import TextNode
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.event_handlers import BaseEventHandler

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, AsyncMilvusWriter, RetryPolicy, WriteReport
from llama_index_milvus_async_ext._ingest import embed_and_write
from llama_index_milvus_async_ext._ingest.embed_and_write import explained
from llama_index_milvus_async_ext._milvus.errors import StatusFailure
from llama_index_milvus_async_ext.events import MilvusWriteEvent
from llama_index_milvus_async_ext.report import FailedNode
from tests.conftest import MakeNodes
from tests.fault_proxy import FaultProxy
from tests.faults import First, Held, LoseAnswer, Nth, rate_limit
from tests.waiting import until

DIM = 8
WRITES = ("Insert", "Upsert")
QUICK = RetryPolicy(initial_backoff_seconds=0.001, max_backoff_seconds=0.01, deadline_seconds=20)


@pytest.fixture
def store(proxy: FaultProxy, collection_name: str) -> Iterator[AsyncMilvusVectorStore]:
    with AsyncMilvusVectorStore(uri=proxy.uri, collection_name=collection_name, dim=DIM, retry=QUICK) as store:
        proxy.clear()
        yield store


@pytest.fixture
def events() -> Iterator[list[MilvusWriteEvent]]:
    told: list[MilvusWriteEvent] = []

    class Handler(BaseEventHandler):
        def handle(self, event: Any, **kwargs: Any) -> None:
            if isinstance(event, MilvusWriteEvent):
                told.append(event)

    dispatcher, handler = get_dispatcher("root"), Handler()
    dispatcher.add_event_handler(handler)
    yield told
    dispatcher.event_handlers.remove(handler)


def failed(name: str, attempts: int) -> FailedNode:
    return FailedNode(TextNode(id_=name), StatusFailure(8, "rate limit"), attempts, True)


def test_a_report_of_parts_is_all_of_them_in_their_order() -> None:
    parts = [
        WriteReport(["a", "b"], [failed("c", 1)], [], retries=2, elapsed_seconds=5.0),
        WriteReport(["d"], [], [failed("e", 4)], retries=0, elapsed_seconds=7.0),
        WriteReport([], [failed("f", 2)], [failed("g", 3), failed("h", 1)], retries=3, elapsed_seconds=1.0),
    ]
    merged = WriteReport.merged(iter(parts), elapsed_seconds=8.0)
    assert merged.written == ["a", "b", "d"]
    assert [(f.node.node_id, f.attempts) for f in merged.failed] == [("c", 1), ("f", 2)]
    assert [(f.node.node_id, f.attempts) for f in merged.unknown] == [("e", 4), ("g", 3), ("h", 1)]
    assert (merged.retries, merged.elapsed_seconds, merged.ok) == (5, 8.0, False)
    assert parts[0].written == ["a", "b"] and len(parts[0].failed) == 1, "the parts are left alone"
    nothing = WriteReport.merged([], elapsed_seconds=0.5)
    assert nothing.ok and (nothing.written, nothing.retries, nothing.elapsed_seconds) == ([], 0, 0.5)


def test_the_embedding_models_error_takes_the_place_of_the_stores_and_of_nothing_else() -> None:
    without, rejected = failed("a", 0), failed("b", 2)
    report = WriteReport(["c"], [without, rejected], [failed("d", 1)], retries=3, elapsed_seconds=2.0)
    error = RuntimeError("out of memory")
    mended = explained(report, {id(f.node): error for f in (without, rejected)})
    assert mended.failed == [FailedNode(without.node, error, 0, True), rejected]
    assert replace(mended, failed=report.failed) == report
    assert explained(report, {}) is report


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_writers_report_has_the_retries_of_all_its_parts(
    store: AsyncMilvusVectorStore,
    proxy: FaultProxy,
    make_nodes: MakeNodes,
    events: list[MilvusWriteEvent],
    monkeypatch: pytest.MonkeyPatch,
    is_async: bool,
) -> None:
    monkeypatch.setattr(embed_and_write, "_NODES_PER_PART", 10)
    store.batch_size = 10
    rejected = proxy.script(rate_limit(), method=WRITES, on=lambda number: number in (1, 2, 4, 6))
    writer = AsyncMilvusWriter(vector_store=store, show_progress=True)
    nodes = make_nodes(30, dim=DIM)
    await writer.acall(nodes) if is_async else writer(nodes)
    report = writer.last_report
    assert report is not None and report.written == [node.node_id for node in nodes]
    assert rejected.struck == 4 and len(events) == 3
    assert sum(event.retries > 0 for event in events) >= 2, "of more than one part"
    assert report.retries == sum(event.retries for event in events) >= 4


async def test_a_failed_writers_report_keeps_the_attempts_at_each_node(
    store: AsyncMilvusVectorStore, proxy: FaultProxy, make_nodes: MakeNodes, events: list[MilvusWriteEvent]
) -> None:
    store.retry = RetryPolicy(max_attempts=3, initial_backoff_seconds=0.001, max_backoff_seconds=0.01)
    nodes = make_nodes(4, dim=DIM)
    nodes[1].embedding = [1.0]
    proxy.script(rate_limit(), method=WRITES, on=Nth(1))  # no attempt that counts, but one that the nodes were in
    proxy.script(LoseAnswer(), method=WRITES)
    writer = AsyncMilvusWriter(vector_store=store, on_failure="collect")
    await writer.acall(nodes)
    report = writer.last_report
    assert report is not None
    assert [(f.node, f.attempts) for f in report.failed] == [(nodes[1], 0)]
    assert [(f.node, f.attempts) for f in report.unknown] == [(node, 4) for node in (nodes[0], *nodes[2:])]
    assert report.retries == 3
    assert [(event.written, event.failed, event.unknown, event.retries) for event in events] == [(0, 1, 3, 3)]


async def test_each_of_the_callers_of_a_shared_request_hears_of_its_retries(
    store: AsyncMilvusVectorStore, proxy: FaultProxy, make_nodes: MakeNodes, held: Held
) -> None:
    proxy.script(held, method=WRITES, on=Nth(1))
    first = asyncio.create_task(store.awrite(make_nodes(1, dim=DIM)))
    await until(lambda: proxy.in_flight("Upsert") == 1)
    proxy.script(rate_limit(), method=WRITES, on=First(2))
    writing = [asyncio.create_task(store.awrite(make_nodes(count, dim=DIM))) for count in (1, 2, 3)]
    await until(lambda: store.statistics().waiting == 6)
    held.let_go()
    reports = await asyncio.gather(first, *writing)
    assert [record.rows for record in proxy.requests_of("Upsert")] == [1, 6, 6, 6]
    assert [(len(report.written), report.retries) for report in reports] == [(1, 0), (1, 2), (2, 2), (3, 2)]
