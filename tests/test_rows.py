"""Rows: what is sent is what upstream would have sent through pymilvus, to the byte."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from llama_index.core.schema import (
    BaseNode,
    Document,
    ImageNode,
    IndexNode,
    MediaResource,
    Node,
    NodeRelationship,
    ObjectType,
    RelatedNodeInfo,
    TextNode,
)
from llama_index.core.vector_stores.utils import metadata_dict_to_node
from llama_index.vector_stores.milvus import MilvusVectorStore
from pymilvus import CollectionSchema, DataType, FieldSchema
from pymilvus.client.blob import vector_float_to_bytes
from pymilvus.client.prepare import Prepare
from pymilvus.grpc_gen import milvus_pb2

from llama_index_milvus_async_ext._milvus import write_request as writes
from llama_index_milvus_async_ext._milvus.errors import SchemaMismatchError
from llama_index_milvus_async_ext._milvus.schema import Row, Schema
from llama_index_milvus_async_ext._milvus.search_request import SearchGroup, search_request
from llama_index_milvus_async_ext._nodes import node_json
from llama_index_milvus_async_ext._nodes.node_json import NodeJson, _c_encoder
from llama_index_milvus_async_ext._nodes.rows import MAX_DYNAMIC_BYTES, RowEncoder
from llama_index_milvus_async_ext._nodes.stored import found_node, stored_node
from llama_index_milvus_async_ext._nodes.vectors import pack, set_embedding
from tests.conftest import examples

DIM = 4


def described(*extra: FieldSchema, text: str = "text", embedding: str = "embedding", **options: Any) -> dict[str, Any]:
    """A collection as upstream makes it, and as Milvus describes it."""
    fields = [
        FieldSchema("id", DataType.VARCHAR, is_primary=True, max_length=65_535),
        FieldSchema("doc_id", DataType.VARCHAR, max_length=65_535),
        FieldSchema(text, DataType.VARCHAR, max_length=65_535),
        *extra,
        FieldSchema(embedding, DataType.FLOAT_VECTOR, dim=DIM),
    ]
    schema = CollectionSchema(fields, enable_dynamic_field=True).to_dict()
    return {**schema, "enable_dynamic_field": True, "update_timestamp": 7, **options}


def encoder(schema: Schema, **changes: Any) -> RowEncoder:
    arguments = {"text_key": "text", "doc_id_field": "doc_id", "embedding_field": "embedding"}
    return RowEncoder(schema, **(arguments | changes))


def upstream_rows(nodes: list[BaseNode]) -> list[dict[str, Any]]:
    """The rows that upstream's own `add` hands to pymilvus."""
    rows: list[dict[str, Any]] = []
    store = SimpleNamespace(
        enable_sparse=False,
        enable_dense=True,
        text_key="text",
        embedding_field="embedding",
        upsert_mode=False,
        batch_size=10_000,
        collection_name="c",
        client=SimpleNamespace(insert=lambda _, batch, partition_name: rows.extend(batch)),
    )
    MilvusVectorStore.add(store, nodes)  # type: ignore[arg-type]
    return rows


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=6,
)
keys = st.text(max_size=8).filter(lambda key: key != "$meta")
related = st.builds(
    RelatedNodeInfo, node_id=st.text(max_size=8), metadata=st.dictionaries(keys, json_values, max_size=2)
)
common: dict[str, Any] = {
    "id_": st.text(max_size=20),
    "embedding": st.lists(st.floats(-(2.0**90), 2.0**90, width=32), min_size=DIM, max_size=DIM),
    "metadata": st.dictionaries(keys, json_values, max_size=4),
    "relationships": st.dictionaries(
        st.sampled_from([NodeRelationship.SOURCE, NodeRelationship.NEXT, NodeRelationship.PREVIOUS]),
        related,
        max_size=3,
    ),
    "excluded_embed_metadata_keys": st.lists(st.text(max_size=5), max_size=2),
}
nodes = st.one_of(
    st.builds(TextNode, text=st.text(), start_char_idx=st.one_of(st.none(), st.integers(0, 9)), **common),
    st.builds(ImageNode, text=st.text(), image=st.one_of(st.none(), st.just("aGk=")), **common),
    st.builds(IndexNode, text=st.text(), index_id=st.text(max_size=5), **common),
    st.builds(lambda text, **rest: Document(text=text, **rest), text=st.text(), **common),
)


