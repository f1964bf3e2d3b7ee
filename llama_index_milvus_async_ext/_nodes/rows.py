"""From a node to the row that stores it, checked before anything is sent."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import orjson
from llama_index.core.schema import BaseNode, NodeRelationship, RelatedNodeInfo, TextNode
from pymilvus import DataType

from llama_index_milvus_async_ext._milvus.schema import DYNAMIC_FIELD, ID_FIELD, Row, Schema
from llama_index_milvus_async_ext._nodes.columns import COLUMN_TYPES, size_of
from llama_index_milvus_async_ext._nodes.node_json import NodeJson
from llama_index_milvus_async_ext._nodes.refusals import mismatch, refused
from llama_index_milvus_async_ext._nodes.vectors import pack

# A dynamic field that says, of each row that an ingestion has written, to which version of its document it belongs.
RECORD_FIELD = "_ingestion"
# Milvus stores the dynamic fields of a row as one JSON value, of this many bytes at the most (measured: 65,536 pass).
MAX_DYNAMIC_BYTES = 65_536
_DEFAULT_MAX_LENGTH = 65_535
FIELDS_OF_NODES = frozenset({"_node_content", "_node_type", "document_id", "doc_id", "ref_doc_id"})


class RowEncoder:
    """Encodes the nodes of one collection.

        row, nbytes = RowEncoder(schema, text_key="text", ...).encode(node)

    The stored form is that of upstream's `MilvusVectorStore`, to the byte. Errors name the node, say what is wrong
    and what to do.
    """

    def __init__(
        self,
        schema: Schema,
        *,
        text_key: str,
        doc_id_field: str,
        embedding_field: str | None,
        sparse_field: str | None = None,
        upsert: bool = False,
        filterable: Collection[str] | None = None,
    ) -> None:
        """Prepare for a collection.

        Args:
            schema: The collection.
            text_key: Column of the text.
            doc_id_field: Column of the id of the node's document.
            embedding_field: Column of the dense vector, if there is one.
            sparse_field: Column of a sparse vector that the client computes, if there is one.
            upsert: Whether the rows shall replace earlier ones, which they can't where Milvus makes the keys up.
            filterable: The metadata keys that are stored as fields of their own, beside the node's JSON; None for all.
        """
        self._schema = schema
        self._text_key = text_key
        self._json = NodeJson(text_key)
        self._doc_id_field = doc_id_field
        self._embedding_field = embedding_field
        self._sparse_field = sparse_field
        self._dim = int(schema.params(embedding_field).get("dim", 0)) if embedding_field else 0
        self._columns = [f["name"] for f in schema.fields]
        self._forbidden = schema.function_outputs
        self._kept = None if filterable is None else frozenset({*filterable, *self._columns, *self._forbidden})
        self._recent_record: bytes | None = None
        self._record_end = b""
        self._recent_doc_id: str | None = None
        self._about_document = b""
        key = schema.primary_key
        self._key_name = key.name
        self._key_problem: tuple[str, str] | None = None
        if key.auto_id and (upsert or key.name == ID_FIELD):
            self._key_problem = (
                f"the collection makes its primary keys ({key.name!r}) up itself, and so replaces no row",
                "use a collection that this store has made, or upsert_mode=False where the key is not 'id'",
            )
        elif key.name == ID_FIELD and key.type != DataType.VARCHAR:
            self._key_problem = (
                f"its id is a text, and the collection's primary key {key.name!r} is of type {key.type.name}",
                "use a collection that this store has made",
            )
        self._scalars = [
            (
                f["name"],
                f["type"],
                int(f.get("params", {}).get("max_length", _DEFAULT_MAX_LENGTH)),
                f["type"] == DataType.VARCHAR,
            )
            for f in schema.fields
            if f["type"] in COLUMN_TYPES and not f.get("nullable") and f.get("default_value") is None
        ]
        self._is_usual = self._find_out_whether_usual()

    def encode(
        self, node: BaseNode, sparse: dict[int, float] | None = None, record: bytes | None = None
    ) -> tuple[Row, int]:
        """The row of a node, and its size in bytes.

        Where the collection's primary key is not `id`, its value is that of the node's metadata, as upstream.

        Args:
            node: The node; its embedding is taken from `node.embedding`.
            sparse: Its sparse vector, where the client computes one.
            record: What the row says of the node's document; see `record_bytes`.

        Raises:
            SchemaMismatchError: The node does not fit the collection as it was described.
            ValueError: The node can't be stored in any collection.
        """
        if self._key_problem is not None:
            raise mismatch(node, *self._key_problem)
        vector = self._vector(node) if self._embedding_field else None
        usual = self._usual_row(node, vector, sparse, record) if self._is_usual and type(node) is TextNode else None
        if usual is not None:
            return usual
        entity = self._entity(node)
        if self._embedding_field:
            entity[self._embedding_field] = node.embedding
        if self._sparse_field:
            entity[self._sparse_field] = sparse
        nbytes = 0
        for name, kind, limit, is_text in self._scalars:
            value = entity.get(name)
            if is_text and type(value) is str and value.isascii() and len(value) <= limit:
                nbytes += len(value)
            else:
                nbytes += self._checked_size(node, entity, name, kind, limit)
        columns, dynamic = self._parted(node, entity, record)
        nbytes += len(dynamic) + (len(vector) if vector else 0) + 8 * len(sparse or ())
        return Row(columns, dynamic, vector), nbytes

    def _vector(self, node: BaseNode) -> bytes:
        embedding = node.embedding
        if embedding is None:
            raise refused(
                node,
                "it has no embedding",
                "give the pipeline or the writer an embed_model, or set node.embedding",
            )
        try:
            dim = len(embedding)
        except TypeError:  # a generator, or an array of no dimension
            kind = type(embedding).__name__
            raise refused(
                node, f"its embedding is no list of numbers, but {kind}", "check the embedding model"
            ) from None
        if dim != self._dim:
            raise mismatch(
                node,
                f"its embedding has {dim} dimensions, the collection has {self._dim}",
                "use the embedding model that the collection was made for, or another collection",
            )
        try:
            return pack(embedding)
        except ValueError as error:
            raise refused(node, f"its embedding {error}", "check the embedding model") from None

    def _usual_row(
        self, node: BaseNode, vector: bytes | None, sparse: dict[int, float] | None, record: bytes | None
    ) -> tuple[Row, int] | None:
        """The row of what nearly all nodes are, in less time; None for any other node, a bad one among them."""
        fields = node.__dict__
        try:
            metadata: dict[str, Any] = fields["metadata"]
            source = fields["relationships"].get(NodeRelationship.SOURCE)
            if not self._reserved.isdisjoint(metadata) or (source is not None and type(source) is not RelatedNodeInfo):
                return None
            text, id_, doc_id = fields["text"], fields["id_"], (source.node_id if source is not None else "") or "None"
            plain = self._json.plain(node)
            if plain is None:
                return None
            content, own = plain
            if self._kept is not None:
                metadata, own = {key: metadata[key] for key in metadata if key in self._kept}, None
            if doc_id != self._recent_doc_id:
                self._about_document = self._tail_for(doc_id)
                self._recent_doc_id = doc_id
            text_bytes = len(text) if text.isascii() else len(text.encode())
            other_bytes = len(id_.encode()) + len(doc_id.encode())
            own = (own or orjson.dumps(metadata))[:-1] + (b',"_node_content":' if metadata else b'"_node_content":')
            dynamic = own + orjson.dumps(content) + self._about_document
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError):  # what is wrong is said the long way
            return None
        if record is not None:
            dynamic = dynamic[:-1] + self._end_with(record)
        nbytes = len(dynamic)
        if nbytes > MAX_DYNAMIC_BYTES or text_bytes > self._usual_text_bytes or other_bytes > self._usual_other_bytes:
            return None
        columns = {ID_FIELD: id_, self._text_key: text, self._doc_id_field: doc_id}
        if vector is not None:
            columns[self._embedding_field] = fields["embedding"]  # type: ignore[index]  # there is one
            nbytes += len(vector)
        if self._sparse_field:
            columns[self._sparse_field] = sparse
            nbytes += 8 * len(sparse or ())
        return Row(columns, dynamic, vector), nbytes + text_bytes + other_bytes

    def _tail_for(self, doc_id: str) -> bytes:
        about = {"_node_type": "TextNode", "document_id": doc_id, "doc_id": doc_id, "ref_doc_id": doc_id}
        return b"," + orjson.dumps({name: value for name, value in about.items() if name not in self._columns})[1:]

    def _end_with(self, record: bytes) -> bytes:
        """The end of the dynamic fields, with the record of the node's document."""
        if record is not self._recent_record:  # the nodes of a document have the same
            self._recent_record, self._record_end = record, b',"%s":%s}' % (RECORD_FIELD.encode(), record)
        return self._record_end

    def _entity(self, node: BaseNode) -> dict[str, Any]:
        # As upstream's node_to_metadata_dict does it.
        try:
            node_content, entity, text = self._json.stored(node)
        except Exception as error:  # pydantic has errors of its own
            raise refused(node, f"it can't be stored as JSON ({error})", "check its metadata") from None
        if self._kept is not None:
            entity = {key: value for key, value in entity.items() if key in self._kept}
        doc_id = node.ref_doc_id or "None"
        entity["_node_content"] = node_content
        entity["_node_type"] = node.class_name()
        entity["document_id"] = entity["doc_id"] = entity["ref_doc_id"] = doc_id
        if self._doc_id_field != "doc_id":
            entity[self._doc_id_field] = doc_id
        entity[self._text_key] = text
        entity[ID_FIELD] = node.node_id
        return entity

    def _checked_size(self, node: BaseNode, entity: dict[str, Any], name: str, kind: DataType, limit: int) -> int:
        value: Any = entity.get(name)
        given = node.metadata.get(name)
        if value is None and isinstance(given, float):  # JSON, through which it went, has null in its place
            problem = f"its {name!r} is {given}, which a {kind.name} column does not take"
            raise mismatch(node, problem, f"replace metadata[{name!r}]")
        if value is None:
            keys = {self._schema.partition_key: "the partition key", self._key_name: "the primary key"}
            what = keys.get(name, "a column")
            raise mismatch(
                node, f"its metadata has no {name!r}, which is {what} of the collection", f"set metadata[{name!r}]"
            )
        remedy = "split it into smaller nodes" if name == self._text_key else "shorten it"
        return size_of(node, name, value, kind, limit, remedy)

    def _parted(self, node: BaseNode, entity: dict[str, Any], record: bytes | None) -> tuple[dict[str, Any], bytes]:
        """The values of the collection's columns, and the JSON of the others."""
        if DYNAMIC_FIELD in entity:
            raise refused(node, f"its metadata has the key {DYNAMIC_FIELD!r}, Milvus's own", "rename the key")
        for name in self._forbidden:
            if name in entity:
                raise mismatch(node, f"its metadata has the key {name!r}, which Milvus fills itself", "rename the key")
        if not self._schema.dynamic:
            return entity, b""
        columns = {name: entity.pop(name) for name in self._columns if name in entity}
        try:
            dynamic = orjson.dumps(entity)
        except (TypeError, ValueError, RecursionError) as error:
            raise refused(node, f"its metadata can't be stored as JSON ({error})", "use plain JSON values") from None
        if record is not None:
            if RECORD_FIELD in entity:
                raise refused(node, f"its metadata has the key {RECORD_FIELD!r}, this package's own", "rename the key")
            dynamic = dynamic[:-1] + self._end_with(record)
        if len(dynamic) > MAX_DYNAMIC_BYTES:
            problem = f"its metadata and relationships take {len(dynamic)} bytes as JSON, and Milvus stores "
            problem, remedy = f"{problem}{MAX_DYNAMIC_BYTES}", "store less metadata"
            if self._kept is None:
                problem += " (each metadata value is stored twice)"
                remedy += ", or name the keys that you filter by in filterable_metadata=: the others are stored once"
            raise refused(node, problem, remedy)
        return columns, dynamic

    def _find_out_whether_usual(self) -> bool:
        """Whether the collection is as upstream makes it, without columns for metadata."""
        usual = {ID_FIELD, self._text_key, self._doc_id_field}
        vectors = {self._embedding_field, self._sparse_field} - {None}
        limits = {name: limit for name, _, limit, is_text in self._scalars if is_text}
        self._usual_text_bytes = limits.get(self._text_key, 0)
        self._usual_other_bytes = min(limits.get(name, 0) for name in (ID_FIELD, self._doc_id_field))
        self._reserved = frozenset(
            {DYNAMIC_FIELD, RECORD_FIELD, *FIELDS_OF_NODES, *self._columns, *self._forbidden, *usual, *vectors}
        )
        return (
            self._schema.dynamic
            and len(usual) == 3
            and usual.isdisjoint(FIELDS_OF_NODES - {"doc_id"})
            and limits.keys() == usual
            and set(self._columns) == usual | vectors
        )


def key_of(node: BaseNode, key_name: str) -> Any:
    """The primary key that a node's row has, in a collection whose key is called so; None if the node does not say."""
    return node.node_id if key_name == ID_FIELD else node.metadata.get(key_name)
