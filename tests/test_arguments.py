"""Every argument and option does what upstream's does: the requests that reach Milvus are those of the plain store.

Seen by the fault proxy, which looks on. Where the two differ on purpose, the difference is named here.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import inspect
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tenacity
from llama_index.core import VectorStoreIndex
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler
from llama_index.core.retrievers import VectorIndexRetriever
from llama_index.core.schema import IndexNode, NodeWithScore, TextNode
from llama_index.core.vector_stores.types import (
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)
from llama_index.vector_stores.milvus import IndexManagement, MilvusVectorStore
from llama_index.vector_stores.milvus.utils import (
    BaseSparseEmbeddingFunction,
    BM25BuiltInFunction,
)
from pymilvus import DataType, MilvusException
from pymilvus.grpc_gen import milvus_pb2

from llama_index_milvus_async_ext import AsyncMilvusRetriever, AsyncMilvusVectorStore, AsyncMilvusWriter, RetryPolicy
from llama_index_milvus_async_ext._milvus import deleting
from llama_index_milvus_async_ext._milvus.connection import Connection
from llama_index_milvus_async_ext._store.open_store import OpenStore
from tests.conftest import MakeNodes
from tests.embedding import HashEmbedding
from tests.fault_proxy import FaultProxy
from tests.faults import Exchange, Fault, Refuse

DIM = 8
KINDS: tuple[Any, ...] = (MilvusVectorStore, AsyncMilvusVectorStore)
WRITES = ("Insert", "Upsert")
SEARCHES = ("Search", "HybridSearch")
MAKING = ("CreateCollection", "CreateIndex", "AlterCollection", "DropCollection", "LoadCollection")
MMR, HYBRID, SPARSE = VectorStoreQueryMode.MMR, VectorStoreQueryMode.HYBRID, VectorStoreQueryMode.SPARSE


class Letters(BaseSparseEmbeddingFunction):
    """A sparse embedding that the client computes."""

    def encode_queries(self, queries: list[str]) -> list[dict[int, float]]:
        return [{ord(letter): float(text.count(letter)) for letter in text} for text in queries]

    def encode_documents(self, documents: list[str]) -> list[dict[int, float]]:
        return self.encode_queries(documents)


def with_bm25(**changes: Any) -> dict[str, Any]:
    # Its name is a random one, if none is given; so are those of its fields unless they are the store's own.
    function = BM25BuiltInFunction(
        function_name="bm25",
        input_field_names=changes.get("text_key", "text"),
        output_field_names=changes.get("sparse_embedding_field", "sparse_embedding"),
    )
    return {"enable_sparse": True, "sparse_embedding_function": function} | changes


def with_letters(**changes: Any) -> dict[str, Any]:
    return {"enable_sparse": True, "sparse_embedding_function": Letters()} | changes


Watch = Callable[..., list[Any]]


@pytest.fixture
def watch(proxy: FaultProxy) -> Watch:
    """Call it with names of methods to have the list of their requests, from then on."""

    def watched(*methods: str) -> list[Any]:
        requests: list[Any] = []

        def note(request: Any) -> bool:
            requests.append(request)
            return False

        proxy.script(Refuse(), method=methods, when=note)
        return requests

    return watched


@pytest.fixture
def open_store(proxy: FaultProxy, collection_name: str) -> Iterator[Callable[..., Any]]:
    opened: list[Any] = []

    def open_one(kind: Any = AsyncMilvusVectorStore, **arguments: Any) -> Any:
        arguments = {"dim": DIM, "use_async_client": False} | arguments
        opened.append(kind(uri=proxy.uri, collection_name=collection_name, **arguments))
        return opened[-1]

    yield open_one
    proxy.heal()
    for store in opened:
        store.client.close() if type(store) is MilvusVectorStore else store.close()


# --- making a collection

MADE: dict[str, dict[str, Any]] = {
    "nothing": {},
    **{level: {"consistency_level": level} for level in ("Strong", "Session", "Bounded", "Eventually")},
    "collection_properties": {"collection_properties": {"collection.ttl.seconds": 3600}},
    "doc_id_field": {"doc_id_field": "document"},
    "text_key": {"text_key": "words"},
    "scalar fields": {
        "scalar_field_names": ["year", "kind"],
        "scalar_field_types": [DataType.INT32, DataType.VARCHAR],
    },
    "enable_dense": with_bm25(enable_dense=False, dim=None),
    "dim": {"dim": 3},
    "embedding_field": {"embedding_field": "vector"},
    "enable_sparse": with_bm25(),
    "sparse_embedding_field": with_bm25(sparse_embedding_field="words"),
    "sparse_embedding_function": with_letters(),
    "index_management": {"index_management": IndexManagement.NO_VALIDATION},
    "index_config": {"index_config": {"index_type": "HNSW", "metric_type": "L2", "M": 8, "efConstruction": 32}},
    "sparse_index_config": with_letters(sparse_index_config={"index_name": "by_words", "drop_ratio_build": 0.1}),
    **{metric: {"similarity_metric": metric} for metric in ("cosine", "L2", "euclidean")},
}


@pytest.mark.parametrize("arguments", MADE.values(), ids=MADE)
def test_a_collection_is_made_as_upstream_makes_it(open_store: Any, watch: Watch, arguments: dict[str, Any]) -> None:
    of_kind = []
    for kind in KINDS:
        made = watch(*MAKING)
        store = open_store(kind, **arguments)
        of_kind.append(list(made))
        store.clear()
    theirs, ours = of_kind
    assert any(isinstance(request, milvus_pb2.CreateCollectionRequest) for request in theirs)
    assert ours == theirs


def test_overwrite_drops_a_collection_once(open_store: Any, watch: Watch) -> None:
    open_store()
    for kind in KINDS:
        made = watch(*MAKING)
        open_store(kind, overwrite=True)
        assert [type(request).__name__ for request in made[:2]] == ["DropCollectionRequest", "CreateCollectionRequest"]
    made = watch(*MAKING)
    open_store(overwrite=False)
    assert not made


@pytest.mark.parametrize("management", IndexManagement)
def test_a_missing_index_is_made_where_it_is_asked_for(
    open_store: Any, watch: Watch, management: IndexManagement
) -> None:
    open_store(index_management=IndexManagement.NO_VALIDATION)
    made = watch("CreateIndex")
    open_store(index_management=management)
    assert len(made) == (management is IndexManagement.CREATE_IF_NOT_EXISTS)


def test_type_checkers_see_the_constructor_as_it_is() -> None:
    def parameters(kind: type) -> str:
        source = ast.parse(inspect.getsource(kind))
        (constructor,) = (each for each in ast.walk(source) if getattr(each, "name", None) == "__init__")
        assert isinstance(constructor, ast.FunctionDef)
        return ast.unparse(constructor.args)

    assert parameters(AsyncMilvusVectorStore) == parameters(OpenStore)


def test_every_argument_of_the_plain_store_is_looked_at_here() -> None:
    """An argument that a later version brings is to be looked at, too."""
    elsewhere = {"uri", "token", "collection_name", "use_async_client", "hybrid_ranker", "hybrid_ranker_params"}
    looked_at = {name for arguments in [*MADE.values(), *WRITTEN.values()] for name in arguments}
    looked_at |= {name for arguments, *_ in SEARCHED.values() for name in arguments}
    names = set(inspect.signature(MilvusVectorStore.__init__).parameters) - {"self", "kwargs"}
    assert names == looked_at | elsewhere | {"overwrite", "index_management"}


# --- writing

WRITTEN: dict[str, dict[str, Any]] = {
    "insert": {"upsert_mode": False},
    "upsert": {"upsert_mode": True},
    "batch_size": {"batch_size": 2},
    "scalar fields": {
        "scalar_field_names": ["number", "group"],
        "scalar_field_types": [DataType.INT64, DataType.VARCHAR],
    },
    "embedding_field": {"embedding_field": "vector"},
    "enable_dense": with_letters(enable_dense=False, dim=None),
    "BM25": with_bm25(),
    "client's sparse vectors": with_letters(sparse_embedding_field="letters"),
}


def normal(request: Any) -> Any:
    """A write, but for the hash keys of its rows, which Milvus makes anew."""
    of_request = {field.name: value for field, value in request.ListFields()}
    of_request.pop("hash_keys", None)
    return type(request).__name__, of_request


@pytest.mark.parametrize(
    ("case", "partition"),
    [(case, None) for case in WRITTEN] + [(case, "left") for case in ("insert", "upsert", "BM25")],
)
async def test_rows_are_sent_as_upstream_sends_them(
    open_store: Any, watch: Watch, make_nodes: MakeNodes, case: str, partition: str | None
) -> None:
    arguments = {"upsert_mode": True} | WRITTEN[case]
    nodes, options = make_nodes(5), {"milvus_partition_name": partition} if partition else {}
    ours, theirs = open_store(**arguments), open_store(MilvusVectorStore, **arguments)
    ours.client.create_partition(ours.collection_name, "left")
    of_way = []
    for add in (theirs.add, ours.add, ours.async_add, ours.write, ours.awrite):
        sent = watch(*WRITES)
        answer = add(nodes, **options)
        if inspect.isawaitable(answer):
            await answer
        of_way.append([normal(request) for request in sent])
    assert len(of_way[0]) == (3 if "batch_size" in arguments else 1)
    for sent_by_us in of_way[1:]:
        assert sorted(sent_by_us, key=str) == sorted(of_way[0], key=str)
    by_name = ours.client.query(ours.collection_name, filter="id != ''", partition_names=[partition or "_default"])
    assert {row["id"] for row in by_name} == {node.node_id for node in nodes}


@pytest.mark.parametrize("option", [{"force_flush": True}, {"force_flush": False}, {}], ids=str)
async def test_force_flush_seals_what_was_written(
    open_store: Any, watch: Watch, make_nodes: MakeNodes, option: dict[str, bool], proxy: FaultProxy
) -> None:
    store = open_store()
    asked = watch("Flush")
    for number, add in enumerate((store.add, store.async_add, store.write, store.awrite)):
        proxy.clear()
        asked = watch("Flush", *WRITES)
        answer = add(make_nodes(3), **option)
        if inspect.isawaitable(answer):
            await answer
        kinds = [type(request).__name__ for request in asked]
        assert kinds == ["UpsertRequest", "FlushRequest"][: 1 + bool(option.get("force_flush"))], number
        assert all(list(request.collection_names) == [store.collection_name] for request in asked[1:])


COLUMNS = (
    DataType.BOOL,
    DataType.INT8,
    DataType.INT16,
    DataType.INT32,
    DataType.INT64,
    DataType.FLOAT,
    DataType.DOUBLE,
)


@pytest.mark.parametrize("kind", COLUMNS, ids=lambda kind: kind.name)
def test_truth_and_numbers_are_told_apart_as_the_plain_store_tells_them(open_store: Any, kind: DataType) -> None:
    of_class = []
    for each in KINDS:
        store = open_store(each, overwrite=True, scalar_field_names=["value"], scalar_field_types=[kind])
        taken = set()
        for number, value in enumerate((True, False, 1, 0, 0.5, "1")):
            node = TextNode(id_=f"n{number}", text="x", embedding=[0.5] * DIM, metadata={"value": value})
            with contextlib.suppress(MilvusException):
                taken |= {*store.add([node])}
        rows = store.client.query(
            store.collection_name, filter="id != ''", output_fields=["value"], consistency_level="Strong"
        )
        assert {row["id"] for row in rows} == taken
        of_class.append({row["id"]: repr(row["value"]) for row in rows})
    theirs, ours = of_class
    assert ours == theirs and len(ours) >= 2


def test_a_hit_of_a_search_is_told_from_a_node(open_store: Any) -> None:
    store = open_store()
    for embedding in ([0.5] * DIM, [0.5] * (DIM - 1), None):
        hit = NodeWithScore(node=TextNode(id_="n1", text="x", embedding=embedding), score=0.5)
        report = store.write([hit, TextNode(id_="other", text="x", embedding=[0.5] * DIM)])
        assert report.written == ["other"]
        (failed,) = report.failed
        says = "node 'n1' can't be stored: it is a NodeWithScore, the hit of a search, and no node; pass its .node"
        assert str(failed.error) == says and not failed.retryable


# --- searching

FEW = [{"key": "tags", "value": 1, "operator": "ARRAY_CONTAINS({key}, {value})"}]
LOW = MetadataFilters(filters=[MetadataFilter(key="number", value=12, operator=FilterOperator.LT)])
HNSW: dict[str, Any] = {"index_config": {"index_type": "HNSW", "M": 8, "efConstruction": 32}}

# What a store is opened with, what its query has, what is given with it.
SEARCHED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "nothing": ({}, {}, {}),
    "similarity_top_k": ({}, {"similarity_top_k": 7}, {}),
    "search_config": (HNSW | {"search_config": {"params": {"ef": 33}}}, {}, {}),
    "milvus_search_config": (HNSW, {}, {"milvus_search_config": {"metric_type": "IP", "params": {"ef": 44}}}),
    "both": (HNSW | {"search_config": {"params": {"ef": 33}}}, {}, {"milvus_search_config": {"params": {"ef": 44}}}),
    "nprobe": ({}, {}, {"milvus_search_config": {"params": {"nprobe": 5}}}),
    "MMR with both": (
        HNSW | {"search_config": {"params": {"ef": 33}}},
        {"mode": MMR},
        {"milvus_search_config": {"params": {"ef": 44}}},
    ),
    "milvus_partition_names": ({}, {}, {"milvus_partition_names": ["left"]}),
    "two of them": ({}, {}, {"milvus_partition_names": ["left", "_default"]}),
    "partitions, MMR": ({}, {"mode": MMR}, {"milvus_partition_names": ["left"]}),
    "partitions, hybrid": (with_bm25(), {"mode": HYBRID}, {"milvus_partition_names": ["left"]}),
    "milvus_scalar_filters": ({}, {"filters": MetadataFilters(filters=[])}, {"milvus_scalar_filters": FEW}),
    "with filters": ({}, {"filters": LOW}, {"milvus_scalar_filters": FEW}),
    "string_expr": ({}, {}, {"string_expr": "number < 4"}),
    "string_expr, which filters replace": ({}, {"filters": LOW}, {"string_expr": "number < 4"}),
    "string_expr, MMR": ({}, {"mode": MMR}, {"string_expr": "number < 4"}),
    "string_expr, hybrid": (with_bm25(), {"mode": HYBRID}, {"string_expr": "number < 4"}),
    "None": (
        HNSW | {"search_config": {"params": {"ef": 33}}},
        {"filters": MetadataFilters(filters=[])},
        dict.fromkeys(
            ("string_expr", "milvus_search_config", "milvus_partition_names", "milvus_scalar_filters", "mmr_threshold")
        ),
    ),
    "None, MMR": (
        {},
        {"mode": MMR},
        dict.fromkeys(
            ("string_expr", "milvus_search_config", "milvus_partition_names", "mmr_threshold", "mmr_prefetch_k")
        ),
    ),
    "None, hybrid": (with_bm25(), {"mode": HYBRID}, dict.fromkeys(("string_expr", "milvus_partition_names"))),
    "mmr_threshold": ({}, {"mode": MMR}, {"mmr_threshold": 0.2}),
    "mmr_prefetch_factor": ({}, {"mode": MMR}, {"mmr_prefetch_factor": 2.5}),
    "mmr_prefetch_k": ({}, {"mode": MMR}, {"mmr_prefetch_k": 11}),
    "embedding_field": ({"embedding_field": "vector"}, {}, {}),
    "output_fields": ({"output_fields": ["number", "_node_content", "_node_type"]}, {}, {}),
    "hybrid, search_config": (with_bm25(search_config={"ef": 33}), {"mode": HYBRID}, {}),
    "hybrid, metric": (with_bm25(similarity_metric="L2"), {"mode": HYBRID}, {}),
    "hybrid, k": (with_bm25(hybrid_ranker="RRFRanker", hybrid_ranker_params={"k": 7}), {"mode": HYBRID}, {}),
    "hybrid, weights": (
        with_bm25(hybrid_ranker="WeightedRanker", hybrid_ranker_params={"weights": [0.2, 0.9]}),
        {"mode": HYBRID},
        {},
    ),
    "hybrid, default weights": (with_bm25(hybrid_ranker="WeightedRanker"), {"mode": HYBRID}, {}),
    "hybrid, client": (with_letters(), {"mode": HYBRID}, {}),
    "hybrid, fields": (
        with_bm25(sparse_embedding_field="words", embedding_field="vector"),
        {"mode": HYBRID, "sparse_top_k": 2, "hybrid_top_k": 4, "alpha": 0.1},
        {},
    ),
}


def plain(request: Any) -> Any:
    """A search, but for what differs on purpose: the fields that are asked for, and the wording of the filter."""
    copied = type(request).FromString(request.SerializeToString())
    for each in (copied, *getattr(copied, "requests", ())):
        for name in ("output_fields", "dsl"):
            if name in each.DESCRIPTOR.fields_by_name:
                each.ClearField(name)
    for each in (copied, *getattr(copied, "requests", ())):
        for name in ("search_params", "rank_params"):
            if name in each.DESCRIPTOR.fields_by_name:
                pairs = sorted((pair.key, pair.value) for pair in getattr(each, name))
                each.ClearField(name)
                for key, value in pairs:
                    getattr(each, name).add(key=key, value=value)
    return copied


THE_PUBLIC_CLIENTS_TOO = (
    *("search_config", "milvus_partition_names", "partitions, hybrid", "string_expr", "string_expr, hybrid"),
    *("embedding_field", "hybrid, search_config", "hybrid, weights"),
)


@pytest.fixture(params=["pymilvus's internals", "the public client"])
def way_to_milvus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Requests as they are sent, and as they would be with a pymilvus whose insides are others."""
    if request.param == "the public client":
        monkeypatch.setattr(Connection, "stub_method", lambda *_: None)
        monkeypatch.setattr(Connection, "_sender", lambda *_: None)
    return str(request.param)


