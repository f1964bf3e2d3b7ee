"""Waiting for what comes from another thread."""

from __future__ import annotations

import contextlib
import queue
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")

# A signal that comes just before the system begins to wait does not end the wait, and Python's handler for Ctrl-C runs
# only after it: without a bound, when all is done. (On Windows no signal ever ends such a wait.)
_HEARS_SECONDS = 0.5


def take(arrivals: queue.SimpleQueue[T]) -> T:
    """The next item, however long that takes; Ctrl-C is heard meanwhile."""
    while True:
        with contextlib.suppress(queue.Empty):
            return arrivals.get(timeout=_HEARS_SECONDS)


def settled(outcome: Future[T]) -> T:
    """The result, however long that takes, or its error; Ctrl-C is heard meanwhile."""
    while not outcome.done():
        wait([outcome], _HEARS_SECONDS)
    return outcome.result()
