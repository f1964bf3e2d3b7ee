"""The retriever: under query engines, in every mode, with the answers of upstream's."""

from __future__ import annotations

import asyncio
import copy
import pickle
from typing import Any

import pytest
from llama_index.core import Settings, StorageContext, VectorStoreIndex
from llama_index.core.llms.mock import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import ResponseMode
from llama_index.core.retrievers import VectorIndexRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters
from llama_index.vector_stores.milvus import MilvusVectorStore
from llama_index.vector_stores.milvus.utils import BaseSparseEmbeddingFunction, BM25BuiltInFunction
from pymilvus.grpc_gen import milvus_pb2

from llama_index_milvus_async_ext import AsyncMilvusRetriever, AsyncMilvusVectorStore
from llama_index_milvus_async_ext._milvus.connection import Connection
from tests.conftest import Backend
from tests.corpus import documents, stdlib_nodes
from tests.embedding import HashEmbedding
from tests.fault_proxy import FaultProxy
from tests.faults import Exchange

DIM = 64
MODEL = HashEmbedding(dim=DIM)
QUESTIONS = [
    "parse command line arguments",
    "open a zip file",
    "encode text as base64",
    "a heap queue",
    "asyncio event loop",
    "compare sequences and report the differences",
]


@pytest.fixture(autouse=True)
def no_llm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Query engines ask for one even where they only return sources."""
    monkeypatch.setattr(Settings, "_llm", MockLLM())


@pytest.fixture(params=["pymilvus's internals", "the public client"])
def way_to_milvus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests as they are sent, and as they would be with a pymilvus whose insides are others."""
    if request.param == "the public client":
        monkeypatch.setattr(Connection, "stub_method", lambda *_: None)
        monkeypatch.setattr(Connection, "_sender", lambda *_: None)


@pytest.fixture
def nodes() -> list[TextNode]:
    return stdlib_nodes(150, embed_model=MODEL)


@pytest.fixture
def store(backend: Backend, collection_name: str, nodes: list[TextNode]) -> Any:
    with AsyncMilvusVectorStore(
        uri=backend.uri,
        collection_name=collection_name,
        dim=DIM,
        similarity_metric="COSINE",
        consistency_level="Strong",
    ) as store:
        store.add(nodes)
        yield store


@pytest.fixture
def upstream(backend: Backend, store: AsyncMilvusVectorStore) -> VectorStoreIndex:
    plain = MilvusVectorStore(
        uri=backend.uri,
        collection_name=store.collection_name,
        dim=DIM,
        similarity_metric="COSINE",
        use_async_client=False,
    )
    return VectorStoreIndex.from_vector_store(plain, embed_model=MODEL)


def same(ours: list[NodeWithScore], theirs: list[NodeWithScore]) -> None:
    assert [n.node.model_dump() for n in ours] == [n.node.model_dump() for n in theirs]
    assert [n.score for n in ours] == pytest.approx([n.score for n in theirs], rel=1e-5)


@pytest.mark.usefixtures("way_to_milvus")
@pytest.mark.parametrize("mode", ["default", "mmr"])
def test_answers_equal_upstreams_sync_async_and_many(
    store: AsyncMilvusVectorStore, upstream: VectorStoreIndex, mode: str
) -> None:
    filters = MetadataFilters(filters=[MetadataFilter(key="file_name", value="argparse.py", operator="!=")])
    options: dict[str, Any] = {"similarity_top_k": 4, "vector_store_query_mode": mode, "filters": filters}
    ours = AsyncMilvusRetriever(store, embed_model=MODEL, **options)
    theirs = VectorIndexRetriever(upstream, **options)
    expected = [theirs.retrieve(question) for question in QUESTIONS]
    assert all(len(found) == 4 for found in expected)
    for question, reference in zip(QUESTIONS, expected, strict=True):
        same(ours.retrieve(question), reference)
    together = asyncio.run(ours.aretrieve_many(QUESTIONS))
    for found, reference in zip(together, expected, strict=True):
        same(found, reference)


def without_counts(exchange: Exchange) -> bytes:
    """An answer without hits as a server gives it; Lite says of each query that it has none."""
    answer = milvus_pb2.SearchResults.FromString(exchange.forward())
    assert not any(answer.results.topks)
    answer.results.ClearField("topks")
    serialized: bytes = answer.SerializeToString()
    return serialized


@pytest.mark.usefixtures("way_to_milvus")
@pytest.mark.parametrize("as_a_server", [False, True])
async def test_where_there_is_nothing_nothing_is_found(
    proxy: FaultProxy, collection_name: str, as_a_server: bool
) -> None:
    if as_a_server:
        proxy.script(without_counts, method="Search")
    with AsyncMilvusVectorStore(proxy.uri, collection_name=collection_name, dim=DIM) as store:
        retriever = AsyncMilvusRetriever(store, embed_model=MODEL)
        assert retriever.retrieve(QUESTIONS[0]) == []
        assert await retriever.aretrieve_many(QUESTIONS) == [[]] * len(QUESTIONS)


