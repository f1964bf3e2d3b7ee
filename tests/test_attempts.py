"""An attempt is one request, in one time-out: what is sent again, and when, is the retry policy's to say."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from pymilvus import MilvusClient, MilvusException

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, RetryPolicy
from llama_index_milvus_async_ext._milvus.once import once
from tests.conftest import Backend, MakeNodes
from tests.fault_proxy import FaultProxy
from tests.faults import Exchange, Fault, First, MilvusError, Refuse, SlowAnswer, rate_limit

DIM = 8
ONCE = RetryPolicy(max_attempts=1)
QUICK = RetryPolicy(initial_backoff_seconds=0.01, max_backoff_seconds=0.1)

# What a store's calls ask of Milvus beside writes and searches, by pymilvus's client.
CALLS: dict[str, tuple[str, Callable[[AsyncMilvusVectorStore], Any]]] = {
    "delete": ("Delete", lambda store: store.delete("nobody's")),
    "delete nodes": ("Delete", lambda store: store.delete_nodes(["nobody's"])),
    "get": ("Query", lambda store: store.get_nodes(["nobody's"])),
    "iterate": ("Query", lambda store: list(store.iter_nodes())),
    "flush": ("Flush", lambda store: store.add([], force_flush=True)),
    "flush state": ("GetFlushState", lambda store: store.add([], force_flush=True)),
    "partitions": ("ShowPartitions", lambda store: store.delete("nobody's", milvus_partition_name="_default")),
    "drop": ("DropCollection", lambda store: store.clear()),
}


@pytest.fixture(scope="module")
def collection(backend: Backend) -> Iterator[str]:
    """One collection for all tests here: the server takes seconds for one."""
    name = f"attempts_{uuid.uuid4().hex}"
    yield name
    with contextlib.closing(MilvusClient(backend.uri)) as client:
        client.drop_collection(name)


@pytest.fixture
def open_store(fault_proxy: FaultProxy, collection: str) -> Iterator[Callable[..., AsyncMilvusVectorStore]]:
    with contextlib.ExitStack() as stores:

        def make(**arguments: Any) -> AsyncMilvusVectorStore:
            store = AsyncMilvusVectorStore(fault_proxy.uri, collection_name=collection, dim=DIM, **arguments)
            stores.callback(store.close)
            fault_proxy.clear()
            return store

        yield make
        fault_proxy.heal()


FAULTS: dict[str, Fault] = {"lost": Refuse(), "unknown": Refuse(grpc.StatusCode.UNKNOWN), "rate limit": rate_limit()}


@pytest.mark.parametrize("fault", ["lost", "unknown"])
@pytest.mark.parametrize("call", CALLS)
def test_what_is_to_be_sent_once_is_sent_once(
    open_store: Callable[..., AsyncMilvusVectorStore], fault_proxy: FaultProxy, call: str, fault: str
) -> None:
    method, do = CALLS[call]
    store = open_store(retry=ONCE, rpc_timeout_seconds=5.0)
    fault_proxy.script(FAULTS[fault], method=method)
    with pytest.raises(MilvusException, match="refused by the fault proxy"):
        do(store)
    assert fault_proxy.counts[method] == 1 and store.statistics().retries == 0


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("call", ["delete", "get", "partitions"])
def test_what_is_sent_again_is_counted_and_logged(
    open_store: Callable[..., AsyncMilvusVectorStore],
    fault_proxy: FaultProxy,
    log: pytest.LogCaptureFixture,
    call: str,
    fault: str,
) -> None:
    method, do = CALLS[call]
    store = open_store(retry=QUICK)
    before = store.statistics()
    fault_proxy.script(FAULTS[fault], method=method, on=First(3))
    log.clear()
    do(store)
    after = store.statistics()
    warnings = [record for record in log.records if record.levelno >= logging.WARNING]
    assert fault_proxy.counts[method] >= 4 and after.retries - before.retries == 3
    assert after.requests - before.requests >= 4
    assert [record.name for record in warnings] == ["llama_index_milvus_async_ext"]
    if fault == "rate limit":
        assert after.limit < before.limit


def test_the_twin_of_a_client_answers_as_the_client(
    backend: Backend, open_store: Callable[..., AsyncMilvusVectorStore], collection: str, make_nodes: MakeNodes
) -> None:
    store = open_store()
    store.add(make_nodes(3, dim=DIM, prefix="twin"))
    with contextlib.closing(MilvusClient(backend.uri)) as client:
        twin = once(client)
        assert twin is not client
        of_some: dict[str, Any] = {"filter": 'id like "twin-%"', "consistency_level": "Strong"}
        for ask in (
            lambda each: each.describe_collection(collection),
            lambda each: each.list_partitions(collection),
            lambda each: list(each.query(collection, **of_some)),
            lambda each: each.search(collection, data=[[1.0] * DIM], limit=3, **of_some)[0].ids,
            lambda each: each.flush(collection),
            lambda each: each.load_collection(collection),
        ):
            assert ask(twin) == ask(client)
        assert twin.delete(collection, filter='id == "twin-0"') is not None
        assert len(client.query(collection, **of_some)) == 2
        for each in (twin, client):
            with pytest.raises(MilvusException):
                each.query("not there", filter="id != ''", timeout=1)
            with pytest.raises(MilvusException):
                each.query(collection, filter="id != ''", consistency_level="no level", timeout=1)


def test_a_client_of_other_insides_stays_as_it_is() -> None:
    client: Any = object()
    assert once(client) is client


def test_an_attempt_that_asks_for_the_schema_keeps_to_its_time_out(
    open_store: Callable[..., AsyncMilvusVectorStore], fault_proxy: FaultProxy, make_nodes: MakeNodes
) -> None:
    store = open_store(retry=ONCE, rpc_timeout_seconds=2.0)
    store.add(make_nodes(1, dim=DIM))
    time.sleep(1.1)  # after that, a refusal makes the store look at the schema again

    def refuse_late(exchange: Exchange) -> bytes:
        exchange.wait(1.5)
        return MilvusError(1100)(exchange)

    fault_proxy.clear()
    fault_proxy.script(refuse_late, method="Upsert")
    fault_proxy.script(SlowAnswer(30), method="DescribeCollection", on=First(1))
    (failed,) = store.write(make_nodes(1, dim=DIM)).failed
    assert "refused by the fault proxy" in str(failed.error)
    (asked,) = fault_proxy.requests_of("DescribeCollection")[:1]
    assert asked.timeout is not None and asked.timeout < 0.6
