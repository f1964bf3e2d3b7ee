"""The servers of the tests do what fault tests ask of them: die, come back with every row, stand still, go on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from pymilvus import MilvusClient, MilvusException

from tests.servers import LiteServer, MilvusServer, ServerProcess
from tests.waiting import blocked_until

ROWS = [{"id": number, "vector": [float(number)] * 4} for number in range(500)]


@pytest.fixture(params=["lite", pytest.param("server", marks=pytest.mark.server)])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ServerProcess]:
    """A server of the test's own, not started."""
    made: ServerProcess
    if request.param == "lite":
        made = LiteServer(tmp_path)
    else:
        if reason := MilvusServer.unavailable_reason():
            pytest.skip(reason)
        made = MilvusServer(tmp_path, extra_config={"common": {"session": {"ttl": 5}}})
    yield made
    made.stop()


@pytest.fixture
def connect(server: ServerProcess) -> Iterator[Callable[[], MilvusClient]]:
    clients: list[MilvusClient] = []

    def connect_once_more() -> MilvusClient:
        clients.append(MilvusClient(server.uri))
        return clients[-1]

    yield connect_once_more
    for client in clients:
        client.close()


def count(client: MilvusClient, within_seconds: float = 60.0) -> int:
    """How many rows there are, once Milvus answers queries again."""
    deadline = time.monotonic() + within_seconds
    while True:
        try:
            rows: list[dict[str, Any]] = client.query(
                "rows", filter="id >= 0", output_fields=["count(*)"], consistency_level="Strong"
            )
            return int(rows[0]["count(*)"])
        except MilvusException as error:
            if error.code != 101 or time.monotonic() > deadline:
                raise
            client.load_collection("rows")
            time.sleep(0.2)


@pytest.mark.slow
def test_rows_outlive_a_killed_server(server: ServerProcess, connect: Callable[[], MilvusClient]) -> None:
    server.start()
    client = connect()
    client.create_collection("rows", dimension=4)
    client.insert("rows", ROWS)
    uri, first_pid = server.uri, server.pid

    server.kill()
    assert not server.is_ready()
    with pytest.raises(RuntimeError, match="does not run"):
        _ = server.pid
    client.close()

    server.start()
    assert server.uri == uri
    assert server.pid != first_pid
    assert count(connect()) == len(ROWS)


@pytest.mark.slow
def test_rows_outlive_an_orderly_restart(server: ServerProcess, connect: Callable[[], MilvusClient]) -> None:
    server.start()
    client = connect()
    client.create_collection("rows", dimension=4)
    client.insert("rows", ROWS)
    client.flush("rows")
    client.close()
    server.restart()
    assert count(connect()) == len(ROWS)


def test_a_frozen_server_keeps_its_callers_waiting_and_goes_on(
    server: ServerProcess, connect: Callable[[], MilvusClient]
) -> None:
    server.start()
    client = connect()
    server.freeze()
    blocked_until(lambda: not server.is_ready())
    started = time.monotonic()
    with pytest.raises(grpc.RpcError) as raised:
        client.list_collections(timeout=0.5)
    assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - started > 0.4
    server.thaw()
    assert server.is_ready()
    assert client.list_collections(timeout=5) == []


def test_a_frozen_server_can_be_stopped(server: ServerProcess) -> None:
    server.start()
    server.freeze()
    server.stop()
    assert not server.is_ready()
    server.stop()  # once more does nothing


def test_a_server_does_not_start_twice(server: ServerProcess) -> None:
    server.start()
    with pytest.raises(RuntimeError, match="runs already"):
        server.start()


def test_a_server_that_cannot_start_says_what_it_logged(tmp_path: Path) -> None:
    (tmp_path / "lite").write_text("a file where the data folder should be")
    with pytest.raises(RuntimeError, match="Error"):
        LiteServer(tmp_path).start()


@pytest.mark.server
def test_two_milvus_servers_run_side_by_side(milvus_server: MilvusServer, tmp_path: Path) -> None:
    security = {"common": {"security": {"authorizationEnabled": True}}}
    with MilvusServer(tmp_path, extra_config=security) as other:
        assert other.port != milvus_server.port
        with pytest.raises(MilvusException):
            MilvusClient(other.uri, token="root:wrong", timeout=2)
        for server, token in ((milvus_server, ""), (other, "root:Milvus")):
            client = MilvusClient(server.uri, token=token)
            assert isinstance(client.list_collections(), list)
            client.close()


@pytest.mark.skipif(sys.platform != "linux", reason="the death signal is Linux's")
def test_a_killed_test_run_leaves_no_server_behind(tmp_path: Path) -> None:
    program = (
        "import sys, threading, tests.servers as servers\n"
        "made = []\n"
        # from a thread that ends: the server must live on for as long as the process does
        "thread = threading.Thread(target=lambda: made.append(servers.LiteServer(sys.argv[1]).start()))\n"
        "thread.start(); thread.join()\n"
        "assert made[0].is_ready()\n"
        "print(made[0].pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=Path(__file__).resolve().parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with run:
        assert run.stdout is not None
        pid = int(run.stdout.readline())
        assert is_running(pid)
        run.kill()
    deadline = time.monotonic() + 5
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(pid)


def is_running(pid: int) -> bool:
    """Whether the process lives; one that has ended and that nobody has asked about does not."""
    try:
        os.kill(pid, 0)
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False
