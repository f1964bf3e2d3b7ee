"""Ten minutes of mixed writes, deletes and searches under random faults: `python -m tests.soak [--seconds N] [--lite]`.

Eight threads and four event loops share one store. Each worker knows which of its rows must be there, which must not,
and of which it was told that nobody knows; every answer is checked against that. Memory, threads, file descriptors and
tasks are looked at all the while, and must not grow.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores.types import VectorStoreQuery

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, RetryPolicy
from llama_index_milvus_async_ext._io import IoThread
from tests.fault_proxy import FaultProxy
from tests.faults import Chance, LoseAnswer, Refuse, SlowAnswer, rate_limit
from tests.servers import LiteServer, MilvusServer, ServerProcess

DIM = 16
ROWS_PER_WORKER = 200
THREADS, LOOPS, TASKS_PER_LOOP = 8, 4, 4


class Worker:
    """One caller: its rows, what it knows of them, and what it found wrong."""

    def __init__(self, store: AsyncMilvusVectorStore, name: str) -> None:
        self.store = store
        self.name = name
        self.chance = random.Random(name)
        self.present: dict[str, str] = {}  # id -> text, for certain
        self.unsure: set[str] = set()
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    def nodes(self) -> list[TextNode]:
        numbers = self.chance.sample(range(ROWS_PER_WORKER), self.chance.choice([1, 1, 5, 40]))
        return [
            TextNode(
                id_=f"{self.name}-{number}",
                text=f"{self.name} {number} {self.chance.random()}",
                embedding=[self.chance.uniform(-1, 1) for _ in range(DIM)],
                relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=f"{self.name}-doc-{number % 10}")},
            )
            for number in numbers
        ]

    async def step(self) -> None:
        kind = self.chance.choice(["write", "write", "search", "search", "get", "delete", "cancel"])
        self.counts[kind] += 1
        if kind in ("write", "cancel"):
            await self.write(give_up=kind == "cancel")
        elif kind == "delete":
            await self.delete()
        elif self.present:
            await self.read(kind)

    async def write(self, give_up: bool) -> None:
        nodes = self.nodes()
        task = asyncio.create_task(self.store.awrite(nodes))
        if give_up:
            await asyncio.sleep(self.chance.uniform(0, 0.02))
            task.cancel()
        try:
            report = await task
        except asyncio.CancelledError as cancelled:
            report = getattr(cancelled, "report", None)  # type: ignore[assignment]
        if report is None:
            self.forget(node.node_id for node in nodes)
            return
        texts = {node.node_id: node.text for node in nodes}
        for node_id in report.written:
            self.present[node_id] = texts[node_id]
            self.unsure.discard(node_id)
        self.forget(failed.node.node_id for failed in report.unknown)
        self.counts["unknown rows"] += len(report.unknown)

    async def delete(self) -> None:
        document = self.chance.randrange(10)
        mine = {f"{self.name}-{number}" for number in range(document, ROWS_PER_WORKER, 10)}
        try:
            await self.store.adelete(f"{self.name}-doc-{document}")
        except Exception as error:
            self.counts[f"delete: {type(error).__name__}"] += 1
            self.forget(mine)
            return
        for node_id in mine:
            self.present.pop(node_id, None)
            # A cancelled write may still land after the delete: those stay unsure.

    async def read(self, kind: str) -> None:
        node_id = self.chance.choice(list(self.present))
        try:
            if kind == "get":
                found = [node.node_id for node in await self.store.aget_nodes(node_ids=[node_id])]
                texts = [node.get_content() for node in await self.store.aget_nodes(node_ids=[node_id])]
            else:
                query = VectorStoreQuery(
                    query_embedding=[self.chance.uniform(-1, 1) for _ in range(DIM)],
                    similarity_top_k=3,
                    node_ids=[node_id] if self.chance.random() < 0.5 else None,
                )
                answer = await self.store.aquery(query)
                if query.node_ids is None:
                    if len(answer.ids or []) != len(set(answer.ids or [])):
                        self.wrong.append(f"doubled hits: {answer.ids}")
                    return
                found, texts = list(answer.ids or []), [node.get_content() for node in answer.nodes or []]
        except Exception as error:
            self.counts[f"{kind}: {type(error).__name__}"] += 1
            return
        if found != [node_id] or texts != [self.present[node_id]]:
            self.wrong.append(f"{kind} of {node_id}: found {found} {texts}, expected {self.present[node_id]!r}")

    def forget(self, ids: object) -> None:
        for node_id in ids:  # type: ignore[attr-defined]
            self.present.pop(node_id, None)
            self.unsure.add(node_id)

    async def work(self, until: float) -> None:
        while time.monotonic() < until:
            await self.step()


def resources() -> dict[str, int]:
    gc.collect()
    process = psutil.Process()
    io = IoThread.get()
    return {
        "memory_mib": process.memory_info().rss >> 20,
        "threads": threading.active_count(),
        "files": process.num_fds(),
        "tasks": io.call(lambda: len(asyncio.all_tasks(io.loop))),
    }


def soak(server: ServerProcess, seconds: float) -> bool:
    proxy = FaultProxy(server.address)
    proxy.start()
    store = AsyncMilvusVectorStore(
        uri=proxy.uri,
        collection_name="soak",
        dim=DIM,
        consistency_level="Strong",
        retry=RetryPolicy(max_attempts=20, deadline_seconds=60),
        rpc_timeout_seconds=5,
    )
    proxy.script(Refuse(), on=Chance(0.02, 1))
    proxy.script(LoseAnswer(), method=("Insert", "Upsert"), on=Chance(0.03, 2))
    proxy.script(rate_limit(), method=("Insert", "Upsert"), on=Chance(0.03, 3))
    proxy.script(SlowAnswer(0.2), on=Chance(0.02, 4))
    until = time.monotonic() + seconds
    workers = [Worker(store, f"w{n}") for n in range(THREADS + LOOPS * TASKS_PER_LOOP)]

    async def several(own: list[Worker]) -> None:
        await asyncio.gather(*(worker.work(until) for worker in own))

    def blocking(worker: Worker) -> None:
        while time.monotonic() < until:  # a new event loop for each step, as scripts do
            asyncio.run(worker.step())

    threads = [threading.Thread(target=blocking, args=(worker,)) for worker in workers[:THREADS]]
    for loop in range(LOOPS):
        own = workers[THREADS + loop * TASKS_PER_LOOP :][:TASKS_PER_LOOP]
        threads.append(threading.Thread(target=lambda own=own: asyncio.run(several(own))))  # type: ignore[misc]
    for thread in threads:
        thread.start()
    time.sleep(min(30.0, seconds / 4))  # caches, pools and the heap fill first
    first = resources()
    while time.monotonic() < until:
        time.sleep(min(30.0, max(until - time.monotonic(), 0.1)))
        proxy_records = len(proxy.requests)
        print(f"{until - time.monotonic():5.0f} s left, {resources()}, {proxy_records} requests", flush=True)
    for thread in threads:
        thread.join()
    last = resources()
    statistics = store.statistics()
    struck = sum(record.fault is not None for record in proxy.requests)
    proxy.heal()
    for worker in workers:
        for node in store.get_nodes(node_ids=list(worker.present)) if worker.present else []:
            if worker.present.pop(node.node_id) != node.get_content():
                worker.wrong.append(f"at the end {node.node_id} has another text")
        worker.wrong += [f"at the end {node_id} is lost" for node_id in worker.present]
    rows = store.client.query("soak", filter="", output_fields=["count(*)"], consistency_level="Strong")
    distinct = {row["id"] for row in _all_rows(store)}
    store.close()
    proxy.close()
    counts = sum((worker.counts for worker in workers), Counter())
    wrong = [message for worker in workers for message in worker.wrong]
    doubled = int(rows[0]["count(*)"]) - len(distinct)
    print(f"steps: {dict(counts)}\n{statistics}\nfaults injected: {struck}\nfirst {first}\nlast  {last}")
    print(f"wrong or lost: {len(wrong)}, doubled: {doubled}")
    for message in wrong[:20]:
        print("  ", message)
    # The proxy's own records are part of the memory: half a KiB a request.
    allowance = 64 + len(proxy.requests) // 1024
    flat = last["memory_mib"] - first["memory_mib"] <= allowance
    flat &= last["threads"] <= first["threads"] and last["files"] <= first["files"] + 10 and last["tasks"] <= 5
    print("resources are flat" if flat else "RESOURCES GREW")
    return flat and not wrong and not doubled


def _all_rows(store: AsyncMilvusVectorStore) -> list[dict[str, str]]:
    pages = store.client.query_iterator(
        "soak", filter="", output_fields=["id"], batch_size=1_000, consistency_level="Strong"
    )
    found = []
    while page := pages.next():
        found += page
    pages.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--lite", action="store_true", help="against Milvus Lite, also where the server can run")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        is_lite = arguments.lite or MilvusServer.unavailable_reason() is not None
        kind = LiteServer if is_lite else MilvusServer
        print(f"{arguments.seconds:g} s against {kind.__name__}", flush=True)
        with kind(Path(folder) / "data") as server:
            sys.exit(0 if soak(server, arguments.seconds) else 1)


if __name__ == "__main__":
    main()
