"""Sparse vectors that the client computes: an encoder's error is that of the text it failed for."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores.types import VectorStoreQuery, VectorStoreQueryMode
from llama_index.vector_stores.milvus.utils import BaseSparseEmbeddingFunction

from llama_index_milvus_async_ext import AsyncMilvusVectorStore
from llama_index_milvus_async_ext._nodes import sparse


class LettersEncoder(BaseSparseEmbeddingFunction):
    """Counts letters. Fails for texts with a `!`, and answers with too few vectors where one has a `?`."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def _encode(self, kind: str, texts: list[str]) -> list[dict[int, float]]:
        self.calls.append((kind, len(texts)))
        if any("!" in text for text in texts):
            try:
                raise OSError("the model is elsewhere")
            except OSError as error:
                raise RuntimeError("no vector for !") from error
        return [{ord(letter): float(text.count(letter)) for letter in text} for text in texts if "?" not in text]

    def encode_documents(self, documents: list[str]) -> list[dict[int, float]]:
        return self._encode("sync", documents)

    async def async_encode_documents(self, documents: list[str]) -> list[dict[int, float]]:
        await asyncio.sleep(0)
        return self._encode("async", documents)

    def encode_queries(self, queries: list[str]) -> list[dict[int, float]]:
        return self._encode("sync", queries)

    async def async_encode_queries(self, queries: list[str]) -> list[dict[int, float]]:
        await asyncio.sleep(0)
        return self._encode("async", queries)


encoder = LettersEncoder()


@pytest.fixture(scope="module")
def store(lite_uri: str) -> Iterator[AsyncMilvusVectorStore]:
    with AsyncMilvusVectorStore(
        uri=lite_uri,
        collection_name=f"sparse_{uuid.uuid4().hex}",
        dim=2,
        enable_sparse=True,
        sparse_embedding_function=encoder,
        consistency_level="Strong",
    ) as store:
        yield store
        store.clear()


@pytest.fixture(autouse=True)
def no_calls_yet() -> None:
    encoder.calls.clear()


def nodes_of(*texts: str) -> list[TextNode]:
    return [TextNode(id_=f"{n} {text}", text=text, embedding=[1.0, 0.0]) for n, text in enumerate(texts)]


async def written(store: AsyncMilvusVectorStore, nodes: list[TextNode], way: str) -> Any:
    return await store.awrite(nodes) if way == "async" else store.write(nodes)


@pytest.mark.parametrize("way", ["sync", "async"])
async def test_a_document_that_the_encoder_fails_for_fails_alone(store: Any, way: str) -> None:
    nodes = nodes_of("ab", "oh!", "cd", "really?")
    report = await written(store, nodes, way)
    assert report.written == ["0 ab", "2 cd"]
    broken, missing = report.failed
    assert broken.node is nodes[1] and missing.node is nodes[3]
    assert type(broken.error) is RuntimeError and str(broken.error) == "no vector for !"
    assert isinstance(broken.error.__cause__, OSError)
    assert f"LettersEncoder.{'async_' * (way == 'async')}encode_documents returned 0 vectors for 1 texts" in str(
        missing.error
    )
    assert all(each.retryable and each.attempts == 0 for each in report.failed)
    assert {kind for kind, _ in encoder.calls} == {way}, "each way asks by its own method"
    assert [count for _, count in encoder.calls] == [4, 1, 1, 1, 1]


async def test_an_encoder_that_fails_for_all_is_not_asked_for_each_of_a_thousand(store: Any) -> None:
    report = await store.awrite(nodes_of(*["oh!"] * 1000))
    assert len(report.failed) == 1000 and not report.written
    assert all(str(each.error) == "no vector for !" for each in report.failed)
    assert len(encoder.calls) < 20


@pytest.mark.parametrize("awaits", [False, True])
async def test_each_of_many_texts_has_its_own_vector_beside_one_that_the_encoder_fails_for(awaits: bool) -> None:
    texts = ["!", *("x" * (number + 1) for number in range(40))]
    error, *vectors = await sparse.of_documents(encoder, texts, awaits)
    assert isinstance(error, RuntimeError)
    assert vectors == [{ord("x"): number + 1.0} for number in range(40)]


@pytest.mark.parametrize("way", ["sync", "async"])
async def test_a_query_that_the_encoder_fails_for_raises_its_error(store: Any, way: str) -> None:
    def query(text: str) -> VectorStoreQuery:
        return VectorStoreQuery(query_str=text, mode=VectorStoreQueryMode.SPARSE, similarity_top_k=1)

    async def ids(*texts: str) -> list[Any]:
        queries = [query(text) for text in texts]
        found = await store.aquery_many(queries) if way == "async" else store.query_many(queries)
        return [each.ids for each in found]

    await written(store, nodes_of("xx", "yy"), way)
    assert await ids("x", "y") == [["0 xx"], ["1 yy"]]
    with pytest.raises(RuntimeError, match="no vector for !"):
        await ids("x", "!")
    with pytest.raises(ValueError, match="encode_queries returned 1 vectors for 2 texts"):
        await ids("x", "?")
