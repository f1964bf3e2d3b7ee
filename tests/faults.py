"""What can go wrong with one request to Milvus, and for which requests it does: the vocabulary of `FaultProxy.script`.

A fault is a callable that takes an `Exchange` and returns the bytes to answer with; a selection is a callable that
takes a request's number (from 1, among those that its script is about) and says whether the fault strikes. Any
function of those shapes will do where the ones here do not.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import grpc
from pymilvus.grpc_gen import common_pb2

RATE_LIMIT_CODE = 8
NOT_LOADED_CODE = 101
COLLECTION_NOT_FOUND_CODE = 100


class Exchange(Protocol):
    """One request at the proxy, as a fault sees it."""

    method: str

    def forward(self) -> bytes:
        """Let Milvus carry the request out; return its answer. What Milvus refuses ends the exchange here."""

    def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        """End the request with a gRPC status."""

    def answer(self, status: common_pb2.Status) -> bytes:
        """An answer of the type this method has, with nothing in it but Milvus's own status."""

    def wait(self, seconds: float) -> None:
        """Let time pass, but no longer than the client waits."""

    def wait_for_the_client_to_give_up(self) -> bytes:
        """Say nothing until the client has cancelled, run into its deadline, or gone."""


Fault = Callable[[Exchange], bytes]
Selection = Callable[[int], bool]


@dataclass(frozen=True)
class Refuse:
    """The request never reaches Milvus; the client gets `code`."""

    code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE
    details: str = "refused by the fault proxy"

    def __call__(self, exchange: Exchange) -> bytes:
        exchange.abort(self.code, self.details)


@dataclass(frozen=True)
class Drop:
    """The request never reaches Milvus, and the client hears nothing."""

    def __call__(self, exchange: Exchange) -> bytes:
        return exchange.wait_for_the_client_to_give_up()


@dataclass(frozen=True)
class Delay:
    """The request reaches Milvus `seconds` late."""

    seconds: float

    def __call__(self, exchange: Exchange) -> bytes:
        exchange.wait(self.seconds)
        return exchange.forward()


@dataclass(frozen=True)
class SlowAnswer:
    """Milvus carries the request out at once; its answer comes `seconds` late."""

    seconds: float

    def __call__(self, exchange: Exchange) -> bytes:
        answer = exchange.forward()
        exchange.wait(self.seconds)
        return answer


@dataclass(frozen=True)
class LoseAnswer:
    """Milvus carries the request out; instead of its answer the client gets `code`, or nothing where that is None."""

    code: grpc.StatusCode | None = grpc.StatusCode.UNAVAILABLE
    details: str = "answer lost by the fault proxy"

    def __call__(self, exchange: Exchange) -> bytes:
        exchange.forward()
        if self.code is None:
            return exchange.wait_for_the_client_to_give_up()
        exchange.abort(self.code, self.details)


@dataclass(frozen=True)
class MilvusError:
    """The request never reaches the engine: a Milvus status says so, in an answer that is fine to gRPC.

    `legacy_code` is the status's older field, which Milvus 2.3 sets beside `code`.
    """

    code: int
    reason: str = "refused by the fault proxy"
    legacy_code: int = common_pb2.UnexpectedError

    def __call__(self, exchange: Exchange) -> bytes:
        status = common_pb2.Status(error_code=self.legacy_code, code=self.code, reason=self.reason)
        return exchange.answer(status)


def rate_limit() -> MilvusError:
    """The answer of a server whose quota is used up."""
    return MilvusError(RATE_LIMIT_CODE, "request is rejected by limiter: rate limit exceeded", common_pb2.RateLimit)


def not_loaded() -> MilvusError:
    """The answer to a read of a collection that is not in memory, as for half a minute after a restart."""
    return MilvusError(NOT_LOADED_CODE, "collection not loaded")


def collection_not_found() -> MilvusError:
    return MilvusError(COLLECTION_NOT_FOUND_CODE, "collection not found", common_pb2.CollectionNotExists)


@dataclass(frozen=True)
class Every:
    """Every request."""

    def __call__(self, number: int) -> bool:
        return True


@dataclass(frozen=True)
class Nth:
    """Only the request with this number, from 1."""

    n: int

    def __call__(self, number: int) -> bool:
        return number == self.n


@dataclass(frozen=True)
class First:
    """The first `k` requests."""

    k: int

    def __call__(self, number: int) -> bool:
        return number <= self.k


@dataclass(frozen=True)
class Chance:
    """Each request with `probability`, decided by `seed` and its number alone: a run that failed can be had again."""

    probability: float
    seed: int = 0

    def __call__(self, number: int) -> bool:
        return random.Random(f"{self.seed}:{number}").random() < self.probability


class OverQuota:
    """A predicate for `when=`: whether a request's rows (or queries) are more than `per_second` lets through now.

        quota = OverQuota(per_second=1000)
        proxy.script(method="Upsert", fault=rate_limit(), when=quota)
        quota.per_second = 10_000  # lifted

    A token bucket of one second's size that, as Milvus's own, lets a request pass while anything is left and goes
    into debt for the rest. Here because Milvus 2.3.5 cannot change its quotas while it runs.
    """

    def __init__(self, per_second: float) -> None:
        self.per_second = per_second
        self._left = per_second
        self._filled_at = time.monotonic()
        self._lock = threading.Lock()

    def __call__(self, request: Any) -> bool:
        with self._lock:
            now = time.monotonic()
            self._left = min(self.per_second, self._left + (now - self._filled_at) * self.per_second)
            self._filled_at = now
            if self._left <= 0:
                return True
            self._left -= row_count(request) or 1
            return False


def row_count(request: Any) -> int | None:
    """The rows that a write carries, or the queries that a search carries; None for other requests."""
    for field in ("num_rows", "nq"):
        if field in request.DESCRIPTOR.fields_by_name:
            return int(getattr(request, field))
    if "requests" in request.DESCRIPTOR.fields_by_name and request.requests:  # a hybrid search
        return row_count(request.requests[0])
    return None


class Held:
    """A fault: the request reaches Milvus, or meets another fault, `then`, once `let_go` is called."""

    def __init__(self, then: Fault | None = None) -> None:
        self.then = then
        self._is_free = threading.Event()

    def __call__(self, exchange: Exchange) -> bytes:
        self._is_free.wait(60)
        return exchange.forward() if self.then is None else self.then(exchange)

    def let_go(self) -> None:
        """Let requests go on, those to come too."""
        self._is_free.set()
