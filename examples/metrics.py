"""What a store has sent, as metrics for Prometheus, in its text format: no package is needed for that.

python examples/metrics.py
"""

import asyncio
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer

from llama_index.core.schema import TextNode
from llama_index.core.vector_stores.types import VectorStoreQuery

from llama_index_milvus_async_ext import AsyncMilvusVectorStore

# Of `store.statistics()`: what only grows is a counter, what goes up and down a gauge.
METRICS = {
    "requests": ("milvus_requests_total", "counter", "Requests sent, repeated ones included."),
    "rows": ("milvus_rows_total", "counter", "Rows in them."),
    "queries": ("milvus_queries_total", "counter", "Queries in them."),
    "retries": ("milvus_retries_total", "counter", "Requests that were sent again."),
    "in_flight": ("milvus_requests_in_flight", "gauge", "Requests without an answer yet."),
    "waiting": ("milvus_items_waiting", "gauge", "Rows, queries and other calls that wait to be sent."),
    "limit": ("milvus_requests_limit", "gauge", "Requests that may be in flight now."),
}


def metrics(store: AsyncMilvusVectorStore) -> str:
    """The store's statistics in Prometheus's text format."""
    statistics = store.statistics()
    lines = []
    for field, (name, kind, meaning) in METRICS.items():
        lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}", f"{name} {getattr(statistics, field)}"]
    return "\n".join(lines) + "\n"


def served(store: AsyncMilvusVectorStore) -> HTTPServer:
    """A server of the metrics, on a free port; a service adds a route of its own instead."""

    class Metrics(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = metrics(store).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Metrics)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


async def main() -> None:
    async with AsyncMilvusVectorStore(uri="./metrics.db", dim=4, overwrite=True) as store:
        server = served(store)
        await store.async_add([TextNode(text=f"text {n}", embedding=[n, 1, 0, 0]) for n in range(100)])
        query = VectorStoreQuery(query_embedding=[1, 1, 0, 0], similarity_top_k=3)
        await asyncio.gather(*(store.aquery(query) for _ in range(50)))
        address = f"http://127.0.0.1:{server.server_port}/metrics"
        print(await asyncio.to_thread(lambda: urllib.request.urlopen(address).read().decode()), end="")
        server.shutdown()
        server.server_close()


asyncio.run(main())
