"""Calls that are given up: whatever the moment, nothing stays taken, nobody else is hurt, and the report is there."""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import json
import os
import signal
import sys
import threading
import uuid
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import anyio
import grpc
import pytest
from llama_index.core.bridge.pydantic import Field
from llama_index.core.schema import BaseNode, TextNode
from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters, VectorStoreQuery
from pymilvus import MilvusClient

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, AsyncMilvusWriter, RetryPolicy, WriteReport
from llama_index_milvus_async_ext._flow.arrivals import take
from llama_index_milvus_async_ext._lane.items import CancelledCallError
from llama_index_milvus_async_ext._lane.port import LoopPort
from tests import programs
from tests.conftest import MakeNodes
from tests.embedding import HashEmbedding
from tests.fault_proxy import FaultProxy
from tests.faults import Drop, Fault, Held, LoseAnswer, MilvusError, Nth, Refuse
from tests.waiting import beside, blocked_until, press_ctrl_c, until

DIM = 8
WRITES = ("Insert", "Upsert")
QUICK = RetryPolicy(initial_backoff_seconds=0.001, max_backoff_seconds=0.01, deadline_seconds=5)
HAS_TASK_GROUPS = sys.version_info >= (3, 11)

Ask = Callable[[], Awaitable[Any]]


@pytest.fixture(scope="module")
def collection_name(lite_uri: str) -> Iterator[str]:
    """One collection for all tests here, which tell their rows apart by prefix."""
    name = f"cancellation_{uuid.uuid4().hex}"
    yield name
    with contextlib.closing(MilvusClient(lite_uri)) as client:
        client.drop_collection(name)


@pytest.fixture
def make_store(proxy: FaultProxy, collection_name: str, held: Held) -> Iterator[Callable[..., AsyncMilvusVectorStore]]:
    stores = []

    def make(**changes: Any) -> AsyncMilvusVectorStore:
        arguments = {"dim": DIM, "consistency_level": "Strong", "retry": QUICK, "rpc_timeout_seconds": 30.0}
        stores.append(AsyncMilvusVectorStore(proxy.uri, collection_name=collection_name, **(arguments | changes)))
        proxy.clear()
        return stores[-1]

    yield make
    proxy.heal()
    held.let_go()
    for store in stores:
        store.close()


def query_of(group: str) -> VectorStoreQuery:
    """A query that shares its requests with those of the same group only."""
    filters = MetadataFilters(filters=[MetadataFilter(key="group", value=group)])
    return VectorStoreQuery(query_embedding=[0.5] * DIM, similarity_top_k=1, filters=filters)


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def ids_in(report: WriteReport) -> list[str]:
    return sorted([*report.written, *(f.node.node_id for f in (*report.failed, *report.unknown))])


def check(report: WriteReport | None, nodes: list[Any], unknown: list[BaseNode]) -> None:
    """The report has each node once, and these as unknown; nothing was acknowledged."""
    assert report is not None, "there is a report"
    assert ids_in(report) == sorted(node.node_id for node in nodes)
    assert [f.node for f in report.unknown] == unknown
    assert report.written == []


# --- nothing stays taken


async def give_up_in_time(ask: Ask, number: int) -> None:
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(ask(), 0.001)


async def give_up_with_a_sibling(ask: Ask, number: int) -> None:
    async def fail() -> None:
        await turns(number % 11)
        raise LookupError("the sibling")

    with contextlib.suppress(Exception):  # an ExceptionGroup, which Python 3.10 does not know
        async with asyncio.TaskGroup() as group:  # type: ignore[attr-defined, unused-ignore]
            group.create_task(ask())
            group.create_task(fail())


async def give_up_after_some_turns(ask: Ask, number: int) -> None:
    task = asyncio.ensure_future(ask())
    await turns(number % 11)  # 0: before its first step
    task.cancel()
    await asyncio.wait([task])


