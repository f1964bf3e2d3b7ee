"""The drop-in store: the same as upstream's for whoever uses it, on Lite and on the server."""

from __future__ import annotations

import asyncio
import gc
import inspect
import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from llama_index.core.schema import (
    BaseNode,
    Document,
    ImageNode,
    IndexNode,
    NodeRelationship,
    RelatedNodeInfo,
    TextNode,
)
from llama_index.core.vector_stores.types import (
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)
from llama_index.vector_stores.milvus import MilvusVectorStore
from pymilvus import DataType, MilvusClient
from pymilvus.exceptions import MilvusException

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, RetryPolicy, WriteError
from tests.conftest import Backend, MakeNodes

DIM = 8


@pytest.fixture
def make_store(backend: Backend, collection_name: str) -> Any:
    stores: list[AsyncMilvusVectorStore] = []

    def make(**changes: Any) -> AsyncMilvusVectorStore:
        arguments = {
            "uri": backend.uri,
            "collection_name": collection_name,
            "dim": DIM,
            "consistency_level": "Strong",
        }
        stores.append(AsyncMilvusVectorStore(**(arguments | changes)))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def make_upstream(backend: Backend, collection_name: str) -> Any:
    stores: list[MilvusVectorStore] = []

    def make(**changes: Any) -> MilvusVectorStore:
        arguments = {
            "uri": backend.uri,
            "collection_name": collection_name,
            "dim": DIM,
            "consistency_level": "Strong",
            "use_async_client": False,
        }
        stores.append(MilvusVectorStore(**(arguments | changes)))
        return stores[-1]

    yield make
    for store in stores:  # one with a token has a connection of its own, whose pings are too many for Lite
        store.client.close()


def same_node(one: BaseNode, other: BaseNode) -> None:
    assert type(one) is type(other)
    assert one.model_dump(exclude={"embedding"}) == other.model_dump(exclude={"embedding"})


def count(store: AsyncMilvusVectorStore) -> int:
    rows = store.client.query(store.collection_name, filter="", output_fields=["count(*)"], consistency_level="Strong")
    return int(rows[0]["count(*)"])


# --- what is public


def test_every_upstream_argument_is_taken_in_its_place() -> None:
    theirs = inspect.signature(MilvusVectorStore.__init__).parameters
    ours = inspect.signature(AsyncMilvusVectorStore.__init__).parameters
    positional = [name for name, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [name for name in theirs if name != "kwargs"]
    changed = {name for name in positional if ours[name].default != theirs[name].default}
    assert changed == {"upsert_mode", "batch_size", "similarity_metric", "hybrid_ranker_params"}


# --- writes


async def test_nodes_come_back_as_they_were(make_store: Any, make_nodes: MakeNodes) -> None:
    store, nodes = make_store(), make_nodes(300, dim=DIM)
    assert await store.async_add(nodes) == [node.node_id for node in nodes]
    found = {node.node_id: node for node in await store.aget_nodes(node_ids=[node.node_id for node in nodes])}
    assert len(found) == len(nodes)
    for node in nodes:
        same_node(found[node.node_id], node)
        assert found[node.node_id].embedding == pytest.approx(node.embedding, rel=1e-6)


def node_of_each_type() -> list[BaseNode]:
    related = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id="doc", metadata={"a": 1})}
    vector = [0.5] * DIM
    return [
        TextNode(
            id_="text", text="text ü 🌍", metadata={"n": 1, "f": 0.5, "l": [1, 2], "d": {"x": None}}, embedding=vector
        ),
        ImageNode(id_="image", text="an image", image_url="http://x/y.png", embedding=vector, relationships=related),
        IndexNode(id_="index", text="an index", index_id="elsewhere", embedding=vector, relationships=related),
        Document(id_="document", text="a document", metadata={"title": 'with "quotes"'}, embedding=vector),
        TextNode(id_="empty", text="", embedding=vector),
    ]


