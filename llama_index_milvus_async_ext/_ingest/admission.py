"""The documents of a stream, let in one after the other: which they are, and none beside another one of its id."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from llama_index.core.schema import BaseNode, Document

from llama_index_milvus_async_ext._flow.warning import warn
from llama_index_milvus_async_ext._ingest.item import Item, check_id
from llama_index_milvus_async_ext._ingest.job import Job
from llama_index_milvus_async_ext._ingest.reading import Reading
from llama_index_milvus_async_ext._ingest.settling import Settling
from llama_index_milvus_async_ext._ingest.tally import Tally
from llama_index_milvus_async_ext._ingest.versions import hash_of


class Admission:
    """Lets the documents of a stream in.

    Args:
        job: The ingestion.
        reading: The stream.
        settling: What knows who has been seen.
        tally: What has become of the documents so far.
    """

    def __init__(self, job: Job, reading: Reading, settling: Settling, tally: Tally) -> None:
        self._job = job
        self._reading = reading
        self._settling = settling
        self._tally = tally
        self._duplicates = settling.duplicates
        self._open: dict[str, asyncio.Event] = {}  # documents that are under way, by their ids
        self._has_warned: set[str] = set()

    @property
    def is_complete(self) -> bool:
        """Whether the stream has been read to its end, and all of it: what was not, may be what seems to be missing."""
        is_read = self._reading.error is None and not self._tally.gave_up
        return is_read and all(each.document_id is not None for each in self._tally.failed)

    async def items(self) -> AsyncIterator[Item]:
        """The documents of the stream, each once it is known which, and no other of its id is under way."""
        async for element in self._reading.elements():
            if self._tally.gave_up:
                self._reading.stop()
            item = self._item(element)
            if item is None:
                continue
            if self._tally.gave_up:  # it was read, though, so it stands in the report
                self._tally.fail(item.document_id, "read", self._tally.giving_up())
                continue
            async for each in self._let_in(item):
                yield each
        if self.is_complete:
            for original, left_out in self._duplicates.orphans().items():
                async for each in self._let_in_again(left_out, original):
                    yield each

    def leave(self, item: Item) -> None:
        """Nothing more is done about a document: another one of its id may come."""
        ended = self._open.pop(item.document_id, None)
        if ended is not None:
            ended.set()

    async def _let_in(self, item: Item) -> AsyncIterator[Item]:
        if item.document_id in self._open:
            self._warn_once(f"the stream holds document {item.document_id[:80]!r} more than once: the last one counts")
            await self._until_left(item.document_id)
        async for each in self._let_in_again(self._duplicates.lost_by(item), item.document_id):
            yield each
        self._duplicates.come(item)
        while (original := self._duplicates.original_of(item)) in self._open:  # if that fails, there is another one
            await self._until_left(original)
        self._open[item.document_id] = asyncio.Event()
        yield item

    async def _let_in_again(self, left_out: list[str], original: str) -> AsyncIterator[Item]:
        """Let documents in that may have been left out for the sake of another one, which is lost once this ends."""
        for document_id in left_out:  # all of them: who is still looked up must not meet who takes the place
            await self._until_left(document_id)
        for document_id in left_out:
            item = self._settling.take_back(document_id, original)
            if item is not None:
                async for each in self._let_in(item):
                    yield each
        for document_id in left_out:
            await self._until_left(document_id)

    async def _until_left(self, document_id: str | None) -> None:
        if document_id in self._open:
            await self._open[document_id].wait()

    def _item(self, element: Any) -> Item | None:
        document_id: str | None = None
        try:
            if not isinstance(element, BaseNode):
                raise TypeError(f"the stream must hold documents, not {type(element).__name__}")
            if self._job.document_id is not None:
                given = self._job.document_id(element)
                if not isinstance(given, str) or not given:
                    raise TypeError(f"document_id= gave {given!r}; it must give a text")
                element = element.model_copy(update={"id_": given})
            elif isinstance(element, Document) and "id_" not in element.model_fields_set:
                self._warn_once(
                    "the documents have random ids, which LlamaIndex made up, so that each run takes them for new "
                    "ones: give them ids that stay the same (SimpleDirectoryReader(..., filename_as_id=True)), or "
                    "aingest a function document_id="
                )
            document_id = element.node_id
            check_id(document_id)
            self._settling.see(document_id)
            hash_ = hash_of(element)
            return Item(element, document_id, self._job.version(element, hash_), hash_)
        except Exception as error:
            self._tally.fail(document_id, "read", error)
            return None

    def _warn_once(self, message: str) -> None:
        if message[:20] not in self._has_warned:
            self._has_warned.add(message[:20])
            warn(message)
