"""Tenants in one collection: by a partition key, or by partitions of their own. Nobody sees what another one has."""

from __future__ import annotations

import asyncio
import functools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import Document, NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores.types import FilterOperator, MetadataFilter, MetadataFilters, VectorStoreQuery
from llama_index.vector_stores.milvus import MilvusVectorStore
from pymilvus import DataType
from pymilvus.exceptions import MilvusException

from llama_index_milvus_async_ext import (
    AsyncMilvusRetriever,
    AsyncMilvusVectorStore,
    AsyncMilvusWriter,
    RetryPolicy,
    aingest,
    ingest,
)
from llama_index_milvus_async_ext._milvus.replacing import misplaces_upserts
from tests.conftest import Backend
from tests.embedding import HashEmbedding
from tests.fault_proxy import FaultProxy
from tests.faults import Fault, First, LoseAnswer, MilvusError, Refuse, rate_limit
from tests.ingesting import Lines, Model

DIM = 8
TENANTS = [f"tenant_{number}" for number in range(5)]
WRITES = ("Insert", "Upsert")
Open = Callable[..., AsyncMilvusVectorStore]


@pytest.fixture
def open_store(backend: Backend, collection_name: str) -> Iterator[Open]:
    opened: list[AsyncMilvusVectorStore] = []

    def open_one(**arguments: Any) -> AsyncMilvusVectorStore:
        settings: dict[str, Any] = {"uri": backend.uri, "dim": DIM, "consistency_level": "Strong"}
        opened.append(AsyncMilvusVectorStore(collection_name=collection_name, **settings | arguments))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


def nodes_of(tenant: str, count: int, prefix: str = "", **metadata: Any) -> list[TextNode]:
    return [
        TextNode(
            id_=f"{prefix}{tenant}-{number}",
            text=f"{tenant} says {number}",
            metadata={"tenant": tenant, "number": number} | metadata,
            embedding=[1.0 if place == number % DIM else 0.25 for place in range(DIM)],
            relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=f"{tenant}-doc")},
        )
        for number in range(count)
    ]


def only(tenant: Any, key: str = "tenant") -> MetadataFilters:
    return MetadataFilters(filters=[MetadataFilter(key=key, value=tenant)])


def query_of(tenant: str | None = None, number: int = 0, top_k: int = 100) -> VectorStoreQuery:
    vector = [1.0 if place == number % DIM else 0.0 for place in range(DIM)]
    filters = only(tenant) if tenant is not None else None
    return VectorStoreQuery(query_embedding=vector, similarity_top_k=top_k, filters=filters)


def owners(store: AsyncMilvusVectorStore, tenant: str | None = None, **options: Any) -> list[str]:
    return sorted(node.metadata["tenant"] for node in store.query(query_of(tenant), **options).nodes or [])


# --- a partition key


def test_a_filter_on_the_partition_key_finds_its_tenants_rows_and_no_others(open_store: Open) -> None:
    """Also where rows replace earlier ones, which servers before 2.3.12 would store where no filter finds them."""
    store = open_store(partition_key_field="tenant")
    described = store.client.describe_collection(store.collection_name)
    assert [f["name"] for f in described["fields"] if f.get("is_partition_key")] == ["tenant"]
    for _ in range(2):
        store.add([node for tenant in TENANTS for node in nodes_of(tenant, 4)])
        for tenant in TENANTS:
            assert owners(store, tenant) == [tenant] * 4
            assert len(store.get_nodes(filters=only(tenant))) == 4
    assert len(owners(store)) == 4 * len(TENANTS), "each once"
    assert owners(store, "nobody") == []
    store.delete_nodes(filters=only(TENANTS[0]))
    store.delete(f"{TENANTS[1]}-doc")
    assert owners(store) == sorted(TENANTS[2:] * 4)


def test_a_node_that_moves_to_another_tenant_leaves_no_row_behind(open_store: Open) -> None:
    store = open_store(partition_key_field="tenant")
    store.add(nodes_of("a", 6))
    moved = [node.model_copy(update={"metadata": {"tenant": "b"}}) for node in nodes_of("a", 6)[:4]]
    store.add(moved)
    assert owners(store, "a") == ["a"] * 2 and owners(store, "b") == ["b"] * 4
    assert owners(store) == ["a"] * 2 + ["b"] * 4


