"""The real server's quota: many writers keep to it, use it, and see no error."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from llama_index_milvus_async_ext import AsyncMilvusVectorStore
from llama_index_milvus_async_ext._milvus.schema import Schema
from llama_index_milvus_async_ext._milvus.write_request import write_request
from llama_index_milvus_async_ext._nodes.rows import RowEncoder
from tests.conftest import MakeNodes
from tests.servers import MilvusServer

DIM = 128
MIB_PER_SECOND = 1.0
_LOOK_SECONDS = 0.1


@pytest.mark.server
@pytest.mark.slow
async def test_sixty_four_writers_use_the_whole_quota(tmp_path: Path, make_nodes: MakeNodes) -> None:
    if reason := MilvusServer.unavailable_reason():
        pytest.skip(reason)
    rates = {"enabled": True, "insertRate": {"max": MIB_PER_SECOND}, "upsertRate": {"max": MIB_PER_SECOND}}
    nodes = make_nodes(3_500, dim=DIM)
    for node in nodes:
        node.text = "x" * 1_000
    with MilvusServer(tmp_path, extra_config={"quotaAndLimits": {"enabled": True, "dml": rates}}) as server:
        async with AsyncMilvusVectorStore(uri=server.uri, collection_name="quota", dim=DIM) as store:
            schema = Schema(store.client.describe_collection("quota"))
            encoder = RowEncoder(schema, text_key="text", doc_id_field="doc_id", embedding_field="embedding")
            sample = [encoder.encode(node)[0] for node in nodes[:100]]
            request = write_request("quota", "", schema, sample, upsert=True)
            mebibytes = len(request) / 100 * len(nodes) / 2**20
            samples: list[int] = []

            async def watch() -> None:
                while True:
                    samples.append(store.statistics().limit)
                    await asyncio.sleep(_LOOK_SECONDS)

            watching = asyncio.create_task(watch())
            began = time.monotonic()
            reports = await asyncio.gather(*(store.awrite(nodes[start::64]) for start in range(64)))
            seconds = time.monotonic() - began
            watching.cancel()
            assert sum(len(report.written) for report in reports) == len(nodes)
            rate = mebibytes / seconds
            print(f"{mebibytes:.1f} MiB in {seconds:.1f} s: {rate / MIB_PER_SECOND:.2f} of the permitted rate")
            slowness = seconds / (_LOOK_SECONDS * len(samples))  # of this machine's timers, while that went on
            assert rate >= 0.9 * MIB_PER_SECOND / slowness
            later = samples[len(samples) // 3 :]
            assert max(later) - min(later) <= 2, f"the number in flight swings: {later}"
            rows = store.client.query("quota", filter="", output_fields=["count(*)"], consistency_level="Strong")
            assert rows[0]["count(*)"] == len(nodes)