@pytest.mark.filterwarnings("ignore:The `parse_obj` method is deprecated")  # upstream's
@pytest.mark.parametrize(
    ("case", "way_to_milvus"),
    [(case, "pymilvus's internals") for case in SEARCHED]
    + [(case, "the public client") for case in THE_PUBLIC_CLIENTS_TOO],
    indirect=["way_to_milvus"],
)
@pytest.mark.usefixtures("way_to_milvus")
async def test_a_search_is_sent_as_upstream_sends_it(
    open_store: Any, watch: Watch, make_nodes: MakeNodes, case: str
) -> None:
    arguments, asked, options = SEARCHED[case]
    ours, theirs = open_store(**arguments), open_store(MilvusVectorStore, **arguments)
    nodes = make_nodes(30)
    for number, node in enumerate(nodes):
        node.metadata["tags"] = [number % 2]
    ours.client.create_partition(ours.collection_name, "left")
    ours.add(nodes[::3], milvus_partition_name="left")
    ours.add([node for place, node in enumerate(nodes) if place % 3])
    always = {"query_embedding": nodes[3].embedding, "query_str": "node 3", "similarity_top_k": 3}
    query = VectorStoreQuery(**(always | asked))
    sent = watch(*SEARCHES)
    reference = theirs.query(query, **options)
    (expected,) = map(plain, sent)
    assert reference.ids
    answers = [ours.query(query, **options), await ours.aquery(query, **options)]
    answers += ours.query_many([query], **options) + await ours.aquery_many([query], **options)
    assert [plain(request) for request in sent[1:]] == [expected] * 4
    for answer in answers:
        assert sorted(answer.ids) == sorted(reference.ids)
        assert answer.similarities == pytest.approx(reference.similarities, rel=1e-5)
        assert {node.node_id for node in answer.nodes} == {node.node_id for node in reference.nodes}


