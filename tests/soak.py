"""Ten minutes of mixed writes, deletes and searches under random faults: `python -m tests.soak [--seconds N] [--lite]`.

Eight threads and four event loops share one store; calls run out of time, are cancelled, and fall with a failing
sibling; child processes are forked, ask once and leave. Each worker knows which of its rows must be there, which must
not, and of which it was told that nobody knows; every answer is checked against that. Memory, threads and file
descriptors are looked at all the while, and must not grow; at the end nothing may be in flight or wait.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import psutil
from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores.types import VectorStoreQuery
from pymilvus.exceptions import ConnectError

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, RetryPolicy, WriteReport
from tests.fault_proxy import FaultProxy
from tests.faults import Chance, LoseAnswer, Refuse, SlowAnswer, rate_limit
from tests.servers import LiteServer, MilvusServer, ServerProcess

DIM = 16
ROWS_PER_WORKER = 200
THREADS, LOOPS, TASKS_PER_LOOP = 8, 4, 4
WAYS_TO_GIVE_UP = ["cancel", "timeout", "group"]
SECONDS_BETWEEN_FORKS = 3.0
CHILDS_SECONDS = 60
CONNECTED_LATE = 3  # a child's exit status


class LeavingChild(BaseException):
    """Carries a forked child out of its parent's frames, where it may end as any program does."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


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
        kind = self.chance.choice(["write", "write", "write", "search", "search", "get", "delete"])
        way = self.chance.choice([None, None, *WAYS_TO_GIVE_UP]) if kind != "delete" else None
        self.counts[kind if way is None else f"{kind} ({way})"] += 1
        if kind == "write":
            await self.write(way)
        elif kind == "delete":
            await self.delete()
        elif self.present:
            await self.read(kind, way)

    async def given_up(self, call: Callable[[], Awaitable[None]], way: str | None) -> None:
        """Make a call, and give it up at some moment in one of the ways there are."""
        patience = self.chance.choice([0.0, 0.0005, 0.005, 0.02, 0.1]) * self.chance.random()
        if way is None:
            await call()
        elif way == "timeout":
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(call(), max(patience, 1e-6))
        elif way == "group" and hasattr(asyncio, "TaskGroup"):

            async def fail() -> None:
                await asyncio.sleep(patience)
                raise LookupError("the sibling")

            with contextlib.suppress(Exception):  # an ExceptionGroup
                async with asyncio.TaskGroup() as group:
                    group.create_task(call())  # type: ignore[arg-type]
                    group.create_task(fail())
        else:
            task = asyncio.ensure_future(call())
            await asyncio.sleep(patience)
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                task.result()

    async def write(self, way: str | None) -> None:
        nodes = self.nodes()
        reports: list[WriteReport | None] = []

        async def call() -> None:
            try:
                reports.append(await self.store.awrite(nodes))
            except BaseException as error:
                reports.append(WriteReport.of(error))
                raise

        await self.given_up(call, way)
        if not reports:  # given up before it began
            return
        report = reports[0]
        if report is None:
            self.wrong.append(f"a write given up by {way} has no report")
            self.forget(node.node_id for node in nodes)
            return
        said = [*report.written, *(f.node.node_id for f in (*report.failed, *report.unknown))]
        if sorted(said) != sorted(node.node_id for node in nodes):
            self.wrong.append(f"a report of {len(nodes)} nodes is of others: {said}")
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

    async def read(self, kind: str, way: str | None) -> None:
        node_id = self.chance.choice(list(self.present))
        is_about_one = kind == "get" or self.chance.random() < 0.5
        found: list[tuple[str, str]] | None = None

        async def call() -> None:
            nonlocal found
            if kind == "get":
                nodes: Iterable[Any] = await self.store.aget_nodes(node_ids=[node_id])
            else:
                query = VectorStoreQuery(
                    query_embedding=[self.chance.uniform(-1, 1) for _ in range(DIM)],
                    similarity_top_k=3,
                    node_ids=[node_id] if is_about_one else None,
                )
                nodes = (await self.store.aquery(query)).nodes or []
            found = [(node.node_id, node.get_content()) for node in nodes]

        try:
            await self.given_up(call, way)
        except Exception as error:
            self.counts[f"{kind}: {type(error).__name__}"] += 1
            return
        if found is None:
            return
        ids = [found_id for found_id, _ in found]
        if len(set(ids)) != len(ids):
            self.wrong.append(f"doubled hits: {ids}")
        if is_about_one and found != [(node_id, self.present[node_id])]:
            self.wrong.append(f"{kind} of {node_id}: found {found}, expected {self.present[node_id]!r}")

    def forget(self, ids: Iterable[str]) -> None:
        for node_id in ids:
            self.present.pop(node_id, None)
            self.unsure.add(node_id)

    async def work(self, until: float) -> None:
        while time.monotonic() < until:
            await self.step()