@pytest.mark.parametrize(
    "give_up",
    [
        give_up_in_time,
        pytest.param(
            give_up_with_a_sibling,
            marks=pytest.mark.skipif(not HAS_TASK_GROUPS, reason="Python 3.10 has no asyncio.TaskGroup"),
        ),
        give_up_after_some_turns,
    ],
)
async def test_hundreds_of_cancelled_calls_leave_nothing_in_flight(
    proxy: FaultProxy,
    make_store: Any,
    make_nodes: MakeNodes,
    give_up: Callable[[Ask, int], Awaitable[None]],
) -> None:
    store, nodes = make_store(), make_nodes(1, dim=DIM)
    await store.async_add(nodes)
    proxy.script(Drop(), method="Search")

    def search(query: VectorStoreQuery) -> Ask:
        return lambda: store.aquery(query)

    others: list[Ask] = [
        lambda: store.awrite(nodes),
        lambda: store.aget_nodes(node_ids=["other"]),
        lambda: store.adelete_nodes(node_ids=["other"]),
    ]
    for round_ in range(100):
        # Each with a filter of its own, and so in a request of its own: as many requests as may be in flight.
        asking = [search(query_of(f"{round_}-{n}")) for n in range(store.max_concurrency)]
        asking.append(others[round_ % len(others)])
        await asyncio.gather(*(give_up(ask, round_ + n) for n, ask in enumerate(asking)))
    proxy.heal()
    await until(lambda: store.statistics().in_flight == 0)
    assert store.statistics().waiting == 0
    assert len((await store.aquery(VectorStoreQuery(query_embedding=[0.5] * DIM, similarity_top_k=1))).ids or []) == 1
    assert await store.async_add(nodes) == [nodes[0].node_id]


async def test_a_search_that_is_cancelled_while_its_retry_waits_for_a_slot_hurts_nobody(
    proxy: FaultProxy, make_store: Any, make_nodes: MakeNodes, caplog: pytest.LogCaptureFixture
) -> None:
    store, nodes = make_store(max_concurrency=1), make_nodes(1, dim=DIM)
    await store.async_add(nodes)
    for round_ in range(5):
        proxy.clear()
        refusal, retries = Held(then=Refuse()), store.statistics().retries
        proxy.script(refusal, method="Search", on=Nth(1))
        proxy.script(Drop(), method="Search")
        refused = asyncio.create_task(store.aquery(query_of(f"refused {round_}")))
        await until(lambda: proxy.counts["Search"] == 1)
        next_in_the_slot = asyncio.create_task(store.aquery(query_of(f"next {round_}")))
        await until(lambda: store.statistics().waiting == 1)
        refusal.let_go()
        await until(lambda: proxy.counts["Search"] == 2 and store.statistics().retries > retries)  # noqa: B023
        behind = asyncio.create_task(store.aquery(query_of(f"next {round_}")))
        await until(lambda: store.statistics().waiting >= 1)
        await asyncio.sleep(0.05)  # nobody is told when the pause before a retry (a hundredth at the most) is over
        proxy.heal()
        next_in_the_slot.cancel()
        refused.cancel()
        await asyncio.wait([next_in_the_slot, refused])
        assert (await behind).ids == []
        assert await store.async_add(nodes) == [nodes[0].node_id]
        await until(lambda: store.statistics().in_flight == 0)
    assert not [r for r in caplog.records if r.levelname == "ERROR" and not r.name.startswith("grpc")]


# --- nobody else is hurt


def own_queries(nodes: list[TextNode]) -> list[VectorStoreQuery]:
    """For each node a query that finds it; all in one group, so that they may share a request."""
    for place, node in enumerate(nodes):
        node.embedding = [float(place == number) for number in range(DIM)]
    ids = [node.node_id for node in nodes]
    return [VectorStoreQuery(query_embedding=node.embedding, similarity_top_k=1, node_ids=ids) for node in nodes]


@pytest.mark.parametrize("fault", [None, Refuse()], ids=["answered", "sent again"])
@pytest.mark.parametrize("given_up", [{0}, {2}, {4}, {0, 1, 3, 4}], ids=str)
async def test_a_cancelled_search_spares_the_others_of_its_request(
    proxy: FaultProxy, make_store: Any, make_nodes: MakeNodes, held: Held, given_up: set[int], fault: Fault | None
) -> None:
    store, nodes = make_store(), make_nodes(5, dim=DIM)
    queries = own_queries(nodes)
    await store.async_add(nodes)
    held.then = fault
    proxy.script(held, method="Search", on=Nth(1))
    asking = [asyncio.create_task(store.aquery(query)) for query in queries]
    await until(lambda: proxy.in_flight("Search") == 1)
    for place in given_up:
        asking[place].cancel()
    await asyncio.wait([asking[place] for place in given_up])
    assert proxy.in_flight("Search") == 1, "the others still wait for it"
    held.let_go()
    answers = await asyncio.gather(*asking, return_exceptions=True)
    for place, answer in enumerate(answers):
        if place in given_up:
            assert isinstance(answer, asyncio.CancelledError)
        else:
            assert not isinstance(answer, BaseException) and answer.ids == [nodes[place].node_id]
    assert [record.rows for record in proxy.requests_of("Search")] == [5] + [5 - len(given_up)] * (fault is not None)


