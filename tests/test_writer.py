"""The writer in pipelines: sync and async, cached, embedding while writing, and what it says of failures."""

from __future__ import annotations

import asyncio
import copy
import io
import json
import pickle
import threading
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr
from typing import Any

import pytest
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.ingestion import IngestionCache, IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import BaseNode, Document, MetadataMode, TextNode
from llama_index.vector_stores.milvus import MilvusVectorStore
from llama_index.vector_stores.milvus.utils import BaseSparseEmbeddingFunction
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.event_handlers import BaseEventHandler

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, AsyncMilvusWriter, WriteError, WriteReport
from llama_index_milvus_async_ext._lane.thread import IoThread
from llama_index_milvus_async_ext.events import MilvusWriteEvent
from tests.conftest import Backend, MakeNodes
from tests.corpus import documents
from tests.embedding import HashEmbedding
from tests.fault_proxy import FaultProxy
from tests.faults import Held, Nth
from tests.waiting import blocked_until, run_at_once, until

DIM = 32


@pytest.fixture
def store(backend: Backend, collection_name: str) -> Any:
    with AsyncMilvusVectorStore(
        uri=backend.uri, collection_name=collection_name, dim=DIM, consistency_level="Strong"
    ) as store:
        yield store


def stored(store: AsyncMilvusVectorStore, nodes: list[BaseNode]) -> set[str]:
    return {node.node_id for node in store.get_nodes(node_ids=[node.node_id for node in nodes])}


def pipeline_for(store: MilvusVectorStore, **options: Any) -> IngestionPipeline:
    splitter = SentenceSplitter(chunk_size=256, chunk_overlap=0)
    return IngestionPipeline(
        transformations=[splitter, HashEmbedding(dim=DIM), AsyncMilvusWriter(vector_store=store, **options)]
    )


async def arun(pipeline: IngestionPipeline, **options: Any) -> Any:
    return await pipeline.arun(**options)


def run_in_loop(pipeline: IngestionPipeline, **options: Any) -> Any:
    return asyncio.run(arun(pipeline, **options))


def run_inside_a_running_loop(pipeline: IngestionPipeline, **options: Any) -> Any:
    async def cell() -> Any:
        return pipeline.run(**options)  # as a notebook does, without nest_asyncio

    return asyncio.run(cell())


@pytest.mark.parametrize("run", [IngestionPipeline.run, run_in_loop, run_inside_a_running_loop])
def test_a_pipeline_stores_what_it_returns_in_every_run(store: AsyncMilvusVectorStore, run: Callable[..., Any]) -> None:
    pipeline = pipeline_for(store)
    first = list(run(pipeline, documents=documents(limit=3, min_chars=2_000)))
    assert first and stored(store, first) == {node.node_id for node in first}
    assert all(isinstance(node, TextNode) and node.embedding is not None for node in first)
    store.delete_nodes(node_ids=[node.node_id for node in first])
    second = list(run(pipeline, documents=documents(limit=3, min_chars=2_000)))
    assert stored(store, second) == {node.node_id for node in second}, "written again, past the cache"


