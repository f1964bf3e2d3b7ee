"""A gRPC proxy on loopback that stands before a real Milvus and does to its requests what a test's script says.

    with FaultProxy("127.0.0.1:19530") as proxy:
        client = MilvusClient(proxy.uri)
        proxy.script(method="Upsert", fault=LoseAnswer(), on=Nth(3))

It uses gRPC's threads, not `grpc.aio`: a second event loop with `grpc.aio` in the tests' process would slow the
code under test.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
from google.protobuf import message_factory
from pymilvus.grpc_gen import common_pb2, milvus_pb2

from tests.faults import Every, Fault, Selection, row_count

if TYPE_CHECKING:
    from typing_extensions import Self

_METHODS = milvus_pb2.DESCRIPTOR.services_by_name["MilvusService"].methods_by_name
_COUNTED = frozenset({"Insert", "Upsert", "Search", "HybridSearch"})

_SERVER_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.http2.max_ping_strikes", 0),  # pymilvus pings often
    ("grpc.so_reuseport", 0),
]
_CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    # Milvus is killed and started again behind the proxy: try anew at once, not after gRPC's growing pauses.
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
]


@dataclass
class RequestRecord:
    """One request that reached the proxy. Times are of `time.monotonic()`; `finished` is None while it is out.

    `rows` are the rows of a write, the queries of a search. `metadata` is what was sent beside the request, the token
    and the database among it. `fault` is the fault that struck, `code` the gRPC status that the client got (CANCELLED
    also where it gave up), None while it is out. `timeout` is how long the client said, as it came, that it would wait.
    """

    method: str
    rows: int | None
    metadata: dict[str, str | bytes]
    started: float
    finished: float | None = None
    fault: Fault | None = None
    code: grpc.StatusCode | None = None
    timeout: float | None = None


@dataclass(eq=False)
class Script:
    """A fault, the requests that it is about, and which of those it strikes. `seen` and `struck` count them."""

    methods: Collection[str] | None
    fault: Fault
    on: Selection
    when: Callable[[Any], bool] | None
    seen: int = 0
    struck: int = 0

    def strikes(self, exchange: _Exchange) -> bool:
        if self.methods is not None and exchange.method not in self.methods:
            return False
        if self.when is not None and not self.when(exchange.request):
            return False
        self.seen += 1
        struck = self.on(self.seen)
        self.struck += struck
        return struck


@dataclass
class _Exchange:
    """One request between the client and Milvus; see `tests.faults.Exchange`."""

    method: str
    path: str
    payload: bytes
    context: grpc.ServicerContext
    channel: grpc.Channel
    patience_seconds: float
    over: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        if not self.context.add_callback(self.over.set):
            self.over.set()

    @cached_property
    def request(self) -> Any:
        """The request, parsed."""
        return message_factory.GetMessageClass(_METHODS[self.method].input_type).FromString(self.payload)

    def forward(self) -> bytes:
        metadata = [
            (key, value)
            for key, value in self.context.invocation_metadata()
            if key != "user-agent" and not key.startswith("grpc-")
        ]
        # "No deadline" comes as hundreds of years, which gRPC takes for a deadline that has passed.
        remaining = self.context.time_remaining()
        timeout = remaining if remaining is not None and remaining < self.patience_seconds else self.patience_seconds
        call = self.channel.unary_unary(self.path).future(self.payload, timeout=timeout, metadata=metadata)
        self.context.add_callback(call.cancel)  # a client that gives up cancels in Milvus, too
        try:
            answer: bytes = call.result()
        except grpc.FutureCancelledError:
            self.abort(grpc.StatusCode.CANCELLED, "cancelled by the client")
        except grpc.RpcError as error:
            self.abort(error.code(), error.details())
        return answer

    def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        self.context.abort(code, details)
        raise AssertionError("abort has raised")

    def answer(self, status: common_pb2.Status) -> bytes:
        answer = message_factory.GetMessageClass(_METHODS[self.method].output_type)()
        (answer if isinstance(answer, common_pb2.Status) else answer.status).CopyFrom(status)
        serialized: bytes = answer.SerializeToString()
        return serialized

    def wait(self, seconds: float) -> None:
        self.over.wait(min(seconds, self.patience_seconds))

    def wait_for_the_client_to_give_up(self) -> bytes:
        self.over.wait(self.patience_seconds)
        self.abort(grpc.StatusCode.CANCELLED, "nobody waits for this any more")


class FaultProxy(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc has no types
    """A proxy before the Milvus at `target` ("host:port"); without scripts it only looks on.

    Args:
        target: Milvus's address, as gRPC takes it.
        patience_seconds: how long a request can be held at most, where its client never gives up.
    """

    def __init__(self, target: str, patience_seconds: float = 120.0) -> None:
        self.target = target
        self._patience_seconds = patience_seconds
        self._lock = threading.Lock()
        self._scripts: list[Script] = []
        self._records: list[RequestRecord] = []
        self._in_flight: Counter[str] = Counter()
        self._peak: Counter[str] = Counter()
        self._channel = grpc.insecure_channel(target, options=_CHANNEL_OPTIONS)
        # A request that is held keeps its thread; threads are made as they are needed.
        self._threads = ThreadPoolExecutor(max_workers=1000, thread_name_prefix="fault-proxy")
        self._server = grpc.server(self._threads, handlers=[self], options=_SERVER_OPTIONS)
        self.port: int = self._server.add_insecure_port("127.0.0.1:0")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def uri(self) -> str:
        return f"http://{self.address}"

    def script(
        self,
        fault: Fault,
        *,
        method: str | Collection[str] | None = None,
        on: Selection | None = None,
        when: Callable[[Any], bool] | None = None,
    ) -> Script:
        """Have `fault` strike requests from now on. Of several scripts, the one given first strikes.

        Args:
            fault: what happens.
            method: the RPC or RPCs that it is about ("Insert", "Upsert", "Search", ...); None means every one.
            on: which of those it strikes, by their number; None means every one.
            when: a predicate over the parsed request, such as
                `lambda request: request.num_rows > 1`; others are not counted.
        """
        methods = {method} if isinstance(method, str) else method
        for name in methods or ():
            if name not in _METHODS:
                raise ValueError(f"Milvus has no method {name!r}")
        script = Script(methods, fault, on or Every(), when)
        with self._lock:
            self._scripts.append(script)
        return script

    def heal(self) -> None:
        """Drop all scripts, and keep the records. Requests that are being held stay held."""
        with self._lock:
            self._scripts.clear()

    def clear(self) -> None:
        """Drop all scripts and all records."""
        with self._lock:
            self._scripts.clear()
            self._records.clear()
            self._peak = Counter(self._in_flight)

    @property
    def requests(self) -> list[RequestRecord]:
        """What has reached the proxy, in order of arrival."""
        with self._lock:
            return list(self._records)

    def requests_of(self, *methods: str) -> list[RequestRecord]:
        return [record for record in self.requests if record.method in methods]

    @property
    def counts(self) -> Counter[str]:
        """How many requests have come, by method."""
        return Counter(record.method for record in self.requests)

    def in_flight(self, method: str | None = None) -> int:
        """How many requests are out now, of `method` or of all."""
        with self._lock:
            return self._in_flight[method or ""]

    def in_flight_peak(self, method: str | None = None) -> int:
        """How many requests were out at once at most, of `method` or of all."""
        with self._lock:
            return self._peak[method or ""]

    def start(self) -> Self:
        self._server.start()
        return self

    def close(self) -> None:
        """Cut every request off and stop listening."""
        # With a moment of grace, idle connections end quietly instead of with a line on the tests' stderr.
        self._server.stop(grace=0.2).wait(timeout=10)
        self._channel.close()
        self._threads.shutdown(wait=True)  # their requests are over, so that they end at once

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        path: str = handler_call_details.method
        # Without (de)serializers, gRPC hands the bytes through.
        return grpc.unary_unary_rpc_method_handler(lambda payload, context: self._serve(path, payload, context))

    def _serve(self, path: str, payload: bytes, context: grpc.ServicerContext) -> bytes:
        method = path.rpartition("/")[2]
        exchange = _Exchange(method, path, payload, context, self._channel, self._patience_seconds)
        record = RequestRecord(
            method,
            row_count(exchange.request) if method in _COUNTED else None,
            dict(context.invocation_metadata()),
            started=time.monotonic(),
            timeout=context.time_remaining(),
        )
        with self._lock:
            self._records.append(record)
            for key in (method, ""):
                self._in_flight[key] += 1
                self._peak[key] = max(self._peak[key], self._in_flight[key])
        try:
            with self._lock:
                script = next((script for script in self._scripts if script.strikes(exchange)), None)
            if script is None:
                answer = exchange.forward()
            else:
                record.fault = script.fault
                answer = script.fault(exchange)
            record.code = grpc.StatusCode.CANCELLED if exchange.over.is_set() else grpc.StatusCode.OK
            return answer
        except BaseException:
            record.code = grpc.StatusCode.CANCELLED if exchange.over.is_set() else context.code()
            raise
        finally:
            with self._lock:
                record.finished = time.monotonic()
                for key in (method, ""):
                    self._in_flight[key] -= 1
