"""Nodes and their embeddings: batches of texts, of which one that the model refuses fails alone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.schema import BaseNode, MetadataMode

from llama_index_milvus_async_ext._flow.awaiting import awaited
from llama_index_milvus_async_ext._flow.threads import Calls
from llama_index_milvus_async_ext._nodes.vectors import set_embedding

_BATCHES_PER_CALL = 2
_CALLS_AT_ONCE = 2
# Refusals, one after the other, by which a model is taken to refuse everything: a service that is down, a wrong key.
_REFUSALS = 3

Embed = Callable[[list[str]], Awaitable[list[list[float]]]]


def awaiting(model: BaseEmbedding, calls: Calls) -> Embed:
    """The model's async way; for a model that has none, its blocking way, in another thread.

    LlamaIndex would else call it text by text, and hold the event loop up.
    """
    own = {name for cls in type(model).__mro__[: type(model).__mro__.index(BaseEmbedding)] for name in vars(cls)}
    has_own = not own.isdisjoint({"_aget_text_embedding", "_aget_text_embeddings", "aget_text_embedding_batch"})
    return model.aget_text_embedding_batch if has_own else blocking(model, calls)


def blocking(model: BaseEmbedding, calls: Calls) -> Embed:
    """The model's blocking way, in another thread."""

    async def embed(texts: list[str]) -> list[list[float]]:
        return await calls.call(model.get_text_embedding_batch, texts)

    return embed


class Embedder:
    """Gives nodes to a model, in as many calls at once as it is to have: its `num_workers`, if they are set.

    Then each call has one batch. A call with a batch for each of the workers would be as slow as the slowest of them,
    and only when it has ended, the next one would begin.

    Args:
        model: The model.
        embed: The way to it.
        count: Told how many texts it has taken, after each call, if somebody asks.
    """

    def __init__(self, model: BaseEmbedding, embed: Embed, count: Callable[[int], None] | None = None) -> None:
        self.at_once = model.num_workers or _CALLS_AT_ONCE
        self.texts = model.embed_batch_size * (1 if model.num_workers else _BATCHES_PER_CALL)
        self._embed = embed
        self._count = count
        self._free = asyncio.Semaphore(self.at_once)

    async def embed(self, nodes: Sequence[BaseNode]) -> dict[int, Exception]:
        """Embed nodes; see `embed_nodes`."""
        parts = await asyncio.gather(*(self._part(nodes, start) for start in range(0, len(nodes), self.texts)))
        return {place: error for errors in parts for place, error in errors.items()}

    async def _part(self, nodes: Sequence[BaseNode], start: int) -> dict[int, Exception]:
        some = nodes[start : start + self.texts]
        async with self._free:
            errors = await embed_nodes(some, self._embed)
        if self._count is not None:
            self._count(len(some) - len(errors))
        return {start + place: error for place, error in errors.items()}


async def embed_nodes(nodes: Sequence[BaseNode], embed: Embed) -> dict[int, Exception]:
    """Embed nodes; what fails costs no others.

    Returns:
        The errors of the nodes that could not be embedded, by their places.
    """
    texts: dict[int, str] = {}
    errors: dict[int, Exception] = {}
    for place, node in enumerate(nodes):
        try:
            texts[place] = node.get_content(metadata_mode=MetadataMode.EMBED)
        except Exception as error:  # of a template of the node's own
            errors[place] = error
    refusals = 0
    waiting = [list(texts)] if texts else []
    while waiting:
        places = waiting.pop()
        try:
            embeddings = await awaited(embed([texts[place] for place in places]), "the embedding model")
            if len(embeddings) != len(places):
                raise ValueError(f"the embedding model gave {len(embeddings)} vectors for {len(places)} texts")
        except Exception as error:
            if len(places) == 1:
                refusals += 1
                errors[places[0]] = error
            elif refusals >= _REFUSALS:
                errors.update(dict.fromkeys(places, error))
            else:
                middle = len(places) // 2
                waiting += [places[middle:], places[:middle]]
            continue
        refusals = 0
        for place, embedding in zip(places, embeddings, strict=True):
            set_embedding(nodes[place], embedding)
    return errors
