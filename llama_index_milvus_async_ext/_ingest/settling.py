"""The last step of a document: what is stale is deleted, and LlamaIndex's docstore is told."""

from __future__ import annotations

from collections.abc import Sequence

from llama_index.core.ingestion import DocstoreStrategy
from llama_index.core.storage.docstore.types import BaseDocumentStore
from llama_index_instrumentation import get_dispatcher

from llama_index_milvus_async_ext._flow.awaiting import awaited
from llama_index_milvus_async_ext._ingest.docstores import hashes_of
from llama_index_milvus_async_ext._ingest.duplicates import Duplicates
from llama_index_milvus_async_ext._ingest.item import Item
from llama_index_milvus_async_ext._ingest.job import Job
from llama_index_milvus_async_ext._ingest.tally import Tally
from llama_index_milvus_async_ext._store.records import Records
from llama_index_milvus_async_ext.events import MilvusIngestionEvent

dispatcher = get_dispatcher(__name__)


class Settling:
    """Settles documents whose nodes are all acknowledged, or were there before.

    Args:
        job: The ingestion.
        records: The rows of the store's documents.
        tally: What has become of the documents so far.
    """

    def __init__(self, job: Job, records: Records, tally: Tally) -> None:
        self._job = job
        self._records = records
        self._tally = tally
        self._seen: set[str] = set()
        self._hashes: dict[str, str] = {}  # of the documents that the docstore knows
        is_wanted = job.docstore is not None and job.docstore_strategy == DocstoreStrategy.DUPLICATES_ONLY
        self.duplicates = Duplicates({}, self._hashes, self._seen, job.deletes_missing, is_wanted)
        self._told: tuple[int, dict[str, float]] = (0, {})

    @property
    def _deletes_unrecorded(self) -> bool:
        is_wanted = self._job.docstore_strategy == DocstoreStrategy.UPSERTS_AND_DELETE
        return self._job.docstore is not None and is_wanted

    async def begin(self) -> None:
        """Ask the docstore what it knows, once."""
        if self._job.docstore is not None:
            self._hashes.update(await awaited(hashes_of(self._job.docstore), "the docstore"))
            self.duplicates.first.update((hash_, document_id) for document_id, hash_ in self._hashes.items())

    def see(self, document_id: str) -> None:
        """Note that the stream holds a document."""
        if self._job.deletes_missing or self._deletes_unrecorded or self.duplicates.is_wanted:
            self._seen.add(document_id)

    def is_recorded(self, item: Item) -> bool:
        """Whether the docstore knows a document as it is, if that matters: of equal contents, what it knows stays."""
        return not self.duplicates.is_wanted or self._hashes.get(item.document_id) == item.hash

    def take_back(self, document_id: str, original: str) -> Item | None:
        """A document that was left out for the sake of another one, which is lost: it counts no longer.

        None if it was not left out; or is not kept, and has failed so.
        """
        left_out = self.duplicates.take_back(document_id, original)
        if left_out is None:
            return None
        self._tally.count(left_out.outcome, -1)
        self._tally.advance(-1)
        if left_out.item is None:
            error = RuntimeError(
                f"it was left out, as document {original!r} held the same, which the stream holds with other content "
                "as well: run again (and give each document once)"
            )
            self._tally.fail(document_id, "look-up", error)
        return left_out.item

    async def settle(self, items: Sequence[Item]) -> None:
        """Settle documents; one that fails to be is reported."""
        stale: list[object] = []
        for item in items:
            written = set(item.keys)
            stale += [key for key in item.standing.stale if key not in written]
        try:
            await self._records.delete(stale)
        except Exception as error:
            left = [item for item in items if item.standing.stale]
            for item in left:
                self._tally.fail(item.document_id, "delete", error)
            items = [item for item in items if not item.standing.stale]
        recorded = await self._record(items)
        for item in recorded:
            self._count(item)
        self._tally.advance(len(recorded))
        self.tell(recorded)

    async def delete_missing(self) -> None:
        """Delete documents that the stream, which was read to its end, did not hold."""
        if not self._seen:  # an empty stream is more likely a mistake than an empty source
            return
        missing: dict[str, list[object]] = {}
        try:
            if self._job.deletes_missing:
                async for rows in self._records.pages_of_source(self._job.source):
                    for row in rows:
                        if row.document_id not in self._seen:
                            missing.setdefault(row.document_id, []).append(row.key)
            if self._deletes_unrecorded:
                unrecorded = [each for each in self._hashes if each not in self._seen and each not in missing]
                missing |= {document_id: [] for document_id in unrecorded}
                async for rows in self._records.pages_of(unrecorded):
                    for row in rows:
                        missing[row.document_id].append(row.key)
            await self._records.delete([key for keys in missing.values() for key in keys])
        except Exception as error:
            self._tally.fail(None, "delete", error)
            return
        self._tally.deleted += len(missing)
        docstore = self._job.docstore
        if docstore is not None:
            try:
                for document_id in missing:
                    await awaited(docstore.adelete_document(document_id, raise_error=False), "the docstore")
            except Exception as error:
                self._tally.fail(None, "docstore", error)

    def tell(self, items: Sequence[Item]) -> None:
        """Tell LlamaIndex's instrumentation of documents that are settled, and of what has been done since then."""
        nodes, seconds = self._told
        now = dict(self._tally.stopwatch.seconds)
        dispatcher.event(
            MilvusIngestionEvent(
                documents=len(items),
                nodes=self._tally.nodes - nodes,
                failed=len(self._tally.failed),
                stage_seconds={name: value - seconds.get(name, 0.0) for name, value in now.items()},
            )
        )
        self._told = (self._tally.nodes, now)

    async def _record(self, items: Sequence[Item]) -> list[Item]:
        """Tell the docstore of documents, and return those of which it was told."""
        docstore = self._job.docstore
        new = [item for item in items if self._hashes.get(item.document_id) != item.hash]
        if docstore is None or not new:
            return list(items)
        known = [item for item in new if item.original is not None and item.document_id in self._hashes]
        new = [item for item in new if item.original is None]

        async def tell(docstore: BaseDocumentStore) -> None:
            for item in known:  # with other content: it would be taken for the original of that
                await docstore.adelete_document(item.document_id, raise_error=False)
                del self._hashes[item.document_id]
            for item in new:
                if item.document_id in self._hashes:
                    await docstore.adelete_ref_doc(item.document_id, raise_error=False)
            await docstore.async_add_documents([item.document for item in new])
            await docstore.aset_document_hashes({item.document_id: item.hash for item in new})

        try:
            await awaited(tell(docstore), "the docstore")
        except Exception as error:
            for item in (*new, *known):
                self._tally.fail(item.document_id, "docstore", error)
            return [item for item in items if item not in new and item not in known]
        self._hashes.update((item.document_id, item.hash) for item in new)
        self.duplicates.first.update((item.hash, item.document_id) for item in new)
        return list(items)

    def _count(self, item: Item) -> None:
        outcome = _outcome_of(item)
        self._tally.count(outcome, 1)
        if item.original is not None:
            self.duplicates.leave_out(item, item.original, outcome)


def _outcome_of(item: Item) -> str:
    if item.standing.is_whole or not (item.keys or item.standing.is_known):
        return "unchanged"
    return "replaced" if item.standing.is_known else "added"
