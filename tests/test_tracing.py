"""A trace shows each caller its own requests, under its own span; without a listener there is none."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Iterator
from typing import Any, NoReturn

import pytest
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import Document, TextNode
from llama_index.core.vector_stores.types import VectorStoreQuery
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.event_handlers import BaseEventHandler
from llama_index_instrumentation.span import SimpleSpan, active_span_id
from llama_index_instrumentation.span_handlers import SimpleSpanHandler
from pymilvus import MilvusClient, MilvusException

from llama_index_milvus_async_ext import (
    AsyncMilvusRetriever,
    AsyncMilvusVectorStore,
    AsyncMilvusWriter,
    RetryPolicy,
    aingest,
)
from llama_index_milvus_async_ext._lane import carrier
from llama_index_milvus_async_ext._lane.port import LoopPort
from llama_index_milvus_async_ext._store import tracing
from llama_index_milvus_async_ext.events import (
    MilvusRetryEvent,
    MilvusSearchEvent,
    MilvusWriteBatchEvent,
    MilvusWriteEvent,
)
from tests.conftest import MakeNodes
from tests.embedding import HashEmbedding
from tests.fault_proxy import FaultProxy
from tests.faults import Held, MilvusError, Nth, Refuse, collection_not_found, rate_limit
from tests.waiting import until

DIM = 8
WRITES = ("Insert", "Upsert")
SEARCHES = ("Search",)
TOKEN = "root:sesame-4711"
QUICK = RetryPolicy(max_attempts=3, initial_backoff_seconds=0.01, max_backoff_seconds=0.01, deadline_seconds=20)
QUERY = VectorStoreQuery(query_embedding=[0.5] * DIM, similarity_top_k=2)

dispatcher = get_dispatcher(__name__)


class Events(BaseEventHandler):
    seen: list[Any]

    def handle(self, event: Any, **kwargs: Any) -> None:
        self.seen.append(event)


class Trace:
    """What LlamaIndex's handlers were told."""

    def __init__(self, spans: SimpleSpanHandler, events: Events) -> None:
        self.spans = spans
        self._events = events

    def all(self) -> dict[str, SimpleSpan]:
        return {span.id_: span for span in (*self.spans.completed_spans, *self.spans.dropped_spans)}

    def path(self, span_id: str | None) -> list[str]:
        """The names of a span's ancestors and its own, from the top."""
        names: list[str] = []
        spans = self.all()
        while span_id is not None:
            names.insert(0, span_id.partition("-")[0])
            span_id = spans[span_id].parent_id
        return names

    def events(self, kind: type[Any]) -> list[Any]:
        return [event for event in self._events.seen if isinstance(event, kind)]

    def dropped(self) -> list[str]:
        return sorted(span.id_.partition("-")[0] for span in self.spans.dropped_spans)


@pytest.fixture
def trace() -> Iterator[Trace]:
    """A trace of the test; nothing is open or active at its end."""
    root = get_dispatcher()
    before = list(root.event_handlers), list(root.span_handlers)
    spans, events = SimpleSpanHandler(), Events(seen=[])
    root.add_span_handler(spans)
    root.add_event_handler(events)
    yield Trace(spans, events)
    root.event_handlers, root.span_handlers = before
    assert not spans.open_spans
    assert active_span_id.get() is None


@pytest.fixture(scope="module")
def collection_name(lite_uri: str) -> Iterator[str]:
    """One collection for all tests here."""
    name = f"tracing_{uuid.uuid4().hex}"
    with AsyncMilvusVectorStore(lite_uri, collection_name=name, dim=DIM) as store:
        store.add([TextNode(id_=f"stored-{n}", text=f"text {n}", embedding=[n / 10] * DIM) for n in range(5)])
    yield name
    with contextlib.closing(MilvusClient(lite_uri)) as client:
        client.drop_collection(name)


@pytest.fixture
def store(proxy: FaultProxy, collection_name: str) -> Iterator[AsyncMilvusVectorStore]:
    arguments: dict[str, Any] = {"dim": DIM, "consistency_level": "Strong", "retry": QUICK, "token": TOKEN}
    with AsyncMilvusVectorStore(proxy.uri, collection_name=collection_name, **arguments) as store:
        proxy.clear()
        yield store
        proxy.heal()


def engine_of(store: AsyncMilvusVectorStore) -> RetrieverQueryEngine:
    retriever = AsyncMilvusRetriever(store, embed_model=HashEmbedding(dim=DIM), similarity_top_k=2)
    return RetrieverQueryEngine.from_args(retriever, llm=MockLLM())


# --- nesting