def test_a_second_run_returns_its_own_nodes_past_the_cache(
    store: AsyncMilvusVectorStore, make_nodes: MakeNodes
) -> None:
    pipeline = IngestionPipeline(transformations=[AsyncMilvusWriter(vector_store=store)], cache=IngestionCache())
    first, second = make_nodes(5, dim=DIM, seed=1), make_nodes(5, dim=DIM, seed=1)  # same text, other ids
    assert pipeline.run(nodes=first) == first
    assert [n.node_id for n in pipeline.run(nodes=second)] == [n.node_id for n in second]
    assert len(stored(store, [*first, *second])) == 10


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("blocking", [True, False])
def test_embedding_overlaps_writing_and_keeps_order(
    store: AsyncMilvusVectorStore, make_nodes: MakeNodes, is_async: bool, blocking: bool
) -> None:
    model = HashEmbedding(dim=DIM, seconds_per_text=0.002, blocking=blocking, embed_batch_size=10)
    nodes = make_nodes(200, dim=DIM)
    given = {node.node_id: list(node.embedding or []) for node in nodes[::3]}
    for index, node in enumerate(nodes):
        if index % 3:
            node.embedding = None
    writer = AsyncMilvusWriter(vector_store=store, embed_model=model)
    before = store.statistics().requests
    returned = asyncio.run(writer.acall(nodes)) if is_async else writer(nodes)
    assert list(returned) == nodes
    assert model.texts == sum(1 for index in range(200) if index % 3), "only what had no embedding is embedded"
    for index, node in enumerate(nodes):
        expected = given[node.node_id] if index % 3 == 0 else model.vector(node.get_content(MetadataMode.EMBED))
        assert node.embedding == expected
    assert stored(store, nodes) == {node.node_id for node in nodes}
    assert store.statistics().requests - before >= 3, "writing began before the embedding was done"
    assert writer.last_report is not None and len(writer.last_report.written) == 200


@pytest.mark.parametrize(("num_workers", "peak"), [(None, 4), (1, 1), (3, 3)])
async def test_a_model_that_gives_way_has_always_work_but_never_too_much(
    store: AsyncMilvusVectorStore, make_nodes: MakeNodes, num_workers: int | None, peak: int
) -> None:
    now, most, idle_moments = 0, 0, 0
    turn = asyncio.Lock()

    class OneAfterTheOther(HashEmbedding):
        async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
            nonlocal now, most, idle_moments
            idle_moments += now == 0
            now += 1
            most = max(most, now)
            async with turn:
                await asyncio.sleep(0.01)
            now -= 1
            return self._embed(texts)

    nodes = make_nodes(120, dim=DIM)
    for node in nodes:
        node.embedding = None
    model = OneAfterTheOther(dim=DIM, embed_batch_size=10, num_workers=num_workers)
    writer = AsyncMilvusWriter(vector_store=store, embed_model=model)
    assert await writer.acall(nodes) == nodes
    assert stored(store, nodes) == {node.node_id for node in nodes}
    assert most == peak
    if num_workers is None:
        assert idle_moments == 1, "the next part is with the model before the one before it is done"


async def test_a_write_that_is_cancelled_while_it_embeds_leaves_nothing_running(
    store: AsyncMilvusVectorStore, make_nodes: MakeNodes
) -> None:
    nodes = make_nodes(100, dim=DIM)
    for node in nodes:
        node.embedding = None

    class Stuck(HashEmbedding):
        """Answers for the first two parts, of two batches each."""

        async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
            embeddings = self._embed(texts)
            if self.calls > 4:
                await asyncio.Event().wait()
            return embeddings

    model = Stuck(dim=DIM, embed_batch_size=10)
    rows_before = store.statistics().rows
    writer = AsyncMilvusWriter(vector_store=store, embed_model=model)
    writing = asyncio.create_task(writer.acall(nodes))
    await until(lambda: model.calls == 8 and store.statistics().rows > rows_before)
    await until(lambda: store.statistics().in_flight == 0)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert asyncio.all_tasks() == {asyncio.current_task()}
    report = writer.last_report
    assert report is not None
    reported = [*report.written, *(f.node.node_id for f in (*report.failed, *report.unknown))]
    assert Counter(reported) == Counter(node.node_id for node in nodes)
    assert report.written[:20] == [node.node_id for node in nodes[:20]]
    assert set(report.written) <= stored(store, nodes)


