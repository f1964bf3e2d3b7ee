"""The writer: a step of an ingestion pipeline that stores what passes through it."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Literal

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import Field, PrivateAttr, SerializeAsAny
from llama_index.core.embeddings.utils import EmbedType, resolve_embed_model
from llama_index.core.schema import BaseNode, TransformComponent
from llama_index.vector_stores.milvus import MilvusVectorStore
from llama_index_instrumentation import get_dispatcher
from tqdm import tqdm

from llama_index_milvus_async_ext._lane.items import CancelledCallError
from llama_index_milvus_async_ext._lane.port import LoopPort
from llama_index_milvus_async_ext._lane.thread import IoThread
from llama_index_milvus_async_ext._lane.thread_port import ThreadPort
from llama_index_milvus_async_ext._milvus.session import Connected
from llama_index_milvus_async_ext._store.parts import HandedOver, Part
from llama_index_milvus_async_ext._store.writing import PendingWrite
from llama_index_milvus_async_ext.report import FailedNode, WriteReport
from llama_index_milvus_async_ext.vector_store import AsyncMilvusVectorStore

dispatcher = get_dispatcher(__name__)

_NODES_PER_PART = 2_000
# Two parts of two batches are with the model at once: it begins on one while the other's outcome is dealt with.
_PARTS_AT_ONCE = 2
_EMBED_BATCHES_PER_PART = 2
# Of the event loop: enough for a new task to begin, for what it submits to cross to the I/O thread (3), and for what a
# model that blocks the loop has embedded to come out of LlamaIndex's tasks (4).
_TURNS = 8


class AsyncMilvusWriter(TransformComponent):
    """Writes the nodes that pass through a pipeline to Milvus, and passes them on.

        pipeline = IngestionPipeline(transformations=[SentenceSplitter(), embed_model, AsyncMilvusWriter(store)])
        nodes = await pipeline.arun(documents=documents)

    Use it as the last step, for sync and async runs. It returns the same nodes in the same order. The pipeline's cache
    never skips it: each run writes. With `embed_model` it also embeds the nodes that have no embedding, while it
    writes those that have one, so that the whole takes about as long as the slower of the two. An async run has up to
    four of the model's batches under way at once; the model's own `num_workers`, if set, is kept to.

    Args:
        vector_store: An `AsyncMilvusVectorStore`; a plain `MilvusVectorStore` is taken over with its connection.
        embed_model: Embeds nodes without an embedding; as `Settings.embed_model` takes it.
        on_failure: "raise" writes all that can be written, then raises `WriteError`; "collect" raises for no node, and
            leaves the outcome in `last_report`.
        show_progress: Whether to show a progress bar.

    Raises:
        WriteError: With `on_failure="raise"`, if any node was not written; it carries the report.
    """

    vector_store: AsyncMilvusVectorStore = Field(description="Where the nodes go.")
    embed_model: SerializeAsAny[BaseEmbedding] | None = Field(
        default=None, description="Embeds nodes that have no embedding."
    )
    on_failure: Literal["raise", "collect"] = Field(default="raise", description="What to do about unwritten nodes.")
    show_progress: bool = Field(default=False, description="Whether to show a progress bar.")

    _last_report: WriteReport | None = PrivateAttr(default=None)

    def __init__(
        self,
        vector_store: MilvusVectorStore,
        embed_model: EmbedType | None = None,
        on_failure: Literal["raise", "collect"] = "raise",
        show_progress: bool = False,
        **kwargs: Any,
    ) -> None:
        if not isinstance(vector_store, MilvusVectorStore):
            raise TypeError(
                "vector_store must be an AsyncMilvusVectorStore or a MilvusVectorStore, "
                f"got {type(vector_store).__name__}"
            )
        super().__init__(  # type: ignore[call-arg]
            vector_store=AsyncMilvusVectorStore.from_vector_store(vector_store),
            embed_model=resolve_embed_model(embed_model) if embed_model is not None else None,
            on_failure=on_failure,
            show_progress=show_progress,
            **kwargs,
        )

    @classmethod
    def class_name(cls) -> str:
        """Name of the class, as LlamaIndex stores it."""
        return "AsyncMilvusWriter"

    @property
    def last_report(self) -> WriteReport | None:
        """What became of the nodes of the last call; None before the first, and where worker processes wrote."""
        return self._last_report

    @dispatcher.span
    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Write nodes, blocking; see the class."""
        connected = self.vector_store.live()
        with connected.held(ThreadPort()):
            return self._written(connected, nodes)

    def _written(self, connected: Connected, nodes: Sequence[BaseNode]) -> Sequence[BaseNode]:
        started = time.perf_counter()
        handed_over = HandedOver(self._least_nodes())
        pending: list[PendingWrite] = []
        try:
            with self._bar(nodes) as bar, self._taking_turns():
                for part in self._parts(nodes):
                    part.embed_with(self._embed)
                    ready = handed_over.ready_after(part, all(written.done() for written in reversed(pending)))
                    if ready is not None:
                        pending.append(PendingWrite(self.vector_store, connected, ready.nodes))
                        pending[-1].begin()
                for written, ready in zip(pending, handed_over.parts, strict=True):
                    ready.finish(written)
                    bar.update(len(ready.nodes))
        except BaseException as interruption:
            for written, ready in zip(pending, handed_over.parts, strict=False):
                ready.report = ready.report or written.cancel()
            interruption.report = self._note_interrupted(nodes, handed_over.parts, started)  # type: ignore[attr-defined]
            raise
        return self._finish(nodes, handed_over.parts, started)

    @dispatcher.span
    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Write nodes; see the class.

        If the call is cancelled, `last_report` tells what became of each node.
        """
        connected, port = self.vector_store.live(), LoopPort.current()
        with connected.held(port):
            return await self._awritten(connected, port, nodes)

    async def _awritten(self, connected: Connected, port: LoopPort, nodes: Sequence[BaseNode]) -> Sequence[BaseNode]:
        started = time.perf_counter()
        handed_over = HandedOver(self._least_nodes())
        pending: list[asyncio.Task[None]] = []
        try:
            with self._bar(nodes) as bar:
                with self._taking_turns():
                    async with contextlib.aclosing(self._aembedded(self._parts(nodes))) as embedded:
                        async for part in embedded:
                            ready = handed_over.ready_after(part, all(task.done() for task in reversed(pending)))
                            if ready is not None:
                                write = ready.awrite(self.vector_store, connected, port)
                                pending.append(asyncio.create_task(write))
                                pending[-1].add_done_callback(ready.counted_on(bar))
                                await _turns()  # before an embedding model may block this loop
                await asyncio.gather(*pending)
        except BaseException as interruption:
            for task in pending:
                task.cancel()
            await _all_ended(pending)
            interruption.report = self._note_interrupted(nodes, handed_over.parts, started)  # type: ignore[attr-defined]
            raise
        return self._finish(nodes, handed_over.parts, started)

    async def _aembedded(self, parts: list[Part]) -> AsyncGenerator[Part, None]:
        """The parts in their order, each once it is embedded; the next one is with the model by then."""
        at_once = 1 if self.embed_model is None or self.embed_model.num_workers else _PARTS_AT_ONCE
        waiting = deque(parts)
        embedding: deque[tuple[Part, asyncio.Task[None]]] = deque()
        try:
            while waiting or embedding:
                while waiting and len(embedding) < at_once:
                    part = waiting.popleft()
                    embedding.append((part, asyncio.create_task(part.aembed_with(self._aembed))))
                    await _turns()
                    if embedding[0][1].done():  # the model blocks the loop: first hand over what it has embedded
                        break
                part, task = embedding.popleft()
                await task
                yield part
        finally:
            for _, task in embedding:
                task.cancel()
            await asyncio.gather(*(task for _, task in embedding), return_exceptions=True)

    def _note(self, parts: Sequence[Part], started: float) -> WriteReport:
        """What is known of the parts, kept as the last report."""
        known = [part.explained() for part in parts if part.report is not None]
        self._last_report = WriteReport.merged(known, time.perf_counter() - started)
        return self._last_report

    def _note_interrupted(self, nodes: Sequence[BaseNode], parts: Sequence[Part], started: float) -> WriteReport:
        """What is known of the parts; what was not handed to the store was not written."""
        known = [part for part in parts if part.report is not None]
        report = self._note(known, started)
        error = CancelledCallError("the call was interrupted before this was sent")
        rest = nodes[sum(len(part.nodes) for part in known) :]
        report.failed.extend(FailedNode(node, error, 0, True) for node in rest)
        return report

    def _finish(self, nodes: Sequence[BaseNode], parts: Sequence[Part], started: float) -> Sequence[BaseNode]:
        report = self._note(parts, started)
        if self.on_failure == "raise":
            report.raise_for_failures()
        return nodes

    def _parts(self, nodes: Sequence[BaseNode]) -> list[Part]:
        """Cut the nodes into parts, each of a few embedding batches, so that embedding and writing overlap."""
        if self.embed_model is None:
            size = _NODES_PER_PART if self.show_progress else max(len(nodes), 1)
            return [Part(list(nodes[start : start + size]), []) for start in range(0, len(nodes), size)]
        concurrent = self.embed_model.num_workers or _EMBED_BATCHES_PER_PART
        most_missing = self.embed_model.embed_batch_size * concurrent
        parts = [Part([], [])]
        for node in nodes:
            if len(parts[-1].missing) >= most_missing or len(parts[-1].nodes) >= _NODES_PER_PART:
                parts.append(Part([], []))
            parts[-1].nodes.append(node)
            if node.embedding is None:
                parts[-1].missing.append(node)
        parts[-1].is_last = True
        return parts

    def _least_nodes(self) -> int:
        """Nodes that are worth a request while others are under way."""
        # Half a full one: with whole ones the server has less to do while the model works, and more at the end (both
        # together took 5 to 8 % longer).
        return 1 if self.embed_model is None else max(self.vector_store.batch_size // 2, 1)

    def _embed(self, texts: list[str]) -> list[list[float]]:
        assert self.embed_model is not None
        return self.embed_model.get_text_embedding_batch(texts)

    async def _aembed(self, texts: list[str]) -> list[list[float]]:
        assert self.embed_model is not None
        return await self.embed_model.aget_text_embedding_batch(texts)

    def _taking_turns(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.embed_model is None else IoThread.get().taking_turns()

    def _bar(self, nodes: Sequence[BaseNode]) -> Any:
        what = "Embedding and writing" if self.embed_model is not None else "Writing"
        return tqdm(total=len(nodes), desc=f"{what} to Milvus", unit="node", disable=not self.show_progress)

    # --- copies and descriptions

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """A description without secrets, different at each call: pipelines cache by it, and must never skip a write."""
        return {
            "class_name": self.class_name(),
            "collection_name": self.vector_store.collection_name,
            "on_failure": self.on_failure,
            "call": uuid.uuid4().hex,
        }

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # pydantic's way would drop, without a word, what does not pickle.
        return (type(self), (self.vector_store, self.embed_model, self.on_failure, self.show_progress))

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> AsyncMilvusWriter:
        return type(self)(copy.deepcopy(self.vector_store), self.embed_model, self.on_failure, self.show_progress)

    def __repr_args__(self) -> Any:
        # An embedding model's own repr may show its API key.
        yield "collection_name", self.vector_store.collection_name
        yield "uri", self.vector_store.uri
        yield "embed_model", type(self.embed_model).__name__ if self.embed_model is not None else None
        yield "on_failure", self.on_failure


async def _all_ended(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Wait for cancelled tasks, also if this one is cancelled again and again."""
    while not all(task.done() for task in tasks):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # looked at: the first one has been raised


async def _turns() -> None:
    for _ in range(_TURNS):
        await asyncio.sleep(0)