@pytest.mark.parametrize("awaits", [True, False], ids=["async", "blocking"])
def test_a_query_engines_trace_shows_retrieve_search_and_search_request(
    store: AsyncMilvusVectorStore, trace: Trace, awaits: bool
) -> None:
    engine = engine_of(store)
    if awaits:
        asyncio.run(engine.aquery("What is text 3?"))
    else:
        engine.query("What is text 3?")
    (event,) = trace.events(MilvusSearchEvent)
    path = trace.path(event.span_id)
    assert path[-2:] == ["AsyncMilvusVectorStore.search", "Milvus.search_request"]
    retrieve = "AsyncMilvusRetriever.aretrieve" if awaits else "AsyncMilvusRetriever._retrieve"
    assert path[0].startswith("RetrieverQueryEngine.") and path[-3] == retrieve
    assert (event.collection_name, event.nq, event.own_queries, event.attempts) == (store.collection_name, 1, 1, 1)
    assert event.error_type == ""
    took = trace.all()[event.span_id].duration
    assert event.waiting_seconds >= 0 and event.sending_seconds > 0
    assert event.waiting_seconds + event.sending_seconds <= took + 0.01, "the span lasts as long as the request"


async def test_callers_who_share_requests_have_each_a_trace_of_their_own(
    proxy: FaultProxy, store: AsyncMilvusVectorStore, trace: Trace
) -> None:
    @dispatcher.span
    async def caller(number: int) -> tuple[int, str | None]:
        mine = active_span_id.get()
        await store.aquery(QUERY)
        assert active_span_id.get() == mine
        return number, mine

    callers = await asyncio.gather(*map(caller, range(64)))
    events = trace.events(MilvusSearchEvent)
    spans = trace.all()
    parents = [spans[spans[event.span_id].parent_id].parent_id for event in events]
    assert sorted(parents) == sorted(mine for _, mine in callers), "one each, under its own caller"
    assert sum(event.own_queries for event in events) == 64
    sizes = [record.rows for record in proxy.requests_of(*SEARCHES)]
    assert max(sizes) > 1, "they shared requests"
    assert sorted(event.nq for event in events) == sorted(size for size in sizes for _ in range(size or 0))


async def test_a_call_of_many_requests_has_an_event_for_each(
    proxy: FaultProxy, store: AsyncMilvusVectorStore, trace: Trace
) -> None:
    store.max_batch_queries = 4
    await store.aquery_many([QUERY] * 10)
    events = trace.events(MilvusSearchEvent)
    assert sorted(event.nq for event in events) == sorted(record.rows for record in proxy.requests_of(*SEARCHES))
    assert len(events) >= 3 and sum(event.own_queries for event in events) == 10
    assert len({event.span_id for event in events}) == 1, "in one span, as they are out at the same time"


async def test_a_writes_trace_shows_its_batches(
    store: AsyncMilvusVectorStore, trace: Trace, make_nodes: MakeNodes
) -> None:
    store.batch_size = 10
    await store.awrite(make_nodes(25, dim=DIM))
    events = trace.events(MilvusWriteBatchEvent)
    assert sum(event.own_rows for event in events) == 25 and len(events) >= 3
    assert all(event.rows <= 10 and event.row_bytes > 0 and event.attempts == 1 for event in events)
    assert {tuple(trace.path(event.span_id)) for event in events} == {
        ("AsyncMilvusVectorStore.write", "Milvus.write_request")
    }
    (whole,) = trace.events(MilvusWriteEvent)
    assert trace.path(whole.span_id) == ["AsyncMilvusVectorStore.write"]


@pytest.mark.parametrize("awaits", [True, False], ids=["async", "blocking"])
def test_a_pipelines_trace_shows_the_writers_batches(store: AsyncMilvusVectorStore, trace: Trace, awaits: bool) -> None:
    pipeline = IngestionPipeline(transformations=[AsyncMilvusWriter(store, embed_model=HashEmbedding(dim=DIM))])
    nodes = [TextNode(text=f"part {number}") for number in range(5)]
    if awaits:
        asyncio.run(pipeline.arun(nodes=nodes))
    else:
        pipeline.run(nodes=nodes)
    events = trace.events(MilvusWriteBatchEvent)
    assert sum(event.own_rows for event in events) == 5
    writer = "AsyncMilvusWriter.acall" if awaits else "AsyncMilvusWriter.__call__"
    assert all(trace.path(event.span_id)[-2:] == [writer, "Milvus.write_request"] for event in events)