def test_rows_are_read_alike_by_upstream_and_by_this(make_store: Any, make_upstream: Any) -> None:
    store, upstream = make_store(), make_upstream()
    nodes = node_of_each_type()
    ids = [node.node_id for node in nodes]
    store.add(nodes)
    by_us, by_them = store.get_nodes(node_ids=ids), upstream.get_nodes(node_ids=ids)
    assert len(by_us) == len(nodes)
    for ours, theirs in zip(by_us, by_them, strict=True):
        same_node(ours, theirs)
    upstream.delete_nodes(node_ids=ids)
    upstream.add(nodes)
    for ours, theirs in zip(store.get_nodes(node_ids=ids), by_them, strict=True):
        same_node(ours, theirs)
    originals = {node.node_id: node for node in nodes}
    for node in by_us:
        original = originals[node.node_id]
        assert (node.get_content(), node.metadata, node.relationships) == (
            original.get_content(),
            original.metadata,
            original.relationships,
        )
        if not isinstance(original, Document):  # upstream reads a document as a text node
            assert type(node) is type(original)


async def test_a_bad_node_fails_alone_and_is_named(make_store: Any, make_nodes: MakeNodes) -> None:
    store, nodes = make_store(), make_nodes(50, dim=DIM)
    nodes[7].embedding = None
    nodes[20].embedding = [0.1] * (DIM + 1)
    nodes[30].text = "é" * 32_767 + "x"  # 65,535 bytes
    nodes[40].text = "é" * 32_768
    report = await store.awrite(nodes)
    assert [f.node for f in report.failed] == [nodes[7], nodes[20], nodes[40]]
    assert report.written == [n.node_id for i, n in enumerate(nodes) if i not in (7, 20, 40)]
    assert not report.unknown
    assert count(store) == 47
    (whole,) = store.get_nodes([nodes[30].node_id])
    assert whole.get_content() == nodes[30].text
    with pytest.raises(WriteError) as raised:
        await store.async_add(nodes)
    message = str(raised.value)
    assert message.startswith("3 of 50 nodes were not written (3 failed, 0 unknown):\n")
    for node, problem in (
        (nodes[7], "it has no embedding"),
        (nodes[20], f"its embedding has {DIM + 1} dimensions, the collection has {DIM}"),
        (nodes[40], "its 'text' has 65536 bytes in UTF-8, and the column takes 65535"),
    ):
        assert f"  node {node.node_id!r} can't be stored: {problem}; " in message
    assert [failed.node for failed in raised.value.report.failed] == [nodes[7], nodes[20], nodes[40]]
    assert raised.value.report.written == report.written


async def test_in_a_session_all_that_was_written_before_is_seen(make_store: Any, make_nodes: MakeNodes) -> None:
    """But not what was deleted: the 2.3.5 server does not say when it did that, to the plain store neither."""
    store = make_store(consistency_level="Session")
    for node in make_nodes(10, dim=DIM):
        await store.async_add([node])
        found = await store.aquery(VectorStoreQuery(query_embedding=node.embedding, node_ids=[node.node_id]))
        assert found.ids == [node.node_id]
        node.text = "changed"
        store.add([node])
        assert [one.get_content() for one in store.get_nodes([node.node_id])] == ["changed"]


def test_of_two_nodes_with_one_id_the_last_wins(make_store: Any) -> None:
    for upsert_mode in (True, False):
        store = make_store(upsert_mode=upsert_mode)
        nodes = [
            TextNode(id_=f"twice-{upsert_mode}", text=f"text {n}", embedding=[0.1 * n + 0.1] * DIM) for n in range(5)
        ]
        assert store.add(nodes) == [nodes[0].node_id] * 5
        found = store.client.query(store.collection_name, filter=f'id == "{nodes[0].node_id}"', output_fields=["text"])
        assert [row["text"] for row in found] == ["text 4"]


async def test_a_second_run_stores_nothing_twice(make_store: Any, make_nodes: MakeNodes) -> None:
    store, nodes = make_store(), make_nodes(100, dim=DIM)
    await store.async_add(nodes)
    await store.async_add(nodes)
    assert count(store) == 100


def test_adding_nothing_is_nothing(make_store: Any) -> None:
    store = make_store()
    assert store.add([]) == []
    assert asyncio.run(store.async_add([])) == []
    assert store.query_many([]) == []
    assert store.get_nodes(node_ids=[]) == []
    store.delete_nodes(node_ids=[])
    store.delete([])