async def test_doc_ids_and_node_ids(store: AsyncMilvusVectorStore, nodes: list[TextNode]) -> None:
    chosen = [node.node_id for node in nodes[5:8]]
    found = await AsyncMilvusRetriever(store, MODEL, 10, node_ids=chosen).aretrieve("anything")
    assert {n.node.node_id for n in found} == set(chosen)
    document = nodes[0].ref_doc_id
    found = await AsyncMilvusRetriever(store, MODEL, 50, doc_ids=[document]).aretrieve("anything")
    assert {n.node.ref_doc_id for n in found} == {document}


def test_a_query_engine_answers_sync_and_async(store: AsyncMilvusVectorStore) -> None:
    retriever = AsyncMilvusRetriever(store, embed_model=MODEL, similarity_top_k=2)
    engine = RetrieverQueryEngine.from_args(retriever, llm=MockLLM(), response_mode=ResponseMode.NO_TEXT)
    first = engine.query(QUESTIONS[0])
    second = asyncio.run(engine.aquery(QUESTIONS[0]))
    assert len(first.source_nodes) == 2
    same(first.source_nodes, second.source_nodes)


async def test_two_hundred_questions_share_requests(store: AsyncMilvusVectorStore, nodes: list[TextNode]) -> None:
    retriever = AsyncMilvusRetriever(store, embed_model=MODEL, similarity_top_k=1)
    asked = [nodes[i % len(nodes)] for i in range(200)]
    before = store.statistics().requests
    found = await retriever.aretrieve_many([node.get_content() for node in asked])
    assert store.statistics().requests - before < 60
    assert len(found) == 200
    right = sum(hits[0].node.node_id == node.node_id for hits, node in zip(found, asked, strict=True))
    assert right >= 190, "texts that occur twice aside, each caller gets its own answer"


@pytest.mark.parametrize(("num_workers", "peak"), [(None, 8), (2, 2)])
async def test_a_model_has_as_many_questions_at_once_as_it_has_workers(
    lite_uri: str, collection_name: str, num_workers: int | None, peak: int
) -> None:
    now, most = 0, 0

    class Counting(HashEmbedding):
        async def _aget_query_embedding(self, query: str) -> list[float]:
            nonlocal now, most
            now += 1
            most = max(most, now)
            await asyncio.sleep(0)  # all that are let in come in this turn
            now -= 1
            return self.vector(query)

    with AsyncMilvusVectorStore(lite_uri, collection_name=collection_name, dim=DIM) as store:
        retriever = AsyncMilvusRetriever(store, Counting(dim=DIM, num_workers=num_workers))
        assert await retriever.aretrieve_many([f"question {number}" for number in range(20)]) == [[]] * 20
    assert most == peak


async def test_of_several_errors_the_first_questions_is_raised_when_all_have_ended(
    lite_uri: str, collection_name: str
) -> None:
    second_failed, ended = asyncio.Event(), []

    class Failing(AsyncMilvusRetriever):
        async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
            if query_bundle.query_str == "second":
                second_failed.set()
            else:
                await second_failed.wait()
                await asyncio.sleep(0)
            ended.append(query_bundle.query_str)
            raise LookupError(query_bundle.query_str)

    with AsyncMilvusVectorStore(lite_uri, collection_name=collection_name, dim=DIM) as store:
        with pytest.raises(LookupError, match="first"):
            await Failing(store, MODEL).aretrieve_many(["first", "second", "third"])
        assert sorted(ended) == ["first", "second", "third"]


async def test_an_embedding_that_is_given_is_used(store: AsyncMilvusVectorStore, nodes: list[TextNode]) -> None:
    model = HashEmbedding(dim=DIM)
    retriever = AsyncMilvusRetriever(store, embed_model=model, similarity_top_k=1)
    bundle = QueryBundle("ignored", embedding=nodes[3].embedding)
    assert (await retriever.aretrieve(bundle))[0].node.node_id == nodes[3].node_id
    assert (await retriever.aretrieve_many([bundle]))[0][0].node.node_id == nodes[3].node_id
    assert model.calls == 0


def test_the_global_model_is_the_default(store: AsyncMilvusVectorStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "_embed_model", MODEL)
    assert len(AsyncMilvusRetriever(store).retrieve(QUESTIONS[0])) == 2


def test_copies_and_descriptions(store: AsyncMilvusVectorStore) -> None:
    retriever = AsyncMilvusRetriever(store, embed_model=MODEL, similarity_top_k=3)
    expected = retriever.retrieve(QUESTIONS[0])
    for copied in (pickle.loads(pickle.dumps(retriever)), copy.deepcopy(retriever)):
        same(copied.retrieve(QUESTIONS[0]), expected)
        copied.vector_store.close()
    assert store.collection_name in repr(retriever)