@settings(max_examples=examples(300), deadline=None)
@given(st.lists(nodes, min_size=1, max_size=5), st.booleans(), st.sampled_from(["", "part"]))
def test_requests_equal_those_of_upstream_and_pymilvus(batch: list[BaseNode], upsert: bool, partition: str) -> None:
    schema = Schema(described())
    ours = [encoder(schema).encode(node)[0] for node in batch]
    theirs = upstream_rows(batch)
    through_json = [orjson.loads(orjson.dumps(entity)) for entity in theirs]
    assert [row.entity for row in ours] == through_json
    reference = writes._pymilvus_request("c", partition, schema, [Row(entity, b"", None) for entity in theirs], upsert)
    request = writes._columnar_request("c", partition, schema, ours, upsert)
    assert type(reference).FromString(request) == reference
    assert request == reference.SerializeToString(deterministic=True)


class Other(TextNode):
    """Another class, which takes the way through pydantic."""


def of_another_class(node: TextNode) -> TextNode:
    return Other(**dict(node.__dict__))


@example(TextNode(id_="n", metadata={"a": -0.0, "b": 0.0, "c": 0, "d": False, "e": None, "f": ""}), "text")
@example(TextNode(id_="n", metadata={"a": float("nan"), "b": float("inf")}), "text")
@example(TextNode(id_="n", metadata={"a": 2**64, "b": 1e300, "c": '\u2028\x7f\x00"\\/é🌍'}), "content")
@example(TextNode(id_="n", text="", start_char_idx=0, end_char_idx=0, mimetype=""), "text")
@example(TextNode(id_="n", text="own", mimetype="text/other"), "mimetype")
@settings(max_examples=examples(200), deadline=None)
@given(
    st.builds(
        TextNode,
        text=st.text(),
        **common
        | {
            "metadata": st.dictionaries(
                keys, st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()), max_size=4
            )
        },
    ),
    st.sampled_from(["text", "content", "mimetype", "metadata"]),
)
@example(TextNode(id_="n", text="words", metadata={"a": 1.5}, start_char_idx=0, end_char_idx=9), "content")
@example(
    TextNode(
        id_="n",
        text='"words"',
        metadata={"a": 1, "b": None},
        excluded_embed_metadata_keys=["a"],
        excluded_llm_metadata_keys=["b"],
        relationships={
            NodeRelationship.SOURCE: RelatedNodeInfo(node_id="d", node_type=ObjectType.DOCUMENT, metadata={"c": "é"}),
            NodeRelationship.NEXT: RelatedNodeInfo(node_id="m", hash="h"),
        },
        metadata_template="{key}={value}",
        metadata_separator=";",
        mimetype="text/html",
        text_template="{content}",
    ),
    "content",
)
def test_plain_nodes_are_written_as_pydantic_writes_them(node: TextNode, text_key: str) -> None:
    json = NodeJson(text_key)
    assert json.stored(node) == json.stored(of_another_class(node))


alike: list[Any] = [True, 1, 1.0, 0, False, 0.0, -0.0, None, "1", "", [1], [True], {"a": 1}, {"a": True}]
alike_metadata = st.one_of(
    st.permutations(["a", "b"]).flatmap(
        lambda order: st.fixed_dictionaries({k: st.sampled_from(alike) for k in order})
    ),
    st.just({}),
)
alike_relations = st.builds(
    RelatedNodeInfo,
    node_id=st.sampled_from(["d", "e"]),
    node_type=st.sampled_from([None, "4", "custom", *ObjectType]),
    metadata=alike_metadata,
    hash=st.sampled_from([None, "", "h"]),
)


def one_after_the_other(*described: dict[str, Any]) -> list[dict[Any, Any]]:
    return [{NodeRelationship.SOURCE: RelatedNodeInfo(**({"node_id": "d"} | each))} for each in described]


def with_metadata(*values: Any) -> list[dict[Any, Any]]:
    return one_after_the_other(*({"metadata": {"a": value}} for value in values))


