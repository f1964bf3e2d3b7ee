"""What became of every node of a write."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from llama_index.core.schema import BaseNode
from pymilvus.exceptions import MilvusException

R = TypeVar("R")

_EXAMPLES_IN_MESSAGE = 3
_UNEXPECTED = 65535  # Milvus's code for what has no other


@dataclass(frozen=True)
class FailedNode:
    """A node that was not written, or of which nobody knows.

    Attributes:
        node: The node as it was handed in.
        error: Why: a `ValueError` for a node that can't be stored, else the error that Milvus or the connection gave.
        attempts: How many requests carried the node; 0 for one that was refused before anything was sent.
        retryable: Whether writing the same node again may succeed. To try all of them again:
            `await store.awrite([f.node for f in report.failed if f.retryable])`.
    """

    node: BaseNode
    error: BaseException
    attempts: int
    retryable: bool


@dataclass(frozen=True)
class WriteReport:
    """The outcome of one write: each input node stands in exactly one of the three lists.

    Attributes:
        written: Ids that Milvus has acknowledged, in input order.
        failed: Nodes that are not stored by this write, in input order.
        unknown: Nodes whose request may or may not have landed (its answer was lost and no later attempt was
            acknowledged, or the write was cancelled), in input order. To write them again is safe with
            `upsert_mode=True`.
        retries: Requests that were sent again, after the first attempt, for any of these nodes.
        elapsed_seconds: Wall time of the write.
    """

    written: list[str] = field(default_factory=list)
    failed: list[FailedNode] = field(default_factory=list)
    unknown: list[FailedNode] = field(default_factory=list)
    retries: int = 0
    elapsed_seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether every node was written."""
        return not self.failed and not self.unknown

    @classmethod
    def of(cls, error: BaseException) -> WriteReport | None:
        """The report that an error carries, or one of the errors behind it; None if there is none.

            except TimeoutError as error:  # of asyncio.timeout around `awrite`
                report = WriteReport.of(error)

        Whatever ends a write early carries the report in its attribute `report`: a `CancelledError`, a
        `KeyboardInterrupt`, the error of a failed flush. But `asyncio.timeout`, `asyncio.wait_for`, `asyncio.run` at
        Ctrl-C, and on Python 3.10 whoever awaits a cancelled task, raise another error, behind which it stands.
        """
        return carried_by(error, cls)

    @classmethod
    def merged(cls, reports: Iterable[WriteReport], elapsed_seconds: float) -> WriteReport:
        """The report of a write that was made in several parts, given in input order."""
        total = cls(elapsed_seconds=elapsed_seconds)
        retries = 0
        for report in reports:
            total.written.extend(report.written)
            total.failed.extend(report.failed)
            total.unknown.extend(report.unknown)
            retries += report.retries
        return replace(total, retries=retries)

    def raise_for_failures(self) -> None:
        """Raise `WriteError` unless every node was written.

        Raises:
            WriteError: Some nodes failed or are unknown; the error carries this report.
        """
        if not self.ok:
            raise WriteError(self)

    def __repr__(self) -> str:
        return (
            f"WriteReport(written={len(self.written)}, failed={len(self.failed)}, unknown={len(self.unknown)}, "
            f"retries={self.retries}, elapsed_seconds={self.elapsed_seconds:.3f})"
        )


class WriteError(MilvusException):
    """Some nodes were not written; everything that could be written was written first.

    A `MilvusException`, as code written for the plain store expects of `add`.

    Attributes:
        report: The `WriteReport` of the write, with the nodes and their errors.
    """

    def __init__(self, report: WriteReport) -> None:
        errors = [failed.error for failed in (*report.failed, *report.unknown)]
        first = next((error for error in errors if isinstance(error, MilvusException)), None)
        super().__init__(code=_UNEXPECTED if first is None else first.code, message=f"{len(errors)} nodes not written")
        self.report = report

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.report,))

    def __str__(self) -> str:
        report = self.report
        lost = [*report.failed, *report.unknown]
        total = len(report.written) + len(lost)
        lines = [
            f"{len(lost)} of {total} nodes were not written "
            f"({len(report.failed)} failed, {len(report.unknown)} unknown):"
        ]
        for failed in lost[:_EXAMPLES_IN_MESSAGE]:
            name = f"node {failed.node.node_id[:80]!r}"
            message = str(failed.error)
            lines.append(f"  {message if message.startswith(name) else f'{name}: {message}'}")
        if len(lost) > _EXAMPLES_IN_MESSAGE:
            lines.append(f"  and {len(lost) - _EXAMPLES_IN_MESSAGE} more")
        lines.append("All of them, with their errors, are in the .report of this error.")
        return "\n".join(lines)


def carried_by(error: BaseException, kind: type[R]) -> R | None:
    """The report of a kind that an error carries, or one of the errors behind it; None if there is none."""
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        current = waiting.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        report = getattr(current, "report", None)
        if isinstance(report, kind):
            return report
        waiting += [*getattr(current, "exceptions", ()), current.__context__, current.__cause__]
    return None
