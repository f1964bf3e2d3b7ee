"""Waiting, in tests, for what another thread or process does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Return once `condition` holds; fails after `seconds`."""
    for _ in range(int(seconds / 0.01)):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"it did not happen in {seconds:g} seconds")


def blocked_until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """As `until`, for a thread."""
    for _ in range(int(seconds / 0.01)):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError(f"it did not happen in {seconds:g} seconds")
