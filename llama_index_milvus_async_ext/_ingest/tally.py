"""What has become of the documents of a run so far."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Iterator
from typing import Any

from llama_index_milvus_async_ext._flow.stages import Stopwatch
from llama_index_milvus_async_ext.ingestion_report import FailedDocument, IngestionReport
from llama_index_milvus_async_ext.report import WriteReport


class Tally:
    """Counts of a run, and its progress bar.

    Args:
        bar: A tqdm bar of documents.
        max_failures: How many documents may fail before the run gives up; None for any number.
    """

    def __init__(self, bar: Any, max_failures: int | None) -> None:
        self.added = self.replaced = self.unchanged = self.deleted = 0
        self.nodes = self.texts_embedded = self.retries = 0
        self.failed: list[FailedDocument] = []
        self.stopwatch = Stopwatch()
        self._bar = bar
        self._max_failures = max_failures
        self._started = time.perf_counter()

    @classmethod
    @contextlib.contextmanager
    def shown(cls, show_progress: bool, documents: object, max_failures: int | None) -> Iterator[Tally]:
        """A tally whose progress bar is shown, if it is to be; what interrupts the run carries the report so far."""
        total = None
        if show_progress:
            with contextlib.suppress(Exception):  # not every stream that has a length knows it
                total = len(documents)  # type: ignore[arg-type]
        # `tqdm.auto` only where a bar is shown: its import alone warns in a notebook that has no ipywidgets.
        bars = importlib.import_module("tqdm.auto" if show_progress else "tqdm").tqdm
        with bars(total=total, desc="Ingesting into Milvus", unit="document", disable=not show_progress) as bar:
            tally = cls(bar, max_failures)
            try:
                yield tally
            except BaseException as interruption:
                interruption.report = tally.report()  # type: ignore[attr-defined]
                raise

    @property
    def gave_up(self) -> bool:
        """Whether more documents have failed than may."""
        return self._max_failures is not None and len(self.failed) > self._max_failures

    def giving_up(self) -> RuntimeError:
        """Why a document that was read is not ingested: it came when the run had given up."""
        return RuntimeError(f"given up, as more than {self._max_failures} documents had failed (max_failures)")

    @property
    def elapsed_seconds(self) -> float:
        """Wall time so far."""
        return time.perf_counter() - self._started

    def fail(
        self, document_id: str | None, stage: str, error: BaseException, report: WriteReport | None = None
    ) -> None:
        """Count a document that failed."""
        self.failed.append(FailedDocument(document_id, stage, error, report))
        self.advance(1 if document_id is not None else 0)

    def count(self, outcome: str, documents: int) -> None:
        """Count documents that were "added", "replaced" or "unchanged"."""
        setattr(self, outcome, getattr(self, outcome) + documents)

    def count_texts(self, texts: int) -> None:
        """Count texts that a model has taken."""
        self.texts_embedded += texts

    def advance(self, documents: int) -> None:
        """Move the bar on."""
        if self._bar.disable:
            return
        rate = self.nodes / max(self.elapsed_seconds, 1e-9)
        self._bar.set_postfix(
            {"nodes": self.nodes, "nodes/s": round(rate), "failed": len(self.failed), "retries": self.retries},
            refresh=False,
        )
        self._bar.update(documents)

    def report(self) -> IngestionReport:
        """The report so far."""
        return IngestionReport(
            added=self.added,
            replaced=self.replaced,
            unchanged=self.unchanged,
            deleted=self.deleted,
            failed=list(self.failed),
            nodes=self.nodes,
            texts_embedded=self.texts_embedded,
            retries=self.retries,
            stage_seconds=dict(self.stopwatch.seconds),
            elapsed_seconds=self.elapsed_seconds,
        )
