"""What the guides say of Milvus itself: what each filter operator finds, and which addresses lead where."""

from __future__ import annotations

from typing import Any

import pytest
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters

from llama_index_milvus_async_ext import AsyncMilvusVectorStore
from tests.conftest import Backend, lite_address

Op = FilterOperator
ROWS: dict[str, dict[str, Any]] = {
    "red": {"colour": "red", "size": "S", "year": 2020, "tags": ["x", "y"], "mixed": [-5]},
    "redder": {"colour": "Redder", "size": "M", "year": 2021, "tags": ["x"], "mixed": "x"},
    "blue": {"colour": "blue", "size": 7, "year": 2019, "tags": [], "mixed": 7},
    "bare": {},
}
# What is looked for, and what it finds: on a server, and on Milvus Lite where that differs. See docs/guides/filters.md.
FOUND: list[tuple[FilterOperator, str, Any, str, str | None]] = [
    (Op.EQ, "colour", "red", "red", None),
    (Op.NE, "colour", "red", "bare blue redder", "blue redder"),
    (Op.GT, "year", 2020, "redder", None),
    (Op.GTE, "year", 2020, "red redder", None),
    (Op.LT, "year", 2020, "blue", None),
    (Op.LTE, "year", 2020, "blue red", None),
    (Op.IN, "colour", ["red", "blue"], "blue red", None),
    (Op.NIN, "colour", ["red", "blue"], "bare redder", None),
    (Op.NIN, "size", ["S"], "bare blue redder", None),
    (Op.IN, "mixed", ["x"], "redder", None),
    (Op.NIN, "mixed", ["x"], "bare blue red", None),
    (Op.CONTAINS, "mixed", -5, "red", None),
    (Op.CONTAINS, "tags", "x", "red redder", None),
    (Op.ANY, "tags", ["y", "z"], "red", None),
    (Op.ALL, "tags", ["x", "y"], "red", None),
    (Op.TEXT_MATCH, "colour", "re", "red", None),
    (Op.IS_EMPTY, "tags", None, "bare blue", None),
]


def test_each_operator_finds_what_the_table_says(backend: Backend, collection_name: str) -> None:
    settings: dict[str, Any] = {"collection_name": collection_name, "dim": 2, "consistency_level": "Strong"}
    with AsyncMilvusVectorStore(backend.uri, **settings) as store:
        store.add([TextNode(id_=id_, text=id_, metadata=row, embedding=[1.0, 0.0]) for id_, row in ROWS.items()])

        def found(condition: FilterCondition, operator: FilterOperator, key: str, value: Any) -> list[str]:
            only = MetadataFilter(key=key, value=value, operator=operator)
            nodes = store.get_nodes(filters=MetadataFilters(filters=[only], condition=condition))
            return sorted(node.node_id for node in nodes)

        for operator, key, value, on_server, on_lite in FOUND:
            named = on_lite if on_lite is not None and backend.name == "lite" else on_server
            assert found(FilterCondition.AND, operator, key, value) == named.split(), (operator, key)
            others = sorted(set(ROWS) - set(on_server.split()))  # of a NOT the same everywhere
            assert found(FilterCondition.NOT, operator, key, value) == others, (operator, key)
        with pytest.raises(ValueError, match="Milvus has no operator TEXT_MATCH_INSENSITIVE"):
            found(FilterCondition.AND, Op.TEXT_MATCH_INSENSITIVE, "colour", "re")
    assert {operator for operator, *_ in FOUND} == set(Op) - {Op.TEXT_MATCH_INSENSITIVE}


def test_on_lite_a_flag_is_a_number_and_on_a_server_it_is_none(backend: Backend, collection_name: str) -> None:
    settings: dict[str, Any] = {"collection_name": collection_name, "dim": 2, "consistency_level": "Strong"}
    rows: dict[str, Any] = {"flag": True, "number": 1, "flags": [True], "numbers": [1]}
    with AsyncMilvusVectorStore(backend.uri, **settings) as store:
        store.add([TextNode(id_=id_, metadata={"k": value}, embedding=[1.0, 0.0]) for id_, value in rows.items()])
        for operator, value, number, flag in [
            (Op.EQ, 1, "number", "flag"),
            (Op.IN, [1], "number", "flag"),
            (Op.CONTAINS, 1, "numbers", "flags"),
            (Op.ANY, [1], "numbers", "flags"),
            (Op.ALL, [1], "numbers", "flags"),
        ]:
            only = MetadataFilters(filters=[MetadataFilter(key="k", value=value, operator=operator)])
            expected = {number, flag} if backend.name == "lite" else {number}
            assert {node.node_id for node in store.get_nodes(filters=only)} == expected, operator


def test_tcp_and_http_lead_to_the_same_server(lite_uri: str, collection_name: str) -> None:
    address = lite_address(lite_uri)
    settings: dict[str, Any] = {"collection_name": collection_name, "dim": 2, "consistency_level": "Strong"}
    with AsyncMilvusVectorStore(f"tcp://{address}", **settings) as store:
        store.add([TextNode(id_="a", text="A", embedding=[1.0, 0.0])])
    with AsyncMilvusVectorStore(f"http://{address}", **settings) as store:
        assert [node.node_id for node in store.get_nodes(node_ids=["a"])] == ["a"]


@pytest.mark.parametrize("uri", ["127.0.0.1:19530", "grpc://127.0.0.1:19530"])
def test_an_address_without_a_scheme_that_milvus_knows_is_refused(uri: str) -> None:
    with pytest.raises(Exception, match=r"is illegal"):
        AsyncMilvusVectorStore(uri, dim=2)
