"""A program that ingests, to be started by `tests.programs` and perhaps killed.

    programs.start(INGESTER, json.dumps({"uri": ..., "collection": ..., "documents": "file.json", ...}))

It says "ready", and begins when it is told to by its standard input, or that is closed. It says "text" for each text
before that is embedded, and "settled" for each group of documents that is done. At its end it says what its report
counts, and which rows there are in the collection then.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from llama_index.core.ingestion import IngestionPipeline
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.event_handlers import BaseEventHandler

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, AsyncMilvusWriter
from llama_index_milvus_async_ext.events import MilvusIngestionEvent
from llama_index_milvus_async_ext.ingestion import aingest, ingest
from tests.embedding import HashEmbedding
from tests.sentences import documents, rows_in, splitter

INGESTER = Path(__file__)


def say(line: str, times: int = 1) -> None:
    os.write(1, f"{line}\n".encode() * times)  # at once: a kill takes nothing of it back


class TellingEmbedding(HashEmbedding):
    """A model that says when it is given texts."""

    def _embed(self, texts: list[str]) -> list[list[float]]:
        say("text", len(texts))
        return super()._embed(texts)

    async def _aembed(self, texts: list[str]) -> list[list[float]]:
        say("text", len(texts))
        return await super()._aembed(texts)


class Settled(BaseEventHandler):
    def handle(self, event: Any, **kwargs: Any) -> None:
        if isinstance(event, MilvusIngestionEvent):
            say("settled")


def main(
    uri: str,
    collection: str,
    documents_file: str,
    dim: int,
    rows: int,
    texts: int,
    with_fixed_ids: bool,
    awaits: bool,
    delete_missing: bool,
) -> None:
    stream = documents(json.loads(Path(documents_file).read_text()))
    store = AsyncMilvusVectorStore(uri=uri, collection_name=collection, dim=dim, batch_size=rows)
    model = TellingEmbedding(dim=dim, embed_batch_size=texts // 2, seconds_per_text=0.002, blocking=False)
    pipeline = IngestionPipeline(transformations=[splitter(with_fixed_ids), model, AsyncMilvusWriter(store)])
    get_dispatcher().add_event_handler(Settled())
    say("ready")
    sys.stdin.readline()
    if awaits:
        report = asyncio.run(aingest(pipeline, stream, source="editions", delete_missing=delete_missing))
    else:
        report = ingest(pipeline, stream, source="editions", delete_missing=delete_missing)
    counts = {name: getattr(report, name) for name in ("added", "replaced", "unchanged", "deleted", "nodes")}
    print(json.dumps([counts, rows_in(store.client, collection)]), flush=True)
    store.close()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