@pytest.mark.parametrize("is_async", [False, True])
def test_failures_are_raised_or_collected(store: AsyncMilvusVectorStore, make_nodes: MakeNodes, is_async: bool) -> None:
    nodes = make_nodes(20, dim=DIM)
    nodes[3].embedding, nodes[9].text = [0.1], "x" * 70_000

    def call(writer: AsyncMilvusWriter) -> Any:
        return asyncio.run(writer.acall(nodes)) if is_async else writer(nodes)

    with pytest.raises(WriteError) as raised:
        call(AsyncMilvusWriter(vector_store=store))
    assert [f.node for f in raised.value.report.failed] == [nodes[3], nodes[9]]
    assert len(stored(store, nodes)) == 18, "all that can be written is written first"
    collecting = AsyncMilvusWriter(vector_store=store, on_failure="collect")
    assert call(collecting) == nodes
    assert collecting.last_report is not None
    assert [f.node for f in collecting.last_report.failed] == [nodes[3], nodes[9]]


class WithoutAsync(BaseEmbedding):
    """A model as many are written: with the blocking methods only."""

    _batches: list[tuple[int, str]] = PrivateAttr(default_factory=list)

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        self._batches.append((len(texts), threading.current_thread().name))
        return [[1.0] * DIM for _ in texts]

    def _get_text_embedding(self, text: str) -> list[float]:
        raise AssertionError("text by text")

    _get_query_embedding = _get_text_embedding

    async def _aget_query_embedding(self, query: str) -> list[float]:
        raise NotImplementedError


async def test_a_model_without_async_methods_gets_batches_and_leaves_the_loop_free(
    store: AsyncMilvusVectorStore, make_nodes: MakeNodes
) -> None:
    nodes = make_nodes(25, dim=DIM)
    for node in nodes:
        node.embedding = None
    model = WithoutAsync(embed_batch_size=10)
    await AsyncMilvusWriter(store, embed_model=model).acall(nodes)
    assert [size for size, _ in model._batches] == [10, 10, 5]
    assert threading.current_thread().name not in {name for _, name in model._batches}
    assert stored(store, nodes) == {node.node_id for node in nodes}


class HalfBrokenEmbedding(HashEmbedding):
    def _embed(self, texts: list[str]) -> list[list[float]]:
        if any("broken" in text for text in texts):
            raise RuntimeError("the model choked")
        return super()._embed(texts)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_text_that_the_model_refuses_fails_alone(
    store: AsyncMilvusVectorStore, make_nodes: MakeNodes, is_async: bool
) -> None:
    nodes = make_nodes(30, dim=DIM)
    for node in nodes:
        node.embedding = None
    nodes[25].text = "broken"
    model = HalfBrokenEmbedding(dim=DIM, embed_batch_size=10, num_workers=1)
    writer = AsyncMilvusWriter(vector_store=store, embed_model=model, on_failure="collect")
    if is_async:
        asyncio.run(writer.acall(nodes))
    else:
        writer(nodes)
    report = writer.last_report
    assert report is not None
    assert [f.node for f in report.failed] == [nodes[25]]
    assert all("choked" in str(f.error) and f.retryable for f in report.failed)
    assert len(report.written) == 29


def documents_of(store: AsyncMilvusVectorStore, *document_ids: str) -> dict[str, list[str]]:
    """The ids of the nodes that the collection holds of documents."""
    found: dict[str, list[str]] = {document_id: [] for document_id in document_ids}
    expression = f"doc_id in {json.dumps(document_ids)}"
    rows = store.client.query(
        store.collection_name, filter=expression, output_fields=["id", "doc_id"], consistency_level="Strong"
    )
    for row in rows:
        found[row["doc_id"]].append(row["id"])
    return {document_id: sorted(ids) for document_id, ids in found.items()}


