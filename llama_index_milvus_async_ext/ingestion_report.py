"""What became of every document of an ingestion."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field, replace
from typing import Any

from llama_index_milvus_async_ext.report import WriteReport, carried_by

_EXAMPLES_IN_MESSAGE = 3


@dataclass(frozen=True)
class FailedDocument:
    """A document that is not in the collection in the version that the stream held; an earlier one still is.

    Attributes:
        document_id: Its id; None where the stream itself failed, or held something that is no document.
        stage: Where: "read", "look-up", "transform", "embed", "write", "delete" or "docstore".
        error: Why.
        report: What became of its nodes, if they came to be written; those that were have been deleted again.
    """

    document_id: str | None
    stage: str
    error: BaseException
    report: WriteReport | None = None


@dataclass(frozen=True)
class IngestionReport:
    """The outcome of one run of `aingest`: each document that was read is counted once, or stands in `failed`.

    Attributes:
        added: Documents that are new in the collection.
        replaced: Documents of which the collection held another version, or a part.
        unchanged: Documents that were there already, whole and in this version (and those without any text to store).
        deleted: Documents that the stream no longer holds, with `delete_missing`.
        failed: Documents that are not there in this version; running again completes them.
        nodes: Nodes written.
        texts_embedded: Texts that the embedding models were given, and took.
        retries: Write requests that were sent again.
        stage_seconds: How long each stage was at work; they are at work at the same time.
        elapsed_seconds: Wall time of the run.
    """

    added: int = 0
    replaced: int = 0
    unchanged: int = 0
    deleted: int = 0
    failed: list[FailedDocument] = field(default_factory=list)
    nodes: int = 0
    texts_embedded: int = 0
    retries: int = 0
    stage_seconds: dict[str, float] = field(default_factory=dict)
    elapsed_seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether nothing failed: the collection holds exactly what the stream held."""
        return not self.failed

    @property
    def documents(self) -> int:
        """How many documents the run has dealt with, those that failed included."""
        return self.added + self.replaced + self.unchanged + sum(each.document_id is not None for each in self.failed)

    @classmethod
    def of(cls, error: BaseException) -> IngestionReport | None:
        """The report that an error carries, or one of the errors behind it; None if there is none.

            except TimeoutError as error:  # of asyncio.timeout around `aingest`
                report = IngestionReport.of(error)

        Whatever ends an ingestion early carries the report so far in its attribute `report`, but `asyncio.timeout` and
        others raise another error, behind which it stands: see `WriteReport.of`.
        """
        return carried_by(error, cls)

    def raise_for_failures(self) -> None:
        """Raise `IngestionError` if anything failed.

        Raises:
            IngestionError: Some documents failed; the error carries this report.
        """
        if not self.ok:
            raise IngestionError(self) from self.failed[0].error

    def __repr__(self) -> str:
        return (
            f"IngestionReport(added={self.added}, replaced={self.replaced}, unchanged={self.unchanged}, "
            f"deleted={self.deleted}, failed={len(self.failed)}, nodes={self.nodes}, "
            f"texts_embedded={self.texts_embedded}, retries={self.retries}, "
            f"elapsed_seconds={self.elapsed_seconds:.3f})"
        )


class IngestionError(RuntimeError):
    """Some documents could not be ingested; everything else was done first. To run again completes them.

    Attributes:
        report: The `IngestionReport` of the run.
    """

    def __init__(self, report: IngestionReport) -> None:
        super().__init__(f"{len(report.failed)} documents not ingested")
        self.report = report

    def __reduce__(self) -> tuple[Any, ...]:
        failed = [replace(each, error=that_pickles(each.error)) for each in self.report.failed]
        return (type(self), (replace(self.report, failed=failed),))

    def __str__(self) -> str:
        failed = self.report.failed
        lines = [f"{len(failed)} of {self.report.documents} documents were not ingested:"]
        for each in failed[:_EXAMPLES_IN_MESSAGE]:
            which = "the stream" if each.document_id is None else f"document {each.document_id[:80]!r}"
            lines.append(f"  {which}, {each.stage}: {type(each.error).__name__}: {str(each.error)[:500]}")
        if len(failed) > _EXAMPLES_IN_MESSAGE:
            lines.append(f"  and {len(failed) - _EXAMPLES_IN_MESSAGE} more")
        lines.append("All of them are in the .report of this error. What they held before is still there.")
        return "\n".join(lines)


def that_pickles(error: BaseException) -> BaseException:
    """The error, or one that says the same where it would not survive its pickling: those of some services don't."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
