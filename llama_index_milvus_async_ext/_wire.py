"""Requests to Milvus and answers from it: the one module that uses internals of pymilvus.

What is internal: the connection's gRPC stub, the request builders (`Prepare`), the generated protobuf types and the
cache of session timestamps. `Schema.fast` says whether this module's own row encoder gives the same request as
pymilvus; where it does not, or where pymilvus no longer has the stub, pymilvus's public way is taken instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import SplitResult, urlsplit, urlunsplit

import grpc
import orjson
from pymilvus import AnnSearchRequest, DataType, MilvusClient
from pymilvus.client import entity_helper, ts_utils
from pymilvus.client.prepare import Prepare
from pymilvus.client.search_result import SearchResult
from pymilvus.exceptions import MilvusException
from pymilvus.grpc_gen import common_pb2, milvus_pb2, schema_pb2

from llama_index_milvus_async_ext.retry import RpcFailure, StatusFailure

logger = logging.getLogger(__name__)

DYNAMIC_FIELD = "$meta"
_LOOPBACK_KEEPALIVE_MS = 600_000
_SCALAR_ATTRIBUTES = {
    DataType.BOOL: "bool_data",
    DataType.INT8: "int_data",
    DataType.INT16: "int_data",
    DataType.INT32: "int_data",
    DataType.INT64: "long_data",
    DataType.FLOAT: "float_data",
    DataType.DOUBLE: "double_data",
    DataType.VARCHAR: "string_data",
}


# --- what pymilvus logs

_silenced = threading.local()
_NOISY_LOGGERS = (
    "pymilvus.decorators",
    "pymilvus.client.connection_manager",
    "pymilvus.client.grpc_handler",
    "milvus_lite.server_manager",
)


class _MendableFailuresFilter(logging.Filter):
    """Drops pymilvus's traceback for a failure that is about to be retried or raised by this package."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not getattr(_silenced, "on", False)


