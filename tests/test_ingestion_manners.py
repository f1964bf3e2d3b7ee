"""Ingestion beside what it stores: progress, events, rate limits, secrets, cancellation, what it leaves running."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import io
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.rate_limiter import BaseRateLimiter
from llama_index.core.schema import Document
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.event_handlers import BaseEventHandler

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, AsyncMilvusWriter
from llama_index_milvus_async_ext.events import MilvusIngestionEvent
from llama_index_milvus_async_ext.ingestion import IngestionError, IngestionReport, aingest, ingest
from tests.fault_proxy import FaultProxy
from tests.faults import Held, MilvusError
from tests.ingesting import (
    DIM,
    Ingest,
    Lines,
    Model,
    both,
    counts,
    doc,
    docs,
    expected,
    held,
    writing_to,
)
from tests.waiting import beside, blocked_until, press_ctrl_c, until

# --- progress


@both
def test_a_progress_bar_shows_documents_nodes_and_failures(
    store: AsyncMilvusVectorStore, run: Ingest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # older ones cut it to the terminal's width, or what is taken for it
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        run(writing_to(store), [*docs(8), doc("b", "refused"), "a text"], show_progress=True, on_failure="collect")
    last = said.getvalue().split("\r")[-1]
    assert "Ingesting into Milvus" in last
    assert "9/10" in last, "the total of a list is known, and what is no document is none"
    assert "nodes=16" in last and "failed=2" in last and "retries=0" in last


@both
def test_a_stream_of_unknown_length_has_a_bar_without_a_total(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        run(writing_to(store), iter(docs(8)), show_progress=True)
    assert "8document" in said.getvalue().split("\r")[-1].replace(" ", "")


@both
def test_nothing_is_said_unasked(store: AsyncMilvusVectorStore, run: Ingest, capfd: pytest.CaptureFixture[str]) -> None:
    run(writing_to(store), docs(8))
    assert capfd.readouterr() == ("", "")


# --- events

context: contextvars.ContextVar[str] = contextvars.ContextVar("context", default="nobody's")


class Heard(BaseEventHandler):
    events: list[Any]
    contexts: set[str]

    def handle(self, event: Any, **kwargs: Any) -> None:
        if isinstance(event, MilvusIngestionEvent):
            self.events.append(event)
            self.contexts.add(context.get())


@pytest.fixture
def heard() -> Iterator[Heard]:
    handler = Heard(events=[], contexts=set())
    dispatcher = get_dispatcher()
    dispatcher.add_event_handler(handler)
    yield handler
    dispatcher.event_handlers.remove(handler)


@both
def test_events_add_up_to_the_report_and_are_heard_in_the_callers_context(
    store: AsyncMilvusVectorStore, heard: Heard, run: Ingest
) -> None:
    token = context.set("the caller's")
    try:
        run(writing_to(store), docs(50))
        heard.events.clear()
        bad = [doc("b", "refused"), doc("w", "unsplittable"), doc("n", "fine", "fine", large="x" * 40_000)]
        now = [*docs(100)[30:], *docs(10, version="second"), *bad]
        report = run(writing_to(store), now, delete_missing=True, on_failure="collect")
    finally:
        context.reset(token)
    assert counts(report) == (50, 10, 20, 20, 3)
    assert sum(event.documents for event in heard.events) == 80
    assert sum(event.nodes for event in heard.events) == report.nodes
    assert heard.events[-1].failed == 3
    for stage, seconds in report.stage_seconds.items():
        assert sum(event.stage_seconds.get(stage, 0.0) for event in heard.events) == pytest.approx(seconds)
    assert heard.contexts == {"the caller's"}


@both
def test_what_failed_after_it_was_written_in_part_is_in_an_event_too(
    store: AsyncMilvusVectorStore, heard: Heard, run: Ingest
) -> None:
    class Partly(Lines):
        def __call__(self, nodes: Any, **kwargs: Any) -> Any:
            made = super().__call__(nodes)
            made[-1].embedding = [float("nan")] * DIM
            return made

    pipeline = IngestionPipeline(transformations=[Partly(), AsyncMilvusWriter(store, embed_model=Model())])
    report = run(pipeline, docs(2, lines=4), on_failure="collect")
    assert (len(report.failed), report.nodes) == (2, 6)
    assert sum(event.nodes for event in heard.events) == 6
    assert heard.events[-1].failed == 2


# --- rate limits


class Counting(BaseRateLimiter):
    def __init__(self) -> None:
        self.blocking = self.awaited = 0

    def acquire(self, num_tokens: int = 0) -> None:
        self.blocking += 1

    async def async_acquire(self, num_tokens: int = 0) -> None:
        self.awaited += 1


@both
def test_the_models_rate_limiter_is_asked_before_each_of_its_calls(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    limiter = Counting()
    model = Model(rate_limiter=limiter, embed_batch_size=5)
    run(writing_to(store, model), docs(30))
    assert model.calls == limiter.blocking + limiter.awaited >= 12
    assert (limiter.awaited == 0) == (run is ingest), "and awaited where the loop is the caller's"
    in_the_writer = Model(rate_limiter=limiter, embed_batch_size=5)
    pipeline = writing_to(store, transformations=[Lines(), AsyncMilvusWriter(store, embed_model=in_the_writer)])
    before = limiter.blocking + limiter.awaited
    run(pipeline, docs(30, version="second"))
    assert in_the_writer.calls == limiter.blocking + limiter.awaited - before


# --- secrets


@both
def test_no_secret_is_in_errors_reports_or_events(
    proxy: FaultProxy, collection_name: str, heard: Heard, run: Ingest
) -> None:
    class Remote(Model):
        api_key: str = "sk-very-secret"

    with AsyncMilvusVectorStore(
        uri=proxy.uri, token="root:very-secret", collection_name=collection_name, dim=DIM
    ) as store:
        pipeline = writing_to(store, Remote())
        proxy.script(method="Upsert", fault=MilvusError(65535, "broken"))
        with pytest.raises(IngestionError) as raised:
            run(pipeline, [*docs(3), doc("b", "refused")])
        report = raised.value.report
        shown = [raised.value, report, report.failed, *heard.events, [event.model_dump() for event in heard.events]]
        with pytest.raises(ValueError, match="does not say") as other:
            run(IngestionPipeline(transformations=[Remote()]), docs(1))
        shown.append(other.value)
        assert not [each for each in shown if "secret" in f"{each!r} {each}"]
        proxy.heal()
        run(pipeline, docs(3))
        assert "secret" not in str(store.client.query(collection_name, 'id != ""', output_fields=["*"]))


# --- cancellation


class Gate:
    """A model's texts come to it, and wait until it opens."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()


