"""When to try a request again, and what each error means."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Any

import grpc
from pymilvus.exceptions import DataNotMatchException, MilvusException, ParamError


@dataclass(frozen=True)
class RetryPolicy:
    """How often, how fast and for how long a failed request is sent again.

    `RetryPolicy()` suits a server that restarts now and then; `RetryPolicy(max_attempts=1)` never repeats a request.

    The pause before attempt n is drawn at random between 0 and
    `min(max_backoff_seconds, initial_backoff_seconds * 2**(n - 1))`, so that many clients don't come back together.
    After a rejection for overload it is drawn between 0 and a tenth of `max_backoff_seconds`, while the limit on
    requests in flight takes the pressure off.

    Attributes:
        max_attempts: Requests sent for one batch at the most, the first included. A rejection for overload (rate
            limit) does not count, as the server did not execute it: only the deadline ends those. The default leaves
            it to the deadline: with pauses of up to five seconds, fifty attempts take about two minutes.
        initial_backoff_seconds: Upper bound of the first pause.
        max_backoff_seconds: Upper bound of any pause.
        deadline_seconds: How long a call keeps trying while the endpoint acknowledges nothing, waiting time
            included; a last attempt has at least 0.1 seconds, and may outlive the deadline by that. A long write that
            moves on never meets it. The default outlasts a restart of a Milvus standalone server, measured at 26 to 31
            seconds until its collections are served again.
    """

    max_attempts: int = 50
    initial_backoff_seconds: float = 0.1
    max_backoff_seconds: float = 5.0
    deadline_seconds: float = 120.0

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts must be at least 1, got {self.max_attempts}")
        if not 0 <= self.initial_backoff_seconds <= self.max_backoff_seconds < math.inf:
            raise ValueError(
                "0 <= initial_backoff_seconds <= max_backoff_seconds is needed, "
                f"got {self.initial_backoff_seconds} and {self.max_backoff_seconds}"
            )
        if not 0 < self.deadline_seconds < math.inf:
            raise ValueError(f"deadline_seconds must be positive and finite, got {self.deadline_seconds}")


class Verdict(enum.Enum):
    """What an error says about the request that met it."""

    BAD_DATA = "some item of the batch can't be accepted: find it"
    TOO_LARGE = "the request or its answer is over a size limit: split it"
    PERMANENT = "no item of the batch will ever be accepted"
    TRANSIENT = "not executed, worth another try"
    OVERLOAD = "rejected unexecuted because there is too much: slow down, then try again"
    AMBIGUOUS = "it may or may not have been executed"

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed later."""
        return self in _RETRYABLE


_RETRYABLE = frozenset({Verdict.TRANSIENT, Verdict.OVERLOAD, Verdict.AMBIGUOUS})


class RpcFailure(MilvusException):
    """A request that gRPC failed to carry: picklable, unlike gRPC's own errors, and free of request contents.

    Attributes:
        status: Name of the gRPC status, such as "UNAVAILABLE".
        sent: False if the request certainly never left, as no connection could be made.
    """

    def __init__(self, status: str = "UNKNOWN", details: str = "", sent: bool = True) -> None:
        super().__init__(code=2, message=f"{status}: {details}")
        self.status = status
        self.details = details
        self.sent = sent

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.status, self.details, self.sent))

    @classmethod
    def cause_of(cls, error: BaseException) -> RpcFailure | None:
        """What gRPC said, if that is behind an error of pymilvus's, which may hide it under a code of its own."""
        # pymilvus re-raises an error "from" itself: then it is its own cause, and what it hides is only its context.
        seen: set[int] = set()
        cause: BaseException | None = error
        while cause is not None and id(cause) not in seen:
            if isinstance(cause, grpc.RpcError):
                return cls.from_grpc(cause)
            seen.add(id(cause))
            cause = cause.__cause__ if cause.__cause__ not in (None, cause) else cause.__context__
        return None

    @classmethod
    def from_grpc(cls, error: grpc.RpcError) -> RpcFailure:
        """Keep of a gRPC error what tells its meaning."""
        call: Any = error
        details = call.details() or ""
        # gRPC has one code for "no connection" and "connection lost"; only its wording tells that nothing was sent.
        # An unknown wording counts as sent, which is the safe side.
        unsent = call.code() is grpc.StatusCode.UNAVAILABLE and "failed to connect to all addresses" in details
        return cls(call.code().name, details, sent=not unsent)