class _UnknownMethodsFilter(logging.Filter):
    """Drops what gRPC's server says when pymilvus asks Milvus Lite for a method that it does not have.

    pymilvus expects that answer and goes on; the traceback would reach the user's screen all the same.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and record.exc_info[0] is NotImplementedError)


def _add_filter(logger_name: str, wanted: type[logging.Filter]) -> None:
    source = logging.getLogger(logger_name)
    if not any(isinstance(known, wanted) for known in source.filters):
        source.addFilter(wanted())


@contextlib.contextmanager
def silence_pymilvus() -> Any:
    """Keep pymilvus from logging the failures of calls made inside, in this thread only.

    Their errors reach the caller in any case, who knows whether a further attempt mends them.
    """
    for name in _NOISY_LOGGERS:
        _add_filter(name, _MendableFailuresFilter)
    before = getattr(_silenced, "on", False)
    _silenced.on = True
    try:
        yield
    finally:
        _silenced.on = before


# --- rows


@dataclass(slots=True)
class Row:
    """One row, ready to be put into a request.

    Attributes:
        columns: Values of the collection's columns by name (the dense vector as floats).
        dynamic: The dynamic fields as JSON; empty where the collection has none.
        vector: The dense vector as packed little-endian float32, or None if the collection has none.
    """

    columns: dict[str, Any]
    dynamic: bytes
    vector: bytes | None

    @property
    def entity(self) -> dict[str, Any]:
        """Columns and dynamic fields by name, as pymilvus takes them."""
        return {**orjson.loads(self.dynamic), **self.columns} if self.dynamic else self.columns


@dataclass(eq=False)
class Schema:
    """What the row path needs to know of a collection.

    Attributes:
        described: The collection as Milvus describes it.
        fields: The fields that a row must bring, in the collection's order.
        fast: Whether rows are encoded here; None until the first row was encoded both ways and compared.
    """

    described: dict[str, Any]
    fields: list[dict[str, Any]] = field(init=False)
    fast: bool | None = field(init=False)

    def __post_init__(self) -> None:
        everything = self.described["fields"]
        self.fields = [f for f in everything if not f.get("auto_id") and not f.get("is_function_output")]
        vectors = [f for f in self.fields if f["type"] == DataType.FLOAT_VECTOR]
        known = {*_SCALAR_ATTRIBUTES, DataType.FLOAT_VECTOR, DataType.SPARSE_FLOAT_VECTOR}
        simple = (
            self.dynamic
            and len(vectors) <= 1
            and not self.described.get("struct_array_fields")
            and not any(f.get("auto_id") for f in everything)
            and all(
                f["type"] in known and not f.get("nullable") and f.get("default_value") is None for f in self.fields
            )
        )
        self.fast = None if simple else False

    @property
    def dynamic(self) -> bool:
        """Whether fields outside the schema are stored."""
        return bool(self.described.get("enable_dynamic_field"))

    @property
    def names(self) -> set[str]:
        """Names of all fields, those that a function fills included."""
        return {f["name"] for f in self.described["fields"]}

    @property
    def function_outputs(self) -> set[str]:
        """Names of the fields that Milvus fills itself."""
        return {f["name"] for f in self.described["fields"] if f.get("is_function_output")}

    def params(self, name: str) -> dict[str, Any]:
        """Type parameters of a field, such as `dim` or `max_length`; empty for an unknown one."""
        return next((f.get("params", {}) for f in self.described["fields"] if f["name"] == name), {})


def write_request(collection: str, partition: str, schema: Schema, rows: Sequence[Row], upsert: bool) -> bytes:
    """Build an InsertRequest or UpsertRequest, in its serialised form.

    The first row of a schema is built both here and by pymilvus; only if the two are equal does the quick way stay in
    use for it.
    """
    if schema.fast is None:
        sample = rows[:1]
        try:
            kind = milvus_pb2.UpsertRequest if upsert else milvus_pb2.InsertRequest
            ours = kind.FromString(_columnar_request(collection, partition, schema, sample, upsert))
            schema.fast = bool(ours == _pymilvus_request(collection, partition, schema, sample, upsert))
        except Exception as error:  # whatever the reason, perhaps the row itself, pymilvus's own way is there
            logger.debug("row encoder is not used for %r: %s", collection, error)
        else:
            if not schema.fast:
                logger.debug("row encoder and pymilvus differ for %r: pymilvus is used", collection)
    if schema.fast:
        return _columnar_request(collection, partition, schema, rows, upsert)
    serialised: bytes = _pymilvus_request(collection, partition, schema, rows, upsert).SerializeToString()
    return serialised


# Numbers of fields in Milvus's messages. Protobuf never changes them; where one were wrong, the comparison would show.
_REQUEST_FIELDS_DATA = 5  # of InsertRequest and UpsertRequest
_COLUMN_SCALARS, _COLUMN_VECTORS = 3, 4  # of FieldData
_SCALARS_STRING, _SCALARS_JSON = 6, 9  # of ScalarField
_VECTORS_FLOAT = 2  # of VectorField
_ARRAY_DATA = 1  # of StringArray, JSONArray and FloatArray


def _columnar_request(collection: str, partition: str, schema: Schema, rows: Sequence[Row], upsert: bool) -> bytes:
    """The request, joined from the bytes of its rows, which are copied once.

    In a protobuf message they would be copied into it, and again, more than once, when it is serialised.
    """
    kind = milvus_pb2.UpsertRequest if upsert else milvus_pb2.InsertRequest
    chunks = [kind(collection_name=collection, partition_name=partition).SerializeToString()]
    for info in schema.fields:
        name, kind_of_field = info["name"], info["type"]
        column = schema_pb2.FieldData(field_name=name, type=int(kind_of_field))
        if kind_of_field == DataType.FLOAT_VECTOR:
            vectors = [row.vector for row in rows if row.vector is not None]
            dim = schema_pb2.VectorField(dim=sum(map(len, vectors)) // (4 * len(rows)))
            floats = _field(_VECTORS_FLOAT, _field(_ARRAY_DATA, vectors))
            values = _field(_COLUMN_VECTORS, [dim.SerializeToString(), *floats])
        elif kind_of_field == DataType.VARCHAR:
            texts = [row.columns[name].encode() for row in rows]
            values = _field(_COLUMN_SCALARS, _field(_SCALARS_STRING, _repeated(texts)))
        else:
            values = []
            if kind_of_field == DataType.SPARSE_FLOAT_VECTOR:
                for row in rows:
                    entity_helper.pack_field_value_to_field_data(row.columns[name], column, info, {})
            else:
                getattr(column.scalars, _SCALAR_ATTRIBUTES[kind_of_field]).data.extend(
                    [row.columns[name] for row in rows]
                )
        chunks += _field(_REQUEST_FIELDS_DATA, [column.SerializeToString(), *values])
    column = schema_pb2.FieldData(field_name=DYNAMIC_FIELD, type=int(DataType.JSON))
    dynamic = _field(_COLUMN_SCALARS, _field(_SCALARS_JSON, _repeated([row.dynamic for row in rows])))
    is_dynamic = schema_pb2.FieldData(is_dynamic=True).SerializeToString()
    chunks += _field(_REQUEST_FIELDS_DATA, [column.SerializeToString(), *dynamic, is_dynamic])
    count = kind(num_rows=len(rows), schema_timestamp=schema.described.get("update_timestamp", 0))
    chunks.append(count.SerializeToString())
    return b"".join(chunks)


class _Prefixes(dict[int, bytes]):
    """What stands before each value of an array, by the value's length: as many as there are lengths."""

    def __missing__(self, length: int) -> bytes:
        self[length] = prefix = _varint(_ARRAY_DATA << 3 | 2) + _varint(length)
        return prefix


