"""Requests of one call, from its thread to the I/O thread and back."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

from llama_index_milvus_async_ext._lane.entrance import WINDOW
from llama_index_milvus_async_ext._lane.items import Submission
from llama_index_milvus_async_ext._lane.lanes import Lane
from llama_index_milvus_async_ext._lane.shell import Shell


class Request(NamedTuple):
    """Values for a lane.

    Attributes:
        shell: The endpoint's.
        lane: The lane, or what finds it in the I/O thread.
        values: The values.
        keys: One key per value, or None if no two are ever related.
        kind: What it does, for traces.
        watched: Whether the submission is to learn what became of its batches: see its `trips`.
    """

    shell: Shell
    lane: Lane[Any, Any] | Callable[[], Lane[Any, Any]]
    values: Sequence[Any]
    keys: Sequence[Hashable] | None = None
    kind: str = "call"
    watched: bool = False


class Journey:
    """Requests on their way, from `start` until each has its outcomes; both happen in the I/O thread.

    Args:
        requests: The requests.
        arrived: Called once, in the I/O thread, when all outcomes are there.
    """

    __slots__ = ("_arrived", "_is_cancelled", "_missing", "_own_keys", "_requests", "error", "submissions")

    def __init__(self, requests: Sequence[Request], arrived: Callable[[], object]) -> None:
        self._requests = requests
        self._arrived = arrived
        self._missing = len(requests)
        self._is_cancelled = False
        # Of many keys, the set is made here, on the caller's thread: the I/O thread has others to serve.
        self._own_keys: list[frozenset[Hashable] | None] = [
            frozenset(request.keys) if request.keys is not None and len(request.keys) > WINDOW else None
            for request in requests
        ]
        self.submissions: list[Submission[Any]] = []
        self.error: Exception | None = None

    def start(self) -> None:
        """Submit them, unless they have been cancelled; in the I/O thread."""
        if self._is_cancelled:
            return
        try:
            for (shell, lane, values, keys, _, watched), own_keys in zip(self._requests, self._own_keys, strict=True):
                found = lane if isinstance(lane, Lane) else lane()
                submission = shell.submit(found, values, keys, own_keys, self._done)
                if watched:  # before any of it is sent: that is done in the next turn of the loop
                    submission.trips = []
                self.submissions.append(submission)
        except Exception as error:
            self.error = error
            self._missing -= len(self._requests) - len(self.submissions)
            self.cancel()
            if not self.submissions:
                self._arrive()

    def cancel(self) -> None:
        """Give up on them; in the I/O thread, also before they are submitted."""
        if not (self._is_cancelled or self.submissions or self.error):
            self._arrive()
        self._is_cancelled = True
        for request, submission in zip(self._requests, self.submissions, strict=False):
            request.shell.cancel(submission)

    def _done(self, _: Submission[Any]) -> None:
        self._missing -= 1
        if not self._missing:
            self._arrive()

    def _arrive(self) -> None:
        # Whoever is told holds the journey: were it held in turn, each call, with its answer, would be left to the
        # garbage collector, whose pauses all callers feel.
        arrived, self._arrived, self._requests, self._own_keys = self._arrived, _nobody, (), []
        arrived()


def _nobody() -> None:
    """In the place of whoever has been told."""