def test_partitions(make_store: Any, make_nodes: MakeNodes, backend: Backend) -> None:
    store, nodes = make_store(), make_nodes(4, dim=DIM)
    store.client.create_partition(store.collection_name, "left")
    store.client.create_partition(store.collection_name, "right")
    store.add(nodes[:2], milvus_partition_name="left")
    store.add(nodes[2:], milvus_partition_name="right")
    query = VectorStoreQuery(query_embedding=nodes[0].embedding, similarity_top_k=10)
    found = store.query(query, milvus_partition_names=["right"])
    assert set(found.ids or []) == {node.node_id for node in nodes[2:]}
    assert len(store.get_nodes(node_ids=[n.node_id for n in nodes], milvus_partition_names=["left"])) == 2
    store.delete(nodes[0].ref_doc_id, milvus_partition_name="left")
    if backend.name == "server":  # Milvus Lite deletes in all partitions
        assert {n.node_id for n in store.get_nodes([n.node_id for n in nodes])} == {n.node_id for n in nodes[2:]}


SCALARS = {
    "number": DataType.INT64,
    "group": DataType.VARCHAR,
    "year": DataType.INT32,
    "level": DataType.INT8,
    "share": DataType.FLOAT,
    "score": DataType.DOUBLE,
    "done": DataType.BOOL,
}


def test_scalar_columns(make_store: Any, make_nodes: MakeNodes) -> None:
    store = make_store(scalar_field_names=list(SCALARS), scalar_field_types=list(SCALARS.values()))
    nodes = make_nodes(16, dim=DIM)
    for node in nodes:
        node.metadata |= {"year": 2**31 - 1, "level": -128, "share": 0.5, "score": -0.0, "done": False}
    nodes[0].metadata |= {"year": -(2**31), "level": 127, "share": 2**64, "score": 1e300, "done": True}
    nodes[1].metadata |= {"number": 2**63 - 1, "group": "é" * 9}
    wrong: dict[int, dict[str, Any]] = {
        3: {"group": None},
        4: {"year": 2**31},
        5: {"year": -(2**31) - 1},
        6: {"number": 2**63},
        7: {"level": 128},
        8: {"share": 1e39},
        9: {"done": 2},
        10: {"score": "0.5"},
        11: {"score": 10**400},
    }
    for place, metadata in wrong.items():
        nodes[place].metadata |= metadata
    report = store.write(nodes)
    assert report.written == [node.node_id for place, node in enumerate(nodes) if place not in wrong]
    for failed, (place, metadata) in zip(report.failed, wrong.items(), strict=True):
        assert failed.node is nodes[place] and failed.attempts == 0
        assert repr(next(iter(metadata))) in str(failed.error)
    rows = store.client.query(store.collection_name, filter="id != ''", output_fields=list(SCALARS))
    stored = {row.pop("id"): {name: row[name] for name in SCALARS} for row in rows}
    assert stored == {
        node.node_id: {name: node.metadata[name] for name in SCALARS}
        for node in nodes
        if node.node_id in report.written
    }
    filters = MetadataFilters(filters=[MetadataFilter(key="number", value=4, operator=FilterOperator.LT)])
    assert len(store.get_nodes(filters=filters)) == 2


# --- any loop, any thread


def test_a_second_event_loop_and_threads_share_the_store(make_store: Any, make_nodes: MakeNodes) -> None:
    store, nodes = make_store(), make_nodes(400, dim=DIM)
    parts = [nodes[start : start + 50] for start in range(0, 400, 50)]
    asyncio.run(store.async_add(parts[0]))
    asyncio.run(store.async_add(parts[1]))
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(store.add, parts[2:5]))
        list(threads.map(lambda part: asyncio.run(store.async_add(part)), parts[5:]))
    assert count(store) == 400


async def test_sync_calls_work_inside_a_running_loop(make_store: Any, make_nodes: MakeNodes) -> None:
    store, nodes = make_store(), make_nodes(20, dim=DIM)
    assert len(store.add(nodes)) == 20
    query = VectorStoreQuery(query_embedding=nodes[3].embedding, similarity_top_k=1)
    assert store.query(query).nodes is not None
    assert len(store.get_nodes(node_ids=[nodes[0].node_id])) == 1
    store.delete_nodes(node_ids=[nodes[0].node_id])
    assert store.get_nodes(node_ids=[nodes[0].node_id]) == []


