"""Ctrl-C at each place of a blocking call where Python looks for it: nothing is left behind, and later calls work."""

from __future__ import annotations

import contextlib
import dis
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from llama_index.core import MockEmbedding
from llama_index.core.schema import TextNode
from llama_index.core.vector_stores.types import VectorStoreQuery

import llama_index_milvus_async_ext
from llama_index_milvus_async_ext import AsyncMilvusRetriever, AsyncMilvusVectorStore, AsyncMilvusWriter
from llama_index_milvus_async_ext._milvus.endpoint import Endpoint
from tests.leftovers import is_free
from tests.servers import LiteServer
from tests.waiting import blocked_until

DIM = 2
HOME = str(Path(llama_index_milvus_async_ext.__file__).parent)
# Of the standard library, what runs between a caller and its wake-up of the I/O thread, or ends a context.
BENEATH = ("contextlib.py", "asyncio/base_events.py", "asyncio/selector_events.py", "asyncio/unix_events.py")


# Python 3.10 looks for signals before any instruction; and later ones report some instructions only.
follows_the_instructions = pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="made for Python 3.11")


class Strike:
    """Raises `KeyboardInterrupt` in this thread at the n-th place where Python would run a signal's handler.

    These are, in Python 3.11, where a function begins, after a call, and where a loop goes back.
    """

    def __init__(self, at: int) -> None:
        self._left = at
        self._earlier: dict[FrameType, str] = {}
        self.where: str | None = None

    def __enter__(self) -> Strike:
        sys.settrace(self._enter)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)
        self._earlier.clear()  # or what these frames have would live as long as this

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        path = frame.f_code.co_filename
        if not (path.startswith(HOME) or path.endswith(BENEATH)):
            return None
        self._earlier.pop(frame, None)
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._look

    def _look(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event != "opcode" or self.where is not None:
            return self._look
        earlier = self._earlier.get(frame, "RESUME")
        now = self._earlier[frame] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
        if now == "PUSH_EXC_INFO":  # a call that has raised: Python goes to the handler at once
            return self._look
        if earlier.startswith("CALL") or earlier in ("RESUME", "JUMP_BACKWARD"):
            self._left -= 1
            if not self._left:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}"
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._look


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsyncMilvusVectorStore]:
    path = tmp_path_factory.mktemp("interrupted") / "own.db"
    with AsyncMilvusVectorStore(str(path), dim=DIM) as store:
        store.add([a_node()])
        yield store
    assert is_free(path)


def a_node() -> TextNode:
    return TextNode(id_="a", text="A", embedding=[1.0, 0.5])


def retrieve(store: AsyncMilvusVectorStore) -> None:
    AsyncMilvusRetriever(store, embed_model=MockEmbedding(embed_dim=DIM)).retrieve("A")


CALLS: dict[str, Callable[[AsyncMilvusVectorStore], Any]] = {
    "write": lambda store: store.write([a_node()]),
    "query": lambda store: store.query(VectorStoreQuery(query_embedding=[1.0, 0.5], similarity_top_k=1)),
    "get": lambda store: store.get_nodes(["a"]),
    "delete": lambda store: store.delete("nobody's"),
    "writer": lambda store: AsyncMilvusWriter(store)([a_node()]),
    "retriever": retrieve,
}


def works(store: AsyncMilvusVectorStore) -> bool:
    """Whether a call that comes later, on another thread, is answered."""
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(store.get_nodes(["a"])), daemon=True)
    asking.start()
    asking.join(20)
    return bool(answers)


@follows_the_instructions
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")  # struck before its first step
@pytest.mark.parametrize("call", CALLS)
def test_ctrl_c_anywhere_in_a_blocking_call_leaves_nothing_behind(store: AsyncMilvusVectorStore, call: str) -> None:
    connected = store.live()
    for place in range(1, 2_000):
        # While the interruption is raised its frames live: what they would have given back is not collected for them.
        try:
            with Strike(place) as strike:
                CALLS[call](store)
        except KeyboardInterrupt:
            assert not connected.calls, strike.where
            assert works(store), strike.where
        if strike.where is None:
            break
    assert place > 50
    assert store.statistics().waiting == 0


@follows_the_instructions
def test_ctrl_c_anywhere_in_close_lets_go_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "own.db"
    stores = []  # kept: what is done for one that nobody has any more is not to be struck
    for place in range(1, 500):
        store = AsyncMilvusVectorStore(str(path), dim=DIM)
        stores.append(store)
        try:
            with Strike(place) as strike:
                store.close()
        except KeyboardInterrupt:
            store.close()  # where nothing was to be heard of it yet; it waits for what has begun
        assert is_free(path), strike.where
        if strike.where is None:
            break
    assert place > 10


@follows_the_instructions
@pytest.mark.parametrize(("makes", "step"), [("nothing", 1), ("a collection", 11)])  # which takes half a second
def test_ctrl_c_anywhere_in_the_constructor_leaves_nothing_open(tmp_path: Path, makes: str, step: int) -> None:
    """Nor a lock of gRPC's locked, which a call in the main thread may leave so."""
    with LiteServer(tmp_path / "data") as server, AsyncMilvusVectorStore(server.uri, dim=DIM):
        for place in range(1, 500, step):
            name = "llamacollection" if makes == "nothing" else f"c{place}"
            with contextlib.suppress(KeyboardInterrupt), Strike(place) as strike:
                AsyncMilvusVectorStore(server.uri, token="its own", collection_name=name, dim=DIM).close()
            blocked_until(lambda: not is_opened_with("its own"))
            if strike.where is None:
                break
    assert place > 100


def is_opened_with(token: str) -> bool:
    is_open = any(each.token == token for each in list(Endpoint._sharing._users))
    if is_open:
        gc.collect()  # what is made anew stands in a cycle, upstream's
    return is_open
