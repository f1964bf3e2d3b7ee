"""Code that is not ours, and what it raises: that is an error of the work it was called for, and of nothing else."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from llama_index.core.ingestion import DocstoreStrategy
from llama_index.core.schema import BaseNode, TextNode
from llama_index.core.storage.docstore import SimpleDocumentStore

from llama_index_milvus_async_ext import AsyncMilvusRetriever, AsyncMilvusVectorStore, AsyncMilvusWriter, RetryPolicy
from llama_index_milvus_async_ext._flow.awaiting import awaited
from llama_index_milvus_async_ext._nodes import sparse
from llama_index_milvus_async_ext._queries import questions
from llama_index_milvus_async_ext.ingestion import IngestionReport, aingest
from tests.embedding import HashEmbedding
from tests.fault_proxy import FaultProxy
from tests.faults import First, Refuse
from tests.ingesting import DIM, Lines, Model, counts, doc, docs, expected, held, writing_to
from tests.waiting import until

nobody_can_tell = pytest.mark.skipif(sys.version_info < (3, 11), reason="nobody can tell on Python 3.10")


class PanicError(BaseException):
    """As a library written in Rust raises it."""


NO_MERE_ERRORS = [PanicError("panicked"), SystemExit(3), GeneratorExit(), asyncio.CancelledError()]

# --- a cancellation that nobody asked for


async def of_a_pool_that_is_shut_down() -> None:
    pooled = asyncio.ensure_future(asyncio.sleep(60))
    asyncio.get_running_loop().call_soon(pooled.cancel)
    await pooled


class CancelledWithin(Model):
    """A model whose client finds a task of its own cancelled, at each text that asks for it."""

    async def _aembed(self, texts: list[str]) -> list[list[float]]:
        if any("poison" in text for text in texts):
            await of_a_pool_that_is_shut_down()
        return self._embed(texts)


class Extractor(Lines):
    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[BaseNode]:
        if any("poison" in node.get_content() for node in nodes):
            await of_a_pool_that_is_shut_down()
        return self(nodes)


class Docstore(SimpleDocumentStore):
    async def async_add_documents(self, docs: Sequence[BaseNode], *args: Any, **kwargs: Any) -> None:
        if any("poison" in node.get_content() for node in docs):
            await of_a_pool_that_is_shut_down()
        await super().async_add_documents(docs, *args, **kwargs)


class Forgetting(SimpleDocumentStore):
    async def adelete_document(self, doc_id: str, raise_error: bool = True, **kwargs: Any) -> None:
        await of_a_pool_that_is_shut_down()


class Unasked(SimpleDocumentStore):
    async def aget_all_document_hashes(self) -> dict[str, str]:
        await of_a_pool_that_is_shut_down()
        return {}


def says_so(error: BaseException) -> bool:
    return "which nobody had cancelled" in str(error) and isinstance(error.__cause__, asyncio.CancelledError)


@nobody_can_tell
@pytest.mark.parametrize(
    ("stage", "transformation", "model"), [("embed", Lines, CancelledWithin), ("transform", Extractor, Model)]
)
async def test_one_within_a_pipeline_costs_its_document_alone(
    store: AsyncMilvusVectorStore, stage: str, transformation: Callable[[], Any], model: Callable[[], Any]
) -> None:
    pipeline = writing_to(store, transformations=[transformation(), model(), AsyncMilvusWriter(store)])
    report = await aingest(pipeline, [*docs(10), doc("bad", "fine", "poison")], on_failure="collect")
    assert counts(report) == (10, 0, 0, 0, 1)
    (failed,) = report.failed
    assert (failed.document_id, failed.stage) == ("bad", stage) and says_so(failed.error)
    assert held(store) == expected(docs(10))


@nobody_can_tell
async def test_one_within_a_docstore_costs_what_it_was_not_told_of(store: AsyncMilvusVectorStore) -> None:
    options = {"docstore": Docstore(), "docstore_strategy": DocstoreStrategy.UPSERTS}
    report = await aingest(writing_to(store, **options), [doc("bad", "poison")], on_failure="collect")
    assert [(each.document_id, each.stage) for each in report.failed] == [("bad", "docstore")]
    assert says_so(report.failed[0].error)


@nobody_can_tell
async def test_one_within_a_docstore_that_is_told_of_missing_documents(store: AsyncMilvusVectorStore) -> None:
    pipeline = writing_to(store, docstore=Forgetting(), docstore_strategy=DocstoreStrategy.UPSERTS)
    await aingest(pipeline, docs(3))
    report = await aingest(pipeline, docs(2), delete_missing=True, on_failure="collect")
    assert counts(report) == (0, 0, 2, 1, 1)
    assert says_so(report.failed[0].error)


@nobody_can_tell
async def test_one_within_a_docstore_that_is_asked_first(store: AsyncMilvusVectorStore) -> None:
    pipeline = writing_to(store, docstore=Unasked(), docstore_strategy=DocstoreStrategy.UPSERTS)
    with pytest.raises(RuntimeError, match="which nobody had cancelled") as raised:
        await aingest(pipeline, docs(3))
    assert IngestionReport.of(raised.value) is not None


@nobody_can_tell
async def test_one_within_a_writers_model_costs_its_node_alone(store: AsyncMilvusVectorStore) -> None:
    writer = AsyncMilvusWriter(store, embed_model=CancelledWithin(), on_failure="collect")
    await writer.acall([TextNode(text="fine"), TextNode(text="poison")])
    report = writer.last_report
    assert report is not None and len(report.written) == 1
    (failed,) = report.failed
    assert failed.node.get_content() == "poison" and failed.retryable and says_so(failed.error)


def test_one_within_a_writers_model_that_blocks_costs_its_node_alone(store: AsyncMilvusVectorStore) -> None:
    class Blocking(Model):
        def _embed(self, texts: list[str]) -> list[list[float]]:
            if any("poison" in text for text in texts):
                raise asyncio.CancelledError  # as of a future of another loop
            return super()._embed(texts)

    writer = AsyncMilvusWriter(store, embed_model=Blocking(), on_failure="collect")
    writer([TextNode(text="fine"), TextNode(text="poison")])
    report = writer.last_report
    assert report is not None and (len(report.written), len(report.failed)) == (1, 1)


@nobody_can_tell
async def test_one_within_a_retrievers_model_is_an_error_of_its_question(store: AsyncMilvusVectorStore) -> None:
    class Asked(HashEmbedding):
        async def _aget_query_embedding(self, query: str) -> list[float]:
            if query == "poison":
                await of_a_pool_that_is_shut_down()
            return self.vector(query)

    retriever = AsyncMilvusRetriever(store, Asked(dim=DIM))
    with pytest.raises(RuntimeError, match="which nobody had cancelled"):
        await retriever.aretrieve("poison")
    with pytest.raises(RuntimeError, match="which nobody had cancelled"):
        await retriever.aretrieve_many(["fine", "poison"])


async def test_one_within_a_model_that_is_asked_by_many_is_an_error_of_its_question() -> None:
    def raise_it(texts: list[str]) -> list[list[float]]:
        if "poison" in texts:
            raise asyncio.CancelledError
        return [[1.0]] * len(texts)

    model = HashEmbedding(dim=1)
    asked = [questions.embedded(model, [each], raise_it) for each in ["fine", "poison"]]
    fine, poison = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 30)
    assert fine == [1.0]
    assert isinstance(poison, RuntimeError) and "CancelledError" in str(poison)


@nobody_can_tell
async def test_one_within_a_sparse_encoder_is_an_error_of_its_text() -> None:
    class Encoder:
        async def async_encode_documents(self, texts: list[str]) -> list[dict[int, float]]:
            if "poison" in texts:
                await of_a_pool_that_is_shut_down()
            return [{1: 1.0} for _ in texts]

    fine, poison = await sparse.of_documents(Encoder(), ["fine", "poison"], awaits=True)  # type: ignore[arg-type]
    assert fine == {1: 1.0} and says_so(poison)


@nobody_can_tell
async def test_one_within_what_is_awaited_becomes_an_error() -> None:
    with pytest.raises(RuntimeError, match="the model, which nobody had cancelled, raised") as raised:
        await awaited(of_a_pool_that_is_shut_down(), "the model")
    assert says_so(raised.value)


@pytest.mark.parametrize("error", [LookupError("mine"), KeyboardInterrupt(), StopAsyncIteration(), PanicError()])
async def test_what_others_know_how_to_deal_with_is_raised_as_it_is(error: BaseException) -> None:
    coroutine = awaited(asyncio.sleep(60), "the model")
    coroutine.send(None)
    with pytest.raises(type(error)) as raised:
        coroutine.throw(error)
    assert raised.value is error and error.__cause__ is None


async def test_a_cancellation_of_whoever_awaits_is_one() -> None:
    has_begun = asyncio.Event()

    async def begin() -> None:
        has_begun.set()
        await asyncio.sleep(60)

    task = asyncio.create_task(awaited(begin(), "the model"))
    await has_begun.wait()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


@pytest.mark.parametrize("stage", ["embed", "transform", "docstore"])
async def test_a_run_that_is_cancelled_while_it_awaits_others_is_cancelled(
    store: AsyncMilvusVectorStore, stage: str
) -> None:
    waits: list[str] = []

    async def wait(where: str) -> None:
        if where == stage:
            waits.append(where)
            await asyncio.sleep(60)

    class SlowModel(Model):
        async def _aembed(self, texts: list[str]) -> list[list[float]]:
            await wait("embed")
            return self._embed(texts)

    class Slow(Lines):
        async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[BaseNode]:
            await wait("transform")
            return self(nodes)

    class SlowDocstore(SimpleDocumentStore):
        async def async_add_documents(self, *args: Any, **kwargs: Any) -> None:
            await wait("docstore")

    steps = [Slow(), SlowModel(), AsyncMilvusWriter(store)]
    pipeline = writing_to(store, transformations=steps, docstore=SlowDocstore())
    running = asyncio.create_task(aingest(pipeline, docs(3), on_failure="collect"))
    await until(lambda: bool(waits))
    running.cancel()
    await asyncio.wait([running])
    assert running.cancelled()


# --- what is called on the I/O thread


def nodes(number: int) -> list[TextNode]:
    return [TextNode(id_=f"n{n}", text="text", embedding=[1.0] * DIM) for n in range(number)]


@pytest.mark.parametrize("error", NO_MERE_ERRORS, ids=repr)
async def test_a_node_that_raises_what_is_no_mere_error_fails_alone(
    store: AsyncMilvusVectorStore, error: BaseException
) -> None:
    class Raising(TextNode):
        def model_dump(self, **kwargs: Any) -> dict[str, Any]:
            raise error

    first, last = nodes(2)
    bad = Raising(id_="bad", text="text", embedding=[1.0] * DIM)
    report = await asyncio.wait_for(store.awrite([first, bad, last]), 30)
    assert report.written == ["n0", "n1"]
    (failed,) = report.failed
    assert failed.node is bad and not failed.retryable
    assert isinstance(failed.error, RuntimeError) and type(error).__name__ in str(failed.error)
    assert (await store.awrite(nodes(3))).ok
    assert store.statistics().in_flight == 0


@pytest.mark.parametrize("error", NO_MERE_ERRORS, ids=repr)
@pytest.mark.parametrize("hook", ["stop", "wait"])
async def test_a_hook_that_raises_what_is_no_mere_error_ends_its_own_call_only(
    proxy: FaultProxy, collection_name: str, hook: str, error: BaseException
) -> None:
    def raise_it(_: Any) -> Any:
        raise error

    options: Any = {"uri": proxy.uri, "collection_name": collection_name, "dim": DIM}
    async with (
        await AsyncMilvusVectorStore.aopen(**options, retry=RetryPolicy(**{hook: raise_it})) as store,
        await AsyncMilvusVectorStore.aopen(**options) as other,
    ):
        proxy.script(Refuse(), on=First(1), method="Upsert")
        report = await asyncio.wait_for(store.awrite(nodes(1)), 30)
        (failed,) = [*report.failed, *report.unknown]
        assert isinstance(failed.error, RuntimeError) and type(error).__name__ in str(failed.error)
        assert store.statistics().in_flight == 0
        assert (await asyncio.wait_for(other.awrite(nodes(2)), 30)).ok
        assert (await asyncio.wait_for(store.awrite(nodes(2)), 30)).ok