async def test_a_thousand_single_adds_travel_in_few_requests(make_store: Any, make_nodes: MakeNodes) -> None:
    store, nodes = make_store(), make_nodes(1_000, dim=DIM)
    before = store.statistics()
    ids = await asyncio.gather(*(store.async_add([node]) for node in nodes))
    assert ids == [[node.node_id] for node in nodes]
    assert store.statistics().requests - before.requests < 40
    assert count(store) == 1_000


# --- queries


@pytest.fixture
def filled(make_store: Any, make_upstream: Any, make_nodes: MakeNodes) -> Any:
    store = make_store()
    nodes = make_nodes(200, dim=DIM, seed=5)
    store.add(nodes)
    return store, make_upstream(), nodes


def same_result(ours: Any, theirs: Any) -> None:
    assert ours.ids == theirs.ids
    assert ours.similarities == pytest.approx(theirs.similarities, rel=1e-5)
    for one, other in zip(ours.nodes, theirs.nodes, strict=True):
        same_node(one, other)


def queries_of(nodes: list[TextNode], **changes: Any) -> list[VectorStoreQuery]:
    return [
        VectorStoreQuery(query_embedding=n.embedding, similarity_top_k=3, query_str=n.text, **changes) for n in nodes
    ]


def test_results_equal_upstreams(filled: Any) -> None:
    store, upstream, nodes = filled
    filters = MetadataFilters(filters=[MetadataFilter(key="group", value="g2")])
    for changes in ({}, {"filters": filters}, {"doc_ids": [nodes[0].ref_doc_id]}, {"node_ids": [nodes[1].node_id]}):
        for query in queries_of(nodes[:5], **changes):
            same_result(store.query(query), upstream.query(query))
    none = MetadataFilters(filters=[MetadataFilter(key="group", value="nowhere")])
    assert store.query(queries_of(nodes[:1], filters=none)[0]).ids == []
    for query in queries_of(nodes[:2], output_fields=["number"]):
        ours, theirs = store.query(query), upstream.query(query)
        assert [n.node_id for n in ours.nodes] == ours.ids == theirs.ids, "upstream makes ids up here"
        assert [n.get_content() for n in ours.nodes] == [n.get_content() for n in theirs.nodes]


def test_mmr_equals_upstreams(filled: Any) -> None:
    store, upstream, nodes = filled
    for query in queries_of(nodes[:5], mode=VectorStoreQueryMode.MMR):
        for options in ({}, {"mmr_threshold": 0.3}, {"mmr_prefetch_k": 20}):
            same_result(store.query(query, **options), upstream.query(query, **options))


async def test_each_of_many_concurrent_queries_gets_its_own_answer(filled: Any) -> None:
    store, upstream, nodes = filled
    rest = [upstream.query(query) for query in queries_of(nodes[:50])]
    before = store.statistics()
    together = await asyncio.gather(*map(store.aquery, queries_of(nodes[:50])))
    assert store.statistics().requests - before.requests <= 10
    many = await store.aquery_many(queries_of(nodes[:50]))
    for one, two, other in zip(together, many, rest, strict=True):
        same_result(one, other)
        same_result(two, other)


async def test_a_request_asks_for_no_more_hits_than_an_answer_holds(filled: Any) -> None:
    store, upstream, nodes = filled
    queries = [VectorStoreQuery(query_embedding=node.embedding, similarity_top_k=5_000) for node in nodes[:10]]
    before = store.statistics().requests
    answers = await store.aquery_many(queries)
    assert store.statistics().requests - before == 5
    for query, answer in zip(queries, answers, strict=True):
        assert len(answer.ids) == 200
        assert answer.ids == upstream.query(query).ids


