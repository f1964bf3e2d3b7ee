"""The writer: a step of an ingestion pipeline that stores what passes through it."""

from __future__ import annotations

import contextlib
import copy
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from llama_index.core.base.embeddings.base import BaseEmbedding
from llama_index.core.bridge.pydantic import Field, PrivateAttr, SerializeAsAny
from llama_index.core.embeddings.utils import EmbedType, resolve_embed_model
from llama_index.core.schema import BaseNode, TransformComponent
from llama_index.vector_stores.milvus import MilvusVectorStore
from llama_index_instrumentation import get_dispatcher
from tqdm import tqdm

from llama_index_milvus_async_ext._flow.threads import OwnThread, WaitingThread
from llama_index_milvus_async_ext._ingest.embed_and_write import EmbedAndWrite
from llama_index_milvus_async_ext._ingest.embedding import Embed, awaiting, blocking
from llama_index_milvus_async_ext._lane.port import LoopPort
from llama_index_milvus_async_ext._lane.thread import IoThread
from llama_index_milvus_async_ext._lane.thread_port import ThreadPort
from llama_index_milvus_async_ext._milvus.session import Connected
from llama_index_milvus_async_ext._store.partitions import named_partition
from llama_index_milvus_async_ext.report import WriteReport
from llama_index_milvus_async_ext.vector_store import AsyncMilvusVectorStore

dispatcher = get_dispatcher(__name__)


