"""A document on its way through an ingestion."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from llama_index.core.schema import BaseNode, MediaResource, MetadataMode, NodeRelationship, RelatedNodeInfo

from llama_index_milvus_async_ext._ingest.standing import Standing
from llama_index_milvus_async_ext._milvus.schema import ID_FIELD
from llama_index_milvus_async_ext.report import FailedNode, WriteReport

OF_NO_DOCUMENT = ("", "None")  # what LlamaIndex stores for nodes without a document
# Of the objects in a document, only LlamaIndex's own: others may refer to anything, and be large.
_OWNED = frozenset({dict, list, tuple, set, MediaResource, RelatedNodeInfo})
_WEIGHT_CHARS = 16_384  # a document of more text weighs more than one that is looked up
_RANDOM = re.compile("[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")  # a UUID of version 4


class Item:
    """A document, and what is known of it so far.

    Attributes:
        document: The document.
        document_id: Its id.
        version: The version of it that is wanted in the collection.
        hash: What `hash_of` gave for it, as it came: transformations may change it.
        chars: How much text it has.
        standing: How it stands in the collection.
        nodes: What has been made of it; until they are written.
        keys: The primary keys of its nodes.
        is_closed: Whether nothing more is done about it.
        original: The document that stands for it, as it holds the same content, if one does.
    """

    __slots__ = (
        *("chars", "document", "document_id", "hash", "is_closed", "keys", "nodes", "original", "standing"),
        "version",
    )

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
        self.original: str | None = None

    def again(self) -> Item:
        """The document, of which nothing is known yet."""
        return Item(self.document, self.document_id, self.version, self.hash)

    @property
    def unsure_keys(self) -> list[Any]:
        """The keys that another document's node may have: those that are not random, and not its own already."""
        own = set(self.standing.stale)
        return [key for key in self.keys if key not in own and not (isinstance(key, str) and _RANDOM.fullmatch(key))]


def copied(document: BaseNode) -> BaseNode:
    """A document for transformations to work on: the caller's own is left as it came, to be ingested again.

    Its containers are its own, at any depth; what else is in them is not copied, as not everything can be.
    """
    copy = document.model_copy()
    owned: dict[int, Any] = {}
    vars(copy).update({name: _own(each, owned) for name, each in vars(copy).items() if name != "embedding"})
    if document.embedding is not None:
        copy.embedding = list(document.embedding)  # not one by one
    return copy


def _own(value: Any, owned: dict[int, Any]) -> Any:
    kind = type(value)
    if kind not in _OWNED:
        return value
    if id(value) in owned:
        return owned[id(value)]
    own: Any
    if kind is dict:
        own = owned[id(value)] = {}
        own.update((key, _own(each, owned)) for key, each in value.items())
    elif kind is list:
        own = owned[id(value)] = []
        own.extend(_own(each, owned) for each in value)
    elif kind in (tuple, set):
        own = owned[id(value)] = kind(_own(each, owned) for each in value)
    else:
        own = owned[id(value)] = value.model_copy()
        vars(own).update({name: _own(each, owned) for name, each in vars(own).items()})
    return own


def of_document(node: BaseNode, item: Item) -> BaseNode:
    """The node as one of its document: LlamaIndex deletes a document by what its nodes say is their source."""
    if node.ref_doc_id == item.document_id:
        return node
    source = item.document.as_related_node_info()
    node.relationships = {**node.relationships, NodeRelationship.SOURCE: source}
    return node


def check_id(document_id: str) -> None:
    """Refuse an id by which no document could be found again.

    Raises:
        ValueError: It can't be looked up, or stands for something else.
    """
    if document_id in OF_NO_DOCUMENT:
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


def weight_of_text(item: Item) -> int:
    """What a document weighs where its text is what takes memory."""
    return 1 + item.chars // _WEIGHT_CHARS


def weight_of_nodes(item: Item) -> int:
    """What a document weighs where its nodes are."""
    return max(len(item.nodes), 1)


def written_in_part(item: Item, part: WriteReport) -> list[Any]:
    """The keys of a document's rows that are there now, or may be, though not all of them could be written.

    Those that were refused are not among them: another run may have written them meanwhile. Nor are those that had a
    row before.
    """
    absent, before = {id(each.node) for each in part.failed}, set(item.standing.stale)
    written = [key for node, key in zip(item.nodes, item.keys, strict=True) if id(node) not in absent]
    return [key for key in written if key not in before]


def losses_of(items: Sequence[Item], report: WriteReport) -> list[tuple[Item, WriteReport]]:
    """The documents of which a write has not written all nodes, each with the report of its own."""
    owners = {id(node): item for item in items for node in item.nodes}
    lost: dict[int, tuple[Item, list[FailedNode], list[FailedNode]]] = {}
    for number, nodes in enumerate((report.failed, report.unknown)):
        for each in nodes:
            item = owners[id(each.node)]
            entry = lost.setdefault(id(item), (item, [], []))
            (entry[2] if number else entry[1]).append(each)
    losses = []
    for item, failed, unknown in lost.values():
        without = {id(each.node) for each in (*failed, *unknown)}
        written = [node.node_id for node in item.nodes if id(node) not in without]
        losses.append((item, WriteReport(written, failed, unknown, report.retries, report.elapsed_seconds)))
    return losses
