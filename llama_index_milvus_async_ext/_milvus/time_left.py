"""How much is left of a time-out, for what takes more than one request."""

from __future__ import annotations

import time

LEAST_SECONDS = 0.05  # for a request after a long wait for the right to write, or after a slow one before it


class TimeLeft:
    """What is left of a time-out that begins now.

        left = TimeLeft(timeout)
        await first(timeout=left())
        await second(timeout=left())

    Args:
        seconds: The time-out of all requests together.
    """

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds

    def __call__(self) -> float:
        """Seconds for the next request, a few hundredths at the least."""
        return max(self._until - time.monotonic(), LEAST_SECONDS)
