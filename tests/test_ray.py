"""Ray: many processes, and many machines, into one server, though some of them are lost on the way."""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
from llama_index.core import Document
from llama_index.core.node_parser import SentenceSplitter
from pymilvus import MilvusClient

from tests.ray_settings import of_ray
from tests.servers import MilvusServer
from tests.waiting import blocked_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra ray is not installed"),
]

ROOT = Path(__file__).resolve().parent.parent
SHARDS = 4
DOCUMENTS = 40  # in each shard
KILLED_AT = 25
CHUNK_SIZE = 50


def text_of(name: str) -> str:
    return " ".join(f"Sentence {number} of {name} has some more words." for number in range(12))


# A process of its own, as Ray leaves threads and signal handlers behind in the one that starts it.
DRIVER = textwrap.dedent(
    """
    import dataclasses, json, os, sys, threading
    from pathlib import Path

    import ray
    from llama_index.core import Document
    from llama_index.core.ingestion import IngestionPipeline
    from llama_index.core.node_parser import SentenceSplitter

    from llama_index_milvus_async_ext import AsyncMilvusVectorStore, AsyncMilvusWriter, ingest
    from tests.embedding import HashEmbedding
    from tests.test_ray import CHUNK_SIZE, DOCUMENTS, KILLED_AT, SHARDS, text_of

    DIM = 8


    class Model(HashEmbedding):
        folder: str

        def _get_text_embeddings(self, texts):
            if any(f" 1-{KILLED_AT} " in text for text in texts):
                try:
                    (Path(self.folder) / "first attempt").touch(exist_ok=False)
                except FileExistsError:
                    pass
                else:  # it stops here until it is killed
                    (Path(self.folder) / "new").write_text(str(os.getpid()))
                    (Path(self.folder) / "new").rename(Path(self.folder) / "pid")
                    threading.Event().wait()
            return super()._get_text_embeddings(texts)


    @ray.remote(max_retries=3)
    def ingest_shard(shard, uri, collection, folder):
        names = [f"{shard}-{number}" for number in range(DOCUMENTS)]
        documents = (Document(text=text_of(name), id_=name) for name in names)
        with AsyncMilvusVectorStore(uri=uri, collection_name=collection) as store:
            splitter = SentenceSplitter(chunk_size=CHUNK_SIZE, chunk_overlap=0)
            model = Model(folder=folder, dim=DIM, embed_batch_size=5)
            pipeline = IngestionPipeline(transformations=[splitter, model, AsyncMilvusWriter(store)])
            return ingest(pipeline, documents, source=f"shard {shard}", delete_missing=True)


    uri, collection, folder = sys.argv[1:]
    AsyncMilvusVectorStore(uri=uri, collection_name=collection, dim=DIM).close()
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        object_store_memory=100 * 2**20,
    )
    try:
        reports = ray.get([ingest_shard.remote(shard, uri, collection, folder) for shard in range(SHARDS)])
    finally:
        ray.shutdown()
    # Not printed, as Ray itself prints here that a worker was killed.
    (Path(folder) / "reports").write_text(json.dumps([dataclasses.asdict(report) for report in reports]))
    """
)


def test_a_task_that_ray_runs_again_after_a_kill_completes_its_shard_and_doubles_nothing(
    milvus_server: MilvusServer, collection_name: str, tmp_path: Path
) -> None:
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    pid, complaints = tmp_path / "pid", tmp_path / "complaints"
    with (
        tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as ray_folder,
        contextlib.closing(MilvusClient(milvus_server.uri)) as client,
        complaints.open("w") as stderr,
    ):
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, milvus_server.uri, collection_name, str(tmp_path)],
            cwd=tmp_path,
            env=os.environ | of_ray(ray_folder) | {"PYTHONPATH": python_path, "PYTHONWARNINGS": "error"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
        try:
            blocked_until(lambda: pid.exists() or driver.poll() is not None, 240)
            assert pid.exists(), complaints.read_text()
            # It is in the midst of it: some documents of the shard are there, and others are not.
            blocked_until(lambda: len(texts_in(client, collection_name, "1-")) >= 5)
            os.kill(int(pid.read_text()), signal.SIGKILL)
            driver.wait(240)
        finally:
            driver.kill()  # what Ray has started for it ends with it
            driver.wait()
        stored = texts_in(client, collection_name, "")
    assert driver.returncode == 0, complaints.read_text()
    assert complaints.read_text() == ""

    splitter = SentenceSplitter(chunk_size=CHUNK_SIZE, chunk_overlap=0)
    names = [f"{shard}-{number}" for shard in range(SHARDS) for number in range(DOCUMENTS)]
    documents = [Document(text=text_of(name), id_=name) for name in names]
    clean = {
        name: sorted(node.get_content() for node in splitter([document]))
        for name, document in zip(names, documents, strict=True)
    }
    assert stored == clean

    reports = json.loads((tmp_path / "reports").read_text())
    for shard, report in enumerate(reports):
        there = report["added"] + report["replaced"] + report["unchanged"]
        assert (there, report["deleted"], report["failed"]) == (DOCUMENTS, 0, [])
        # What was acknowledged whole before the kill is not embedded again.
        assert (report["unchanged"] > 0) == (shard == 1)


def texts_in(client: MilvusClient, collection: str, prefix: str) -> dict[str, list[str]]:
    """The texts of each document whose id begins so, as often as they are there."""
    rows = client.query(
        collection,
        filter=f'doc_id like "{prefix}%"',
        output_fields=["doc_id", "text"],
        limit=16_384,
        consistency_level="Strong",
    )
    found = collections.defaultdict(list)
    for row in rows:
        found[row["doc_id"]].append(row["text"])
    return {document: sorted(texts) for document, texts in found.items()}
