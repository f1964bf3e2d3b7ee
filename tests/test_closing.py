"""Opening and closing beside other work: no call is cut off, nobody waits for ever, and no loop stands still."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import signal
import socket
import subprocess
import sys
import threading
import uuid
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters, VectorStoreQuery
from pymilvus import MilvusClient

from llama_index_milvus_async_ext import (
    AsyncMilvusRetriever,
    AsyncMilvusVectorStore,
    AsyncMilvusWriter,
    RetryPolicy,
    WriteError,
)
from llama_index_milvus_async_ext._lane import forks
from llama_index_milvus_async_ext._lane.port import LoopPort
from llama_index_milvus_async_ext._lane.thread import IoThread
from llama_index_milvus_async_ext._milvus import connection
from tests.conftest import MakeNodes, lite_address
from tests.embedding import HashEmbedding
from tests.fault_proxy import FaultProxy
from tests.faults import Held, Nth
from tests.leftovers import UNSHARED, connections_to, is_counted, nothing_is_left_of
from tests.waiting import until

DIM = 8
WRITES = ("Insert", "Upsert")


@pytest.fixture(scope="module")
def collection_name(lite_uri: str) -> Iterator[str]:
    """One collection for all tests here, which tell their rows apart by prefix."""
    name = f"closing_{uuid.uuid4().hex}"
    yield name
    with contextlib.closing(MilvusClient(lite_uri)) as client:
        client.drop_collection(name)


@pytest.fixture
def store(proxy: FaultProxy, collection_name: str) -> AsyncMilvusVectorStore:
    """A store that the test closes: what is tested here is that this ends."""
    store = AsyncMilvusVectorStore(proxy.uri, collection_name=collection_name, dim=DIM, consistency_level="Strong")
    proxy.clear()
    return store


def within(seconds: float, function: Callable[[], Any]) -> Any:
    """Call a function in a thread of its own: one that hangs fails its test, and no more than that."""
    outcome: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def run() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome.result(timeout=seconds)


def query_of(group: str = "any") -> VectorStoreQuery:
    filters = MetadataFilters(filters=[MetadataFilter(key="group", value=group)])
    return VectorStoreQuery(query_embedding=[0.5] * DIM, similarity_top_k=1, filters=filters)


# --- close() where it would wait for itself


def leave_with(store: AsyncMilvusVectorStore) -> None:
    with store:
        pass


@pytest.mark.parametrize("close", [AsyncMilvusVectorStore.close, leave_with])
@pytest.mark.parametrize("call", ["write", "search", "delete"])
def test_closing_in_a_coroutine_whose_loop_has_calls_pending_is_refused_and_the_store_stays_open(
    proxy: FaultProxy,
    store: AsyncMilvusVectorStore,
    make_nodes: MakeNodes,
    held: Held,
    close: Callable[[AsyncMilvusVectorStore], None],
    call: str,
) -> None:
    nodes = make_nodes(3, dim=DIM)
    proxy.script(held, method=(*WRITES, "Search", "Delete"), on=Nth(1))

    async def scenario() -> None:
        calls = {
            "write": lambda: store.async_add(nodes),
            "search": lambda: store.aquery(query_of()),
            "delete": lambda: store.adelete("a document"),
        }
        pending = asyncio.ensure_future(calls[call]())
        await until(lambda: proxy.in_flight() == 1)
        with pytest.raises(RuntimeError, match=r"aclose\(\)"):
            close(store)
        held.let_go()
        await pending
        assert await store.async_add(nodes) == [node.node_id for node in nodes]
        assert len(await store.aget_nodes(node_ids=[node.node_id for node in nodes])) == 3
        close(store)  # with nothing pending it may
        with pytest.raises(RuntimeError, match="closed"):
            await store.async_add(nodes)

    within(20, lambda: asyncio.run(scenario()))


@pytest.mark.parametrize("end", ["stopped", "closed"])
@pytest.mark.parametrize("call", ["write", "search", "delete"])
def test_a_call_whose_loop_has_ended_is_not_waited_for(
    proxy: FaultProxy, store: AsyncMilvusVectorStore, make_nodes: MakeNodes, held: Held, end: str, call: str
) -> None:
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        pending = left_pending(loop, proxy, store, make_nodes, held, call)
        if end == "closed":
            loop.close()
        held.let_go()
        within(20, store.close)
        del pending


@pytest.mark.parametrize("call", ["write", "search", "delete"])
def test_a_call_whose_loop_stood_still_while_the_store_was_closed_ends_when_the_loop_goes_on(
    proxy: FaultProxy, store: AsyncMilvusVectorStore, make_nodes: MakeNodes, held: Held, call: str
) -> None:
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        pending = left_pending(loop, proxy, store, make_nodes, held, call)
        held.let_go()
        within(20, store.close)
        loop.run_until_complete(asyncio.wait([pending], timeout=20))
        assert pending.done()
        pending.exception()


def left_pending(
    loop: asyncio.AbstractEventLoop,
    proxy: FaultProxy,
    store: AsyncMilvusVectorStore,
    make_nodes: MakeNodes,
    held: Held,
    call: str,
) -> asyncio.Task[Any]:
    """A call that is under way, on a loop that has stopped."""
    proxy.script(held, method=(*WRITES, "Search", "Delete"))
    calls: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
        "write": lambda: store.async_add(make_nodes(3, dim=DIM)),
        "search": lambda: store.aquery(query_of()),
        "delete": lambda: store.adelete("a document"),
    }
    pending = loop.create_task(calls[call]())
    loop.run_until_complete(until(lambda: proxy.in_flight() == 1))
    return pending


# --- closing waits for whole calls


class GatedEmbedding(HashEmbedding):
    """Embeds its first calls' texts at once, and the others' when `go_on` is called."""

    _gate: threading.Event = PrivateAttr(default_factory=threading.Event)

    def go_on(self) -> None:
        self._gate.set()

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        if self.calls >= 2:
            self._gate.wait(60)
        return self._embed(texts)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)


@pytest.fixture
async def model() -> AsyncIterator[GatedEmbedding]:
    model = GatedEmbedding(dim=DIM, embed_batch_size=20)
    yield model
    model.go_on()


async def refuses_calls(store: AsyncMilvusVectorStore) -> None:
    """Return once the store takes no new calls: it is being closed."""
    for _ in range(3_000):
        try:
            await store.aget_nodes(node_ids=["any"])
        except RuntimeError:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it takes calls while it is being closed")


@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize("call", ["delete nodes", "delete documents", "get"])
async def test_closing_waits_for_a_call_of_several_requests(
    proxy: FaultProxy, store: AsyncMilvusVectorStore, make_nodes: MakeNodes, held: Held, call: str, is_async: bool
) -> None:
    nodes = make_nodes(3, dim=DIM)
    await store.async_add(nodes)
    padding = [f"nobody-{number}" for number in range(1_500)]
    node_ids = [nodes[0].node_id, *padding, nodes[1].node_id, *padding, nodes[2].node_id]
    document = nodes[0].ref_doc_id
    assert document is not None
    awaited: dict[str, Callable[[], Any]] = {
        "delete nodes": lambda: store.adelete_nodes(node_ids=node_ids),
        "delete documents": lambda: store.adelete([*padding, *padding, document]),
        "get": lambda: store.aget_nodes(node_ids=node_ids),
    }
    blocking: dict[str, Callable[[], Any]] = {
        "delete nodes": lambda: store.delete_nodes(node_ids=node_ids),
        "delete documents": lambda: store.delete([*padding, *padding, document]),
        "get": lambda: store.get_nodes(node_ids=node_ids),
    }
    method = "Query" if call == "get" else "Delete"
    proxy.clear()
    proxy.script(held, method=method, on=Nth(1))
    calling = asyncio.ensure_future(awaited[call]() if is_async else asyncio.to_thread(blocking[call]))
    await until(lambda: proxy.in_flight(method) == 1)
    closing = asyncio.create_task(store.aclose() if is_async else asyncio.to_thread(store.close))
    await refuses_calls(store)
    assert not closing.done()
    held.let_go()
    found = await calling
    await closing
    again = MilvusClient(proxy.uri, dedicated=True)
    with contextlib.closing(again):
        left = again.query(store.collection_name, ids=[node.node_id for node in nodes], consistency_level="Strong")
    if call == "get":
        assert sorted(node.node_id for node in found) == sorted(node.node_id for node in nodes)
    else:
        assert left == [], "all of it was carried out"


@pytest.mark.parametrize("is_async", [True, False])
async def test_closing_waits_for_a_writer_that_still_embeds(
    proxy: FaultProxy, store: AsyncMilvusVectorStore, make_nodes: MakeNodes, model: GatedEmbedding, is_async: bool
) -> None:
    nodes = make_nodes(400, dim=DIM)
    for node in nodes:
        node.embedding = None
    writer = AsyncMilvusWriter(store, model)
    writing = asyncio.ensure_future(writer.acall(nodes) if is_async else asyncio.to_thread(writer, nodes))
    await until(lambda: len(proxy.requests_of(*WRITES)) >= 1)
    closing = asyncio.create_task(store.aclose() if is_async else asyncio.to_thread(store.close))
    await refuses_calls(store)
    assert not closing.done()
    model.go_on()
    assert await writing == nodes
    await closing
    assert writer.last_report is not None
    assert writer.last_report.written == [node.node_id for node in nodes]


async def test_closing_waits_for_the_one_of_two_calls_that_has_not_ended(
    proxy: FaultProxy, store: AsyncMilvusVectorStore, held: Held
) -> None:
    proxy.script(held, method="Search", on=Nth(1))
    calling = asyncio.create_task(store.aquery(query_of("one")))
    await until(lambda: proxy.in_flight() == 1)
    assert (await store.aquery(query_of("another"))).ids == []
    closing = asyncio.create_task(store.aclose())
    await refuses_calls(store)
    assert not closing.done()
    held.let_go()
    assert (await calling).ids == []
    await closing


# --- closing waits for no call that has ended, however that was


class CalledOffError(BaseException):
    """No error of a kind that is kept for a report."""


class BrokenEmbedding(HashEmbedding):
    def _embed(self, texts: list[str]) -> list[list[float]]:
        raise CalledOffError


def without_embeddings(nodes: list[Any]) -> list[Any]:
    for node in nodes:
        node.embedding = None
    return nodes


# A call, its blocking form, and what it raises.
ENDED: dict[str, tuple[Any, Any, type[BaseException] | None]] = {
    "a write that succeeds": (
        lambda store, nodes: store.async_add(nodes),
        lambda store, nodes: store.add(nodes),
        None,
    ),
    "a write that fails": (
        lambda store, nodes: store.async_add(without_embeddings(nodes)),
        lambda store, nodes: store.add(without_embeddings(nodes)),
        WriteError,
    ),
    "a query that is refused": (
        lambda store, _: store.aquery(VectorStoreQuery(query_str="no vector")),
        lambda store, _: store.query(VectorStoreQuery(query_str="no vector")),
        ValueError,
    ),
    "a delete that is refused": (
        lambda store, _: store.adelete_nodes(),
        lambda store, _: store.delete_nodes(),
        ValueError,
    ),
    "a writer that succeeds": (
        lambda store, nodes: AsyncMilvusWriter(store, HashEmbedding(dim=DIM)).acall(without_embeddings(nodes)),
        lambda store, nodes: AsyncMilvusWriter(store, HashEmbedding(dim=DIM))(without_embeddings(nodes)),
        None,
    ),
    "a writer that fails": (
        lambda store, nodes: AsyncMilvusWriter(store).acall(without_embeddings(nodes)),
        lambda store, nodes: AsyncMilvusWriter(store)(without_embeddings(nodes)),
        WriteError,
    ),
    "a writer that is called off": (
        lambda store, nodes: AsyncMilvusWriter(store, BrokenEmbedding(dim=DIM)).acall(without_embeddings(nodes)),
        lambda store, nodes: AsyncMilvusWriter(store, BrokenEmbedding(dim=DIM))(without_embeddings(nodes)),
        CalledOffError,
    ),
}


@pytest.mark.parametrize("call", ENDED)
async def test_a_call_that_has_ended_is_not_waited_for(
    store: AsyncMilvusVectorStore, make_nodes: MakeNodes, call: str
) -> None:
    awaited, blocking, error = ENDED[call]
    for ended in (awaited, lambda *arguments: asyncio.to_thread(blocking, *arguments)):
        with pytest.raises(error) if error is not None else contextlib.nullcontext():
            await ended(store, make_nodes(3, dim=DIM))
    await nothing_is_counted()
    within(20, store.close)


@pytest.mark.parametrize("call", ["write", "search", "delete", "writer"])
@pytest.mark.parametrize("when", ["before its first step", "while it is under way"])
async def test_a_call_that_was_cancelled_is_not_waited_for(
    proxy: FaultProxy, store: AsyncMilvusVectorStore, make_nodes: MakeNodes, held: Held, call: str, when: str
) -> None:
    proxy.script(held, method=(*WRITES, "Search", "Delete"))
    nodes = make_nodes(3, dim=DIM)
    writer = AsyncMilvusWriter(store, HashEmbedding(dim=DIM))
    calls: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
        "write": lambda: store.async_add(nodes),
        "search": lambda: store.aquery(query_of()),
        "delete": lambda: store.adelete("a document"),
        "writer": lambda: writer.acall(without_embeddings(nodes)),
    }
    is_due: Callable[[], bool] = (lambda: True) if when.startswith("before") else (lambda: proxy.in_flight() == 1)
    calling = asyncio.ensure_future(calls[call]())
    if not is_due():
        await until(is_due)
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    held.let_go()
    await nothing_is_counted()
    within(20, store.close)


async def nothing_is_counted() -> None:
    """Nobody has work for Python any more, and no request is out that a fork would have to wait for."""
    assert not IoThread.get().takes_turns()
    await until(lambda: forks.quiet._out == 0)


async def test_a_call_for_which_there_is_no_thread_is_not_waited_for(
    store: AsyncMilvusVectorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_more(**_: Any) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(connection.threading, "Thread", no_more)
        with pytest.raises(RuntimeError, match="new thread"):
            await store.aget_nodes(node_ids=["any"])
    await nothing_is_counted()
    within(20, store.close)


async def test_a_store_that_is_being_closed_takes_no_calls_from_within_anothers(
    proxy: FaultProxy, store: AsyncMilvusVectorStore, collection_name: str, held: Held
) -> None:
    proxy.script(held, method="Search")
    async with AsyncMilvusVectorStore(proxy.uri, collection_name=collection_name, dim=DIM) as other:
        pending = asyncio.create_task(store.aquery(query_of()))
        await until(lambda: proxy.in_flight() == 1)
        closing = asyncio.create_task(store.aclose())
        await refuses_calls(store)
        with other.live().held(LoopPort.current()), pytest.raises(RuntimeError, match="closed"):
            await store.aget_nodes(node_ids=["any"])
        held.let_go()
        await asyncio.gather(pending, closing)


# --- what is left


async def test_the_last_store_of_an_address_closes_its_connections_and_those_before_it_only_their_own(
    proxy: FaultProxy, collection_name: str, make_nodes: MakeNodes
) -> None:
    def opened(**settings: Any) -> AsyncMilvusVectorStore:
        unshared = {"consistency_level": "Strong", "grpc_options": UNSHARED}
        return AsyncMilvusVectorStore(proxy.uri, collection_name=collection_name, dim=DIM, **unshared, **settings)

    async def has_connections(count: int) -> None:
        await until(lambda: connections_to(proxy) == count)

    opened().close()  # the collection is there now
    stores = [opened(), opened(batch_size=10), opened(token="root:Milvus")]
    await has_connections(2)  # one for those that are connected alike
    assert all(store.client.has_collection(collection_name) for store in stores)
    await has_connections(2 + 3)  # and one for each whose client was asked for
    for left in (4, 2):
        store = stores.pop(0)
        await store.aclose()
        store.close()  # once more: it counts once
        await has_connections(left)
        for other in stores:
            assert len(await other.async_add(make_nodes(1, dim=DIM))) == 1
            assert len((await other.aquery(VectorStoreQuery(query_embedding=[0.5] * DIM, similarity_top_k=1))).ids) == 1
    requests = stores[0].statistics().requests
    assert requests > 0
    stores.append(opened())
    assert stores[1].statistics().requests == requests, "the address is known as long as one store is open"
    for store in stores:
        store.close()
    await until(lambda: nothing_is_left_of(proxy))
    with opened() as anew:
        assert anew.statistics().requests == 0
        assert len(await anew.async_add(make_nodes(1, dim=DIM))) == 1


async def test_a_dropped_store_closes_its_connections(proxy: FaultProxy, collection_name: str) -> None:
    first = AsyncMilvusVectorStore(proxy.uri, collection_name=collection_name, dim=DIM)
    second = AsyncMilvusVectorStore(proxy.uri, collection_name=collection_name, dim=DIM)
    connected = weakref.ref(first.live())
    del first
    gc.collect()
    await until(lambda: connected() is None)
    assert (await second.awrite([])).ok and is_counted(proxy.uri, proxy.address)
    del second
    gc.collect()
    await until(lambda: nothing_is_left_of(proxy))


async def test_a_dropped_store_is_closed_once_there_are_threads_again(
    proxy: FaultProxy, collection_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = AsyncMilvusVectorStore(proxy.uri, collection_name=collection_name, dim=DIM)
    refused: list[threading.Thread] = []

    def refuse(thread: threading.Thread) -> None:
        refused.append(thread)
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        del store
        gc.collect()
        await until(lambda: bool(refused))
    assert is_counted(proxy.uri, proxy.address)
    await until(lambda: nothing_is_left_of(proxy))


async def test_a_closed_store_keeps_nothing_in_memory(
    proxy: FaultProxy, collection_name: str, make_nodes: MakeNodes
) -> None:
    policy = RetryPolicy(deadline_seconds=0.5)  # until then, the loop's timer for it knows the shell
    store = AsyncMilvusVectorStore(proxy.uri, collection_name=collection_name, dim=DIM, retry=policy)
    await store.async_add(make_nodes(5, dim=DIM))
    endpoint = store.live().endpoint
    refs = [weakref.ref(each) for each in (store, endpoint, endpoint.shell, endpoint.connection)]
    await store.aclose()
    del store, endpoint

    def are_gone() -> bool:
        gc.collect()
        return not any(ref() for ref in refs)

    await until(are_gone)


# --- opening


@contextlib.asynccontextmanager
async def opening_a_store_on_a_silent_host() -> AsyncIterator[asyncio.Task[Any]]:
    """Meanwhile a thread opens a store on a host that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.setblocking(False)
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        opening = asyncio.create_task(asyncio.to_thread(AsyncMilvusVectorStore, uri=uri, dim=DIM))
        connection, _ = await asyncio.get_running_loop().sock_accept(silent)
        with connection:
            yield opening
    with pytest.raises(Exception, match=r"can't connect"):
        await opening


