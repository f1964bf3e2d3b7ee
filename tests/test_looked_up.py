"""Look-ups of an ingestion are read column by column: the same as pymilvus reads, and as a JSON parser reads."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from llama_index.core.schema import BaseNode

from llama_index_milvus_async_ext import AsyncMilvusVectorStore
from llama_index_milvus_async_ext._ingest.standing import record_bytes
from llama_index_milvus_async_ext._lane.port import LoopPort
from llama_index_milvus_async_ext._milvus import connection as connection_module
from llama_index_milvus_async_ext._milvus.connection import Connection
from llama_index_milvus_async_ext._milvus.query_request import dynamic_values, is_readable
from llama_index_milvus_async_ext._nodes.rows import RECORD_FIELD
from llama_index_milvus_async_ext._store.records import Records
from llama_index_milvus_async_ext._store.writing import Write
from tests.conftest import Backend, MakeNodes, examples

RECORD = {"version": "1", "nodes": "2", "source": "s"}
FRAGMENT = '"_ingestion":{"version":"no"}'

_texts = (
    st.sampled_from(["", "a", ",", "{", "}", '"', "\\", FRAGMENT, "," + FRAGMENT, "{" + FRAGMENT + "}"]) | st.text()
)
_keys = st.sampled_from([RECORD_FIELD, "a", FRAGMENT]) | st.text(max_size=5)
_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | _texts | st.just(RECORD),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.dictionaries(_keys, _values, max_size=4), max_size=4), st.sampled_from([0, orjson.OPT_INDENT_2]))
@example([{"a": {"b": 1, RECORD_FIELD: RECORD}}], 0)
@example([{"a": {RECORD_FIELD: RECORD}}], 0)
@example([{"a": 1, RECORD_FIELD: RECORD}, {RECORD_FIELD: RECORD}, {RECORD_FIELD: RECORD, "a": 1}, {}], 0)
@example([{"a": "," + FRAGMENT + "}"}, {"a": ',"_ingestion":'}], 0)
@settings(max_examples=examples(500), deadline=None)
def test_a_dynamic_field_is_read_as_a_parser_of_the_whole_row_reads_it(rows: list[dict[str, Any]], option: int) -> None:
    stored = [orjson.dumps(row, option=option) for row in rows]
    assert dynamic_values(stored, RECORD_FIELD) == [orjson.loads(row).get(RECORD_FIELD) for row in stored]


@asynccontextmanager
async def filled(backend: Backend, collection: str, nodes: list[BaseNode]) -> AsyncIterator[tuple[Any, Records]]:
    """A store of these nodes, of which every other one has a record, and the rows of its documents."""
    async with AsyncMilvusVectorStore(uri=backend.uri, collection_name=collection, dim=8) as store:
        connected, port = store.live(), LoopPort.current()
        with connected.held(port):
            record = record_bytes("version", ["a"], FRAGMENT)
            await Write(store, connected, port, nodes[::2], records=[record] * len(nodes[::2])).run()
            await store.awrite(nodes[1::2])
            yield connected, Records(store, connected, port)


async def test_columns_hold_what_pymilvus_makes_of_the_same_answer(
    backend: Backend, collection_name: str, make_nodes: MakeNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes: list[BaseNode] = list(make_nodes(40))
    nodes[3].metadata["nested"] = {"a": 1, RECORD_FIELD: {"version": "of somebody else"}}
    documents = sorted({str(node.ref_doc_id) for node in nodes})
    asked_publicly = []
    monkeypatch.setattr(
        connection_module, "is_readable", lambda *of: not asked_publicly and is_readable(*of), raising=True
    )
    async with filled(backend, collection_name, nodes) as (_, records):
        quickly = await records.rows_of(documents)
        asked_publicly.append(True)
        publicly = await records.rows_of(documents)
        assert sorted(quickly) == sorted(publicly)
        assert sorted((row.key, row.document_id) for row in quickly) == sorted(
            (node.node_id, node.ref_doc_id) for node in nodes
        )
        assert {row.key for row in quickly if row.record is not None} == {node.node_id for node in nodes[::2]}
        asked_publicly.clear()
        assert not await records.rows_of(["a document that is not there"])


async def test_answers_are_read_without_pymilvus_making_a_dict_of_each_row(
    backend: Backend, collection_name: str, make_nodes: MakeNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes: list[BaseNode] = list(make_nodes(20))
    async with filled(backend, collection_name, nodes) as (connected, records):
        monkeypatch.setattr(connected.endpoint.connection.client, "query", None)  # would raise
        assert len(await records.rows_of(sorted({str(node.ref_doc_id) for node in nodes}))) == 20


async def test_a_pymilvus_of_other_insides_is_asked_publicly(
    backend: Backend, collection_name: str, make_nodes: MakeNodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes: list[BaseNode] = list(make_nodes(20))
    async with filled(backend, collection_name, nodes) as (_, records):
        monkeypatch.setattr(Connection, "stub_method", lambda *_: None)
        assert len(await records.rows_of(sorted({str(node.ref_doc_id) for node in nodes}))) == 20