async def test_queries_with_different_filters_keep_apart(filled: Any) -> None:
    store, _, nodes = filled
    chance = random.Random(1)
    jobs = []
    for _ in range(100):
        group = chance.choice(["g0", "g1", "g2", "none"])
        filters = MetadataFilters(filters=[MetadataFilter(key="group", value=group)])
        jobs.append((group, queries_of([chance.choice(nodes)], filters=filters)[0]))
    answers = await asyncio.gather(*(store.aquery(query) for _, query in jobs))
    for (group, _), answer in zip(jobs, answers, strict=True):
        assert len(answer.ids) == (0 if group == "none" else 3)
        assert all(node.metadata["group"] == group for node in answer.nodes)


async def test_a_bad_query_fails_alone(filled: Any) -> None:
    store, upstream, nodes = filled
    good = queries_of(nodes[:10])
    short = VectorStoreQuery(query_embedding=[0.1] * 3, similarity_top_k=3)
    nan = VectorStoreQuery(query_embedding=[float("nan")] * DIM, similarity_top_k=3)
    bare = VectorStoreQuery(similarity_top_k=3)
    jobs = [store.aquery(query) for query in (*good, short, nan, bare)]
    jobs.append(store.aquery(good[0], string_expr="this is no ( expression"))
    answers = await asyncio.gather(*jobs, return_exceptions=True)
    for answer, query in zip(answers, good, strict=False):
        same_result(answer, upstream.query(query))
    assert "3 dimensions" in str(answers[10])
    assert "NaN" in str(answers[11])
    assert "embed_model" in str(answers[12])
    assert isinstance(answers[13], Exception)


@pytest.mark.parametrize("mode", ["svm", "semantic_hybrid", "sparse", "hybrid"])
def test_a_mode_that_the_store_cant_answer_is_named(filled: Any, mode: str) -> None:
    store, _, nodes = filled
    with pytest.raises(ValueError, match=mode):
        store.query(queries_of(nodes[:1], mode=VectorStoreQueryMode(mode))[0])


@pytest.mark.parametrize("top_k", [0, -1, 20_000])
def test_top_k_out_of_range_is_named(filled: Any, top_k: int, backend: Backend) -> None:
    store, _, nodes = filled
    if backend.name == "lite" and top_k > 0:
        pytest.skip("Milvus Lite has no such limit")
    query = VectorStoreQuery(query_embedding=nodes[0].embedding, similarity_top_k=top_k)
    with pytest.raises(ValueError, match="similarity_top_k"):
        store.query(query)


# --- deletes and look-ups


async def test_deleting_by_document_node_and_filter(make_store: Any, make_nodes: MakeNodes) -> None:
    store, nodes = make_store(), make_nodes(60, dim=DIM)
    await store.async_add(nodes)
    await store.adelete(nodes[0].ref_doc_id)
    assert count(store) == 50
    store.delete([nodes[10].ref_doc_id, nodes[20].ref_doc_id])
    assert count(store) == 30
    await store.adelete_nodes(node_ids=[nodes[30].node_id, "not there"])
    assert count(store) == 29
    filters = MetadataFilters(filters=[MetadataFilter(key="group", value="g1")])
    left = {n.node_id for n in nodes[31:] if n.metadata["group"] != "g1"}
    store.delete_nodes(filters=filters)
    assert {n.node_id for n in store.get_nodes(node_ids=[n.node_id for n in nodes])} == left
    with pytest.raises(ValueError, match="node_ids or filters"):
        store.delete_nodes()
    assert count(store) == len(left)


async def test_what_was_just_written_is_deleted_at_any_consistency(make_store: Any, make_nodes: MakeNodes) -> None:
    store, nodes = make_store(consistency_level="Bounded"), make_nodes(40, dim=DIM)
    for start in range(0, 40, 10):
        await store.async_add(nodes[start : start + 10])
        await store.adelete(nodes[start].ref_doc_id)
    assert count(store) == 0


@pytest.mark.parametrize("hostile", ['x"] or doc_id not in ["zz', "it's", "back\\slash", "new\nline", "🌍", "a" * 300])
def test_hostile_ids_touch_only_what_they_name(make_store: Any, make_nodes: MakeNodes, hostile: str) -> None:
    store, nodes = make_store(), make_nodes(10, dim=DIM)
    named = TextNode(
        id_=hostile,
        text="named",
        embedding=[0.1] * DIM,
        relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=hostile)},
    )
    store.add([*nodes, named])
    assert [n.node_id for n in store.get_nodes(node_ids=[hostile])] == [hostile]
    query = VectorStoreQuery(query_embedding=[0.1] * DIM, similarity_top_k=20)
    assert store.query(VectorStoreQuery(**(vars(query) | {"doc_ids": [hostile]}))).ids == [hostile]
    assert store.query(VectorStoreQuery(**(vars(query) | {"node_ids": [hostile]}))).ids == [hostile]
    store.delete(hostile)
    assert count(store) == 10


