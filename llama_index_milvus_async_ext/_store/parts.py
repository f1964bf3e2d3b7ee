"""The nodes of a writer's call in parts, so that one is embedded while another is written."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from llama_index.core.schema import BaseNode, MetadataMode

from llama_index_milvus_async_ext._lane.port import Port
from llama_index_milvus_async_ext._milvus.session import Connected
from llama_index_milvus_async_ext._nodes.vectors import set_embedding
from llama_index_milvus_async_ext._store.open_store import OpenStore
from llama_index_milvus_async_ext._store.writing import PendingWrite, Write
from llama_index_milvus_async_ext.report import FailedNode, WriteReport


@dataclass
class Part:
    """Nodes that are embedded together, or written together."""

    nodes: list[BaseNode]
    missing: list[BaseNode]  # those that have no embedding yet
    errors: dict[int, Exception] = field(default_factory=dict)  # of the embedding model, by the id() of the node
    is_last: bool = False
    report: WriteReport | None = None

    def join(self, other: Part) -> None:
        """Take another part in, to be written with this one."""
        self.nodes += other.nodes
        self.errors |= other.errors

    def finish(self, written: PendingWrite) -> None:
        """Wait for the report; it is kept if that is interrupted, too."""
        try:
            self.report = written.result()
        except BaseException as interruption:
            self.report = getattr(interruption, "report", None)
            raise

    async def awrite(self, store: OpenStore, connected: Connected, port: Port) -> None:
        """Write the part; the report is kept if the call is interrupted, too."""
        try:
            self.report = await Write(store, connected, port, self.nodes).run()
        except BaseException as interruption:
            self.report = getattr(interruption, "report", None)
            raise

    def embed_with(self, embed: Callable[[list[str]], list[list[float]]]) -> None:
        """Embed what is missing. A failure is kept: it costs these nodes, and no others."""
        if self.missing:
            try:
                self._set(embed(self._texts()))
            except Exception as error:
                self._keep(error)

    async def aembed_with(self, embed: Callable[[list[str]], Awaitable[list[list[float]]]]) -> None:
        """As `embed_with`."""
        if self.missing:
            try:
                self._set(await embed(self._texts()))
            except Exception as error:
                self._keep(error)

    def counted_on(self, bar: Any) -> Callable[[object], None]:
        """A callback that moves a progress bar on by this part."""
        return lambda _: bar.update(len(self.nodes))

    def explained(self) -> WriteReport:
        """The report, with the embedding model's error where the store could only say that there is no embedding."""
        report = self.report
        assert report is not None
        if not self.errors:
            return report
        failed = [
            FailedNode(f.node, self.errors[id(f.node)], 0, True) if id(f.node) in self.errors and not f.attempts else f
            for f in report.failed
        ]
        return replace(report, failed=failed)

    def _texts(self) -> list[str]:
        return [node.get_content(metadata_mode=MetadataMode.EMBED) for node in self.missing]

    def _set(self, embeddings: list[list[float]]) -> None:
        for node, embedding in zip(self.missing, embeddings, strict=True):
            set_embedding(node, embedding)

    def _keep(self, error: Exception) -> None:
        self.errors = dict.fromkeys(map(id, self.missing), error)


class HandedOver:
    """What a call has handed to the store, part by part.

    Embedded parts are small, so that writing begins early. While the server is busy with earlier ones, they are
    gathered until they fill a request: of small ones a server manages fewer rows a second.
    """

    def __init__(self, least_nodes: int) -> None:
        self.parts: list[Part] = []
        self._least_nodes = least_nodes
        self._gathered: Part | None = None

    def ready_after(self, part: Part, is_idle: bool) -> Part | None:
        """What is to be handed over now that a part is embedded: it and those before it, or nothing yet."""
        if self._gathered is None:
            self._gathered = part
        else:
            self._gathered.join(part)
        if not (is_idle or part.is_last or len(self._gathered.nodes) >= self._least_nodes):
            return None
        ready, self._gathered = self._gathered, None
        self.parts.append(ready)
        return ready
