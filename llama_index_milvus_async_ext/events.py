"""What this package tells LlamaIndex's instrumentation."""

from __future__ import annotations

from llama_index.core.instrumentation.events import BaseEvent


class MilvusWriteEvent(BaseEvent):
    """A write has ended: how many nodes it wrote, and at what price. It holds no node and no secret.

    Attributes:
        collection_name: The collection written to.
        written: Nodes that Milvus acknowledged.
        failed: Nodes that were not stored.
        unknown: Nodes whose outcome is not known.
        retries: Requests that were sent again.
        elapsed_seconds: Wall time of the write.
    """

    collection_name: str
    written: int
    failed: int
    unknown: int
    retries: int
    elapsed_seconds: float

    @classmethod
    def class_name(cls) -> str:
        """Name of the event."""
        return "MilvusWriteEvent"


class MilvusSearchEvent(BaseEvent):
    """Queries of a call have been carried by a search request, which other callers may have shared.

    A call has one for each batch that its queries went in, made when the call has its answers. It holds no query and
    no secret.

    Attributes:
        collection_name: The collection searched.
        nq: Queries in the request, other callers' included.
        own_queries: This call's queries among them.
        waiting_seconds: From the call until the batch was first sent.
        sending_seconds: From then until its answer, further attempts and the pauses before them included.
        attempts: Requests that it took.
        error_type: The error that it ended with; empty if it was answered.
    """

    collection_name: str
    nq: int
    own_queries: int
    waiting_seconds: float
    sending_seconds: float
    attempts: int
    error_type: str = ""

    @classmethod
    def class_name(cls) -> str:
        """Name of the event."""
        return "MilvusSearchEvent"


class MilvusWriteBatchEvent(BaseEvent):
    """Rows of a write have been carried by a request, which other callers may have shared.

    A write has one for each batch that its rows went in, made when the write ends. A batch that Milvus refused, and
    that was sent again in halves, has one as well. It holds no row and no secret.

    Attributes:
        collection_name: The collection written to.
        rows: Rows in the request, other callers' included.
        own_rows: This write's rows among them.
        row_bytes: Bytes of all of its rows.
        waiting_seconds: From the write's beginning until the batch was first sent.
        sending_seconds: From then until its answer, further attempts and the pauses before them included.
        attempts: Requests that it took.
        error_type: The error that it ended with; empty if it was acknowledged.
    """

    collection_name: str
    rows: int
    own_rows: int
    row_bytes: int
    waiting_seconds: float
    sending_seconds: float
    attempts: int
    error_type: str = ""

    @classmethod
    def class_name(cls) -> str:
        """Name of the event."""
        return "MilvusWriteBatchEvent"


class MilvusRetryEvent(BaseEvent):
    """A request failed, and was sent again after a pause. It holds no row, no query, no message and no secret.

    Each call whose items it carried has one, made when the call ends.

    Attributes:
        collection_name: The collection that the call is about.
        request: "search_request", "write_request", or "call" for all others.
        attempt: Which attempt failed, from 1.
        error_type: The error's type.
        code: Milvus's error code, if the error has one; see also `grpc_status`.
        grpc_status: The gRPC status, such as "UNAVAILABLE"; empty if Milvus itself answered.
        backoff_seconds: The pause before the next attempt.
    """

    collection_name: str
    request: str
    attempt: int
    error_type: str
    code: int | None
    grpc_status: str
    backoff_seconds: float

    @classmethod
    def class_name(cls) -> str:
        """Name of the event."""
        return "MilvusRetryEvent"


class MilvusIngestionEvent(BaseEvent):
    """Some documents of an ingestion are settled: they are in the collection. It holds no document and no secret.

    The last one of a run, of no documents, tells the rest.

    Attributes:
        documents: Documents settled since the last such event, the unchanged ones included.
        nodes: Nodes that Milvus has acknowledged since then, of these or of documents still under way.
        failed: Documents that have failed so far, in all.
        stage_seconds: How long each stage was at work since then, in seconds.
    """

    documents: int
    nodes: int
    failed: int
    stage_seconds: dict[str, float]

    @classmethod
    def class_name(cls) -> str:
        """Name of the event."""
        return "MilvusIngestionEvent"
