"""The stream of documents, read beside the other stages, a few documents at a time."""

from __future__ import annotations

import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from typing import Any

from llama_index_milvus_async_ext._flow.threads import Calls

_DOCUMENTS_PER_CALL = 100
_SECONDS_PER_CALL = 0.02  # what a slow source has given by then goes on at once


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

    async def elements(self) -> AsyncIterator[Any]:
        """The elements; none follow an error of the stream's."""
        stream = self._stream
        if isinstance(stream, AsyncIterable):
            async for element in self._awaited(stream.__aiter__()):
                yield element
            return
        iterator: Iterator[Any] | None = None
        ended = False
        while not ended:
            if iterator is None:
                iterator, elements, ended = await self._calls.call(self._begun, stream)
            else:
                elements, ended = await self._calls.call(self._next, iterator)
            for element in elements:
                yield element

    async def _awaited(self, iterator: AsyncIterator[Any]) -> AsyncIterator[Any]:
        while True:
            started = time.perf_counter()
            try:
                element = await iterator.__anext__()
            except StopAsyncIteration:
                return
            except Exception as error:
                self.error = error
                return
            finally:
                self.seconds += time.perf_counter() - started
            for each in _flat(element):
                yield each

    def _begun(self, stream: Iterable[Any]) -> tuple[Iterator[Any], list[Any], bool]:
        """The stream's iterator, made where it is read: some things may only be used in the thread that made them."""
        try:
            iterator = iter(stream)
        except Exception as error:
            self.error = error
            return iter(()), [], True
        return iterator, *self._next(iterator)

    def _next(self, iterator: Iterator[Any]) -> tuple[list[Any], bool]:
        started = time.perf_counter()
        elements: list[Any] = []
        try:
            while len(elements) < _DOCUMENTS_PER_CALL and time.perf_counter() < started + _SECONDS_PER_CALL:
                elements += _flat(next(iterator))
        except StopIteration:
            return elements, True
        except Exception as error:
            self.error = error
            return elements, True
        finally:
            self.seconds += time.perf_counter() - started
        return elements, False


def _flat(element: Any) -> list[Any]:
    # `SimpleDirectoryReader.iter_data` yields a list for each file.
    return list(element) if isinstance(element, (list, tuple)) else [element]
