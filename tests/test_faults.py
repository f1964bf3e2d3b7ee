"""Injected faults: under every script each node's outcome is known, and true."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores.types import VectorStoreQuery
from pymilvus import MilvusClient
from pymilvus.grpc_gen import common_pb2

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, AsyncMilvusWriter, RetryPolicy, WriteError, WriteReport
from tests.conftest import Backend, MakeNodes
from tests.fault_proxy import FaultProxy
from tests.faults import (
    Chance,
    Delay,
    Drop,
    Every,
    First,
    LoseAnswer,
    MilvusError,
    Nth,
    OverQuota,
    Refuse,
    SlowAnswer,
    collection_not_found,
    not_loaded,
    rate_limit,
)
from tests.waiting import blocked_until, until

DIM = 8
WRITES = ("Insert", "Upsert")
QUICK = RetryPolicy(max_attempts=6, initial_backoff_seconds=0.01, max_backoff_seconds=0.1, deadline_seconds=20)


@pytest.fixture(scope="module")
def collection_name(backend: Backend) -> Iterator[str]:
    """One collection for all tests here, which tell their rows apart by prefix: the server takes seconds for one."""
    name = f"faults_{uuid.uuid4().hex}"
    yield name
    with contextlib.closing(MilvusClient(backend.uri)) as client:
        client.drop_collection(name)


@pytest.fixture
def make_store(fault_proxy: FaultProxy, collection_name: str) -> Iterator[Callable[..., AsyncMilvusVectorStore]]:
    stores = []

    def make(**changes: Any) -> AsyncMilvusVectorStore:
        arguments = {
            "uri": fault_proxy.uri,
            "collection_name": collection_name,
            "dim": DIM,
            "consistency_level": "Strong",
            "retry": QUICK,
            "rpc_timeout_seconds": 2.0,
        }
        stores.append(AsyncMilvusVectorStore(**(arguments | changes)))
        fault_proxy.clear()
        return stores[-1]

    yield make
    fault_proxy.heal()
    for store in stores:
        store.close()


def rows_of(backend: Backend, collection: str, prefix: str = "") -> Counter[str]:
    """How often each id is stored, counted by paging through the collection past the proxy."""
    client = MilvusClient(backend.uri, dedicated=True)
    try:
        found: Counter[str] = Counter()
        pages = client.query_iterator(
            collection,
            filter=f'id like "{prefix}%"',
            output_fields=["id"],
            batch_size=1_000,
            consistency_level="Strong",
        )
        while page := pages.next():
            found.update(row["id"] for row in page)
        pages.close()
        total = client.query(
            collection, filter=f'id like "{prefix}%"', output_fields=["count(*)"], consistency_level="Strong"
        )
        assert total[0]["count(*)"] == sum(found.values()), "count and pages disagree: some id is stored twice"
        return found
    finally:
        client.close()


def prefix_of(nodes: list[TextNode]) -> str:
    return nodes[0].node_id.rpartition("-")[0]


def check(backend: Backend, store: AsyncMilvusVectorStore, nodes: list[TextNode], report: WriteReport) -> Counter[str]:
    """The report partitions the nodes, and says the truth."""
    said = Counter([*report.written, *(f.node.node_id for f in (*report.failed, *report.unknown))])
    assert said == Counter(node.node_id for node in nodes)
    stored = rows_of(backend, store.collection_name, prefix_of(nodes))
    assert all(stored[node_id] == 1 for node_id in report.written), "written is stored once"
    assert not any(stored[f.node.node_id] for f in report.failed), "failed is not stored"
    assert all(stored[f.node.node_id] <= 1 for f in report.unknown)
    return stored


PASSING_FAULTS = {
    "refused": Refuse(),
    "no connection": Refuse(details="failed to connect to all addresses"),
    "deadline": Refuse(grpc.StatusCode.DEADLINE_EXCEEDED),
    "internal": Refuse(grpc.StatusCode.INTERNAL),
    "overloaded": Refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many requests"),
    "rate limit": rate_limit(),
    "not ready": MilvusError(1, "service not ready", common_pb2.NotReadyServe),
    "answer lost": LoseAnswer(),
    "answer never comes": LoseAnswer(None),
    "request dropped": Drop(),
    "slow answer": SlowAnswer(3.0),
    "late request": Delay(3.0),
}


@pytest.mark.parametrize("upsert_mode", [True, False])
@pytest.mark.parametrize("fault", PASSING_FAULTS)
async def test_a_passing_fault_loses_and_doubles_nothing(
    backend: Backend,
    fault_proxy: FaultProxy,
    make_store: Any,
    make_nodes: MakeNodes,
    fault: str,
    upsert_mode: bool,
    log: pytest.LogCaptureFixture,
) -> None:
    store = make_store(batch_size=20, upsert_mode=upsert_mode, rpc_timeout_seconds=0.5, token="root:s3cret")
    nodes = make_nodes(60, dim=DIM)
    fault_proxy.script(PASSING_FAULTS[fault], method=WRITES, on=First(2))
    report = await store.awrite(nodes)
    assert len(report.written) == 60, report
    assert report.retries >= 1
    check(backend, store, nodes, report)
    check_what_is_said(log)


def check_what_is_said(log: pytest.LogCaptureFixture) -> None:
    """A fault that a retry may mend is told of, without a traceback, and without the token."""
    said = [record for record in log.records if not record.name.startswith("grpc")]  # that is the proxy's side
    assert any(record.levelno == logging.WARNING for record in said)
    assert not [record for record in said if record.levelno > logging.WARNING]
    assert not [record for record in said if record.exc_info or record.stack_info]
    shown = "".join(record.getMessage() for record in said)
    assert not any(text in shown for text in ("Traceback", "s3cret", "cm9vdDpzM2NyZXQ"))


CALLS: dict[str, tuple[tuple[str, ...], Callable[[AsyncMilvusVectorStore, TextNode], Any]]] = {
    "write": (WRITES, lambda store, node: store.async_add([node])),
    "search": (("Search",), lambda store, node: store.aquery(VectorStoreQuery(query_embedding=node.embedding))),
    "look-up": (("Query",), lambda store, node: store.aget_nodes([node.node_id])),
    "delete": (("Delete",), lambda store, node: store.adelete_nodes([node.node_id])),
}


@pytest.mark.parametrize("call", CALLS)
async def test_a_fault_that_retries_mend_is_one_warning_in_the_log(
    fault_proxy: FaultProxy, make_store: Any, make_nodes: MakeNodes, call: str, log: pytest.LogCaptureFixture
) -> None:
    store, (node,) = make_store(), make_nodes(1, dim=DIM)
    methods, ask = CALLS[call]
    # A status of Milvus's: what gRPC can't carry of look-ups and deletes, pymilvus's client tries again by itself.
    fault_proxy.script(MilvusError(5, "internal"), method=methods, on=First(3))
    log.clear()
    await ask(store, node)
    assert sum(fault_proxy.counts[method] for method in methods) == 4
    lines = [(r.name, r.levelname) for r in log.records if not r.name.startswith(("grpc", "asyncio"))]
    assert [line for line in lines if line[1] != "DEBUG"] == [("llama_index_milvus_async_ext", "WARNING")]
    assert lines.count(("llama_index_milvus_async_ext", "DEBUG")) == 2


@pytest.mark.parametrize("upsert_mode", [True, False])
async def test_what_never_gets_an_answer_is_unknown_and_can_be_tried_again(
    backend: Backend, fault_proxy: FaultProxy, make_store: Any, make_nodes: MakeNodes, upsert_mode: bool
) -> None:
    store, nodes = make_store(upsert_mode=upsert_mode), make_nodes(30, dim=DIM)
    fault_proxy.script(LoseAnswer(), method=WRITES)
    report = await store.awrite(nodes)
    assert len(report.unknown) == 30
    assert all(f.retryable and f.attempts == QUICK.max_attempts for f in report.unknown)
    check(backend, store, nodes, report)
    fault_proxy.heal()
    again = make_store(upsert_mode=True)
    assert len((await again.awrite([f.node for f in report.unknown])).written) == 30
    assert set(rows_of(backend, store.collection_name, prefix_of(nodes)).values()) == {1}


async def test_what_was_never_sent_failed_and_is_not_unknown(
    backend: Backend, fault_proxy: FaultProxy, make_store: Any, make_nodes: MakeNodes
) -> None:
    nodes = make_nodes(30, dim=DIM)
    policy = RetryPolicy(max_attempts=2, initial_backoff_seconds=0.01, max_backoff_seconds=0.1, deadline_seconds=1)
    store = make_store(retry=policy)
    for fault in ("no connection", "rate limit", "not ready"):
        fault_proxy.script(PASSING_FAULTS[fault], method=WRITES)
        report = await store.awrite(nodes)
        assert len(report.failed) == 30 and all(f.retryable and f.attempts for f in report.failed)
        check(backend, store, nodes, report)
        fault_proxy.heal()


@pytest.mark.parametrize(
    "fault",
    [collection_not_found(), Refuse(grpc.StatusCode.UNAUTHENTICATED), Refuse(grpc.StatusCode.PERMISSION_DENIED)],
)
async def test_a_permanent_error_is_met_once(
    backend: Backend, fault_proxy: FaultProxy, make_store: Any, make_nodes: MakeNodes, fault: Any
) -> None:
    store, nodes = make_store(), make_nodes(50, dim=DIM)
    fault_proxy.script(fault, method=WRITES)
    report = await store.awrite(nodes)
    assert len(report.failed) == 50
    assert not any(f.retryable for f in report.failed)
    assert sum(fault_proxy.counts[method] for method in WRITES) == 1
    check(backend, store, nodes, report)


@st.composite
def scripts(draw: st.DrawFn) -> list[tuple[Any, Any]]:
    faults = st.sampled_from(
        [
            Refuse(),
            LoseAnswer(),
            rate_limit(),
            MilvusError(1, "not ready", common_pb2.NotReadyServe),
            Refuse(grpc.StatusCode.DEADLINE_EXCEEDED),
            LoseAnswer(grpc.StatusCode.DEADLINE_EXCEEDED),
            MilvusError(1100, "bad data, it says"),
            collection_not_found(),
        ]
    )
    selections = st.one_of(
        st.builds(Nth, st.integers(1, 5)),
        st.builds(First, st.integers(1, 3)),
        st.builds(Chance, st.floats(0.05, 0.6), st.integers(0, 1_000)),
    )
    return draw(st.lists(st.tuples(faults, selections), min_size=1, max_size=3))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    script=scripts(),
    batch_size=st.sampled_from([1, 7, 25]),
    duplicates=st.integers(0, 5),
    upsert_mode=st.booleans(),
    give_up=st.one_of(st.none(), st.none(), st.integers(0, 6)),
)
def test_random_scripts_leave_every_outcome_known_and_true(
    backend: Backend,
    fault_proxy: FaultProxy,
    make_store: Any,
    make_nodes: MakeNodes,
    script: Any,
    batch_size: int,
    duplicates: int,
    upsert_mode: bool,
    give_up: int | None,
) -> None:
    store = make_store(batch_size=batch_size, upsert_mode=upsert_mode)
    nodes = make_nodes(40, dim=DIM)
    nodes += [node.model_copy(update={"text": "again"}) for node in nodes[:duplicates]]
    for fault, selection in script:
        fault_proxy.script(fault, method=WRITES, on=selection)

    async def scenario() -> WriteReport:
        writing = asyncio.create_task(store.awrite(nodes))
        if give_up is not None:
            await asyncio.sleep(0)
            await until(lambda: writing.done() or len(fault_proxy.requests_of(*WRITES)) >= give_up, seconds=30)
            writing.cancel()
        try:
            return await writing
        except asyncio.CancelledError as cancelled:
            report = WriteReport.of(cancelled)
            assert report is not None
            return report

    report = asyncio.run(scenario())
    fault_proxy.heal()
    said = Counter([*report.written, *(f.node.node_id for f in (*report.failed, *report.unknown))])
    assert said == Counter(node.node_id for node in nodes)
    # What was under way when it was cancelled may still land.
    blocked_until(lambda: store.statistics().in_flight == 0 and fault_proxy.in_flight() == 0)
    stored = rows_of(backend, store.collection_name, prefix_of(nodes))
    assert max(stored.values(), default=0) <= 1, "nothing is stored twice"
    assert all(stored[node_id] == 1 for node_id in report.written)
    twice = {node.node_id for node in nodes[:duplicates]}
    assert not any(stored[f.node.node_id] for f in report.failed if f.node.node_id not in twice)


# --- bad nodes among good ones


def poison(kind: str, node: TextNode) -> None:
    if kind == "none":
        node.embedding = None
    elif kind == "dimension":
        node.embedding = [0.5] * (DIM + 1)
    elif kind == "nan":
        node.embedding = [math.nan] * DIM
    elif kind == "infinity":
        node.embedding = [math.inf] * DIM
    elif kind == "text":
        node.text = "ü" * 40_000
    elif kind == "id":
        node.id_ = "i" * 70_000
    elif kind == "metadata":
        node.metadata["large"] = "m" * 40_000
    elif kind == "unstorable":
        node.metadata["object"] = object()


KINDS = ["none", "dimension", "nan", "infinity", "text", "id", "metadata", "unstorable"]


@pytest.mark.parametrize("kinds", [[kind] for kind in KINDS] + [KINDS])
async def test_bad_nodes_cost_no_request_and_no_neighbour(
    backend: Backend, fault_proxy: FaultProxy, make_store: Any, make_nodes: MakeNodes, kinds: list[str]
) -> None:
    store, nodes = make_store(), make_nodes(60, dim=DIM)
    others = make_nodes(40, dim=DIM)
    bad = nodes[5 : 5 + len(kinds)]
    for kind, node in zip(kinds, bad, strict=True):
        poison(kind, node)
    report, *rest = await asyncio.gather(store.awrite(nodes), *(store.async_add([node]) for node in others))
    assert [f.node for f in report.failed] == bad
    assert not any(f.retryable or f.attempts for f in report.failed)
    assert rest == [[node.node_id] for node in others], "other callers do not hear of it"
    assert sum(fault_proxy.counts[method] for method in WRITES) <= 2
    writer = AsyncMilvusWriter(vector_store=store)
    with pytest.raises(WriteError):
        await writer.acall(nodes)
    with pytest.raises(WriteError):
        store.add(nodes)
    stored = rows_of(backend, store.collection_name, prefix_of(nodes[-1:]))
    assert len(stored) == 60 - len(bad)
    assert len(rows_of(backend, store.collection_name, prefix_of(others))) == 40


@pytest.mark.parametrize("n", [16, 250])
@pytest.mark.parametrize("how_many", [1, 3])
async def test_bad_rows_that_only_milvus_sees_are_found_by_halving(
    backend: Backend, fault_proxy: FaultProxy, make_store: Any, make_nodes: MakeNodes, n: int, how_many: int
) -> None:
    store, nodes = make_store(batch_size=n), make_nodes(n, dim=DIM)
    bad = {node.node_id for node in nodes[n // 3 :: 5][:how_many]}
    fault_proxy.script(MilvusError(1100, "bad data"), method=WRITES, when=lambda request: holds(request, bad))
    report = await store.awrite(nodes)
    assert {f.node.node_id for f in report.failed} == bad
    assert sum(fault_proxy.counts[method] for method in WRITES) <= how_many * 2 * math.log2(n) + 2
    check(backend, store, nodes, report)


def holds(request: Any, ids: set[str]) -> bool:
    column = next(field for field in request.fields_data if field.field_name == "id")
    return not ids.isdisjoint(column.scalars.string_data.data)


async def test_a_request_that_is_too_large_is_split_not_repeated(
    backend: Backend, fault_proxy: FaultProxy, make_store: Any, make_nodes: MakeNodes
) -> None:
    store, nodes = make_store(batch_size=64), make_nodes(64, dim=DIM)
    fault = Refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max (100 vs. 50)")
    fault_proxy.script(fault, method=WRITES, when=lambda request: request.num_rows > 10)
    report = await store.awrite(nodes)
    assert len(report.written) == 64 and report.retries == 0
    assert sum(fault_proxy.counts[method] for method in WRITES) == 15  # 64 in eights
    check(backend, store, nodes, report)


# --- searches


async def test_one_bad_query_among_coalesced_searches_fails_alone(
    fault_proxy: FaultProxy, make_store: Any, make_nodes: MakeNodes
) -> None:
    store, nodes = make_store(), make_nodes(50, dim=DIM, seed=99)
    await store.async_add(nodes)
    store.dim = None  # so that only Milvus sees the wrong dimension
    mine = [node.node_id for node in nodes]  # others here have the same vectors
    queries = [VectorStoreQuery(query_embedding=n.embedding, similarity_top_k=1, node_ids=mine) for n in nodes[:20]]
    wrong = VectorStoreQuery(query_embedding=[0.5] * (DIM - 1), similarity_top_k=1, node_ids=mine)
    answers = await asyncio.gather(*map(store.aquery, [*queries[:10], wrong, *queries[10:]]), return_exceptions=True)
    failed = answers.pop(10)
    assert isinstance(failed, Exception)
    for query, answer in zip(queries, answers, strict=True):
        assert not isinstance(answer, BaseException)
        assert answer.ids == store.query(query).ids


@pytest.mark.parametrize("fault", [not_loaded(), Refuse(), rate_limit(), LoseAnswer(), Drop()])
async def test_searches_outlast_a_passing_fault(
    fault_proxy: FaultProxy, make_store: Any, make_nodes: MakeNodes, fault: Any
) -> None:
    store, nodes = make_store(rpc_timeout_seconds=0.5), make_nodes(20, dim=DIM)
    await store.async_add(nodes)
    fault_proxy.script(fault, method="Search", on=First(2))
    queries = [VectorStoreQuery(query_embedding=node.embedding, similarity_top_k=5) for node in nodes]
    answers = await store.aquery_many(queries)
    assert all(len(answer.ids) == 5 for answer in answers)


# --- deadlines


@pytest.mark.parametrize("call", ["write", "search", "delete", "get"])
async def test_a_server_that_never_answers_costs_the_deadline(
    backend: Backend,
    fault_proxy: FaultProxy,
    make_store: Any,
    make_nodes: MakeNodes,
    call: str,
    log: pytest.LogCaptureFixture,
) -> None:
    policy = RetryPolicy(max_attempts=100, initial_backoff_seconds=0.01, max_backoff_seconds=0.05, deadline_seconds=2.0)
    store = make_store(retry=policy, rpc_timeout_seconds=0.5, batch_size=10, token="root:s3cret")
    nodes = make_nodes(200, dim=DIM)
    method = {"write": "Upsert", "search": "Search", "delete": "Delete", "get": "Query"}[call]
    fault_proxy.script(Drop(), method=method)
    if call == "write":
        report = await store.awrite(nodes)
        assert len(report.failed) + len(report.unknown) == 200
        assert all(f.attempts == 0 for f in report.failed), "what waited was never sent"
    else:
        query = VectorStoreQuery(query_embedding=[0.5] * DIM, similarity_top_k=1)
        with pytest.raises(Exception, match=r"DEADLINE_EXCEEDED|imeout|Deadline"):
            await {
                "search": lambda: store.aquery(query),
                "delete": lambda: store.adelete("doc"),
                "get": lambda: store.aget_nodes(node_ids=["x"]),
            }[call]()
    requests = fault_proxy.requests_of(method)
    assert all(record.timeout is not None and record.timeout < 0.6 for record in requests)
    # Four attempts of half a second and, at the end, one or two shorter ones, in each slot; of a hundred that it might.
    slots = store.max_concurrency if call == "write" and backend.name == "server" else 1
    assert 2 <= len(requests) <= 6 * slots
    await until(lambda: store.statistics().in_flight == 0)
    assert store.statistics().waiting == 0
    check_what_is_said(log)


async def test_a_host_that_can_not_be_reached_is_named_while_the_loop_goes_on_and_one_where_nobody_listens_at_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    began = time.monotonic()
    with pytest.raises(Exception, match=r"can't connect to http://127.0.0.1:1: no Milvus server answers there"):
        await AsyncMilvusVectorStore.aopen(uri="http://user:s3cret@127.0.0.1:1", dim=DIM)
    assert time.monotonic() - began < 8, "that took no time-out"
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it accepts, and never answers
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        # Not beside the other: pymilvus connects one client after the other.
        opening = asyncio.create_task(AsyncMilvusVectorStore.aopen(uri=uri, dim=DIM))
        turns = 0
        while not opening.done():
            await asyncio.sleep(0.01)
            turns += 1
        with pytest.raises(Exception, match=f"can't connect to {re.escape(uri)}"):
            await opening
        assert turns > 100, "of the loop"
    assert "s3cret" not in caplog.text and "Traceback" not in caplog.text


# --- overload


async def test_overload_slows_down_without_an_error_and_recovers(
    backend: Backend, fault_proxy: FaultProxy, make_store: Any, make_nodes: MakeNodes
) -> None:
    store = make_store(batch_size=20, max_concurrency=8, retry=RetryPolicy())
    quota = OverQuota(per_second=1e9)
    fault_proxy.script(rate_limit(), method=WRITES, when=quota)
    nodes = make_nodes(4_000, dim=DIM)

    async def seconds_to_write() -> float:
        began = time.monotonic()
        reports = await asyncio.gather(*(store.awrite(nodes[start::64]) for start in range(64)))
        assert sum(len(report.written) for report in reports) == 4_000
        return time.monotonic() - began

    work = await seconds_to_write()  # what it takes on this machine, busy as it is
    quota.per_second = min(1_000, 4_000 / work / 4)
    seconds = await seconds_to_write()
    limit, retries = store.statistics().limit, store.statistics().retries
    permitted = 4_000 / quota.per_second - 1  # the bucket's first second is free
    quota.per_second = 1e9
    await seconds_to_write()
    assert retries > 0
    assert seconds < (permitted + work) / 0.5, f"{seconds:.2f} s where {permitted:.2f} + {work:.2f} s were permitted"
    if backend.name == "server":  # Lite has one write in flight anyway
        assert limit < 8
        assert store.statistics().limit == 8, "grown back"
    assert set(rows_of(backend, store.collection_name, prefix_of(nodes)).values()) == {1}


# --- cancellation


async def test_a_cancelled_search_is_aborted(fault_proxy: FaultProxy, make_store: Any, make_nodes: MakeNodes) -> None:
    store, nodes = make_store(rpc_timeout_seconds=30), make_nodes(5, dim=DIM)
    await store.async_add(nodes)
    fault_proxy.script(Drop(), method="Search")
    query = VectorStoreQuery(query_embedding=nodes[0].embedding, similarity_top_k=1)
    asking = asyncio.create_task(store.aquery(query))
    await until(lambda: fault_proxy.in_flight("Search") == 1)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await until(lambda: fault_proxy.in_flight("Search") == 0 and store.statistics().in_flight == 0)


async def test_never_more_in_flight_than_allowed(
    backend: Backend, fault_proxy: FaultProxy, make_store: Any, make_nodes: MakeNodes
) -> None:
    store, nodes = make_store(max_concurrency=3, batch_size=10), make_nodes(300, dim=DIM)
    fault_proxy.script(SlowAnswer(0.02), on=Every(), method=(*WRITES, "Search"))
    query = VectorStoreQuery(query_embedding=nodes[0].embedding, similarity_top_k=1)
    await asyncio.gather(
        *(store.awrite(nodes[start::10]) for start in range(10)), *(store.aquery(query) for _ in range(50))
    )
    assert fault_proxy.in_flight_peak() <= 3
    peak = max(fault_proxy.in_flight_peak(method) for method in WRITES)
    assert peak == 1 if backend.name == "lite" else peak <= 3