class Waiting(Model):
    """Waits for a gate, once so many texts have been embedded."""

    after: int = 0
    gate: Any = None

    def _embed(self, texts: list[str]) -> list[list[float]]:
        if self.texts >= self.after:
            self.gate.reached.set()
            self.gate.open.wait(30)
        return super()._embed(texts)

    async def _aembed(self, texts: list[str]) -> list[list[float]]:
        if self.texts >= self.after:
            self.gate.reached.set()
            await until(self.gate.open.is_set, 30)
        return super()._embed(texts)


async def test_a_cancelled_run_carries_its_report_and_the_next_completes_it(store: AsyncMilvusVectorStore) -> None:
    model = Waiting(after=40, gate=Gate(), embed_batch_size=5)
    task = asyncio.create_task(aingest(writing_to(store, model), docs(100), version="1"))
    await until(model.gate.reached.is_set, 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as raised:
        await task
    carrier: BaseException | None = raised.value
    while carrier is not None and not hasattr(carrier, "report"):
        carrier = carrier.__context__  # Python 3.10 gives whoever awaits a cancelled task another error
    report = getattr(carrier, "report", None)
    assert isinstance(report, IngestionReport)
    assert report.added < 100
    assert {each.get_name() for each in asyncio.all_tasks()} == {asyncio.current_task().get_name()}  # type: ignore[union-attr]
    there = await asyncio.to_thread(held, store)
    whole = sum(there.get(each.node_id) == expected([each])[each.node_id] for each in docs(100))
    again = Model()
    after = await aingest(writing_to(store, again), docs(100), version="1")
    assert after.unchanged == whole >= report.added, "what was whole is not embedded again"
    assert again.texts == 2 * (100 - whole)
    assert await asyncio.to_thread(held, store) == expected(docs(100))


def test_ctrl_c_ends_a_blocking_run_with_its_report(store: AsyncMilvusVectorStore) -> None:
    gate = Gate()
    model = Waiting(after=40, gate=gate, embed_batch_size=5)

    def press() -> None:
        gate.reached.wait(30)
        press_ctrl_c()

    with beside(press), pytest.raises(KeyboardInterrupt) as raised:
        ingest(writing_to(store, model), docs(100))
    gate.open.set()
    assert isinstance(raised.value.report, IngestionReport)  # type: ignore[attr-defined]
    assert ingest(writing_to(store), docs(100)).ok
    assert held(store) == expected(docs(100))


async def test_a_run_that_is_cancelled_while_it_writes_leaves_nothing_double(
    proxy: FaultProxy, collection_name: str
) -> None:
    fault = Held()
    async with await AsyncMilvusVectorStore.aopen(
        uri=proxy.uri, collection_name=collection_name, dim=DIM, consistency_level="Strong"
    ) as store:
        await aingest(writing_to(store), docs(20))
        script = proxy.script(method="Upsert", fault=fault)
        task = asyncio.create_task(aingest(writing_to(store), docs(20, version="second")))
        await until(lambda: script.struck > 0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        fault.let_go()  # and some of it lands now
        proxy.heal()
        report = await aingest(writing_to(store), docs(20, version="second"))
        assert report.ok
        assert await asyncio.to_thread(held, store) == expected(docs(20, version="second"))


# --- what is left


@both
def test_a_run_leaves_no_thread_but_those_of_the_store(store: AsyncMilvusVectorStore, run: Ingest) -> None:
    run(writing_to(store), docs(2))

    def broken() -> Iterator[Document]:
        yield from docs(3)
        raise OSError("gone")

    run(writing_to(store), broken(), on_failure="collect")
    with pytest.raises(IngestionError):
        run(writing_to(store), [doc("d0", "refused")])

    def ours() -> list[str]:
        names = [each.name for each in threading.enumerate()]
        own = ("milvus-read", "milvus-embed", "milvus-transform")
        return [each for each in names if each.startswith(own) or each.endswith("-flow")]

    blocked_until(lambda: not ours())


async def test_a_source_that_blocks_does_not_block_the_loop_nor_the_run_of_another(
    store: AsyncMilvusVectorStore,
) -> None:
    may_go, is_read = threading.Event(), threading.Event()

    def slow() -> Iterator[Document]:
        yield docs(1)[0]
        is_read.set()
        may_go.wait(30)
        yield docs(2)[1]

    task = asyncio.create_task(aingest(writing_to(store), slow(), source="slow"))
    await until(is_read.is_set)
    other = await aingest(writing_to(store), [doc("other", "one")])
    assert counts(other) == (1, 0, 0, 0, 0)
    may_go.set()
    assert counts(await task) == (2, 0, 0, 0, 0)


async def test_a_cancelled_run_does_not_wait_for_a_source_that_blocks(store: AsyncMilvusVectorStore) -> None:
    may_go, is_read = threading.Event(), threading.Event()

    def stuck() -> Iterator[Document]:
        is_read.set()
        may_go.wait(30)
        yield docs(1)[0]

    task = asyncio.create_task(aingest(writing_to(store), stuck()))
    await until(is_read.is_set)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    may_go.set()


async def test_the_report_is_found_behind_the_error_of_a_time_out(store: AsyncMilvusVectorStore) -> None:
    may_go, is_written = threading.Event(), threading.Event()

    def stalling() -> Iterator[Document]:
        yield docs(1)[0]
        while not list(store.iter_nodes()):
            time.sleep(0.01)
        is_written.set()
        may_go.wait(30)

    async def with_time_out() -> None:
        running = asyncio.ensure_future(aingest(writing_to(store), stalling()))
        await until(is_written.is_set)
        await asyncio.wait_for(running, 1.0)

    with pytest.raises(asyncio.TimeoutError) as ended:
        await with_time_out()
    report = IngestionReport.of(ended.value)
    assert report is not None and report.added == 1
    may_go.set()


@both
@pytest.mark.parametrize(
    ("documents", "said"),
    [([doc("d0", "old"), *docs(3)], "more than once"), ([Document(text="a"), Document(text="b")], "random ids")],
)
def test_a_warning_that_is_made_an_error_costs_no_document(
    store: AsyncMilvusVectorStore,
    run: Ingest,
    log: pytest.LogCaptureFixture,
    documents: list[Document],
    said: str,
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = run(writing_to(store), documents, on_failure="collect", delete_missing=True)
    assert report.ok and report.documents == len(documents)
    assert len([record for record in log.records if said in record.getMessage()]) == 1