@pytest.mark.parametrize("run", [IngestionPipeline.run, run_in_loop])
def test_with_replace_documents_no_chunk_of_an_earlier_version_stays(
    store: AsyncMilvusVectorStore, run: Callable[..., Any]
) -> None:
    changed, other = uuid.uuid4().hex, uuid.uuid4().hex
    model = HashEmbedding(dim=DIM)
    writer = AsyncMilvusWriter(store, embed_model=model, replace_documents=True)
    pipeline = IngestionPipeline(transformations=[SentenceSplitter(chunk_size=20, chunk_overlap=0), writer])
    text = " ".join(f"Sentence number {number} of this text." for number in range(20))
    first = run(pipeline, documents=[Document(text=text, id_=changed), Document(text=text, id_=other)])
    second = run(pipeline, documents=[Document(text=text[:60], id_=changed)])
    assert len(second) < len(first) / 2
    assert documents_of(store, changed, other) == {
        changed: sorted(node.node_id for node in second),
        other: sorted(node.node_id for node in first if node.ref_doc_id == other),
    }


@pytest.mark.parametrize("is_async", [False, True])
def test_what_is_written_again_and_what_could_not_be_replaced_stay(
    store: AsyncMilvusVectorStore, make_nodes: MakeNodes, is_async: bool
) -> None:
    nodes = make_nodes(30, dim=DIM)  # of three documents
    store.add(nodes)
    again = [node.model_copy() for node in nodes[5:8] + nodes[10:13]]
    again[-1].embedding = [0.5]  # of another dimension: the second document can't be replaced
    writer = AsyncMilvusWriter(store, on_failure="collect", replace_documents=True)
    if is_async:
        asyncio.run(writer.acall(again))
    else:
        writer(again)
    assert writer.last_report is not None and len(writer.last_report.failed) == 1
    one, two, three = (nodes[place].ref_doc_id or "" for place in (0, 10, 20))
    assert documents_of(store, one, two, three) == {
        one: sorted(node.node_id for node in nodes[5:8]),
        two: sorted(node.node_id for node in nodes[10:20]),
        three: sorted(node.node_id for node in nodes[20:]),
    }


async def test_a_cancelled_writer_has_ended_only_when_its_delete_has(
    proxy: FaultProxy, collection_name: str, make_nodes: MakeNodes, held: Held
) -> None:
    """Landing later, it would take what another call has written then, under the ids of a version that is back."""
    store = AsyncMilvusVectorStore(proxy.uri, collection_name=collection_name, dim=DIM, consistency_level="Strong")
    earlier, later = make_nodes(10, dim=DIM, prefix="first"), make_nodes(4, dim=DIM, prefix="second")
    for node in later:
        node.relationships = dict(earlier[0].relationships)
    store.add(earlier)
    proxy.script(held, method="Delete")
    writer = AsyncMilvusWriter(store, replace_documents=True)
    writing = asyncio.create_task(writer.acall(later))
    await until(lambda: proxy.in_flight("Delete") == 1)
    writing.cancel()
    for _ in range(50):
        await asyncio.sleep(0)
    assert not writing.done()
    held.let_go()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert writer.last_report is not None and writer.last_report.written == [node.node_id for node in later]
    store.add(earlier)
    document = earlier[0].ref_doc_id or ""
    assert documents_of(store, document)[document] == sorted(node.node_id for node in [*earlier, *later])
    store.close()


async def test_a_cancelled_write_leaves_a_report_of_every_node(
    fault_proxy: FaultProxy, collection_name: str, make_nodes: MakeNodes, held: Held
) -> None:
    store = AsyncMilvusVectorStore(
        uri=fault_proxy.uri, collection_name=collection_name, dim=DIM, consistency_level="Strong", max_concurrency=1
    )
    fault_proxy.script(held, method="Upsert", on=Nth(2))
    nodes = make_nodes(5_000, dim=DIM)
    writer = AsyncMilvusWriter(vector_store=store)
    writing = asyncio.create_task(writer.acall(nodes))
    await until(lambda: fault_proxy.counts["Upsert"] == 2)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    held.let_go()
    report = writer.last_report
    assert report is not None and report.written and report.unknown and report.failed
    reported = [*report.written, *(f.node.node_id for f in (*report.failed, *report.unknown))]
    assert sorted(reported) == sorted(node.node_id for node in nodes)
    again = await store.awrite([f.node for f in (*report.failed, *report.unknown)])
    assert len(again.written) == len(report.failed) + len(report.unknown)
    assert stored(store, nodes) == {node.node_id for node in nodes}
    await store.aclose()