async def test_an_ingestions_trace_shows_its_batches(store: AsyncMilvusVectorStore, trace: Trace) -> None:
    pipeline = IngestionPipeline(transformations=[HashEmbedding(dim=DIM)], vector_store=store)
    await aingest(pipeline, [Document(id_=f"traced-{number}", text=f"part {number}") for number in range(5)])
    events = trace.events(MilvusWriteBatchEvent)
    assert sum(event.own_rows for event in events) == 5
    assert {tuple(trace.path(event.span_id)) for event in events} == {("aingest", "Milvus.write_request")}


async def test_other_calls_have_spans_too(store: AsyncMilvusVectorStore, trace: Trace) -> None:
    await store.adelete("no such document")
    await asyncio.to_thread(store.get_nodes, ["stored-1"])
    names = [span.id_.partition("-")[0] for span in trace.spans.completed_spans]
    calls = ["delete_documents", "get_nodes"]
    assert names == [name for call in calls for name in ("Milvus.call", f"AsyncMilvusVectorStore.{call}")]


# --- what goes wrong


async def test_a_cancelled_search_drops_its_spans_and_nobody_elses(
    proxy: FaultProxy, store: AsyncMilvusVectorStore, trace: Trace, held: Held
) -> None:
    proxy.script(held, method=SEARCHES)
    first, second = asyncio.create_task(store.aquery(QUERY)), asyncio.create_task(store.aquery(QUERY))
    await until(lambda: len(proxy.requests_of(*SEARCHES)) > 0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert trace.dropped() == ["AsyncMilvusVectorStore.search", "Milvus.search_request"]
    assert not trace.events(MilvusSearchEvent)
    held.let_go()
    await second
    (event,) = trace.events(MilvusSearchEvent)
    assert (event.nq, event.own_queries) == (2, 1)
    assert len(trace.spans.completed_spans) == 2 and len(trace.spans.dropped_spans) == 2


async def test_a_cancelled_write_tells_of_the_batches_that_had_ended(
    proxy: FaultProxy, store: AsyncMilvusVectorStore, trace: Trace, held: Held, make_nodes: MakeNodes
) -> None:
    store.batch_size = 10
    proxy.script(held, method=WRITES, on=Nth(2))
    writing = asyncio.create_task(store.awrite(make_nodes(20, dim=DIM)))
    await until(lambda: len(proxy.requests_of(*WRITES)) == 2)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    held.let_go()
    assert [event.own_rows for event in trace.events(MilvusWriteBatchEvent)] == [10]
    (whole,) = trace.events(MilvusWriteEvent)
    assert (whole.written, whole.unknown) == (10, 10)
    assert trace.dropped() == ["AsyncMilvusVectorStore.write", "Milvus.write_request"]


def test_a_failed_search_shows_its_error(proxy: FaultProxy, store: AsyncMilvusVectorStore, trace: Trace) -> None:
    proxy.script(collection_not_found(), method=SEARCHES)
    with pytest.raises(MilvusException):
        store.query(QUERY)
    (event,) = trace.events(MilvusSearchEvent)
    assert event.error_type == "StatusFailure" and event.attempts == 1
    assert trace.dropped() == ["AsyncMilvusVectorStore.search"]
    assert "collection not found" in (trace.spans.dropped_spans[0].metadata or {})["error"]


async def test_a_coroutine_that_nobody_awaits_any_more_leaves_no_span_open(
    proxy: FaultProxy, store: AsyncMilvusVectorStore, trace: Trace, held: Held
) -> None:
    proxy.script(held, method=SEARCHES)
    asking = store.aquery(QUERY)
    asking.send(None)
    await until(lambda: len(proxy.requests_of(*SEARCHES)) > 0)
    await asyncio.to_thread(asking.close)  # in another context, as the garbage collector does it
    active_span_id.set(None)  # the context in which it was begun is this test's, and was not asked
    assert trace.dropped() == ["AsyncMilvusVectorStore.search", "Milvus.search_request"]


async def test_retries_are_told_with_their_cause_and_their_pause(
    proxy: FaultProxy, store: AsyncMilvusVectorStore, trace: Trace, make_nodes: MakeNodes
) -> None:
    proxy.script(Refuse(), method=SEARCHES, on=Nth(1))
    proxy.script(rate_limit(), method=WRITES, on=Nth(1))
    await store.aquery(QUERY)
    await store.awrite(make_nodes(3, dim=DIM))
    search, write = trace.events(MilvusRetryEvent)
    assert (search.request, search.attempt, search.code, search.grpc_status) == ("search_request", 1, 2, "UNAVAILABLE")
    assert (write.request, write.attempt, write.code, write.grpc_status) == ("write_request", 1, 8, "")
    assert (search.error_type, write.error_type) == ("RpcFailure", "StatusFailure")
    assert 0 <= search.backoff_seconds <= 0.01 and 0 <= write.backoff_seconds <= 0.01
    (answered,), (acknowledged,) = trace.events(MilvusSearchEvent), trace.events(MilvusWriteBatchEvent)
    assert (answered.attempts, acknowledged.attempts) == (2, 2)
    assert answered.error_type == acknowledged.error_type == ""
    assert search.span_id == answered.span_id and write.span_id == acknowledged.span_id


async def test_a_batch_that_is_halved_has_an_event_for_each_part(
    proxy: FaultProxy, store: AsyncMilvusVectorStore, trace: Trace, make_nodes: MakeNodes
) -> None:
    proxy.script(MilvusError(1100, "row secret-row is bad"), method=WRITES, on=Nth(1))
    report = await store.awrite(make_nodes(8, dim=DIM))
    assert report.ok
    events = trace.events(MilvusWriteBatchEvent)
    assert [(event.rows, event.error_type) for event in events] == [(8, "StatusFailure"), (4, ""), (4, "")]
    assert "secret-row" not in str([event.model_dump() for event in events])


# --- who listens


async def test_when_nobody_listens_nothing_is_made_and_nothing_is_noted(
    store: AsyncMilvusVectorStore, monkeypatch: pytest.MonkeyPatch, make_nodes: MakeNodes
) -> None:
    def unwanted(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("nobody listens")

    assert not tracing.is_listened_to()
    port = LoopPort.current()
    assert tracing.traced(port, "any") is port
    monkeypatch.setattr(tracing.TracedPort, "__init__", unwanted)
    monkeypatch.setattr(tracing, "span", unwanted)
    monkeypatch.setattr(carrier, "note_end", unwanted)
    assert (await store.aquery(QUERY)).ids
    assert (await store.awrite(make_nodes(3, dim=DIM))).ok


@pytest.mark.parametrize("of", ["spans", "events"])
@pytest.mark.parametrize("name", ["root", tracing.dispatcher.name])
def test_one_handler_of_either_sort_is_enough(of: str, name: str) -> None:
    listening = get_dispatcher(name)
    before = list(listening.event_handlers), list(listening.span_handlers)
    try:
        if of == "spans":
            listening.add_span_handler(SimpleSpanHandler())
        else:
            listening.add_event_handler(Events(seen=[]))
        assert tracing.is_listened_to()
    finally:
        listening.event_handlers, listening.span_handlers = before
    assert not tracing.is_listened_to()


# --- OpenTelemetry


async def test_opentelemetry_exports_the_whole_trace_and_no_secret(
    proxy: FaultProxy, store: AsyncMilvusVectorStore, trace: Trace, make_nodes: MakeNodes
) -> None:
    otel = pytest.importorskip("llama_index.observability.otel", exc_type=ImportError)
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    otel.LlamaIndexOpenTelemetry(span_exporter=exporter, span_processor="simple").start_registering()  # `trace` ends it
    proxy.script(Refuse(), method=SEARCHES, on=Nth(1))
    engine = engine_of(store)
    await asyncio.gather(*(engine.aquery(f"What is text {number}?") for number in range(8)))
    await store.awrite([*make_nodes(3, dim=DIM), TextNode(text="my diary", embedding=[0.1] * DIM)])
    spans = exporter.get_finished_spans()
    by_id = {span.context.span_id: span for span in spans}

    def path(span: Any) -> list[str]:
        return [*(path(by_id[span.parent.span_id]) if span.parent is not None else []), span.name]

    requests = [span for span in spans if span.name == "Milvus.search_request"]
    assert len(requests) == 8
    assert len({span.context.trace_id for span in requests}) == 8, "each in a trace of its own"
    for span in requests:
        assert path(span)[-3:-1] == ["AsyncMilvusRetriever.aretrieve", "AsyncMilvusVectorStore.search"]
        told = {event.name: dict(event.attributes or {}) for event in span.events}
        searched = told["MilvusSearchEvent"]
        assert searched["own_queries"] == 1 and searched["nq"] >= 1 and searched["attempts"] >= 1
        assert {"waiting_seconds", "sending_seconds"} <= searched.keys()
    retried = [event for span in requests for event in span.events if event.name == "MilvusRetryEvent"]
    assert retried and all(event.attributes["grpc_status"] == "UNAVAILABLE" for event in retried)
    (write,) = [span for span in spans if span.name == "Milvus.write_request"]
    assert path(write) == ["AsyncMilvusVectorStore.write", "Milvus.write_request"]
    ours = [span for span in spans if span.name.startswith(("Milvus.", "AsyncMilvusVectorStore."))]
    assert "sesame" not in str([span.to_json() for span in spans])
    assert "diary" not in str([span.to_json() for span in ours])


# --- the guide
