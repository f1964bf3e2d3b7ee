"""A typed program, as a user of the package writes it: `mypy --strict` has to be content with it. Nobody runs it."""

from __future__ import annotations

from collections.abc import AsyncIterator

from llama_index.core import Document, MockEmbedding, StorageContext, VectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.llms import MockLLM
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import BaseNode, NodeWithScore, TextNode
from llama_index.core.vector_stores.types import (
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryResult,
)

from llama_index_milvus_async_ext import (
    AsyncMilvusRetriever,
    AsyncMilvusVectorStore,
    AsyncMilvusWriter,
    IngestionReport,
    RetryPolicy,
    WriteError,
    WriteReport,
    aingest,
    ingest,
)


async def documents() -> AsyncIterator[Document]:
    yield Document(text="text", id_="d")


class Tenants(AsyncMilvusVectorStore):
    tenant: str = "nobody"

    def __init__(self, tenant: str, uri: str) -> None:
        super().__init__(uri, dim=8, partition_key_field="tenant")
        self.tenant = tenant


async def in_coroutines() -> None:
    policy = RetryPolicy(max_attempts=3)
    async with await AsyncMilvusVectorStore.aopen(uri="./typed.db", dim=8, overwrite=True, retry=policy) as store:
        model = MockEmbedding(embed_dim=8)
        writer = AsyncMilvusWriter(store, embed_model=model, on_failure="collect")
        pipeline = IngestionPipeline(transformations=[SentenceSplitter(), writer])
        report: IngestionReport = await aingest(pipeline, documents())
        print(report.added, report.ok, [each.error for each in report.failed])
        nodes: list[BaseNode] = [TextNode(text="x", embedding=[0.1] * 8)]
        written: WriteReport = await store.awrite(nodes)
        try:
            ids: list[str] = await store.async_add(nodes)
        except WriteError as error:
            print(error.report.failed[0].node.node_id)
            return
        query = VectorStoreQuery(query_embedding=[0.1] * 8, similarity_top_k=2)
        found: VectorStoreQueryResult = await store.aquery(query)
        many: list[VectorStoreQueryResult] = await store.aquery_many([query])
        async for node in store.aiter_nodes(batch_size=10):
            print(node.node_id)
        filters = MetadataFilters(filters=[MetadataFilter(key="a", value=1)])
        retriever = AsyncMilvusRetriever(store, embed_model=model, similarity_top_k=2, filters=filters)
        hits: list[NodeWithScore] = await retriever.aretrieve("q")
        lists: list[list[NodeWithScore]] = await retriever.aretrieve_many(["q", "r"])
        engine = RetrieverQueryEngine.from_args(retriever, llm=MockLLM())
        print(await engine.aquery("q"), hits, lists, found.ids, many, written.retries)
        print(await store.aget_nodes(node_ids=ids), store.statistics().requests)
        await store.adelete_nodes(node_ids=ids)


def in_threads() -> None:
    with AsyncMilvusVectorStore(uri="./typed.db", dim=8, max_concurrency=4) as store:
        index = VectorStoreIndex([], storage_context=StorageContext.from_defaults(vector_store=store))
        steps = [MockEmbedding(embed_dim=8), AsyncMilvusWriter(store)]
        report = ingest(IngestionPipeline(transformations=steps), [Document(text="a", id_="a")])
        print(report.nodes, index, [node.node_id for node in store.iter_nodes()])
    Tenants("acme", "./tenants.db").close()
