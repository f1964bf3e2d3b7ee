"""Ingestion: a stream of documents through a standard pipeline, kept in step with the collection."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import itertools
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable
from typing import Any, Literal, TypeVar, cast

from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import BaseNode, Document, TransformComponent
from llama_index_instrumentation import get_dispatcher

from llama_index_milvus_async_ext._flow.threads import Calls, OwnThread, WaitingThread
from llama_index_milvus_async_ext._ingest.embedding import Embed, awaiting, blocking
from llama_index_milvus_async_ext._ingest.job import Job, job_of
from llama_index_milvus_async_ext._ingest.reading import Reading
from llama_index_milvus_async_ext._ingest.run import Ingestion
from llama_index_milvus_async_ext._ingest.tally import Tally
from llama_index_milvus_async_ext._ingest.transforming import Transforming
from llama_index_milvus_async_ext._lane.port import LoopPort
from llama_index_milvus_async_ext._lane.thread import IoThread
from llama_index_milvus_async_ext._store import calls
from llama_index_milvus_async_ext._store.partitions import check_partition
from llama_index_milvus_async_ext.ingestion_report import FailedDocument, IngestionError, IngestionReport
from llama_index_milvus_async_ext.vector_store import AsyncMilvusVectorStore
from llama_index_milvus_async_ext.writer import AsyncMilvusWriter

__all__ = ["FailedDocument", "IngestionError", "IngestionReport", "aingest", "ingest"]

dispatcher = get_dispatcher(__name__)

Documents = Iterable[Any] | AsyncIterable[Any]
Version = str | Callable[[Document], str]
F = TypeVar("F", bound=Callable[..., Any])


def _in_a_span(function: F) -> F:
    """Give a function a span, but let it stay a function: what `dispatcher.span` makes of it can't be pickled.

    Ray, as others do, pickles what a task of the main module refers to.
    """
    spanned = dispatcher.span(function)

    @functools.wraps(function)
    async def awaited(*args: Any, **kwargs: Any) -> Any:
        return await spanned(*args, **kwargs)

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        return spanned(*args, **kwargs)

    return cast(F, awaited if inspect.iscoroutinefunction(function) else called)


@_in_a_span
async def aingest(
    pipeline: IngestionPipeline,
    documents: Documents,
    *,
    source: str = "",
    delete_missing: bool = False,
    version: Version | None = None,
    document_id: Callable[[Document], str] | None = None,
    num_workers: int | None = None,
    on_failure: Literal["raise", "collect"] = "raise",
    max_failures: int | None = None,
    show_progress: bool = False,
) -> IngestionReport:
    """Run a pipeline over a stream of documents, and keep the collection in step with it.

        pipeline = IngestionPipeline(transformations=[SentenceSplitter(), embed_model, AsyncMilvusWriter(store)])
        reader = SimpleDirectoryReader("papers", filename_as_id=True)
        report = await aingest(pipeline, reader.iter_data(), source="papers", delete_missing=True)

    When a run ends without failures, the collection holds exactly what the stream held; until then each document is
    there in its old or its new version. So a run that failed, was cancelled or was killed is completed by running it
    again: what is there already, whole and in the wanted version, costs a look-up, and is not embedded again.

    Documents are read, split, embedded and written at the same time, a bounded number of each, so that the whole takes
    about as long as the slowest of these, and memory does not grow with the corpus. A changed document is written
    first, and its earlier nodes are deleted then. One that fails (its text can't be split, the model refuses it, a
    node can't be stored) is reported, and costs no other.

    The collection itself is the record of what it holds: each row carries, in a dynamic field `_ingestion`, the version
    of its document, a digest of the ids of the nodes that it was written with, and the source. Rows stay readable by
    the plain store.

    Where the writer names a partition (`milvus_partition_name`), all of this is about that partition alone: other
    partitions may hold documents of the same ids (but on Milvus Lite a node's id is in one partition only).

    Each document goes through the transformations alone. The pipeline's cache is not used.

    Args:
        pipeline: A standard pipeline, whose last transformation is an `AsyncMilvusWriter`, or which has a
            `vector_store` (an `AsyncMilvusVectorStore`, or a plain one, which is taken over for the run). Its
            `docstore` is told of documents once they are acknowledged; its `documents` and `readers` are read as well.
        documents: Any iterable or async iterable of documents, or of lists of them. An iterable is read in a thread of
            its own (by `ingest`: in the caller's). A document's id must be the same in every run.
        source: A name for where these documents come from.
        delete_missing: Whether to delete the documents of this source that the stream did not hold: only after it was
            read to its end, without an error, and was not empty; never those of other sources.
        version: What stands for the transformations, instead of their settings: change it, and all documents are
            ingested again. Or a function that gives the whole version of a document (an ETag, a time stamp).
        document_id: Gives the id of a document, where its own is not the same in every run.
        num_workers: Run the transformations in so many worker processes, instead of in threads. (Guard the main module
            by `if __name__ == "__main__"`, and use transformations that pickle.)
        on_failure: "raise" does all that can be done, then raises `IngestionError`; "collect" returns the report.
        max_failures: Give up, and read no further, when more than this many documents have failed.
        show_progress: Whether to show a progress bar.

    Returns:
        What became of the documents.

    Raises:
        IngestionError: With `on_failure="raise"`, if any document failed; it carries the report. (From
            `llama_index_milvus_async_ext.ingestion`.)
        ValueError, TypeError: The pipeline does not say where nodes go, or the collection can't hold the record.
        BaseException: A cancellation carries the report so far in its attribute `report`; `IngestionReport.of(error)`
            finds it behind other errors, too.
    """
    _check(documents, on_failure)
    job = job_of(
        pipeline,
        _is_writer,
        source=source,
        version=version,
        document_id=document_id,
        delete_missing=delete_missing,
        num_workers=num_workers,
        max_failures=max_failures,
    )
    with (
        contextlib.closing(OwnThread("milvus-read")) as reader,
        contextlib.closing(OwnThread("milvus-embed")) as embedder,
        Tally.shown(show_progress, documents, job.max_failures) as tally,
    ):
        embed = [awaiting(each.model, embedder) for each in job.steps.embeddings]
        report = await _run(job, _all_of(pipeline, documents), reader, embed, tally, awaits=True)
    if on_failure == "raise":
        report.raise_for_failures()
    return report


@_in_a_span
def ingest(
    pipeline: IngestionPipeline,
    documents: Documents,
    *,
    source: str = "",
    delete_missing: bool = False,
    version: Version | None = None,
    document_id: Callable[[Document], str] | None = None,
    num_workers: int | None = None,
    on_failure: Literal["raise", "collect"] = "raise",
    max_failures: int | None = None,
    show_progress: bool = False,
) -> IngestionReport:
    """As `aingest`, blocking; also where an event loop runs, as in a notebook.

    The documents are read in the calling thread, and each model's blocking method is called, one call at a time.
    """
    _check(documents, on_failure)
    job = job_of(
        pipeline,
        _is_writer,
        source=source,
        version=version,
        document_id=document_id,
        delete_missing=delete_missing,
        num_workers=num_workers,
        max_failures=max_failures,
    )
    with (
        contextlib.closing(OwnThread("milvus-embed")) as embedder,
        Tally.shown(show_progress, documents, job.max_failures) as tally,
    ):
        embed = [blocking(each.model, embedder) for each in job.steps.embeddings]
        stream = _all_of(pipeline, documents)
        report = WaitingThread().run(lambda here: _run(job, stream, here, embed, tally, awaits=False))
    if on_failure == "raise":
        report.raise_for_failures()
    return report


def _check(documents: Documents, on_failure: str) -> None:
    if not isinstance(documents, (Iterable, AsyncIterable)) or isinstance(documents, (str, bytes, BaseNode)):
        raise TypeError(f"documents must be an iterable or an async iterable, got {type(documents).__name__}")
    if on_failure not in ("raise", "collect"):
        raise ValueError(f'on_failure must be "raise" or "collect", got {on_failure!r}')


async def _run(
    job: Job, stream: Documents, reader: Calls, embed: list[Embed], tally: Tally, *, awaits: bool
) -> IngestionReport:
    transforming = Transforming(job.steps.groups, job.num_workers, awaits)
    transforming.check()
    try:
        async with _opened(job) as store:
            connected, port = store.live(), LoopPort.current()
            with connected.held(port), IoThread.get().taking_turns():
                await check_partition(store, connected, port, job.partition)
                schema = await calls.schema(store, connected, port)
                if not schema.dynamic:
                    raise ValueError(
                        f"collection {store.collection_name!r} has no dynamic field, where the record of what it holds "
                        "would be kept; use a collection that this store has made"
                    )
                if schema.primary_key.auto_id:
                    raise ValueError(
                        f"collection {store.collection_name!r} makes its primary keys up itself, so that nobody could "
                        "tell whether a document is there whole; use a collection that this store has made"
                    )
                reading = Reading(stream, reader)
                run = Ingestion(job, store, connected, port, reading, transforming, embed, tally)
                await run.run(schema.primary_key.name)
        return tally.report()
    finally:
        transforming.close()


@contextlib.asynccontextmanager
async def _opened(job: Job) -> AsyncIterator[AsyncMilvusVectorStore]:
    """The job's store; a plain one is taken over, for as long as this takes."""
    if isinstance(job.store, AsyncMilvusVectorStore):
        yield job.store
    else:
        async with AsyncMilvusVectorStore.from_vector_store(job.store) as store:
            yield store


def _all_of(pipeline: IngestionPipeline, documents: Documents) -> Documents:
    """The documents, and those that the pipeline brings itself."""
    if not pipeline.documents and not pipeline.readers:
        return documents
    own = itertools.chain(pipeline.documents or (), (reader.read() for reader in pipeline.readers or ()))
    if isinstance(documents, AsyncIterable):
        return _after(documents, own)
    return itertools.chain(documents, own)


async def _after(first: AsyncIterable[Any], then: Iterable[Any]) -> AsyncIterator[Any]:
    async for element in first:
        yield element
    iterator, ended = iter(then), object()
    while (element := await asyncio.to_thread(next, iterator, ended)) is not ended:
        yield element


def _is_writer(transformation: TransformComponent) -> bool:
    return isinstance(transformation, AsyncMilvusWriter)
