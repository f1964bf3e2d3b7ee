"""Write to and read from Milvus, from LlamaIndex, at the speed the server allows, and lose nothing.

`AsyncMilvusVectorStore` is the drop-in store, `AsyncMilvusWriter` the pipeline step, `AsyncMilvusRetriever` the
retriever. Inside, each request travels in a lane (`_lane`): items of many callers wait there, a free slot of the
endpoint's limit (`_limit`) takes as many as fit, and each item gets its own outcome. All lanes run in one I/O thread
per process (`_io`); `_endpoint` ties a connection to its lanes, `_rows` and `_node_json` encode nodes, `_search` and
`_filters` plan queries, `_session` opens and ends a store's connection, and `_wire` alone touches pymilvus's
internals. Imports point one way only.
"""

from llama_index_milvus_async_ext.report import FailedNode, WriteError, WriteReport
from llama_index_milvus_async_ext.retriever import AsyncMilvusRetriever
from llama_index_milvus_async_ext.retry import RetryPolicy
from llama_index_milvus_async_ext.vector_store import AsyncMilvusVectorStore
from llama_index_milvus_async_ext.writer import AsyncMilvusWriter

__all__ = [
    "AsyncMilvusRetriever",
    "AsyncMilvusVectorStore",
    "AsyncMilvusWriter",
    "FailedNode",
    "RetryPolicy",
    "WriteError",
    "WriteReport",
]
