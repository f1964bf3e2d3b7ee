"""One ingestion, run: documents are read, looked up, transformed, embedded, written and settled, at the same time."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

from llama_index.core.schema import BaseNode, Document

from llama_index_milvus_async_ext._flow.stages import Stage, flow, in_full
from llama_index_milvus_async_ext._ingest.embedding import Embed, Embedder
from llama_index_milvus_async_ext._ingest.item import Item, check_id, check_keys, of_document, remedy_for_keys
from llama_index_milvus_async_ext._ingest.job import Embedding, Job
from llama_index_milvus_async_ext._ingest.reading import Reading
from llama_index_milvus_async_ext._ingest.settling import Settling
from llama_index_milvus_async_ext._ingest.standing import record_bytes, standing
from llama_index_milvus_async_ext._ingest.tally import Tally
from llama_index_milvus_async_ext._ingest.transforming import Transforming
from llama_index_milvus_async_ext._milvus.schema import ID_FIELD
from llama_index_milvus_async_ext._store.open_store import OpenStore
from llama_index_milvus_async_ext._store.records import Records
from llama_index_milvus_async_ext._store.writing import Write
from llama_index_milvus_async_ext.report import FailedNode, WriteReport

_WEIGHT_CHARS = 16_384  # a document of more text weighs more than one that is looked up
_WRITES_AT_ONCE = 4


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
        self._records = Records(store, connected, port)
        self._settling = Settling(job, self._records, tally)
        self._is_lite = connected.endpoint.is_lite
        self._key_name = ID_FIELD
        self._open: dict[str, asyncio.Event] = {}  # documents that are under way, by their ids
        self._has_warned: set[str] = set()

    async def run(self, key_name: str) -> None:
        """Do it. Whatever becomes of a document stands in the tally."""
        self._key_name = key_name
        await self._settling.begin()
        await flow(self._items(), self._stages(), self._tally.stopwatch)
        self._tally.stopwatch.seconds["read"] = self._reading.seconds
        if self._reading.error is not None:
            self._tally.fail(None, "read", self._reading.error)
        # What could not be read may be any of those that seem to be missing.
        is_known = all(each.document_id is not None for each in self._tally.failed)
        if is_known and not self._tally.gave_up:
            with self._tally.stopwatch("delete"):
                await self._settling.delete_missing()
        self._settling.tell([])

    # --- stages

    def _stages(self) -> list[Stage]:
        rows = self._store.batch_size
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
                weigh=_weight_of_text,
            )
        ]
        for number in range(len(self._job.steps.groups)):
            stages.append(
                Stage(
                    "transform",
                    self._transformed_by(number),
                    at_once=self._transforming.at_once,
                    capacity=4 * self._transforming.at_once,
                    weigh=_weight_of_text,
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
                        weigh=_weight_of_nodes,
                    )
                )
        write = Stage(
            "write",
            self._write,
            at_once=_WRITES_AT_ONCE,
            most=rows,
            least=max(rows // 2, 1),
            capacity=rows,
            weigh=_weight_of_nodes,
        )
        settle = Stage("settle", self._settle, most=1_000, least=100, capacity=1_000)
        return [*stages, write, settle]

    async def _items(self) -> AsyncIterator[Item]:
        """The documents of the stream, each once it is known which, and no other of its id is under way."""
        async for element in self._reading.elements():
            if self._tally.gave_up:
                return
            item = self._item(element)
            if item is None:
                continue
            earlier = self._open.get(item.document_id)
            if earlier is not None:
                self._warn_once(
                    f"the stream holds document {item.document_id[:80]!r} more than once: the last one counts"
                )
                await earlier.wait()
            self._open[item.document_id] = asyncio.Event()
            yield item

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
            hash_ = element.hash
            return Item(element, document_id, self._job.version(element, hash_), hash_)
        except Exception as error:
            self._tally.fail(document_id, "read", error)
            return None

    def _warn_once(self, message: str) -> None:
        kind = message[:20]
        if kind not in self._has_warned:
            self._has_warned.add(kind)
            warnings.warn(message, UserWarning, stacklevel=2)

    async def _look_up(self, items: list[Item]) -> list[Item]:
        try:
            rows = await self._records.rows_of([item.document_id for item in items])
        except Exception as error:
            return self._fail(items, "look-up", error)
        changed: list[Item] = []
        unchanged: list[Item] = []
        for item in items:
            item.standing = standing(rows.of(item.document_id), item.version)
            is_there = item.standing.is_whole or self._settling.is_duplicate(item)
            (unchanged if is_there else changed).append(item)
        if unchanged:
            await self._settle(unchanged)
        return changed

    def _transformed_by(self, group: int) -> Any:
        async def transform(items: list[Item]) -> list[Item]:
            done = []
            for item in items:
                if self._tally.gave_up:
                    self._close(item)
                    continue
                try:
                    nodes = item.nodes if group else [item.document]
                    item.nodes = await self._transforming.transform(group, nodes)
                    if group == len(self._job.steps.groups) - 1:
                        item.nodes = [of_document(node, item) for node in item.nodes]
                        item.keys = [self._key_of(node) for node in item.nodes]
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
                    self._close(item)
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
        taken: dict[Any, Item] = {}
        writable = []
        for item in items:
            other = next((taken[key] for key in item.keys if key in taken), None)
            if other is not None:
                message = (
                    f"documents {other.document_id!r} and {item.document_id!r} have nodes of the same "
                    f"{self._key_name}; {remedy_for_keys(self._key_name)}"
                )
                self._fail([item], "write", ValueError(message))
                continue
            taken.update(dict.fromkeys(item.keys, item))
            writable.append(item)
        nodes = [node for item in writable for node in item.nodes]
        if not nodes:
            return writable
        records: list[bytes] = []
        for item in writable:
            records += [record_bytes(item.version, item.keys, self._job.source)] * len(item.nodes)
        # In full: else rows could come that a run which begins meanwhile has not seen when it looked.
        report = await in_full(self._written(nodes, records))
        if report.ok:
            return writable
        return self._without_failures(writable, report)

    async def _written(self, nodes: list[BaseNode], records: list[bytes]) -> WriteReport:
        report = await Write(self._store, self._connected, self._port, nodes, records=records).run()
        self._tally.nodes += len(report.written)
        self._tally.retries += report.retries
        return report

    def _without_failures(self, items: list[Item], report: WriteReport) -> list[Item]:
        owners = {id(node): item for item in items for node in item.nodes}
        failed: dict[int, tuple[Item, list[FailedNode], list[FailedNode]]] = {}
        for number, losses in enumerate((report.failed, report.unknown)):
            for each in losses:
                item = owners[id(each.node)]
                entry = failed.setdefault(id(item), (item, [], []))
                (entry[2] if number else entry[1]).append(each)
        for item, refused, unknown in failed.values():
            lost = {id(each.node) for each in (*refused, *unknown)}
            written = [node.node_id for node in item.nodes if id(node) not in lost]
            part = WriteReport(written, refused, unknown, report.retries, report.elapsed_seconds)
            self._fail([item], "write", (*refused, *unknown)[0].error, part)
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
            self._close(item)
        return []

    def _close(self, item: Item) -> None:
        """Nothing more is done about a document: another one of its id may come."""
        item.is_closed = True
        item.nodes = []  # who still holds the document needs them no longer, and they take the most memory
        ended = self._open.pop(item.document_id, None)
        if ended is not None:
            ended.set()

    def _key_of(self, node: BaseNode) -> Any:
        return node.node_id if self._key_name == ID_FIELD else node.metadata.get(self._key_name)


def _weight_of_text(item: Item) -> int:
    return 1 + item.chars // _WEIGHT_CHARS


def _weight_of_nodes(item: Item) -> int:
    return max(len(item.nodes), 1)
