"""Starting threads."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable


def start(thread: threading.Thread) -> None:
    """Start a thread.

    Raises:
        RuntimeError: The system has no more threads, or the interpreter is exiting: before Python 3.12, the start of a
            thread would then never return.
    """
    if sys.is_finalizing():
        raise RuntimeError("can't start new thread at interpreter shutdown")
    thread.start()


def is_started(name: str, work: Callable[[], object]) -> bool:
    """Have a daemon thread of this name do some work; False if none can be started, for now or any more."""
    try:
        start(threading.Thread(target=work, name=name, daemon=True))
    except RuntimeError:
        return False
    return True
