"""Starting threads."""

from __future__ import annotations

import sys
import threading


def start(thread: threading.Thread) -> None:
    """Start a thread.

    Raises:
        RuntimeError: The system has no more threads, or the interpreter is exiting: before Python 3.12, the start of a
            thread would then never return.
    """
    if sys.is_finalizing():
        raise RuntimeError("can't start new thread at interpreter shutdown")
    thread.start()