_prefixes = _Prefixes()


def _field(number: int, chunks: Sequence[bytes]) -> list[bytes]:
    """A field that holds a message, or packed numbers: these chunks."""
    return [_varint(number << 3 | 2), _varint(sum(map(len, chunks))), *chunks]


def _repeated(values: Sequence[bytes]) -> list[bytes]:
    """The field `data` of an array of strings or bytes."""
    chunks = [b""] * (2 * len(values))
    chunks[::2] = map(_prefixes.__getitem__, map(len, values))
    chunks[1::2] = values
    return chunks


def _pymilvus_request(collection: str, partition: str, schema: Schema, rows: Sequence[Row], upsert: bool) -> Any:
    build = Prepare.row_upsert_param if upsert else Prepare.row_insert_param
    return build(
        collection,
        [row.entity for row in rows],
        partition,
        schema.described["fields"],
        schema.described.get("struct_array_fields"),
        enable_dynamic=schema.dynamic,
        schema_timestamp=schema.described.get("update_timestamp", 0),
    )


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


# --- searches


class HybridGroup(NamedTuple):
    """The second, sparse half of hybrid searches, and how the two halves are ranked together."""

    field_name: str
    search_params: bytes
    ranker: str
    ranker_params: bytes


class SearchGroup(NamedTuple):
    """What searches must have in common to share a request: all but the query itself.

    `search_params` and `ranker` are the JSON of what upstream passes, so that the whole is hashable.
    """

    collection: str
    field_name: str
    limit: int
    expression: str
    output_fields: tuple[str, ...]
    search_params: bytes
    partitions: tuple[str, ...] | None = None
    hybrid: HybridGroup | None = None


class Hits(NamedTuple):
    """The hits of one query: parallel lists, best first; `entities` holds the output fields of each hit."""

    ids: list[str]
    scores: list[float]
    entities: list[dict[str, Any]]


def search_request(group: SearchGroup, queries: Sequence[Any], session_timestamp: int, ranker: Any = None) -> Any:
    """Build a SearchRequest, or a HybridSearchRequest, with one query vector (or text) per query.

    Args:
        group: What the queries share.
        queries: Dense vectors (packed), sparse ones, or texts; for hybrid, pairs of a dense vector and a sparse one
            or a text.
        session_timestamp: The last write of this process to the collection, for Session consistency.
        ranker: The ranker of a hybrid search.
    """
    common: dict[str, Any] = {
        "partition_names": list(group.partitions) if group.partitions is not None else None,
        "output_fields": list(group.output_fields),
        "use_default_consistency": True,
        "guarantee_timestamp": session_timestamp or ts_utils.get_eventually_ts(),
    }
    if group.hybrid is None:
        return _request_of_one_field(group, group.field_name, group.search_params, queries, common)
    in_halves = common | {"output_fields": None}
    dense, sparse = zip(*queries, strict=True)
    halves = [
        _request_of_one_field(group, group.field_name, group.search_params, dense, in_halves),
        _request_of_one_field(group, group.hybrid.field_name, group.hybrid.search_params, sparse, in_halves),
    ]
    return Prepare.hybrid_search_request_with_ranker(group.collection, halves, ranker, group.limit, **common)