# Each way in which two relationships may be equal, or look so, and are yet written otherwise.
@example(with_metadata(0.0, -0.0, 0.0))
@example(with_metadata(0, -0.0))
@example(with_metadata(0, False, 0))
@example(with_metadata(0, 0.0, False))
@example(with_metadata(1, True, 1))
@example(with_metadata(1.0, 1, True))
@example(with_metadata("1", 1))
@example(with_metadata(None, "", None))
@example(with_metadata([1], [True]))
@example(with_metadata({"a": 0.0}, {"a": -0.0}))
@example(one_after_the_other({"metadata": {"a": 1, "b": 2}}, {"metadata": {"b": 2, "a": 1}}))
@example(one_after_the_other({"metadata": {"a": 1, "b": True}}, {"metadata": {"a": True, "b": 1}}))
@example(one_after_the_other({"metadata": {"a": 1}}, {}, {"metadata": {"a": 1}}))
@example(one_after_the_other({"metadata": {"a": 1}}, {"metadata": {"a": 1}, "node_id": "e"}))
@example(one_after_the_other({"node_type": ObjectType.TEXT}, {"node_type": ObjectType.DOCUMENT}, {"node_type": "1"}))
@example(one_after_the_other({"node_type": ObjectType.TEXT}, {"node_type": None}))
@example(one_after_the_other({"hash": None}, {"hash": ""}, {"hash": "h"}))
@example(
    [{NodeRelationship.SOURCE: RelatedNodeInfo(node_id="d")}, {NodeRelationship.NEXT: RelatedNodeInfo(node_id="d")}]
)
@settings(max_examples=examples(300), deadline=None)
@given(
    st.lists(
        st.dictionaries(st.sampled_from([NodeRelationship.SOURCE, NodeRelationship.NEXT]), alike_relations),
        min_size=2,
        max_size=6,
    )
)
def test_a_relationship_that_only_equals_the_one_before_is_written_anew(relationships: list[dict[Any, Any]]) -> None:
    json = NodeJson("text")
    for related_to in relationships:
        node = TextNode(id_="n", text="t", relationships=related_to)
        assert json.stored(node) == json.stored(of_another_class(node))


def test_what_nearly_all_nodes_are_is_written_without_pydantic(monkeypatch: pytest.MonkeyPatch) -> None:
    source = RelatedNodeInfo(node_id="d", node_type=ObjectType.DOCUMENT, metadata={"file": "é.txt", "page": 1})
    nodes = [
        TextNode(id_="n0", text="text"),
        TextNode(id_="n1", text="text", metadata={"a": "x", "b": 1, "c": True, "d": None}),
        TextNode(id_="n2", text="text", metadata={"a": 0.5, "b": 1}, excluded_embed_metadata_keys=["a"]),
        *(TextNode(id_=f"m{n}", text="text", relationships={NodeRelationship.SOURCE: source}) for n in range(9)),
    ]
    odd = TextNode(id_="n3", text="text")
    odd.metadata[None] = "which pydantic writes otherwise"  # type: ignore[index]
    written: list[int] = []

    class CountedMetadata(node_json._Metadata):
        def __init__(self, *arguments: Any) -> None:
            written.append(1)
            super().__init__(*arguments)

    def model_dump(*_: Any, **__: Any) -> Any:
        raise AssertionError("through pydantic")

    monkeypatch.setattr(TextNode, "model_dump", model_dump)
    monkeypatch.setattr(node_json, "_Metadata", CountedMetadata)
    for_all = NodeJson("text")
    for node in nodes:
        for_all.stored(node)
    assert len(written) == 1, "the metadata of a document is written once for all its chunks"
    with pytest.raises(AssertionError, match="through pydantic"):
        for_all.stored(odd)


def test_a_relationship_whose_metadata_is_changed_in_place_is_written_anew() -> None:
    source = RelatedNodeInfo(node_id="d", metadata={"a": 1})
    json = NodeJson("text")
    for value in (1, 2, True):
        source.metadata["a"] = value
        written, _, _ = json.stored(TextNode(id_="n", relationships={NodeRelationship.SOURCE: source}))
        [stored] = orjson.loads(written)["relationships"].values()
        assert stored["metadata"]["a"] is value


def test_a_node_that_is_refused_leaves_nothing_to_the_next() -> None:
    """What nodes have in common is remembered: never by halves."""
    encode = encoder(Schema(described())).encode

    def chunk(value: str, **source: Any) -> TextNode:
        about = RelatedNodeInfo(node_id="d1", metadata={"v": value})
        for name, wrong in source.items():
            about.__dict__[name] = wrong
        return TextNode(id_="n", text="t", embedding=[0.1] * DIM, relationships={NodeRelationship.SOURCE: about})

    encode(chunk("old"))
    with pytest.raises(ValueError):
        encode(chunk("new", node_id=7))
    content = orjson.loads(orjson.loads(encode(chunk("new"))[0].dynamic)["_node_content"])
    assert content["relationships"]["1"]["metadata"] == {"v": "new"}
    broken = chunk("new")
    broken.__dict__["text_template"] = None
    for _ in range(2):
        with pytest.raises(ValueError, match="node 'n'"):
            encode(broken)
    without = TextNode.model_construct(**{**vars(chunk("new")), "metadata": None})
    with pytest.raises(ValueError, match="node 'n'"):
        encode(without)


@settings(max_examples=examples(200), deadline=None)
@given(st.lists(nodes, min_size=1, max_size=6), st.sampled_from([None, b'{"version":"v"}']))
def test_the_quick_way_writes_what_the_long_way_writes(batch: list[BaseNode], record: bytes | None) -> None:
    quick, long = encoder(Schema(described())), encoder(Schema(described()))
    long._is_usual = False
    assert quick._is_usual
    for node in batch:
        assert quick.encode(node, record=record) == long.encode(node, record=record)


