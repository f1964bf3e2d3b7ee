"""A deterministic embedding model that needs no network and no time, for tests where a real one would be too slow."""

from __future__ import annotations

import asyncio
import re
import time
import zlib
from functools import lru_cache

import numpy as np
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import Field, PrivateAttr

_WORD = re.compile(r"\w+")


@lru_cache(maxsize=100_000)
def _place_of(word: str) -> tuple[int, float]:
    """Where a word goes, and with which sign. Not `hash()`, which differs between processes."""
    number = zlib.crc32(word.encode("utf-8", "surrogatepass"))
    return number >> 1, 1.0 if number & 1 else -1.0


class HashEmbedding(BaseEmbedding):
    """Bags of hashed words: texts that share words have similar unit vectors.

        model = HashEmbedding(dim=64, seconds_per_text=0.01, blocking=False)

    `batch_sizes` holds the number of texts of each call of the model, in order. A pickled copy, as in a worker
    process, starts its own count.
    """

    dim: int = Field(default=384, gt=0, description="The vectors' length.")
    seconds_per_text: float = Field(default=0.0, ge=0, description="How long each text takes.")
    blocking: bool = Field(
        default=True,
        description="Whether async calls block the event loop meanwhile, as a model in the same process does, "
        "or give way, as a remote model does.",
    )

    _batch_sizes: list[int] = PrivateAttr(default_factory=list)

    @classmethod
    def class_name(cls) -> str:
        return "HashEmbedding"

    @property
    def batch_sizes(self) -> list[int]:
        return self._batch_sizes

    @property
    def calls(self) -> int:
        return len(self._batch_sizes)

    @property
    def texts(self) -> int:
        return sum(self._batch_sizes)

    def vector(self, text: str) -> list[float]:
        """The text's embedding; not counted as a call, and without delay."""
        vector = np.zeros(self.dim, dtype=np.float32)
        for word in _WORD.findall(text.lower()):
            place, sign = _place_of(word)
            vector[place % self.dim] += sign
        norm = float(np.linalg.norm(vector))
        if norm == 0.0:  # no words, or words that cancel out: a direction all the same, for COSINE
            vector[0] = norm = 1.0
        embedding: list[float] = (vector / np.float32(norm)).tolist()
        return embedding

    def _embed(self, texts: list[str]) -> list[list[float]]:
        self._batch_sizes.append(len(texts))
        if self.seconds_per_text:
            time.sleep(self.seconds_per_text * len(texts))
        return [self.vector(text) for text in texts]

    async def _aembed(self, texts: list[str]) -> list[list[float]]:
        if self.blocking:
            return self._embed(texts)
        self._batch_sizes.append(len(texts))
        await asyncio.sleep(self.seconds_per_text * len(texts))
        return [self.vector(text) for text in texts]

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._embed([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._embed(texts)

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._embed([query])[0]

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return (await self._aembed([text]))[0]

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await self._aembed(texts)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return (await self._aembed([query]))[0]