def _request_of_one_field(
    group: SearchGroup, field_name: str, search_params: bytes, queries: Sequence[Any], common: dict[str, Any]
) -> Any:
    request = Prepare.search_requests_with_expr(
        collection_name=group.collection,
        # Of packed vectors one, in the place of all: pymilvus would pack each anew.
        data=_as_pymilvus_takes_them(queries[:1] if isinstance(queries[0], bytes) else queries),
        anns_field=field_name,
        param=orjson.loads(search_params),
        limit=group.limit,
        expr=group.expression,
        **common,
    )
    _put_dense_vectors(request, queries)
    return request


def _as_pymilvus_takes_them(queries: Sequence[Any]) -> list[Any]:
    """The queries, packed vectors as lists of numbers."""
    if isinstance(queries[0], bytes):
        return [list(struct.unpack(f"<{len(query) // 4}f", query)) for query in queries]
    return list(queries)


def _put_dense_vectors(request: Any, queries: Sequence[Any]) -> None:
    """Put packed vectors into a request as they are."""
    if isinstance(queries[0], bytes):
        vectors = common_pb2.PlaceholderValue(tag="$0", type=common_pb2.PlaceholderType.FloatVector, values=queries)
        request.nq = len(queries)
        request.placeholder_group = common_pb2.PlaceholderGroup(placeholders=[vectors]).SerializeToString()


def hits_of(results: Any, wanted: Sequence[str]) -> list[Hits]:
    """Decode the hits of each query, in the order of the queries.

    Args:
        results: A `SearchResultData` message.
        wanted: The output fields that were asked for.
    """
    quick = _quick_columns(results, wanted)
    if quick is None:
        return _hits_of_pymilvus(SearchResult(results))
    ids = list(results.ids.str_id.data)
    scores = list(results.scores)
    found = []
    start = 0
    for count in results.topks:
        end = start + count
        entities = [{name: values[i] for name, values in quick[0].items()} for i in range(start, end)]
        for entity, dynamic in zip(entities, quick[1][start:end], strict=False):
            entity.update(orjson.loads(dynamic))
        found.append(Hits(ids[start:end], scores[start:end], entities))
        start = end
    return found


def _hits_of_pymilvus(found: SearchResult) -> list[Hits]:
    return [Hits(list(hits.ids), list(hits.distances), [hit["entity"] for hit in hits]) for hits in found]


def _quick_columns(results: Any, wanted: Sequence[str]) -> tuple[dict[str, list[str]], list[bytes]] | None:
    """The columns of an answer that holds nothing but text and dynamic fields; None for any other."""
    if "*" in wanted or results.HasField("element_indices") or results.highlight_results:
        return None
    if not results.ids.HasField("str_id") and any(results.topks):
        return None
    columns: dict[str, list[str]] = {}
    dynamic: list[bytes] = []
    for column in results.fields_data:
        if column.valid_data:
            return None
        if column.type == schema_pb2.DataType.VarChar:
            columns[column.field_name] = list(column.scalars.string_data.data)
        elif column.type == schema_pb2.DataType.JSON and column.is_dynamic:
            dynamic = list(column.scalars.json_data.data)
        else:
            return None
    return columns, dynamic


# --- connections


