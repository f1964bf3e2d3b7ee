"""What each error of Milvus and gRPC means for the request that met it."""

from __future__ import annotations

import asyncio
import copy
import struct
from typing import Any

import grpc
from pymilvus.exceptions import DataNotMatchException, MilvusException, ParamError

from llama_index_milvus_async_ext._milvus.codes import (
    BY_CODE,
    BY_OLD_CODE,
    NOT_READY,
    OLD_ILLEGAL_ARGUMENT,
    OLD_SCHEMA_MISMATCH,
    PARAMETER_INVALID,
    SAYS_NOTHING,
    SCHEMA_MISMATCH,
)
from llama_index_milvus_async_ext._milvus.codes import COLLECTION_NOT_FOUND as COLLECTION_NOT_FOUND
from llama_index_milvus_async_ext._milvus.codes import COLLECTION_NOT_LOADED as COLLECTION_NOT_LOADED
from llama_index_milvus_async_ext.retry import Verdict

_WAITED_IN_VAIN = (TimeoutError, asyncio.TimeoutError, grpc.FutureTimeoutError)


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
        return (type(self), (self.status, self.details, self.sent), self.__dict__)

    @classmethod
    def cause_of(cls, error: BaseException) -> RpcFailure | None:
        """What gRPC said, if that is behind an error of pymilvus's, which may hide it under a code of its own."""
        for cause in _with_causes(error):
            if isinstance(cause, grpc.RpcError):
                return cls.from_grpc(cause)
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


class ClosedConnectionError(RpcFailure):
    """A request whose connection has been closed: no further attempt can be made on it."""

    def __init__(self, sent: bool = False) -> None:
        super().__init__("CANCELLED", "the connection was closed", sent)

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.sent,), self.__dict__)


class StatusFailure(MilvusException):
    """A request that Milvus answered with an error status.

    Attributes:
        may_be_retried: Milvus's own word that the request may be sent again. (Not `retriable`: newer versions of
            pymilvus may claim that name.)
        blames_input: Milvus's own word that the request is at fault; only newer servers say so.
    """

    def __init__(
        self,
        code: int = 1,
        message: str = "",
        compatible_code: int = 1,
        may_be_retried: bool = False,
        blames_input: bool = False,
    ) -> None:
        super().__init__(code=code, message=message, compatible_code=compatible_code)
        self.may_be_retried = may_be_retried
        self.blames_input = blames_input

    @classmethod
    def of(cls, status: Any) -> StatusFailure:
        """What a `Status` message says."""
        blames_input = status.extra_info.get("is_input_error") == "true"
        return cls(status.code, status.reason, status.error_code, bool(status.retriable), blames_input)

    @property
    def schema_is_stale(self) -> bool:
        """Whether the collection's schema has changed since it was asked for."""
        return bool(self.code == SCHEMA_MISMATCH or self.compatible_code == OLD_SCHEMA_MISMATCH)

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = (self.code, self.message, self.compatible_code, self.may_be_retried, self.blames_input)
        return (type(self), arguments, self.__dict__)


class DeadlineError(MilvusException, TimeoutError):
    """A call that waited for its turn until its deadline."""

    def __init__(self, message: str = "") -> None:
        MilvusException.__init__(self, code=NOT_READY, message=message)

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.message,))


class NotLoadedError(MilvusException):
    """A collection that somebody has released, or that was never loaded: no search and no look-up finds its rows."""

    def __init__(self, collection: str = "") -> None:
        message = (
            f"collection {collection!r} is not loaded, and so can't be searched; somebody has released it, or it was "
            f"made without an index: store.client.load_collection({collection!r})"
        )
        super().__init__(code=COLLECTION_NOT_LOADED, message=message)
        self.collection = collection

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.collection,))


class SchemaMismatchError(ValueError):
    """Something does not fit the collection as it was last described: it may fit it as it is now."""


class SchemaChangedError(MilvusException):
    """Rows were refused because their collection is no longer what they were encoded for.

    Attributes:
        was_executed: Whether some of them may have been stored all the same.
    """

    def __init__(self, message: str = "", was_executed: bool = False) -> None:
        super().__init__(code=SCHEMA_MISMATCH, message=message, compatible_code=OLD_SCHEMA_MISMATCH)
        self.was_executed = was_executed

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.message, self.was_executed))


class ReplacementError(MilvusException):
    """Rows that were to be deleted and inserted anew, and were not inserted.

    Attributes:
        verdict: What the error behind it means for the new rows.
        schema_is_stale: As that error's, if it says so.
    """

    def __init__(
        self,
        message: str = "",
        code: int = NOT_READY,
        compatible_code: int = 1,
        verdict: Verdict = Verdict.AMBIGUOUS,
        schema_is_stale: bool = False,
    ) -> None:
        super().__init__(code=code, message=message, compatible_code=compatible_code)
        self.verdict = verdict
        self.schema_is_stale = schema_is_stale

    @classmethod
    def of(cls, error: MilvusException, note: str) -> ReplacementError:
        """The error, and what it says nothing of."""
        is_stale = getattr(error, "schema_is_stale", False)
        return cls(f"{error.message}; {note}", error.code, error.compatible_code, classify(error), is_stale)

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = (self.message, self.code, self.compatible_code, self.verdict, self.schema_is_stale)
        return (type(self), arguments, self.__dict__)