def test_a_write_whose_answer_is_lost_is_repeated_into_the_right_partition(
    open_store: Open, fault_proxy: FaultProxy
) -> None:
    for upsert_mode in (True, False):
        store = open_store(partition_key_field="tenant", uri=fault_proxy.uri, upsert_mode=upsert_mode)
        fault_proxy.script(LoseAnswer(), method=("Insert", "Upsert"), on=First(1))
        report = store.write(nodes_of("a", 5, prefix=str(upsert_mode)))
        assert report.ok and report.retries
    assert owners(store, "a") == ["a"] * 10, "each once"


def test_a_row_that_was_deleted_and_not_replaced_is_told_of(
    open_store: Open, fault_proxy: FaultProxy, backend: Backend
) -> None:
    """A server before 2.3.12 gets a delete and an insert, of which the second may fail; others get one upsert."""
    store = open_store(partition_key_field="tenant", uri=fault_proxy.uri)
    store.add(nodes_of("a", 2))
    fault_proxy.script(MilvusError(7, "disk limit exceeded"), method=WRITES)
    (failed,) = store.write(nodes_of("a", 1)).failed
    is_gone = backend.name == "server"
    assert failed.retryable and "disk limit exceeded" in str(failed.error)
    assert ("earlier rows of these ids are deleted" in str(failed.error)) == is_gone
    assert owners(store, "a") == ["a"] * (1 if is_gone else 2)
    fault_proxy.heal()
    assert store.write([failed.node]).ok and owners(store, "a") == ["a", "a"]


@pytest.mark.parametrize("fault", [Refuse(), rate_limit()], ids=["lost", "rate limit"])
@pytest.mark.parametrize("methods", [WRITES, ("Delete", "Upsert")], ids=["insert", "delete"])
def test_a_row_is_replaced_in_as_many_attempts_as_the_policy_says(
    open_store: Open, fault_proxy: FaultProxy, methods: tuple[str, ...], fault: Fault
) -> None:
    quick = RetryPolicy(max_attempts=4, initial_backoff_seconds=0.01, max_backoff_seconds=0.05)
    store = open_store(partition_key_field="tenant", uri=fault_proxy.uri, retry=quick)
    store.add(nodes_of("a", 2))
    limit = store.statistics().limit
    fault_proxy.clear()
    fault_proxy.script(fault, method=methods, on=First(3))
    report = store.write(nodes_of("a", 2))
    assert report.ok and report.retries == 3
    assert max(fault_proxy.counts.values()) == 4 and owners(store, "a") == ["a", "a"]
    assert (store.statistics().limit < limit) == (not isinstance(fault, Refuse))


def test_a_delete_that_fails_before_a_row_is_replaced_says_what_may_be_gone(
    open_store: Open, fault_proxy: FaultProxy, backend: Backend
) -> None:
    store = open_store(partition_key_field="tenant", uri=fault_proxy.uri, retry=RetryPolicy(max_attempts=1))
    store.add(nodes_of("a", 2))
    fault_proxy.clear()
    fault_proxy.script(LoseAnswer(), method="Delete")
    report = store.write(nodes_of("a", 1))
    assert report.ok == (backend.name == "lite")
    for lost in report.unknown:
        assert "earlier rows of these ids may be deleted" in str(lost.error)
        assert fault_proxy.counts["Delete"] == 1 and owners(store, "a") == ["a"]


def test_a_node_without_the_key_fails_alone_and_by_name(open_store: Open) -> None:
    store = open_store(partition_key_field="tenant")
    good, bad = nodes_of("a", 2), nodes_of("b", 2)
    del bad[0].metadata["tenant"]
    bad[1].metadata["tenant"] = 17  # type: ignore[assignment]
    report = store.write([*good, *bad])
    assert report.written == [node.node_id for node in good]
    without, wrong = (str(each.error) for each in report.failed)
    assert without.startswith("node 'b-0' can't be stored: its metadata has no 'tenant', which is the partition key")
    assert "node 'b-1'" in wrong and "column 'tenant' holds VARCHAR values" in wrong
    assert owners(store) == ["a", "a"]


def test_the_key_may_be_one_of_the_scalar_fields(open_store: Open) -> None:
    scalars = {"scalar_field_names": ["year", "customer"], "scalar_field_types": [DataType.INT32, DataType.INT64]}
    store = open_store(partition_key_field="customer", **scalars)
    store.add([node for number in (1, 2) for node in nodes_of(f"t{number}", 3, customer=number, year=2000)])
    found = store.get_nodes(filters=only(2, "customer"))
    assert {node.metadata["tenant"] for node in found} == {"t2"} and len(found) == 3


