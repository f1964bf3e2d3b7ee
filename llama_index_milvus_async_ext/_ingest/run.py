"""One ingestion, run: documents are read, looked up, transformed, embedded, written and settled, at the same time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

from llama_index.core.schema import BaseNode

from llama_index_milvus_async_ext._flow.stages import Stage, flow, in_full
from llama_index_milvus_async_ext._ingest.admission import Admission
from llama_index_milvus_async_ext._ingest.embedding import Embed, Embedder
from llama_index_milvus_async_ext._ingest.item import (
    OF_NO_DOCUMENT,
    Item,
    check_keys,
    copied,
    losses_of,
    of_document,
    remedy_for_keys,
    weight_of_nodes,
    weight_of_text,
    written_in_part,
)
from llama_index_milvus_async_ext._ingest.job import Embedding, Job
from llama_index_milvus_async_ext._ingest.reading import Reading
from llama_index_milvus_async_ext._ingest.settling import Settling
from llama_index_milvus_async_ext._ingest.standing import record_bytes, standing
from llama_index_milvus_async_ext._ingest.tally import Tally
from llama_index_milvus_async_ext._ingest.transforming import Transforming
from llama_index_milvus_async_ext._milvus.schema import ID_FIELD
from llama_index_milvus_async_ext._nodes.rows import key_of
from llama_index_milvus_async_ext._store.open_store import OpenStore
from llama_index_milvus_async_ext._store.records import Records
from llama_index_milvus_async_ext._store.writing import Write
from llama_index_milvus_async_ext.report import WriteReport

# Half a request each: four of these are under way at the most, as a node that has been embedded takes 16 kB and more.
_WRITES_AT_ONCE = 4

_NO_VERSION = ""


class Ingestion:
    """A run of a job.

    Args:
        job: What is to be done.
        store: Where the nodes go.
        port, connected: The caller's way, and the store's connection, on which this call has begun.
        reading: The stream of documents.
        transforming: What makes nodes of documents.
        embed: The way to each of the job's embedding models, in their order.
        tally: What has become of the documents so far.
    """

    def __init__(
        self,
        job: Job,
        store: OpenStore,
        connected: Any,
        port: Any,
        reading: Reading,
        transforming: Transforming,
        embed: Sequence[Embed],
        tally: Tally,
    ) -> None:
        self._job = job
        self._store = store
        self._connected = connected
        self._port = port
        self._reading = reading
        self._transforming = transforming
        self._embed = embed
        self._tally = tally
        self._records = Records(store, connected, port, job.partition)
        self._settling = Settling(job, self._records, tally)
        self._admission = Admission(job, reading, self._settling, tally)
        self._is_lite = connected.endpoint.is_lite
        self._key_name = ID_FIELD
        self._written_by: dict[Any, str] = {}  # documents that are under way, by the primary keys of their nodes

    async def run(self, key_name: str) -> None:
        """Do it. Whatever becomes of a document stands in the tally."""
        self._key_name = key_name
        await self._settling.begin()
        await flow(self._admission.items(), self._stages(), self._tally.stopwatch)
        self._tally.stopwatch.seconds["read"] = self._reading.seconds
        if self._reading.error is not None:
            self._tally.fail(None, "read", self._reading.error)
        if self._admission.is_complete:
            with self._tally.stopwatch("delete"):
                await self._settling.delete_missing()
        self._settling.tell([])

    # --- stages

    def _stages(self) -> list[Stage]:
        rows = max(self._store.batch_size // 2, 1)
        # Milvus Lite goes through the whole collection for each look-up, whatever it asks for.
        looked_up = 2_000 if self._is_lite else 500
        stages = [
            Stage(
                "look-up",
                self._look_up,
                at_once=1 if self._is_lite else 4,
                most=looked_up,
                least=looked_up // 2,
                capacity=looked_up,
                weigh=weight_of_text,
            )
        ]
        for number in range(len(self._job.steps.groups)):
            stages.append(
                Stage(
                    "transform",
                    self._transformed_by(number),
                    at_once=self._transforming.at_once,
                    capacity=4 * self._transforming.at_once,
                    weigh=weight_of_text,
                )
            )
            if number < len(self._job.steps.embeddings):
                step = self._job.steps.embeddings[number]
                embedder = Embedder(step.model, self._embed[number], self._tally.count_texts)
                stages.append(
                    Stage(
                        "embed",
                        self._embedded_by(step, embedder),
                        at_once=embedder.at_once,
                        most=embedder.texts,
                        least=embedder.texts,
                        capacity=embedder.at_once * embedder.texts,
                        weigh=weight_of_nodes,
                    )
                )
        write = Stage(
            "write",
            self._write,
            at_once=_WRITES_AT_ONCE,
            most=rows,
            least=max(rows // 2, 1),
            capacity=rows,
            weigh=weight_of_nodes,
        )
        settle = Stage("settle", self._settle, most=1_000, least=100, capacity=1_000)
        return [*stages, write, settle]

    async def _look_up(self, items: list[Item]) -> list[Item]:
        try:
            rows = await self._records.rows_of([item.document_id for item in items])
        except Exception as error:
            return self._fail(items, "look-up", error)
        changed: list[Item] = []
        unchanged: list[Item] = []
        for item in items:
            item.standing = standing(rows.of(item.document_id), item.version)
            # What is stored, and unknown to the docstore, an interrupted run has left: it may be there twice.
            is_settled = item.standing.is_whole and self._settling.is_recorded(item)
            (unchanged if is_settled else changed).append(item)
        try:
            await self._mark_duplicates(changed)
        except Exception as error:
            self._fail(changed, "look-up", error)
            changed = []
        left: list[Item] = []
        for item in changed:
            if item.standing.is_whole and (item.original or "") > item.document_id:
                item.original = None  # a run beside this one may think the reverse: of the two, the lesser id stays
            if item.original is not None:
                item.standing = standing(rows.of(item.document_id), _NO_VERSION)
            is_done = item.original is not None or item.standing.is_whole
            (unchanged if is_done else left).append(item)
        if unchanged:
            await self._settle(unchanged)
        return left

    async def _mark_duplicates(self, items: list[Item]) -> None:
        """Find those documents that another one stands for: which is there, whole, with the same content."""
        originals = {item.document_id: self._settling.duplicates.original_of(item) for item in items}
        rows = await self._records.rows_of(list({each for each in originals.values() if each is not None}))
        for item in items:
            original = originals[item.document_id]
            if original is not None and standing(rows.of(original), item.version).is_whole:
                item.original = original

    def _transformed_by(self, group: int) -> Any:
        async def transform(items: list[Item]) -> list[Item]:
            done = []
            for item in items:
                if self._tally.gave_up:
                    self._fail([item], "transform", self._tally.giving_up())
                    continue
                try:
                    nodes = item.nodes if group else [copied(item.document)]
                    item.nodes = await self._transforming.transform(group, nodes)
                    if group == len(self._job.steps.groups) - 1:
                        item.nodes = [of_document(node, item) for node in item.nodes]
                        item.keys = [key_of(node, self._key_name) for node in item.nodes]
                        check_keys(item, self._key_name)
                except Exception as error:
                    self._fail([item], "transform", error)
                else:
                    done.append(item)
            return done

        return transform

    def _embedded_by(self, step: Embedding, embedder: Embedder) -> Any:
        async def work(items: list[Item]) -> list[Item]:
            nodes = []
            owners = []
            for item in items:
                if self._tally.gave_up:
                    self._fail([item], "embed", self._tally.giving_up())
                    continue
                wanted = [node for node in item.nodes if node.embedding is None or not step.only_missing]
                nodes += wanted
                owners += [item] * len(wanted)
            for place, error in (await embedder.embed(nodes)).items():
                if not owners[place].is_closed:
                    self._fail([owners[place]], "embed", error)
            return [item for item in items if not item.is_closed]

        return work

    async def _write(self, items: list[Item]) -> list[Item]:
        for item in items:
            others = [self._written_by.get(key, item.document_id) for key in item.keys]
            self._fail_shared(item, next((each for each in others if each != item.document_id), None))
            if not item.is_closed:
                self._written_by.update(dict.fromkeys(item.keys, item.document_id))
        unsure = {key: item for item in items if not item.is_closed for key in item.unsure_keys}
        try:
            owners = await self._records.owners(list(unsure))
        except Exception as error:
            self._fail([item for item in items if not item.is_closed], "look-up", error)
            return []
        for key, owner in owners.items():
            if owner not in (unsure[key].document_id, *OF_NO_DOCUMENT):
                self._fail_shared(unsure[key], owner)
        writable = [item for item in items if not item.is_closed]
        nodes = [node for item in writable for node in item.nodes]
        if not nodes:
            return writable
        records: list[bytes] = []
        for item in writable:
            records += [record_bytes(item.version, item.keys, self._job.source)] * len(item.nodes)
        # In full: else rows could come that a run which begins meanwhile has not seen.
        report = await in_full(self._written(nodes, records))
        written = writable if report.ok else await self._without_failures(writable, report)
        for item in written:
            item.nodes = []  # they take the most memory
        return written

    def _fail_shared(self, item: Item, other: str | None) -> None:
        """Refuse a document that would take another one's nodes away, if there is such a one."""
        if other is not None and not item.is_closed:
            names = f"documents {other!r} and {item.document_id!r} have nodes of the same {self._key_name}"
            self._fail([item], "write", ValueError(f"{names}; {remedy_for_keys(self._key_name)}"))

    async def _written(self, nodes: list[BaseNode], records: list[bytes]) -> WriteReport:
        partition = self._job.partition
        report = await Write(self._store, self._connected, self._port, nodes, partition, records=records).run()
        self._tally.nodes += len(report.written)
        self._tally.retries += report.retries
        return report

    async def _without_failures(self, items: list[Item], report: WriteReport) -> list[Item]:
        failed = losses_of(items, report)
        # Else each run would leave some more of a document that can never be stored as a whole.
        halves = [key for item, part in failed for key in written_in_part(item, part)]
        with contextlib.suppress(Exception):  # the next run that succeeds deletes them
            await self._records.delete(halves)
        for item, part in failed:
            self._fail([item], "write", (*part.failed, *part.unknown)[0].error, part)
        return [item for item in items if not item.is_closed]

    async def _settle(self, items: list[Item]) -> list[Item]:
        try:
            await self._settling.settle(items)
        finally:
            for item in items:
                self._close(item)
        return []

    # --- what is common to them

    def _fail(
        self, items: Iterable[Item], stage: str, error: BaseException, report: WriteReport | None = None
    ) -> list[Item]:
        for item in items:
            self._tally.fail(item.document_id, stage, error, report)
            if stage != "look-up":  # after which it may well be stored
                self._settling.duplicates.fail(item)
            self._close(item)
        return []

    def _close(self, item: Item) -> None:
        """Nothing more is done about a document: another one of its id may come."""
        item.is_closed = True
        for key in item.keys:
            if self._written_by.get(key) == item.document_id:
                del self._written_by[key]
        item.nodes = []
        self._admission.leave(item)
