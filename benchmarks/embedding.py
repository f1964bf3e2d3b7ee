"""Embedding in the writer: whether embedding and writing together take as long as the slower of the two."""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.schema import BaseNode, MetadataMode

from benchmarks.backend import Backend
from benchmarks.corpus import make_nodes, make_vectors
from benchmarks.measure import Figure, Outcome, Side, Timing, alternate, seconds, timed
from llama_index_milvus_async_ext import AsyncMilvusWriter

_TEXTS_PER_BATCH = 100
_CALIBRATIONS = 3


class SleepingEmbedding(BaseEmbedding):
    """Takes wall time and next to no CPU, as a model on another machine or a GPU does: one batch at a time.

    Of texts that it has been taught, it knows the vectors: to draw them would take as much CPU time as to write them.
    """

    seconds_per_batch: float
    dim: int
    _known: dict[str, list[float]] = PrivateAttr(default_factory=dict)
    _turn: asyncio.Lock = PrivateAttr(default_factory=asyncio.Lock)

    def learn(self, nodes: list[BaseNode]) -> None:
        self._known.update((node.get_content(MetadataMode.EMBED), node.get_embedding()) for node in nodes)

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        time.sleep(self.seconds_per_batch)
        return self._vectors(texts)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        async with self._turn:
            await asyncio.sleep(self.seconds_per_batch)
        return self._vectors(texts)

    def _vectors(self, texts: list[str]) -> list[list[float]]:
        if self._known:
            return [self._known[text] for text in texts]
        return list(make_vectors(len(texts), self.dim))

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embeddings([query])[0]

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return (await self._aget_text_embeddings([query]))[0]


async def run(backend: Backend, *, dim: int, rounds: int, count: int, is_quick: bool) -> Outcome:
    """Embed and write `count` nodes, by the pipeline's async way and, unless in a quick run, by its sync one."""
    outcome = Outcome(series={"count": count})
    for is_async in (True,) if is_quick else (True, False):
        way = "async" if is_async else "sync"
        timings = await _compare(backend, dim, rounds, count, is_async)
        slower = [max(pair) for pair in zip(seconds(timings["embed"]), seconds(timings["write"]), strict=True)]
        relative = [both / alone for both, alone in zip(seconds(timings["both"]), slower, strict=True)]
        outcome.figures.append(
            Figure(
                f"writer with `embed_model`, embedding as slow as writing, {way}",
                "the slower of the two alone",
                1.1,
                relative,
                True,
            )
        )
        outcome.series[way] = {name: seconds(taken) for name, taken in timings.items()}
    return outcome


async def _compare(backend: Backend, dim: int, rounds: int, count: int, is_async: bool) -> dict[str, list[Timing]]:
    bare = make_nodes(count, dim, embedded=False)
    embedded = make_nodes(count, dim)
    model = SleepingEmbedding(model_name="sleeping", embed_batch_size=_TEXTS_PER_BATCH, seconds_per_batch=0.0, dim=dim)
    model.learn(embedded)

    def writing(nodes: list[BaseNode], embed_model: BaseEmbedding | None) -> Side:
        async def measure() -> Timing:
            async with backend.ours(dim) as store:
                writer = AsyncMilvusWriter(store, embed_model=embed_model)

                async def work() -> Any:
                    return await writer.acall(nodes) if is_async else writer(nodes)

                timing = await timed(work)
                backend.check_stored(store.collection_name, nodes)
            if embed_model is not None:
                forget_embeddings(nodes)
            return timing

        return measure

    async def embed() -> Timing:
        """The model as a step of its own, as LlamaIndex has it."""

        async def work() -> Any:
            return await model.acall(bare) if is_async else model(bare)

        timing = await timed(work)
        forget_embeddings(bare)
        return timing

    write = writing(embedded, None)
    alone = await alternate({"write": write, "embed": embed}, _CALIBRATIONS)
    wanted = statistics.median(seconds(alone["write"])) - statistics.median(seconds(alone["embed"]))
    batches = -(-count // _TEXTS_PER_BATCH)
    model.seconds_per_batch = max(wanted, 0.0) / batches
    return await alternate({"write": write, "embed": embed, "both": writing(bare, model)}, rounds)


def forget_embeddings(nodes: list[BaseNode]) -> None:
    for node in nodes:
        node.embedding = None
