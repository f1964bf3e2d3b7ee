"""Milvus Lite's files: several processes at one, what is in the way of opening one, and when one is free again."""

from __future__ import annotations

import gc
import os
import textwrap
import threading
import time
from pathlib import Path

import pytest
from llama_index.vector_stores.milvus import MilvusVectorStore
from pymilvus import AsyncMilvusClient, MilvusClient

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, RetryPolicy
from tests import programs
from tests.conftest import MakeNodes
from tests.fault_proxy import FaultProxy
from tests.faults import MilvusError, Nth
from tests.servers import LiteServer
from tests.test_kill import ids_in

DIM = 8

OPENER = """
    import sys
    from llama_index_milvus_async_ext import AsyncMilvusVectorStore
    with AsyncMilvusVectorStore(uri=sys.argv[1], collection_name="c", dim=8) as store:
        print(store.client.query("c", filter="", output_fields=["count(*)"])[0]["count(*)"])
"""


def opened_elsewhere(path: Path) -> str:
    """What another process finds in a file: its number of rows, or why it can't open it."""
    ended = programs.run(textwrap.dedent(OPENER), str(path))
    return ended.stdout.strip() or ended.stderr


def opened(path: Path) -> AsyncMilvusVectorStore:
    return AsyncMilvusVectorStore(uri=str(path), collection_name="c", dim=DIM)


def test_a_file_is_free_once_its_last_store_is_closed(tmp_path: Path, make_nodes: MakeNodes) -> None:
    path = tmp_path / "free.db"
    first, second = opened(path), opened(path)
    first.add(make_nodes(5, dim=DIM))
    first.close()
    assert "another process holds it" in opened_elsewhere(path), "the second is still open"
    second.add(make_nodes(5, dim=DIM))
    second.close()
    assert opened_elsewhere(path) == "10"
    with opened(path) as again:
        again.add(make_nodes(5, dim=DIM))
        again.client.load_collection("c")
        assert len(again.client.query("c", filter="", limit=100)) == 15


def test_a_store_that_could_not_be_made_holds_no_file(tmp_path: Path) -> None:
    path = tmp_path / "free.db"
    opened(path).close()
    with pytest.raises(ValueError, match="Dim"):
        AsyncMilvusVectorStore(uri=str(path), collection_name="without a dimension")
    assert opened_elsewhere(path) == "0"


@pytest.mark.parametrize("kind", [MilvusClient, AsyncMilvusClient, MilvusVectorStore])
def test_a_plain_client_of_the_process_keeps_its_file(tmp_path: Path, make_nodes: MakeNodes, kind: type) -> None:
    path = tmp_path / "shared.db"
    store = opened(path)
    store.add(make_nodes(5, dim=DIM))
    plain = kind(uri=str(path), **({"collection_name": "c", "dim": DIM} if kind is MilvusVectorStore else {}))
    store.close()
    assert "another process holds it" in opened_elsewhere(path)
    if isinstance(plain, MilvusVectorStore):
        plain.add(make_nodes(5, dim=DIM))
    elif isinstance(plain, MilvusClient):
        assert plain.list_collections() == ["c"]
        plain.close()
        opened(path).close()
        assert opened_elsewhere(path) == "5"


@pytest.mark.parametrize("kind", [MilvusClient, AsyncMilvusClient])
def test_a_plain_client_that_a_service_has_frozen_keeps_its_file(tmp_path: Path, kind: type) -> None:
    """`gc.freeze()` hides what is there from those who ask the garbage collector for it."""
    path = tmp_path / "shared.db"
    client = kind(str(path))
    gc.freeze()
    try:
        opened(path).close()
        assert "another process holds it" in opened_elsewhere(path)
    finally:
        gc.unfreeze()
    del client


def test_a_link_to_an_open_file_is_that_file(tmp_path: Path, make_nodes: MakeNodes) -> None:
    (tmp_path / "data").mkdir()
    path, link = tmp_path / "data" / "real.db", tmp_path / "link.db"
    link.symlink_to(path)
    with opened(path) as store, opened(link) as by_link:
        by_link.add(make_nodes(5, dim=DIM))
        assert len(store.client.query("c", filter="", limit=100)) == 5
    assert opened_elsewhere(link) == "5"


def test_a_link_may_lead_to_a_folder_of_any_name(tmp_path: Path, make_nodes: MakeNodes) -> None:
    folder, link = tmp_path / "data", tmp_path / "link.db"
    folder.mkdir()
    link.symlink_to(folder)
    with opened(link) as store:
        store.add(make_nodes(5, dim=DIM))
    assert any(folder.iterdir())
    assert opened_elsewhere(link) == "5"