def test_a_plain_store_is_taken_over(backend: Backend, collection_name: str, make_nodes: MakeNodes) -> None:
    plain = MilvusVectorStore(
        uri=backend.uri, collection_name=collection_name, dim=DIM, consistency_level="Strong", use_async_client=False
    )
    writer = AsyncMilvusWriter(vector_store=plain)
    nodes = make_nodes(5, dim=DIM)
    writer(nodes)
    writer(nodes)
    assert len(plain.get_nodes(node_ids=[node.node_id for node in nodes])) == 5
    with pytest.raises(TypeError, match="AsyncMilvusVectorStore or a MilvusVectorStore"):
        AsyncMilvusWriter(vector_store="http://localhost:19530")  # type: ignore[arg-type]
    writer.vector_store.close()


@pytest.mark.parametrize("is_async", [False, True])
def test_progress_is_shown_when_asked_for(store: AsyncMilvusVectorStore, make_nodes: MakeNodes, is_async: bool) -> None:
    for model, does in ((None, "Writing"), (HashEmbedding(dim=DIM, embed_batch_size=5), "Embedding and writing")):
        for show, expected in ((True, "25/25"), (False, "")):
            writer = AsyncMilvusWriter(vector_store=store, embed_model=model, show_progress=show)
            with redirect_stderr(io.StringIO()) as shown:
                nodes = make_nodes(25, dim=DIM)
                asyncio.run(writer.acall(nodes)) if is_async else writer(nodes)
            assert expected in shown.getvalue()
            assert shown.getvalue().lstrip("\r").startswith(f"{does} to Milvus" * show)
            assert bool(shown.getvalue()) == show


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda writer: pickle.loads(pickle.dumps(writer))])
def test_a_copied_writer_has_all_settings_of_the_first(
    lite_uri: str, collection_name: str, copied: Callable[[AsyncMilvusWriter], AsyncMilvusWriter]
) -> None:
    with AsyncMilvusVectorStore(lite_uri, collection_name=collection_name, dim=DIM, batch_size=77) as store:
        writer = AsyncMilvusWriter(store, HashEmbedding(dim=DIM), on_failure="collect", show_progress=True)
        other = copied(writer)
        with other.vector_store:
            assert (other.on_failure, other.show_progress) == ("collect", True)
            assert other.embed_model == writer.embed_model
            assert (other.vector_store.collection_name, other.vector_store.batch_size) == (collection_name, 77)


def test_nothing_to_write(store: AsyncMilvusVectorStore) -> None:
    for model in (None, HashEmbedding(dim=DIM)):
        writer = AsyncMilvusWriter(vector_store=store, embed_model=model)
        assert list(writer([])) == []
        assert asyncio.run(writer.acall([])) == []


def test_an_event_tells_of_each_write(store: AsyncMilvusVectorStore, make_nodes: MakeNodes) -> None:
    seen: list[Any] = []

    class Handler(BaseEventHandler):
        def handle(self, event: Any, **kwargs: Any) -> Any:
            if isinstance(event, MilvusWriteEvent):
                seen.append(event)

    handler = Handler()
    root = get_dispatcher()
    root.add_event_handler(handler)
    try:
        AsyncMilvusWriter(vector_store=store)(make_nodes(7, dim=DIM))
    finally:
        root.event_handlers.remove(handler)
    assert [(e.collection_name, e.written, e.failed, e.unknown) for e in seen] == [(store.collection_name, 7, 0, 0)]
    assert seen[0].model_dump()["class_name"] == "MilvusWriteEvent"