def test_a_collection_must_have_the_key_that_is_asked_for(open_store: Open) -> None:
    store = open_store(partition_key_field="tenant")
    store.add(nodes_of("a", 1))
    again = open_store()
    assert again.partition_key_field is None and owners(again, "a") == ["a"], "left out, nothing changes"
    assert open_store(partition_key_field="tenant").partition_key_field == "tenant"
    with pytest.raises(ValueError, match="has the partition key 'tenant', but partition_key_field='customer'"):
        open_store(partition_key_field="customer")
    plain = MilvusVectorStore(store.uri, collection_name=store.collection_name, use_async_client=False, dim=DIM)
    assert [node.metadata for node in plain.get_nodes(filters=only("a"))] == [nodes_of("a", 1)[0].metadata]
    with pickle.loads(pickle.dumps(store)) as copied:
        assert copied.partition_key_field == "tenant" and owners(copied) == ["a"]
        store.clear()
    open_store(overwrite=True)
    with pytest.raises(ValueError, match="has no partition key, but partition_key_field='tenant'"):
        open_store(partition_key_field="tenant")
    with pickle.loads(pickle.dumps(copied := open_store())), copied:
        plain.client.close()


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"partition_key_field": "text"}, ValueError, "is a field of the store's own"),
        ({"partition_key_field": ["tenant"]}, TypeError, "must be the name of a field"),
        (
            {"partition_key_field": "t", "scalar_field_names": ["t"], "scalar_field_types": [DataType.BOOL]},
            ValueError,
            "'t' is of type BOOL by scalar_field_types, and Milvus takes VARCHAR and INT64",
        ),
    ],
)
def test_a_key_that_can_be_none_is_refused(lite_uri: str, arguments: Any, error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        AsyncMilvusVectorStore(lite_uri, dim=DIM, collection_name="never_made", **arguments)


@pytest.mark.parametrize(
    ("version", "expected"),
    [("v2.3.5", True), ("2.2.16", True), ("v2.3.11-dev", True), ("v2.3.12", False), ("v2.4.0", False), ("", False)],
)
def test_servers_that_misplace_upserts_are_known_by_their_version(version: str, expected: bool) -> None:
    assert misplaces_upserts(version) is expected


# --- partitions of their own


def make_partitions(store: AsyncMilvusVectorStore, *names: str) -> None:
    for name in names:
        store.client.create_partition(store.collection_name, name)


async def test_a_partition_that_is_not_there_is_named_with_what_to_do(open_store: Open) -> None:
    store = open_store()
    make_partitions(store, "here")
    node = nodes_of("a", 1)[0]
    says = (
        f"no partition 'gone': make it first, by store.client.create_partition\\('{store.collection_name}', 'gone'\\)"
    )
    (failed,) = store.write([node], milvus_partition_name="gone").failed
    with pytest.raises(ValueError, match=says):
        raise failed.error
    assert not failed.retryable
    model = HashEmbedding(dim=DIM)
    calls: list[Callable[[], Any]] = [
        lambda: store.add([node], milvus_partition_name="gone"),
        lambda: store.query(query_of(), milvus_partition_names=["here", "gone"]),
        lambda: store.get_nodes(["a"], milvus_partition_names=["gone"]),
        lambda: store.delete_nodes(["a"], milvus_partition_name="gone"),
        lambda: AsyncMilvusWriter(store, milvus_partition_name="gone")([node]),
        lambda: AsyncMilvusRetriever(store, model, milvus_partition_names=["gone"]).retrieve("words"),
    ]
    for call in calls:
        with pytest.raises(MilvusException, match=says):
            call()
    pipeline = IngestionPipeline(
        transformations=[Lines(), Model(), AsyncMilvusWriter(store, None, milvus_partition_name="gone")]
    )
    with pytest.raises(ValueError, match=says):
        await aingest(pipeline, [Document(id_="d", text="words")])
    make_partitions(store, "gone")
    for call in calls:
        call()
    for names in ([], "here", (name for name in ["here"])):
        with pytest.raises(ValueError, match=r"milvus_partition_names (is empty|must be a list)"):
            store.query(query_of(), milvus_partition_names=names)


@pytest.mark.parametrize("name", ["", [], 0, False, ["a"]])
def test_what_is_no_name_of_a_partition_reaches_none_instead_of_all(open_store: Open, name: Any) -> None:
    """To Milvus an empty name is no name: a delete would reach the rows of every tenant."""
    store = open_store()
    make_partitions(store, "a", "b")
    document = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id="d")}
    for tenant in "ab":
        nodes = [node.model_copy(update={"relationships": document}) for node in nodes_of(tenant, 2)]
        store.add(nodes, milvus_partition_name=tenant)
    good, assigned = AsyncMilvusWriter(store, replace_documents=True), AsyncMilvusWriter(store, replace_documents=True)
    assigned.milvus_partition_name = name
    pipeline = IngestionPipeline(transformations=[Lines(), Model(), assigned])
    changes: list[Callable[[], Any]] = [
        lambda: store.delete("d", milvus_partition_name=name),
        lambda: store.delete_nodes(filters=only("a"), milvus_partition_name=name),
        lambda: store.delete_nodes(["a-0", "b-0"], milvus_partition_name=name),
        lambda: store.add(nodes, milvus_partition_name=name),
        lambda: store.write(nodes, milvus_partition_name=name),
        lambda: AsyncMilvusWriter(store, replace_documents=True, milvus_partition_name=name),
        lambda: assigned(nodes),
        lambda: ingest(pipeline, [Document(id_="d", text="words")]),
    ]
    for change in changes:
        with pytest.raises(ValueError, match="milvus_partition_name must be the name of one partition, got "):
            change()
    with pytest.raises(ValueError, match="milvus_partition_names must be a list of names"):
        store.query(query_of(), milvus_partition_names=["a", name])
    assert owners(store) == ["a", "a", "b", "b"], "none is gone, none was added"
    good.milvus_partition_name = None
    good([TextNode(id_="new", metadata={"tenant": "c"}, embedding=[1.0] * DIM, relationships=document)])
    assert owners(store) == ["c"], "None is: no partition is named"


