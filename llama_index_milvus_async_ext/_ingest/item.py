"""A document on its way through an ingestion."""

from __future__ import annotations

from typing import Any

from llama_index.core.schema import BaseNode, MetadataMode, NodeRelationship

from llama_index_milvus_async_ext._ingest.standing import Standing
from llama_index_milvus_async_ext._milvus.schema import ID_FIELD

_OF_NO_DOCUMENT = ("", "None")  # what LlamaIndex stores for nodes without a document


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


def of_document(node: BaseNode, item: Item) -> BaseNode:
    """The node as one of its document: LlamaIndex deletes a document by what its nodes say is their source."""
    if node.ref_doc_id == item.document_id:
        return node
    if node is item.document:
        node = node.model_copy()  # the caller's own
    source = item.document.as_related_node_info()
    node.relationships = {**node.relationships, NodeRelationship.SOURCE: source}
    return node


def check_id(document_id: str) -> None:
    """Refuse an id by which no document could be found again.

    Raises:
        ValueError: It can't be looked up, or stands for something else.
    """
    if document_id in _OF_NO_DOCUMENT:
        raise ValueError(f"a document's id can't be {document_id!r}: nodes of no document are stored like this")
    document_id.encode()  # what is not valid Unicode can't be looked up


def check_keys(item: Item, key_name: str) -> None:
    """Refuse a document of which several nodes have one primary key.

    Raises:
        ValueError: Only one of them could be stored.
    """
    places: dict[Any, int] = {}
    for place, key in enumerate(item.keys):
        other = places.setdefault(key, place)
        if other != place:
            raise ValueError(
                f"nodes {other} and {place} of document {item.document_id!r} have the same {key_name} "
                f"{str(key)[:80]!r}, and only one of them could be stored; {remedy_for_keys(key_name)}"
            )


def remedy_for_keys(key_name: str) -> str:
    """What to do where nodes have the same primary key."""
    if key_name == ID_FIELD:
        return "have the splitter's id_func make another of each document and place"
    return f"have a transformation set metadata[{key_name!r}], the collection's primary key, for each node"
