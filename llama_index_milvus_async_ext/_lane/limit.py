"""The adaptive limit on requests in flight to one Milvus endpoint."""

from __future__ import annotations

_DECREASE = 0.7
_MINIMUM = 1.0


class Limit:
    """How many requests may be out now: fewer after an overload, more again while there is none.

    It does not count what is out: whoever asks does, and so no count can go astray. Each overload cuts the limit to
    seven tenths, once for all the requests that were out together; each success while the limit is in use adds a part
    of a slot, one slot in all for every limit's worth of requests (additive increase, multiplicative decrease, as in
    TCP). Pure: the time comes in as an argument.
    """

    def __init__(self, maximum: int = 1) -> None:
        self._maximum = maximum
        self._current = float(maximum)
        self._reduced_at = -1.0
        self.progress_at = -1.0  # when the endpoint last acknowledged anything
        self._progress: dict[str, float] = {}

    @property
    def current(self) -> int:
        """Requests that may be in flight now."""
        return max(int(self._current), 1)

    def free(self, in_flight: int, ceiling: int) -> int:
        """Slots that somebody with this ceiling could take now."""
        return max(min(self.current, ceiling) - in_flight, 0)

    def allow(self, maximum: int) -> None:
        """Let the limit grow to `maximum`, for a caller that asks for more than those before it."""
        self._current = max(self._current, float(self.once_allowed(maximum)))
        self._maximum = max(self._maximum, maximum)

    def once_allowed(self, maximum: int) -> int:
        """What the limit would be after `allow`."""
        return maximum if maximum > self._maximum and self._current >= self._maximum else self.current

    def progress_of(self, kind: str) -> float:
        """When the endpoint last acknowledged a request of a kind; before all time, if it has not.

        Of a kind, because a server that denies writes, for its disk is full, may go on answering searches for days.
        """
        return self._progress.get(kind, -1.0)

    def succeeded(self, kind: str, in_flight: int, now: float) -> None:
        """Note that the endpoint acknowledged one of `in_flight` requests."""
        self.progress_at = self._progress[kind] = now
        if in_flight >= self.current:
            self._current = min(self._current + 1 / self._current, self._maximum)

    def overloaded(self, sent_at: float, now: float) -> None:
        """Note that a request sent at `sent_at` was too much."""
        if sent_at > self._reduced_at:
            self._reduced_at = now
            self._current = max(_MINIMUM, self._current * _DECREASE)
