"""Copies and worker processes: the same database, nothing applied twice, nothing inherited that does not work."""

from __future__ import annotations

import asyncio
import copy
import inspect
import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores.types import VectorStoreQuery

from llama_index_milvus_async_ext import (
    AsyncMilvusVectorStore,
    AsyncMilvusWriter,
    WriteError,
    WriteReport,
    aingest,
    ingest,
)
from tests import programs
from tests.conftest import Backend, MakeNodes
from tests.embedding import HashEmbedding

DIM = 16


@pytest.fixture
def store(backend: Backend, collection_name: str) -> Any:
    with AsyncMilvusVectorStore(
        uri=backend.uri,
        collection_name=collection_name,
        dim=DIM,
        consistency_level="Strong",
        overwrite=True,
        similarity_metric="COSINE",
        max_concurrency=3,
        token="root:Milvus",
    ) as store:
        yield store


def count(store: AsyncMilvusVectorStore) -> int:
    rows = store.client.query(store.collection_name, filter="", output_fields=["count(*)"], consistency_level="Strong")
    return int(rows[0]["count(*)"])


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


def write_in_child(store: AsyncMilvusVectorStore, nodes: list[TextNode], results: Any) -> None:
    try:
        ids = store.add(nodes[:10])
        ids += asyncio.run(store.async_add(nodes[10:]))
        found = store.query(VectorStoreQuery(query_embedding=nodes[0].embedding, similarity_top_k=1))
        results.put((ids, found.ids))
        store.close()
    except BaseException as error:
        results.put(repr(error))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_child_process_writes_and_reads(store: AsyncMilvusVectorStore, make_nodes: MakeNodes, method: str) -> None:
    asyncio.run(store.async_add(make_nodes(10, dim=DIM)))  # the parent's own requests come first
    context = multiprocessing.get_context(method)
    results = context.Queue()
    nodes = make_nodes(20, dim=DIM, seed=9)
    child = context.Process(target=write_in_child, args=(store, nodes, results))
    child.start()
    outcome = results.get(timeout=120)
    child.join(60)
    assert child.exitcode == 0
    assert outcome == ([node.node_id for node in nodes], [nodes[0].node_id])
    assert count(store) == 30
    store.add(make_nodes(1, dim=DIM))
    assert count(store) == 31


@pytest.mark.parametrize("is_async", [False, True])
def test_pipelines_with_worker_processes(store: AsyncMilvusVectorStore, make_nodes: MakeNodes, is_async: bool) -> None:
    nodes = make_nodes(60, dim=DIM)
    for node in nodes:
        node.embedding = None
    store.add(make_nodes(3, dim=DIM))
    writer = AsyncMilvusWriter(vector_store=store, embed_model=HashEmbedding(dim=DIM))
    pipeline = IngestionPipeline(transformations=[writer], disable_cache=True)
    if is_async:
        returned = asyncio.run(pipeline.arun(nodes=nodes, num_workers=2))
    else:
        returned = pipeline.run(nodes=nodes, num_workers=2)
    assert sorted(node.node_id for node in returned) == sorted(node.node_id for node in nodes)
    assert len(store.get_nodes(node_ids=[node.node_id for node in nodes])) == 60
    assert count(store) == 63


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