@pytest.mark.parametrize("asked", [{"filters": LOW}, {"doc_ids": ["d"]}, {"node_ids": ["a"]}], ids=str)
async def test_an_expression_that_is_ignored_is_told_of_as_upstream_tells(
    open_store: Any, caplog: pytest.LogCaptureFixture, asked: dict[str, Any]
) -> None:
    """It may be a tenant's."""
    said = "string_expr in vector_store_kwargs is ignored because filters are provided"
    query = VectorStoreQuery(query_embedding=[0.5] * DIM, **asked)
    for kind in KINDS:
        store = open_store(kind)
        caplog.clear()
        store.query(query, string_expr="number < 4")
        assert [said in message for message in caplog.messages].count(True) == 1
    caplog.clear()
    await store.aquery_many([query, VectorStoreQuery(query_embedding=[0.5] * DIM)], string_expr=None)
    await store.aquery(VectorStoreQuery(query_embedding=[0.5] * DIM), string_expr="number < 4")
    assert said not in caplog.text
    await store.aquery(query, string_expr="number < 4")
    (told,) = [each for each in caplog.records if said in each.message]
    assert told.levelname == "WARNING" and told.name.startswith("llama_index_milvus_async_ext.")
    assert "number < 4" not in told.message, "it may hold what is secret"
    with pytest.raises(ValueError, match="string_expr must be a text, or None for none, got 4"):
        await store.aquery(query, string_expr=4)