def test_the_encoder_that_is_made_once_writes_as_json_does(monkeypatch: pytest.MonkeyPatch) -> None:
    if getattr(json.encoder, "c_make_encoder", None) is None:
        pytest.skip("this Python has no encoder in C")
    write = _c_encoder()
    for value in ({"b": [1, 2.5, None, True, 'é "\\'], "a": {}, "1": float("nan")}, [], [[], {"x": "y"}]):
        assert "".join(write(value, 0)) == json.dumps(value, ensure_ascii=False)
    for wrong, says in (({"a": object()}, "^object is not JSON"), ({(1, 2): 3}, "keys must be str")):
        with pytest.raises(TypeError, match=says):
            write(wrong, 0)
    monkeypatch.setattr(json.encoder, "c_make_encoder", None)
    assert _c_encoder() is None


@settings(max_examples=examples(50), deadline=None)
@given(st.lists(nodes, min_size=1, max_size=3), st.data())
def test_scalar_and_sparse_columns_are_encoded_as_pymilvus_does(batch: list[BaseNode], data: st.DataObject) -> None:
    schema = Schema(
        described(
            FieldSchema("year", DataType.INT32),
            FieldSchema("score", DataType.DOUBLE),
            FieldSchema("kind", DataType.VARCHAR, max_length=100),
            FieldSchema("flag", DataType.BOOL),
            FieldSchema("sparse", DataType.SPARSE_FLOAT_VECTOR),
        )
    )
    for node in batch:
        node.metadata |= {
            "year": data.draw(st.integers(-(2**31), 2**31 - 1)),
            "score": data.draw(st.floats(allow_nan=False, allow_infinity=False)),
            "kind": data.draw(st.text(max_size=20)),
            "flag": data.draw(st.booleans()),
        }
    sparse = {1: 0.5, 70: 0.25}
    rows = [encoder(schema, sparse_field="sparse").encode(node, sparse)[0] for node in batch]
    request = writes.write_request("c", "", schema, rows, upsert=True)
    assert schema.fast, "the quick way is taken"
    assert milvus_pb2.UpsertRequest.FromString(request) == writes._pymilvus_request("c", "", schema, rows, True)


def test_the_size_of_a_row_has_its_numbers_in_it() -> None:
    plain = TextNode(id_="a", text="text", embedding=[0.5] * DIM)
    with_number = TextNode(id_="a", text="text", embedding=[0.5] * DIM, metadata={"year": 1_999})
    schema = Schema(described(FieldSchema("sparse", DataType.SPARSE_FLOAT_VECTOR)))
    sizes = [encoder(schema, sparse_field="sparse").encode(plain, sparse)[1] for sparse in ({}, {1: 0.5, 70_000: 0.5})]
    assert sizes[1] - sizes[0] == 2 * (4 + 4), "an index and a value each"
    row, nbytes = encoder(Schema(described(FieldSchema("year", DataType.INT64)))).encode(with_number)
    assert nbytes == len("a") + len("None") + len("text") + 8 + len(row.dynamic) + 4 * DIM


def test_a_schema_that_the_encoder_does_not_know_goes_through_pymilvus() -> None:
    nullable = described(FieldSchema("maybe", DataType.INT64, nullable=True))
    schema = Schema(nullable)
    assert schema.fast is False
    row, _ = encoder(schema).encode(a_node())
    request = writes.write_request("c", "", schema, [row], True)
    assert milvus_pb2.UpsertRequest.FromString(request) == writes._pymilvus_request("c", "", schema, [row], True)


def test_an_encoder_that_differs_from_pymilvus_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    schema = Schema(described())
    monkeypatch.setattr(writes, "DYNAMIC_FIELD", "$other")
    row, _ = encoder(schema).encode(a_node())
    request = writes.write_request("c", "", schema, [row], True)
    assert schema.fast is False
    assert request == writes._pymilvus_request("c", "", schema, [row], True).SerializeToString()


