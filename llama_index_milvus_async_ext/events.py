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
