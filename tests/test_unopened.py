"""A store that could not be opened leaves nothing behind: no connection, no lock on a file, no count of it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from llama_index.core.bridge.pydantic import ValidationError
from pymilvus import MilvusClient, MilvusException
from pymilvus.exceptions import ConnectError

from llama_index_milvus_async_ext import AsyncMilvusVectorStore
from llama_index_milvus_async_ext._milvus import lite
from tests.conftest import MakeNodes
from tests.fault_proxy import FaultProxy
from tests.faults import Fault, Held, MilvusError, Nth, Refuse
from tests.leftovers import is_free, nothing_is_left_of
from tests.waiting import blocked_until, until

DIM = 8


class CalledOffError(BaseException):
    """No error of a kind that anybody catches."""


class Failing(AsyncMilvusVectorStore):
    """A store whose opening ends when upstream's constructor, midway, asks for the index of the new collection."""

    def _add_dense_index_params(self, index_params: Any) -> Any:
        raise CalledOffError


@pytest.fixture
def lite_client(lite_uri: str) -> Iterator[MilvusClient]:
    """A client beside the proxy."""
    with contextlib.closing(MilvusClient(lite_uri)) as client:
        yield client


REFUSED: dict[str, tuple[dict[str, Any], type[BaseException]]] = {
    "another dimension": ({"dim": DIM + 1}, ValueError),
    "another metric": ({"similarity_metric": "L2"}, ValueError),
    "a field that is missing": ({"embedding_field": "other"}, ValueError),
    "no dimension for a new collection": ({"collection_name": "new", "dim": None}, ValueError),
    "a dimension that Milvus refuses": ({"collection_name": "new", "dim": -1}, MilvusException),
    "a level that pymilvus refuses": ({"collection_name": "new", "consistency_level": "No"}, MilvusException),
    "fields that upstream refuses": (
        {"collection_name": "new", "scalar_field_names": ["a"], "scalar_field_types": []},
        ValueError,
    ),
    "a type that pydantic refuses": ({"scalar_field_names": ["a"], "scalar_field_types": ["b"]}, ValidationError),
}


@pytest.mark.parametrize("where", ["at an address", "in a file"])
@pytest.mark.parametrize("what", REFUSED)
async def test_refused_arguments_leave_nothing_behind(
    proxy: FaultProxy, collection_name: str, tmp_path: Path, make_nodes: MakeNodes, what: str, where: str
) -> None:
    path = tmp_path / "own.db"
    arguments = {
        "uri": proxy.uri if where == "at an address" else str(path),
        "collection_name": collection_name,
        "dim": DIM,
    }
    changes, kind = REFUSED[what]
    AsyncMilvusVectorStore(**arguments).close()
    for _ in range(2):
        with pytest.raises(kind) as refused:
            AsyncMilvusVectorStore(**(arguments | changes))
        # Its frames are held here, and what is in them: so nothing is freed by chance.
        assert refused.traceback
        await until(lambda: nothing_is_left_of(proxy) if where == "at an address" else is_free(path))
    with AsyncMilvusVectorStore(**arguments) as store:
        assert len(store.add(make_nodes(3, dim=DIM))) == 3


@pytest.mark.parametrize("fault", [MilvusError(1100, "not today"), Refuse(grpc.StatusCode.DEADLINE_EXCEEDED)])
@pytest.mark.parametrize("is_new", [True, False])
async def test_a_server_that_refuses_any_of_the_requests_leaves_nothing_behind(
    lite_client: MilvusClient,
    proxy: FaultProxy,
    collection_name: str,
    make_nodes: MakeNodes,
    is_new: bool,
    fault: Fault,
) -> None:
    def opened() -> AsyncMilvusVectorStore:
        return AsyncMilvusVectorStore(proxy.uri, collection_name=collection_name, dim=DIM, similarity_metric="IP")

    opened().close()
    refused_methods = set()
    for number in range(1, 50):
        await until(lambda: nothing_is_left_of(proxy))
        if is_new:
            lite_client.drop_collection(collection_name)
        proxy.clear()
        script = proxy.script(fault, on=Nth(number))
        try:
            store = opened()
        except Exception as error:
            assert script.struck
            refused_methods.add(proxy.requests[number - 1].method)
            del error
            continue
        proxy.heal()
        assert len(store.add(make_nodes(1, dim=DIM))) == 1
        store.close()
        if not script.struck:
            break
    else:
        raise AssertionError("it never was opened")
    assert refused_methods >= {"Connect", "DescribeCollection", *(["CreateCollection", "CreateIndex"] * is_new)}


@pytest.mark.parametrize("where", ["at an address", "in a file"])
async def test_an_opening_that_ends_midway_by_whatever_error_leaves_nothing_behind(
    proxy: FaultProxy, collection_name: str, tmp_path: Path, make_nodes: MakeNodes, where: str
) -> None:
    path = tmp_path / "own.db"
    uri = proxy.uri if where == "at an address" else str(path)
    with pytest.raises(CalledOffError) as ended:
        Failing(uri, collection_name=collection_name, dim=DIM)
    assert ended.traceback
    await until(lambda: nothing_is_left_of(proxy) if where == "at an address" else is_free(path))
    with AsyncMilvusVectorStore(uri, collection_name=collection_name, dim=DIM) as store:
        assert len(store.add(make_nodes(3, dim=DIM))) == 3