class ConnectionSettings:
    """Where to connect, and as whom; equal settings may share a connection.

    The token and the other options never show in the `repr`.

    Args:
        uri: Path of a Milvus Lite file (ending in ".db"), or address of a server. User and password in it are moved
            into the token.
        token: API key, or "user:password".
        options: Further arguments of `MilvusClient`.
        served_at: For a Milvus Lite file, the address at which another process serves it, for when it can't be
            opened here.
    """

    def __init__(
        self, uri: str, token: str = "", options: Mapping[str, Any] | None = None, served_at: str | None = None
    ) -> None:
        parsed = urlsplit(uri)
        if parsed.scheme in ("http", "https", "tcp") and parsed.username:
            token = token or ":".join(filter(None, (parsed.username, parsed.password)))
            uri = urlunsplit(parsed._replace(netloc=parsed.netloc.rpartition("@")[2]))
        if uri.endswith(".db"):
            uri = str(Path(uri).absolute())
        self.uri = uri
        self.served_at = served_at
        self.token = token
        self.options = dict(options or {})
        self.options["grpc_options"] = {
            # gRPC would wait up to two minutes before it tries a lost server again, longer than our own deadline.
            "grpc.initial_reconnect_backoff_ms": 100,
            "grpc.max_reconnect_backoff_ms": 1_000,
            # Milvus Lite answers the ten-second pings of pymilvus with "too many pings" on stderr; and on loopback,
            # where it mostly is, no connection dies unnoticed.
            **({"grpc.keepalive_time_ms": _LOOPBACK_KEEPALIVE_MS} if self.is_file or _is_loopback(parsed) else {}),
            **self.options.get("grpc_options", {}),
        }
        self._key = (uri, token, repr(sorted(self.options.items())))

    @classmethod
    def of_client(cls, client: MilvusClient) -> ConnectionSettings:
        """The settings that a pymilvus client was made with."""
        config: Any = client._config
        options = dict(config.handler_kwargs)
        if config.db_name:
            options["db_name"] = config.db_name
        return cls(_lite_file_at(config.address) or config.uri, config.token, options)

    @property
    def is_file(self) -> bool:
        """Whether this is a Milvus Lite file, served within a process."""
        return self.uri.endswith(".db")

    def client(self, uri: str | None = None) -> MilvusClient:
        """A pymilvus client with a connection of its own.

        pymilvus would share one by address and token, whatever the TLS settings.
        """
        return MilvusClient(uri=uri or self.uri, token=self.token, **{"dedicated": True, **self.options})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConnectionSettings) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"ConnectionSettings({self.uri!r})"


def _is_loopback(uri: SplitResult) -> bool:
    host = uri.hostname or ""
    return host == "localhost" or host == "::1" or host.startswith("127.")


def _lite_file_at(address: str) -> str | None:
    """The file of the Milvus Lite server that this process runs at an address."""
    try:
        from milvus_lite.server_manager import server_manager_instance

        servers = dict(server_manager_instance._servers)
    except (ImportError, AttributeError):
        return None
    return next((path for path, (*_, port) in servers.items() if address == f"127.0.0.1:{port}"), None)


