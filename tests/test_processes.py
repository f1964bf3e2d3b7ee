"""Copies and worker processes: the same database, nothing applied twice, nothing inherited that does not work."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.bridge.pydantic import ConfigDict, PrivateAttr

from llama_index_milvus_async_ext import (
    AsyncMilvusVectorStore,
    WriteError,
    WriteReport,
    aingest,
    ingest,
)
from tests import programs
from tests.conftest import Backend, MakeNodes
from tests.workers import DIM, count, opened


@pytest.fixture
def store(backend: Backend, collection_name: str) -> Any:
    with opened(backend.uri, collection_name) as store:
        yield store


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda store: pickle.loads(pickle.dumps(store))])
def test_a_copy_is_the_same_store(
    store: AsyncMilvusVectorStore, make_nodes: MakeNodes, copied: Callable[..., Any]
) -> None:
    store.add(make_nodes(5, dim=DIM))
    other = copied(store)
    assert (other.uri, other.collection_name, other.max_concurrency) == (store.uri, store.collection_name, 3)
    assert other.similarity_metric == "COSINE"
    other.add(make_nodes(5, dim=DIM))
    assert count(store) == count(other) == 10, "not overwritten again"
    other.close()
    store.add(make_nodes(1, dim=DIM))


class Tenant(AsyncMilvusVectorStore):
    """A user's own, whose constructor takes what it likes, and which has what does not pickle and what holds itself."""

    model_config = ConfigDict(extra="allow")
    tenant: str = "nobody"
    _seen: list[str] = PrivateAttr(default_factory=list)
    _lock: Any = PrivateAttr(default_factory=threading.Lock)
    _itself: Any = PrivateAttr(default=None)

    def __init__(self, where: Backend, name: str) -> None:
        super().__init__(where.uri, collection_name=name, dim=DIM, overwrite=True, consistency_level="Strong")
        self._itself = self


COPIED: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "model_copy": lambda store: store.model_copy(),
    "deepcopy": copy.deepcopy,
    "model_copy, deep": lambda store: store.model_copy(deep=True),
    "pickle": lambda store: pickle.loads(pickle.dumps(store)),
    "pickle, in Python": lambda store: pickle._loads(pickle._dumps(store)),  # type: ignore[attr-defined]
    "a copy of a copy": lambda store: copy.deepcopy(pickle.loads(pickle.dumps(store))),
}


