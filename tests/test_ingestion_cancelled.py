"""Ingestions that are given up at any moment: nothing of them goes on, and to run again completes them."""

from __future__ import annotations

import asyncio
import random
import textwrap
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from llama_index.core.bridge.pydantic import ConfigDict, Field
from llama_index.core.ingestion import IngestionPipeline

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, AsyncMilvusWriter
from llama_index_milvus_async_ext.ingestion import IngestionReport, aingest, ingest
from tests import programs
from tests.embedding import HashEmbedding
from tests.fault_proxy import FaultProxy
from tests.faults import Exchange
from tests.sentences import Edition, documents, first_edition, next_edition, nodes_of, rows_in, splitter, stored
from tests.waiting import beside, blocked_until, press_ctrl_c, until

DIM = 8
DOCUMENTS = 40
TIMES = 12
SEED = 4
LATEST = 90  # of what happens in a run, texts that are embedded and requests; it is more in any of these


class Moment:
    """The moment at which so many things have happened, counted from when it is set."""

    def __init__(self) -> None:
        self.has_come = False
        self._left = 0
        self._strike: Callable[[], object] = lambda: None
        self._lock = threading.Lock()

    def set(self, number: int, strike: Callable[[], object]) -> None:
        self.has_come, self._left, self._strike = False, number, strike

    def count(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left:
                return
        self.has_come = True
        self._strike()

    def at_the_proxy(self, exchange: Exchange) -> bytes:
        """A fault that does nothing but count."""
        self.count()
        return exchange.forward()


class SlowRequest:
    """A fault: requests count towards a moment, and take a while; those that are under way when it comes, longer."""

    def __init__(self, moment: Moment) -> None:
        self._moment = moment

    def __call__(self, exchange: Exchange) -> bytes:
        self._moment.count()
        exchange.wait(0.3 if self._moment.has_come else 0.01)
        return exchange.forward()


class CountedEmbedding(HashEmbedding):
    """A model whose texts are counted."""

    model_config = ConfigDict(arbitrary_types_allowed=True)
    dim: int = DIM
    embed_batch_size: int = 2
    blocking: bool = False
    moments: list[Moment] = Field(default_factory=list, exclude=True)

    def _embed(self, texts: list[str]) -> list[list[float]]:
        for _ in texts:
            self.moments[0].count()
        return super()._embed(texts)

    async def _aembed(self, texts: list[str]) -> list[list[float]]:
        for _ in texts:
            self.moments[0].count()
        return await super()._aembed(texts)


class Bench:
    """A store behind a proxy, a pipeline that writes to it, and a moment that both count towards."""

    def __init__(self, proxy: FaultProxy, collection: str, with_fixed_ids: bool) -> None:
        self.proxy = proxy
        self.moment = Moment()
        self.store = AsyncMilvusVectorStore(proxy.uri, collection_name=collection, dim=DIM, batch_size=4)
        self.model = CountedEmbedding()
        self.model.moments.append(self.moment)
        steps = [splitter(with_fixed_ids), self.model, AsyncMilvusWriter(self.store)]
        self.pipeline = IngestionPipeline(transformations=steps)
        proxy.script(self.moment.at_the_proxy)

    def held(self) -> Any:
        return stored(rows_in(self.store.client, self.store.collection_name))

    def work(self) -> tuple[Counter[str], int]:
        """What a run does, in numbers."""
        return self.proxy.counts, self.model.texts


def threads_of_runs() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if (name.startswith("milvus-") and "-io" not in name) or name.endswith("-flow")]


@pytest.fixture(params=[False, True], ids=["random-ids", "fixed-ids"])
def bench(request: pytest.FixtureRequest, fault_proxy: FaultProxy, collection_name: str) -> Iterator[Bench]:
    bench = Bench(fault_proxy, collection_name, request.param)
    yield bench
    fault_proxy.heal()
    bench.store.close()


async def cancel_once(task: asyncio.Task[Any]) -> None:
    task.cancel()


async def cancel_at_each_turn(task: asyncio.Task[Any]) -> None:
    """As anyio does it."""
    while not task.done():
        task.cancel()
        await asyncio.sleep(0)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("cancel", [cancel_once, cancel_at_each_turn])
