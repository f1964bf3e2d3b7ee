"""Collections that the store makes from the user's own schema, and what such a schema must have."""

from __future__ import annotations

import contextlib
import copy
import pickle
from typing import Any

import pytest
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters, VectorStoreQuery, VectorStoreQueryMode
from llama_index.vector_stores.milvus import MilvusVectorStore
from pymilvus import CollectionSchema, DataType, Function, FunctionType, MilvusClient

from llama_index_milvus_async_ext import AsyncMilvusVectorStore
from tests.conftest import Backend

FIELDS: dict[str, dict[str, Any]] = {
    "id": {"datatype": DataType.VARCHAR, "is_primary": True, "max_length": 100},
    "doc_id": {"datatype": DataType.VARCHAR, "max_length": 100},
    "text": {"datatype": DataType.VARCHAR, "max_length": 1_000},
    "embedding": {"datatype": DataType.FLOAT_VECTOR, "dim": 2},
}
OWN = {
    "year": {"datatype": DataType.INT32},
    "tags": {
        "datatype": DataType.ARRAY,
        "element_type": DataType.VARCHAR,
        "max_length": 20,
        "max_capacity": 4,
    },
}


def schema_of(fields: dict[str, dict[str, Any]] = FIELDS | OWN, **options: Any) -> CollectionSchema:
    schema = MilvusClient.create_schema(**{"auto_id": False, "enable_dynamic_field": True} | options)
    for name, arguments in fields.items():
        schema.add_field(name, **arguments)
    return schema


def a_node(id_: str = "a", **metadata: Any) -> TextNode:
    known = {"year": 1999, "tags": ["red", "blue"], "else": "anything"}
    return TextNode(id_=id_, text="words", embedding=[1.0, 0.5], metadata=known | metadata)


def by(key: str, value: Any) -> MetadataFilters:
    return MetadataFilters(filters=[MetadataFilter(key=key, value=value)])


def test_a_collection_is_made_from_a_schema_and_used_as_it_is(backend: Backend, collection_name: str) -> None:
    schema = schema_of()
    arguments: dict[str, Any] = {"uri": backend.uri, "collection_name": collection_name, "consistency_level": "Strong"}
    with AsyncMilvusVectorStore(schema=schema, similarity_metric="COSINE", **arguments) as store:
        described = store.client.describe_collection(collection_name)
        assert [field["name"] for field in described["fields"]] == [*FIELDS, *OWN]
        assert described["consistency_level"] == 0 and store.dim == 2
        store.add([a_node(), a_node("b", year=2000)])
        report = store.write([a_node("c", year="late"), a_node("d", year=None)])
        without, wrong = sorted(str(each.error) for each in report.failed)[::-1]
        assert "node 'd' can't be stored: its metadata has no 'year', which is a column" in without
        assert "column 'year' holds INT32 values, but its value is of type str" in wrong
        query = VectorStoreQuery(query_embedding=[1.0, 0.5], filters=by("year", 2000))
        (found,) = store.query(query).nodes or []
        assert found.metadata == a_node(year=2000).metadata
        with AsyncMilvusVectorStore(schema=schema, **arguments) as again:
            assert again.similarity_metric == "COSINE" and again.query(query).ids == ["b"]
        plain = MilvusVectorStore(use_async_client=False, **arguments | {"collection_name": collection_name})
        assert [node.metadata for node in plain.get_nodes(filters=by("year", 1999))] == [a_node().metadata]
        plain.client.close()
        other = schema_of(FIELDS | {"year": {"datatype": DataType.VARCHAR, "max_length": 4}})
        with pytest.raises(ValueError, match="its field 'year' is of type INT32, where schema= has VARCHAR"):
            AsyncMilvusVectorStore(schema=other, **arguments)
        with AsyncMilvusVectorStore(schema=other, overwrite=True, **arguments) as anew:
            anew.add([a_node("e", year="1999")])
            assert anew.query(VectorStoreQuery(query_embedding=[1.0, 0.5], similarity_top_k=9)).ids == ["e"]


def test_a_copy_makes_the_collection_anew_from_the_same_schema(lite_uri: str, collection_name: str) -> None:
    key = {"is_partition_key": True, "datatype": DataType.VARCHAR, "max_length": 64}
    schema = schema_of(FIELDS | {"tenant": key, "size": {"datatype": DataType.INT64, "default_value": 7}})
    arguments: dict[str, Any] = {"collection_name": collection_name, "schema": schema}
    arguments |= {"partition_key_field": "tenant", "filterable_metadata": ["colour"]}
    with AsyncMilvusVectorStore(lite_uri, **arguments) as store:
        fields = store.client.describe_collection(collection_name)["fields"]
        store.clear()
        made = [copy.deepcopy(store)]
        with made[0] as copied:
            assert copied.client.describe_collection(collection_name)["fields"] == fields
            copied.clear()
            unpickled = pickle.loads(pickle.dumps(copied))
    with unpickled:
        assert unpickled.client.describe_collection(collection_name)["fields"] == fields
        described = unpickled.to_dict()
        assert described["partition_key_field"] == "tenant" and described["filterable_metadata"] == ("colour",)
        rebuilt = {name: described[name] for name in ("collection_name", "dim", "schema", "filterable_metadata")}
        with AsyncMilvusVectorStore(lite_uri, **rebuilt) as again:
            assert again.filterable_metadata == ("colour",)
            again.add([TextNode(id_="a", text="words", embedding=[1.0, 0.5], metadata={"tenant": "t"})])


