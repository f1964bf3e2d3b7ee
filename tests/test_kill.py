"""Killed servers and killed clients: what was acknowledged is there, once, and calls go on by themselves."""

from __future__ import annotations

import asyncio
import random
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores.types import VectorStoreQuery
from pymilvus import MilvusClient

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, RetryPolicy
from tests import programs
from tests.conftest import MakeNodes
from tests.servers import LiteServer
from tests.waiting import until

DIM = 32
NODES = 20_000


def ids_in(uri: str, collection: str) -> Counter[str]:
    client = MilvusClient(uri, dedicated=True)
    try:
        client.load_collection(collection)
        found: Counter[str] = Counter()
        pages = client.query_iterator(
            collection, filter="", output_fields=["id"], batch_size=5_000, consistency_level="Strong"
        )
        while page := pages.next():
            found.update(row["id"] for row in page)
        pages.close()
        return found
    finally:
        client.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_a_server_killed_and_restarted_in_the_middle_loses_and_doubles_nothing(
    own_server: Any, make_nodes: MakeNodes
) -> None:
    store = AsyncMilvusVectorStore(
        uri=own_server.uri, collection_name="killed", dim=DIM, consistency_level="Strong", rpc_timeout_seconds=10
    )
    nodes = make_nodes(NODES, dim=DIM)
    writing = asyncio.create_task(store.awrite(nodes))
    before = store.statistics().rows
    await until(lambda: store.statistics().rows - before >= NODES // 4, seconds=60)
    own_server.kill()
    killed_at = store.statistics()
    assert not writing.done(), "it is killed in the middle"
    await asyncio.sleep(5)
    storm = store.statistics().requests - killed_at.requests
    await asyncio.to_thread(own_server.start)
    report = await writing
    lost = [str(f.error) for f in (*report.failed, *report.unknown)]
    assert len(report.written) == NODES, f"{report}: {Counter(lost).most_common(3)}"
    assert storm < 200, f"{storm} requests in five seconds to a dead server"
    query = VectorStoreQuery(query_embedding=nodes[0].embedding, similarity_top_k=3)
    answer = await store.aquery(query)  # by itself, past codes 101 and Lite's released collections
    assert len(answer.ids or []) == 3
    stored = ids_in(own_server.uri, "killed")
    assert set(stored) == {node.node_id for node in nodes}
    assert max(stored.values()) == 1
    await store.aclose()


async def test_a_frozen_server_costs_the_deadline_and_thawed_answers_again(
    tmp_path: Path, make_nodes: MakeNodes
) -> None:
    with LiteServer(tmp_path / "data") as server:
        policy = RetryPolicy(deadline_seconds=2, max_backoff_seconds=0.2)
        store = AsyncMilvusVectorStore(
            uri=server.uri, collection_name="frozen", dim=DIM, rpc_timeout_seconds=0.5, retry=policy
        )
        nodes = make_nodes(500, dim=DIM)
        await store.async_add(nodes)
        server.freeze()
        query = VectorStoreQuery(query_embedding=nodes[0].embedding, similarity_top_k=3)
        before = store.statistics().requests
        report, answer = await asyncio.gather(store.awrite(nodes), store.aquery(query), return_exceptions=True)
        # Four attempts of half a second each, and one or two shorter ones at the end.
        assert store.statistics().requests - before <= 2 * 6
        assert not isinstance(report, BaseException) and len(report.failed) + len(report.unknown) == 500
        assert isinstance(answer, Exception)
        server.thaw()
        assert len((await store.awrite(nodes)).written) == 500
        assert len((await store.aquery(query)).ids or []) == 3
        await store.aclose()


WRITER = textwrap.dedent(
    """
    import asyncio, sys
    from llama_index.core.schema import TextNode
    from llama_index_milvus_async_ext import AsyncMilvusVectorStore

    async def main(path, first):
        store = AsyncMilvusVectorStore(uri=path, collection_name="killed", dim=8, batch_size=20)
        print("ready", flush=True)

        async def writer(name):
            for number in range(10_000):
                ids = [f"{first}-{name}-{number}-{i}" for i in range(10)]
                nodes = [TextNode(id_=id_, text="text", embedding=[0.5] * 8) for id_ in ids]
                for id_ in await store.async_add(nodes):
                    print(id_, flush=True)

        await asyncio.gather(*map(writer, "abcdef"))

    asyncio.run(main(*sys.argv[1:]))
    """
)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_client_with_lite_in_it_keeps_every_acknowledged_row(tmp_path: Path) -> None:
    path = str(tmp_path / "killed.db")
    chance = random.Random(7)
    acknowledged: list[str] = []
    kills = 20
    for kill in range(kills):
        with programs.start(WRITER, path, str(kill)) as client:
            assert client.stdout.readline() == "ready\n"
            for _ in range(chance.randrange(1, 200)):  # it is killed in the midst of work, however fast that goes
                acknowledged.append(client.stdout.readline().rstrip("\n"))
            client.kill()
            acknowledged += client.stdout.read().split("\n")[:-1]
    assert all(acknowledged)
    with AsyncMilvusVectorStore(uri=path, collection_name="killed", dim=8) as store:
        stored = ids_in(store.client._config.uri, "killed")
    lost = set(acknowledged) - set(stored)
    assert not lost, f"{len(lost)} of {len(acknowledged)} acknowledged rows are gone"
    assert max(stored.values()) == 1
    print(f"{len(acknowledged)} rows acknowledged, {kills} kills, none lost")


def test_nodes_of_a_killed_server_can_be_tried_again(tmp_path: Path, make_nodes: MakeNodes) -> None:
    with LiteServer(tmp_path / "data") as server:
        policy = RetryPolicy(max_attempts=2, initial_backoff_seconds=0.01, deadline_seconds=2)
        store = AsyncMilvusVectorStore(uri=server.uri, collection_name="c", dim=DIM, retry=policy)
        nodes: list[TextNode] = make_nodes(50, dim=DIM)
        server.kill()
        report = store.write(nodes)
        assert len(report.failed) + len(report.unknown) == 50
        server.start()
        with AsyncMilvusVectorStore(uri=server.uri, collection_name="c", dim=DIM) as patient:
            again = patient.write([f.node for f in (*report.failed, *report.unknown)])
            assert len(again.written) == 50
        assert len(ids_in(server.uri, "c")) == 50
        store.close()