def test_what_is_named_otherwise_than_a_call_takes_it_is_refused_and_not_passed_over(open_store: Open) -> None:
    store = open_store()
    make_partitions(store, "a", "b")
    for tenant in "ab":
        store.add(nodes_of(tenant, 3), milvus_partition_name=tenant)
    reads: list[Callable[..., Any]] = [
        functools.partial(store.query, query_of()),
        functools.partial(store.get_nodes, ["a-0"]),
        store.iter_nodes,
    ]
    for read in reads:
        with pytest.raises(ValueError, match="reads take milvus_partition_names, a list"):
            read(milvus_partition_name="a")
    changes = [functools.partial(store.delete_nodes, ["a-0"]), functools.partial(store.delete, "a"), store.add]
    for change in changes:
        with pytest.raises(ValueError, match="take milvus_partition_name, one name"):
            change(*([nodes_of("a", 1)] if change == store.add else []), milvus_partition_names=["a"])
    names, seen = ["a"], []
    for node in store.iter_nodes(batch_size=1, milvus_partition_names=names):
        names.clear()  # the list is the caller's: the iteration has one of its own
        seen.append(node.node_id)
    assert seen == [node.node_id for node in nodes_of("a", 3)]


def test_a_partition_that_was_dropped_is_not_there_any_more(open_store: Open, backend: Backend) -> None:
    store = open_store()
    make_partitions(store, "a")
    store.add(nodes_of("a", 1), milvus_partition_name="a")
    if backend.name != "lite":
        store.client.release_partitions(store.collection_name, ["a"])
    store.client.drop_partition(store.collection_name, "a")
    with pytest.raises(MilvusException, match=r"no partition 'a'|a not found"):
        store.query(query_of(), milvus_partition_names=["a"])


def test_no_partition_can_be_named_where_there_is_a_partition_key(open_store: Open) -> None:
    """Milvus Lite would take the name, and put the row elsewhere."""
    store = open_store(partition_key_field="tenant")
    partition = store.client.list_partitions(store.collection_name)[0]
    (failed,) = store.write(nodes_of("a", 1), milvus_partition_name=partition).failed
    assert "has the partition key 'tenant', which decides where each row is" in str(failed.error)
    with pytest.raises(ValueError, match="no partition can be named: leave it out, and filter by 'tenant'"):
        store.query(query_of(), milvus_partition_names=[partition])


