"""What tests of ingestion share: small documents, a splitter and a model that fail when they are told to, and rows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import BaseNode, Document, NodeRelationship, TextNode, TransformComponent
from llama_index.vector_stores.milvus import MilvusVectorStore

from llama_index_milvus_async_ext import AsyncMilvusWriter
from llama_index_milvus_async_ext.ingestion import IngestionReport, aingest, ingest
from tests.embedding import HashEmbedding

DIM = 8

Ingest = Callable[..., IngestionReport]


def asynchronously(pipeline: Any, documents: Any, **options: Any) -> IngestionReport:
    """`aingest`, from where no loop runs."""

    async def main() -> IngestionReport:
        return await aingest(pipeline, documents, **options)

    return asyncio.run(main())


BOTH = [ingest, asynchronously]
BOTH_NAMES = ["sync", "async"]


class Lines(TransformComponent):
    """A splitter: one node for each line that is not empty; a line "unsplittable" is an error.

    With `own_ids`, the nodes' ids are "<document>#<number>", else random as those of LlamaIndex's splitters.
    """

    own_ids: bool = False
    prefix: str = ""

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[BaseNode]:
        return [node for document in nodes for node in self._lines(document)]

    def _lines(self, document: BaseNode) -> list[BaseNode]:
        made: list[BaseNode] = []
        for number, line in enumerate(filter(None, document.get_content().splitlines())):
            if line == "unsplittable":
                raise ValueError("this line can't be split")
            node = TextNode(
                text=self.prefix + line,
                metadata=dict(document.metadata),
                relationships={NodeRelationship.SOURCE: document.as_related_node_info()},
                excluded_embed_metadata_keys=list(document.excluded_embed_metadata_keys),
            )
            if self.own_ids:
                node.id_ = f"{document.node_id}#{number}"
            made.append(node)
        return made


class Model(HashEmbedding):
    """A model that refuses texts with the word "refused", and everything while it `is_down`."""

    _is_down: bool = PrivateAttr(default=False)

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"dim": DIM, **options})

    @property
    def is_down(self) -> bool:
        return self._is_down

    @is_down.setter
    def is_down(self, value: bool) -> None:
        self._is_down = value

    def _embed(self, texts: list[str]) -> list[list[float]]:
        self._batch_sizes.append(len(texts))
        if self._is_down:
            raise ConnectionError("the model is down")
        if any("refused" in text for text in texts):
            raise ValueError("a text was refused")
        return [self.vector(text) for text in texts]


def doc(document_id: str, *lines: str, **metadata: Any) -> Document:
    return Document(id_=document_id, text="\n".join(lines), metadata=metadata)


def docs(number: int, lines: int = 2, version: str = "first") -> list[Document]:
    """Documents "d0", "d1", ..., each of some lines that are unlike those of the others."""
    return [doc(f"d{n}", *(f"line {line} of {n}, {version}" for line in range(lines))) for n in range(number)]


def writing_to(store: MilvusVectorStore, model: Model | None = None, **options: Any) -> IngestionPipeline:
    """A pipeline of `Lines`, a model, and the writer as its last step."""
    model = model if model is not None else Model()
    options = {"transformations": [Lines(), model, AsyncMilvusWriter(store)]} | options
    return IngestionPipeline(**options)


def rows(store: MilvusVectorStore) -> list[dict[str, Any]]:
    """All rows of a collection."""
    fields = [store.doc_id_field, store.text_key, "_ingestion", "id"]
    found = store.client.query(
        store.collection_name, filter='id != ""', output_fields=fields, consistency_level="Strong"
    )
    return [dict(row) for row in found]


def held(store: MilvusVectorStore) -> dict[str, list[str]]:
    """What a collection holds: the texts of each document, sorted."""
    texts: dict[str, list[str]] = {}
    for row in rows(store):
        texts.setdefault(row[store.doc_id_field], []).append(row[store.text_key])
    return {document_id: sorted(each) for document_id, each in texts.items()}


def expected(documents: Sequence[BaseNode]) -> dict[str, list[str]]:
    """What a collection is to hold of these documents, with `Lines`."""
    texts = {each.node_id: sorted(filter(None, each.get_content().splitlines())) for each in documents}
    return {document_id: each for document_id, each in texts.items() if each}


def counts(report: IngestionReport) -> tuple[int, int, int, int, int]:
    """Documents added, replaced, unchanged, deleted, failed."""
    return report.added, report.replaced, report.unchanged, report.deleted, len(report.failed)
