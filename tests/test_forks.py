"""Forked children: they work, they exit, and their parent goes on."""

from __future__ import annotations

import sys
import textwrap
import threading
from pathlib import Path

import pytest

from llama_index_milvus_async_ext._lane import forks
from llama_index_milvus_async_ext._lane.thread import IoThread
from tests import programs
from tests.fault_proxy import FaultProxy
from tests.faults import Nth, Refuse
from tests.servers import LiteServer
from tests.waiting import blocked_until

PREAMBLE = """
    import asyncio, os, signal, sys, threading, time
    from llama_index.core.schema import TextNode
    from llama_index.core.vector_stores.types import VectorStoreQuery
    from llama_index_milvus_async_ext import AsyncMilvusVectorStore, AsyncMilvusWriter, RetryPolicy

    def nodes(prefix, count=20):
        return [TextNode(id_=f"{prefix}-{n}", text=f"text {prefix} {n}", embedding=[0.1 * n + 0.1] * 8)
                for n in range(count)]

    policy = RetryPolicy(deadline_seconds=8)
    store = AsyncMilvusVectorStore(uri=sys.argv[1], collection_name="c", dim=8, retry=policy, rpc_timeout_seconds=3)
    store.add(nodes("first"))
    query = VectorStoreQuery(query_embedding=[0.5] * 8, similarity_top_k=3)

    def work(until):
        while not until.is_set():
            store.add(nodes("worker"))
            assert len(store.query(query).ids) == 3

    def at_work(count=3):
        ended = threading.Event()
        threads = [threading.Thread(target=work, args=(ended,), daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        return ended, threads
"""