async def test_a_host_that_never_answers_keeps_no_loop_waiting(store: AsyncMilvusVectorStore) -> None:
    async with opening_a_store_on_a_silent_host() as opening:
        for number in range(3):  # filters that nobody has asked with, and so something to be set up
            assert (await store.aquery(query_of(f"new {number}"))).ids == []
        assert not opening.done(), "the loop did not stand still until the host was given up"
    await store.aclose()


# --- the interpreter's exit

EXITING = """
import asyncio, atexit, sys

calls = {}

def at_the_end():  # the first one registered is the last one called
    for name in names:
        try:
            calls[name]()
            print(name, "answered", sep=": ", flush=True)
        except RuntimeError as error:
            print(name, error, sep=": ", flush=True)

atexit.register(at_the_end)

from llama_index.core.schema import TextNode
from llama_index.core.vector_stores.types import VectorStoreQuery
from llama_index_milvus_async_ext import AsyncMilvusVectorStore

uri, collection, *names = sys.argv[1:]
nodes = [TextNode(id_="at the exit", text="text", embedding=[0.5] * 8)]
query = VectorStoreQuery(query_embedding=[0.5] * 8, similarity_top_k=1)
store = AsyncMilvusVectorStore(uri=uri, collection_name=collection, dim=8)
store.add(nodes)
calls["statistics"] = store.statistics
calls["query"] = lambda: store.query(query)
calls["aquery"] = lambda: asyncio.run(store.aquery(query))
calls["add"] = lambda: store.add(nodes)
calls["close"] = store.close
calls["aclose"] = lambda: asyncio.run(store.aclose())
"""
CALLS = ["statistics", "query", "aquery", "add", "close", "aclose"]


