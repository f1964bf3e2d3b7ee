"""What an ingestion is to do: a pipeline's parts, and how the caller wants its documents dealt with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.schema import BaseNode, TransformComponent
from llama_index.core.storage.docstore.types import BaseDocumentStore
from llama_index.vector_stores.milvus import MilvusVectorStore

from llama_index_milvus_async_ext._ingest.versions import described, named_version, version_of
from llama_index_milvus_async_ext._store.partitions import named_partition


class Embedding(NamedTuple):
    """A step at which nodes get their embeddings: all, or those that have none."""

    model: BaseEmbedding
    only_missing: bool


@dataclass
class Steps:
    """The transformations of a pipeline: in groups, each followed by an embedding, but perhaps the last."""

    groups: list[list[TransformComponent]] = field(default_factory=lambda: [[]])
    embeddings: list[Embedding] = field(default_factory=list)

    @property
    def in_order(self) -> list[TransformComponent]:
        """All of them, the models in their places."""
        steps = list(self.groups[0])
        for embedding, group in zip(self.embeddings, self.groups[1:], strict=True):
            steps += [embedding.model, *group]
        return steps

    def add(self, transformation: TransformComponent) -> None:
        """Add the next one."""
        if isinstance(transformation, BaseEmbedding):
            self.add_embedding(Embedding(transformation, only_missing=False))
        else:
            self.groups[-1].append(transformation)

    def add_embedding(self, embedding: Embedding) -> None:
        """Add an embedding as the next step."""
        self.embeddings.append(embedding)
        self.groups.append([])


@dataclass(frozen=True)
class Job:
    """One ingestion.

    Attributes:
        store: Where the nodes go; a plain store is still to be taken over.
        partition: The partition that holds them; None for the default one.
        steps: What is made of a document.
        source: Name of the documents' source.
        version: The version of a document, which has this hash.
        document_id: The id of a document, if it is not its own.
        docstore, docstore_strategy: As the pipeline has them.
        deletes_missing: Whether documents of this source are deleted that the stream does not hold.
        num_workers: Worker processes for transformations.
        max_failures: How many documents may fail before the run gives up.
    """

    store: MilvusVectorStore
    partition: str | None
    steps: Steps
    source: str
    version: Callable[[BaseNode, str], str]
    document_id: Callable[[BaseNode], str] | None
    docstore: BaseDocumentStore | None
    docstore_strategy: DocstoreStrategy
    deletes_missing: bool
    num_workers: int | None
    max_failures: int | None


def job_of(
    pipeline: IngestionPipeline,
    writers: Callable[[TransformComponent], bool],
    *,
    source: str,
    version: str | Callable[[Any], str] | None,
    document_id: Callable[[Any], str] | None,
    delete_missing: bool,
    num_workers: int | None,
    max_failures: int | None,
) -> Job:
    """What a pipeline is to do; see `aingest` for the arguments.

    Args:
        pipeline: The pipeline.
        writers: Tells whether a transformation is an `AsyncMilvusWriter`.
        source: See `aingest`, as for the others.
        version: See there.
        document_id: See there.
        delete_missing: See there.
        num_workers: See there.
        max_failures: See there.

    Raises:
        TypeError, ValueError: The pipeline does not say where the nodes go, or says it twice; an argument is wrong.
    """
    if not isinstance(pipeline, IngestionPipeline):
        raise TypeError(f"pipeline must be an IngestionPipeline, got {type(pipeline).__name__}")
    if not isinstance(source, str):
        raise TypeError(f"source must be a text, got {source!r}")
    try:
        source.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"source is not valid Unicode: {error}") from None
    for name, number, least in (("num_workers", num_workers, 1), ("max_failures", max_failures, 0)):
        if number is not None and number < least:
            raise ValueError(f"{name} must be {least} or more, got {number}")
    if version is not None and not isinstance(version, str) and not callable(version):
        raise TypeError(f"version must be a text or a function of a document, got {version!r}")
    store = _store_of(pipeline, writers)
    steps = Steps()
    for each in pipeline.transformations:
        if not writers(each):
            steps.add(each)
        elif each.embed_model is not None:  # type: ignore[attr-defined]
            steps.add_embedding(Embedding(each.embed_model, only_missing=True))  # type: ignore[attr-defined]
    if version is None:
        version = described(steps.in_order)
    return Job(
        store=store,
        partition=_partition_of(pipeline, writers),
        steps=steps,
        source=source,
        version=_versions(version, source),
        document_id=document_id,
        docstore=pipeline.docstore,
        docstore_strategy=pipeline.docstore_strategy,
        deletes_missing=delete_missing,
        num_workers=num_workers,
        max_failures=max_failures,
    )


def _versions(version: str | Callable[[Any], str], source: str) -> Callable[[BaseNode, str], str]:
    if callable(version):
        return lambda document, _: named_version(version(document), document, source)
    return lambda document, hash_: version_of(document, version, source, hash_)


def _partition_of(pipeline: IngestionPipeline, writers: Callable[[TransformComponent], bool]) -> str | None:
    last: Any = pipeline.transformations[-1] if pipeline.transformations else None
    return named_partition(last.milvus_partition_name) if last is not None and writers(last) else None


def _store_of(pipeline: IngestionPipeline, writers: Callable[[TransformComponent], bool]) -> MilvusVectorStore:
    steps: Sequence[TransformComponent] = pipeline.transformations
    if any(writers(each) for each in steps[:-1]):
        raise ValueError("the AsyncMilvusWriter must be the last of the pipeline's transformations")
    stores: list[Any] = [each.vector_store for each in steps[-1:] if writers(each)]  # type: ignore[attr-defined]
    if pipeline.vector_store is not None:
        stores.append(pipeline.vector_store)
    if not stores:
        raise ValueError(
            "the pipeline does not say where the nodes go: make an AsyncMilvusWriter the last of its transformations, "
            "or give it vector_store="
        )
    for store in stores:
        if not isinstance(store, MilvusVectorStore):
            raise TypeError(
                "the pipeline's vector_store must be an AsyncMilvusVectorStore or a MilvusVectorStore, "
                f"got {type(store).__name__}"
            )
    first: MilvusVectorStore = stores[0]
    if any(store is not first for store in stores):
        raise ValueError("the pipeline has an AsyncMilvusWriter and another vector_store: give it one of them")
    return first