def a_node(**changes: Any) -> TextNode:
    return TextNode(**({"id_": "n1", "text": "text", "embedding": [0.1] * DIM} | changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"embedding": None}, "no embedding"),
        ({"embedding": [0.1] * 3}, "3 dimensions, the collection has 4"),
        ({"embedding": [0.1, float("nan"), 0.1, 0.1]}, "NaN or infinity"),
        ({"embedding": [0.1, float("-inf"), 0.1, 0.1]}, "NaN or infinity"),
        ({"embedding": [1e39, 0.1, 0.1, 0.1]}, "float32"),
        ({"text": "é" * 32_768}, "65536 bytes in UTF-8"),
        ({"id_": "é" * 40_000}, "80000 bytes in UTF-8"),
        ({"text": "\ud800"}, "node 'n1'"),
        ({"metadata": {"big": "x" * 40_000}}, "65536"),
        ({"metadata": {"x": object()}}, "check its metadata"),
        ({"metadata": {"x": 2**70}}, "JSON"),
        ({"metadata": {"$meta": 1}}, "$meta"),
    ],
)
def test_a_bad_node_is_named_with_what_is_wrong(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match="can't be stored") as refused:
        encoder(Schema(described())).encode(a_node(**changes))
    assert says in str(refused.value)
    assert len(str(refused.value)) < 400
    assert "None" not in str(refused.value), "neither a problem nor a remedy is left out"
    # Whether the collection, if it is another by now, may take it.
    assert isinstance(refused.value, SchemaMismatchError) == ("dimensions" in says or "UTF-8" in says)


@pytest.mark.parametrize("embedding", [(number for number in [0.1] * DIM), np.array(0.1, "float32"), 0.1])
def test_an_embedding_without_a_length_is_named(embedding: Any) -> None:
    node = a_node()
    node.__dict__["embedding"] = embedding
    says = f"node 'n1' can't be stored: its embedding is no list of numbers, but {type(embedding).__name__}; check"
    with pytest.raises(ValueError, match=says):
        encoder(Schema(described())).encode(node)


INTEGERS = {DataType.INT8: 7, DataType.INT16: 15, DataType.INT32: 31, DataType.INT64: 63}
MOST_FLOAT = float(np.finfo(np.float32).max)
TAKEN: dict[DataType, list[Any]] = {
    **{kind: [2**bits - 1, -(2**bits), 0] for kind, bits in INTEGERS.items()},
    DataType.BOOL: [True, False, 1, 0],
    DataType.FLOAT: [MOST_FLOAT, -MOST_FLOAT, 0.5, 7, 2**63, True, False],
    DataType.DOUBLE: [1e308, -1e308, 0.5, 7, 2**63, True, False],
    DataType.VARCHAR: ["", "é" * 4, "x" * 9],
}
REFUSED: dict[DataType, list[tuple[Any, str]]] = {
    **{
        kind: [(2**bits, "too large"), (-(2**bits) - 1, "too large"), (1.0, "float"), (True, "bool"), ("1", "str")]
        for kind, bits in INTEGERS.items()
    },
    DataType.BOOL: [(2, "BOOL .* is 2"), (-1, "is -1"), (1.0, "float"), ("true", "str")],
    DataType.FLOAT: [(1e39, "too large"), (-1e39, "too large"), (10**400, "too large"), ("1", "str")],
    DataType.DOUBLE: [(10**400, "too large"), (-(10**400), "too large"), ("1", "str")],
    DataType.VARCHAR: [("é" * 4 + "xx", "10 bytes"), ("x" * 10, "10 bytes"), (1, "int"), (True, "bool")],
}


def column_of(kind: DataType) -> Schema:
    return Schema(described(FieldSchema("value", kind, **({"max_length": 9} if kind == DataType.VARCHAR else {}))))


@pytest.mark.parametrize("kind", TAKEN, ids=lambda kind: kind.name)
def test_what_a_column_just_takes_is_sent_as_it_is(kind: DataType) -> None:
    schema, values = column_of(kind), TAKEN[kind]
    rows = [encoder(schema).encode(a_node(metadata={"value": value}))[0] for value in values]
    request = milvus_pb2.UpsertRequest.FromString(writes.write_request("c", "", schema, rows, True))
    assert schema.fast
    (column,) = (field for field in request.fields_data if field.field_name == "value")
    assert list(getattr(column.scalars, column.scalars.WhichOneof("data")).data) == values
    assert not any("value" in orjson.loads(row.dynamic) for row in rows)


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.name)
def test_a_value_that_its_column_does_not_take_is_named(kind: DataType) -> None:
    for value, says in REFUSED[kind]:
        with pytest.raises(SchemaMismatchError, match=f"node 'n1' .*'value'.*{says}") as refused:
            encoder(column_of(kind)).encode(a_node(metadata={"value": value}))
        assert kind.name in str(refused.value) or "UTF-8" in str(refused.value)
        assert len(str(refused.value)) < 400


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), np.float64("nan")])
@pytest.mark.parametrize("kind", [DataType.FLOAT, DataType.DOUBLE, DataType.INT32, DataType.VARCHAR])
def test_a_value_that_is_no_number_is_named_as_what_it_is(kind: DataType, value: Any) -> None:
    with pytest.raises(SchemaMismatchError, match=rf"its 'value' is {value}, which a {kind.name} column does not take"):
        encoder(column_of(kind)).encode(a_node(metadata={"value": value}))


