"""The worker processes of an ingestion: they last no longer than their run, nor than the process that began it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from llama_index.core.schema import BaseNode

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, AsyncMilvusWriter
from tests import programs
from tests.ingesting import Ingest, Lines, Model, both, counts, doc, docs, expected, held, writing_to
from tests.waiting import blocked_until

_HANGING = """
import asyncio
import os
import sys
import time

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, AsyncMilvusWriter, aingest
from tests.ingesting import DIM, Lines, Model, doc, docs, writing_to


class Hanging(Lines):
    def __call__(self, nodes, **kwargs):
        for node in nodes:
            if "hangs" in node.metadata:
                open(node.metadata["hangs"], "w").close()
                time.sleep(600)
        return super().__call__(nodes)


async def main():
    uri, told, way = sys.argv[1:]
    async with await AsyncMilvusVectorStore.aopen(uri=uri, dim=DIM) as store:
        pipeline = writing_to(store, transformations=[Hanging(), Model(), AsyncMilvusWriter(store)])
        run = asyncio.create_task(aingest(pipeline, [doc("d", "text", hangs=told), *docs(5)], num_workers=2))
        while not (os.path.exists(told) or run.done()):
            await asyncio.sleep(0.01)
        print("it hangs", flush=True)
        sys.stdin.readline()
        assert run.cancel()
        await asyncio.wait([run])


if __name__ == "__main__":
    asyncio.run(main())
    print("main has ended", flush=True)
"""


def has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE  # which nobody has looked at yet
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("way", ["SIGKILL", "SIGTERM", "cancelled"])
def test_a_worker_that_hangs_ends_with_its_run_and_with_its_parent(tmp_path: Path, way: str) -> None:
    script = tmp_path / "hanging.py"
    script.write_text(_HANGING)
    environment = {**os.environ, "PYTHONPATH": str(programs.ROOT)}
    arguments = [str(tmp_path / "own.db"), str(tmp_path / "told"), way]
    with programs.start(script, *arguments, environment=environment) as program:
        assert program.stdout.readline() == "it hangs\n"
        children = psutil.Process(program.pid).children(recursive=True)
        try:
            assert children
            if way == "cancelled":
                program.stdin.write("\n")
                program.stdin.flush()
                assert program.stdout.readline() == "main has ended\n"
            else:
                os.kill(program.pid, getattr(signal, way))
            program.wait(60)  # what hangs, hangs for ten minutes
            blocked_until(lambda: all(map(has_ended, children)))
        finally:
            for child in children:
                if not has_ended(child):
                    child.kill()


class Raising(Lines):
    """Raises what a document asks for."""

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[BaseNode]:
        for node in nodes:
            if node.get_content() == "exit":
                sys.exit(3)
            if node.get_content() == "key":
                raise KeyError("in the worker")
        return super().__call__(nodes)


@both
def test_whatever_a_transformation_raises_in_a_worker_costs_its_document_alone(
    store: AsyncMilvusVectorStore, run: Ingest
) -> None:
    pipeline = writing_to(store, transformations=[Raising(), Model(), AsyncMilvusWriter(store)])
    documents = [doc("exit", "exit"), doc("key", "key"), *docs(5)]
    report = run(pipeline, documents, num_workers=1, on_failure="collect")
    assert counts(report) == (5, 0, 0, 0, 2)
    errors = {each.document_id: each.error for each in report.failed}
    assert isinstance(errors["exit"], RuntimeError) and "SystemExit" in str(errors["exit"])
    assert isinstance(errors["key"], KeyError)
    assert "raise KeyError" in str(errors["key"].__cause__), "where it was raised, in the worker"
    assert held(store) == expected(docs(5))
    blocked_until(lambda: all("spawn_main" not in " ".join(each.cmdline()) for each in alive_children()))


def alive_children() -> list[psutil.Process]:
    return [each for each in psutil.Process().children() if not has_ended(each)]
