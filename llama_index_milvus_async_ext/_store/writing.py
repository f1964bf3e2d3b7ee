"""One write of a store: from its nodes to the report of what became of each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llama_index.core.schema import BaseNode
from pymilvus.exceptions import MilvusException

from llama_index_milvus_async_ext._lane.items import CancelledCallError, Failure, Submission
from llama_index_milvus_async_ext._lane.journey import Request
from llama_index_milvus_async_ext._lane.port import Port
from llama_index_milvus_async_ext._milvus.errors import SchemaChangedError, SchemaMismatchError, classify, fresh
from llama_index_milvus_async_ext._milvus.schema import ID_FIELD, Schema
from llama_index_milvus_async_ext._milvus.session import Connected
from llama_index_milvus_async_ext._nodes import sparse
from llama_index_milvus_async_ext._nodes.rows import key_of
from llama_index_milvus_async_ext._store import calls, tracing
from llama_index_milvus_async_ext._store.partitions import check_partition, partition_of
from llama_index_milvus_async_ext._store.write_lanes import write_lane
from llama_index_milvus_async_ext.events import MilvusWriteEvent
from llama_index_milvus_async_ext.report import FailedNode, WriteReport
from llama_index_milvus_async_ext.retry import Verdict

if TYPE_CHECKING:
    from llama_index_milvus_async_ext._store.open_store import OpenStore


class Write:
    """A write under way.

    Whatever interrupts it, a cancellation, Ctrl-C, or a flush that fails, carries the report in its attribute
    `report`.

    Args:
        store: The store.
        connected: Its connection, on which this call has begun.
        port: The caller's.
        nodes: The nodes.
        partition: The partition; None for the default one.
        force_flush: Whether to have Milvus seal what was written.
        records: What the row of each node says of its document; such rows replace earlier ones of the same id,
            whatever the store's `upsert_mode`.
    """

    def __init__(
        self,
        store: OpenStore,
        connected: Connected,
        port: Port,
        nodes: Sequence[BaseNode],
        partition: str | None = None,
        force_flush: bool = False,
        records: Sequence[bytes] | None = None,
    ) -> None:
        self._started = time.perf_counter()
        self._store = store
        self._connected = connected
        self._port = tracing.traced(port, store.collection_name)
        self._nodes = list(nodes)
        self._ids = [node.node_id for node in self._nodes]
        self._partition = partition
        self._force_flush = force_flush
        self._records = records
        self._schema: Schema | None = None
        self._vectors: list[Any] | None = None  # sparse ones, or the errors in their places
        self._places: list[int] | None = None  # of the nodes that are submitted; None for all
        self._failures: dict[int, Failure] = {}
        self._retries = 0
        self._open_places: Sequence[int] = ()  # of what has been submitted, and has no outcome yet
        self._has_outcomes = False

    async def run(self) -> WriteReport:
        """Write, and report; raises for no node."""
        try:
            request = await self._prepare()
            if request is not None:
                submission, *_ = await self._port.submit(request)
                self._record(submission)
            return await self._conclude()
        except BaseException as interruption:
            self._interrupt(interruption)
            raise

    async def _prepare(self) -> Request | None:
        """What is to be submitted; None if that is nothing."""
        store = self._store
        encoder = store.sparse_encoder
        if encoder is not None:
            texts = [node.get_content() for node in self._nodes]
            self._vectors = await sparse.of_documents(encoder, texts, self._port.awaits)
            for place, vector in enumerate(self._vectors):
                if isinstance(vector, Exception):
                    self._failures[place] = Failure(vector, 0, True, False)
            if self._failures:
                self._places = [place for place in range(len(self._nodes)) if place not in self._failures]
        self._schema = self._connected.endpoint.connection.known_schema(store.collection_name)
        try:
            await check_partition(store, self._connected, self._port, self._partition)
            self._schema = self._schema or await calls.schema(store, self._connected, self._port)
        except MilvusException as error:  # nothing can be sent: that, too, is an outcome of each node
            failure = Failure(error, 0, classify(error).retryable, False)
            self._fail_others(failure)
            self._schema = None  # so that it is not tried again
            return None
        return self._request(self._schema)

    def _request(self, schema: Schema, upsert: bool | None = None) -> Request:
        endpoint = self._connected.endpoint
        lane = write_lane(self._store, endpoint, schema, self._partition, upsert or self._records is not None or None)
        values: list[Any] = self._nodes
        if self._vectors is not None or self._records is not None:
            nothing = [None] * len(self._nodes)
            values = list(zip(self._nodes, self._vectors or nothing, self._records or nothing, strict=True))
        keys = self._keys(schema)
        if self._places is not None:
            values = [values[place] for place in self._places]
            keys = [keys[place] for place in self._places] if keys is not None else None
        self._open_places = self._places if self._places is not None else range(len(self._nodes))
        self._has_outcomes = True
        return Request(endpoint.shell, lane, values, keys, "write_request")

    def _keys(self, schema: Schema) -> list[Any] | None:
        """Of each row the key, by which Milvus replaces it; None if Milvus makes the keys up, and so never does."""
        key = schema.primary_key
        if key.auto_id:
            return None
        if key.name == ID_FIELD:
            return self._ids
        keys = (key_of(node, key.name) for node in self._nodes)
        # One without a fitting key fails by itself, when its row is made.
        return [key if isinstance(key, (str, int)) else id_ for key, id_ in zip(keys, self._ids, strict=True)]

    def _record(self, submission: Submission[Any]) -> None:
        """Take the outcomes of what was submitted."""
        without = submission.unsettled_indices() if submission.remaining else set()  # an interruption may not wait
        failed = sorted(without.union(submission.failed_indices()))
        places, self._open_places = self._open_places, ()
        self._has_outcomes = True
        self._retries += submission.retries
        if not failed and not self._failures:
            return
        earlier = {place: self._failures.pop(place) for place in places if place in self._failures}
        for index in failed:
            failure = submission.failure(index) or _lost()
            before = earlier.get(places[index])
            if before is not None:  # no refusal settles what an earlier request left open
                attempts, ambiguous = before.attempts + failure.attempts, before.ambiguous or failure.ambiguous
                failure = replace(failure, attempts=attempts, ambiguous=ambiguous)
            self._failures[places[index]] = failure

    async def _conclude(self) -> WriteReport:
        """Try once more what did not fit the schema, flush, and report."""
        if self._failures:
            await self._submit_again()
        if self._force_flush:
            await calls.call(self._store, self._connected, self._port, calls.flush(self._store.collection_name))
        report = self._report()
        self._tell(report)
        return report

    async def _submit_again(self) -> None:
        """Submit those anew that were refused by a schema which the collection has no longer."""
        schema = self._schema
        refused = [place for place, failure in self._failures.items() if _is_refused(failure)]
        if schema is None or not refused:
            return
        try:
            now = await calls.schema_again(self._store, self._connected, self._port, schema)
        except MilvusException:
            return
        if now is schema:
            return
        may_be_there = any(self._failures[place].ambiguous for place in refused)
        self._schema, self._places = now, sorted(refused)
        submission, *_ = await self._port.submit(self._request(now, upsert=may_be_there or None))
        self._record(submission)

    def _fail_others(self, failure: Failure) -> None:
        self._failures = dict.fromkeys(range(len(self._nodes)), failure) | self._failures
        self._has_outcomes = True

    def _interrupt(self, interruption: BaseException) -> None:
        """Give what interrupted the write its report: what did not come is not known, and the rest was not sent."""
        if isinstance(interruption, GeneratorExit):  # of that, nobody is told
            return
        for submission in getattr(interruption, "submissions", ()):
            if submission.lane.kind == "rows":
                self._record(submission)
        self._failures |= dict.fromkeys(self._open_places, _lost())
        self._open_places = ()
        if not self._has_outcomes:
            error = CancelledCallError("the call was interrupted before this was sent")
            self._fail_others(Failure(error, 0, True, False))
        report = self._report()
        self._tell(report)
        interruption.report = report  # type: ignore[attr-defined]

    def _report(self) -> WriteReport:
        """What has become of each node."""
        failures = self._failures
        written = [key for place, key in enumerate(self._ids) if place not in failures] if failures else self._ids
        report = WriteReport(
            written=written, retries=self._retries, elapsed_seconds=time.perf_counter() - self._started
        )
        # Several callers may share the error of one request: each gets a copy of its own, which holds nothing else.
        copies: dict[int, BaseException] = {}
        for place in sorted(failures):
            failure = failures[place]
            error = copies.get(id(failure.error))
            if error is None:
                error = copies[id(failure.error)] = fresh(failure.error)
            failed = FailedNode(self._nodes[place], error, failure.attempts, failure.retryable)
            (report.unknown if failure.ambiguous else report.failed).append(failed)
        return report

    def _tell(self, report: WriteReport) -> None:
        if tracing.is_listened_to():
            tracing.dispatcher.event(
                MilvusWriteEvent(
                    collection_name=self._store.collection_name,
                    written=len(report.written),
                    failed=len(report.failed),
                    unknown=len(report.unknown),
                    retries=report.retries,
                    elapsed_seconds=report.elapsed_seconds,
                )
            )


async def write(
    store: OpenStore,
    connected: Connected,
    port: Port,
    nodes: Sequence[BaseNode],
    options: dict[str, Any],
) -> WriteReport:
    """Write nodes, and report what became of each."""
    partition = partition_of(options)
    return await Write(store, connected, port, nodes, partition, options.get("force_flush", False)).run()


def _lost() -> Failure:
    return Failure(CancelledCallError("the call was interrupted, and its outcome is not known"), 0, True, True)


def _is_refused(failure: Failure) -> bool:
    """Whether a node may fit the collection as it is now."""
    error = failure.error
    if isinstance(error, (SchemaMismatchError, SchemaChangedError)):
        return True
    return isinstance(error, MilvusException) and classify(error) is Verdict.BAD_DATA