@pytest.mark.parametrize("where", ["at an address", "in a file"])
def test_calls_from_an_early_exit_handler_end(lite_uri: str, collection_name: str, tmp_path: Path, where: str) -> None:
    uri = f"http://{lite_address(lite_uri)}" if where == "at an address" else str(tmp_path / "own.db")
    command = [sys.executable, "-c", EXITING, uri, collection_name, *CALLS]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)  # TimeoutExpired: a call hangs
    assert ended.returncode == 0, ended.stderr
    answers = dict(line.split(": ", 1) for line in ended.stdout.splitlines())
    assert list(answers) == CALLS, ended.stdout + ended.stderr
    unclear = {
        name: answer
        for name, answer in answers.items()
        if answer != "answered" and not any(word in answer for word in ("exiting", "shutdown", "closed"))
    }
    assert not unclear
    assert "Traceback" not in ended.stderr, ended.stderr


CLOSED_BY_FINALIZERS = """
import sys
from llama_index.core.schema import TextNode
from llama_index_milvus_async_ext import AsyncMilvusVectorStore, AsyncMilvusWriter

class App:
    def __init__(self, at_the_end):
        self.at_the_end = at_the_end

    def __del__(self):
        self.at_the_end()

def suspended(store):
    with store:
        yield

how, uri = sys.argv[1:]
store = AsyncMilvusVectorStore(uri, dim=2)
if how == "an object":
    app = App(store.close)
elif how == "a writer":
    writer, node = AsyncMilvusWriter(store), TextNode(text="text", embedding=[1.0, 0.5])

    def write():
        try:
            writer([node])
        except RuntimeError as error:
            assert "exiting" in str(error), error
        except BaseException as error:  # of LlamaIndex's instrumentation, which makes an event of that error
            assert "shutting down" in str(error), error

    app = App(write)
else:
    app = suspended(store)
    next(app)
"""


