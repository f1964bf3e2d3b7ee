"""What a delete takes away, and what it leaves: every row beside those that it names, in every other partition."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from llama_index.core import MockEmbedding
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores.types import FilterCondition, MetadataFilter, MetadataFilters, VectorStoreQuery

from llama_index_milvus_async_ext import AsyncMilvusRetriever, AsyncMilvusVectorStore
from tests.conftest import Backend, MakeNodes

DIM = 8
PARTITIONS = ["left", "right", "_default"]

Delete = Callable[..., None]


@pytest.fixture(scope="module")
def store(backend: Backend) -> Iterator[AsyncMilvusVectorStore]:
    """One collection for all tests here, which tell their rows apart by id: the server takes seconds for one."""
    name = f"deletes_{uuid.uuid4().hex}"
    with AsyncMilvusVectorStore(backend.uri, collection_name=name, dim=DIM, consistency_level="Strong") as store:
        for partition in PARTITIONS[:2]:
            store.client.create_partition(name, partition)
        yield store
        store.clear()


@pytest.fixture
def nodes(store: AsyncMilvusVectorStore, make_nodes: MakeNodes) -> Iterator[list[TextNode]]:
    """Thirty rows of three documents and five groups, spread evenly over the partitions."""
    nodes = make_nodes(30, dim=DIM)
    for place, partition in enumerate(PARTITIONS):
        store.add(nodes[place::3], milvus_partition_name=partition)
    yield nodes
    store.delete_nodes(node_ids=[node.node_id for node in nodes])


@pytest.fixture(params=["blocking", "async"])
def calls(request: pytest.FixtureRequest, store: AsyncMilvusVectorStore) -> tuple[Delete, Delete]:
    """Delete by documents, and by nodes."""
    if request.param == "blocking":
        return store.delete, store.delete_nodes
    return (
        lambda *args, **kwargs: asyncio.run(store.adelete(*args, **kwargs)),
        lambda *args, **kwargs: asyncio.run(store.adelete_nodes(*args, **kwargs)),
    )


def left_of(store: AsyncMilvusVectorStore, nodes: list[TextNode]) -> set[int]:
    return {node.metadata["number"] for node in store.get_nodes(node_ids=[node.node_id for node in nodes])}


async def test_what_is_deleted_is_not_found_right_after_with_the_usual_consistency(
    backend: Backend, collection_name: str, make_nodes: MakeNodes
) -> None:
    # A 2.3 server is up to 0.2 s behind, and says no time of a delete by which a read could wait for it.
    nodes = make_nodes(3, dim=DIM)
    async with AsyncMilvusVectorStore(backend.uri, collection_name=collection_name, dim=DIM) as store:
        await store.async_add(nodes)
        for node in nodes:
            assert await store.aget_nodes([node.node_id])
            await store.adelete_nodes([node.node_id])
            assert await store.aget_nodes([node.node_id]) == []
            query = VectorStoreQuery(query_embedding=node.embedding, similarity_top_k=1)
            assert (await store.aquery(query)).ids != [node.node_id]


def groups(*names: str) -> MetadataFilters:
    """What is in any of these groups: of the rows that `nodes` makes, each fifth."""
    alike: list[Any] = [MetadataFilter(key="group", value=name) for name in names]
    return MetadataFilters(filters=alike, condition=FilterCondition.OR)


@pytest.mark.parametrize(
    ("ids", "filters", "gone"),
    [
        ([0, 1, 2], None, {0, 1, 2}),
        (None, groups("g1"), {1, 6, 11, 16, 21, 26}),
        ([0, 1, 2, 6], groups("g1"), {1, 6}),
        ([0, 1, 2, 7], groups("g1", "g2"), {1, 2, 7}),
        ([0, 2], groups("g1"), set()),
        ([0, 1], groups(), {0, 1}),
        ([], groups("g1"), set()),
        ([], None, set()),
    ],
)
def test_what_meets_both_ids_and_filters_is_deleted_and_nothing_else(
    store: AsyncMilvusVectorStore,
    nodes: list[TextNode],
    calls: tuple[Delete, Delete],
    ids: list[int] | None,
    filters: MetadataFilters | None,
    gone: set[int],
) -> None:
    _, delete_nodes = calls
    delete_nodes(node_ids=None if ids is None else [nodes[number].node_id for number in ids], filters=filters)
    assert left_of(store, nodes) == {*range(30)} - gone


def test_filters_hold_for_all_ids_however_many(
    store: AsyncMilvusVectorStore, nodes: list[TextNode], calls: tuple[Delete, Delete]
) -> None:
    _, delete_nodes = calls
    fill = [f"not there {number}" for number in range(1_000)]  # as many as a request names
    delete_nodes(
        node_ids=[*(node.node_id for node in nodes[:10]), *fill, *(node.node_id for node in nodes[10:])],
        filters=groups("g1"),
    )
    assert left_of(store, nodes) == {*range(30)} - {1, 6, 11, 16, 21, 26}


@pytest.mark.parametrize(
    "filters", [None, groups(), MetadataFilters(filters=[groups()])], ids=["none", "empty", "nested"]
)
def test_to_delete_what_nothing_restricts_is_refused(
    store: AsyncMilvusVectorStore, nodes: list[TextNode], calls: tuple[Delete, Delete], filters: MetadataFilters | None
) -> None:
    delete, delete_nodes = calls
    with pytest.raises(ValueError, match=r"must be given|restrict nothing"):
        delete_nodes(filters=filters)
    delete([])
    assert left_of(store, nodes) == {*range(30)}


FORMS: dict[str, Callable[[list[str]], Any]] = {
    "set": set,
    "frozenset": frozenset,
    "tuple": tuple,
    "keys": lambda ids: dict.fromkeys(ids).keys(),
    "dict": dict.fromkeys,
    "generator": lambda ids: (each for each in ids),
    "map": lambda ids: map(str, ids),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
async def test_ids_come_in_any_iterable(
    store: AsyncMilvusVectorStore, nodes: list[TextNode], form: Callable[[list[str]], Any]
) -> None:
    fill = [f"not there {number}" for number in range(1_000)]  # as many as a request names
    ids, documents = [node.node_id for node in nodes], [str(node.ref_doc_id) for node in nodes]
    for found in (store.get_nodes(form([*ids[:3], *fill])), await store.aget_nodes(form([*ids[:3], *fill]))):
        assert {node.node_id for node in found} == {*ids[:3]}
    there = {*range(30)}
    store.delete_nodes(form(ids[:2]))
    await asyncio.to_thread(store.delete_nodes, form(ids[2:6]), groups("g2", "g3"))
    await store.adelete_nodes(form([*fill, *ids[7:9]]))
    there -= {0, 1, 2, 3, 7, 8}
    assert left_of(store, nodes) == there
    store.delete(form(documents[10:11]))
    await store.adelete(form([*fill, documents[20]]))
    assert left_of(store, nodes) == there - {*range(10, 30)}
    retriever = AsyncMilvusRetriever(store, MockEmbedding(DIM), 50, node_ids=form(ids[4:6]))
    by_document = AsyncMilvusRetriever(store, MockEmbedding(DIM), 50, doc_ids=form(documents[:1]))
    for _ in range(2):  # a generator is read once, and holds for every question
        assert {each.node_id for each in retriever.retrieve("?")} == {*ids[4:6]}
        assert {each.node_id for each in await by_document.aretrieve("?")} == {ids[4], ids[5], ids[6], ids[9]}
    for nothing in (store.delete, store.delete_nodes, store.get_nodes):
        assert not nothing(form([]))
    assert left_of(store, nodes) == there - {*range(10, 30)}


async def test_what_is_no_ids_is_named(store: AsyncMilvusVectorStore, nodes: list[TextNode]) -> None:
    for wrong in (None, 3, b"d", nodes[0]):
        says = "ref_doc_id must be a list of ids, or another iterable of them, got"
        with pytest.raises(TypeError, match=says):
            store.delete(wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=says):
            await store.adelete(wrong)  # type: ignore[arg-type]
    for call in (store.get_nodes, store.delete_nodes):
        for wrong in (3, "n1", "", nodes[0], groups("g1")):
            with pytest.raises(TypeError, match="node_ids must be a list of ids, or another iterable of them, got"):
                call(wrong)  # type: ignore[arg-type]
    for wrong in ([None], [3], {None}):
        with pytest.raises(ValueError, match="is no id"):
            store.delete(wrong)  # type: ignore[arg-type]
    for name in ("node_ids", "doc_ids"):
        with pytest.raises(TypeError, match=f"{name} must be a list of ids"):
            AsyncMilvusRetriever(store, MockEmbedding(DIM), **{name: ""})  # type: ignore[arg-type]
        # Read once, it would restrict nothing when the query is asked again.
        query = VectorStoreQuery(query_embedding=[0.5] * DIM, **{name: iter(["a"])})  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="ids must be a list of strings, not the iterator"):
            await store.aquery(query)
    assert left_of(store, nodes) == {*range(30)}


@pytest.mark.parametrize("partition", [0, 1, 2, None])
def test_a_delete_reaches_its_partition_and_no_other(
    store: AsyncMilvusVectorStore, nodes: list[TextNode], calls: tuple[Delete, Delete], partition: int | None
) -> None:
    delete, delete_nodes = calls
    where = {} if partition is None else {"milvus_partition_name": PARTITIONS[partition]}
    within = {*range(30)} if partition is None else {*range(partition, 30, 3)}
    there = {*range(30)}
    for call, named in [
        (lambda: delete_nodes(node_ids=[node.node_id for node in nodes[:4]], **where), {0, 1, 2, 3}),
        (lambda: delete_nodes(filters=groups("g4"), **where), {4, 9, 14, 19, 24, 29}),
        (lambda: delete_nodes([node.node_id for node in nodes[20:]], groups("g0", "g1"), **where), {20, 21, 25, 26}),
        (lambda: delete(nodes[0].ref_doc_id, **where), {*range(10)}),
        (lambda: delete([nodes[10].ref_doc_id, nodes[20].ref_doc_id], **where), {*range(10, 30)}),
    ]:
        call()
        there -= named & within
        assert left_of(store, nodes) == there


def test_a_delete_takes_all_that_it_names_in_a_partition_however_many(
    store: AsyncMilvusVectorStore, calls: tuple[Delete, Delete], make_nodes: MakeNodes
) -> None:
    _, delete_nodes = calls
    nodes = make_nodes(1_500, dim=DIM)
    store.add(nodes[:1_400], milvus_partition_name="left")
    store.add(nodes[1_400:], milvus_partition_name="right")
    delete_nodes(filters=groups("g0", "g1", "g2", "g3"), milvus_partition_name="left")
    assert left_of(store, nodes) == {*range(4, 1_400, 5), *range(1_400, 1_500)}


def test_a_delete_from_a_partition_that_is_not_there_deletes_nothing(
    store: AsyncMilvusVectorStore, nodes: list[TextNode], calls: tuple[Delete, Delete]
) -> None:
    for call, named in zip(calls, (nodes[0].ref_doc_id, [nodes[0].node_id]), strict=True):
        with contextlib.suppress(Exception):  # Milvus may say so or not
            call(named, milvus_partition_name="nowhere")
    assert left_of(store, nodes) == {*range(30)}