class StatusFailure(MilvusException):
    """A request that Milvus answered with an error status."""

    def __init__(self, code: int = 1, message: str = "", compatible_code: int = 1, retriable: bool = False) -> None:
        super().__init__(code=code, message=message, compatible_code=compatible_code)
        self.retriable = retriable

    @property
    def schema_is_stale(self) -> bool:
        """Whether the collection's schema has changed since it was asked for."""
        return bool(self.compatible_code == _COMPATIBLE_SCHEMA_MISMATCH)

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.code, self.message, self.compatible_code, self.retriable))


_BY_GRPC_STATUS = {
    "UNAVAILABLE": Verdict.AMBIGUOUS,
    "DEADLINE_EXCEEDED": Verdict.AMBIGUOUS,
    "CANCELLED": Verdict.AMBIGUOUS,
    "ABORTED": Verdict.AMBIGUOUS,
    "INTERNAL": Verdict.AMBIGUOUS,
    "UNKNOWN": Verdict.AMBIGUOUS,
    "INVALID_ARGUMENT": Verdict.BAD_DATA,
    "OUT_OF_RANGE": Verdict.BAD_DATA,
}

# Milvus' own codes (pkg/util/merr of milvus 2.3 to 2.6). What is not listed is about the data of the request.
_OVERLOAD_CODES = frozenset({3, 4, 7, 8, 9})  # memory, requests, disk, rate limit, writes denied
_TRANSIENT_CODES = frozenset({2, 101, 103, 106, 400, 401, 500, 501, 502, 503, 600, 601, 603, 901, 902})
_PERMANENT_CODES = frozenset({100, 102, 200, 700, 800, 801, 1400, 1401, 1600})  # a thing that does not exist
_COMPATIBLE_OVERLOAD_CODES = frozenset({48, 49, 53, 54})  # the older numbers: denied, rate limit, memory, disk
# Not ready (twice), and a schema that has changed since it was asked for. Code 1 alone won't do: Milvus means "not
# ready" by it, Milvus Lite everything that it did not expect, a bad query for one.
_COMPATIBLE_SCHEMA_MISMATCH = 62
_COMPATIBLE_TRANSIENT_CODES = frozenset({56, 57, _COMPATIBLE_SCHEMA_MISMATCH})
COLLECTION_NOT_FOUND = 100
COLLECTION_NOT_LOADED = 101


def classify(error: BaseException) -> Verdict:
    """Tell what an error means, by its type and code."""
    if isinstance(error, RpcFailure):
        if not error.sent:
            return Verdict.TRANSIENT
        if error.status == "RESOURCE_EXHAUSTED":
            # One gRPC code for two causes; gRPC words its size limits so in every language.
            return Verdict.TOO_LARGE if "larger than max" in error.details else Verdict.OVERLOAD
        return _BY_GRPC_STATUS.get(error.status, Verdict.PERMANENT)
    if isinstance(error, (DataNotMatchException, ParamError)):
        return Verdict.BAD_DATA
    if isinstance(error, MilvusException):
        code, compatible = error.code, error.compatible_code
        if code in _OVERLOAD_CODES or compatible in _COMPATIBLE_OVERLOAD_CODES:
            return Verdict.OVERLOAD
        if code in _PERMANENT_CODES:
            return Verdict.PERMANENT
        retriable = code in _TRANSIENT_CODES or compatible in _COMPATIBLE_TRANSIENT_CODES
        if retriable or getattr(error, "retriable", False):
            return Verdict.TRANSIENT
        return Verdict.BAD_DATA
    if isinstance(error, grpc.RpcError):
        return classify(RpcFailure.from_grpc(error))
    if isinstance(error, (ValueError, TypeError, KeyError)):
        return Verdict.BAD_DATA
    return Verdict.PERMANENT
