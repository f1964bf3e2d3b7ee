"""What each error means, and that it survives being copied and pickled."""

from __future__ import annotations

import copy
import math
import pickle
import random
import struct
from typing import Any

import grpc
import pytest
import tenacity
from pymilvus import MilvusClient
from pymilvus.exceptions import DataNotMatchException, MilvusException, ParamError
from pymilvus.grpc_gen import common_pb2

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, RetryPolicy
from llama_index_milvus_async_ext._milvus.errors import (
    ClosedConnectionError,
    DeadlineError,
    QueryError,
    QueryMismatchError,
    ReplacementError,
    RpcFailure,
    SchemaChangedError,
    SchemaMismatchError,
    StatusFailure,
    classify,
    fresh,
)
from llama_index_milvus_async_ext.retry import Attempts, Verdict
from tests.conftest import Backend, MakeNodes, lite_address
from tests.fault_proxy import FaultProxy
from tests.faults import First, MilvusError, Refuse


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
        (StatusFailure(0, "not ready, in the old numbers alone", 56), Verdict.TRANSIENT),
        (StatusFailure(0, "what no old number fits", 1), Verdict.BAD_DATA),
        (StatusFailure(2, "unavailable, perhaps in the middle of it"), Verdict.AMBIGUOUS),
        (StatusFailure(5, "internal"), Verdict.AMBIGUOUS),
        (StatusFailure(109, "schema", 62), Verdict.AMBIGUOUS),
        (StatusFailure(65535, "schema", 62), Verdict.AMBIGUOUS),
        (StatusFailure(1302, "message queue"), Verdict.AMBIGUOUS),
        (StatusFailure(10001, "timed out"), Verdict.AMBIGUOUS),
        (StatusFailure(4242, "a code of the future"), Verdict.AMBIGUOUS),
        (StatusFailure(4242, "a code of the future", blames_input=True), Verdict.BAD_DATA),
        (StatusFailure(65535, "Milvus itself would try again", may_be_retried=True), Verdict.AMBIGUOUS),
        (StatusFailure(1102, "too large"), Verdict.TOO_LARGE),
        (StatusFailure(7, "disk quota"), Verdict.FULL),
        (StatusFailure(100, "no collection"), Verdict.PERMANENT),
        (StatusFailure(1, "what Lite did not expect", 0), Verdict.BAD_DATA),
        (StatusFailure(1, "[Errno 28] No space left on device", 0), Verdict.FULL),
        (StatusFailure(1, "[Errno 5] Input/output error", 0), Verdict.AMBIGUOUS),
        (StatusFailure(6, "what Lite can't read", 6), Verdict.BAD_DATA),
        (StatusFailure(1100, "bad"), Verdict.BAD_DATA),
        (StatusFailure(65535, "bad"), Verdict.BAD_DATA),
        (StatusFailure(65535, "worker(1) query failed: query results exceed the limit size "), Verdict.TOO_LARGE),
        (MilvusException(message="wait for loading collection timeout"), Verdict.AMBIGUOUS),
        (ClosedConnectionError(), Verdict.PERMANENT),
        (ClosedConnectionError(sent=True), Verdict.UNEXPECTED),
        (SchemaChangedError("changed"), Verdict.PERMANENT),
        (SchemaChangedError("changed", was_executed=True), Verdict.UNEXPECTED),
        (DeadlineError("too late"), Verdict.AMBIGUOUS),
        (MilvusException(code=1100, message="bad"), Verdict.BAD_DATA),
        (MilvusException(code=4242, message="a code of the future"), Verdict.AMBIGUOUS),
        (MilvusException(code=1, message="not ready", compatible_code=5), Verdict.BAD_DATA),
        (MilvusException(code=1, message="not ready", compatible_code=6), Verdict.BAD_DATA),
        (RpcFailure("INVALID_ARGUMENT"), Verdict.BAD_DATA),
        (RpcFailure("OUT_OF_RANGE"), Verdict.BAD_DATA),
        (StatusFailure(0, "no code at all", 0), Verdict.BAD_DATA),
        (StatusFailure(100, "Milvus itself would try again", may_be_retried=True), Verdict.AMBIGUOUS),
        (StatusFailure(8, "rate limit", may_be_retried=True), Verdict.OVERLOAD),
        (StatusFailure(100, "no collection", blames_input=True), Verdict.PERMANENT),
        (TypeError("bad"), Verdict.BAD_DATA),
        (KeyError("bad"), Verdict.BAD_DATA),
        (OverflowError("bad"), Verdict.BAD_DATA),
        (struct.error("bad"), Verdict.BAD_DATA),
        (QueryError("bad"), Verdict.BAD_DATA),
        (QueryMismatchError("bad"), Verdict.BAD_DATA),
        (DataNotMatchException(message="bad"), Verdict.BAD_DATA),
        (ParamError(message="bad"), Verdict.BAD_DATA),
        (ValueError("bad"), Verdict.BAD_DATA),
        (RuntimeError("a defect"), Verdict.UNEXPECTED),
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
    ("code", "reason"), [(10001, "context deadline exceeded"), (1302, "message queue"), (5, "internal"), (4242, "new")]
)
def test_what_is_no_fault_of_the_data_is_tried_again(
    lite_uri: str, collection_name: str, make_nodes: MakeNodes, code: int, reason: str
) -> None:
    with FaultProxy(lite_address(lite_uri)) as proxy:
        quick = RetryPolicy(initial_backoff_seconds=0.001, max_backoff_seconds=0.01)
        store = AsyncMilvusVectorStore(uri=proxy.uri, collection_name=collection_name, dim=8, retry=quick)
        proxy.script(MilvusError(code, reason), method=("Insert", "Upsert"), on=First(2))
        report = store.write(make_nodes(3))
        assert (len(report.written), report.retries) == (3, 2)
        store.close()