async def test_a_search_that_is_cancelled_while_it_waits_spares_those_that_wait_with_it(
    proxy: FaultProxy, make_store: Any, make_nodes: MakeNodes, held: Held
) -> None:
    store, nodes = make_store(max_concurrency=1), make_nodes(5, dim=DIM)
    queries = own_queries(nodes)
    await store.async_add(nodes)
    proxy.script(held, method="Search")
    under_way = asyncio.create_task(store.aquery(query_of("another")))
    await until(lambda: proxy.in_flight("Search") == 1)
    waiting = [asyncio.create_task(store.aquery(query)) for query in queries]
    await until(lambda: store.statistics().waiting == 5)
    waiting[1].cancel()
    await asyncio.wait([waiting[1]])
    held.let_go()
    del waiting[1], nodes[1]
    assert [answer.ids for answer in await asyncio.gather(*waiting)] == [[node.node_id] for node in nodes]
    assert (await under_way).ids == []
    assert [record.rows for record in proxy.requests_of("Search")] == [1, 4]


@pytest.mark.parametrize(
    ("fault", "rows", "lands"),
    [(None, [12], True), (Refuse(), [12, 6], False), (LoseAnswer(), [12, 6], True)],
    ids=["acknowledged", "refused", "answer lost"],
)
async def test_a_cancelled_write_spares_the_others_of_its_request(
    proxy: FaultProxy,
    make_store: Any,
    make_nodes: MakeNodes,
    held: Held,
    fault: Fault | None,
    rows: list[int],
    lands: bool,
) -> None:
    store, nodes = make_store(), make_nodes(12, dim=DIM)
    held.then = fault
    proxy.script(held, method=WRITES, on=Nth(1))
    parts = [nodes[start : start + 2] for start in range(0, 12, 2)]
    writing = [asyncio.create_task(store.awrite(part)) for part in parts]
    await until(lambda: proxy.in_flight() == 1)
    for task in writing[::2]:
        task.cancel()
    for task, part in zip(writing[::2], parts[::2], strict=True):
        with pytest.raises(asyncio.CancelledError) as raised:
            await task
        check(WriteReport.of(raised.value), part, unknown=list(part))
    held.let_go()
    for report, part in zip(await asyncio.gather(*writing[1::2]), parts[1::2], strict=True):
        assert report.ok and report.written == [node.node_id for node in part]
    await until(lambda: store.statistics().in_flight == 0)
    assert store.statistics().waiting == 0
    assert [record.rows for record in proxy.requests_of(*WRITES)] == rows
    stored = {node.node_id for node in store.get_nodes(node_ids=[node.node_id for node in nodes])}
    assert stored == {node.node_id for place, part in enumerate(parts) for node in part if place % 2 or lands}


# --- the report is there


async def test_a_write_cancelled_under_anyio_has_its_report(
    proxy: FaultProxy, make_store: Any, make_nodes: MakeNodes, held: Held
) -> None:
    # As under Starlette and FastAPI: anyio cancels again at each turn of the loop, until the call has ended.
    store, nodes = make_store(batch_size=10), make_nodes(30, dim=DIM)
    proxy.script(held, method=WRITES)
    raised: BaseException | None = None
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:

            async def leave() -> None:
                await until(lambda: proxy.in_flight() == 1)
                scope.cancel()

            group.start_soon(leave)
            try:
                await store.awrite(nodes)
            except BaseException as error:
                raised = error
                raise
    assert isinstance(raised, asyncio.CancelledError)
    check(getattr(raised, "report", None), nodes, unknown=nodes[:10])
    assert WriteReport.of(raised) is raised.report  # type: ignore[attr-defined]