@pytest.mark.parametrize("metadata", [{}, {"value": None}])
def test_a_column_without_a_value_is_named(metadata: dict[str, Any]) -> None:
    for kind in TAKEN:
        with pytest.raises(SchemaMismatchError, match=r"no 'value'.*set metadata\['value'\]"):
            encoder(column_of(kind)).encode(a_node(metadata=metadata))


@pytest.mark.parametrize("column", ["id_", "text", "doc_id"])
@pytest.mark.parametrize(("fits", "too_long"), [("é" * 32_767 + "x", "é" * 32_768), ("x" * 65_535, "x" * 65_536)])
def test_texts_are_measured_in_bytes(column: str, fits: str, too_long: str) -> None:
    encode = encoder(Schema(described())).encode

    def node_with(text: str) -> TextNode:
        if column != "doc_id":
            return a_node(**{column: text})
        return a_node(relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=text)})

    name = column.rstrip("_")
    assert len(fits.encode()) == 65_535
    # An id stands in the dynamic fields too, which take no more.
    if column == "text":
        row, _ = encode(node_with(fits))
        assert row.columns[name] == fits
    else:
        with pytest.raises(ValueError, match="metadata and relationships take"):
            encode(node_with(fits))
    with pytest.raises(SchemaMismatchError, match=f"its '{name}' has 65536 bytes in UTF-8, and the column takes 65535"):
        encode(node_with(too_long))


@pytest.mark.parametrize(
    ("value", "says"), [(None, "set metadata"), ("x", "INT32"), (True, "INT32"), (2**40, "too large")]
)
def test_what_is_wrong_with_a_value_is_said_with_a_remedy(value: Any, says: str) -> None:
    schema = Schema(described(FieldSchema("year", DataType.INT32)))
    metadata = {} if value is None else {"year": value}
    with pytest.raises(SchemaMismatchError, match=says) as refused:
        encoder(schema).encode(a_node(metadata=metadata))
    assert "None" not in str(refused.value)


def test_a_column_that_may_be_empty_needs_no_value() -> None:
    may_be_empty = FieldSchema("a", DataType.INT64, nullable=True), FieldSchema("b", DataType.INT64, default_value=5)
    row, _ = encoder(Schema(described(*may_be_empty))).encode(a_node())
    assert not {"a", "b"}.intersection(row.columns)


def test_the_document_of_a_node_stands_in_the_stores_own_column_too() -> None:
    node = a_node(relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id="d")})
    for name in ("doc_id", "document"):
        row, _ = encoder(Schema(described()), doc_id_field=name).encode(node)
        for key in ("doc_id", "document_id", "ref_doc_id", name):
            assert row.entity[key] == "d"


def test_a_column_that_milvus_fills_is_not_for_metadata() -> None:
    filled = {"name": "bm25", "type": DataType.SPARSE_FLOAT_VECTOR, "is_function_output": True}
    schema = described()
    schema["fields"].append(filled)
    encode = encoder(Schema(schema)).encode
    encode(a_node())
    says = r"node 'n1' .* its metadata has the key 'bm25', which Milvus fills itself; rename the key$"
    with pytest.raises(SchemaMismatchError, match=says):
        encode(a_node(metadata={"bm25": 1}))


def test_without_dynamic_fields_all_of_a_row_is_columns() -> None:
    row, _ = encoder(Schema(described(enable_dynamic_field=False))).encode(a_node(metadata={"a": 1}))
    assert row.dynamic == b"" and row.columns["a"] == 1 and row.columns["text"] == "text"


def test_the_size_of_a_row_is_that_of_its_values() -> None:
    columns = FieldSchema("year", DataType.INT32), FieldSchema("kind", DataType.VARCHAR, max_length=100)
    schema = Schema(described(*columns, FieldSchema("sparse", DataType.SPARSE_FLOAT_VECTOR)))
    for text in ("text", "é" * 9):
        node = a_node(text=text, metadata={"year": 1999, "kind": "é" * 5})
        row, size = encoder(schema, sparse_field="sparse").encode(node, {1: 0.5, 2: 0.5})
        texts = len(text.encode()) + len("n1") + len("None") + 10
        assert size == texts + 8 + len(row.dynamic) + 4 * DIM + 2 * 8
        assert row.columns["sparse"] == {1: 0.5, 2: 0.5} and row.columns["embedding"] == node.embedding
    without_vectors, size = encoder(Schema(described()), embedding_field=None).encode(a_node(embedding=None))
    assert without_vectors.vector is None and size == len("n1textNone") + len(without_vectors.dynamic)