class GrpcError(grpc.RpcError):  # type: ignore[misc]
    """As gRPC raises them: a call of its own, which says what came of it."""

    def __init__(self, code: grpc.StatusCode, details: str | None) -> None:
        super().__init__()
        self.code = lambda: code
        self.details = lambda: details


@pytest.mark.parametrize(
    ("code", "details", "verdict"),
    [
        (grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses; last error: refused", Verdict.TRANSIENT),
        (grpc.StatusCode.UNAVAILABLE, "Socket closed", Verdict.AMBIGUOUS),
        (grpc.StatusCode.UNAVAILABLE, None, Verdict.AMBIGUOUS),
        (grpc.StatusCode.INTERNAL, "failed to connect to all addresses", Verdict.AMBIGUOUS),
        (grpc.StatusCode.PERMISSION_DENIED, "no", Verdict.PERMANENT),
    ],
)
def test_only_a_connection_that_was_never_made_proves_that_nothing_was_sent(
    code: grpc.StatusCode, details: str | None, verdict: Verdict
) -> None:
    error = GrpcError(code, details)
    assert classify(error) is verdict
    kept = RpcFailure.from_grpc(error)
    assert (kept.status, kept.details, kept.code) == (code.name, details or "", 2)
    assert kept.sent == (verdict is not Verdict.TRANSIENT)
    assert str(kept) == f"<RpcFailure: (code=2, message={code.name}: {details or ''})>"


def test_the_cause_of_what_pymilvus_met_itself_decides() -> None:
    for cause, verdict in (
        (None, Verdict.AMBIGUOUS),
        (TimeoutError(), Verdict.AMBIGUOUS),
        (grpc.FutureTimeoutError(), Verdict.AMBIGUOUS),
        (ValueError("bad"), Verdict.BAD_DATA),
        (GrpcError(grpc.StatusCode.UNAVAILABLE, "failed to connect to all addresses"), Verdict.TRANSIENT),
    ):
        hidden, raised_from = MilvusException(message="failed"), MilvusException(message="failed")
        hidden.__context__ = raised_from.__cause__ = cause
        assert classify(hidden) is classify(raised_from) is verdict
        found = RpcFailure.cause_of(hidden)
        assert (found is not None) == isinstance(cause, grpc.RpcError)


def test_a_cause_is_found_behind_errors_that_are_raised_from_themselves_or_in_a_circle() -> None:
    own_cause, one, other = (MilvusException(message="failed") for _ in range(3))
    own_cause.__cause__ = own_cause
    own_cause.__context__ = GrpcError(grpc.StatusCode.ABORTED, "why")
    found = RpcFailure.cause_of(own_cause)
    assert found is not None and found.status == "ABORTED"
    one.__cause__, other.__cause__ = other, one
    assert RpcFailure.cause_of(one) is None


def test_an_error_keeps_what_it_says_of_itself() -> None:
    assert [getattr(RpcFailure(), name) for name in ("status", "details", "sent")] == ["UNKNOWN", "", True]
    closed = ClosedConnectionError()
    assert (closed.status, closed.sent, isinstance(closed, RpcFailure)) == ("CANCELLED", False, True)
    plain, full = StatusFailure(), StatusFailure(2201, "why", 7, may_be_retried=True, blames_input=True)
    assert (plain.code, plain.compatible_code, plain.may_be_retried, plain.blames_input) == (1, 1, False, False)
    assert (full.code, full.message, full.compatible_code) == (2201, "why", 7)
    assert full.may_be_retried and full.blames_input
    late = DeadlineError("too late")
    assert (late.code, late.message, isinstance(late, TimeoutError)) == (1, "too late", True)
    changed = SchemaChangedError("it changed")
    assert (changed.code, changed.compatible_code, changed.was_executed) == (109, 62, False)
    query = QueryError("why")
    assert (query.code, query.compatible_code, query.args) == (1100, 5, ("why",))
    errors = (
        RpcFailure("ABORTED", "why", sent=False),
        ClosedConnectionError(sent=True),
        full,
        late,
        SchemaChangedError("why", was_executed=True),
        query,
        ReplacementError.of(full, "and what was there is gone"),
    )
    for error in errors:
        for again in (copy.copy(error), pickle.loads(pickle.dumps(error))):
            assert type(again) is type(error) and str(again) == str(error)
            assert again.__dict__ == error.__dict__
    for error in errors[:3]:
        error.report = "of the write that it ended"  # type: ignore[attr-defined]
        assert copy.copy(error).report == "of the write that it ended"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "error",
    [StatusFailure(8, "rate limit", 49), StatusFailure(109, "stale", 62), RpcFailure("UNAVAILABLE", sent=False)],
)
def test_a_replacement_that_failed_means_what_its_request_met(error: Any) -> None:
    failed = ReplacementError.of(error, "and what was there is gone")
    assert failed.message == f"{error.message}; and what was there is gone"
    assert (failed.code, failed.compatible_code) == (error.code, error.compatible_code)
    assert classify(failed) is classify(error)
    assert failed.schema_is_stale == getattr(error, "schema_is_stale", False)