@pytest.mark.usefixtures("way_to_milvus")
def test_a_partition_is_found_by_its_name_alone(open_store: Any, make_nodes: MakeNodes) -> None:
    store, nodes = open_store(), make_nodes(6)
    for name, some in (("left", nodes[:2]), ("right", nodes[2:5]), ("_default", nodes[5:])):
        if name != "_default":
            store.client.create_partition(store.collection_name, name)
        store.add(some, **({"milvus_partition_name": name} if name != "_default" else {}))
        there = store.client.query(store.collection_name, filter="id != ''", partition_names=[name])
        assert {row["id"] for row in there} == {node.node_id for node in some}
        query = VectorStoreQuery(query_embedding=nodes[0].embedding, similarity_top_k=9)
        assert set(store.query(query, milvus_partition_names=[name]).ids) == {node.node_id for node in some}


# --- looking up and deleting


async def test_nodes_are_looked_up_in_the_partitions_that_are_named(open_store: Any, make_nodes: MakeNodes) -> None:
    store, nodes = open_store(), make_nodes(6)
    ids = [node.node_id for node in nodes]
    store.client.create_partition(store.collection_name, "left")
    store.add(nodes[:2], milvus_partition_name="left")
    store.add(nodes[2:])
    for names, there in (["left"], ids[:2]), (["_default"], ids[2:]), (["left", "_default"], ids), (None, ids):
        options = {} if names is None else {"milvus_partition_names": names}
        every_one = MetadataFilters(filters=[MetadataFilter(key="number", value=0, operator=FilterOperator.GTE)])
        for what in ({"node_ids": ids}, {"filters": every_one}):
            for found in (store.get_nodes(**what, **options), await store.aget_nodes(**what, **options)):
                assert sorted(node.node_id for node in found) == there


