"""The JSON that stores a node: what upstream makes of it, without ever serialising the embedding.

Plain text nodes, which nearly all are, are written without pydantic, in half the time. A node of another class, with
metadata that is more than plain values, or of a llama-index-core whose nodes have other fields, goes through pydantic.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from json.encoder import encode_basestring as _string
from operator import itemgetter
from typing import Any, NamedTuple

import orjson
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

_TEMPLATES_OF = itemgetter("metadata_template", "metadata_separator", "mimetype", "text_template")

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
        # What most nodes have in common with the one before is written once.
        self._source: _Source | None = None
        self._excluded: tuple[tuple[list[str], ...], str] | None = None
        self._templates: _Templates | None = None

    def stored(self, node: BaseNode) -> tuple[str, dict[str, Any], str]:
        """What is stored of a node.

        Returns:
            The node as JSON without text and embedding, its metadata as JSON values (a dict of its own), and its text.

        Raises:
            ValueError, TypeError, RecursionError: It can't be written as JSON.
        """
        plain = self.plain(node)
        if plain is not None:
            return plain[0], dict(node.metadata), node.__dict__["text"]
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

    def plain(self, node: BaseNode) -> tuple[str, bytes | None] | None:
        """What pydantic would dump of a text node, but for its text and embedding; None if that takes pydantic.

        Beside it stands its metadata as orjson writes it, if that is known.

        Raises:
            ValueError, TypeError: As `stored`.
        """
        if not self._knows_text_nodes or type(node) is not TextNode:
            return None
        fields = node.__dict__
        metadata = fields["metadata"]
        of_before = self._source
        is_known = of_before is not None and of_before.metadata.is_of(metadata)
        if not (is_known or _is_plain(metadata)):
            return None
        excluded = self._excluded_keys(fields["excluded_embed_metadata_keys"], fields["excluded_llm_metadata_keys"])
        if excluded is None:
            return None
        relations = []
        for kind, relation in fields["relationships"].items():
            if type(relation) is not RelatedNodeInfo or type(kind) is not NodeRelationship:
                return None
            relation_json = self._relation(kind, relation.__dict__)
            if relation_json is None:
                return None
            relations.append(relation_json)
        source = self._source
        if source is not of_before:
            is_known = source is not None and source.metadata.is_of(metadata)
        written, dumped = (source.metadata.written, source.metadata.dumped) if source and is_known else (None, None)
        templates = self._around_text(_TEMPLATES_OF(fields))
        text = _string(fields["text"]) if self._with_text else '""'
        start, end = fields["start_char_idx"], fields["end_char_idx"]
        # Put together by hand: one call of the encoder for a dict of all this takes three times as long.
        content = (
            f'{{"id_": {_string(fields["id_"])}, "embedding": null, "metadata": {written or _json(metadata)}, '
            f"{excluded}{{{', '.join(relations)}}}, {templates.before_text}{text}{templates.after_text}"
            f'{"null" if start is None else _json(start)}, "end_char_idx": {"null" if end is None else _json(end)}'
            f"{templates.end}"
        )
        return content, dumped

    # What is remembered is put in its place once it is complete: no node can leave half of it for the next.

    def _excluded_keys(self, *keys: list[str]) -> str | None:
        """The lists of excluded keys as they are written; None if that takes pydantic."""
        known = self._excluded
        if known is None or known[0] != keys:
            if not all(type(of) is list and _STRING.issuperset(map(type, of)) for of in keys):
                return None
            written = (
                f'"excluded_embed_metadata_keys": {_json(keys[0])}, "excluded_llm_metadata_keys": {_json(keys[1])}, '
                '"relationships": '
            )
            known = self._excluded = (tuple([*of] for of in keys), written)
        return known[1]

    def _around_text(self, templates: tuple[str, ...]) -> _Templates:
        known = self._templates
        if known is None or known.values != templates:
            known = self._templates = _Templates(templates)
        return known

    def _relation(self, kind: NodeRelationship, about: Mapping[str, Any]) -> str | None:
        """A relationship as it is written; None if that takes pydantic."""
        source, metadata = self._source, about["metadata"]
        is_known = source is not None and source.metadata.is_of(metadata)
        if not (is_known or _is_plain(metadata)):
            return None
        key = node_id, node_type, hash_ = about["node_id"], about["node_type"], about["hash"]
        if kind is NodeRelationship.SOURCE and source is not None and is_known and key == source.key:
            return source.written
        known = source.metadata if source is not None and is_known else None
        if kind is NodeRelationship.SOURCE and known is None:
            known = _Metadata(metadata)
        written = (
            f'"{kind._value_}": {{"node_id": {_string(node_id)}, '
            f'"node_type": {_json(node_type._value_ if type(node_type) is ObjectType else node_type)}, '
            f'"metadata": {known.written if known is not None else _json(metadata)}, '
            f'"hash": {_json(hash_)}, "class_name": "RelatedNodeInfo"}}'
        )
        if kind is NodeRelationship.SOURCE and known is not None:
            self._source = _Source(known, key, written)
        return written


class _Templates:
    """What stands around a node's text, of its templates."""

    __slots__ = ("after_text", "before_text", "end", "values")

    def __init__(self, values: tuple[str, ...]) -> None:
        metadata_template, separator, mimetype, text_template = map(_string, values)
        self.values = values
        self.before_text = f'"metadata_template": {metadata_template}, "metadata_separator": {separator}, "text": '
        self.after_text = f', "mimetype": {mimetype}, "start_char_idx": '
        self.end = f', "text_template": {text_template}, "class_name": "TextNode"}}'


class _Source(NamedTuple):
    """The document of the last node, as the relationship was written."""

    metadata: _Metadata
    key: tuple[Any, ...]
    written: str


class _Metadata:
    """Metadata of plain values, as it was last written.

    Attributes:
        written: As `json` writes it, in the JSON of a node.
        dumped: As orjson writes it, in a row's dynamic fields; None if it can't.
    """

    __slots__ = ("_keys", "_types", "_values", "dumped", "written")

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        # What is equal may yet be written otherwise: True and 1, keys in another order, 0.0 and -0.0. The types
        # of those two are equal as well: with a float in it, none is taken for the same.
        self._keys = [*metadata]
        self._types = [*map(type, metadata.values())]
        self._values = None if float in self._types else dict(metadata)
        self.written = _json(metadata)
        self.dumped: bytes | None = None
        with contextlib.suppress(TypeError):
            self.dumped = orjson.dumps(metadata)

    def is_of(self, metadata: Mapping[str, Any]) -> bool:
        """Whether this is what would be written of another one, too."""
        return metadata == self._values and [*map(type, metadata.values())] == self._types and [*metadata] == self._keys


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
