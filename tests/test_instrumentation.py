"""Instrumentation tells each caller its own, and what listens to it, or keeps a report, is at nobody else's cost."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import uuid
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores.types import VectorStoreQuery
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.dispatcher import instrument_tags
from llama_index_instrumentation.event_handlers import BaseEventHandler
from pymilvus import MilvusClient

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, RetryPolicy, WriteReport
from llama_index_milvus_async_ext.events import MilvusWriteEvent
from tests.conftest import MakeNodes
from tests.fault_proxy import FaultProxy
from tests.faults import Fault, MilvusError, Refuse, collection_not_found

DIM = 8
WRITES = ("Insert", "Upsert")
QUICK = RetryPolicy(max_attempts=3, initial_backoff_seconds=0.01, max_backoff_seconds=0.01, deadline_seconds=20)
Listen = Callable[[Callable[[MilvusWriteEvent], None]], None]


@pytest.fixture(scope="module")
def collection_name(lite_uri: str) -> Iterator[str]:
    """One collection for all tests here, which tell their rows apart by prefix."""
    name = f"instrumentation_{uuid.uuid4().hex}"
    yield name
    with contextlib.closing(MilvusClient(lite_uri)) as client:
        client.drop_collection(name)


@pytest.fixture
def store(proxy: FaultProxy, collection_name: str) -> Iterator[AsyncMilvusVectorStore]:
    arguments = {"dim": DIM, "consistency_level": "Strong", "retry": QUICK}
    with AsyncMilvusVectorStore(proxy.uri, collection_name=collection_name, **arguments) as store:
        proxy.clear()
        yield store
        proxy.heal()


class Listener(BaseEventHandler):
    told: Callable[[MilvusWriteEvent], None]

    def handle(self, event: Any, **kwargs: Any) -> None:
        if isinstance(event, MilvusWriteEvent):
            self.told(event)


@pytest.fixture
def listen() -> Iterator[Listen]:
    """Call it with a function to have that told of each write's event."""
    dispatcher = get_dispatcher()
    before = list(dispatcher.event_handlers)
    yield lambda told: dispatcher.add_event_handler(Listener(told=told))
    dispatcher.event_handlers = before


# --- events


def test_each_event_of_concurrent_blocking_writes_has_its_own_callers_tags(
    store: AsyncMilvusVectorStore, make_nodes: MakeNodes, listen: Listen
) -> None:
    events: list[tuple[int, dict[str, Any]]] = []
    listen(lambda event: events.append((event.written, dict(event.tags))))
    # Each caller writes as many nodes at once as its number says.
    batches = {caller: [make_nodes(caller, dim=DIM) for _ in range(20)] for caller in (1, 2, 3)}
    begin = threading.Barrier(3)

    def write(caller: int) -> None:
        with instrument_tags({"caller": caller}):
            begin.wait(20)
            for batch in batches[caller]:
                store.add(batch)

    threads = [threading.Thread(target=write, args=(caller,)) for caller in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(written for written, _ in events) == [1] * 20 + [2] * 20 + [3] * 20
    strangers = [(written, tags) for written, tags in events if tags != {"caller": written}]
    assert not strangers, f"{len(strangers)} of 60 events have another caller's tags"


async def test_each_event_of_concurrent_writes_on_one_loop_has_its_own_callers_tags(
    store: AsyncMilvusVectorStore, make_nodes: MakeNodes, listen: Listen
) -> None:
    events: list[tuple[int, dict[str, Any]]] = []
    listen(lambda event: events.append((event.written, dict(event.tags))))

    async def write(caller: int) -> None:
        with instrument_tags({"caller": caller}):
            await store.async_add(make_nodes(caller, dim=DIM))
            await asyncio.to_thread(store.add, make_nodes(caller, dim=DIM))

    await asyncio.gather(*map(write, range(1, 11)))
    assert sorted(written for written, _ in events) == sorted([*range(1, 11), *range(1, 11)])
    assert not [event for event in events if event[1] != {"caller": event[0]}]


async def test_a_slow_event_handler_delays_nobody_elses_search(
    store: AsyncMilvusVectorStore, make_nodes: MakeNodes, listen: Listen
) -> None:
    is_in_handler, go_on = threading.Event(), threading.Event()

    def take_long(event: MilvusWriteEvent) -> None:
        is_in_handler.set()
        go_on.wait(15)

    listen(take_long)
    try:
        writing = asyncio.create_task(asyncio.to_thread(store.add, make_nodes(1, dim=DIM)))
        assert await asyncio.to_thread(is_in_handler.wait, 10)
        query = VectorStoreQuery(query_embedding=[0.5] * DIM, similarity_top_k=1)
        answer = await asyncio.wait_for(store.aquery(query), 10)
        assert len(answer.ids or []) == 1
        assert not writing.done(), "the handler has been at it all the while"
    finally:
        go_on.set()
    await writing


# --- what a kept report keeps


def raise_and_catch(report: WriteReport) -> None:
    for failed in (*report.failed, *report.unknown):
        with contextlib.suppress(Exception):
            raise failed.error


@pytest.mark.parametrize("is_raised", [False, True], ids=["kept", "raised and caught"])
@pytest.mark.parametrize(
    "fault",
    [
        collection_not_found(),
        MilvusError(1100, "bad data"),
        Refuse(grpc.StatusCode.UNAUTHENTICATED),
        Refuse(),
        Refuse(grpc.StatusCode.DEADLINE_EXCEEDED),
    ],
    ids=["permanent", "bad data", "refused token", "out of attempts", "unknown"],
)
async def test_a_kept_report_keeps_no_other_callers_nodes(
    proxy: FaultProxy, store: AsyncMilvusVectorStore, make_nodes: MakeNodes, fault: Fault, is_raised: bool
) -> None:
    proxy.script(fault, method=WRITES)
    report, strangers = await written_with_others(store, make_nodes)
    assert next(record.rows for record in proxy.requests_of(*WRITES)) == 40, "they shared a request"
    assert len(report.failed) + len(report.unknown) == 10
    if is_raised:
        raise_and_catch(report)
    await asyncio.sleep(0)  # the loop itself holds the gather's result for as long as the turn that brought it
    gc.collect()
    kept = [stranger() for stranger in strangers if stranger() is not None]
    assert not kept, f"{len(kept)} nodes of another caller are still there"
    assert report.retries >= 0, "while the report is"


async def written_with_others(
    store: AsyncMilvusVectorStore, make_nodes: MakeNodes
) -> tuple[WriteReport, list[weakref.ref[TextNode]]]:
    """A report of ten nodes, and the thirty nodes of another caller in the same request, of which nothing is kept."""
    mine, theirs = make_nodes(10, dim=DIM), make_nodes(30, dim=DIM)
    report, _ = await asyncio.gather(store.awrite(mine), store.awrite(theirs))
    return report, [weakref.ref(node) for node in theirs]