@pytest.mark.parametrize(
    ("key", "upsert", "says"),
    [
        (FieldSchema("id", DataType.INT64, is_primary=True), False, "id is a text, and .* 'id' is of type INT64"),
        (FieldSchema("id", DataType.INT64, is_primary=True, auto_id=True), False, "makes its primary keys"),
        (FieldSchema("pk", DataType.INT64, is_primary=True, auto_id=True), True, "makes its primary keys"),
        (FieldSchema("pk", DataType.INT64, is_primary=True), True, "no 'pk', which is the primary key"),
    ],
)
def test_a_primary_key_that_no_node_can_have_is_named(key: FieldSchema, upsert: bool, says: str) -> None:
    fields = [key, FieldSchema("embedding", DataType.FLOAT_VECTOR, dim=DIM)]
    schema = Schema(CollectionSchema(fields, enable_dynamic_field=True).to_dict())
    with pytest.raises(SchemaMismatchError, match=says):
        encoder(schema, upsert=upsert).encode(a_node())


def test_a_key_of_another_name_is_taken_from_the_metadata_as_upstream_does() -> None:
    fields = [
        FieldSchema("pk", DataType.INT64, is_primary=True),
        FieldSchema("embedding", DataType.FLOAT_VECTOR, dim=DIM),
    ]
    schema = Schema(CollectionSchema(fields, enable_dynamic_field=True).to_dict())
    row, _ = encoder(schema).encode(a_node(metadata={"pk": 17}))
    assert row.columns["pk"] == 17


@example([3.4028234e38, -3.4028234e38, 1.7014118e38, 0.0])  # as large as numbers get: those are looked at
@example([3.5e38, 0.0, 0.0, 0.0])
@example([0.0, 0.0, 0.0, -3.5e38])
@example([1e39, 0.0, 0.0, 0.0])
@example([0.0, float("nan"), 0.0, 0.0])
@example([0.0, 0.0, float("inf"), 0.0])
@example([-0.0, 5e-324, 1e-45, -float("inf")])
@example([-0.0, 5e-324, 1e-45, 1e-38])
@settings(max_examples=examples(200), deadline=None)
@given(st.lists(st.floats(width=64), min_size=DIM, max_size=DIM))
def test_vectors_are_packed_as_pymilvus_packs_them_or_refused(vector: list[float]) -> None:
    with np.errstate(over="ignore"):
        fits = bool(np.isfinite(np.array(vector).astype(np.float32)).all())
    if fits:
        assert pack(vector) == vector_float_to_bytes(vector)
    else:
        problem = "does not fit float32" if np.isfinite(vector).all() else "NaN or infinity"
        with pytest.raises(ValueError, match=problem):
            pack(vector)


@given(
    st.sampled_from([TextNode, Document, ImageNode, Node]),
    st.lists(st.floats(allow_nan=False), max_size=5) | st.lists(st.integers(-9, 9), max_size=5),
    st.sampled_from([list, tuple, np.array]),
)
def test_a_node_is_given_its_embedding_as_by_assignment(kind: Any, numbers: list[float], of: Any) -> None:
    assigned, given_ = kind(id_="n"), kind(id_="n")
    embedding = of(numbers)
    try:
        assigned.embedding = embedding
    except ValueError:
        with pytest.raises(ValueError):
            set_embedding(given_, embedding)
        return
    set_embedding(given_, embedding)
    assert given_.embedding == assigned.embedding
    assert [*map(type, given_.embedding or ())] == [*map(type, assigned.embedding or ())]
    assert given_.embedding is not embedding, "the node's own"
    assert given_.model_fields_set == assigned.model_fields_set
    assert given_.model_dump() == assigned.model_dump()


vectors = st.lists(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=DIM, max_size=DIM),
    min_size=1,
    max_size=4,
)


@settings(max_examples=examples(50), deadline=None)
@given(vectors, st.integers(1, 100), st.sampled_from(["", 'color == "red"']))
def test_search_requests_equal_those_of_pymilvus(queries: list[list[float]], limit: int, expression: str) -> None:
    group = SearchGroup(
        collection="c",
        field_name="embedding",
        limit=limit,
        expression=expression,
        output_fields=("text", "_node_content"),
        search_params=orjson.dumps({"metric_type": "IP", "params": {"ef": 10}}),
    )
    request = search_request(group, [pack(query) for query in queries], session_timestamp=5)
    assert request == Prepare.search_requests_with_expr(
        collection_name="c",
        data=queries,
        anns_field="embedding",
        param={"metric_type": "IP", "params": {"ef": 10}},
        limit=limit,
        expr=expression,
        output_fields=["text", "_node_content"],
        guarantee_timestamp=5,
    )


