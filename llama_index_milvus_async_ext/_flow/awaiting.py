"""Awaiting code that is not ours."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable
from typing import TypeVar

from llama_index_milvus_async_ext._flow.foreign import as_error

T = TypeVar("T")


async def awaited(awaitable: Awaitable[T], whose: str) -> T:
    """Await what is not ours, and may find something of its own cancelled: a task of a client's, a pool shut down.

    The `CancelledError` of that looks like a cancellation of whoever awaits, and would end all that goes on around it
    without a word. (On Python 3.10 it does: nobody can tell the two apart there.)

    Raises:
        RuntimeError: It raised a `CancelledError`, though nobody has cancelled this task.
    """
    try:
        return await awaitable
    except asyncio.CancelledError as error:
        if _may_be_cancelled():
            raise
        raise as_error(error, f"{whose}, which nobody had cancelled,") from error


def _may_be_cancelled() -> bool:
    """Whether a `CancelledError` in this task may be one of the task's own, and not of something that it awaited."""
    if sys.version_info < (3, 11):
        return True
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
