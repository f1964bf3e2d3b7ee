"""Each fault of the proxy, as a plain pymilvus client sees it, and what Milvus has applied of it."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from pymilvus import AsyncMilvusClient, DataType, MilvusClient, MilvusException

from tests.conftest import Backend
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

ONCE: dict[str, Any] = {"retry_times": 0, "retry_on_rate_limit": False}
"""As pymilvus is told not to repeat a failed request."""


def row(number: int) -> dict[str, Any]:
    return {"id": number, "vector": [float(number), 1.0]}


@pytest.fixture
def client(fault_proxy: FaultProxy) -> Iterator[MilvusClient]:
    """A client that reaches Milvus through the proxy."""
    client = MilvusClient(fault_proxy.uri)
    yield client
    client.close()


@pytest.fixture(scope="module")
def direct(backend: Backend) -> Iterator[MilvusClient]:
    """A client that does not."""
    client = MilvusClient(backend.uri)
    yield client
    client.close()


@pytest.fixture(scope="module")
def shared_collection(direct: MilvusClient) -> Iterator[str]:
    """One for all tests here: making one takes the server seconds."""
    name = f"t_{uuid.uuid4().hex}"
    schema = MilvusClient.create_schema()
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=2)
    index = MilvusClient.prepare_index_params()
    index.add_index("vector", index_type="FLAT", metric_type="L2")
    direct.create_collection(name, schema=schema, index_params=index, consistency_level="Strong")
    yield name
    direct.drop_collection(name)


@pytest.fixture
def collection(direct: MilvusClient, client: MilvusClient, shared_collection: str, fault_proxy: FaultProxy) -> str:
    """A loaded collection with the row 0 alone, known to the client behind the proxy; nothing recorded yet."""
    if rows := stored(direct, shared_collection):
        direct.delete(shared_collection, ids=rows)
    client.upsert(shared_collection, [row(0)])
    fault_proxy.clear()
    return shared_collection


def stored(direct: MilvusClient, collection: str) -> list[int]:
    rows = direct.query(collection, filter="id >= 0", output_fields=["id"], consistency_level="Strong")
    return sorted(found["id"] for found in rows)


def test_without_scripts_it_only_looks_on(
    fault_proxy: FaultProxy, client: MilvusClient, direct: MilvusClient, collection: str
) -> None:
    before = time.monotonic()
    assert client.upsert(collection, [row(1), row(2)], **ONCE)["upsert_count"] == 2
    hits = client.search(collection, data=[[1.0, 1.0], [2.0, 1.0], [0.0, 1.0]], limit=1, **ONCE)
    assert [found[0]["id"] for found in hits] == [1, 2, 0]
    write, search = fault_proxy.requests_of("Upsert", "Search")
    assert (write.method, write.rows, write.fault, write.code) == ("Upsert", 2, None, grpc.StatusCode.OK)
    assert (search.method, search.rows) == ("Search", 3)
    assert write.finished is not None
    assert before < write.started < write.finished < search.started
    assert fault_proxy.counts["Upsert"] == 1
    assert fault_proxy.in_flight() == 0
    assert stored(direct, collection) == [0, 1, 2]


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.UNKNOWN,
    ],
    ids=lambda code: code.name,
)
def test_a_refused_request_is_not_applied(
    fault_proxy: FaultProxy, client: MilvusClient, direct: MilvusClient, collection: str, code: grpc.StatusCode
) -> None:
    fault_proxy.script(Refuse(code, "no entry"), method="Upsert")
    with pytest.raises((MilvusException, grpc.RpcError)) as raised:
        client.upsert(collection, [row(1)], **ONCE)
    assert status_of(raised.value) is code
    (record,) = fault_proxy.requests_of("Upsert")
    assert record.fault == Refuse(code, "no entry")
    assert record.code is code
    assert stored(direct, collection) == [0]


def status_of(error: BaseException | None) -> grpc.StatusCode | None:
    """The gRPC status behind what pymilvus raised.

    It re-raises with `raise e from e`, so that an error is its own `__cause__`; the status is in `__context__`.
    """
    while error is not None and not isinstance(error, grpc.RpcError):
        error = error.__context__
    return error.code() if error is not None else None


def test_the_nth_request_only(
    fault_proxy: FaultProxy, client: MilvusClient, direct: MilvusClient, collection: str
) -> None:
    script = fault_proxy.script(Refuse(grpc.StatusCode.RESOURCE_EXHAUSTED), method="Upsert", on=Nth(2))
    for number in (1, 2, 3):
        try:
            client.upsert(collection, [row(number)], **ONCE)
        except (MilvusException, grpc.RpcError):
            assert number == 2
    assert (script.seen, script.struck) == (3, 1)
    assert stored(direct, collection) == [0, 1, 3]


def test_an_applied_request_whose_answer_is_lost(
    fault_proxy: FaultProxy, client: MilvusClient, direct: MilvusClient, collection: str
) -> None:
    fault_proxy.script(LoseAnswer(), method="Upsert")
    with pytest.raises((MilvusException, grpc.RpcError)) as raised:
        client.upsert(collection, [row(1)], **ONCE)
    assert status_of(raised.value) is grpc.StatusCode.UNAVAILABLE
    assert stored(direct, collection) == [0, 1]


@pytest.mark.parametrize(("fault", "applied"), [(Drop(), False), (LoseAnswer(code=None), True)], ids=["drop", "lose"])
def test_a_request_that_is_never_answered(
    fault_proxy: FaultProxy,
    client: MilvusClient,
    direct: MilvusClient,
    collection: str,
    fault: Drop | LoseAnswer,
    applied: bool,
) -> None:
    fault_proxy.script(fault, method="Upsert")
    started = time.monotonic()
    with pytest.raises((MilvusException, grpc.RpcError)):
        client.upsert(collection, [row(1)], timeout=1.0, **ONCE)
    assert 0.9 < time.monotonic() - started < 5
    assert stored(direct, collection) == ([0, 1] if applied else [0])
    wait_until_idle(fault_proxy)
    assert fault_proxy.requests_of("Upsert")[0].code is grpc.StatusCode.CANCELLED


@pytest.mark.parametrize("fault", [Delay(0.5), SlowAnswer(0.5)], ids=["delay", "slow"])
def test_a_late_answer(
    fault_proxy: FaultProxy, client: MilvusClient, direct: MilvusClient, collection: str, fault: Delay | SlowAnswer
) -> None:
    fault_proxy.script(fault, method="Upsert")
    with ThreadPoolExecutor(1) as other_thread:
        started = time.monotonic()
        write = other_thread.submit(client.upsert, collection, [row(1)], **ONCE)
        if isinstance(fault, SlowAnswer):
            while stored(direct, collection) != [0, 1]:
                assert time.monotonic() - started < 5
        write.result(timeout=10)
        assert time.monotonic() - started > 0.5
    assert stored(direct, collection) == [0, 1]


@pytest.mark.parametrize(
    ("fault", "code"),
    [(rate_limit(), 8), (not_loaded(), 101), (collection_not_found(), 100), (MilvusError(1100, "bad"), 1100)],
    ids=["rate limit", "not loaded", "not found", "bad"],
)
@pytest.mark.parametrize("method", ["Insert", "Upsert", "Search", "Query", "Delete"])
def test_an_answer_with_a_milvus_status(
    fault_proxy: FaultProxy,
    client: MilvusClient,
    direct: MilvusClient,
    collection: str,
    fault: MilvusError,
    code: int,
    method: str,
) -> None:
    calls = {
        "Insert": lambda: client.insert(collection, [row(1)], **ONCE),
        "Upsert": lambda: client.upsert(collection, [row(1)], **ONCE),
        "Search": lambda: client.search(collection, data=[[1.0, 1.0]], **ONCE),
        "Query": lambda: client.query(collection, filter="id >= 0", **ONCE),
        "Delete": lambda: client.delete(collection, ids=[0], **ONCE),
    }
    fault_proxy.script(fault, method=method)
    with pytest.raises(MilvusException) as raised:
        calls[method]()
    assert raised.value.code == code
    assert fault.reason in raised.value.message
    fault_proxy.heal()
    assert stored(direct, collection) == [0]


def test_a_status_in_an_answer_that_is_nothing_but_a_status(
    fault_proxy: FaultProxy, client: MilvusClient, collection: str
) -> None:
    fault_proxy.script(not_loaded(), method="LoadCollection")
    with pytest.raises(MilvusException) as raised:
        client.load_collection(collection)
    assert raised.value.code == 101


def test_a_predicate_chooses_by_what_is_in_the_request(
    fault_proxy: FaultProxy, client: MilvusClient, direct: MilvusClient, collection: str
) -> None:
    script = fault_proxy.script(MilvusError(1100), method="Upsert", when=lambda request: request.num_rows > 1)
    client.upsert(collection, [row(1)], **ONCE)
    with pytest.raises(MilvusException):
        client.upsert(collection, [row(2), row(3)], **ONCE)
    assert script.seen == 1
    assert stored(direct, collection) == [0, 1]


def test_a_quota_that_is_lifted(fault_proxy: FaultProxy, client: MilvusClient, collection: str) -> None:
    quota = OverQuota(per_second=10)
    fault_proxy.script(rate_limit(), method=["Insert", "Upsert"], when=quota)
    client.upsert(collection, [row(number) for number in range(12)], **ONCE)
    with pytest.raises(MilvusException) as raised:
        client.upsert(collection, [row(20)], **ONCE)
    assert raised.value.code == 8
    quota.per_second = 100_000
    deadline = time.monotonic() + 5
    while True:
        try:
            client.upsert(collection, [row(20)], **ONCE)
            break
        except MilvusException:
            assert time.monotonic() < deadline
    assert {record.code for record in fault_proxy.requests_of("Upsert")} == {grpc.StatusCode.OK}


def test_the_peak_of_what_was_in_flight(
    fault_proxy: FaultProxy, client: MilvusClient, direct: MilvusClient, collection: str
) -> None:
    gate = threading.Barrier(5)

    def once_all_are_here(exchange: Any) -> bytes:
        gate.wait(timeout=10)
        answer: bytes = exchange.forward()
        return answer

    fault_proxy.script(once_all_are_here, method="Upsert", on=First(5))
    with ThreadPoolExecutor(5) as threads:
        list(threads.map(lambda number: client.upsert(collection, [row(number)], **ONCE), range(1, 6)))
    client.query(collection, filter="id >= 0", **ONCE)
    assert fault_proxy.in_flight_peak("Upsert") == 5
    assert fault_proxy.in_flight_peak("Query") == 1
    assert fault_proxy.in_flight_peak() == 5
    assert stored(direct, collection) == [0, 1, 2, 3, 4, 5]
    fault_proxy.clear()
    assert fault_proxy.requests == []
    assert fault_proxy.in_flight_peak() == 0


async def test_async_clients_see_the_same(fault_proxy: FaultProxy, direct: MilvusClient, collection: str) -> None:
    client = AsyncMilvusClient(fault_proxy.uri)
    try:
        fault_proxy.script(rate_limit(), method="Upsert", on=First(1))
        with pytest.raises(MilvusException) as raised:
            await client.upsert(collection, [row(1)], **ONCE)
        assert raised.value.code == 8
        await client.upsert(collection, [row(1)], **ONCE)
        assert stored(direct, collection) == [0, 1]
    finally:
        await client.close()


def test_a_held_request_does_not_keep_the_proxy_from_closing(backend: Backend) -> None:
    proxy = FaultProxy(backend.address).start()
    client = MilvusClient(proxy.uri)
    script = proxy.script(Drop(), method="ShowCollections")
    with ThreadPoolExecutor(1) as other_thread:
        call = other_thread.submit(client.list_collections, timeout=30)
        deadline = time.monotonic() + 5
        while not script.struck:
            assert time.monotonic() < deadline
        started = time.monotonic()
        proxy.close()
        assert time.monotonic() - started < 2
        assert isinstance(call.exception(timeout=35), (MilvusException, grpc.RpcError))
    client.close()


def test_an_unknown_method_is_refused(fault_proxy: FaultProxy) -> None:
    with pytest.raises(ValueError, match="no method 'Upset'"):
        fault_proxy.script(Drop(), method="Upset")


def test_chance_is_repeatable_and_about_right() -> None:
    struck = [number for number in range(1, 10_001) if Chance(0.2, seed=7)(number)]
    assert struck == [number for number in range(1, 10_001) if Chance(0.2, seed=7)(number)]
    assert struck != [number for number in range(1, 10_001) if Chance(0.2, seed=8)(number)]
    assert 1_800 < len(struck) < 2_200


def test_selections_count_from_one() -> None:
    assert [number for number in range(1, 6) if Nth(3)(number)] == [3]
    assert [number for number in range(1, 6) if First(2)(number)] == [1, 2]
    assert [number for number in range(1, 6) if Every()(number)] == [1, 2, 3, 4, 5]


def wait_until_idle(proxy: FaultProxy) -> None:
    deadline = time.monotonic() + 5
    while proxy.in_flight():
        assert time.monotonic() < deadline
        time.sleep(0.01)
