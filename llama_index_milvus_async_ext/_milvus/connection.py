"""One connection to Milvus: requests out, answers back."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import orjson
from pymilvus import AnnSearchRequest
from pymilvus.client import ts_utils
from pymilvus.exceptions import ConnectError, MilvusException
from pymilvus.grpc_gen import milvus_pb2

from llama_index_milvus_async_ext._lane import forks
from llama_index_milvus_async_ext._milvus.errors import ClosedConnectionError, RpcFailure, StatusFailure, classify
from llama_index_milvus_async_ext._milvus.once import once
from llama_index_milvus_async_ext._milvus.query_request import LookedUp, Wanted, is_readable, query_request
from llama_index_milvus_async_ext._milvus.quiet import UnknownMethodsFilter, add_filter, silence_pymilvus
from llama_index_milvus_async_ext._milvus.replacing import deleting, expression_of, inserting, misplaces_upserts
from llama_index_milvus_async_ext._milvus.schema import Row, Schema
from llama_index_milvus_async_ext._milvus.search_request import (
    Answer,
    Found,
    Hits,
    SearchGroup,
    as_pymilvus_takes_them,
    hits_of_pymilvus,
    search_request,
)
from llama_index_milvus_async_ext._milvus.settings import ConnectionSettings
from llama_index_milvus_async_ext._milvus.time_left import TimeLeft
from llama_index_milvus_async_ext._milvus.write_request import write_request

_FEW = 32


class Connection:
    """One connection to Milvus; all methods are called from one event loop.

    gRPC's callback-driven client carries the requests: no loop of its own, so several event loops don't disturb
    each other, and it works in a forked child.
    """

    def __init__(self, settings: ConnectionSettings) -> None:
        self.uri = settings.uri
        if settings.is_file:
            add_filter("grpc._server", UnknownMethodsFilter)
        with silence_pymilvus():
            try:
                self.client = settings.client()
            except MilvusException:
                server = settings.living_server
                if server is None:
                    raise
                self.uri = f"http://{server}"
                self.client = settings.client(self.uri)
        self._schemas: dict[str, Schema] = {}
        self._is_closed = False
        self._misplaces_upserts = False
        self.db_name: str = getattr(getattr(self.client, "_config", None), "db_name", "")
        self.metadata = [("dbname", self.db_name)] if self.db_name else None

    @property
    def address(self) -> str:
        """Host and port that requests go to."""
        handler = getattr(self.client, "_handler", None)
        return str(getattr(handler, "server_address", ""))

    def server_version(self) -> str:
        """What the server says of its version; empty if it has no answer to that, or none for this user.

        Raises:
            ConnectError: It did not answer. Not to be passed over: Milvus Lite has to be known as such.
        """
        with silence_pymilvus():
            try:
                version = str(self.client.get_server_version(timeout=10))
            except (MilvusException, grpc.RpcError) as error:
                failure = RpcFailure.cause_of(error) or error
                if classify(failure).is_repeated:
                    raise ConnectError(code=2, message=f"{self.uri} does not say what it is: {failure}") from error
                return ""
        self._misplaces_upserts = misplaces_upserts(version)
        return version

    @property
    def once(self) -> Any:
        """The client of pymilvus, each of whose requests goes out once."""
        return once(self.client)

    async def ask(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Make a call of pymilvus's client, by the name of its method: one attempt, in a thread."""
        return await self.in_thread(getattr(self.once, method), *args, **kwargs | {"retry_on_rate_limit": False})

    async def in_thread(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run what blocks in a thread, its failures unlogged; pymilvus's client goes by `ask`.

        A daemon thread, so that the interpreter's exit does not wait for a call to a server that never answers.
        """
        if self._is_closed:
            raise ClosedConnectionError()
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()

        def deliver(result: Any, error: BaseException | None) -> None:
            if answer.done():
                return
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(result)

        def call() -> None:
            result, error = None, None
            try:
                with silence_pymilvus():
                    result = function(*args, **kwargs)
            except Exception as raised:
                error = ClosedConnectionError(sent=True) if self._is_closed else RpcFailure.cause_of(raised) or raised
            finally:
                quiet.ended()
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits
                loop.call_soon_threadsafe(deliver, result, error)

        quiet = forks.quiet
        quiet.began()
        try:
            threading.Thread(target=call, name="milvus-call", daemon=True).start()
        except BaseException:  # no more threads to be had
            quiet.ended()
            raise
        return await answer

    def known_schema(self, collection: str) -> Schema | None:
        """The collection's schema, if it has been asked for."""
        return self._schemas.get(collection)

    def fetch_schema(self, collection: str, timeout: float) -> Schema:
        """The collection's schema, asked for now; blocks, and lets pymilvus repeat the question."""
        return self._schema_of(collection, self.client.describe_collection(collection, timeout=timeout))

    async def refresh_schema(self, collection: str, timeout: float) -> Schema:
        """The collection's schema, asked for now; the one that is known if nothing has changed."""
        return self._schema_of(collection, await self.ask("describe_collection", collection, timeout=timeout))

    def _schema_of(self, collection: str, described: dict[str, Any]) -> Schema:
        known = self._schemas.get(collection)
        if known is None or known.described != described:
            known = self._schemas[collection] = Schema(described)
        known.confirmed_at = time.monotonic()
        return known

    def forget_schema(self, collection: str) -> None:
        """Ask for the schema again next time."""
        self._schemas.pop(collection, None)

    async def write(
        self, collection: str, partition: str, schema: Schema, rows: list[Row], upsert: bool, timeout: float
    ) -> None:
        """Insert or upsert rows in one request.

        The list of rows is emptied once they are in the request, and the request is let go of once gRPC has its copy:
        with many requests under way, that halves the memory they take.

        Raises:
            StatusFailure: Milvus rejected the request.
            RpcFailure: gRPC could not carry it, or its answer.
            ReplacementError: Either, where upserts would be misplaced; rows of before are, or may be, deleted.
        """
        left, former = TimeLeft(timeout), None
        if upsert and self._misplaces_upserts and schema.partition_key is not None:
            former, upsert = expression_of(schema.primary_key, rows), False
        send = self._sender("Upsert" if upsert else "Insert")
        request = await self._rows_request(send, collection, partition, schema, rows, upsert)
        rows.clear()
        if former is not None:  # not before there is a request: what can't be made into one replaces nothing
            with deleting():
                await self.ask("delete", collection, filter=former, timeout=left())
        with contextlib.nullcontext() if former is None else inserting():
            if send is None:
                method = "upsert" if upsert else "insert"
                await self.ask(method, collection, request, timeout=left(), partition_name=partition)
                return
            answered = self._call(send, request, left())
            del request
            answer = await answered
            self._check(answer.status)
        ts_utils.update_collection_ts(collection, answer.timestamp, self.address, self.db_name)

    async def _rows_request(
        self, send: Any, collection: str, partition: str, schema: Schema, rows: list[Row], upsert: bool
    ) -> Any:
        """What `send` takes; pymilvus's client takes the rows themselves."""
        if send is None:
            return [row.entity for row in rows]
        if schema.fast is False or schema.has_sparse:
            # By pymilvus, a tenth of a second for a full request: the loop has others to serve.
            return await self.in_thread(write_request, collection, partition, schema, rows, upsert)
        return write_request(collection, partition, schema, rows, upsert)

    async def search(self, group: SearchGroup, queries: Sequence[Any], ranker: Any, timeout: float) -> list[Found]:
        """Search for each query; the answer has what was found for each, in their order.

        Raises:
            StatusFailure: Milvus rejected the request.
            RpcFailure: gRPC could not carry it, or its answer.
        """
        send = self.stub_method("Search" if group.hybrid is None else "HybridSearch")
        found: Answer | list[Hits]
        if send is None:
            found = await self._search_by_public_client(group, queries, ranker, timeout)
            found = found or [Hits([], [], []) for _ in queries]
        else:
            session = ts_utils.get_collection_ts(group.collection, self.address, self.db_name)
            if len(queries) > _FEW and not isinstance(queries[0], (bytes, str)):  # sparse vectors, packed by pymilvus
                request = await self.in_thread(search_request, group, queries, session, ranker)
            else:
                request = search_request(group, queries, session, ranker)
            answer = await self._call(send, request, timeout)
            self._check(answer.status)
            found = Answer(answer.results, group.output_fields)
        return [Found(found, place) for place in range(len(queries))]

    async def look_up(
        self, collection: str, expression: str, wanted: Wanted, timeout: float, options: dict[str, Any]
    ) -> LookedUp:
        """What matches, strongly consistent; the options are pymilvus's, such as `limit`.

        Raises:
            MilvusException: Milvus rejected the request.
            RpcFailure: gRPC could not carry it, or its answer.
        """
        send, left = self.stub_method("Query"), TimeLeft(timeout)
        if send is not None:
            answer = await self._call(send, query_request(collection, expression, wanted, options), left())
            self._check(answer.status)
            if is_readable(answer, wanted):
                return LookedUp(answer, wanted)
        found = await self.ask(
            "query",
            collection_name=collection,
            filter=expression,
            output_fields=wanted.fields,
            timeout=left(),
            consistency_level="Strong",
            **options,
        )
        return LookedUp(list(found), wanted)

    async def _search_by_public_client(
        self, group: SearchGroup, queries: Sequence[Any], ranker: Any, timeout: float
    ) -> list[Hits]:
        common: dict[str, Any] = {
            "collection_name": group.collection,
            "limit": group.limit,
            "output_fields": list(group.output_fields),
            "partition_names": list(group.partitions) if group.partitions is not None else None,
            "timeout": timeout,
        }
        if group.hybrid is None:
            one_field = {
                "data": as_pymilvus_takes_them(queries),
                "anns_field": group.field_name,
                "search_params": orjson.loads(group.search_params),
                "filter": group.expression,
            }
            return hits_of_pymilvus(await self.ask("search", **one_field, **common))
        dense, sparse = zip(*queries, strict=True)
        halves = [
            AnnSearchRequest(as_pymilvus_takes_them(data), name, orjson.loads(params), group.limit, group.expression)
            for data, name, params in (
                (dense, group.field_name, group.search_params),
                (sparse, group.hybrid.field_name, group.hybrid.search_params),
            )
        ]
        return hits_of_pymilvus(await self.ask("hybrid_search", reqs=halves, ranker=ranker, **common))

    def close(self) -> None:
        """Close the connection."""
        self._is_closed = True
        self.client.close()

    def stub_method(self, method: str) -> Any:
        """What sends requests and gives their answers: a method of pymilvus's stub; None if it can't be had."""
        return getattr(getattr(getattr(self.client, "_handler", None), "_stub", None), method, None)

    def _sender(self, method: str) -> Any:
        """What sends serialised requests for writes, by pymilvus's own channel; None if it can't be had."""
        channel = getattr(getattr(self.client, "_handler", None), "_final_channel", None)
        if channel is None:
            return None
        return channel.unary_unary(
            f"/milvus.proto.milvus.MilvusService/{method}",
            request_serializer=None,  # bytes are sent as they are
            response_deserializer=milvus_pb2.MutationResult.FromString,
        )

    async def _call(self, method: Any, request: Any, timeout: float) -> Any:
        """Make a call of gRPC's, and hand its answer to this loop."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()

        def deliver(call: Any) -> None:
            if answer.done():
                return
            try:
                error = call.exception()
            except grpc.FutureCancelledError:
                error = ClosedConnectionError(sent=True)
            if error is None:
                answer.set_result(call.result())
            elif self._is_closed:
                answer.set_exception(ClosedConnectionError(sent=True))
            elif isinstance(error, grpc.RpcError):
                answer.set_exception(RpcFailure.from_grpc(error))
            else:
                answer.set_exception(error)

        def arrived(call: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits
                loop.call_soon_threadsafe(deliver, call)

        try:
            call = method.future(request, timeout=timeout, metadata=self.metadata)
        except ValueError:  # a closed channel says so like this
            raise ClosedConnectionError() from None
        del request
        quiet = forks.quiet
        quiet.began()
        call.add_done_callback(quiet.ended)
        call.add_done_callback(arrived)
        try:
            return await answer
        except asyncio.CancelledError:
            call.cancel()
            raise

    def _check(self, status: Any) -> None:
        if status.code == 0 and status.error_code == 0:
            return
        failure = StatusFailure.of(status)
        raise failure
