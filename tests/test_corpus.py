"""The tests' own material is what it says: the same each time, real enough for a search, welcome in Milvus."""

from __future__ import annotations

import asyncio
import pickle
import time

import numpy as np
import pytest
from llama_index.core.schema import BaseNode
from llama_index.vector_stores.milvus import MilvusVectorStore

from tests import virtual_time
from tests.conftest import Backend, MakeNodes
from tests.corpus import documents, stdlib_nodes
from tests.embedding import HashEmbedding


def test_documents_are_the_same_each_time() -> None:
    some = documents(limit=20, min_chars=500)
    assert len(some) == 20
    assert [(document.node_id, document.text) for document in some] == [
        (document.node_id, document.text) for document in documents(limit=20, min_chars=500)
    ]
    assert all(len(document.text) >= 500 and document.metadata["file_name"].endswith(".py") for document in some)


def test_nodes_lose_nothing_of_their_documents() -> None:
    nodes = stdlib_nodes(300, chunk_chars=400)
    assert len({node.node_id for node in nodes}) == 300
    (first, *_) = documents(limit=1)
    mine = [node.text for node in nodes if node.ref_doc_id == first.node_id]
    assert "".join(mine).strip() == first.text.strip()


def test_there_are_enough_nodes_for_the_large_tests() -> None:
    assert len(stdlib_nodes(20_000, chunk_chars=300)) == 20_000


def test_more_nodes_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="chunks"):
        stdlib_nodes(1_000_000)


def test_similar_texts_have_similar_embeddings() -> None:
    model = HashEmbedding(dim=128)
    loop, same, other = (
        np.array(model.get_text_embedding(text))
        for text in ("run the event loop until done", "the event loop is done", "parse an XML document")
    )
    assert loop @ same > 0.5 > abs(loop @ other)
    assert np.linalg.norm(loop) == pytest.approx(1.0, abs=1e-6)
    assert np.linalg.norm(model.get_text_embedding("")) == 1.0


async def test_the_embedding_counts_its_calls_and_survives_pickling() -> None:
    model = HashEmbedding(dim=16, embed_batch_size=4)
    embeddings = model.get_text_embedding_batch(["a", "b", "c", "d", "e"])
    assert model.batch_sizes == [4, 1]
    assert await model.aget_text_embedding_batch(["a", "b", "c", "d", "e"]) == embeddings
    assert (model.calls, model.texts) == (4, 10)
    copy = pickle.loads(pickle.dumps(model))
    assert copy.get_query_embedding("a") == embeddings[0]
    assert (copy.dim, copy.calls, model.calls) == (16, 1, 4)


async def test_the_embedding_takes_the_time_it_is_told() -> None:
    model = HashEmbedding(dim=4, seconds_per_text=0.05)
    started = time.monotonic()
    await asyncio.gather(model.aget_text_embedding("a"), model.aget_text_embedding("b"))
    assert time.monotonic() - started >= 0.1


def test_the_embedding_gives_way_for_the_time_it_is_told() -> None:
    model = HashEmbedding(dim=4, seconds_per_text=0.05, blocking=False)

    async def seconds_for_two() -> float:
        started = asyncio.get_running_loop().time()
        await asyncio.gather(model.aget_text_embedding("a"), model.aget_text_embedding("b"))
        return asyncio.get_running_loop().time() - started

    assert virtual_time.run(seconds_for_two()) == pytest.approx(0.05)


async def test_upstream_stores_and_finds_them(backend: Backend, collection_name: str, make_nodes: MakeNodes) -> None:
    model = HashEmbedding(dim=64)
    store = MilvusVectorStore(
        uri=backend.uri, dim=64, collection_name=collection_name, consistency_level="Strong", overwrite=True
    )
    nodes: list[BaseNode] = [*stdlib_nodes(50, embed_model=model), *make_nodes(10, dim=64, prefix="a")]
    assert await store.async_add(nodes) == [node.node_id for node in nodes]
    found = store.get_nodes([nodes[0].node_id, "a-3"])
    assert {node.node_id for node in found} == {nodes[0].node_id, "a-3"}
    if store.aclient is not None:
        await store.aclient.close()
    store.client.close()