def test_a_writer_writes_to_its_partition_and_replaces_documents_there_alone(open_store: Open) -> None:
    store = open_store()
    make_partitions(store, "a", "b")
    writers = {
        tenant: AsyncMilvusWriter(store, replace_documents=True, milvus_partition_name=tenant) for tenant in "ab"
    }
    copied = pickle.loads(pickle.dumps(writers["a"]))
    assert copied.milvus_partition_name == "a"
    copied.vector_store.close()

    def version(tenant: str, number: int, count: int) -> list[TextNode]:
        made = nodes_of(tenant, count, prefix=f"{number}-")
        for node in made:
            node.relationships = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id="the same document")}
        return made

    for tenant, writer in writers.items():
        writer(version(tenant, 1, 3))
    writers["a"](version("a", 2, 2))
    assert owners(store, milvus_partition_names=["a"]) == ["a"] * 2
    assert owners(store, milvus_partition_names=["b"]) == ["b"] * 3
    assert owners(store) == ["a"] * 2 + ["b"] * 3


async def test_an_ingestion_keeps_its_partition_in_step_and_no_other(open_store: Open) -> None:
    """Even where tenants have documents of the same ids."""
    store = open_store()
    make_partitions(store, "a", "b")

    async def ingested(tenant: str, *texts: str) -> Any:
        writer = AsyncMilvusWriter(store, milvus_partition_name=tenant)
        pipeline = IngestionPipeline(transformations=[Lines(prefix=f"{tenant} "), Model(), writer])
        documents = [Document(id_=f"d{place}", text=text) for place, text in enumerate(texts) if text]
        return await aingest(pipeline, documents, source="s", delete_missing=True)

    async def held(*partitions: str) -> list[str]:
        found = await store.aquery(query_of(), milvus_partition_names=partitions or None)
        return sorted(node.get_content() for node in found.nodes or [])

    assert (await ingested("a", "one\ntwo", "three")).added == 2
    assert (await ingested("b", "one", "four")).added == 2
    assert (await ingested("a", "one\ntwo", "three")).unchanged == 2
    again = await ingested("a", "five")
    assert (again.replaced, again.deleted) == (1, 1)
    assert await held("a") == ["a five"] and await held("b") == ["b four", "b one"]
    assert await held() == ["a five", "b four", "b one"]


# --- isolation under load


@pytest.mark.parametrize("way", ["partition key", "filter", "named partitions"])
async def test_nobody_sees_what_another_tenant_has(open_store: Open, fault_proxy: FaultProxy, way: str) -> None:
    """Writes, searches and retrievals of five tenants at once: some searches share a request, none with another's."""
    searches: list[Any] = []
    fault_proxy.script(Refuse(), method="Search", when=lambda request: searches.append(request) is not None)
    store = open_store(uri=fault_proxy.uri, partition_key_field="tenant" if way == "partition key" else None)
    if way == "named partitions":
        make_partitions(store, *TENANTS)
    model = HashEmbedding(dim=DIM)

    async def live(tenant: str) -> int:
        name = tenant if way == "named partitions" else None
        names = {"milvus_partition_names": [tenant]} if name else {}
        filters = None if name else only(tenant)
        retriever = AsyncMilvusRetriever(store, model, 20, filters=filters, **names)
        writer = AsyncMilvusWriter(store, milvus_partition_name=name)
        seen: list[Any] = []
        for turn in range(4):
            asked = [query_of(None if name else tenant, number, 20) for number in range(10)]
            _, found, retrieved = await asyncio.gather(
                writer.acall(nodes_of(tenant, 8, prefix=f"{turn}-")),
                store.aquery_many(asked, **names),
                retriever.aretrieve_many(["who says", "what"]),
            )
            seen += [node for result in found for node in result.nodes or []]
            seen += [each.node for nodes in retrieved for each in nodes]
        assert {node.metadata["tenant"] for node in seen} == {tenant}
        return len((await store.aquery(query_of(None if name else tenant), **names)).nodes or [])

    assert await asyncio.gather(*map(live, TENANTS)) == [32] * len(TENANTS)
    assert max(request.nq for request in searches) > 1
    for request in searches:
        named = [tenant for tenant in TENANTS if tenant in request.dsl or tenant in request.partition_names]
        assert len(named) == 1, "a request is of one tenant"


def test_a_filter_that_names_two_tenants_finds_both(open_store: Open) -> None:
    store = open_store(partition_key_field="tenant")
    store.add([node for tenant in TENANTS for node in nodes_of(tenant, 2)])
    both = MetadataFilters(filters=[MetadataFilter(key="tenant", value=TENANTS[:2], operator=FilterOperator.IN)])
    assert {node.metadata["tenant"] for node in store.get_nodes(filters=both)} == set(TENANTS[:2])