@pytest.mark.parametrize("way", COPIED)
def test_a_copy_keeps_what_its_own_class_adds(
    backend: Backend, collection_name: str, make_nodes: MakeNodes, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    is_shallow = way in ("copy", "model_copy")
    with Tenant(backend, collection_name) as store:
        store.tenant, store._seen[:] = "acme", ["a", "b"]
        store.color = ["red"]
        store.add(make_nodes(5, dim=DIM))
        caplog.clear()
        with COPIED[way](store) as other:
            assert type(other) is Tenant and (other.tenant, other._seen, other.color) == ("acme", ["a", "b"], ["red"])
            assert (other._seen is store._seen) is (other.color is store.color) is (other._lock is store._lock)
            assert (other._seen is store._seen) is is_shallow
            assert other._itself is (store if is_shallow else other)
            with other._lock:  # which does not pickle: one as the class makes it
                other.add(make_nodes(5, dim=DIM))
            assert ("'_lock'" in caplog.text) is not is_shallow
            assert count(store) == count(other) == 10, "not overwritten again"
            assert other.live() is not store.live(), "the connection is its own"
        store.add(make_nodes(1, dim=DIM))


def test_a_copy_may_be_changed(store: AsyncMilvusVectorStore) -> None:
    with store.model_copy(update={"max_concurrency": 2, "is_embedding_query": False}) as other:
        assert (other.max_concurrency, store.max_concurrency) == (2, 3)
        assert (other.is_embedding_query, store.is_embedding_query) == (False, True)
        with copy.copy(other) as again:
            assert (again.max_concurrency, again.is_embedding_query) == (2, False)
            assert again.model_fields_set == other.model_fields_set


def test_reports_and_errors_pickle(store: AsyncMilvusVectorStore, make_nodes: MakeNodes) -> None:
    nodes = make_nodes(3, dim=DIM)
    nodes[1].embedding = None
    report = store.write(nodes)
    again: WriteReport = pickle.loads(pickle.dumps(report))
    assert again.written == report.written
    assert str(again.failed[0].error) == str(report.failed[0].error)
    error: WriteError = pickle.loads(pickle.dumps(WriteError(report)))
    assert "no embedding" in str(error)


def test_the_functions_pickle_as_what_a_task_of_ray_refers_to() -> None:
    assert pickle.loads(pickle.dumps((ingest, aingest))) == (ingest, aingest)
    assert inspect.iscoroutinefunction(aingest)


def worker_program(backend: Backend, collection_name: str, tmp_path: Path, what: str, method: str) -> None:
    uri = str(tmp_path / "own.db") if backend.name == "lite" else backend.uri
    ended = programs.run("from tests.workers import main; main()", what, method, uri, collection_name, timeout=110)
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_child_process_writes_and_reads(backend: Backend, collection_name: str, tmp_path: Path, method: str) -> None:
    worker_program(backend, collection_name, tmp_path, "child", method)


@pytest.mark.parametrize("method", ["arun", "run"])
def test_pipelines_with_worker_processes(backend: Backend, collection_name: str, tmp_path: Path, method: str) -> None:
    worker_program(backend, collection_name, tmp_path, "pipeline", method)


def test_a_file_that_another_process_holds_is_named(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import sys
        from llama_index_milvus_async_ext import AsyncMilvusVectorStore
        store = AsyncMilvusVectorStore(uri=sys.argv[1], dim=4)
        print("open", flush=True)
        sys.stdin.read()
        """
    )
    path = str(tmp_path / "held.db")
    with programs.start(program, path) as holder:
        assert holder.stdout.readline() == "open\n"
        with pytest.raises(Exception, match="another process holds it"):
            AsyncMilvusVectorStore(uri=path, dim=4)
        holder.stdin.close()
        assert holder.wait(30) == 0
    AsyncMilvusVectorStore(uri=path, dim=4).close()
    with pytest.raises(Exception, match="folder does not exist"):
        AsyncMilvusVectorStore(uri=str(tmp_path / "nowhere" / "x.db"), dim=4)


QUIET_EXITS = {
    "work is pending": """
        threading.Thread(target=store.add, args=(nodes * 20,), daemon=True).start()
        time.sleep(0.1)
    """,
    "a loop ends with calls under way": """
        async def main():
            tasks = [asyncio.create_task(store.async_add([node])) for node in nodes]
            await asyncio.sleep(0.05)
        asyncio.run(main())
    """,
    "the store is never closed": """
        store.add(nodes[:5])
    """,
    "it is closed twice": """
        store.close()
        store.close()
    """,
    "it is used after it was closed": """
        store.close()
        try:
            store.add(nodes)
        except RuntimeError as error:
            assert "closed" in str(error)
    """,
    "ctrl-c comes while a call blocks": """
        import signal
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
        threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        try:
            for _ in range(200):
                store.add(nodes)
            assert False, "not interrupted"
        except KeyboardInterrupt:
            pass
        store.close()
    """,
}


@pytest.mark.parametrize("what", QUIET_EXITS)
def test_the_interpreter_exits_at_once_and_quietly_when(
    backend: Backend, collection_name: str, what: str, tmp_path: Path
) -> None:
    uri = str(tmp_path / "own.db") if backend.name == "lite" else backend.uri
    program = textwrap.dedent(
        """
        import asyncio, os, sys, threading, time, warnings
        warnings.simplefilter("error", ResourceWarning)
        from llama_index.core.schema import TextNode
        from llama_index_milvus_async_ext import AsyncMilvusVectorStore
        nodes = [TextNode(id_=f"n{n}", text="text", embedding=[0.1] * 16) for n in range(500)]
        store = AsyncMilvusVectorStore(uri=sys.argv[1], collection_name=sys.argv[2], dim=16)
        """
    ) + textwrap.dedent(QUIET_EXITS[what])
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GRPC_")}
    ended = programs.run(program, uri, collection_name, environment=environment)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_importing_starts_no_thread() -> None:
    program = "import threading, llama_index_milvus_async_ext; print([t.name for t in threading.enumerate()])"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert "milvus-io" not in shown.stdout


def test_a_reopened_file_answers_at_once_and_quietly(tmp_path: Path) -> None:
    """After each of its restarts Milvus Lite says that collections are released."""
    program = textwrap.dedent(
        """
        import sys
        from llama_index.core.schema import TextNode
        from llama_index.core.vector_stores.types import VectorStoreQuery
        from llama_index_milvus_async_ext import AsyncMilvusVectorStore
        with AsyncMilvusVectorStore(uri=sys.argv[1], dim=4) as store:
            if sys.argv[2] == "write":
                store.add([TextNode(id_="1", text="x", embedding=[1.0, 2.0, 3.0, 4.0])])
            elif sys.argv[2] == "get":
                assert len(store.get_nodes(node_ids=["1"])) == 1
            elif sys.argv[2] == "search":
                query = VectorStoreQuery(query_embedding=[1.0, 2.0, 3.0, 4.0], similarity_top_k=1)
                assert store.query(query).ids == ["1"]
            else:
                store.delete_nodes(node_ids=["1"])
                assert store.get_nodes(node_ids=["1"]) == []
        """
    )
    for what in ("write", "get", "search", "delete"):
        ended = programs.run(program, str(tmp_path / "again.db"), what)
        assert (ended.returncode, ended.stderr) == (0, ""), what
