"""Milvus's and gRPC's error numbers, by what they mean to Milvus: that decides what becomes of the request."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from pymilvus.exceptions import MilvusException
from pymilvus.grpc_gen import common_pb2

from llama_index_milvus_async_ext._milvus.codes import BY_OLD_CODE, CODES
from llama_index_milvus_async_ext._milvus.errors import (
    ClosedConnectionError,
    DeadlineError,
    RpcFailure,
    SchemaChangedError,
    StatusFailure,
    classify,
)
from llama_index_milvus_async_ext.retry import Verdict

# What stands in merr/errors.go of milvus 2.3 to 2.6, by where Milvus raises it, not by what the package makes of it.
MEANINGS: dict[str, tuple[Verdict, list[int]]] = {
    # The proxy's limiter and its quota states (9 is "deny to write": by memory, disk, time tick or an administrator):
    # asked before a request is looked at, and so nothing was done.
    "turned away at the door": (Verdict.OVERLOAD, [3, 4, 8, 9, 11]),
    "the disk is full, and time makes no room": (Verdict.FULL, [7]),
    "not in memory yet, as after a restart": (Verdict.TRANSIENT, [101, 103, 106, 201, 202]),
    "a row, a filter or a vector that does not fit": (Verdict.BAD_DATA, [1100, 1101, 1700, 1701, 65535]),
    "an engine's word on a search": (Verdict.BAD_DATA, [2000, 2001, 2099]),
    "a row or a filter, on Milvus Lite": (Verdict.BAD_DATA, [6]),
    "more than one request may hold": (Verdict.TOO_LARGE, [1102]),
    "there is no such collection, partition, index, database or alias": (
        Verdict.PERMANENT,
        [100, 200, 700, 800, 1600, 1603],
    ),
    "not allowed to this user, or in this collection": (Verdict.PERMANENT, [107, 108, 1303, 1400, 1401]),
    "no more of them may be made": (Verdict.PERMANENT, [102, 250, 801]),
    "of making and describing things": (Verdict.PERMANENT, [26, 35, 104, 105, 701, 702, 802, 1200]),
    "this server cannot do it at all": (Verdict.PERMANENT, [10, 3000]),
    # From here on: raised by the shards, behind the proxy, when others may have taken their rows already.
    "a coordinator or a node went away in the midst of it": (Verdict.AMBIGUOUS, [2, 5, 12, *range(901, 907)]),
    "a shard has another schema": (Verdict.AMBIGUOUS, [109, 110]),
    "replicas, channels and segments that move": (
        Verdict.AMBIGUOUS,
        [400, 401, *range(500, 506), 507, *range(600, 606), 2200],
    ),
    "the storage or the message queue failed": (Verdict.AMBIGUOUS, [*range(1000, 1004), 1008, 1300, 1301, 1302]),
    "given up inside": (Verdict.AMBIGUOUS, [2037, 2038, 10000, 10001]),
}
# common.proto's ErrorCode.
OLD_MEANINGS: dict[str, tuple[Verdict, list[str]]] = {
    "turned away at the door": (
        Verdict.OVERLOAD,
        ["RateLimit", "ForceDeny", "MemoryQuotaExhausted", "TimeTickLongDelay", "InsufficientMemoryToLoad"],
    ),
    "the disk is full": (Verdict.FULL, ["DiskQuotaExhausted"]),
    "not ready yet": (Verdict.TRANSIENT, ["NotReadyServe", "NotReadyCoordActivating"]),
    "a wrong request": (Verdict.BAD_DATA, ["IllegalArgument"]),
    "never": (Verdict.PERMANENT, ["PermissionDenied", "CollectionNotExists", "UpsertAutoIDTrue"]),
    "things that move": (
        Verdict.AMBIGUOUS,
        ["NotShardLeader", "NoReplicaAvailable", "SegmentNotFound", "NodeIDNotMatch", "DataCoordNA", "SchemaMismatch"],
    ),
}
GRPC_MEANINGS: dict[Verdict, list[str]] = {
    # The connection or the server went away, or somebody gave up: perhaps after it was done.
    Verdict.AMBIGUOUS: ["UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "ABORTED", "INTERNAL", "UNKNOWN"],
    Verdict.BAD_DATA: ["INVALID_ARGUMENT", "OUT_OF_RANGE"],
    Verdict.PERMANENT: [
        "UNAUTHENTICATED",
        "PERMISSION_DENIED",
        "UNIMPLEMENTED",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "FAILED_PRECONDITION",
        "DATA_LOSS",
    ],
    Verdict.OVERLOAD: ["RESOURCE_EXHAUSTED"],
}

NUMBERS = [(code, verdict) for verdict, codes in MEANINGS.values() for code in codes]
OLD_NUMBERS = [
    (common_pb2.ErrorCode.Value(name), verdict) for verdict, names in OLD_MEANINGS.values() for name in names
]
STATUSES = [(name, verdict) for verdict, names in GRPC_MEANINGS.items() for name in names]
UNEXPECTED_OLD = common_pb2.ErrorCode.Value("UnexpectedError")  # what a newer Milvus puts beside most of its codes


def test_each_number_has_a_meaning_here_and_one_only() -> None:
    assert sorted(code for code, _ in NUMBERS) == sorted(each.code for each in CODES)
    assert sorted(code for code, _ in OLD_NUMBERS) == sorted(BY_OLD_CODE)
    assert sorted(name for name, _ in STATUSES) == sorted(code.name for code in grpc.StatusCode if code.value[0])


@pytest.mark.parametrize(("code", "verdict"), NUMBERS)
def test_a_number_decides_what_becomes_of_the_request(code: int, verdict: Verdict) -> None:
    assert classify(StatusFailure(code, "why", UNEXPECTED_OLD)) is verdict
    assert classify(StatusFailure(code, "why", 0)) is verdict
    assert classify(MilvusException(code=code, message="why")) is verdict, "as pymilvus raises it"
    for old_code, _ in OLD_NUMBERS if code != 65535 else ():
        assert classify(StatusFailure(code, "why", old_code)) is verdict, "an older number beside it is less exact"


@pytest.mark.parametrize("beside", [0, 1, 65535])
@pytest.mark.parametrize(("old_code", "verdict"), OLD_NUMBERS)
def test_an_old_number_decides_where_the_newer_one_says_nothing(old_code: int, verdict: Verdict, beside: int) -> None:
    assert classify(StatusFailure(beside, "why", old_code)) is verdict


@pytest.mark.parametrize("old_code", [UNEXPECTED_OLD, 25, 1000])
def test_where_neither_says_anything_some_row_is_looked_for(old_code: int) -> None:
    """As 65535, with which Milvus itself answers what does not fit; a batch is halved within bounds."""
    for code in (0, 1, 65535):
        assert classify(StatusFailure(code, "why", old_code)) is Verdict.BAD_DATA


@pytest.mark.parametrize(("code", "verdict"), NUMBERS)
def test_milvus_own_word_that_it_may_be_retried_counts_where_it_would_not_be(code: int, verdict: Verdict) -> None:
    hopeless = verdict in (Verdict.BAD_DATA, Verdict.PERMANENT)
    said = classify(StatusFailure(code, "why", may_be_retried=True))
    assert said is (Verdict.AMBIGUOUS if hopeless else verdict)
    assert classify(StatusFailure(code, "why", blames_input=True)) is verdict, "known by its number"


@pytest.mark.parametrize(("status", "verdict"), STATUSES)
def test_a_status_of_grpc_decides_what_becomes_of_the_request(status: str, verdict: Verdict) -> None:
    details = "why"
    raised = grpc.aio.AioRpcError(grpc.StatusCode[status], grpc.aio.Metadata(), grpc.aio.Metadata(), details)
    for failure in (RpcFailure(status, details), RpcFailure.from_grpc(raised), raised):
        assert classify(failure) is verdict
    assert classify(RpcFailure(status, details, sent=False)) is Verdict.TRANSIENT, "nothing has left"


@pytest.mark.parametrize(
    ("status", "details", "verdict"),
    [
        ("UNAVAILABLE", "failed to connect to all addresses; last error: refused", Verdict.TRANSIENT),
        ("UNAVAILABLE", "Socket closed", Verdict.AMBIGUOUS),
        ("DEADLINE_EXCEEDED", "failed to connect to all addresses", Verdict.AMBIGUOUS),
        ("RESOURCE_EXHAUSTED", "Sent message larger than max (70 vs. 64)", Verdict.TOO_LARGE),
        ("RESOURCE_EXHAUSTED", "grpc: received message larger than max (70 vs. 64)", Verdict.TOO_LARGE),
        ("INTERNAL", "message larger than max", Verdict.AMBIGUOUS),
    ],
)
def test_grpcs_wording_tells_only_what_its_number_leaves_open(status: str, details: str, verdict: Verdict) -> None:
    raised = grpc.aio.AioRpcError(grpc.StatusCode[status], grpc.aio.Metadata(), grpc.aio.Metadata(), details)
    assert classify(raised) is verdict


def caused_by(cause: BaseException | None, **status: Any) -> MilvusException:
    error = MilvusException(**({"code": 1, "message": "Retry run out of 0 retry times"} | status))
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        # pymilvus puts its code 1 before whatever it has met.
        (caused_by(None), Verdict.AMBIGUOUS),
        (caused_by(TimeoutError()), Verdict.AMBIGUOUS),
        (caused_by(asyncio.TimeoutError()), Verdict.AMBIGUOUS),
        (caused_by(grpc.FutureTimeoutError()), Verdict.AMBIGUOUS),
        (caused_by(StatusFailure(8, "rate limit", 49)), Verdict.OVERLOAD),
        (caused_by(RpcFailure("UNAUTHENTICATED")), Verdict.PERMANENT),
        (caused_by(RpcFailure("UNAVAILABLE", sent=False)), Verdict.TRANSIENT),
        (caused_by(RpcFailure("UNAUTHENTICATED"), message="[Errno 28] No space left on device"), Verdict.FULL),
        (caused_by(RpcFailure("UNAUTHENTICATED"), compatible_code=49), Verdict.OVERLOAD),
        (caused_by(None, message="what Lite did not expect", compatible_code=0), Verdict.BAD_DATA),
        # The operating system's words count where they are all that Lite says, and not in a row's own text.
        (StatusFailure(1, "a row says '[Errno 28]'", 0), Verdict.BAD_DATA),
        (ClosedConnectionError(sent=False), Verdict.PERMANENT),
        (ClosedConnectionError(sent=True), Verdict.UNEXPECTED),
        (SchemaChangedError("why", was_executed=False), Verdict.PERMANENT),
        (SchemaChangedError("why", was_executed=True), Verdict.UNEXPECTED),
        (DeadlineError("nothing was acknowledged"), Verdict.AMBIGUOUS),
    ],
)
def test_what_stands_behind_an_error_of_pymilvus_or_of_ours_decides(error: Exception, verdict: Verdict) -> None:
    assert classify(error) is verdict