@pytest.mark.parametrize("how", ["an object", "a generator", "a writer"])
def test_a_store_that_is_used_or_closed_while_modules_are_torn_down_ends(tmp_path: Path, how: str) -> None:
    command = [sys.executable, "-c", CLOSED_BY_FINALIZERS, how, str(tmp_path / "own.db")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)  # TimeoutExpired: it hangs
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended.stderr


class ThreadedEmbedding(HashEmbedding):
    """Embeds in a thread of the event loop's own, as many models do."""

    dim: int = DIM

    async def _aget_query_embedding(self, query: str) -> list[float]:
        await asyncio.sleep(0.1)
        return await asyncio.to_thread(self._get_query_embedding, query)


async def test_closing_takes_no_thread_that_the_calls_it_waits_for_need(tmp_path: Path) -> None:
    asyncio.get_running_loop().set_default_executor(concurrent.futures.ThreadPoolExecutor(1))
    stores = [AsyncMilvusVectorStore(str(tmp_path / "own.db"), collection_name=f"c{n}", dim=DIM) for n in range(2)]
    retrievers = [AsyncMilvusRetriever(store, embed_model=ThreadedEmbedding()) for store in stores]
    asking = [asyncio.create_task(retriever.aretrieve("q")) for retriever in retrievers]
    await asyncio.sleep(0.02)
    await asyncio.wait_for(asyncio.gather(*(store.aclose() for store in stores)), 30)
    assert [await each for each in asking] == [[], []]