def test_a_failure_says_what_the_status_said() -> None:
    status = common_pb2.Status(code=2201, reason="bad plan", error_code=1, retriable=False)
    status.extra_info["is_input_error"] = "true"
    failure = StatusFailure.of(status)
    assert (failure.code, failure.message, failure.compatible_code) == (2201, "bad plan", 1)
    assert failure.blames_input and not failure.may_be_retried and not failure.schema_is_stale
    for code, old_code in ((109, 62), (109, 1), (65535, 62), (1, 62)):  # the old number alone, before Milvus 2.6
        assert StatusFailure.of(common_pb2.Status(code=code, error_code=old_code)).schema_is_stale
    assert StatusFailure.of(common_pb2.Status(code=5, retriable=True)).may_be_retried


def test_a_refused_query_is_caught_as_with_the_plain_store() -> None:
    for error in (QueryError("why"), QueryMismatchError("why")):
        assert isinstance(error, MilvusException) and isinstance(error, ValueError)
        assert str(error) == "why" and error.code == 1100
        assert isinstance(error, SchemaMismatchError) == (type(error) is QueryMismatchError)


def a_raised_error() -> Exception:
    try:
        try:
            raise RpcFailure("UNAVAILABLE", "lost")
        except RpcFailure as cause:
            raise StatusFailure(8, "rate limit", 49) from cause
    except StatusFailure as error:
        return error