def test_more_ids_than_a_request_takes(make_store: Any, make_nodes: MakeNodes) -> None:
    store, nodes = make_store(), make_nodes(2_500, dim=DIM)
    store.add(nodes)
    ids = [node.node_id for node in nodes]
    assert {node.node_id for node in store.get_nodes(node_ids=ids)} == set(ids)
    store.delete_nodes(node_ids=ids)
    assert count(store) == 0


async def test_clear_drops_the_collection(make_store: Any, make_nodes: MakeNodes, collection_name: str) -> None:
    store = make_store()
    await store.async_add(make_nodes(3, dim=DIM))
    await store.aclear()
    assert not store.client.has_collection(collection_name)
    report = await store.awrite(make_nodes(3, dim=DIM))
    assert len(report.failed) == 3
    again = make_store(dim=DIM * 2)
    again.add(make_nodes(3, dim=DIM * 2))
    assert count(again) == 3


def test_overwrite_starts_anew(make_store: Any, make_nodes: MakeNodes) -> None:
    make_store().add(make_nodes(5, dim=DIM))
    store = make_store(overwrite=True, dim=DIM * 2)
    assert count(store) == 0
    store.add(make_nodes(5, dim=DIM * 2))
    assert count(store) == 5


# --- arguments that do not fit


def test_an_existing_collection_that_does_not_fit_is_refused(make_store: Any, backend: Backend) -> None:
    make_store(similarity_metric="COSINE")
    with pytest.raises(ValueError, match=f"dimension {DIM}, but dim=99"):
        make_store(dim=99)
    with pytest.raises(ValueError, match="metric COSINE"):
        make_store(similarity_metric="L2")
    with pytest.raises(ValueError, match="no field 'other'"):
        make_store(embedding_field="other")
    assert make_store(dim=None).dim == DIM
    if backend.name == "server":  # on Lite it would cost seconds, and nothing depends on it
        assert make_store().similarity_metric == "COSINE"