@pytest.fixture(params=["in the process", "a server"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> object:
    """A Milvus Lite for programs of their own: a file, or the address of a server."""
    if request.param == "in the process":
        yield str(tmp_path / "forked.db")
    else:
        with LiteServer(tmp_path / "data") as server:
            yield server.uri


def outcome(program: str, *arguments: str, seconds: float = 60) -> str:
    """What a program prints; fails if it does not end well in time."""
    ended = programs.run(textwrap.dedent(PREAMBLE) + textwrap.dedent(program), *arguments, timeout=seconds)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout.strip()


def test_a_fork_amid_writes_does_not_stop_the_parents_writes(uri: str) -> None:
    """The child lives on: what it inherited of the lock would stop its parent."""
    program = """
        ended, threads = at_work()
        children = []
        for _ in range(6):
            time.sleep(0.1)
            pid = os.fork()
            if pid == 0:
                time.sleep(60)
                os._exit(0)
            children.append(pid)
        ended.set()
        for thread in threads:
            thread.join(20)
        began = time.monotonic()
        report = store.write(nodes("late"))
        print(len(report.written), time.monotonic() - began < 3)
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    """
    assert outcome(program, uri) == "20 True"


def test_a_fork_goes_on_as_soon_as_the_last_request_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forks, "_MOST_SECONDS", 60.0)
    monkeypatch.setattr(forks, "_HELD_SECONDS", 60.0)
    IoThread.get()
    quiet = forks._Quiet()
    for _ in range(2):
        quiet.began()
    forking = threading.Thread(target=quiet.before_fork, daemon=True)
    forking.start()
    try:
        blocked_until(lambda: quiet._is_held)
        quiet.ended()
        forking.join(0.05)
        assert forking.is_alive(), "one is still out"
        quiet.ended()
        forking.join(20)
        assert not forking.is_alive()
    finally:
        quiet.after_fork()
    blocked_until(lambda: not quiet._is_held)


def test_a_child_that_outlives_its_killed_parent_holds_nothing(tmp_path: Path) -> None:
    """Neither the lock for writing nor Milvus Lite's own lock on the file."""
    program = """
        ended, threads = at_work()
        time.sleep(0.3)
        pid = os.fork()
        if pid == 0:
            os.close(1)
            time.sleep(20)
            os._exit(0)
        print(pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    path = str(tmp_path / "left.db")
    source = textwrap.dedent(PREAMBLE) + textwrap.dedent(program)
    killed = programs.run(source, path)
    assert killed.returncode < 0
    child = killed.stdout.strip()
    ending = """
        import contextlib
        print(len(store.write(nodes("next")).written))
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(sys.argv[2]), signal.SIGKILL)
    """
    assert outcome(ending, path, child) == "20"


def test_a_child_exits_with_its_status(uri: str) -> None:
    program = """
        ended, threads = at_work()
        codes = []
        for number in range(6):
            pid = os.fork()
            if pid == 0:
                if number % 2:
                    store.add(nodes("child"))
                    store.query(query)
                sys.exit(7)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        ended.set()
        for thread in threads:
            thread.join(20)
        print(codes)
        store.add(nodes("parent"))
        store.close()
    """
    assert outcome(program, uri) == str([7] * 6)


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="a pipeline no longer forks")
def test_pipelines_fork_while_other_threads_search_and_write(uri: str) -> None:
    program = """
        from llama_index.core.ingestion import IngestionPipeline
        from tests.embedding import HashEmbedding

        ended, threads = at_work()
        writer = AsyncMilvusWriter(vector_store=store, embed_model=HashEmbedding(dim=8))
        pipeline = IngestionPipeline(transformations=[writer], disable_cache=True)
        threading.Timer(50, lambda: os._exit(9)).start()  # a worker that hangs is waited for without end
        for run in range(15):
            texts = nodes(f"run{run}", 40)
            for node in texts:
                node.embedding = None
            assert len(asyncio.run(pipeline.arun(nodes=texts, num_workers=2))) == 40
        ended.set()
        for thread in threads:
            thread.join(20)
        print("well", flush=True)
        os._exit(0)
    """
    assert outcome(program, uri) == "well"


@pytest.mark.parametrize("connection", [1, 2])
def test_a_child_one_of_whose_connections_is_refused_tries_again(tmp_path: Path, connection: int) -> None:
    """It has two to make: one that its stores share, and the store's own for pymilvus's client."""
    program = """
        print("open", flush=True)
        sys.stdin.readline()
        pid = os.fork()
        if pid == 0:
            signal.alarm(30)
            found = store.query(query).ids
            print(len(found), store.client.has_collection("c"), flush=True)
            os._exit(0)
        os.waitpid(pid, 0)
        os._exit(0)
    """
    source = textwrap.dedent(PREAMBLE) + textwrap.dedent(program)
    with (
        LiteServer(tmp_path / "data") as server,
        FaultProxy(server.address) as proxy,
        programs.start(source, proxy.uri) as parent,
    ):
        assert parent.stdout.readline() == "open\n"
        proxy.clear()
        refused = proxy.script(Refuse(), method="Connect", on=Nth(connection))
        parent.stdin.write("fork\n")
        parent.stdin.close()
        assert parent.stdout.read() == "3 True\n"
    assert refused.struck == 1 and refused.seen == 3


def test_a_fork_while_another_thread_opens_and_closes_a_store_leaves_the_child_working(uri: str) -> None:
    program = """
        def open_and_close():
            for _ in range(8):
                AsyncMilvusVectorStore(uri=sys.argv[2], collection_name="other", dim=8).close()

        opening = threading.Thread(target=open_and_close)
        opening.start()
        statuses = []
        while opening.is_alive() and len(statuses) < 8:
            child = os.fork()
            if not child:
                signal.alarm(15)  # ends one that hangs, with a status
                assert len(store.query(query).ids) == 3
                os._exit(0)
            statuses.append(os.waitpid(child, 0)[1])
        opening.join()
        print(set(statuses), flush=True)
        os._exit(0)
    """
    other = uri if uri.startswith("http") else uri.replace("forked", "other")
    assert outcome(program, uri, other, seconds=150) == "{0}"


def test_a_fork_during_the_first_search_leaves_the_child_searching(uri: str) -> None:
    """With the first search pymilvus imports scipy: a child must not inherit half of that."""
    program = """
        searching = threading.Thread(target=store.query, args=(query,))
        searching.start()
        time.sleep(float(sys.argv[2]))
        child = os.fork()
        if not child:
            signal.alarm(15)  # ends one that hangs, with a status
            assert len(store.query(query).ids) == 3
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        searching.join()
        print(status, flush=True)
        os._exit(0)
    """
    for seconds in ("0.0", "0.01", "0.03", "0.06"):
        assert outcome(program, uri, seconds) == "0"


def test_an_iteration_under_way_goes_on_in_the_child_and_in_the_parent(uri: str) -> None:
    program = """
        under_way = store.iter_nodes(batch_size=3)
        seen = [next(under_way).node_id for _ in range(4)]
        child = os.fork()
        if not child:
            signal.alarm(15)  # ends one that hangs, with a status
        seen += [node.node_id for node in under_way]
        assert seen == sorted(f"first-{n}" for n in range(20)), seen
        if not child:
            os._exit(0)
        print(os.waitpid(child, 0)[1], flush=True)
        os._exit(0)
    """
    assert outcome(program, uri) == "0"


def test_a_client_of_pymilvus_in_a_child_is_the_childs_own(uri: str) -> None:
    """Whoever asked for it, under whichever name, before the fork."""
    program = """
        count = lambda client: client.query("c", filter="", output_fields=["count(*)"])[0]["count(*)"]
        before = store.client
        child = os.fork()
        if not child:
            signal.alarm(15)  # ends one that hangs, with a status
            assert store.client is not before and store._milvusclient is store.client
            assert count(store.client) == 20 and store.aclient is not None
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        print(status, store.client is before, count(store.client), flush=True)
        os._exit(0)
    """
    assert outcome(program, uri) == "0 True 20"