def test_a_schema_may_bring_bm25_and_other_names(lite_uri: str, collection_name: str) -> None:
    fields = {
        "id": FIELDS["id"],
        "document": FIELDS["doc_id"],
        "words": FIELDS["text"] | {"enable_analyzer": True},
        "vector": FIELDS["embedding"],
        "by_words": {"datatype": DataType.SPARSE_FLOAT_VECTOR},
    }
    schema = schema_of(fields)
    schema.add_function(
        Function("bm25", FunctionType.BM25, input_field_names=["words"], output_field_names=["by_words"])
    )
    names = {"text_key": "words", "doc_id_field": "document", "embedding_field": "vector"}
    names |= {"sparse_embedding_field": "by_words"}
    with AsyncMilvusVectorStore(
        lite_uri,
        collection_name=collection_name,
        schema=schema,
        enable_sparse=True,
        consistency_level="Strong",
        **names,
    ) as store:
        store.add([a_node(), TextNode(id_="b", text="others", embedding=[0.5, 1.0])])
        sparse = VectorStoreQuery(query_str="words", mode=VectorStoreQueryMode.TEXT_SEARCH, similarity_top_k=5)
        assert store.query(sparse).ids == ["a"]
        assert store.query(VectorStoreQuery(query_embedding=[0.0, 1.0], similarity_top_k=1)).ids == ["b"]


def without(*names: str) -> CollectionSchema:
    return schema_of({name: field for name, field in FIELDS.items() if name not in names})


@pytest.mark.parametrize(
    ("schema", "arguments", "error", "says"),
    [
        ("none", {}, TypeError, "must be a pymilvus.CollectionSchema, got str"),
        (lambda: without("doc_id"), {}, ValueError, "no field 'doc_id' of type VARCHAR, for the id of the node's doc"),
        (lambda: without("text"), {}, ValueError, "no field 'text' of type VARCHAR, for the node's text"),
        (lambda: without("embedding"), {}, ValueError, "no field 'embedding' of type FLOAT_VECTOR, which embedding_f"),
        (
            lambda: schema_of({"pk" if name == "id" else name: field for name, field in FIELDS.items()}),
            {},
            ValueError,
            "no field 'id' of type VARCHAR, for the node's id, as the primary key",
        ),
        (
            lambda: schema_of(FIELDS | {"id": {"datatype": DataType.INT64, "is_primary": True}}),
            {},
            ValueError,
            "no field 'id' of type VARCHAR",
        ),
        (lambda: schema_of(auto_id=True), {}, ValueError, "with auto_id=False: it is the node's id"),
        (lambda: schema_of(), {"dim": 3}, ValueError, "gives 'embedding' dimension 2, but dim=3 is asked for"),
        (lambda: schema_of(enable_dynamic_field=False), {}, ValueError, "must have enable_dynamic_field=True"),
        (lambda: schema_of(), {"scalar_field_names": ["a"]}, ValueError, "add these fields to the schema"),
        (
            lambda: schema_of(FIELDS | {"second": FIELDS["embedding"]}),
            {},
            ValueError,
            "has the vector field 'second', which this store would not fill",
        ),
        (lambda: schema_of(), {"enable_sparse": True}, ValueError, "no field 'sparse_embedding' of type SPARSE_FLOAT"),
    ],
)
def test_what_a_schema_lacks_is_named_before_anything_is_made(
    lite_uri: str, schema: Any, arguments: dict[str, Any], error: type[Exception], says: str
) -> None:
    given = schema() if callable(schema) else schema
    with pytest.raises(error, match=says):
        AsyncMilvusVectorStore(lite_uri, collection_name="never_made", schema=given, **arguments)


def test_a_schema_is_compared_with_the_collection_that_is_there(lite_uri: str, collection_name: str) -> None:
    wider = FIELDS | {"embedding": {"datatype": DataType.FLOAT_VECTOR, "dim": 3}}
    keyed = FIELDS | {"year": OWN["year"], "tags": OWN["tags"]}
    keyed |= {"doc_id": FIELDS["doc_id"] | {"is_partition_key": True}}
    with AsyncMilvusVectorStore(lite_uri, collection_name=collection_name, schema=schema_of()):
        for fields, says in (
            (wider, "has 2 dimensions, where schema= has 3"),
            (keyed, "key is None, where schema= has"),
        ):
            with pytest.raises(ValueError, match=says):
                AsyncMilvusVectorStore(lite_uri, collection_name=collection_name, schema=schema_of(fields))
        plain = MilvusVectorStore(lite_uri, collection_name=collection_name, dim=2, use_async_client=False)
        with pytest.raises(ValueError, match="key is None, where schema= has 'doc_id'"):
            AsyncMilvusVectorStore.from_vector_store(plain, schema=schema_of(keyed))
        AsyncMilvusVectorStore.from_vector_store(plain, schema=schema_of()).close()
        plain.client.close()


def test_a_schema_must_have_the_partition_key_that_is_asked_for(lite_uri: str, collection_name: str) -> None:
    with pytest.raises(ValueError, match="partition_key_field='tenant', but schema= has no partition key"):
        AsyncMilvusVectorStore(
            lite_uri, collection_name=collection_name, schema=schema_of(), partition_key_field="tenant"
        )
    with contextlib.closing(MilvusClient(lite_uri)) as client:
        assert not client.has_collection(collection_name)
