"""Far more at once than the server takes: the I/O thread never is busy for long, and what is cancelled ends."""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters, VectorStoreQuery

from benchmarks.turns import cancelled_midway, cheap_nodes, measured_turns
from llama_index_milvus_async_ext import AsyncMilvusVectorStore, RetryPolicy, WriteReport
from tests.fault_proxy import FaultProxy
from tests.faults import Delay
from tests.servers import LiteServer
from tests.waiting import until

DIM = 2
# CPU time of the thread itself, without garbage collection: neither depends on what else the machine does.
LONGEST_TURN_SECONDS = 0.05


@pytest.fixture(scope="module")
def lite_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiteServer]:
    """A Milvus Lite in a process of its own: one in this process would hold Python's lock."""
    with LiteServer(tmp_path_factory.mktemp("pressure")) as server:
        yield server


@pytest.fixture
def proxy(lite_server: LiteServer) -> Iterator[FaultProxy]:
    with FaultProxy(lite_server.address) as proxy:
        yield proxy


@pytest.fixture
def store(proxy: FaultProxy) -> Iterator[AsyncMilvusVectorStore]:
    with AsyncMilvusVectorStore(
        proxy.uri, collection_name="pressure", dim=DIM, retry=RetryPolicy(deadline_seconds=60)
    ) as store:
        store.add(cheap_nodes(1, "first", DIM))
        yield store


@pytest.fixture
def frozen() -> Iterator[None]:
    """What is there by then is not looked at by the collector again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def query_of(group: str) -> VectorStoreQuery:
    filters = MetadataFilters(filters=[MetadataFilter(key="group", value=group)])
    return VectorStoreQuery(query_embedding=[0.5] * DIM, similarity_top_k=1, filters=filters)


def check(report: WriteReport, nodes: list[Any]) -> None:
    """Each node is in exactly one of the three lists, and those are in order."""
    said = Counter([*report.written, *(f.node.node_id for f in (*report.failed, *report.unknown))])
    assert said == Counter(node.node_id for node in nodes)
    places = {node.node_id: place for place, node in enumerate(nodes)}
    for ids in (report.written, *([f.node.node_id for f in part] for part in (report.failed, report.unknown))):
        assert [places[node_id] for node_id in ids] == sorted(places[node_id] for node_id in ids)


async def test_a_huge_write_leaves_the_io_thread_free_and_ends_when_it_is_cancelled(
    store: AsyncMilvusVectorStore, frozen: None
) -> None:
    nodes = cheap_nodes(60_000, "huge", DIM)
    gc.freeze()
    with measured_turns() as turns:
        writing = asyncio.create_task(cancelled_midway(store, nodes, share=0.2))
        waits = []
        for number in range(3):
            began = time.monotonic()
            await store.aquery(query_of(f"another caller {number}"))
            waits.append(time.monotonic() - began)
        assert not writing.done(), "they were answered beside the write"
        report, seconds_to_the_end = await writing
        await until(lambda: store.statistics().in_flight == 0, seconds=30)
    assert store.statistics().waiting == 0
    assert max(waits) < 5, f"searches waited {waits}"
    assert seconds_to_the_end < 5
    check(report, nodes)
    assert report.written and report.failed, "it was cancelled midway"
    assert turns.longest < LONGEST_TURN_SECONDS, f"a turn of {turns.longest * 1e3:.0f} ms"


async def test_tens_of_thousands_of_cancelled_callers_leave_nothing_behind(
    proxy: FaultProxy, store: AsyncMilvusVectorStore, frozen: None
) -> None:
    nodes = cheap_nodes(50_000, "cancelled", DIM)
    proxy.script(Delay(0.05), method=("Insert", "Upsert"))  # slower than they come
    gc.freeze()
    reports: list[tuple[Any, WriteReport | None]] = []

    async def add(node: Any) -> None:
        try:
            await store.async_add([node])
        except asyncio.CancelledError as cancelled:
            reports.append((node, WriteReport.of(cancelled)))
            raise

    with measured_turns() as turns:
        tasks = [asyncio.create_task(add(node)) for node in nodes]
        for _ in range(20):  # turns, in which some of them are sent
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await until(lambda: store.statistics().in_flight == 0, seconds=30)
    assert store.statistics().waiting == 0
    assert await store.async_add(nodes[:1]) == [nodes[0].node_id]
    assert len(reports) == sum(task.cancelled() for task in tasks)
    for node, report in reports:
        assert report is not None
        check(report, [node])
    assert turns.longest < LONGEST_TURN_SECONDS, f"a turn of {turns.longest * 1e3:.0f} ms"
