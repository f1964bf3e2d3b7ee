"""What each error means, and that it survives being copied and pickled."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import grpc
import pytest
from pymilvus import MilvusClient
from pymilvus.exceptions import DataNotMatchException, MilvusException, ParamError

from llama_index_milvus_async_ext import RetryPolicy
from llama_index_milvus_async_ext.retry import RpcFailure, StatusFailure, Verdict, classify
from tests.conftest import Backend
from tests.fault_proxy import FaultProxy
from tests.faults import Refuse


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (RpcFailure("UNAVAILABLE", "lost"), Verdict.AMBIGUOUS),
        (RpcFailure("UNAVAILABLE", "never left", sent=False), Verdict.TRANSIENT),
        (RpcFailure("DEADLINE_EXCEEDED"), Verdict.AMBIGUOUS),
        (RpcFailure("UNAUTHENTICATED"), Verdict.PERMANENT),
        (RpcFailure("UNIMPLEMENTED"), Verdict.PERMANENT),
        (RpcFailure("RESOURCE_EXHAUSTED", "Received message larger than max (9 vs. 5)"), Verdict.TOO_LARGE),
        (RpcFailure("RESOURCE_EXHAUSTED", "quota"), Verdict.OVERLOAD),
        (StatusFailure(8, "rate limit"), Verdict.OVERLOAD),
        (StatusFailure(1, "rate limit", 49), Verdict.OVERLOAD),
        (StatusFailure(9, "denied", 48), Verdict.OVERLOAD),
        (StatusFailure(101, "not loaded"), Verdict.TRANSIENT),
        (StatusFailure(1, "not ready", 56), Verdict.TRANSIENT),
        (StatusFailure(5, "internal", retriable=True), Verdict.TRANSIENT),
        (StatusFailure(65535, "schema", 62), Verdict.TRANSIENT),
        (StatusFailure(100, "no collection"), Verdict.PERMANENT),
        (StatusFailure(1, "what Lite did not expect"), Verdict.BAD_DATA),
        (StatusFailure(1100, "bad"), Verdict.BAD_DATA),
        (StatusFailure(65535, "bad"), Verdict.BAD_DATA),
        (DataNotMatchException(message="bad"), Verdict.BAD_DATA),
        (ParamError(message="bad"), Verdict.BAD_DATA),
        (ValueError("bad"), Verdict.BAD_DATA),
        (RuntimeError("a defect"), Verdict.PERMANENT),
    ],
)
def test_errors_are_told_apart_by_type_and_code(error: Exception, verdict: Verdict) -> None:
    assert classify(error) is verdict
    for again in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert classify(again) is verdict
        assert str(again) == str(error)


def test_the_cause_is_found_where_pymilvus_hides_it(backend: Backend) -> None:
    """It re-raises errors from themselves, and puts codes of its own before gRPC's."""
    with FaultProxy(backend.address) as proxy:
        client = MilvusClient(proxy.uri, dedicated=True)
        for code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNKNOWN):
            proxy.script(Refuse(code), method="ListDatabases")
            with pytest.raises(Exception) as raised:
                client.list_databases(retry_times=0)
            failure = RpcFailure.cause_of(raised.value)
            assert failure is not None and failure.status == code.name
            proxy.heal()
        client.close()
    alone = MilvusException(code=7, message="no gRPC error behind")
    alone.__cause__ = alone
    assert RpcFailure.cause_of(alone) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_attempts": 0},
        {"initial_backoff_seconds": -1.0},
        {"initial_backoff_seconds": 9.0},
        {"max_backoff_seconds": float("inf")},
        {"deadline_seconds": 0.0},
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)).split("_")[0]):
        RetryPolicy(**wrong)