async def test_a_writer_cancelled_under_anyio_has_its_report(
    proxy: FaultProxy, make_store: Any, make_nodes: MakeNodes, held: Held
) -> None:
    writer = AsyncMilvusWriter(make_store(batch_size=10), HashEmbedding(dim=DIM, embed_batch_size=10))
    nodes = make_nodes(30, dim=DIM)
    proxy.script(held, method=WRITES)
    raised: BaseException | None = None
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:

            async def leave() -> None:
                await until(lambda: proxy.in_flight() == 1)
                scope.cancel()

            group.start_soon(leave)
            try:
                await writer.acall(nodes)
            except BaseException as error:
                raised = error
                raise
    check(writer.last_report, nodes, unknown=nodes[:10])
    assert WriteReport.of(raised) is writer.last_report


async def test_a_writer_cancelled_at_every_turn_while_it_embeds_has_its_report(
    proxy: FaultProxy, make_store: Any, make_nodes: MakeNodes, held: Held
) -> None:
    class Stuck(HashEmbedding):
        """Answers for the first part, of two batches."""

        async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
            embeddings = self._embed(texts)
            if self.calls > 2:
                await asyncio.Event().wait()
            return embeddings

    store, nodes = make_store(batch_size=10), make_nodes(60, dim=DIM)
    for node in nodes:
        node.embedding = None
    proxy.script(held, method=WRITES)
    writer = AsyncMilvusWriter(store, Stuck(dim=DIM, embed_batch_size=10))
    writing = asyncio.create_task(writer.acall(nodes))
    await until(lambda: proxy.in_flight() == 1)
    while not writing.done():
        writing.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await writing
    check(writer.last_report, nodes, unknown=nodes[:10])
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.parametrize("turns_between", [1, 2, 3])
async def test_a_write_cancelled_twice_has_its_report(
    proxy: FaultProxy, make_store: Any, make_nodes: MakeNodes, held: Held, turns_between: int
) -> None:
    store, nodes = make_store(batch_size=10), make_nodes(30, dim=DIM)
    proxy.script(held, method=WRITES)
    raised: list[BaseException] = []

    async def write() -> None:
        try:
            await store.awrite(nodes)
        except asyncio.CancelledError as error:
            raised.append(error)
            raise

    writing = asyncio.create_task(write())
    await until(lambda: proxy.in_flight() == 1)
    writing.cancel()
    await turns(turns_between)
    writing.cancel()
    await asyncio.wait([writing])
    check(getattr(raised[0], "report", None), nodes, unknown=nodes[:10])


async def test_the_awaiter_of_a_cancelled_task_finds_the_report(
    proxy: FaultProxy, make_store: Any, make_nodes: MakeNodes, held: Held
) -> None:
    # Python 3.10 raises another CancelledError there, with the first one as its context.
    store, nodes = make_store(batch_size=10), make_nodes(30, dim=DIM)
    proxy.script(held, method=WRITES)
    writing = asyncio.create_task(store.async_add(nodes))
    await until(lambda: proxy.in_flight() == 1)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError) as raised:
        await writing
    check(WriteReport.of(raised.value), nodes, unknown=nodes[:10])


async def test_a_write_that_runs_out_of_its_callers_time_has_its_report(
    proxy: FaultProxy, make_store: Any, make_nodes: MakeNodes, held: Held
) -> None:
    store, nodes = make_store(batch_size=10), make_nodes(30, dim=DIM)
    proxy.script(held, method=WRITES)
    with pytest.raises(asyncio.TimeoutError) as raised:
        await asyncio.wait_for(store.awrite(nodes), 0.5)
    report = WriteReport.of(raised.value)
    assert report is not None
    assert ids_in(report) == sorted(node.node_id for node in nodes)
    assert report.written == []


async def test_a_failed_flush_says_that_the_rows_are_written(
    proxy: FaultProxy, make_store: Any, make_nodes: MakeNodes
) -> None:
    store, nodes = make_store(), make_nodes(5, dim=DIM)
    proxy.script(MilvusError(1100, "no flush today"), method="Flush")
    for write in (store.async_add, lambda nodes, **options: asyncio.to_thread(store.add, nodes, **options)):
        with pytest.raises(Exception, match="no flush today") as raised:
            await write(nodes, force_flush=True)
        report = getattr(raised.value, "report", None)
        assert report is not None, "the flush's error has the report of the write"
        assert report.written == [node.node_id for node in nodes] and report.ok
        assert WriteReport.of(raised.value) is report