async def test_a_client_that_can_not_be_made_leaves_the_store_as_it_is(
    proxy: FaultProxy, collection_name: str, make_nodes: MakeNodes
) -> None:
    AsyncMilvusVectorStore(proxy.uri, collection_name=collection_name, dim=DIM).close()
    with AsyncMilvusVectorStore(proxy.uri, collection_name=collection_name, dim=DIM) as store:
        refused = proxy.script(Refuse(), method="Connect", on=Nth(1))
        with pytest.raises(ConnectError):
            _ = store.client
        assert refused.struck == 1
        assert len(store.add(make_nodes(3, dim=DIM))) == 3
        assert store.client.has_collection(collection_name)
    await until(lambda: nothing_is_left_of(proxy))


async def test_a_store_that_is_closed_while_its_client_connects_leaves_nothing_behind(
    proxy: FaultProxy, collection_name: str
) -> None:
    AsyncMilvusVectorStore(proxy.uri, collection_name=collection_name, dim=DIM).close()
    store = AsyncMilvusVectorStore(proxy.uri, collection_name=collection_name, dim=DIM)
    held = Held()
    proxy.script(held, method="Connect")
    with ThreadPoolExecutor(2) as threads:
        connecting = threads.submit(lambda: store.client)
        await until(lambda: proxy.in_flight("Connect") == 1)
        closing = threads.submit(store.close)
        held.let_go()
        await asyncio.gather(*map(asyncio.wrap_future, (connecting, closing)))
    with pytest.raises(RuntimeError, match="closed"):
        _ = store.client
    await until(lambda: nothing_is_left_of(proxy))


async def test_an_opening_whose_caller_gives_up_leaves_nothing_behind(proxy: FaultProxy, collection_name: str) -> None:
    AsyncMilvusVectorStore(proxy.uri, collection_name=collection_name, dim=DIM).close()
    held = Held()
    proxy.script(held, method="DescribeCollection")
    opening = asyncio.create_task(AsyncMilvusVectorStore.aopen(proxy.uri, collection_name=collection_name, dim=DIM))
    await until(lambda: proxy.in_flight("DescribeCollection") == 1)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    del opening
    held.let_go()
    await until(lambda: nothing_is_left_of(proxy))


async def test_clients_of_pymilvus_are_made_once_and_only_if_asked_for(
    proxy: FaultProxy, collection_name: str, make_nodes: MakeNodes
) -> None:
    AsyncMilvusVectorStore(proxy.uri, collection_name=collection_name, dim=DIM).close()
    before = len([record for record in proxy.requests if record.method == "Connect"])
    with AsyncMilvusVectorStore(proxy.uri, collection_name=collection_name, dim=DIM) as store:
        store.add(make_nodes(3, dim=DIM))
        made = [record.method for record in proxy.requests].count("Connect") - before
        assert made == 1, "the one that the requests take"
        with ThreadPoolExecutor(8) as threads:
            clients = {id(client) for client in threads.map(lambda _: store.client, range(8))}
        assert len(clients) == 1
        assert store.client is store._milvusclient and store.aclient is store._async_milvusclient


async def test_of_two_stores_one_that_could_not_be_opened_closes_nothing_of_the_other(
    proxy: FaultProxy, collection_name: str, make_nodes: MakeNodes
) -> None:
    with AsyncMilvusVectorStore(proxy.uri, collection_name=collection_name, dim=DIM) as store:
        for _ in range(3):
            with pytest.raises(ValueError, match="dimension"):
                AsyncMilvusVectorStore(proxy.uri, collection_name=collection_name, dim=DIM + 1)
        assert len(store.add(make_nodes(3, dim=DIM))) == 3
    await until(lambda: nothing_is_left_of(proxy))


def test_a_limit_that_makes_no_sense_costs_no_request(proxy: FaultProxy) -> None:
    with pytest.raises(ValueError, match="batch_size"):
        AsyncMilvusVectorStore(proxy.uri, dim=DIM, batch_size=0)
    assert not proxy.requests and nothing_is_left_of(proxy)


def test_ctrl_c_while_a_file_is_opened_leaves_it_free(tmp_path: Path) -> None:
    path = tmp_path / "own.db"
    may_open, is_waiting = threading.Event(), threading.Event()

    def keep_waiting() -> None:
        with lite.files:  # as somebody who lets go of another file
            is_waiting.set()
            may_open.wait(20)

    def press() -> None:
        blocked_until(lambda: any(thread.name == "milvus-open" for thread in threading.enumerate()))
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threads = [threading.Thread(target=keep_waiting), threading.Thread(target=press)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
    try:
        threads[0].start()
        assert is_waiting.wait(5)
        threads[1].start()
        with pytest.raises(KeyboardInterrupt):
            AsyncMilvusVectorStore(str(path), dim=DIM)
    finally:
        may_open.set()
        for thread in threads:
            thread.join()
        signal.signal(signal.SIGINT, before)
    closing = [thread for thread in threading.enumerate() if thread.name.startswith("milvus-open")]
    for thread in closing:
        thread.join(20)
    assert is_free(path)
    AsyncMilvusVectorStore(str(path), dim=DIM).close()


@pytest.mark.parametrize("seconds", [0.0, 0.005, 0.05])
async def test_a_cancelled_opening_of_a_file_lets_go_of_it(tmp_path: Path, seconds: float) -> None:
    path = tmp_path / "own.db"
    gc.disable()  # what is made anew stands in a cycle: of upstream's constructor, and an error that it has caught
    try:
        opening = asyncio.create_task(AsyncMilvusVectorStore.aopen(str(path), collection_name="made", dim=DIM))
        await asyncio.sleep(seconds)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        for _ in range(600):
            opened = [each for each in threading.enumerate() if each.name.startswith("milvus-open")]
            if not opened:
                break
            await asyncio.sleep(0.05)
        assert is_free(path)
    finally:
        gc.enable()