def test_a_fresh_error_says_the_same_and_holds_no_frames() -> None:
    shared = a_raised_error()
    copied = fresh(shared)
    assert copied is not shared and repr(copied) == repr(shared) and classify(copied) is Verdict.OVERLOAD
    assert isinstance(copied.__cause__, RpcFailure) and copied.__cause__.status == "UNAVAILABLE"
    for error in (copied, copied.__cause__):
        assert error.__traceback__ is None and error.__context__ is None
    assert shared.__traceback__ is not None, "the shared one is left alone"


def test_a_fresh_error_has_all_its_causes_and_nothing_that_it_hides() -> None:
    first, second, third = ValueError("1"), KeyError("2"), OSError("3")
    first.__cause__, second.__cause__, third.__context__ = second, third, RuntimeError("hidden")
    copied = fresh(first)
    chain = [copied, copied.__cause__, copied.__cause__ and copied.__cause__.__cause__]
    assert list(map(repr, chain)) == list(map(repr, (first, second, third)))
    assert chain[2] is not None and chain[2].__cause__ is None


def test_an_error_that_cannot_be_copied_is_handed_on_itself() -> None:
    class TwoPartError(Exception):
        def __init__(self, one: str, two: str) -> None:
            super().__init__(f"{one} {two}")

    odd = TwoPartError("a", "b")
    assert fresh(odd) is odd
    own_cause = MilvusException(code=8, message="raised from itself")
    own_cause.__cause__ = own_cause
    assert str(fresh(own_cause)) == str(own_cause) and fresh(own_cause).__cause__ is None

    class ShoutingError(Exception):
        def __init__(self, text: str) -> None:
            super().__init__(f"{text}!")

    class DisguisedError(Exception):
        def __reduce__(self) -> Any:
            return ValueError, self.args

    for other in (ShoutingError("a"), DisguisedError("a")):
        assert fresh(other) is other, "it would come out as another"
    noted = ValueError("x")
    noted.__cause__ = odd
    assert fresh(noted).__cause__ is None


def test_newer_pymilvus_may_call_a_property_retriable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MilvusException, "retriable", property(lambda self: True), raising=False)
    failure = StatusFailure(65535, "bad", may_be_retried=False)
    assert classify(copy.copy(failure)) is Verdict.BAD_DATA


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_attempts": 0},
        {"initial_backoff_seconds": -1e-9},
        {"initial_backoff_seconds": 5.0001},
        {"initial_backoff_seconds": float("nan")},
        {"max_backoff_seconds": 0.0999},
        {"max_backoff_seconds": float("inf")},
        {"max_backoff_seconds": float("nan")},
        {"deadline_seconds": 0.0},
        {"deadline_seconds": float("inf")},
        {"deadline_seconds": float("nan")},
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)).split("_")[0]):
        RetryPolicy(**wrong)


def test_a_policy_may_go_to_the_limits_of_what_makes_sense() -> None:
    RetryPolicy(max_attempts=1, initial_backoff_seconds=0.0, max_backoff_seconds=0.0, deadline_seconds=1e-9)
    for name in ("stop", "wait"):
        with pytest.raises(TypeError, match=f"^{name} must be one of tenacity's {name} objects, got int$"):
            RetryPolicy(**{name: 5})  # type: ignore[arg-type]
    assert RetryPolicy() == RetryPolicy(50, 0.1, 5.0, 120.0, None, None), "as the README says"


# -- pauses -----------------------------------------------------------------------------------------------------------