async def test_a_delete_passes_its_other_options_on_as_upstreams_does(
    open_store: Any, watch: Watch, make_nodes: MakeNodes
) -> None:
    nodes = make_nodes(2)
    store = open_store()
    store.add(nodes)
    asked = watch("Delete")
    store.delete_nodes([nodes[0].node_id], consistency_level="Bounded", timeout=20.0)
    await store.adelete_nodes([nodes[1].node_id], consistency_level="Bounded", timeout=20.0)
    assert [request.consistency_level for request in asked] == [2, 2]
    assert store.get_nodes([node.node_id for node in nodes]) == []


def test_an_option_of_none_leaves_a_delete_its_bound_in_time(open_store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store, waited = open_store(rpc_timeout_seconds=5.0), []

    def noted(connection: Any, collection: str, *, timeout: Any, **_: Any) -> None:
        waited.append(timeout)

    monkeypatch.setattr(deleting, "delete", noted)
    store.delete("d", timeout=None)
    assert 0 < waited[0] <= 5


def test_another_column_for_the_documents_id_is_written_searched_and_deleted_by(
    open_store: Any, make_nodes: MakeNodes
) -> None:
    """The plain store can't write such rows, but it reads, finds and deletes them."""
    store = open_store(doc_id_field="document")
    theirs = open_store(MilvusVectorStore, doc_id_field="document")
    nodes = [*make_nodes(40), TextNode(id_="none", text="of no document", embedding=[0.5] * DIM)]
    nodes[5].metadata["document"] = "its own"
    ids = [node.node_id for node in nodes]
    assert store.add(nodes) == ids
    rows = store.client.query(store.collection_name, filter="id != ''", output_fields=["document", "doc_id"])
    expected = {node.node_id: node.ref_doc_id or "None" for node in nodes}
    assert {row["id"]: row["document"] for row in rows} == expected
    assert {row["id"]: row["doc_id"] for row in rows} == expected
    for ours, read_by_them in zip(store.get_nodes(ids), theirs.get_nodes(ids), strict=True):
        assert ours.model_dump() == read_by_them.model_dump()
    assert store.get_nodes([ids[5]])[0].metadata == nodes[5].metadata
    # Milvus finds LlamaIndex's own key "doc_id" among the dynamic fields as well: not so in rows of others.
    foreign = {"document": "d", "text": "foreign", "embedding": [0.5] * DIM, "_node_type": "TextNode"}
    foreign["_node_content"] = '{"id_": "f"}'
    store.client.insert(store.collection_name, [{"id": f"f{number}"} | foreign for number in range(3)])
    document, another = nodes[0].ref_doc_id, nodes[10].ref_doc_id
    query = VectorStoreQuery(query_embedding=[0.5] * DIM, similarity_top_k=50, doc_ids=[document, "d"])
    assert sorted(store.query(query).ids) == sorted(theirs.query(query).ids) == sorted([*ids[:10], "f0", "f1", "f2"])
    store.delete([document, "d"])
    assert sorted(store.query(VectorStoreQuery([0.5] * DIM, similarity_top_k=99)).ids) == sorted(ids[10:])
    theirs.delete(another)
    store.client.insert(store.collection_name, [{"id": "f3"} | foreign])
    with AsyncMilvusVectorStore.from_vector_store(theirs) as taken_over:
        taken_over.delete("d")
    assert sorted(store.query(VectorStoreQuery([0.5] * DIM, similarity_top_k=99)).ids) == sorted(ids[20:])


# --- which writes a read sees


def stamped(time: int) -> Fault:
    """Milvus carries the write out, and says that it did so at this time: Lite never says when."""

    def answer(exchange: Exchange) -> bytes:
        result = milvus_pb2.MutationResult.FromString(exchange.forward())
        result.timestamp = time
        serialized: bytes = result.SerializeToString()
        return serialized

    return answer


@pytest.mark.usefixtures("way_to_milvus")
async def test_a_read_asks_for_no_less_than_what_this_process_has_written(
    open_store: Any, proxy: FaultProxy, make_nodes: MakeNodes
) -> None:
    """By the time of the last write: what "Session" means, and what a server of another level passes over."""
    arguments = with_bm25(consistency_level="Session")
    store, theirs = open_store(**arguments), open_store(MilvusVectorStore, **arguments)
    asked: list[Any] = []
    proxy.script(Refuse(), method=("Query", *SEARCHES), when=lambda request: asked.append(request) is not None)
    now = 0

    def answered(exchange: Exchange) -> bytes:
        return stamped(now)(exchange)

    proxy.script(answered, method=("Delete", *WRITES))
    nodes = make_nodes(4)
    latest = 1
    for now, change in (
        (0, lambda: None),
        (10**6, lambda: store.add(nodes)),
        (10**6 + 5, lambda: open_store(**arguments, upsert_mode=False).add(make_nodes(1))),
        (10**6 + 7, lambda: store.delete_nodes([nodes[0].node_id])),
        (10**6 + 6, lambda: store.add(nodes[1:2])),  # answered late
        (10**6 + 9, lambda: theirs.add(nodes[3:])),
    ):
        change()
        latest = max(latest, now)
        for mode in (VectorStoreQueryMode.DEFAULT, MMR, SPARSE, HYBRID):
            query = VectorStoreQuery(query_embedding=[0.5] * DIM, query_str="node", mode=mode, similarity_top_k=3)
            asked.clear()
            store.query(query)
            await store.aquery(query)
            if mode != SPARSE:  # upstream's is refused by Lite
                theirs.query(query)
            assert {(each.guarantee_timestamp, each.use_default_consistency) for each in asked} == {(latest, True)}
            halves = {half.guarantee_timestamp for request in asked for half in getattr(request, "requests", ())}
            assert halves == ({latest} if mode == HYBRID else set())
        asked.clear()
        store.get_nodes([nodes[2].node_id])
        await store.aget_nodes(filters=LOW)
        assert [each.guarantee_timestamp for each in asked] == [latest] * 2


@pytest.mark.parametrize("level", ["Strong", "Session", "Bounded", "Eventually"])
def test_a_collection_keeps_the_consistency_that_it_was_made_with(open_store: Any, watch: Watch, level: str) -> None:
    asked = watch("CreateCollection", "Search", "Query")
    store = open_store(consistency_level=level)
    again = open_store(consistency_level="Eventually" if level != "Eventually" else "Strong")
    again.query(VectorStoreQuery(query_embedding=[0.5] * DIM))
    again.get_nodes(["a"])
    made, *read = asked
    assert made.consistency_level == ("Strong", "Session", "Bounded", "Eventually").index(level)
    assert [each.use_default_consistency for each in read] == [True, True], "the collection's own"
    assert store.consistency_level == level


# --- settings


def test_an_async_client_is_there_if_it_is_asked_for(open_store: Any) -> None:
    assert open_store(use_async_client=False).aclient is None
    assert open_store(use_async_client=True).aclient is not None


def test_a_store_that_is_taken_over_or_copied_keeps_all_its_settings(open_store: Any) -> None:
    """But for what happens once, and for the plain store's `upsert_mode` and `batch_size`, made for other requests."""
    settings = with_bm25(
        collection_properties={"collection.ttl.seconds": 3600},
        doc_id_field="document",
        text_key="words_of_it",
        scalar_field_names=["year"],
        scalar_field_types=[DataType.INT32],
        embedding_field="vector",
        sparse_embedding_field="words",
        index_management=IndexManagement.NO_VALIDATION,
        index_config={"index_type": "HNSW", "M": 8},
        sparse_index_config={"drop_ratio_build": 0.1},
        search_config={"params": {"ef": 33}},
        similarity_metric="L2",
        consistency_level="Bounded",
        output_fields=["year"],
        hybrid_ranker="WeightedRanker",
        hybrid_ranker_params={"weights": [0.2, 0.9]},
        use_async_client=False,
    )
    limits: dict[str, Any] = {
        "max_concurrency": 3,
        "batch_size": 77,
        "max_batch_bytes": 1 << 20,
        "max_batch_queries": 33,
        "rpc_timeout_seconds": 4.5,
        "retry": RetryPolicy(max_attempts=2),
    }
    plain_store = open_store(MilvusVectorStore, **settings, batch_size=5)
    taken_over = AsyncMilvusVectorStore.from_vector_store(plain_store, **limits)
    with taken_over, copy.deepcopy(taken_over) as copied, pickle.loads(pickle.dumps(copied)) as unpickled:
        for store in (taken_over, copied, unpickled):
            kept = settings | limits | {"dim": DIM, "collection_name": plain_store.collection_name, "upsert_mode": True}
            kept["sparse_embedding_function"] = plain_store.sparse_embedding_function
            assert {name: getattr(store, name) for name in kept} == kept
            assert not store.overwrite
    with AsyncMilvusVectorStore.from_vector_store(plain_store) as store:
        assert (store.batch_size, store.max_concurrency, store.retry) == (800, 8, RetryPolicy())
    with AsyncMilvusVectorStore.from_vector_store(plain_store, upsert_mode=False) as store:
        assert not store.upsert_mode, "what is asked for counts"


def test_numbers_and_flags_may_be_texts_as_they_stand_in_an_environment(open_store: Any) -> None:
    """The second time as well, when they are compared with what is there; and "false" drops no collection."""
    arguments: dict[str, Any] = {"dim": "8", "batch_size": "5", "max_concurrency": "3", "max_batch_bytes": "1024"}
    arguments |= {"max_batch_queries": "7", "rpc_timeout_seconds": "4.5", "upsert_mode": "true", "overwrite": "false"}
    arguments |= {"use_async_client": "0", "enable_sparse": "no"}
    for _ in range(2):
        store = open_store(**arguments)
        has = {name: getattr(store, name) for name in arguments}
        expected = {"dim": 8, "batch_size": 5, "max_concurrency": 3, "max_batch_bytes": 1024, "max_batch_queries": 7}
        expected |= {"rpc_timeout_seconds": 4.5, "upsert_mode": True, "overwrite": False}
        assert has == expected | {"use_async_client": False, "enable_sparse": False}
        assert [type(value) for value in has.values()] == [int] * 5 + [float] + [bool] * 4
        ids = store.add([TextNode(id_="a", text="a", embedding=[0.5] * DIM)])
        assert [node.node_id for node in store.get_nodes(ids)] == ["a"]
    with pytest.raises(ValueError, match="has dimension 8, but dim=9 is asked for"):
        open_store(dim="9")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("dim", "four", "dim must be a whole number, got 'four'"),
        ("dim", 4.5, "dim must be a whole number, got 4.5"),
        ("batch_size", "", "batch_size must be a whole number, got ''"),
        ("max_concurrency", None, "max_concurrency must be a whole number, got None"),
        ("rpc_timeout_seconds", "soon", "rpc_timeout_seconds must be a number, got 'soon'"),
        ("max_batch_queries", "0", "max_batch_queries must be positive, got 0"),
        ("overwrite", "perhaps", "overwrite must be True or False, got 'perhaps'"),
    ],
)
def test_what_is_no_number_and_no_flag_is_named(open_store: Any, name: str, value: Any, says: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(says)}$"):
        open_store(**{name: value})


