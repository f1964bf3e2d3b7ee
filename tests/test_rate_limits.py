"""Rate limits of embedding services: what docs/scaling.md says of them."""

from __future__ import annotations

import pickle

import pytest
from llama_index.core import Document
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.rate_limiter import BaseRateLimiter, TokenBucketRateLimiter

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, AsyncMilvusWriter, aingest, ingest
from tests.embedding import HashEmbedding

DIM = 8


class Counting(BaseRateLimiter):
    """Lets everything through, and keeps count of it."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def acquire(self, num_tokens: int = 0) -> None:
        self.tokens.append(num_tokens)

    async def async_acquire(self, num_tokens: int = 0) -> None:
        self.tokens.append(num_tokens)


@pytest.mark.parametrize("is_async", [True, False], ids=["aingest", "ingest"])
@pytest.mark.parametrize("in_writer", [True, False], ids=["in the writer", "a step of its own"])
async def test_each_request_to_the_embedding_model_waits_for_its_rate_limiter_which_is_told_no_tokens(
    lite_uri: str, collection_name: str, is_async: bool, in_writer: bool
) -> None:
    limiter = Counting()
    model = HashEmbedding(dim=DIM, embed_batch_size=5, rate_limiter=limiter)
    documents = [Document(text=f"text {number}", id_=str(number)) for number in range(23)]
    async with AsyncMilvusVectorStore(uri=lite_uri, collection_name=collection_name, dim=DIM) as store:
        steps = [AsyncMilvusWriter(store, embed_model=model)] if in_writer else [model, AsyncMilvusWriter(store)]
        pipeline = IngestionPipeline(transformations=steps)
        report = await aingest(pipeline, documents) if is_async else ingest(pipeline, documents)
    assert report.added == 23
    assert sum(model.batch_sizes) == 23
    # For tokens there is no limit, then, whatever `tokens_per_minute` says: the page divides by them.
    assert limiter.tokens == [0] * model.calls


def test_a_pickled_embedding_model_has_lost_its_rate_limiter() -> None:
    model = HashEmbedding(dim=DIM, rate_limiter=TokenBucketRateLimiter(requests_per_minute=10))
    assert pickle.loads(pickle.dumps(model)).rate_limiter is None
