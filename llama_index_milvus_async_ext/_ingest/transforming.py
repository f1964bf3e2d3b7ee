"""From a document to its nodes: a pipeline's transformations, one document at a time."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import llama_index.core
from llama_index.core.node_parser import NodeParser
from llama_index.core.schema import BaseNode, TransformComponent

from llama_index_milvus_async_ext._flow.awaiting import awaited
from llama_index_milvus_async_ext._flow.foreign import as_error
from llama_index_milvus_async_ext._flow.starting import start
from llama_index_milvus_async_ext._flow.threads import OwnThread
from llama_index_milvus_async_ext._ingest.versions import described
from llama_index_milvus_async_ext.ingestion_report import that_pickles

_DEATHS = 2  # of workers that were given their first document
_THREADS = 2  # one to work, one to wait: Python runs one at a time

_of_this_process: list[Sequence[TransformComponent]] = []


class Transforming:
    """Runs transformations in threads, or in worker processes.

    Each document goes through them alone: so what is made of it does not depend on its neighbours, and what fails,
    fails alone.

    Args:
        groups: Transformations that follow each other, in groups between which the nodes are embedded.
        num_workers: Worker processes; None for threads of this one.
        awaits: Whether a transformation that has an async method of its own is awaited instead.
    """

    def __init__(self, groups: Sequence[Sequence[TransformComponent]], num_workers: int | None, awaits: bool) -> None:
        self.at_once = num_workers or _THREADS
        self._groups = groups
        self._num_workers = num_workers
        self._awaits = awaits and not num_workers
        self._idle: list[OwnThread] = []
        self._executor: ProcessPoolExecutor | None = None
        self._calls: dict[ProcessPoolExecutor, set[Future[list[BaseNode]]]] = {}
        self._alone = asyncio.Lock()
        self._has_worked = False
        self._deaths = 0
        self._dead: RuntimeError | None = None

    def check(self) -> None:
        """Look whether worker processes get what they need: what does not pickle, LlamaIndex leaves out without a word.

        Raises:
            ValueError: A transformation arrives there as another.
        """
        for each in itertools.chain(*self._groups) if self._num_workers else ():
            try:
                arrived = pickle.loads(pickle.dumps(each))
                is_same = described([arrived]) == described([each])
            except Exception as error:
                raise ValueError(f"{type(each).__name__} does not pickle ({error}): leave num_workers out") from error
            if not is_same:
                raise ValueError(
                    f"{type(each).__name__} arrives in a worker process with other settings, as some of them do not "
                    "pickle (a lambda, perhaps): use functions of a module, or leave num_workers out"
                )

    async def transform(self, group: int, nodes: list[BaseNode]) -> list[BaseNode]:
        """What the transformations of a group make of these nodes.

        Raises:
            Exception: Whatever one of them raises.
            BrokenProcessPool: The worker process died of them, twice.
        """
        transformations = self._groups[group]
        if self._num_workers:
            return await self._in_process(group, nodes)
        waiting: list[TransformComponent] = []
        for each in transformations:
            if not (self._awaits and _is_async(each)):
                waiting.append(each)
                continue
            nodes = await self._in_thread(waiting, nodes)
            waiting = []
            nodes = list(await awaited(each.acall(nodes), type(each).__name__))
        return await self._in_thread(waiting, nodes)

    def close(self) -> None:
        """Begin nothing more; what is under way is not waited for."""
        for thread in self._idle:
            thread.close()
        if self._executor is not None:
            self._let_go(self._executor)

    async def _in_thread(self, transformations: Sequence[TransformComponent], nodes: list[BaseNode]) -> list[BaseNode]:
        if not transformations:
            return nodes
        thread = self._idle.pop() if self._idle else OwnThread("milvus-transform")
        try:
            return await thread.call(contextvars.copy_context().run, transformed, transformations, nodes)
        finally:
            self._idle.append(thread)  # what was cancelled goes on: the next call waits for its end

    async def _in_process(self, group: int, nodes: list[BaseNode]) -> list[BaseNode]:
        if self._dead is not None:
            raise self._dead
        executor = self._processes()
        try:
            made = await self._called(executor, group, nodes)
            self._has_worked = True
            return made
        except BrokenProcessPool:
            pass
        # Each document that was with the workers finds them dead, and one of them was the cause.
        async with self._alone:
            if self._executor is executor:
                self._let_go(executor)
                self._executor = None
            if self._dead is not None:
                raise self._dead
            alone = self._new_processes(1)
            try:
                made = await self._called(alone, group, nodes)
            except BrokenProcessPool as error:
                self._note_death(error)
                raise
            finally:
                self._let_go(alone)
            self._has_worked = True
            return made

    async def _called(self, executor: ProcessPoolExecutor, group: int, nodes: list[BaseNode]) -> list[BaseNode]:
        call = executor.submit(_transformed_here, group, nodes)
        calls = self._calls.setdefault(executor, set())
        calls.add(call)
        call.add_done_callback(calls.discard)
        return await asyncio.wrap_future(call)

    def _let_go(self, executor: ProcessPoolExecutor) -> None:
        """Begin nothing more; workers that are still at work are killed: nobody knows when they would return.

        Python's exit would wait for them.
        """
        # There is no public way to them before Python 3.14.
        workers = list((getattr(executor, "_processes", None) or {}).values())
        executor.shutdown(wait=False, cancel_futures=True)
        if any(call.running() for call in list(self._calls.pop(executor, ()))):
            for worker in workers:
                worker.kill()

    def _note_death(self, error: BrokenProcessPool) -> None:
        """Begin no more workers if none has ever worked: each further document would cost seconds."""
        self._deaths += 1
        if not self._has_worked and self._deaths >= _DEATHS:
            self._dead = RuntimeError(
                "no worker process could be begun: guard the main module by "
                'if __name__ == "__main__", or leave num_workers out'
            )
            self._dead.__cause__ = error

    def _processes(self) -> ProcessPoolExecutor:
        if self._executor is None:
            self._executor = self._new_processes(self._num_workers or 1)
        return self._executor

    def _new_processes(self, number: int) -> ProcessPoolExecutor:
        # Spawned, as forked ones would inherit what gRPC's threads hold.
        pickled = pickle.dumps([list(group) for group in self._groups])
        return ProcessPoolExecutor(
            number, multiprocessing.get_context("spawn"), initializer=_begin_process, initargs=(pickled,)
        )


def transformed(transformations: Sequence[TransformComponent], nodes: list[BaseNode]) -> list[BaseNode]:
    """What the transformations make of these nodes, one after the other."""
    for each in transformations:
        try:
            nodes = list(each(nodes))
        except StopIteration as error:  # which no future takes: whoever waits for it would wait for ever
            raise as_error(error, type(each).__name__) from error
    return nodes


def _is_async(transformation: TransformComponent) -> bool:
    """Whether its async method waits for something; LlamaIndex's own default, and that of splitters, only works."""
    return type(transformation).acall is not TransformComponent.acall and not isinstance(transformation, NodeParser)


def _begin_process(pickled_groups: bytes) -> None:
    start(threading.Thread(target=_end_with_parent, daemon=True))
    # A splitter that is unpickled loads its tokenizer, and asks the net for it unless this names LlamaIndex's own copy.
    cache = Path(llama_index.core.__file__).parent / "_static" / "tiktoken_cache"
    if cache.is_dir():
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(cache))
    _of_this_process[:] = pickle.loads(pickled_groups)


def _end_with_parent() -> None:
    """End when the process that began this one does: if that was killed, nobody else tells a worker to end."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _transformed_here(group: int, nodes: list[BaseNode]) -> list[BaseNode]:
    try:
        return transformed(_of_this_process[group], nodes)
    except BaseException as raised:
        returned = that_pickles(as_error(raised, "a transformation"))  # another would take the pool along
        if returned is raised:
            raise
        raise returned from None