def test_a_store_is_made_anew_from_its_description(open_store: Any, proxy: FaultProxy) -> None:
    policy = RetryPolicy(max_attempts=7, stop=tenacity.stop_after_delay(60))
    store = open_store(retry=policy, max_concurrency=3, token="root:s3cret")
    described = store.to_dict()
    assert "s3cret" not in str(described)
    for make in (AsyncMilvusVectorStore.from_dict, lambda described: AsyncMilvusVectorStore(**described)):
        with make(described) as again:
            assert (again.retry, again.max_concurrency, again.dim) == (policy, 3, DIM)
            assert again._settings.options == open_store()._settings.options, "nothing else went to the connection"
            again.add([TextNode(id_="a", text="a", embedding=[0.5] * DIM)])
            assert again.query(VectorStoreQuery(query_embedding=[0.5] * DIM)).ids == ["a"]
            assert [node.node_id for node in again.get_nodes(["a"])] == ["a"]
            again.delete("none")
    with pytest.raises(TypeError, match=r"retry must be a RetryPolicy, got int"):
        open_store(retry=5)
    with pytest.raises(TypeError, match=r"retry is a dict with 'attempts', which is no setting of a RetryPolicy"):
        open_store(retry={"attempts": 5})
    with pytest.raises(ValueError, match=r"retry is no RetryPolicy's dict: .*max_attempts must be at least 1"):
        open_store(retry={"max_attempts": 0})
    with pytest.raises(ValueError, match=r"retry is no RetryPolicy's dict of 'max_attempts': .* valid integer"):
        open_store(retry={"max_attempts": "many"})
    assert open_store(retry={"max_attempts": "5"}).retry == RetryPolicy(max_attempts=5)


