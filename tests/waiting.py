"""Waiting, in tests, for what another thread or process does."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence


async def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Return once `condition` holds; fails after `seconds`."""
    for _ in range(int(seconds / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"it did not happen in {seconds:g} seconds")


def blocked_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """As `until`, for a thread."""
    for _ in range(int(seconds / 0.01)):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError(f"it did not happen in {seconds:g} seconds")


def run_at_once(threads: Sequence[threading.Thread], switch_seconds: float) -> None:
    """Run threads to their ends, while Python changes from one to the next so often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(switch_seconds)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)


def press_ctrl_c() -> None:
    """Ctrl-C in the main thread."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


@contextlib.contextmanager
def beside(press: Callable[[], object]) -> Iterator[None]:
    """Have another thread press Ctrl-C by and by; leaving waits for it."""
    thread = threading.Thread(target=press)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
    thread.start()
    try:
        yield
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
