"""A document on its way through an ingestion."""

from __future__ import annotations

from typing import Any

from llama_index.core.schema import BaseNode, MetadataMode

from llama_index_milvus_async_ext._ingest.standing import Standing


class Item:
    """A document, and what is known of it so far.

    Attributes:
        document: The document.
        document_id: Its id.
        version: The version of it that is wanted in the collection.
        hash: LlamaIndex's hash of it, as it came: transformations may change it.
        chars: How much text it has.
        standing: How it stands in the collection.
        nodes: What has been made of it.
        keys: The primary keys of its nodes.
        is_closed: Whether nothing more is done about it.
    """

    __slots__ = ("chars", "document", "document_id", "hash", "is_closed", "keys", "nodes", "standing", "version")

    def __init__(self, document: BaseNode, document_id: str, version: str, hash_: str) -> None:
        self.document = document
        self.document_id = document_id
        self.version = version
        self.hash = hash_
        self.chars = len(document.get_content(metadata_mode=MetadataMode.NONE))
        self.standing = Standing(False, False, [])
        self.nodes: list[BaseNode] = []
        self.keys: list[Any] = []
        self.is_closed = False
