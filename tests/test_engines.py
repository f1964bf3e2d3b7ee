"""LlamaIndex's retrievers, engines and agents around ours: each asks as it always does, blocking and not."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import llama_index.core.llms.mock as mock
import pytest
from llama_index.core import StorageContext, VectorStoreIndex
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.base.llms.types import ChatMessage, CompletionResponse
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.chat_engine import CondensePlusContextChatEngine, ContextChatEngine
from llama_index.core.llms import MockLLM
from llama_index.core.llms.callbacks import llm_completion_callback
from llama_index.core.memory import ChatMemoryBuffer
from llama_index.core.node_parser import HierarchicalNodeParser, SentenceSplitter, get_leaf_nodes
from llama_index.core.query_engine import RetrieverQueryEngine, RouterQueryEngine
from llama_index.core.retrievers import AutoMergingRetriever, QueryFusionRetriever
from llama_index.core.schema import Document, TextNode
from llama_index.core.selectors import LLMSingleSelector
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.core.tools import QueryEngineTool
from llama_index.vector_stores.milvus.utils import BM25BuiltInFunction

from llama_index_milvus_async_ext import AsyncMilvusRetriever, AsyncMilvusVectorStore, AsyncMilvusWriter
from tests.embedding import HashEmbedding

MODEL = HashEmbedding(dim=64)
FRUIT = ["red apples fall in autumn", "yellow bananas grow in bunches", "green pears ripen late"]
TOOLS = ["a hammer drives nails", "a saw cuts wood", "a file smooths metal"]
Ask = Callable[[Any, str, str], Any]


class ScriptedLLM(MockLLM):
    """Answers with what its function makes of the prompt."""

    _answer: Callable[[str], str] = PrivateAttr()

    def __init__(self, answer: Callable[[str], str]) -> None:
        super().__init__()
        self._answer = answer

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        return CompletionResponse(text=self._answer(prompt))


@pytest.fixture(params=["blocking", "in a loop"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """Call a method of LlamaIndex's, or its async twin."""

    def ask(asked: Any, method: str, question: str) -> Any:
        if request.param == "blocking":
            loop = asyncio.new_event_loop()  # LlamaIndex takes the thread's own where there is one, or leaves one open
            asyncio.set_event_loop(loop)
            try:
                return getattr(asked, method)(question)
            finally:
                asyncio.set_event_loop(None)
                loop.close()

        async def inside() -> Any:
            return await getattr(asked, f"a{method}")(question)

        return asyncio.run(inside())

    return ask


@pytest.fixture(scope="module")
def store(lite_uri: str) -> Iterator[AsyncMilvusVectorStore]:
    with AsyncMilvusVectorStore(
        lite_uri,
        collection_name=f"engines_{uuid.uuid4().hex}",
        dim=MODEL.dim,
        enable_sparse=True,
        sparse_embedding_function=BM25BuiltInFunction(),
        consistency_level="Strong",
    ) as store:
        for kind, texts in {"fruit": FRUIT, "tools": TOOLS}.items():
            nodes = [
                TextNode(text=text, metadata={"kind": kind}, excluded_embed_metadata_keys=["kind"]) for text in texts
            ]
            AsyncMilvusWriter(store, embed_model=MODEL)(nodes)
        yield store
        store.clear()


@pytest.fixture(params=["ours", "the index's"])
def retriever(request: pytest.FixtureRequest, store: AsyncMilvusVectorStore) -> Any:
    if request.param == "ours":
        return AsyncMilvusRetriever(store, embed_model=MODEL, similarity_top_k=1)
    return VectorStoreIndex.from_vector_store(store, embed_model=MODEL).as_retriever(similarity_top_k=1)


def memory() -> ChatMemoryBuffer:
    """LlamaIndex's newer default opens a database of its own, and leaves it open."""
    return ChatMemoryBuffer.from_defaults(token_limit=10_000, tokenizer_fn=str.split)


def sentences(text: str) -> list[str]:
    return [f"{sentence}." for sentence in text.split(".") if sentence]


def texts_of(found: Any) -> list[str]:
    return [each.node.get_content() for each in found]


def test_query_fusion_of_meaning_and_words_over_several_questions(
    ask: Ask, store: AsyncMilvusVectorStore, retriever: Any
) -> None:
    words = AsyncMilvusRetriever(store, vector_store_query_mode="text_search", similarity_top_k=1)
    fusion = QueryFusionRetriever(
        [retriever, words],
        llm=ScriptedLLM(lambda prompt: "yellow bananas\na saw that cuts"),
        num_queries=3,
        similarity_top_k=3,
        mode="reciprocal_rerank",  # type: ignore[arg-type]
    )
    assert sorted(texts_of(ask(fusion, "retrieve", "red apples"))) == sorted([FRUIT[0], FRUIT[1], TOOLS[1]])


