"""Metadata that is stored once, in the node's JSON, but for the keys that are filtered by."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import BaseNode, Document, TextNode
from llama_index.core.vector_stores.types import FilterCondition, MetadataFilter, MetadataFilters, VectorStoreQuery
from llama_index.vector_stores.milvus import MilvusVectorStore
from pymilvus import DataType, FieldSchema
from pymilvus.exceptions import MilvusException

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, AsyncMilvusWriter, aingest
from llama_index_milvus_async_ext._milvus.schema import Schema
from llama_index_milvus_async_ext._nodes.rows import FIELDS_OF_NODES, MAX_DYNAMIC_BYTES
from tests.conftest import Backend, examples
from tests.ingesting import Lines, Model
from tests.test_rows import described, encoder, nodes, of_another_class

DIM = 4
KEYS = ("colour", "info", "a key, literally", "year")


@pytest.fixture
def store(backend: Backend, collection_name: str) -> Iterator[AsyncMilvusVectorStore]:
    with AsyncMilvusVectorStore(
        backend.uri,
        collection_name=collection_name,
        dim=DIM,
        consistency_level="Strong",
        filterable_metadata=list(KEYS),
    ) as store:
        yield store


@contextlib.contextmanager
def plain_store(store: AsyncMilvusVectorStore) -> Iterator[MilvusVectorStore]:
    plain = MilvusVectorStore(
        store.uri, collection_name=store.collection_name, use_async_client=False, dim=DIM, upsert_mode=True
    )
    yield plain
    plain.client.close()


def a_node(id_: str = "a", **metadata: Any) -> TextNode:
    known = {"colour": "red", "info": {"size": 5}, "a key, literally": 1, "notes": "long", "pages": [1, 2]}
    return TextNode(id_=id_, text="words", embedding=[1.0, 0.5, 0.25, 0.0], metadata=known | metadata)


def by(key: str, value: Any) -> MetadataFilters:
    return MetadataFilters(filters=[MetadataFilter(key=key, value=value)])


def query_of(filters: MetadataFilters | None = None, **options: Any) -> VectorStoreQuery:
    return VectorStoreQuery([1.0, 0.5, 0.0, 0.0], similarity_top_k=9, filters=filters, **options)


def fields_of(store: AsyncMilvusVectorStore, id_: str) -> dict[str, Any]:
    (row,) = store.client.query(store.collection_name, filter=f'id == "{id_}"', output_fields=["*"])
    return dict(row)


def test_a_node_comes_back_whole_though_few_of_its_keys_are_fields(store: AsyncMilvusVectorStore) -> None:
    node = a_node()
    store.add([node])
    row = fields_of(store, "a")
    assert row["colour"] == "red" and "notes" not in row and "pages" not in row
    with plain_store(store) as plain:
        for reader in (store, plain):
            (found,) = reader.query(query_of(by("colour", "red"))).nodes or []
            assert found.metadata == node.metadata and found.get_content() == "words"
            (looked_up,) = reader.get_nodes(["a"])
            assert looked_up.metadata == node.metadata
        for key, value in (
            ('info["size"]', 5),
            ("a key, literally", 1),
            ('$meta["colour"]', "red"),
            ("doc_id", "None"),
        ):
            assert store.query(query_of(by(key, value))).ids == ["a"], key


async def test_a_filter_that_could_find_nothing_is_an_error(store: AsyncMilvusVectorStore) -> None:
    store.add([a_node()])
    says = "filter on '{}': this store has filterable_metadata=.*; name it in filterable_metadata= and write"
    nested = MetadataFilters(filters=[by("colour", "red"), by("pages[0]", 1)], condition=FilterCondition.OR)
    for key, filters in (("notes", by("notes", "long")), (r"pages\[0\]", nested), ("no ident", by("no ident", 1))):
        with pytest.raises(MilvusException, match=says.format(key)):
            await store.aquery(query_of(filters))
        with pytest.raises(ValueError, match=says.format(key)):
            await store.aget_nodes(filters=filters)
        with pytest.raises(ValueError, match=says.format(key)):
            await store.adelete_nodes(filters=filters)
    with pytest.raises(ValueError, match=says.format("pages")):
        await store.aquery(query_of(), milvus_scalar_filters=[{"key": "pages", "value": 1}])
    assert len((await store.aquery(query_of())).ids or []) == 1, "nothing is deleted"


def test_rows_of_stores_with_and_without_the_argument_stand_side_by_side(store: AsyncMilvusVectorStore) -> None:
    with plain_store(store) as plain, AsyncMilvusVectorStore(store.uri, collection_name=store.collection_name) as all_:
        store.add([a_node("a")])
        all_.add([a_node("b")])
        plain.add([a_node("c")])
        for reader in (store, plain, all_):
            found = reader.query(query_of(by("colour", "red")))
            assert sorted(found.ids or []) == ["a", "b", "c"]
            assert all(node.metadata == a_node().metadata for node in found.nodes or [])
        assert sorted(all_.query(query_of(by("notes", "long"))).ids or []) == ["b", "c"]
        with AsyncMilvusVectorStore.from_vector_store(plain, filterable_metadata=["year"]) as taken_over:
            taken_over.add([a_node("d", year=1999)])
            assert taken_over.query(query_of(by("year", 1999))).ids == ["d"]
    with pickle.loads(pickle.dumps(store)) as copied:
        assert copied.filterable_metadata == KEYS
        copied.filterable_metadata = ("notes",)
        copied.add([a_node("e")])
        row = fields_of(copied, "e")
        assert row["notes"] == "long" and "colour" not in row, "what is set counts"


async def test_an_ingestion_keeps_its_record_all_the_same(store: AsyncMilvusVectorStore) -> None:
    pipeline = IngestionPipeline(transformations=[Lines(), Model(dim=DIM), AsyncMilvusWriter(store)])
    documents = [Document(id_=f"d{n}", text="one\ntwo", metadata={"colour": "red", "notes": "x"}) for n in range(3)]
    assert (await aingest(pipeline, documents, source="s")).added == 3
    assert (await aingest(pipeline, documents, source="s")).unchanged == 3
    assert (await aingest(pipeline, documents[:1], source="s", delete_missing=True)).deleted == 2
    found = await store.aquery(query_of(by("colour", "red"), doc_ids=["d0"]))
    assert [node.metadata["notes"] for node in found.nodes or []] == ["x", "x"]


def test_twice_the_metadata_fits(store: AsyncMilvusVectorStore) -> None:
    large = a_node(notes="x" * 50_000)
    (failed,) = AsyncMilvusVectorStore(store.uri, collection_name=store.collection_name).write([large]).failed
    says = f"take 1.* bytes as JSON, and Milvus stores {MAX_DYNAMIC_BYTES} .each metadata value is stored twice.*"
    with pytest.raises(ValueError, match=says + "filterable_metadata=: the others are stored once"):
        raise failed.error
    store.add([large])
    assert store.get_nodes(["a"])[0].metadata == large.metadata
    (failed,) = store.write([a_node(notes="x" * 70_000)]).failed
    with pytest.raises(ValueError, match=f"Milvus stores {MAX_DYNAMIC_BYTES}; store less metadata$"):
        raise failed.error


@pytest.mark.parametrize("keys", ["colour", [1], (key for key in ["colour"]), ['info["colour"]']])
def test_what_is_no_list_of_keys_is_refused(lite_uri: str, keys: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"must be a list of metadata keys|is a path .* the key 'info'"):
        AsyncMilvusVectorStore(lite_uri, dim=DIM, collection_name="never_made", filterable_metadata=keys)


@settings(max_examples=examples(200), deadline=None)
@given(nodes, st.data())
def test_rows_are_those_without_the_argument_less_the_other_keys(node: BaseNode, data: Any) -> None:
    """On the quick way and the long one, to the byte."""
    keys = data.draw(st.lists(st.sampled_from([*node.metadata, "other", "year"]), unique=True))
    year = FieldSchema("year", DataType.INT64)
    for schema in (Schema(described()), Schema(described(year))):
        if year.name in schema.names:
            node.metadata["year"] = 1999
        whole, _ = encoder(schema).encode(node)
        row, size = encoder(schema, filterable=keys).encode(node)
        own = FIELDS_OF_NODES | {*keys}
        expected = {name: value for name, value in orjson.loads(whole.dynamic).items() if name in own}
        assert row.columns == whole.columns and row.vector == whole.vector
        assert [*orjson.loads(row.dynamic).items()] == [*expected.items()]
        assert size <= encoder(schema).encode(node)[1]
        if type(node) is TextNode:
            other, _ = encoder(schema, filterable=keys).encode(of_another_class(node))
            assert other.entity.keys() == row.entity.keys()