@pytest.mark.parametrize("name", ["max_concurrency", "batch_size", "max_batch_bytes", "rpc_timeout_seconds"])
def test_limits_must_be_positive(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        AsyncMilvusVectorStore(uri="http://127.0.0.1:1", **{name: 0})
    with pytest.raises(ValueError, match="max_attempts"):
        RetryPolicy(max_attempts=0)


# --- the life of a store


async def test_closing(make_store: Any, make_nodes: MakeNodes) -> None:
    store = make_store()
    writing = asyncio.create_task(store.async_add(make_nodes(2_000, dim=DIM)))
    await asyncio.sleep(0)
    await store.aclose()
    assert len(await writing) == 2_000, "what was under way is finished first"
    await store.aclose()
    store.close()
    for use in (lambda: store.add(make_nodes(1, dim=DIM)), lambda: store.client, store.statistics):
        with pytest.raises(RuntimeError, match="closed"):
            use()
    async with make_store() as other:
        assert count(other) == 2_000
    with pytest.raises(RuntimeError, match="closed"):
        await other.async_add(make_nodes(1, dim=DIM))


def test_statistics(make_store: Any, make_nodes: MakeNodes) -> None:
    store = make_store()
    before = store.statistics()
    assert before.limit >= store.max_concurrency, "what may be in flight, though nothing has been"
    store.add(make_nodes(30, dim=DIM))
    after = store.statistics()
    assert after.rows - before.rows == 30
    assert after.requests > before.requests
    assert (after.in_flight, after.waiting) == (0, 0)
    store.query_many([VectorStoreQuery(query_embedding=[0.5] * DIM)] * 3)
    last = store.statistics()
    assert (last.queries - after.queries, last.rows - after.rows) == (3, 0)


def test_settings_that_are_changed_count_from_the_next_call(make_store: Any, make_nodes: MakeNodes) -> None:
    store = make_store()
    nodes = make_nodes(4)
    store.add(nodes[:2])
    store.batch_size = 1
    before = store.statistics().requests
    store.add(nodes[2:])
    assert store.statistics().requests - before == 2


def test_a_plain_store_is_taken_over_with_its_connection(
    make_upstream: Any, make_nodes: MakeNodes, backend: Backend
) -> None:
    upstream = make_upstream(similarity_metric="L2", token="root:Milvus")
    store = AsyncMilvusVectorStore.from_vector_store(upstream, max_concurrency=2)
    nodes = make_nodes(5, dim=DIM)
    store.add(nodes)
    ids = [node.node_id for node in nodes]
    assert [node.node_id for node in upstream.get_nodes(node_ids=ids)] == ids
    assert count(store) == 5
    assert store.uri == backend.uri
    assert store.similarity_metric == "L2"
    assert store.max_concurrency == 2
    assert AsyncMilvusVectorStore.from_vector_store(store) is store
    store.close()
    upstream.client.list_collections()


async def test_no_secret_is_shown(make_store: Any, make_nodes: MakeNodes, log: pytest.LogCaptureFixture) -> None:
    store = make_store(token="root:s3cret")
    report = await store.awrite(make_nodes(2, dim=DIM + 1))
    with pytest.raises(MilvusException) as refused:
        await store.aquery(VectorStoreQuery(query_embedding=[0.5] * DIM), string_expr="this is no ( expression")
    await store.aclear()
    with pytest.raises(MilvusException) as not_found:
        store.query(VectorStoreQuery(query_embedding=[0.5] * DIM))
    shown = [repr(store), str(store), str(store.to_dict()), str(vars(store)), str(store.statistics())]
    shown += [repr(report), *(str(failed.error) for failed in report.failed)]
    shown += [repr(error.value) + str(error.value) for error in (refused, not_found)]
    assert not any("s3cret" in text for text in shown)
    assert log.records, "down to DEBUG, and pymilvus's as well"
    assert "s3cret" not in log.text


def test_a_client_stays_usable_beside(make_store: Any, backend: Backend) -> None:
    store = make_store()
    assert isinstance(store.client, MilvusClient)
    assert store.client.has_collection(store.collection_name)
    assert store.aclient is not None
    assert store.uri == backend.uri


async def test_a_store_is_opened_without_blocking_the_loop(backend: Backend, collection_name: str) -> None:
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0.001)

    counting = asyncio.create_task(count_turns())
    async with await AsyncMilvusVectorStore.aopen(backend.uri, collection_name=collection_name, dim=DIM) as store:
        assert turns > 5
        counting.cancel()
        assert (await store.awrite([])).ok
        assert store.aclient is not None


async def test_a_new_collection_is_opened_from_several_threads_at_once(backend: Backend, collection_name: str) -> None:
    opening = (
        AsyncMilvusVectorStore.aopen(backend.uri, collection_name=collection_name, dim=DIM, max_concurrency=number)
        for number in range(1, 6)
    )
    for store in await asyncio.gather(*opening):
        await store.aclose()


async def test_calls_leave_nothing_of_ours_to_the_garbage_collector(make_store: Any, make_nodes: MakeNodes) -> None:
    """Else each answer would stay in memory until its next run, in which all callers stand still."""
    store, nodes = make_store(), make_nodes(40, dim=DIM)
    queries = [VectorStoreQuery(query_embedding=node.embedding, similarity_top_k=2) for node in nodes]

    async def calls() -> None:
        await asyncio.gather(*(store.async_add([node]) for node in nodes))
        await asyncio.gather(*map(store.aquery, queries))
        store.add(nodes[:1])
        store.query(queries[0])
        await asyncio.sleep(0.05)  # until the I/O thread is through

    await calls()
    gc.collect()
    gc.disable()
    try:
        await calls()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        of_calls = {"_Waiter", "Voyage", "Journey", "Request", "Submission", "Item", "Flight", "Found", "Answer"}
        ours = [kept for kept in gc.garbage if type(kept).__name__ in of_calls]  # not what earlier tests have dropped
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not ours