async def test_an_ingestion_cancelled_at_any_moment_goes_on_in_nothing_and_is_completed_by_running_it_again(
    bench: Bench, cancel: Callable[[asyncio.Task[Any]], Any]
) -> None:
    chance = random.Random(SEED)
    edition: Edition = first_edition(chance, DOCUMENTS)
    loop = asyncio.get_running_loop()
    for number in range(1, TIMES + 1):
        reports: list[Any] = []

        async def run(edition: Edition = edition, reports: list[Any] = reports) -> None:
            try:
                await aingest(bench.pipeline, documents(edition), source="editions", delete_missing=True)
            except asyncio.CancelledError as cancellation:
                reports.append(getattr(cancellation, "report", None))
                raise

        running = asyncio.create_task(run())
        cancelling = []

        def strike(running: asyncio.Task[None] = running, cancelling: list[Any] = cancelling) -> None:
            loop.call_soon_threadsafe(lambda: cancelling.append(asyncio.create_task(cancel(running))))

        bench.moment.set(chance.randint(1, LATEST), strike)
        await asyncio.wait([running])
        assert running.cancelled()
        [report] = reports
        assert isinstance(report, IngestionReport) and report.documents <= DOCUMENTS
        assert not bench.store.statistics().in_flight
        await asyncio.wait(cancelling)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        await until(lambda: not bench.proxy.in_flight() and not threads_of_runs())
        before = bench.work()
        await asyncio.to_thread(bench.held)  # the store is in use, meanwhile
        after = bench.work()
        assert before[1] == after[1]
        assert {method for method, count in (after[0] - before[0]).items() if count} <= {"Query", "DescribeCollection"}

        again = await aingest(bench.pipeline, documents(edition), source="editions", delete_missing=True)
        assert again.ok
        assert bench.held() == nodes_of(edition)
        edition = next_edition(chance, edition, number)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_run_that_begins_as_another_is_cancelled_puts_in_order_what_that_has_written_last(bench: Bench) -> None:
    chance = random.Random(SEED)
    edition = first_edition(chance, DOCUMENTS)
    bench.proxy.heal()
    bench.model.moments[0] = Moment()  # one that never comes: requests alone count here
    bench.proxy.script(SlowRequest(bench.moment), method=("Upsert", "Delete"))
    loop = asyncio.get_running_loop()
    for number in range(1, 6):
        running = asyncio.create_task(aingest(bench.pipeline, documents(edition), source="editions"))
        bench.moment.set(chance.randint(1, 8), lambda task=running: loop.call_soon_threadsafe(task.cancel))  # type: ignore[misc]
        await asyncio.wait([running])
        assert running.cancelled()
        bench.moment.has_come = False
        edition = next_edition(chance, edition, 2 * number)
        await aingest(bench.pipeline, documents(edition), source="editions", delete_missing=True)
        assert bench.held() == nodes_of(edition)
        edition = next_edition(chance, edition, 2 * number + 1)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_ingestion_interrupted_by_ctrl_c_has_ended_then_and_is_completed_by_running_it_again(bench: Bench) -> None:
    chance = random.Random(SEED)
    edition = first_edition(chance, DOCUMENTS)
    for number in range(1, TIMES + 1):
        bench.moment.set(chance.randint(1, LATEST), lambda: None)

        def press() -> None:
            blocked_until(lambda: bench.moment.has_come, seconds=60)
            press_ctrl_c()

        bench.model.seconds_per_text = 0.01  # else it might be done before the key is down
        with pytest.raises(KeyboardInterrupt) as pressed, beside(press):
            ingest(bench.pipeline, documents(edition), source="editions", delete_missing=True)
        report = getattr(pressed.value, "report", None)
        assert isinstance(report, IngestionReport) and report.documents <= DOCUMENTS
        blocked_until(lambda: not bench.proxy.in_flight() and not threads_of_runs())
        before = bench.work()
        bench.held()
        after = bench.work()
        assert before[1] == after[1]
        assert {method for method, count in (after[0] - before[0]).items() if count} <= {"Query", "DescribeCollection"}

        bench.model.seconds_per_text = 0.01
        assert ingest(bench.pipeline, documents(edition), source="editions", delete_missing=True).ok
        assert bench.held() == nodes_of(edition)
        edition = next_edition(chance, edition, number)


PREPARED = textwrap.dedent(
    """
    import asyncio, gc, sys, threading
    from llama_index.core.ingestion import IngestionPipeline
    from llama_index_milvus_async_ext import AsyncMilvusVectorStore, AsyncMilvusWriter
    from llama_index_milvus_async_ext.ingestion import aingest, ingest
    from tests.embedding import HashEmbedding
    from tests.sentences import documents, splitter, text_of

    begun = threading.Event()

    class Slow(HashEmbedding):
        def _embed(self, texts):
            begun.set()
            return super()._embed(texts)

        async def _aembed(self, texts):
            begun.set()
            return await super()._aembed(texts)

    def stream():
        for number in range(100_000):
            yield from documents({f"document {number}": text_of(f"document {number}", 0, 3)})

    def stuck():
        yield from documents({"document": text_of("document", 0, 3)})
        begun.set()
        threading.Event().wait()

    async def until_begun():
        while not begun.is_set():
            await asyncio.sleep(0.01)

    store = AsyncMilvusVectorStore(uri=sys.argv[1], collection_name="c", dim=8)
    model = Slow(dim=8, seconds_per_text=0.01, blocking=False)
    pipeline = IngestionPipeline(transformations=[splitter(False), model, AsyncMilvusWriter(store)])
    """
)

ENDS = {
    "a loop that is closed meanwhile": """
        loop = asyncio.new_event_loop()
        task = loop.create_task(aingest(pipeline, stream()))
        loop.run_until_complete(until_begun())
        loop.close()
        """,
    "a loop that is closed, and the run collected": """
        loop = asyncio.new_event_loop()
        task = loop.create_task(aingest(pipeline, stream()))
        loop.run_until_complete(until_begun())
        loop.close()
        del task
        gc.collect()
        """,
    "a coroutine that is closed": """
        async def main():
            coroutine = aingest(pipeline, stream())
            coroutine.send(None)
            coroutine.close()
        asyncio.run(main())
        """,
    "asyncio.run that ends before": """
        async def main():
            task = asyncio.create_task(aingest(pipeline, stream()))
            await until_begun()
        asyncio.run(main())
        """,
    "a stream that is stuck": """
        async def main():
            task = asyncio.create_task(aingest(pipeline, stuck()))
            await until_begun()
        asyncio.run(main())
        """,
    "a thread that ingests": """
        threading.Thread(target=ingest, args=(pipeline, stream()), daemon=True).start()
        begun.wait()
        """,
    "a thread that ingests from a stream that is stuck": """
        threading.Thread(target=ingest, args=(pipeline, stuck()), daemon=True).start()
        begun.wait()
        """,
}


@pytest.mark.timeout(200)
@pytest.mark.parametrize("end", ENDS)
def test_python_ends_though_an_ingestion_is_under_way(end: str, tmp_path: Any) -> None:
    program = PREPARED + textwrap.dedent(ENDS[end]) + "\nprint('the end')\n"
    ended = programs.run(program, str(tmp_path / "ends.db"), timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "the end\n"), ended.stderr