class Connection:
    """One connection to Milvus; all methods are called from one event loop.

    gRPC's callback-driven client carries the requests: no loop of its own, so several event loops don't disturb
    each other, and it works in a forked child.
    """

    def __init__(self, settings: ConnectionSettings) -> None:
        self.uri = settings.uri
        if settings.is_file:
            _add_filter("grpc._server", _UnknownMethodsFilter)
        with silence_pymilvus():
            try:
                self.client = settings.client()
            except MilvusException:
                if settings.served_at is None:
                    raise
                self.uri = f"http://{settings.served_at}"
                self.client = settings.client(self.uri)
        self._schemas: dict[str, Schema] = {}
        self._db_name: str = getattr(getattr(self.client, "_config", None), "db_name", "")

    @property
    def address(self) -> str:
        """Host and port that requests go to."""
        handler = getattr(self.client, "_handler", None)
        return str(getattr(handler, "server_address", ""))

    def server_version(self) -> str:
        """What the server says of its version; empty if it does not say."""
        with silence_pymilvus():
            try:
                return str(self.client.get_server_version(timeout=10))
            except Exception:
                return ""

    async def in_thread(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a blocking call of the public client in a thread, its failures unlogged.

        A daemon thread, so that the interpreter's exit does not wait for a call to a server that never answers.
        """
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
                error = RpcFailure.cause_of(raised) or raised
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits
                loop.call_soon_threadsafe(deliver, result, error)

        threading.Thread(target=call, name="milvus-call", daemon=True).start()
        return await answer

    async def schema(self, collection: str, timeout: float) -> Schema:
        """The collection's schema, asked for once."""
        known = self._schemas.get(collection)
        if known is None:
            known = await self.in_thread(self.fetch_schema, collection, timeout)
        return known

    def known_schema(self, collection: str) -> Schema | None:
        """The collection's schema, if it has been asked for."""
        return self._schemas.get(collection)

    def fetch_schema(self, collection: str, timeout: float) -> Schema:
        """The collection's schema, asked for now; blocks."""
        described = self.client.describe_collection(collection, timeout=timeout)
        known = self._schemas.get(collection)
        if known is None or known.described != described:
            known = self._schemas[collection] = Schema(described)
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
        """
        send = self._sender("Upsert" if upsert else "Insert")
        if send is None:
            call = self.client.upsert if upsert else self.client.insert
            entities = [row.entity for row in rows]
            await self.in_thread(call, collection, entities, timeout=timeout, partition_name=partition)
            return
        request = write_request(collection, partition, schema, rows, upsert)
        rows.clear()
        answered = self._call(send, request, timeout)
        del request
        answer = await answered
        self._check(answer.status, collection)
        ts_utils.update_collection_ts(collection, answer.timestamp, self.address, self._db_name)

    async def search(self, group: SearchGroup, queries: Sequence[Any], ranker: Any, timeout: float) -> list[Hits]:
        """Search for each query; the answer has one `Hits` per query, in their order.

        Raises:
            StatusFailure: Milvus rejected the request.
            RpcFailure: gRPC could not carry it, or its answer.
        """
        send = self._searcher("Search" if group.hybrid is None else "HybridSearch")
        if send is None:
            found = await self._search_by_public_client(group, queries, ranker, timeout)
        else:
            session = ts_utils.get_collection_ts(group.collection, self.address, self._db_name)
            answer = await self._call(send, search_request(group, queries, session, ranker), timeout)
            self._check(answer.status, group.collection)
            found = hits_of(answer.results, group.output_fields)
        # Milvus leaves the list of counts out when no query has a hit.
        return found if found else [Hits([], [], []) for _ in queries]

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
                "data": _as_pymilvus_takes_them(queries),
                "anns_field": group.field_name,
                "search_params": orjson.loads(group.search_params),
                "filter": group.expression,
            }
            return _hits_of_pymilvus(await self.in_thread(self.client.search, **one_field, **common))
        dense, sparse = zip(*queries, strict=True)
        halves = [
            AnnSearchRequest(_as_pymilvus_takes_them(data), name, orjson.loads(params), group.limit, group.expression)
            for data, name, params in (
                (dense, group.field_name, group.search_params),
                (sparse, group.hybrid.field_name, group.hybrid.search_params),
            )
        ]
        return _hits_of_pymilvus(await self.in_thread(self.client.hybrid_search, reqs=halves, ranker=ranker, **common))

    def close(self) -> None:
        """Close the connection."""
        self.client.close()

    def _searcher(self, method: str) -> Any:
        """What sends search requests: the method of pymilvus's stub; None if it can't be had."""
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
        metadata = [("dbname", self._db_name)] if self._db_name else None
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()

        def deliver(call: Any) -> None:
            if answer.done():
                return
            try:
                error = call.exception()
            except grpc.FutureCancelledError:  # the connection was closed under the request
                error = RpcFailure("CANCELLED", "the connection was closed")
            if error is None:
                answer.set_result(call.result())
            elif isinstance(error, grpc.RpcError):
                answer.set_exception(RpcFailure.from_grpc(error))
            else:
                answer.set_exception(error)

        def arrived(call: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits
                loop.call_soon_threadsafe(deliver, call)

        try:
            call = method.future(request, timeout=timeout, metadata=metadata)
        except ValueError as error:  # a closed channel says so like this
            raise RpcFailure("UNAVAILABLE", str(error), sent=False) from None
        del request
        call.add_done_callback(arrived)
        try:
            return await answer
        except asyncio.CancelledError:
            call.cancel()
            raise

    def _check(self, status: Any, collection: str) -> None:
        if status.code == 0 and status.error_code == 0:
            return
        failure = StatusFailure(status.code, status.reason, status.error_code, bool(status.retriable))
        if failure.schema_is_stale:
            self.forget_schema(collection)
        raise failure
