"""What a report says of a write, and where it is found again."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
from llama_index.core.schema import TextNode
from pymilvus.exceptions import MilvusException

from llama_index_milvus_async_ext import FailedNode, IngestionReport, WriteError, WriteReport


def lost(id_: str, error: BaseException | None = None) -> FailedNode:
    return FailedNode(TextNode(id_=id_), error or ValueError(f"no room for {id_}"), attempts=1, retryable=True)


def test_a_report_is_ok_if_nothing_failed_and_nothing_is_unknown() -> None:
    good = WriteReport(written=["a"], retries=3)
    good.raise_for_failures()
    assert good.ok and WriteReport().ok
    for bad in (WriteReport(written=["a"], failed=[lost("b")]), WriteReport(written=["a"], unknown=[lost("b")])):
        assert not bad.ok
        with pytest.raises(WriteError) as raised:
            bad.raise_for_failures()
        assert raised.value.report is bad


def test_a_report_shows_its_numbers_and_not_its_nodes() -> None:
    report = WriteReport(["a", "b", "c"], [lost("d")], [lost("e"), lost("f")], retries=4, elapsed_seconds=1.23456)
    assert repr(report) == "WriteReport(written=3, failed=1, unknown=2, retries=4, elapsed_seconds=1.235)"


def test_parts_are_merged_in_their_order() -> None:
    parts = [
        WriteReport(["a"], [lost("b")], [lost("c")], retries=1, elapsed_seconds=5.0),
        WriteReport(["d"], [lost("e")], [lost("f")], retries=2, elapsed_seconds=6.0),
    ]
    total = WriteReport.merged(iter(parts), 7.0)
    assert total.written == ["a", "d"]
    assert total.failed == [*parts[0].failed, *parts[1].failed]
    assert total.unknown == [*parts[0].unknown, *parts[1].unknown]
    assert (total.retries, total.elapsed_seconds) == (3, 7.0)
    assert parts[0].written == ["a"], "the parts are left alone"


def caused(cause: BaseException) -> BaseException:
    error = KeyError()
    error.__cause__ = cause
    return error


def hidden(context: BaseException) -> BaseException:
    error = KeyError()
    error.__context__ = context
    return error


def grouped(error: BaseException) -> BaseException:
    group: Any = KeyError()
    group.exceptions = (ValueError(), error, TypeError())  # as an ExceptionGroup, which Python 3.10 has none of
    return group  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "behind",
    [
        lambda error: error,
        caused,
        hidden,
        grouped,
        lambda error: hidden(caused(grouped(error))),
        lambda error: grouped(hidden(error)),
    ],
)
@pytest.mark.parametrize(("kind", "other"), [(WriteReport, IngestionReport), (IngestionReport, WriteReport)])
def test_a_report_is_found_behind_any_error(behind: Any, kind: Any, other: Any) -> None:
    carrier = KeyboardInterrupt()
    carrier.report = report = kind()  # type: ignore[attr-defined]
    error = behind(carrier)
    assert kind.of(error) is report
    carrier.__cause__ = error  # and round in a circle
    assert kind.of(error) is report
    assert other.of(error) is None
    carrier.report = SimpleNamespace(written=["a"])  # type: ignore[attr-defined]
    assert kind.of(error) is None, "the report of something else"


def test_a_write_error_names_the_first_ones_and_how_many_more() -> None:
    named = ValueError("node 'b' can't be stored: it has no embedding; set it")
    report = WriteReport(["a"], [lost("b", named), lost("c" * 100)], [lost("d"), lost("e"), lost("f")])
    assert str(WriteError(report)).splitlines() == [
        "5 of 6 nodes were not written (2 failed, 3 unknown):",
        "  node 'b' can't be stored: it has no embedding; set it",
        f"  node '{'c' * 80}': no room for {'c' * 100}",
        "  node 'd': no room for d",
        "  and 2 more",
        "All of them, with their errors, are in the .report of this error.",
    ]
    three = WriteReport([], [lost("b")], [lost("c"), lost("d")])
    assert "more" not in str(WriteError(three)) and "node 'd'" in str(WriteError(three))


def test_a_write_error_has_the_code_of_the_first_error_of_milvus() -> None:
    errors = [ValueError("bad"), MilvusException(code=8, message="slow down"), MilvusException(code=9, message="")]
    report = WriteReport(failed=[lost("a", errors[0])], unknown=[lost("b", errors[1]), lost("c", errors[2])])
    error = WriteError(report)
    assert (error.code, error.message) == (8, "3 nodes not written")
    assert WriteError(WriteReport(failed=report.failed)).code == 65535
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.code, str(again)) == (WriteError, 8, str(error))
    assert again.report.failed[0].node == report.failed[0].node
