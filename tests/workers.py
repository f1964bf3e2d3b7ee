"""A program whose worker processes use the store that it has used itself.

    programs.run("from tests.workers import main; main()", "child", "fork", uri, "collection_name")

A program of its own, and not a part of the tests' process: gRPC aborts a child that is forked while any client of the
process has a call under way, and other tests leave such clients behind.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores.types import VectorStoreQuery

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, AsyncMilvusWriter
from tests.embedding import HashEmbedding

DIM = 16


def nodes(prefix: str, number: int, *, embedded: bool = True) -> list[TextNode]:
    made = [TextNode(id_=f"{prefix}-{n}", text=f"text {n} of {prefix}") for n in range(number)]
    if embedded:
        model = HashEmbedding(dim=DIM)
        for node in made:
            node.embedding = model.get_text_embedding(node.text)
    return made


def count(store: AsyncMilvusVectorStore) -> int:
    rows = store.client.query(store.collection_name, filter="", output_fields=["count(*)"], consistency_level="Strong")
    return int(rows[0]["count(*)"])


def use(store: AsyncMilvusVectorStore, given: Sequence[TextNode]) -> tuple[list[str], list[str]]:
    """In the child: write, in both ways, and read."""
    half = len(given) // 2
    ids = store.add(given[:half])
    ids += asyncio.run(store.async_add(list(given[half:])))
    found = store.query(VectorStoreQuery(query_embedding=given[0].embedding, similarity_top_k=1))
    store.close()
    return ids, found.ids or []


def child(store: AsyncMilvusVectorStore, method: str) -> None:
    """A child that `method` has made writes and reads, and the parent goes on."""
    asyncio.run(store.async_add(nodes("parent", 10)))  # the parent's own requests come first
    given = nodes("child", 20)
    with ProcessPoolExecutor(1, multiprocessing.get_context(method)) as executor:
        outcome = executor.submit(use, store, given).result(100)  # raises where the child dies
    assert outcome == ([node.node_id for node in given], [given[0].node_id]), outcome
    assert count(store) == 30
    store.add(nodes("later", 1))
    assert count(store) == 31


def pipeline(store: AsyncMilvusVectorStore, method: str) -> None:
    """The workers of LlamaIndex's pipelines write: those of `run` are spawned, those of `arun` forked."""
    given = nodes("piped", 60, embedded=False)
    store.add(nodes("parent", 3))
    writer = AsyncMilvusWriter(vector_store=store, embed_model=HashEmbedding(dim=DIM))
    writing = IngestionPipeline(transformations=[writer], disable_cache=True)
    if method == "arun":
        returned = asyncio.run(writing.arun(nodes=given, num_workers=2))
    else:
        returned = writing.run(nodes=given, num_workers=2)
    ids = sorted(node.node_id for node in given)
    assert sorted(node.node_id for node in returned) == ids
    assert sorted(node.node_id for node in store.get_nodes(node_ids=ids)) == ids
    assert count(store) == 63


def opened(uri: str, collection_name: str) -> AsyncMilvusVectorStore:
    return AsyncMilvusVectorStore(
        uri=uri,
        collection_name=collection_name,
        dim=DIM,
        consistency_level="Strong",
        overwrite=True,
        similarity_metric="COSINE",
        max_concurrency=3,
        token="root:Milvus",
    )


def main() -> None:
    what, method, uri, collection_name = sys.argv[1:]
    with opened(uri, collection_name) as store:
        {"child": child, "pipeline": pipeline}[what](store, method)
    print("done")