def test_an_unknown_mode_is_named(store: AsyncMilvusVectorStore) -> None:
    with pytest.raises(ValueError, match="sideways"):
        AsyncMilvusRetriever(store, embed_model=MODEL, vector_store_query_mode="sideways")
    with pytest.raises(TypeError, match="MilvusVectorStore"):
        AsyncMilvusRetriever("nowhere")  # type: ignore[arg-type]


# --- sparse and hybrid: Milvus Lite has them, the 2.3.5 server does not


class WordCounts(BaseSparseEmbeddingFunction):
    """A sparse embedding that the client computes."""

    def encode_queries(self, queries: list[str]) -> list[dict[int, float]]:
        return [{hash_of(word): 1.0 for word in text.lower().split()} or {0: 1.0} for text in queries]

    def encode_documents(self, documents: list[str]) -> list[dict[int, float]]:
        return self.encode_queries(documents)


def hash_of(word: str) -> int:
    return sum(ord(letter) * 31**place for place, letter in enumerate(word[:6])) % 5_000


@pytest.fixture(params=["bm25", "client"])
def hybrid(request: pytest.FixtureRequest, lite_uri: str, collection_name: str, nodes: list[TextNode]) -> Any:
    function = BM25BuiltInFunction(function_name="bm25") if request.param == "bm25" else WordCounts()
    options: dict[str, Any] = {
        "uri": lite_uri,
        "collection_name": collection_name,
        "dim": DIM,
        "enable_sparse": True,
        "sparse_embedding_function": function,
    }
    with AsyncMilvusVectorStore(**options) as store:
        store.add(nodes)
        yield store, MilvusVectorStore(**options, use_async_client=False)


@pytest.mark.usefixtures("way_to_milvus")
@pytest.mark.parametrize("mode", ["sparse", "text_search", "hybrid", "default"])
@pytest.mark.parametrize("ranker", [("RRFRanker", {}), ("WeightedRanker", {"weights": [0.3, 0.7]})])
async def test_sparse_and_hybrid_answers_equal_upstreams(hybrid: Any, mode: str, ranker: Any) -> None:
    store, plain = hybrid
    for one in (store, plain):
        one.hybrid_ranker, one.hybrid_ranker_params = ranker
    options: dict[str, Any] = {"similarity_top_k": 3, "vector_store_query_mode": mode}
    ours = AsyncMilvusRetriever(store, embed_model=MODEL, **options)
    if mode in ("sparse", "text_search"):
        expected = [exact_sparse_search(store, plain, question) for question in QUESTIONS]
    else:
        theirs = VectorIndexRetriever(VectorStoreIndex.from_vector_store(plain, embed_model=MODEL), **options)
        expected = [theirs.retrieve(question) for question in QUESTIONS]
    assert any(expected)
    for found, reference in zip(await ours.aretrieve_many(QUESTIONS), expected, strict=True):
        same(found, reference)
    same(ours.retrieve(QUESTIONS[0]), expected[0])


def exact_sparse_search(store: AsyncMilvusVectorStore, plain: MilvusVectorStore, question: str) -> list[NodeWithScore]:
    """What upstream would find, if the search parameters that it sends were not refused by Milvus Lite."""
    function = plain.sparse_embedding_function
    query: Any = function.encode_queries([question])[0] if isinstance(function, WordCounts) else question
    hits = plain.client.search(
        plain.collection_name, data=[query], anns_field=plain.sparse_embedding_field, limit=3, output_fields=["*"]
    )
    found, scores, _ = plain._parse_from_milvus_results(hits)
    return [NodeWithScore(node=node, score=score) for node, score in zip(found, scores, strict=True)]


def test_the_tutorial_with_one_class_name_changed(backend: Backend, collection_name: str) -> None:
    corpus = documents(limit=3, min_chars=3_000)

    async def tutorial() -> Any:
        store = AsyncMilvusVectorStore(
            uri=backend.uri, collection_name=collection_name, dim=DIM, overwrite=True, consistency_level="Strong"
        )
        context = StorageContext.from_defaults(vector_store=store)
        index = VectorStoreIndex.from_documents(corpus, storage_context=context, embed_model=MODEL, use_async=True)
        engine = index.as_query_engine(use_async=True, llm=MockLLM(), response_mode=ResponseMode.NO_TEXT)
        answer = await engine.aquery(corpus[0].text[:300])
        await index.adelete_ref_doc(corpus[0].doc_id)
        after = await engine.aquery(corpus[0].text[:300])
        await store.aclose()
        return answer, after

    answer, after = asyncio.run(tutorial())
    assert answer.source_nodes[0].node.ref_doc_id == corpus[0].doc_id
    assert all(n.node.ref_doc_id != corpus[0].doc_id for n in after.source_nodes)