def test_no_secret_is_shown(backend: Backend, collection_name: str) -> None:
    class SecretEmbedding(HashEmbedding):
        api_key: str = "sk-s3cret"

    with AsyncMilvusVectorStore(uri=backend.uri, token="root:s3cret", collection_name=collection_name, dim=DIM) as one:
        writer = AsyncMilvusWriter(vector_store=one, embed_model=SecretEmbedding(dim=DIM))
        assert "s3cret" not in repr(writer) + str(writer) + str(writer.to_dict())


def test_each_description_differs_so_that_no_cache_holds_it(store: AsyncMilvusVectorStore) -> None:
    writer = AsyncMilvusWriter(vector_store=store)
    assert writer.to_dict() != writer.to_dict()


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(("num_workers", "batches_per_part"), [(1, 1), (None, 2)])
def test_a_slow_model_does_not_hold_writing_up(
    store: AsyncMilvusVectorStore,
    make_nodes: MakeNodes,
    is_async: bool,
    num_workers: int | None,
    batches_per_part: int,
) -> None:
    """While a blocking model works on the last part, what was embedded before is already stored."""
    nodes = make_nodes(40, dim=DIM)
    for node in nodes:
        node.embedding = None
    moments: list[int] = []

    class Watching(HashEmbedding):
        def _embed(self, texts: list[str]) -> list[list[float]]:
            before = 10 * (self.calls - self.calls % batches_per_part)
            blocked_until(lambda: store.statistics().rows - rows_before == before)
            blocked_until(lambda: store.statistics().in_flight == 0)
            answered = threading.Event()  # while others are under way, small parts are gathered
            IoThread.get().post(answered.set)
            answered.wait(5)
            moments.append(self.calls)
            return super()._embed(texts)

    model = Watching(dim=DIM, embed_batch_size=10, num_workers=num_workers)
    rows_before = store.statistics().rows
    writer = AsyncMilvusWriter(vector_store=store, embed_model=model)
    if is_async:
        asyncio.run(writer.acall(nodes))
    else:
        writer(nodes)
    assert moments == [0, 1, 2, 3], "each part but the first was worked on when all before it had been sent"


class Interrupting(BaseSparseEmbeddingFunction):
    """Ctrl-C comes while it encodes."""

    def encode_queries(self, queries: list[str]) -> list[dict[int, float]]:
        return [{1: 1.0} for _ in queries]

    def encode_documents(self, documents: list[str]) -> list[dict[int, float]]:
        raise KeyboardInterrupt


def test_what_ctrl_c_kept_from_being_sent_stands_in_the_report(
    lite_uri: str, collection_name: str, make_nodes: MakeNodes
) -> None:
    store = AsyncMilvusVectorStore(
        lite_uri,
        collection_name=collection_name,
        dim=8,
        enable_sparse=True,
        sparse_embedding_function=Interrupting(),
    )
    writer = AsyncMilvusWriter(store)
    nodes = make_nodes(5)
    with pytest.raises(KeyboardInterrupt) as interrupted:
        writer(nodes)
    report = WriteReport.of(interrupted.value)
    assert report is not None and report == writer.last_report
    assert [failed.node for failed in report.failed] == nodes
    store.close()


def test_threads_that_share_a_writer_hear_of_their_own_failures(store: AsyncMilvusVectorStore) -> None:
    writer, wrong = AsyncMilvusWriter(store), []

    def write(vector: list[float], fails: bool) -> None:
        for number in range(40):
            try:
                writer([TextNode(id_=f"shared-{fails}-{number % 3}", text="text", embedding=vector)])
                has_failed = False
            except WriteError:
                has_failed = True
            if has_failed != fails:
                wrong.append(fails)

    dim = store.dim or 0
    calls = [([0.5] * dim, False), ([0.5] * (dim + 1), True)] * 2
    run_at_once([threading.Thread(target=write, args=call) for call in calls], 1e-5)
    assert not wrong