class ProxyProcess:
    """The fault proxy, in a process of its own: a gRPC server does not survive that its process is forked."""

    def __init__(self, address: str) -> None:
        # Not multiprocessing's: a forked child that leaves by sys.exit would end it.
        command = [sys.executable, "-m", "tests.soak", "--serve-proxy", address]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.uri: str = self._answer()

    def _ask(self, question: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{question}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def begin(self) -> None:
        """Let faults strike from now on."""
        self._ask("begin")

    def heal(self) -> None:
        self._ask("heal")

    def counts(self) -> tuple[int, int]:
        """Requests so far, and those that a fault struck."""
        seen, struck = self._ask("counts")
        return seen, struck

    def close(self) -> None:
        self._process.communicate(timeout=30)


def serve_proxy(address: str) -> None:
    """Be the process of a `ProxyProcess`; ends with its standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with FaultProxy(address) as proxy:
        print(json.dumps(proxy.uri), flush=True)
        for question in sys.stdin:
            if question.strip() == "begin":
                proxy.script(Refuse(), on=Chance(0.02, 1))
                proxy.script(LoseAnswer(), method=("Insert", "Upsert"), on=Chance(0.03, 2))
                proxy.script(rate_limit(), method=("Insert", "Upsert"), on=Chance(0.03, 3))
                proxy.script(SlowAnswer(0.2), on=Chance(0.02, 4))
            elif question.strip() == "heal":
                proxy.heal()
            requests = proxy.requests
            print(json.dumps([len(requests), sum(record.fault is not None for record in requests)]), flush=True)


class Children:
    """Forked children of a process that is at work in many threads."""

    def __init__(self, store: AsyncMilvusVectorStore) -> None:
        self._store = store
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    def one_more(self) -> None:
        """Fork one, and wait until it has asked once and left."""
        leave = "os._exit" if sum(self.counts.values()) % 2 else "sys.exit"
        self.counts[leave] += 1
        sys.stdout.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: there are threads
            pid = os.fork()
        if not pid:
            self._ask_and_leave(leave)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status == CONNECTED_LATE:
            self.counts["connected at the second attempt"] += 1
        elif status:
            self.wrong.append(f"a child that leaves by {leave} ended with {status}")

    def _ask_and_leave(self, leave: str) -> NoReturn:
        signal.alarm(CHILDS_SECONDS)  # ends it by a signal, wherever it hangs
        query = VectorStoreQuery(query_embedding=[0.5] * DIM, similarity_top_k=1)
        status = 0
        try:
            try:
                self._store.query(query)
            except ConnectError:  # the proxy's doing, or gRPC's: it knows of one forked connection in twenty too late
                status = CONNECTED_LATE
                self._store.query(query)
        except BaseException:
            traceback.print_exc()
            status = 1
        if leave == "os._exit":
            os._exit(status)
        raise LeavingChild(status)


def resources() -> dict[str, int]:
    gc.collect()
    process = psutil.Process()
    return {
        "memory_mib": process.memory_info().rss >> 20,
        "threads": threading.active_count(),
        "files": process.num_fds(),
    }


def soak(server: ServerProcess, seconds: float) -> bool:
    proxy = ProxyProcess(server.address)
    store = AsyncMilvusVectorStore(
        uri=proxy.uri,
        collection_name="soak",
        dim=DIM,
        consistency_level="Strong",
        retry=RetryPolicy(max_attempts=20, deadline_seconds=60),
        rpc_timeout_seconds=5,
    )
    proxy.begin()
    until = time.monotonic() + seconds
    children = Children(store)
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
    told_at = time.monotonic()
    while time.monotonic() < until:
        time.sleep(min(SECONDS_BETWEEN_FORKS, max(until - time.monotonic(), 0.1)))
        children.one_more()
        if time.monotonic() - told_at > 30 or time.monotonic() > until:
            told_at = time.monotonic()
            print(f"{until - told_at:5.0f} s left, {resources()}, {proxy.counts()[0]} requests", flush=True)
    for thread in threads:
        thread.join()
    for _ in range(1_000):  # what was cancelled while it was under way ends by itself
        statistics = store.statistics()
        if not statistics.in_flight and not statistics.waiting:
            break
        time.sleep(0.01)
    last = resources()
    _, struck = proxy.counts()
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
    wrong = [*children.wrong, *(message for worker in workers for message in worker.wrong)]
    doubled = int(rows[0]["count(*)"]) - len(distinct)
    print(f"steps: {dict(counts)}\n{statistics}\nfaults injected: {struck}\nfirst {first}\nlast  {last}")
    print(f"children: {dict(children.counts)}")
    print(f"in_flight: {statistics.in_flight}, waiting: {statistics.waiting}")
    print(f"wrong or lost: {len(wrong)}, doubled: {doubled}")
    for message in wrong[:20]:
        print("  ", message)
    flat = last["memory_mib"] - first["memory_mib"] <= 64
    flat &= last["threads"] <= first["threads"] and last["files"] <= first["files"] + 10
    print("resources are flat" if flat else "RESOURCES GREW")
    is_idle = not statistics.in_flight and not statistics.waiting
    return flat and is_idle and not wrong and not doubled


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
    parser.add_argument("--serve-proxy", metavar="ADDRESS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve_proxy:
        serve_proxy(arguments.serve_proxy)
        return
    logging.disable(logging.WARNING)
    is_lite = arguments.lite or MilvusServer.unavailable_reason() is not None
    kind = LiteServer if is_lite else MilvusServer
    print(f"{arguments.seconds:g} s against {kind.__name__}", flush=True)
    # No `with`: a child that leaves through here must end neither the server nor the folder.
    folder = tempfile.mkdtemp()
    server = kind(Path(folder) / "data").start()
    try:
        passed = soak(server, arguments.seconds)
    except LeavingChild as child:
        sys.exit(child.status)
    except BaseException:
        traceback.print_exc()
        passed = False
    server.stop()
    shutil.rmtree(folder, ignore_errors=True)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