def test_auto_merging_gives_the_parent_of_neighbours(ask: Ask, lite_uri: str, collection_name: str) -> None:
    sizes = {
        str(size): SentenceSplitter(
            chunk_size=size, chunk_overlap=0, tokenizer=str.split, chunking_tokenizer_fn=sentences
        )
        for size in (40, 10)
    }
    text = " ".join(f"The lane carries item number {n} to its place." for n in range(8))
    parser = HierarchicalNodeParser.from_defaults(node_parser_ids=list(sizes), node_parser_map=sizes)  # type: ignore[arg-type]
    nodes = parser.get_nodes_from_documents([Document(text=text, id_="d")])
    docstore = SimpleDocumentStore()
    docstore.add_documents(nodes)
    with AsyncMilvusVectorStore(lite_uri, collection_name=collection_name, dim=MODEL.dim) as store:
        context = StorageContext.from_defaults(vector_store=store, docstore=docstore)
        index = VectorStoreIndex(get_leaf_nodes(nodes), storage_context=context, embed_model=MODEL)
        for base in (
            AsyncMilvusRetriever(store, embed_model=MODEL, similarity_top_k=8),
            index.as_retriever(similarity_top_k=8),
        ):
            merging = AutoMergingRetriever(base, context)  # type: ignore[arg-type]
            found = ask(merging, "retrieve", "which item does the lane carry")
            parents = [node for node in nodes if node.child_nodes]
            assert sorted(texts_of(found)) == sorted(node.get_content() for node in parents)


def test_a_router_asks_the_engine_that_is_chosen(ask: Ask, store: AsyncMilvusVectorStore) -> None:
    tools = [
        QueryEngineTool.from_defaults(
            RetrieverQueryEngine.from_args(
                AsyncMilvusRetriever(store, embed_model=MODEL, similarity_top_k=6, doc_ids=None, filters=filters),
                llm=MockLLM(),
            ),
            name=name,
            description=name,
        )
        for name, filters in {"everything": None, "tools": kind("tools")}.items()
    ]
    choice = json.dumps([{"choice": 2, "reason": "it is about tools"}])
    router = RouterQueryEngine(
        LLMSingleSelector.from_defaults(llm=ScriptedLLM(lambda prompt: choice)), tools, llm=MockLLM()
    )
    answer = ask(router, "query", "what cuts wood")
    assert sorted(texts_of(answer.source_nodes)) == sorted(TOOLS)
    assert "a saw cuts wood" in str(answer), "the mock model says the prompt again"


def kind(value: str) -> Any:
    from llama_index.core.vector_stores.types import ExactMatchFilter, MetadataFilters

    return MetadataFilters(filters=[ExactMatchFilter(key="kind", value=value)])


@pytest.mark.parametrize("engine_type", [ContextChatEngine, CondensePlusContextChatEngine])
def test_a_chat_engine_answers_out_of_the_store(ask: Ask, retriever: Any, engine_type: Any) -> None:
    engine = engine_type.from_defaults(retriever=retriever, llm=MockLLM(), memory=memory())
    for question, text in {"what about red apples": FRUIT[0], "and what smooths metal": TOOLS[2]}.items():
        answer = ask(engine, "chat", question)
        assert text in str(answer) or text in texts_of(answer.source_nodes)
    assert len(engine.chat_history) == 4


async def test_a_chat_engine_streams(retriever: Any) -> None:
    engine = ContextChatEngine.from_defaults(retriever=retriever, llm=MockLLM(max_tokens=3), memory=memory())
    answer = await engine.astream_chat("what about red apples")
    assert [token async for token in answer.async_response_gen()]
    assert texts_of(answer.source_nodes) == [FRUIT[0]]


async def test_an_agents_tool(retriever: Any) -> None:
    engine = RetrieverQueryEngine.from_args(retriever, llm=MockLLM())
    tool = QueryEngineTool.from_defaults(engine, name="search", description="looks things up")
    for output in (await tool.acall(input="red apples"), await asyncio.to_thread(tool.call, input="red apples")):
        assert texts_of(output.raw_output.source_nodes) == [FRUIT[0]]


@pytest.mark.skipif(not hasattr(mock, "MockFunctionCallingLLM"), reason="this LlamaIndex has no scripted agent model")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pydantic's, of LlamaIndex
async def test_an_agent_calls_its_tool_several_times_at_once(retriever: Any) -> None:
    engine = RetrieverQueryEngine.from_args(retriever, llm=MockLLM())
    tool = QueryEngineTool.from_defaults(engine, name="search", description="looks things up")

    def answers(messages: Any, **_: Any) -> ChatMessage:
        from llama_index.core.base.llms.types import ToolCallBlock

        results = [message.content for message in messages if message.role.value == "tool"]
        if results:
            return ChatMessage(role="assistant", content="\n".join(map(str, results)))
        calls = [
            ToolCallBlock(tool_call_id=str(n), tool_name="search", tool_kwargs={"input": question})
            for n, question in enumerate(["red apples", "what cuts wood"])
        ]
        return ChatMessage(role="assistant", blocks=calls)

    model = mock.MockFunctionCallingLLM(response_generator=answers)
    answer = await FunctionAgent(tools=[tool], llm=model).run("apples and wood?", memory=memory())
    assert FRUIT[0] in str(answer) and TOOLS[1] in str(answer)