def test_limits_are_exact() -> None:
    encode = encoder(Schema(described())).encode
    encode(a_node(text="x" * 65_535))
    _, size = encode(a_node(metadata={"m": ""}))
    fits = (MAX_DYNAMIC_BYTES - len(encode(a_node(metadata={"m": ""}))[0].dynamic)) // 2
    assert len(encode(a_node(metadata={"m": "x" * fits}))[0].dynamic) in (MAX_DYNAMIC_BYTES, MAX_DYNAMIC_BYTES - 1)
    with pytest.raises(ValueError):
        encode(a_node(metadata={"m": "x" * (fits + 1)}))
    assert size > 4 * DIM


def test_a_multimodal_node_is_stored_with_its_text() -> None:
    node = Node(id_="m", text_resource=MediaResource(text="words"), embedding=[0.1] * DIM)
    row, _ = encoder(Schema(described())).encode(node)
    assert row.entity["text"] == "words"
    assert row.entity["_node_type"] == "Node"


@settings(max_examples=examples(200), deadline=None)
@given(nodes)
def test_stored_nodes_are_built_as_upstream_builds_them(node: BaseNode) -> None:
    row, _ = encoder(Schema(described())).encode(node)
    stored = orjson.loads(row.dynamic)
    entity = {"text": row.entity["text"], **{key: stored[key] for key in ("_node_content", "_node_type")}}
    store: Any = SimpleNamespace(output_fields=[], text_key="text")
    reference = metadata_dict_to_node(stored)
    reference.set_content(row.entity["text"])
    built = found_node(store, node.node_id, entity)
    assert type(built) is type(reference)
    assert built.model_dump() == reference.model_dump() or "nan" in str(reference).lower()


def reader(**changes: Any) -> Any:
    settings: dict[str, Any] = {"output_fields": [], "text_key": "text", "embedding_field": "vector"}
    return SimpleNamespace(**settings | {"collection_name": "c"} | changes)


@settings(max_examples=examples(50), deadline=None)
@given(nodes)
def test_rows_that_are_looked_up_become_nodes_as_with_upstream(node: BaseNode) -> None:
    row, _ = encoder(Schema(described())).encode(node)
    item = {**row.entity, "vector": np.array(node.embedding)}
    built, reference = stored_node(reader(), item), metadata_dict_to_node(item, text=row.entity["text"])
    assert type(built) is type(reference)
    assert built.embedding == list(item["vector"]) and type(built.embedding) is list
    built.embedding = reference.embedding
    assert built.model_dump() == reference.model_dump() or "nan" in str(reference).lower()
    del item["vector"]
    assert stored_node(reader(), item).embedding is None


def test_a_hit_brings_the_fields_that_were_asked_for_as_its_metadata() -> None:
    foreign = {"text": "words", "year": 5, "size": 6}
    found = found_node(reader(output_fields=["year", "text", "none"]), 17, foreign)
    assert type(found) is TextNode and (found.node_id, found.get_content()) == ("17", "words")
    assert found.metadata == {"year": 5, "text": "words", "none": None}
    assert found_node(reader(), 17, {"year": 5}).get_content() == ""
    row, _ = encoder(Schema(described())).encode(IndexNode(id_="n", text="words", index_id="i", embedding=[0.1] * DIM))
    written = {key: row.entity[key] for key in ("_node_content", "_node_type")}
    for asked_for in ([], ["_node_content"]):
        own = found_node(reader(output_fields=asked_for), "n", written)
        assert type(own) is IndexNode and own.node_id == "n" and own.get_content() == "", "its text was not asked for"
    plain, _ = encoder(Schema(described())).encode(a_node(metadata={"a": 1}))
    written = {key: plain.entity[key] for key in ("_node_content", "_node_type")}
    bare = found_node(reader(), "n1", written)
    assert (bare.node_id, bare.metadata, bare.get_content()) == ("n1", {"a": 1}, "")


def test_a_row_of_something_else_becomes_a_node_if_it_has_a_text() -> None:
    row = {"pk": 17, "id": 18, "text": "words", "year": 5, "vector": [0.5, 0.25]}
    found = stored_node(reader(output_fields=["year", "none"]), row, "pk")
    assert (found.node_id, found.get_content(), found.embedding) == ("17", "words", [0.5, 0.25])
    assert found.metadata == {"year": 5, "none": None}
    assert stored_node(reader(), row).node_id == "18"
    for textless in ({**row, "text": ""}, {"pk": 17}):
        with pytest.raises(
            ValueError, match=r"^row 17 of collection 'c' holds neither a node nor a text in column 'text'"
        ):
            stored_node(reader(), textless, "pk")
