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
