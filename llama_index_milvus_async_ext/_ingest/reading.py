"""The stream of documents, read beside the other stages, a few documents at a time."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from typing import Any

from llama_index_milvus_async_ext._flow.awaiting import awaited
from llama_index_milvus_async_ext._flow.foreign import as_error
from llama_index_milvus_async_ext._flow.threads import Calls

_DOCUMENTS_PER_CALL = 100  # that is how far a stream is read ahead
_SECONDS_PER_CALL = 0.02
# A stream that has a loop of its own may find a task of that cancelled: nobody cancels what runs in a thread.
_OF_A_STREAM = (Exception, asyncio.CancelledError)


class Reading:
    """What a stream yields, one after the other; a list that it yields counts as its elements.

    Attributes:
        error: What ended the stream early, if anything did.
        seconds: How long it took to read.
    """

    def __init__(self, stream: Iterable[Any] | AsyncIterable[Any], calls: Calls) -> None:
        self.error: Exception | None = None
        self.seconds = 0.0
        self._stream = stream
        self._calls = calls
        self._is_stopped = False

    def stop(self) -> None:
        """Read no further; what has been read is still yielded."""
        self._is_stopped = True

    async def elements(self) -> AsyncIterator[Any]:
        """The elements; none follow an error of the stream's."""
        stream = self._stream
        if isinstance(stream, AsyncIterable):
            async for element in self._awaited(stream.__aiter__()):
                yield element
            return
        iterator = await self._calls.call(self._begun, stream)
        is_more = iterator is not None
        while is_more:
            arrivals = _Arrivals()
            reading = asyncio.ensure_future(self._calls.call(self._next, iterator, arrivals))
            reading.add_done_callback(arrivals.end)
            try:
                async for element in arrivals.elements():
                    yield element
                is_more = await reading and not self._is_stopped
            finally:
                reading.cancel()

    async def _awaited(self, iterator: AsyncIterator[Any]) -> AsyncIterator[Any]:
        while not self._is_stopped:
            started = time.perf_counter()
            try:
                element = await awaited(iterator.__anext__(), "the stream")
            except StopAsyncIteration:
                return
            except Exception as error:
                self.error = error
                return
            finally:
                self.seconds += time.perf_counter() - started
            for each in _flat(element):
                yield each

    def _begun(self, stream: Iterable[Any]) -> Iterator[Any] | None:
        """The stream's iterator, made where it is read: some things may only be used in the thread that made them."""
        try:
            return iter(stream)
        except _OF_A_STREAM as error:
            self.error = as_error(error, "the stream")
            return None

    def _next(self, iterator: Iterator[Any], arrivals: _Arrivals) -> bool:
        """Read some more; whether there may be others."""
        started = time.perf_counter()
        number = 0
        try:
            end = started + _SECONDS_PER_CALL
            while number < _DOCUMENTS_PER_CALL and time.perf_counter() < end and not self._is_stopped:
                found = _flat(next(iterator))
                number += len(found)
                arrivals.put(found)
        except StopIteration:
            return False
        except _OF_A_STREAM as error:
            self.error = as_error(error, "the stream")
            return False
        finally:
            self.seconds += time.perf_counter() - started
        return True


class _Arrivals:
    """Elements on their way from the reader's thread: each goes on at once, also while the next keeps it waiting."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._elements: deque[Any] = deque()
        self._woken = asyncio.Event()
        self._is_told = False
        self._has_ended = False

    def put(self, elements: list[Any]) -> None:
        """Hand elements over; in the reader's thread."""
        self._elements.extend(elements)
        if not self._is_told:
            self._is_told = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._woken.set)

    def end(self, _: object) -> None:
        """Nothing more comes; on the loop."""
        self._has_ended = True
        self._woken.set()

    async def elements(self) -> AsyncIterator[Any]:
        """What arrives."""
        while True:
            await self._woken.wait()
            self._woken.clear()
            self._is_told = False  # first: what is put from here on tells again
            has_ended = self._has_ended
            while self._elements:
                yield self._elements.popleft()
            if has_ended:
                return


def _flat(element: Any) -> list[Any]:
    # `SimpleDirectoryReader.iter_data` yields a list for each file.
    return list(element) if isinstance(element, (list, tuple)) else [element]