async def test_a_cancelled_flush_says_that_the_rows_are_written(
    proxy: FaultProxy, make_store: Any, make_nodes: MakeNodes, held: Held
) -> None:
    store, nodes = make_store(), make_nodes(5, dim=DIM)
    proxy.script(held, method="Flush")
    writing = asyncio.create_task(store.async_add(nodes, force_flush=True))
    await until(lambda: proxy.in_flight("Flush") == 1)
    writing.cancel()
    with pytest.raises(asyncio.CancelledError) as raised:
        await writing
    report = WriteReport.of(raised.value)
    assert report is not None, "the cancellation has the report of the write"
    assert report.written == [node.node_id for node in nodes] and report.ok


INTERRUPTED = """
import asyncio, json, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
from llama_index.core.schema import TextNode
from llama_index_milvus_async_ext import AsyncMilvusVectorStore, AsyncMilvusWriter, WriteReport

uri, collection, prefix, call = sys.argv[1:]
nodes = [TextNode(id_=f"{prefix}-{n}", text="text", embedding=[0.5] * 8) for n in range(30)]
store = AsyncMilvusVectorStore(uri=uri, collection_name=collection, dim=8, batch_size=10, rpc_timeout_seconds=100)
calls = {
    "store.add(nodes)": lambda: store.add(nodes),
    "AsyncMilvusWriter(store)(nodes)": lambda: AsyncMilvusWriter(store)(nodes),
    "asyncio.run(store.async_add(nodes))": lambda: asyncio.run(store.async_add(nodes)),
}
try:
    calls[call]()
except KeyboardInterrupt as error:
    report = WriteReport.of(error)
    if report is not None:
        print(json.dumps([report.written, *([f.node.node_id for f in l] for l in (report.unknown, report.failed))]))
"""


@pytest.mark.parametrize(
    "call",
    [
        "store.add(nodes)",
        "AsyncMilvusWriter(store)(nodes)",
        pytest.param(
            "asyncio.run(store.async_add(nodes))",
            marks=pytest.mark.skipif(
                sys.version_info < (3, 11), reason="Python 3.10's asyncio.run raises what knows nothing of its task"
            ),
        ),
    ],
)
async def test_ctrl_c_leaves_the_report(proxy: FaultProxy, make_store: Any, held: Held, call: str) -> None:
    store, prefix = make_store(), uuid.uuid4().hex
    proxy.script(held, method=WRITES, on=Nth(2))
    child = await asyncio.to_thread(
        programs.start, INTERRUPTED, proxy.uri, store.collection_name, prefix, call, stderr=sys.__stderr__.fileno()
    )
    with child:
        await until(lambda: sum(proxy.counts[method] for method in WRITES) == 2, seconds=60)
        os.kill(child.pid, signal.SIGINT)
        said = await asyncio.to_thread(child.stdout.read)
    ids = [f"{prefix}-{number}" for number in range(30)]
    assert json.loads(said) == [ids[:10], ids[10:20], ids[20:]]


# --- blocking calls


def ctrl_c_once(
    condition: Callable[[], bool], press: Callable[[], None] = press_ctrl_c
) -> contextlib.AbstractContextManager[None]:
    """Ctrl-C in the main thread, once it waits for an outcome and a condition holds."""
    main = threading.main_thread().ident or 0

    def is_due() -> bool:
        return sys._current_frames()[main].f_code is take.__code__ and condition()

    def press_in_time() -> None:
        blocked_until(is_due)
        press()

    return beside(press_in_time)


class PacedEmbedding(HashEmbedding):
    """A model that works on ten texts at a time, each once the next function of `before` has returned."""

    dim: int = DIM
    embed_batch_size: int = 10
    num_workers: int | None = 1
    before: list[Callable[[], None]] = Field(default_factory=list)

    def _embed(self, texts: list[str]) -> list[list[float]]:
        if self.before:
            self.before.pop(0)()
        return super()._embed(texts)


