"""Questions of many callers to one embedding model: those that come while it works are embedded together."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding, mean_agg
from llama_index.core.callbacks.schema import CBEventType, EventPayload
from llama_index.core.instrumentation.events.embedding import EmbeddingEndEvent, EmbeddingStartEvent
from llama_index_instrumentation import get_dispatcher

from llama_index_milvus_async_ext._flow.foreign import as_error
from llama_index_milvus_async_ext._flow.loops import forget_closed

dispatcher = get_dispatcher(__name__)

_QUESTIONS_PER_CALL = 256
# What LlamaIndex calls for a question, or would call.
_OF_QUESTIONS = {
    *("_embed", "_get_query_embedding", "_aget_query_embedding", "aget_query_embedding"),
    "aget_agg_embedding_from_queries",
}

Batch = Callable[[list[str]], list[list[float]]]

# Of each event loop, the models that are at work, by their `id()`: each is kept by what works with it.
_at_work: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[int, _Questions]] = weakref.WeakKeyDictionary()


def batch_of(model: BaseEmbedding) -> Batch | None:
    """The model's way to embed several questions in one call; None if it has none that is known here.

    LlamaIndex has none: a batch call embeds texts, which some models embed in another way than questions. Those of
    Hugging Face differ in the name of a prompt only.
    """
    if not _embeds_questions_together(type(model)):
        return None
    if model.rate_limiter is not None or model.embeddings_cache is not None:
        return None  # LlamaIndex asks them question by question
    embed: Any = getattr(model, "_embed", None)
    return lambda texts: embed(texts, prompt_name="query")


@functools.lru_cache(maxsize=64)
def _embeds_questions_together(kind: type[BaseEmbedding]) -> bool:
    embed = getattr(kind, "_embed", None)
    is_known = any(cls.__module__.startswith("llama_index.embeddings.huggingface") for cls in kind.__mro__)
    if not is_known or embed is None or "prompt_name" not in inspect.signature(embed).parameters:
        return False
    own = {name for cls in kind.__mro__ for name in vars(cls) if not cls.__module__.startswith("llama_index.")}
    # A class of the user's own may do it in another way.
    return own.isdisjoint(_OF_QUESTIONS)


async def embedded(model: BaseEmbedding, questions: list[str], batch: Batch) -> list[float]:
    """The embedding of a caller's questions, as `aget_agg_embedding_from_queries` gives it."""
    loop = asyncio.get_running_loop()
    of_loop = _at_work.get(loop)
    if of_loop is None:
        forget_closed(_at_work)  # questions may still be there, and so their loop
        of_loop = _at_work.setdefault(loop, {})
    vectors = []
    for question in questions:
        described = model.to_payload()
        dispatcher.event(EmbeddingStartEvent(model_dict=described))
        with model.callback_manager.event(CBEventType.EMBEDDING, payload={EventPayload.SERIALIZED: described}) as event:
            at_work = of_loop.get(id(model))
            if at_work is None:
                at_work = of_loop[id(model)] = _Questions(model, batch, of_loop)
            vectors.append(await at_work.ask(question))
            event.on_end(payload={EventPayload.CHUNKS: [question], EventPayload.EMBEDDINGS: vectors[-1:]})
        dispatcher.event(EmbeddingEndEvent(chunks=[question], embeddings=vectors[-1:]))
    result: list[float] = mean_agg(vectors)
    return result


class _Questions:
    """What waits for a model on one event loop, from the first question until none is left."""

    def __init__(self, model: BaseEmbedding, batch: Batch, at_work: dict[int, _Questions]) -> None:
        self._model = model
        self._batch = batch
        self._at_work = at_work
        self._waiting: deque[tuple[str, asyncio.Future[list[float]]]] = deque()
        self._task: asyncio.Task[None] | None = None

    async def ask(self, question: str) -> list[float]:
        """The embedding of a question."""
        answer: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, answer))
        if self._task is None:  # with a question that waits: an eager task works at once
            # In a context of its own: what the model tells of many callers' questions is in no single one's trace.
            self._task = contextvars.Context().run(asyncio.create_task, self._work())
            self._task.add_done_callback(self._end)
        return await answer

    async def _work(self) -> None:
        while self._waiting:
            some = [self._waiting.popleft() for _ in range(min(len(self._waiting), _QUESTIONS_PER_CALL))]
            await self._answer([each for each in some if not each[1].done()])
        self._end()  # now: whoever comes next must not wait here

    def _end(self, _: object = None) -> None:
        """Let go of the model; if the loop ends, so does the waiting."""
        if self._at_work.get(id(self._model)) is self:
            del self._at_work[id(self._model)]
        for _, answer in self._waiting:
            answer.cancel()

    async def _answer(self, some: list[tuple[str, asyncio.Future[list[float]]]]) -> None:
        """Answer questions; of those that the model refuses together, each that it takes alone."""
        if not some:
            return
        try:
            vectors = await asyncio.to_thread(_called, self._batch, [question for question, _ in some])
            if len(vectors) != len(some):
                raise ValueError(f"the embedding model gave {len(vectors)} vectors for {len(some)} questions")
        except asyncio.CancelledError:
            for _, answer in some:
                answer.cancel()
            raise
        except BaseException as error:  # such as the panic of a tokenizer: all who wait are told of that
            if isinstance(error, Exception) and len(some) > 1:
                for each in some:
                    await self._answer([each])
                return
            for _, answer in some:
                if not answer.done():
                    answer.set_exception(error)
            return
        for (_, answer), vector in zip(some, vectors, strict=True):
            if not answer.done():
                answer.set_result(vector)


def _called(batch: Batch, questions: list[str]) -> list[list[float]]:
    try:
        return batch(questions)
    except (StopIteration, asyncio.CancelledError) as error:  # nobody cancels what runs in a thread
        raise as_error(error, "the embedding model") from error
