"""One call of a writer: nodes in parts, of which one is embedded while another is written."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.schema import BaseNode

from llama_index_milvus_async_ext._flow.stages import Stage, Stopwatch, flow
from llama_index_milvus_async_ext._ingest.embedding import Embed, Embedder
from llama_index_milvus_async_ext._lane.items import CancelledCallError
from llama_index_milvus_async_ext._lane.port import Port
from llama_index_milvus_async_ext._milvus.session import Connected
from llama_index_milvus_async_ext._nodes.rows import key_of
from llama_index_milvus_async_ext._store import calls
from llama_index_milvus_async_ext._store.open_store import OpenStore
from llama_index_milvus_async_ext._store.records import Records
from llama_index_milvus_async_ext._store.writing import Write
from llama_index_milvus_async_ext.report import FailedNode, WriteReport

_NODES_PER_PART = 2_000
_WRITES_AT_ONCE = 6


@dataclass
class _Part:
    """Nodes that are embedded together, or written together."""

    nodes: list[BaseNode] = field(default_factory=list)
    missing: list[BaseNode] = field(default_factory=list)  # those that have no embedding yet
    report: WriteReport | None = None


class EmbedAndWrite:
    """Embeds nodes that have no embedding, while it writes those that have one.

    Args:
        store: Where the nodes go.
        connected: Its connection, on which this call has begun.
        nodes: The nodes.
        model: What embeds those without an embedding, if anything does.
        replaces_documents: Whether the earlier nodes of the documents in hand are deleted at the end.
        partition: The partition to write to, and to replace documents in; None for the default one, and for all.
        bar: A tqdm bar of nodes.
    """

    def __init__(
        self,
        store: OpenStore,
        connected: Connected,
        nodes: Sequence[BaseNode],
        model: BaseEmbedding | None,
        replaces_documents: bool,
        partition: str | None,
        bar: Any,
    ) -> None:
        self._started = time.perf_counter()
        self._store = store
        self._connected = connected
        self._nodes = nodes
        self._model = model
        self._replaces_documents = replaces_documents
        self._partition = partition
        self._bar = bar
        self._errors: dict[int, Exception] = {}  # of the embedding model, by the id() of the node
        self._written: list[_Part] = []  # what has been handed to the store, in the order of the nodes

    async def run(self, port: Port, embed: Embed | None) -> None:
        """Do it; what becomes of each node stands in the report.

        Args:
            port: The caller's way to the store.
            embed: The way to the model.
        """
        records = Records(self._store, self._connected, port, self._partition)
        earlier = await self._earlier_rows(port, records) if self._replaces_documents else {}
        embedder = Embedder(self._model, embed) if self._model is not None and embed is not None else None
        await flow(self._source(embedder), self._stages(port, embedder), Stopwatch())
        if earlier:
            await records.delete(self._replaced(earlier))

    def report(self) -> WriteReport:
        """What is known of each node; what was not handed to the store was not written."""
        parts = [explained(part.report, self._errors) for part in self._written if part.report is not None]
        report = WriteReport.merged(parts, time.perf_counter() - self._started)
        rest = self._nodes[len(report.written) + len(report.failed) + len(report.unknown) :]
        if rest:
            error = CancelledCallError("the call was interrupted before this was sent")
            report.failed.extend(FailedNode(node, error, 0, True) for node in rest)
        return report

    # --- stages

    def _stages(self, port: Port, embedder: Embedder | None) -> list[Stage]:
        async def embedded(parts: list[_Part]) -> list[_Part]:
            assert embedder is not None
            for part in parts:
                failed = await embedder.embed(part.missing)
                self._errors.update((id(part.missing[place]), error) for place, error in failed.items())
            return parts

        async def write(parts: list[_Part]) -> list[_Part]:
            part = _Part([node for each in parts for node in each.nodes])
            self._written.append(part)
            try:
                part.report = await Write(self._store, self._connected, port, part.nodes, self._partition).run()
            except BaseException as interruption:
                part.report = getattr(interruption, "report", None)
                raise
            self._bar.update(len(part.nodes))
            return []

        rows = self._store.batch_size
        # Half a request is worth one: with whole ones the server has less to do while the model works, and more at
        # the end (both together took 5 to 8 % longer).
        writing = Stage("write", write, _WRITES_AT_ONCE, rows, max(rows // 2, 1), 2 * rows, _weight)
        if embedder is None:
            return [writing]
        return [Stage("embed", embedded, embedder.at_once, capacity=embedder.at_once, ordered=True), writing]

    async def _source(self, embedder: Embedder | None) -> AsyncIterator[_Part]:
        if embedder is None:
            size = max(len(self._nodes), 1) if self._bar.disable else _NODES_PER_PART
            for start in range(0, len(self._nodes), size):
                yield _Part(list(self._nodes[start : start + size]))
            return
        part = _Part()
        for node in self._nodes:
            if len(part.missing) >= embedder.texts or len(part.nodes) >= _NODES_PER_PART:
                yield part
                part = _Part()
            part.nodes.append(node)
            if node.embedding is None:
                part.missing.append(node)
        if part.nodes:
            yield part

    # --- replaced documents

    async def _earlier_rows(self, port: Port, records: Records) -> dict[str, list[Any]]:
        """The keys of what the documents in hand have in the collection, by document, but for what is written again."""
        documents = list(dict.fromkeys(node.ref_doc_id for node in self._nodes if node.ref_doc_id))
        key_name = (await calls.schema(self._store, self._connected, port)).primary_key.name
        new = {key_of(node, key_name) for node in self._nodes}
        earlier: dict[str, list[Any]] = {}
        async for rows in records.pages_of(documents):
            for row in rows:
                if row.key not in new:
                    earlier.setdefault(row.document_id, []).append(row.key)
        return earlier

    def _replaced(self, earlier: dict[str, list[Any]]) -> list[Any]:
        """The keys of the documents whose nodes are all written."""
        report = self.report()
        kept = {each.node.ref_doc_id for each in (*report.failed, *report.unknown)}
        return [key for document, keys in earlier.items() if document not in kept for key in keys]


def explained(report: WriteReport, errors: Mapping[int, Exception]) -> WriteReport:
    """A report, with the model's error where the store could only say that there is no embedding.

    Args:
        report: The report.
        errors: Those of the model, by the `id()` of the node.
    """
    if not errors:
        return report
    failed = [
        FailedNode(each.node, errors[id(each.node)], 0, True) if id(each.node) in errors and not each.attempts else each
        for each in report.failed
    ]
    return replace(report, failed=failed)


def _weight(part: _Part) -> int:
    return len(part.nodes)