BLOCKING_WRITES: dict[str, Callable[[AsyncMilvusVectorStore, list[Any]], Any]] = {
    "write": lambda store, nodes: store.write(nodes),
    "add": lambda store, nodes: store.add(nodes),
    "a writer": lambda store, nodes: AsyncMilvusWriter(store)(nodes),
}


def nothing_more_is_sent(proxy: FaultProxy, store: AsyncMilvusVectorStore, nodes: list[Any], sent: list[Any]) -> None:
    """What was given up is neither sent later nor in the way of others; of these nodes, those sent are stored."""
    assert store.statistics().waiting == 0
    requests = len(proxy.requests_of(*WRITES))
    blocked_until(lambda: store.statistics().in_flight == 0)
    later = nodes[0].model_copy(update={"id_": uuid.uuid4().hex, "embedding": [0.5] * DIM})
    assert store.add([later]) == [later.node_id]
    assert len(proxy.requests_of(*WRITES)) == requests + 1, "what had waited would have been sent before"
    stored = store.get_nodes(node_ids=[node.node_id for node in nodes])
    assert sorted(node.node_id for node in stored) == sorted(node.node_id for node in sent)


@pytest.mark.parametrize("call", BLOCKING_WRITES)
def test_ctrl_c_cancels_what_a_blocking_write_has_not_sent(
    proxy: FaultProxy, make_store: Any, make_nodes: MakeNodes, held: Held, call: str
) -> None:
    store, nodes = make_store(batch_size=10), make_nodes(30, dim=DIM)
    proxy.script(held, method=WRITES, on=Nth(2))
    with (
        pytest.raises(KeyboardInterrupt) as pressed,
        ctrl_c_once(lambda: len(proxy.requests_of(*WRITES)) == 2 and store.statistics().waiting == 10),
    ):
        BLOCKING_WRITES[call](store, nodes)
    check_the_first_ten_are_written(WriteReport.of(pressed.value), nodes)
    held.let_go()
    nothing_more_is_sent(proxy, store, nodes, sent=nodes[:20])


def test_ctrl_c_cancels_what_a_writer_has_handed_over_part_by_part(
    proxy: FaultProxy, make_store: Any, make_nodes: MakeNodes, held: Held
) -> None:
    store, nodes = make_store(batch_size=10), make_nodes(30, dim=DIM)
    for node in nodes:
        node.embedding = None
    proxy.script(held, method=WRITES, on=Nth(2))

    def requests_are(count: int) -> Callable[[], None]:
        return lambda: blocked_until(lambda: len(proxy.requests_of(*WRITES)) == count)

    writer = AsyncMilvusWriter(store, PacedEmbedding(before=[requests_are(0), requests_are(1), requests_are(2)]))
    with pytest.raises(KeyboardInterrupt) as pressed, ctrl_c_once(lambda: store.statistics().waiting == 10):
        writer(nodes)
    check_the_first_ten_are_written(writer.last_report, nodes)
    assert WriteReport.of(pressed.value) is writer.last_report
    held.let_go()
    nothing_more_is_sent(proxy, store, nodes, sent=nodes[:20])


@pytest.mark.parametrize("embeds", [False, True])
@pytest.mark.parametrize("moment", ["before it is sent", "as it is sent"])
def test_ctrl_c_as_a_writer_hands_a_part_over_leaves_nothing_behind(
    proxy: FaultProxy, make_store: Any, make_nodes: MakeNodes, monkeypatch: Any, embeds: bool, moment: str
) -> None:
    store, nodes = make_store(batch_size=10), make_nodes(30, dim=DIM)
    for node in nodes if embeds else ():
        node.embedding = None
    proxy.script(Drop(), method=WRITES)
    send = LoopPort._send

    def press(port: LoopPort, function: Callable[[], object]) -> None:
        monkeypatch.setattr(LoopPort, "_send", send)
        if moment == "as it is sent":
            send(port, function)
        press_ctrl_c()
        if moment == "before it is sent":
            send(port, function)

    monkeypatch.setattr(LoopPort, "_send", press)
    writer = AsyncMilvusWriter(store, HashEmbedding(dim=DIM, embed_batch_size=10, num_workers=1) if embeds else None)
    with pytest.raises(KeyboardInterrupt) as pressed, beside(lambda: None):
        writer(nodes)
    assert WriteReport.of(pressed.value) is writer.last_report
    assert writer.last_report is not None and ids_in(writer.last_report) == sorted(node.node_id for node in nodes)
    blocked_until(lambda: store.statistics().waiting == 0)
    assert len(proxy.requests_of(*WRITES)) <= 1


