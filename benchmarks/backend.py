"""A Milvus to measure against: opens stores on fresh collections, and checks what was stored in them."""

from __future__ import annotations

import contextlib
import itertools
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import VectorStoreQuery, VectorStoreQueryResult
from llama_index.vector_stores.milvus import MilvusVectorStore
from pymilvus import MilvusClient

from benchmarks.corpus import make_nodes
from llama_index_milvus_async_ext import AsyncMilvusVectorStore

TOP_K = 3
METRIC = "COSINE"
_IDS_PER_PAGE = 10_000
_COMPARED_ROWS = 20
# A server takes three seconds to load a new collection, most of which it waits: ten take as long as one.
_COLLECTIONS_MADE_AT_ONCE = 10


class WrongAnswerError(AssertionError):
    """A workload stored or found something else than it should have: its times mean nothing."""


@dataclass
class Backend:
    """One Milvus, server or Lite file.

    Attributes:
        uri: Address or file.
        token: As `MilvusVectorStore`'s.
        is_lite: Whether it is Milvus Lite.
    """

    uri: str
    token: str = ""
    is_lite: bool = False
    client: MilvusClient = field(init=False)
    _fresh: dict[int, list[str]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.client = MilvusClient(uri=self.uri, token=self.token)

    @contextlib.asynccontextmanager
    async def upstream(self, dim: int, **options: Any) -> AsyncIterator[MilvusVectorStore]:
        """Upstream's store, connected.

        It is on a fresh collection, which is dropped at the end, or on the one that the options name.
        """
        with self._collection(dim, options) as arguments:
            store = MilvusVectorStore(**arguments)
            try:
                await self._warm_up(store, dim, options)
                yield store
            finally:
                await store.aclient.close()

    @contextlib.asynccontextmanager
    async def ours(self, dim: int, **options: Any) -> AsyncIterator[AsyncMilvusVectorStore]:
        """This package's store, connected; its collection as with `upstream`."""
        with self._collection(dim, options) as arguments:
            store = AsyncMilvusVectorStore(**arguments)
            try:
                await self._warm_up(store, dim, options)
                yield store
            finally:
                await store.aclose()

    def close(self) -> None:
        for name in itertools.chain.from_iterable(self._fresh.values()):
            self.client.drop_collection(name)
        self.client.close()

    @contextlib.contextmanager
    def _collection(self, dim: int, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The arguments of a store."""
        arguments = {"uri": self.uri, "token": self.token, "dim": dim, "similarity_metric": METRIC, **options}
        if "collection_name" in options:
            yield arguments
            return
        fresh = self._fresh.setdefault(dim, [])
        if not fresh:
            fresh += self._make_collections(dim)
        name = fresh.pop() if "consistency_level" not in options else _new_name()
        try:
            yield arguments | {"collection_name": name}
        finally:
            self.client.drop_collection(name)

    def _make_collections(self, dim: int) -> list[str]:
        names = [_new_name() for _ in range(1 if self.is_lite else _COLLECTIONS_MADE_AT_ONCE)]

        def make(name: str) -> None:
            MilvusVectorStore(
                uri=self.uri,
                token=self.token,
                dim=dim,
                collection_name=name,
                similarity_metric=METRIC,
                use_async_client=False,
            )

        with ThreadPoolExecutor(len(names)) as threads:
            list(threads.map(make, names))
        return names

    async def _warm_up(self, store: MilvusVectorStore, dim: int, options: dict[str, Any]) -> None:
        # Connections are made at the first call; that is no part of what is measured.
        [node] = make_nodes(1, dim, prefix="warm-up")
        if "collection_name" not in options:
            await store.async_add([node])
            self.client.delete(store.collection_name, ids=[node.node_id])
        await store.aquery(VectorStoreQuery(query_embedding=node.embedding, similarity_top_k=1))

    # --- checks

    def check_stored(self, collection: str, nodes: Sequence[BaseNode]) -> None:
        """Raise unless the collection holds these nodes, each once, and nothing else."""
        [counted] = self.client.query(collection, "", output_fields=["count(*)"], consistency_level="Strong")
        if counted["count(*)"] != len(nodes):
            raise WrongAnswerError(f"{len(nodes)} nodes were written, {counted['count(*)']} rows are stored")
        self.check_holds(collection, nodes)

    def check_holds(self, collection: str, nodes: Sequence[BaseNode]) -> None:
        """Raise unless the collection holds these nodes, each once, whatever else it holds."""
        expected = sorted(node.node_id for node in nodes)
        for start in range(0, len(expected), _IDS_PER_PAGE):
            page = expected[start : start + _IDS_PER_PAGE]
            rows = self.client.query(
                collection,
                f'id >= "{page[0]}" and id <= "{page[-1]}"',
                output_fields=["id"],
                consistency_level="Strong",
            )
            if sorted(row["id"] for row in rows) != page:
                raise WrongAnswerError(f"the ids from {page[0]} to {page[-1]} are not stored as they were written")

    def check_same_rows(self, collections: Iterable[str], nodes: Sequence[BaseNode]) -> None:
        """Raise unless a sample of the nodes is stored equally, column by column, in all the collections."""
        sample = [node.node_id for node in nodes[:: max(len(nodes) // _COMPARED_ROWS, 1)]]
        stored = []
        for collection in collections:
            rows = self.client.query(collection, f"id in {sample}", output_fields=["*"], consistency_level="Strong")
            stored.append(sorted((dict(row) for row in rows), key=lambda row: row["id"]))
        if any(rows != stored[0] for rows in stored):
            raise WrongAnswerError("the sides do not store the same rows")


def _new_name() -> str:
    return f"benchmark_{uuid.uuid4().hex[:12]}"


def queries_for(nodes: Sequence[BaseNode]) -> list[VectorStoreQuery]:
    """One query per node, to which that node is the best answer."""
    return [VectorStoreQuery(query_embedding=node.embedding, similarity_top_k=TOP_K) for node in nodes]


def check_answers(nodes: Sequence[BaseNode], results: Sequence[VectorStoreQueryResult]) -> None:
    """Raise unless each query was answered with its own node first, and with enough nodes."""
    for node, result in zip(nodes, results, strict=True):
        if not result.nodes or len(result.nodes) != TOP_K or not result.ids:
            raise WrongAnswerError(f"the query for {node.node_id} was not answered with {TOP_K} nodes")
        found = result.nodes[0]
        if result.ids[0] != node.node_id or found.node_id != node.node_id:
            raise WrongAnswerError(f"the query for {node.node_id} was answered with {result.ids[0]}")
        if found.get_content() != node.get_content() or found.metadata != node.metadata:
            raise WrongAnswerError(f"the node {node.node_id} came back changed")
