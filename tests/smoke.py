"""What a newly installed package must be able to do, with what it brings and nothing else: `python tests/smoke.py`.

Not a test of the suite, which brings more: run by `tests.package` where only the wheel is installed.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores import VectorStoreQuery

import llama_index_milvus_async_ext as package
from llama_index_milvus_async_ext import AsyncMilvusVectorStore


def node(name: str, *embedding: float) -> TextNode:
    document = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id="d")}
    return TextNode(id_=name, text=f"text of {name}", embedding=list(embedding), relationships=document)


async def write_and_search(uri: str) -> None:
    async with await AsyncMilvusVectorStore.aopen(uri=uri, dim=2, consistency_level="Strong") as store:
        await asyncio.gather(*(store.async_add([node(str(n), 1.0, n / 10)]) for n in range(10)))
        report = await store.awrite([node("there", 0.0, 1.0), TextNode(id_="bare", text="no embedding")])
        assert report.written == ["there"], report
        assert [failed.node.node_id for failed in report.failed] == ["bare"], report
        assert (await store.aquery(VectorStoreQuery([0.0, 1.0], similarity_top_k=1))).ids == ["there"]
    with AsyncMilvusVectorStore(uri=uri, consistency_level="Strong") as store:
        assert len(store.get_nodes(node_ids=["there", "0", "9"])) == 3
        store.delete("d")
        assert store.query(VectorStoreQuery([0.0, 1.0], similarity_top_k=1)).ids == []


if __name__ == "__main__":
    home = Path(package.__file__).resolve().parent
    assert home.is_relative_to(Path(sys.prefix).resolve()), f"{home} is not what was installed"
    assert files(package).joinpath("py.typed").is_file(), "py.typed is missing: type checkers would take all for Any"
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(write_and_search(f"{folder}/smoke.db"))
    print(importlib.metadata.version("llama-index-milvus-async-ext"))