@pytest.mark.parametrize("kind", [MilvusVectorStore, AsyncMilvusVectorStore, AsyncMilvusWriter])
def test_a_class_describes_its_fields_as_a_json_schema(kind: Any) -> None:
    assert set(kind.model_fields) <= set(kind.model_json_schema()["properties"])


# --- the limits of a request


async def test_the_limits_of_a_request_are_kept(open_store: Any, watch: Watch, make_nodes: MakeNodes) -> None:
    nodes = make_nodes(20)
    for node in nodes:
        node.text = "x" * 1_000
    sent = watch(*WRITES)
    open_store(max_batch_bytes=10_000).add(nodes)
    assert sum(request.num_rows for request in sent) == 20
    assert 1 < max(request.num_rows for request in sent) < 10
    asked = watch("Search")
    store = open_store(max_batch_queries=3)
    await store.aquery_many([VectorStoreQuery(query_embedding=node.embedding) for node in nodes])
    assert sum(request.nq for request in asked) == 20
    assert max(request.nq for request in asked) == 3


def test_each_request_names_the_database(open_store: Any, proxy: FaultProxy, make_nodes: MakeNodes) -> None:
    named: set[tuple[str, str | None]] = set()

    def note(exchange: Any) -> bytes:
        named.add((exchange.method, dict(exchange.context.invocation_metadata()).get("dbname")))
        answer: bytes = exchange.forward()
        return answer

    methods = ("Insert", "Upsert", "Search", "HybridSearch", "Query", "Delete", "Flush", "DescribeCollection")
    proxy.script(note, method=methods)
    store = open_store(**with_bm25(db_name="default"))
    nodes = make_nodes(2)
    store.add(nodes, force_flush=True)
    for mode in (VectorStoreQueryMode.DEFAULT, HYBRID):
        store.query(VectorStoreQuery(query_embedding=[0.5] * DIM, query_str="node", mode=mode))
    open_store(**with_bm25(db_name="default"), upsert_mode=False).add(nodes)
    store.get_nodes(["a"])
    store.delete_nodes([nodes[0].node_id])
    assert named == {(method, "default") for method in methods}