def test_close_within_a_call_of_its_own_thread_says_so_instead_of_waiting_for_ever(
    store: AsyncMilvusVectorStore, make_nodes: MakeNodes
) -> None:
    said: list[BaseException] = []

    def close(_: int, __: object) -> None:  # the handler of a signal
        try:
            store.close()
        except RuntimeError as error:
            said.append(error)

    model = InterruptedEmbedding(dim=DIM)
    nodes = make_nodes(3, dim=DIM)
    for node in nodes:
        node.embedding = None
    before = signal.signal(signal.SIGTERM, close)
    try:
        AsyncMilvusWriter(store, model)(nodes)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "a call of this very thread" in str(said[0])
    assert len(store.get_nodes([node.node_id for node in nodes])) == 3, "the store is as it was"
    store.close()


class InterruptedEmbedding(HashEmbedding):
    """A signal comes while it embeds."""

    def _embed(self, texts: list[str]) -> list[list[float]]:
        signal.raise_signal(signal.SIGTERM)
        return super()._embed(texts)


class ForgottenEmbedding(HashEmbedding):
    """Never answers, and nobody refers to what it waits for."""

    dim: int = DIM

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.get_running_loop().create_future()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # LlamaIndex's own spans
async def test_closing_waits_for_no_call_that_the_garbage_collector_has_ended(store: AsyncMilvusVectorStore) -> None:
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # told of the task that was destroyed
    asking = asyncio.ensure_future(AsyncMilvusRetriever(store, embed_model=ForgottenEmbedding()).aretrieve("q"))
    await asyncio.sleep(0.05)
    assert store.live().calls
    del asking
    gc.collect()
    await asyncio.sleep(0)
    assert not store.live().calls
    await asyncio.wait_for(store.aclose(), 30)


async def test_the_async_client_that_was_asked_for_is_closed_with_the_store(store: AsyncMilvusVectorStore) -> None:
    client = store.aclient
    assert client is not None and await client.list_collections()
    await store.aclose()
    with pytest.raises(Exception, match=r"connection|closed"):
        await client.list_collections()