class QueryError(ParamError, ValueError):
    """A query that can't be answered; found out before it was sent.

    Milvus itself would have refused it: so it is a `MilvusException`, as with the plain store, and a `ValueError`.
    """

    def __init__(self, message: str = "") -> None:
        MilvusException.__init__(self, code=PARAMETER_INVALID, message=message, compatible_code=OLD_ILLEGAL_ARGUMENT)
        self.args = (message,)

    def __str__(self) -> str:
        return str(self.message)


class QueryMismatchError(QueryError, SchemaMismatchError):
    """A query that does not fit the collection as it was last described."""


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

# Milvus Lite has one code, 1, for everything that it did not expect; where the operating system refused it something,
# its reason begins with the text of Python's OSError. The first beginning that fits counts.
_LITE_REASONS = (("[Errno 28]", Verdict.FULL), ("[Errno ", Verdict.AMBIGUOUS))

# A server has no code for an answer that is over its own limit (100 MB of rows): it comes with that of bad data.
_TOO_MANY_ROWS = "query results exceed the"


def classify(error: BaseException) -> Verdict:
    """Tell what an error means, by its type and code."""
    if isinstance(error, ClosedConnectionError):
        return Verdict.UNEXPECTED if error.sent else Verdict.PERMANENT
    if isinstance(error, RpcFailure):
        if not error.sent:
            return Verdict.TRANSIENT
        if error.status == "RESOURCE_EXHAUSTED":
            # One gRPC code for two causes; gRPC words its size limits so in every language.
            return Verdict.TOO_LARGE if "larger than max" in error.details else Verdict.OVERLOAD
        return _BY_GRPC_STATUS.get(error.status, Verdict.PERMANENT)
    if isinstance(error, ReplacementError):
        return error.verdict
    if isinstance(error, NotLoadedError):
        return Verdict.PERMANENT
    if isinstance(error, SchemaChangedError):
        return Verdict.UNEXPECTED if error.was_executed else Verdict.PERMANENT
    if isinstance(error, (DataNotMatchException, ParamError)):
        return Verdict.BAD_DATA
    if isinstance(error, MilvusException):
        verdict = _by_code(error)
        if verdict in (Verdict.BAD_DATA, Verdict.PERMANENT) and getattr(error, "may_be_retried", False):
            return Verdict.AMBIGUOUS
        return Verdict.TOO_LARGE if verdict is Verdict.BAD_DATA and _TOO_MANY_ROWS in error.message else verdict
    if isinstance(error, grpc.RpcError):
        return classify(RpcFailure.from_grpc(error))
    if isinstance(error, (ValueError, TypeError, KeyError, ArithmeticError, struct.error)):
        return Verdict.BAD_DATA  # of a request that could not be built
    return Verdict.UNEXPECTED


def _by_code(error: MilvusException) -> Verdict:
    code, old_code = error.code, error.compatible_code
    if code in SAYS_NOTHING and old_code in BY_OLD_CODE:
        return BY_OLD_CODE[old_code]
    if code == NOT_READY:
        return _by_reason(error)
    if code == 0:
        return Verdict.BAD_DATA  # as 65535, which Milvus itself takes it for
    if code not in BY_CODE and getattr(error, "blames_input", False):
        return Verdict.BAD_DATA
    return BY_CODE.get(code, Verdict.AMBIGUOUS)


def _by_reason(error: MilvusException) -> Verdict:
    """The meaning of code 1 alone: a server's "not ready" brings an older number along, and does not come here."""
    for beginning, verdict in _LITE_REASONS:
        if error.message.startswith(beginning):
            return verdict
    if isinstance(error, StatusFailure) or error.compatible_code != 1:
        return Verdict.BAD_DATA  # Milvus Lite did not expect it: mostly what is wrong with a row or a query
    # pymilvus's own: it has met some other error, or waited in vain.
    cause = next(iter(_with_causes(error)[1:]), None)
    return Verdict.AMBIGUOUS if cause is None or isinstance(cause, _WAITED_IN_VAIN) else classify(cause)


def fresh(error: BaseException) -> BaseException:
    """A copy to raise, of an error that several callers share: without traceback and context, so without frames.

    Its causes are copied likewise; one that can't be copied is left out. An error that can't be copied is returned
    itself.
    """
    first = _copied(error)
    if first is None:
        return error
    effect = first
    for cause in _with_causes(error, contexts=False)[1:]:
        copied = _copied(cause)
        if copied is None:
            break
        effect.__cause__ = copied
        effect = copied
    return first


def _copied(error: BaseException) -> BaseException | None:
    try:
        copied = copy.copy(error)
        # An exception whose constructor makes something else of its arguments does not come out the same.
        is_same = type(copied) is type(error) and copied is not error and str(copied) == str(error)
    except Exception:
        return None
    return copied if is_same else None


def _with_causes(error: BaseException, contexts: bool = True) -> list[BaseException]:
    """An error, what caused it, and so on; each once, as pymilvus raises errors "from" themselves.

    Then an error is its own cause, and what it hides is only its context.
    """
    chain: list[BaseException] = []
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        chain.append(current)
        seen.add(id(current))
        cause = current.__cause__ if current.__cause__ is not current else None
        current = cause or (current.__context__ if contexts else None)
    return chain
