"""The JSON that stores a node: what upstream makes of it, without ever serialising the embedding.

Plain text nodes, which nearly all are, are written without pydantic, in half the time. A node of another class, with
metadata that is more than plain values, or of a llama-index-core whose nodes have other fields, goes through pydantic.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from json.encoder import encode_basestring as _string
from typing import Any

from llama_index.core.schema import BaseNode, NodeRelationship, ObjectType, RelatedNodeInfo, TextNode

# In the order in which pydantic dumps them.
_TEXT_NODE_FIELDS = (
    *("id_", "embedding", "metadata", "excluded_embed_metadata_keys", "excluded_llm_metadata_keys", "relationships"),
    *("metadata_template", "metadata_separator"),
    *("text", "mimetype", "start_char_idx", "end_char_idx", "text_template"),
)
_OTHER_KEYS = frozenset({*_TEXT_NODE_FIELDS, "class_name"} - {"text"})
_RELATION_FIELDS = ("node_id", "node_type", "metadata", "hash")
_PLAIN_TYPES = frozenset({str, int, bool, type(None)})
_STRING = frozenset({str})

_encode = json.JSONEncoder(ensure_ascii=False).encode
_OF_FALSE = {type(None): "null", list: "[]", dict: "{}"}  # what most nodes have in some fields


def _c_encoder() -> Any:
    """The encoder behind `json.dumps(..., ensure_ascii=False)`, made once instead of at each call; None without C."""
    make = getattr(json.encoder, "c_make_encoder", None)
    if make is None:
        return None

    def refuse(value: object) -> Any:
        raise TypeError(f"{type(value).__name__} is not JSON")

    return make(None, refuse, _string, None, ": ", ", ", False, False, True)


_write = _c_encoder()
_knows_text_nodes = (
    _write is not None
    and tuple(TextNode.model_fields) == _TEXT_NODE_FIELDS
    and tuple(RelatedNodeInfo.model_fields) == _RELATION_FIELDS
)


class NodeJson:
    """Writes the nodes of one collection.

        content, metadata, text = NodeJson("text").stored(node)

    Args:
        text_key: The column that holds the text, which is left out of the JSON.
    """

    def __init__(self, text_key: str) -> None:
        self._text_key = text_key
        self._with_text = text_key != "text"
        self._knows_text_nodes = _knows_text_nodes and text_key not in _OTHER_KEYS
        self._recent: dict[NodeRelationship, _Relation] = {}

    def stored(self, node: BaseNode) -> tuple[str, dict[str, Any], str]:
        """What is stored of a node.

        Returns:
            The node as JSON without text and embedding, its metadata as JSON values (a dict of its own), and its text.

        Raises:
            ValueError, TypeError, RecursionError: It can't be written as JSON.
        """
        if self._knows_text_nodes and type(node) is TextNode:
            written = self._plain_content(node)
            if written is not None:
                return written, dict(node.metadata), node.text
        dumped = node.model_dump(mode="json", exclude={"embedding"})
        metadata = dumped.get("metadata", {})
        text = dumped.get("text")
        if text is None:
            text = node.get_content()
        content = {"id_": dumped.pop("id_"), "embedding": None, **dumped}
        if self._text_key in content:
            content[self._text_key] = ""
        content.pop("text_resource", None)
        return _encode(content), metadata, text

    def _plain_content(self, node: TextNode) -> str | None:
        """What pydantic would dump of a text node, but for its embedding; None if that takes pydantic."""
        fields = node.__dict__
        metadata = fields["metadata"]
        excluded = fields["excluded_embed_metadata_keys"], fields["excluded_llm_metadata_keys"]
        if not _is_plain(metadata):
            return None
        for keys in excluded:
            if keys and not _STRING.issuperset(map(type, keys)):
                return None
        relations = []
        for kind, relation in fields["relationships"].items():
            if type(relation) is not RelatedNodeInfo or type(kind) is not NodeRelationship:
                return None
            # The chunks of a document come one after the other, and name the same source: it is written once.
            recent = self._recent.get(kind)
            if recent is None or not recent.is_of(relation.__dict__):
                if not _is_plain(relation.__dict__["metadata"]):
                    return None
                recent = self._recent[kind] = _Relation(kind, relation.__dict__)
            relations.append(recent.written)
        # Put together by hand: one call of the encoder for a dict of all this takes twice as long.
        return (
            f'{{"id_": {_string(fields["id_"])}, "embedding": null, "metadata": {_json(metadata)}, '
            f'"excluded_embed_metadata_keys": {_json(excluded[0])}, '
            f'"excluded_llm_metadata_keys": {_json(excluded[1])}, "relationships": {{{", ".join(relations)}}}, '
            f'"metadata_template": {_string(fields["metadata_template"])}, '
            f'"metadata_separator": {_string(fields["metadata_separator"])}, '
            f'"text": {_string(fields["text"] if self._with_text else "")}, "mimetype": {_string(fields["mimetype"])}, '
            f'"start_char_idx": {_json(fields["start_char_idx"])}, "end_char_idx": {_json(fields["end_char_idx"])}, '
            f'"text_template": {_string(fields["text_template"])}, "class_name": "TextNode"}}'
        )


class _Relation:
    """A relationship as it was last written."""

    __slots__ = ("_about", "_keys", "_types", "written")

    def __init__(self, kind: NodeRelationship, about: Mapping[str, Any]) -> None:
        metadata = about["metadata"]
        node_type = about["node_type"]
        # What is equal may yet be written otherwise: True and 1, keys in another order, 0.0 and -0.0. The types
        # of those two are equal as well: with a float in it, none is taken for the same.
        self._keys = [*metadata]
        self._types = [*map(type, metadata.values())]
        self._about = None if float in self._types else {**about, "metadata": dict(metadata)}
        self.written = (
            f'"{kind._value_}": {{"node_id": {_string(about["node_id"])}, '
            f'"node_type": {_json(node_type._value_ if type(node_type) is ObjectType else node_type)}, '
            f'"metadata": {_json(metadata)}, "hash": {_json(about["hash"])}, "class_name": "RelatedNodeInfo"}}'
        )

    def is_of(self, about: Mapping[str, Any]) -> bool:
        """Whether this is what would be written of another one, too."""
        if about != self._about:
            return False
        metadata = about["metadata"]
        return [*map(type, metadata.values())] == self._types and [*metadata] == self._keys


def _json(value: Any) -> str:
    """A value of one of JSON's own types, as `json.dumps(value, ensure_ascii=False)`."""
    return "".join(_write(value, 0)) if value else _OF_FALSE.get(type(value)) or _encode(value)


def _is_plain(metadata: Mapping[Any, Any]) -> bool:
    """Whether pydantic's JSON mode leaves the values as they are."""
    if not _STRING.issuperset(map(type, metadata)):
        return False
    values = metadata.values()
    if _PLAIN_TYPES.issuperset(map(type, values)):
        return True
    return all(type(value) in _PLAIN_TYPES or (type(value) is float and math.isfinite(value)) for value in values)
