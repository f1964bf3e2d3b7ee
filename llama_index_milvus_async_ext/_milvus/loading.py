"""Collections that are not loaded, which Milvus neither searches nor looks up."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Awaitable
from typing import TypeVar

from pymilvus.client.types import LoadState
from pymilvus.exceptions import MilvusException

from llama_index_milvus_async_ext._milvus.connection import Connection
from llama_index_milvus_async_ext._milvus.errors import COLLECTION_NOT_LOADED, NotLoadedError
from llama_index_milvus_async_ext._milvus.time_left import TimeLeft

_LOAD_SECONDS = 30.0

T = TypeVar("T")


class Loading:
    """What is done about collections that are not loaded.

    Milvus Lite releases all of them at each of its starts, and is told to load what is asked for. A server loads them
    by itself then, which takes a while; but what somebody has released, or has never loaded, stays so.

    Args:
        connection: The way to Milvus.
        is_lite: Whether that is Milvus Lite.
    """

    def __init__(self, connection: Connection, is_lite: bool) -> None:
        self._connection = connection
        self._is_lite = is_lite
        self._loads: dict[str, asyncio.Task[object]] = {}  # under way

    async def of(self, collection: str, answer: Awaitable[T], timeout: float) -> T:
        """An answer that Milvus gives if the collection is loaded; another attempt may have it, if it is not.

        Raises:
            NotLoadedError: No other attempt will.
        """
        left = TimeLeft(timeout)
        try:
            return await answer
        except MilvusException as failure:
            if failure.code == COLLECTION_NOT_LOADED:
                if self._is_lite:
                    self._load(collection)
                elif await self._is_released(collection, left()):
                    raise NotLoadedError(collection) from None
            raise

    def _load(self, collection: str) -> None:
        if collection not in self._loads:
            asking = self._connection.ask("load_collection", collection, timeout=_LOAD_SECONDS)
            task = self._loads[collection] = asyncio.ensure_future(asking)
            task.add_done_callback(functools.partial(self._end, collection))

    def _end(self, collection: str, load: asyncio.Task[object]) -> None:
        del self._loads[collection]
        if not load.cancelled():
            load.exception()  # not to be complained of: the next attempt will tell

    async def _is_released(self, collection: str, timeout: float) -> bool:
        with contextlib.suppress(MilvusException):  # a server that has just started can't tell
            told = await self._connection.ask("get_load_state", collection, timeout=timeout)
            return bool(told["state"] == LoadState.NotLoad)
        return False
