"""Write to and read from Milvus, from LlamaIndex, at the speed the server allows, and lose nothing.

`AsyncMilvusVectorStore` is the drop-in store, `AsyncMilvusWriter` the pipeline step, `AsyncMilvusRetriever` the
retriever, `aingest` keeps a corpus in step. Inside, the rooms from the top down, each importing only those below it:
`_ingest` knows what a document is; `_store` carries out what the store is asked for; `_queries` makes requests of
queries, and results of hits; `_nodes` makes rows of nodes, and nodes of rows; `_milvus` alone knows pymilvus and gRPC;
`_lane` carries items of many callers in few requests, and knows nothing of Milvus: a pure core decides, a thin shell in
one I/O thread per process does it; `_flow` runs stages beside each other.
"""

from llama_index_milvus_async_ext.ingestion import FailedDocument, IngestionReport, aingest, ingest
from llama_index_milvus_async_ext.report import FailedNode, WriteError, WriteReport
from llama_index_milvus_async_ext.retriever import AsyncMilvusRetriever
from llama_index_milvus_async_ext.retry import RetryPolicy
from llama_index_milvus_async_ext.vector_store import AsyncMilvusVectorStore
from llama_index_milvus_async_ext.writer import AsyncMilvusWriter

__all__ = [
    "AsyncMilvusRetriever",
    "AsyncMilvusVectorStore",
    "AsyncMilvusWriter",
    "FailedDocument",
    "FailedNode",
    "IngestionReport",
    "RetryPolicy",
    "WriteError",
    "WriteReport",
    "aingest",
    "ingest",
]