# --- the retriever


class Asked(AsyncMilvusVectorStore):
    """Notes what it is asked."""

    _asked: list[tuple[VectorStoreQuery, dict[str, Any]]] = PrivateAttr(default_factory=list)

    def query_many(self, queries: Any, **kwargs: Any) -> Any:
        self._asked += [(query, kwargs) for query in queries]
        return super().query_many(queries, **kwargs)

    async def aquery_many(self, queries: Any, **kwargs: Any) -> Any:
        self._asked += [(query, kwargs) for query in queries]
        return await super().aquery_many(queries, **kwargs)


RETRIEVER: dict[str, dict[str, Any]] = {
    "nothing": {},
    "similarity_top_k": {"similarity_top_k": 7},
    "vector_store_query_mode": {"vector_store_query_mode": "mmr"},
    "sparse": {"vector_store_query_mode": "sparse"},
    "hybrid": {"vector_store_query_mode": HYBRID, "alpha": 0.3, "sparse_top_k": 4, "hybrid_top_k": 5},
    "filters": {"filters": LOW},
    "alpha": {"alpha": 0.3},
    "node_ids": {"node_ids": ["a", "b"]},
    "doc_ids": {"doc_ids": ["c", "d"]},
    "sparse_top_k": {"sparse_top_k": 4},
    "hybrid_top_k": {"hybrid_top_k": 5},
    "vector_store_kwargs": {"vector_store_kwargs": {"milvus_search_config": {"params": {"ef": 3}}}},
    "partitions": {"vector_store_kwargs": {"milvus_partition_names": ["_default"], "string_expr": "number > 1"}},
    "MMR": {
        "vector_store_query_mode": "mmr",
        "vector_store_kwargs": {"mmr_threshold": 0.1, "mmr_prefetch_k": 9},
    },
}


async def test_a_retriever_asks_what_upstreams_asks(open_store: Any) -> None:
    model = HashEmbedding(dim=DIM)
    store = open_store(Asked, **with_bm25())
    index = VectorStoreIndex.from_vector_store(store, embed_model=model)
    for arguments in RETRIEVER.values():
        ours = AsyncMilvusRetriever(store, embed_model=model, **arguments)
        VectorIndexRetriever(index, **arguments).retrieve("a question")
        ours.retrieve("a question")
        await ours.aretrieve("a question")
        await ours.aretrieve_many(["a question"])
        expected, *asked = store._asked
        assert asked == [expected] * 3
        store._asked.clear()
    AsyncMilvusRetriever(store, embed_model=model, vector_store_kwargs=None).retrieve("a question")
    store._asked.clear()
    ours.similarity_top_k = 6
    ours.retrieve("a question")
    assert store._asked[0][0].similarity_top_k == ours.similarity_top_k == 6
    names = set(inspect.signature(VectorIndexRetriever.__init__).parameters) - {"self", "kwargs", "index"}
    looked_at = {name for arguments in RETRIEVER.values() for name in arguments} - {"vector_store_kwargs"}
    assert names == looked_at | {"embed_model", "callback_manager", "object_map", "verbose"}


async def test_a_retriever_is_a_retriever_of_llamaindex(open_store: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """What it hands on to the base class: callbacks, the objects of index nodes, and whether to say what it does."""
    store, model = open_store(), HashEmbedding(dim=DIM)
    store.add([IndexNode(id_="i", text="an index", index_id="elsewhere", embedding=model.vector("an index"))])
    heard = LlamaDebugHandler(print_trace_on_end=False)
    retriever = AsyncMilvusRetriever(
        store,
        embed_model=model,
        callback_manager=CallbackManager([heard]),
        object_map={"elsewhere": TextNode(id_="t", text="the object")},
        verbose=True,
    )
    found = [
        retriever.retrieve("index"),
        await retriever.aretrieve("index"),
        *await retriever.aretrieve_many(["index"]),
    ]
    assert [[each.node.get_content() for each in nodes] for nodes in found] == [["the object"]] * 3
    assert len(heard.get_event_pairs(CBEventType.RETRIEVE)) == 3
    assert capsys.readouterr().out
    AsyncMilvusRetriever(store, embed_model=model).retrieve("index")
    assert not capsys.readouterr().out
    assert len(heard.get_event_pairs(CBEventType.RETRIEVE)) == 3
