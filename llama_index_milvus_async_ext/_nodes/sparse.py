"""Sparse vectors that the client computes, and which text an encoder fails for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.vector_stores.milvus.utils import BaseSparseEmbeddingFunction

from llama_index_milvus_async_ext._flow.awaiting import awaited

# An encoder that fails for so many texts in a row, and has answered for none, is taken to fail for all: to ask a
# service that is down for each of a thousand texts would take as many time-outs.
_GIVE_UP_AFTER = 16


async def of_documents(encoder: BaseSparseEmbeddingFunction, texts: Sequence[str], awaits: bool) -> list[Any]:
    """The sparse vector of each text, or in its place the error that the encoder raised for it.

        vectors = await of_documents(encoder, [node.get_content() for node in nodes], awaits=True)

    The encoder is asked for all texts at once, and only if that fails for one after another.

    Args:
        encoder: The store's sparse embedding function.
        texts: The texts.
        awaits: Whether to await the encoder's async method. If not, this coroutine never suspends: it can be run to
            its end by one `send(None)`.
    """
    if not texts:
        return []
    try:
        return await _encoded(encoder, "documents", texts, awaits)
    except Exception as error:
        if len(texts) == 1:
            return [error]
    vectors: list[Any] = []
    for text in texts:
        if len(vectors) == _GIVE_UP_AFTER and all(isinstance(each, Exception) for each in vectors):
            return vectors + [vectors[-1]] * (len(texts) - len(vectors))
        try:
            vectors += await _encoded(encoder, "documents", [text], awaits)
        except Exception as error:
            vectors.append(error)
    return vectors


async def of_queries(encoder: BaseSparseEmbeddingFunction, texts: Sequence[str], awaits: bool) -> list[Any]:
    """The sparse vector of each query; `awaits` as in `of_documents`.

    Raises:
        Exception: What the encoder raises; `ValueError` if it answers with another number of vectors.
    """
    return await _encoded(encoder, "queries", texts, awaits) if texts else []


async def _encoded(encoder: Any, kind: str, texts: Sequence[str], awaits: bool) -> list[Any]:
    name = f"async_encode_{kind}" if awaits else f"encode_{kind}"
    answer = getattr(encoder, name)(list(texts))
    vectors = list(await awaited(answer, type(encoder).__name__) if awaits else answer)
    if len(vectors) != len(texts):
        raise ValueError(f"{type(encoder).__name__}.{name} returned {len(vectors)} vectors for {len(texts)} texts")
    return vectors