class AsyncMilvusWriter(TransformComponent):
    """Writes the nodes that pass through a pipeline to Milvus, and passes them on.

        pipeline = IngestionPipeline(transformations=[SentenceSplitter(), embed_model, AsyncMilvusWriter(store)])
        nodes = await pipeline.arun(documents=documents)

    Use it as the last step, for sync and async runs. It returns the same nodes in the same order. The pipeline's cache
    never skips it: each run writes. With `embed_model` it also embeds the nodes that have no embedding, while it
    writes those that have one, so that the whole takes about as long as the slower of the two. An async run has up to
    four of the model's batches under way at once; the model's own `num_workers`, if set, is kept to.

    Args:
        vector_store: An `AsyncMilvusVectorStore`; a plain `MilvusVectorStore` is taken over with its connection.
        embed_model: Embeds nodes without an embedding; as `Settings.embed_model` takes it.
        on_failure: "raise" writes all that can be written, then raises `WriteError`; "collect" raises for no node, and
            leaves the outcome in `last_report`.
        show_progress: Whether to show a progress bar.
        replace_documents: Whether to delete, once all nodes of a document are acknowledged, those that it had in the
            collection before: no chunk of a longer version stays behind. All nodes of a document must come in one
            call. For whole corpora there is `aingest`.
        milvus_partition_name: The partition to write to, by the name of the option that `store.add` has; None for the
            default one. It must be there. With `replace_documents`, only what it holds is replaced.

    Raises:
        QueryError: `milvus_partition_name` is no name.
        WriteError: With `on_failure="raise"`, if any node was not written; it carries the report.
    """

    vector_store: AsyncMilvusVectorStore = Field(description="Where the nodes go.")
    embed_model: SerializeAsAny[BaseEmbedding] | None = Field(
        default=None, description="Embeds nodes that have no embedding."
    )
    on_failure: Literal["raise", "collect"] = Field(default="raise", description="What to do about unwritten nodes.")
    show_progress: bool = Field(default=False, description="Whether to show a progress bar.")
    replace_documents: bool = Field(
        default=False, description="Whether the earlier nodes of the documents in hand are deleted."
    )
    milvus_partition_name: str | None = Field(default=None, description="The partition to write to.")

    _last_report: WriteReport | None = PrivateAttr(default=None)

    def __init__(
        self,
        vector_store: MilvusVectorStore,
        embed_model: EmbedType | None = None,
        on_failure: Literal["raise", "collect"] = "raise",
        show_progress: bool = False,
        replace_documents: bool = False,
        milvus_partition_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(vector_store, MilvusVectorStore):
            raise TypeError(
                "vector_store must be an AsyncMilvusVectorStore or a MilvusVectorStore, "
                f"got {type(vector_store).__name__}"
            )
        super().__init__(  # type: ignore[call-arg]
            vector_store=AsyncMilvusVectorStore.from_vector_store(vector_store),
            embed_model=resolve_embed_model(embed_model) if embed_model is not None else None,
            on_failure=on_failure,
            show_progress=show_progress,
            replace_documents=replace_documents,
            milvus_partition_name=named_partition(milvus_partition_name),
            **kwargs,
        )

    @classmethod
    def class_name(cls) -> str:
        """Name of the class, as LlamaIndex stores it."""
        return "AsyncMilvusWriter"

    @property
    def last_report(self) -> WriteReport | None:
        """What became of the nodes of the last call; None before the first, and where worker processes wrote."""
        return self._last_report

    @dispatcher.span
    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Write nodes, blocking; see the class. The embedding model's blocking method is called, in this thread."""
        connected = self.vector_store.live()
        connected.while_held(ThreadPort(), lambda: self._write(connected, nodes))
        return nodes

    def _write(self, connected: Connected, nodes: Sequence[BaseNode]) -> None:
        with self._call(connected, nodes) as call:
            here = WaitingThread()
            embed = blocking(self.embed_model, here) if self.embed_model is not None else None
            here.run(lambda _: _on_this_loop(call, embed))

    @dispatcher.span
    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Write nodes; see the class.

        If the call is cancelled, `last_report` tells what became of each node.
        """
        connected, port = self.vector_store.live(), LoopPort.current()
        with (
            connected.held(port),
            self._call(connected, nodes) as call,
            contextlib.closing(OwnThread("milvus-embed")) as aside,
        ):
            await call.run(port, awaiting(self.embed_model, aside) if self.embed_model is not None else None)
        return nodes

    @contextlib.contextmanager
    def _call(self, connected: Connected, nodes: Sequence[BaseNode]) -> Iterator[EmbedAndWrite]:
        """A call, whose report is kept however it ends; it raises for failed nodes, if it is to."""
        turns = IoThread.get().taking_turns() if self.embed_model is not None else contextlib.nullcontext()
        what = "Embedding and writing" if self.embed_model is not None else "Writing"
        with tqdm(total=len(nodes), desc=f"{what} to Milvus", unit="node", disable=not self.show_progress) as bar:
            store, model, replaces = self.vector_store, self.embed_model, self.replace_documents
            partition = named_partition(self.milvus_partition_name)  # it may have been assigned
            call = EmbedAndWrite(store, connected, nodes, model, replaces, partition, bar)
            try:
                with turns:
                    yield call
            except BaseException as interruption:
                interruption.report = self._last_report = call.report()  # type: ignore[attr-defined]
                raise
            self._last_report = report = call.report()
        if self.on_failure == "raise":
            report.raise_for_failures()

    # --- copies and descriptions

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """A description without secrets, different at each call: pipelines cache by it, and must never skip a write."""
        return {
            "class_name": self.class_name(),
            "collection_name": self.vector_store.collection_name,
            "on_failure": self.on_failure,
            "call": uuid.uuid4().hex,
        }

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # pydantic's way would drop, without a word, what does not pickle.
        return (type(self), (self.vector_store, *self._settings()))

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> AsyncMilvusWriter:
        return type(self)(copy.deepcopy(self.vector_store), *self._settings())

    def _settings(self) -> tuple[Any, ...]:
        return (
            self.embed_model,
            self.on_failure,
            self.show_progress,
            self.replace_documents,
            self.milvus_partition_name,
        )

    def __repr_args__(self) -> Any:
        # An embedding model's own repr may show its API key.
        yield "collection_name", self.vector_store.collection_name
        yield "uri", self.vector_store.uri
        yield "embed_model", type(self.embed_model).__name__ if self.embed_model is not None else None
        yield "on_failure", self.on_failure


async def _on_this_loop(call: EmbedAndWrite, embed: Embed | None) -> None:
    await call.run(LoopPort.current(), embed)