def check_the_first_ten_are_written(report: WriteReport | None, nodes: list[Any]) -> None:
    """And the next ten were under way, and those after them waited."""
    assert report is not None
    assert report.written == [node.node_id for node in nodes[:10]]
    assert [f.node for f in report.unknown] == nodes[10:20]
    assert [f.node for f in report.failed] == nodes[20:]


# As a signal that came just before the system began to wait: the handler is due, but nothing ends the wait.
@pytest.mark.parametrize("press", [press_ctrl_c, _thread.interrupt_main])
async def test_ctrl_c_aborts_a_blocking_search(proxy: FaultProxy, make_store: Any, press: Callable[[], None]) -> None:
    store = make_store()
    proxy.script(Drop(), method="Search")
    with pytest.raises(KeyboardInterrupt), ctrl_c_once(lambda: proxy.in_flight("Search") == 1, press):
        store.query(query_of("any"))
    await until(lambda: proxy.requests_of("Search")[0].code is grpc.StatusCode.CANCELLED)
    await until(lambda: store.statistics().in_flight == 0)


class CalledOffError(BaseException):
    """No error of a kind that is kept for the report."""


@pytest.mark.parametrize("is_async", [False, True])
def test_a_writer_that_ends_with_an_error_cancels_what_it_has_not_sent(
    proxy: FaultProxy, make_store: Any, make_nodes: MakeNodes, held: Held, is_async: bool
) -> None:
    store, nodes = make_store(batch_size=10), make_nodes(60, dim=DIM)
    for node in nodes:
        node.embedding = None
    proxy.script(held, method=WRITES)

    def call_off() -> None:
        blocked_until(lambda: store.statistics().waiting == 10)
        raise CalledOffError

    def until_the_first_is_sent() -> None:
        blocked_until(lambda: proxy.in_flight() == 1)

    model = PacedEmbedding(before=[lambda: None, until_the_first_is_sent, call_off])
    writer = AsyncMilvusWriter(store, model)
    with pytest.raises(CalledOffError) as ended:
        if is_async:
            asyncio.run(writer.acall(nodes))
        else:
            writer(nodes)
    report = writer.last_report
    check(report, nodes, unknown=nodes[:10])
    assert report is not None and WriteReport.of(ended.value) is report
    assert all(isinstance(f.error, CancelledCallError) and f.retryable for f in (*report.unknown, *report.failed))
    held.let_go()
    nothing_more_is_sent(proxy, store, nodes, sent=nodes[:10])
    assert model.calls == 2, "nothing was embedded after that"


async def test_a_writer_that_ends_with_an_error_leaves_nothing_with_the_model(
    proxy: FaultProxy, make_store: Any, make_nodes: MakeNodes
) -> None:
    texts_given_up: list[int] = []

    class Remote(HashEmbedding):
        async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
            embeddings = self._embed(texts)
            if self.calls == 1:
                return embeddings
            if self.calls == 2:
                await until(lambda: self.calls == 4)
                raise CalledOffError
            try:
                await asyncio.Event().wait()
            finally:
                texts_given_up.append(len(texts))
            raise AssertionError("it goes on")

    store, nodes = make_store(), make_nodes(100, dim=DIM)
    for node in nodes:
        node.embedding = None
    model = Remote(dim=DIM, embed_batch_size=10)
    writer = AsyncMilvusWriter(store, model)
    with pytest.raises(CalledOffError):
        await writer.acall(nodes)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert model.calls == 4 and texts_given_up == [10, 10]
    check(writer.last_report, nodes, unknown=[])
    assert not proxy.requests_of(*WRITES)


def test_an_error_that_has_nothing_to_do_with_a_write_has_no_report() -> None:
    looped = ValueError("its own cause")
    looped.__cause__ = KeyError("its cause's cause")
    looped.__cause__.__context__ = looped
    assert WriteReport.of(looped) is None
    assert WriteReport.of(asyncio.CancelledError()) is None