def test_a_file_of_milvus_lite_2_is_named(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    path.write_bytes(b"SQLite format 3\0" + bytes(32_752))
    with pytest.raises(Exception, match="written by Milvus Lite 2") as refused:
        opened(path)
    assert "query_iterator" in str(refused.value), "it says how to copy the rows over"
    (tmp_path / "notes.db").write_text("something else")
    with pytest.raises(Exception, match="no database of Milvus Lite's"):
        opened(tmp_path / "notes.db")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_is_not_taken_for_bad_rows(tmp_path: Path, make_nodes: MakeNodes) -> None:
    policy = RetryPolicy(max_attempts=3, max_backoff_seconds=0.1, deadline_seconds=3)
    path = tmp_path / "full.db"
    with AsyncMilvusVectorStore(uri=str(path), collection_name="c", dim=DIM, retry=policy) as store:
        (log_folder,) = path.glob("**/wal")
        (log_folder / "wal_data_000001.arrow").symlink_to("/dev/full")
        before = store.statistics().requests
        report = store.write(make_nodes(400, dim=DIM))
        assert not report.written
        lost = [*report.failed, *report.unknown]
        assert len(lost) == 400 and all(node.retryable for node in lost)
        assert "No space left" in str(lost[0].error)
        assert store.statistics().requests - before <= 10


def test_after_a_full_disk_the_first_write_that_succeeds_begins_a_new_log_and_no_later_one(
    proxy: FaultProxy, collection_name: str, make_nodes: MakeNodes
) -> None:
    with AsyncMilvusVectorStore(proxy.uri, collection_name=collection_name, dim=DIM) as store:
        proxy.script(MilvusError(1, "[Errno 28] No space left on device"), method="Upsert", on=Nth(1))
        assert len(store.write(make_nodes(2, dim=DIM)).failed) == 2
        assert proxy.counts["Flush"] == 0, "while the disk is full, that would make rows disappear"
        for _ in range(3):
            assert store.write(make_nodes(2, dim=DIM)).ok
            assert proxy.counts["Flush"] == 1


def test_rows_count_as_written_once_the_new_log_has_begun(
    proxy: FaultProxy, collection_name: str, make_nodes: MakeNodes
) -> None:
    policy = RetryPolicy(initial_backoff_seconds=0.001, max_backoff_seconds=0.01)
    with AsyncMilvusVectorStore(proxy.uri, collection_name=collection_name, dim=DIM, retry=policy) as store:
        proxy.script(MilvusError(1, "[Errno 28] No space left on device"), method="Upsert", on=Nth(1))
        assert not store.write(make_nodes(2, dim=DIM)).ok
        proxy.script(MilvusError(1, "[Errno 28] No space left on device"), method="Flush", on=Nth(1))
        report = store.write(make_nodes(2, dim=DIM))
        assert report.ok and report.retries == 1
        assert (proxy.counts["Upsert"], proxy.counts["Flush"]) == (3, 2)


WRITER = """
    import asyncio, sys
    from llama_index.core.schema import TextNode
    from llama_index_milvus_async_ext import AsyncMilvusVectorStore, RetryPolicy

    async def main(uri, name):
        policy = RetryPolicy(deadline_seconds=5)
        store = AsyncMilvusVectorStore(uri=uri, collection_name="c", dim=8, retry=policy, rpc_timeout_seconds=10)
        print("ready", flush=True)

        async def write(task):
            for number in range(10_000):
                ids = [f"{name}-{task}-{number}-{i}" for i in range(10)]
                for id_ in await store.async_add([TextNode(id_=i, text="text", embedding=[0.5] * 8) for i in ids]):
                    print(id_, flush=True)

        await asyncio.gather(*map(write, "abc"))

    asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.slow
def test_two_processes_write_to_one_lite_server_and_its_kill_loses_nothing(tmp_path: Path) -> None:
    with LiteServer(tmp_path / "data") as server:
        opened_by_address(server.uri).close()  # the collection is there before both begin
        spellings = [server.uri, f"http://localhost:{server.port}"]
        environments = [os.environ | {"TMPDIR": str(tmp_path)}, dict(os.environ)]
        writers = [
            programs.start(textwrap.dedent(WRITER), uri, f"w{number}", environment=environment)
            for number, (uri, environment) in enumerate(zip(spellings, environments, strict=True))
        ]
        acknowledged: list[list[str]] = [[], []]
        ready = threading.Barrier(3)

        def read(number: int) -> None:
            with writers[number] as writer:
                assert writer.stdout.readline() == "ready\n"
                ready.wait(30)
                acknowledged[number] += writer.stdout.read().split("\n")[:-1]

        readers = [threading.Thread(target=read, args=(number,)) for number in range(2)]
        try:
            for reader in readers:
                reader.start()
            ready.wait(30)
            time.sleep(2)
            server.kill()
        finally:
            for writer in writers:
                writer.kill()
            for reader in readers:
                reader.join()
        assert min(map(len, acknowledged)) > 100, "both had their turns"
        server.start()
        stored = ids_in(server.uri, "c")
        lost = {*acknowledged[0], *acknowledged[1]} - set(stored)
        assert not lost, f"{len(lost)} of {sum(map(len, acknowledged))} acknowledged rows are gone"
        assert max(stored.values()) == 1


def opened_by_address(uri: str) -> AsyncMilvusVectorStore:
    return AsyncMilvusVectorStore(uri=uri, collection_name="c", dim=DIM)
