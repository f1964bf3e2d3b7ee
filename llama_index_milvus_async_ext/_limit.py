"""The adaptive limit on requests in flight to one Milvus endpoint."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

_DECREASE = 0.7
_MINIMUM = 1.0


class Limit:
    """A count of slots that shrinks when the endpoint is overloaded and grows back while it is not.

        if limit.try_acquire(grant=send_next, ceiling=8):
            ...  # one request
            limit.release()

    A caller that can't have one at once is granted one later. All calls come from one event loop. Slots are handed
    out in the order of asking. Each overload cuts the limit to seven tenths, at most once for all the requests that
    were out together; each success while the limit is in use adds a part of a slot, one slot in all for every limit's
    worth of requests (additive increase, multiplicative decrease, as in TCP).
    """

    def __init__(self, maximum: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self._maximum = maximum
        self._current = float(maximum)
        self._clock = clock
        self._waiters: deque[tuple[Callable[[], object], int]] = deque()
        self._reduced_at = -1.0
        self.in_flight = 0
        self.progress_at = -1.0  # when the endpoint last acknowledged anything

    @property
    def current(self) -> int:
        """Requests that may be in flight now."""
        return max(int(self._current), 1)

    def free(self, ceiling: int) -> int:
        """Slots that a caller with this ceiling could take now."""
        return max(min(self.current, ceiling) - self.in_flight, 0)

    def allow(self, maximum: int) -> None:
        """Let the limit grow to `maximum`, for a caller that asks for more than those before it."""
        if maximum > self._maximum:
            if self._current >= self._maximum:
                self._current = float(maximum)
            self._maximum = maximum
            self._serve()

    def try_acquire(self, grant: Callable[[], object], ceiling: int) -> bool:
        """Take a slot, or queue for one.

        Args:
            grant: Called, from the loop, once a slot has been taken for a caller that was told to wait.
            ceiling: The caller's own bound on requests in flight to the endpoint.

        Returns:
            True if a slot was taken; False if `grant` will be called when it is.
        """
        if self._waiters or not self.free(ceiling):
            self._waiters.append((grant, ceiling))
            return False
        self._take()
        return True

    async def acquire(self, ceiling: int) -> None:
        """Wait for a slot ahead of all others: for a request that already had one and is sent again."""
        if self.free(ceiling):
            self._take()
            return
        turn = asyncio.get_running_loop().create_future()
        waiter = (lambda: turn.set_result(None), ceiling)
        self._waiters.appendleft(waiter)
        try:
            await turn
        except asyncio.CancelledError:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
            else:
                self.release()
            raise

    def release(self) -> None:
        """Give a slot back."""
        self.in_flight -= 1
        self._serve()

    def succeeded(self) -> None:
        """Note that the endpoint acknowledged a request."""
        self.progress_at = self._clock()
        if self._current < self._maximum and self.in_flight >= self.current:
            self._current = min(self._current + 1 / self._current, self._maximum)
            self._serve()

    def overloaded(self, sent_at: float) -> None:
        """Note that a request sent at `sent_at` was too much."""
        if sent_at > self._reduced_at:
            self._reduced_at = self._clock()
            self._current = max(_MINIMUM, self._current * _DECREASE)

    def _take(self) -> None:
        self.in_flight += 1

    def _serve(self) -> None:
        # Strictly in order, also past differing ceilings: nobody starves behind a greedier neighbour.
        while self._waiters and self.free(self._waiters[0][1]):
            grant, _ = self._waiters.popleft()
            self._take()
            grant()