def attempts(made: int, counted: int | None = None, verdict: Verdict = Verdict.TRANSIENT) -> Attempts:
    counted = made if counted is None else counted
    return Attempts(counted, made, 100.0, 107.5, 2.5, RpcFailure("UNAVAILABLE"), verdict)


def chance(monkeypatch: pytest.MonkeyPatch, is_high: bool) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: high if is_high else low)
    monkeypatch.setattr(random, "random", lambda: float(is_high))


def test_pauses_are_drawn_from_intervals_that_double_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = RetryPolicy(initial_backoff_seconds=0.5, max_backoff_seconds=6.0)
    chance(monkeypatch, is_high=True)
    assert [policy.next_pause(attempts(made)) for made in range(1, 7)] == [0.5, 1.0, 2.0, 4.0, 6.0, 6.0]
    assert policy.next_pause(attempts(made=9, counted=3)) == 2.0, "overloads don't count"
    assert policy.next_pause(attempts(made=9, counted=0)) == 0.5
    chance(monkeypatch, is_high=False)
    assert [policy.next_pause(attempts(made)) for made in range(1, 7)] == [0.0] * 6


def test_a_pause_after_an_overload_is_short_however_many_there_were(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = RetryPolicy(max_backoff_seconds=6.0, max_attempts=3)
    for is_high, pause in ((True, 0.6), (False, 0.0)):
        chance(monkeypatch, is_high)
        for made in (1, 2, 3, 1_000):
            assert policy.next_pause(attempts(made, verdict=Verdict.OVERLOAD)) == pytest.approx(pause)


def test_the_last_of_the_attempts_has_no_pause_after_it() -> None:
    policy = RetryPolicy(max_attempts=3)
    assert [policy.next_pause(attempts(made)) is None for made in (1, 2, 3, 4)] == [False, False, True, True]
    assert policy.next_pause(attempts(made=9, counted=2)) is not None


def test_tenacitys_own_objects_see_each_attempt() -> None:
    seen: list[Any] = []

    def look(state: tenacity.RetryCallState) -> float:
        assert state.outcome is not None
        error = state.outcome.exception()
        seen.append((state.attempt_number, state.seconds_since_start, state.idle_for, state.outcome.failed, error))
        return 0.0

    policy = RetryPolicy(stop=look, wait=look, max_attempts=1)  # type: ignore[arg-type]
    of = attempts(made=4, counted=2, verdict=Verdict.OVERLOAD)
    assert policy.next_pause(of) == 0.0
    assert seen == [(4, 7.5, 2.5, True, of.error)] * 2
    for waits, pause in ((-3.0, 0.0), (3.0, 3.0), (tenacity.wait_fixed(2), 2.0)):
        wait = waits if callable(waits) else tenacity.wait_fixed(waits)
        assert RetryPolicy(wait=wait).next_pause(of) == pause, "in place of an overload's pause too"
    assert RetryPolicy(stop=tenacity.stop_after_attempt(4)).next_pause(of) is None
    assert RetryPolicy(wait=tenacity.wait_fixed(2), max_attempts=2).next_pause(attempts(2)) is None
    with pytest.raises(ValueError, match=r"returned NaN$"):
        RetryPolicy(wait=tenacity.wait_fixed(math.nan)).next_pause(of)


def test_each_verdict_says_what_is_to_be_done() -> None:
    meanings = {
        verdict: (verdict.is_repeated, verdict.retryable, verdict.is_about_items, verdict.may_have_been_executed)
        for verdict in Verdict
    }
    assert meanings == {
        Verdict.BAD_DATA: (False, False, True, False),
        Verdict.TOO_LARGE: (False, False, True, False),
        Verdict.PERMANENT: (False, False, False, False),
        Verdict.TRANSIENT: (True, True, False, False),
        Verdict.OVERLOAD: (True, True, False, False),
        Verdict.FULL: (False, True, False, False),
        Verdict.AMBIGUOUS: (True, True, False, True),
        Verdict.UNEXPECTED: (False, False, False, True),
    }
