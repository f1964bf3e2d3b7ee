"""When to try a request again."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import tenacity
from pydantic.json_schema import SkipJsonSchema
from tenacity import RetryCallState

# The pause after an overload, as a part of `max_backoff_seconds`: the limit has slowed the lane down already. A
# rejection costs the server little, and a quota is given out by the second: a long pause would leave some of it unused.
_OVERLOAD_PAUSE_SHARE = 0.1


@dataclass(frozen=True)
class RetryPolicy:
    """How often, how fast and for how long a failed request is sent again.

        RetryPolicy()                                    # suits a server that restarts now and then
        RetryPolicy(max_attempts=1)                      # never repeats a request
        RetryPolicy(stop=tenacity.stop_after_delay(60), wait=tenacity.wait_fixed(1))

    The pause before attempt n is drawn at random between 0 and
    `min(max_backoff_seconds, initial_backoff_seconds * 2**(n - 1))`, so that many clients don't come back together.
    After a rejection for overload it is drawn between 0 and a tenth of `max_backoff_seconds`, while the limit on
    requests in flight takes the pressure off.

    Attributes:
        max_attempts: Requests sent for one batch at the most, the first included. A rejection for overload (rate
            limit) does not count, as the server did not execute it: only the deadline ends those. The default leaves
            it to the deadline: with pauses of up to five seconds, fifty attempts take about two minutes.
        initial_backoff_seconds: Upper bound of the first pause.
        max_backoff_seconds: Upper bound of any pause.
        deadline_seconds: How long a call keeps trying while the endpoint acknowledges nothing; once a request of it has
            failed, nothing of its kind (writes, searches, other calls). Waiting time is included; a last attempt may
            outlive the deadline by 0.1 seconds. A long write that moves on never meets it. The default outlasts a
            restart of a Milvus standalone server, measured at 26 to 31 seconds until its collections are served again.
        stop: One of tenacity's `stop` objects, in place of `max_attempts`. It is asked after each failed request, an
            overload too, and sees its number, the error, and the seconds since the first one. The deadline holds all
            the same.
        wait: One of tenacity's `wait` objects, in place of the random pauses.
    """

    max_attempts: int = 50
    initial_backoff_seconds: float = 0.1
    max_backoff_seconds: float = 5.0
    deadline_seconds: float = 120.0
    # No JSON says what a function does: a store's schema leaves them out.
    stop: SkipJsonSchema[Callable[[RetryCallState], bool] | None] = None
    wait: SkipJsonSchema[Callable[[RetryCallState], float] | None] = None

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts must be at least 1, got {self.max_attempts}")
        if not 0 <= self.initial_backoff_seconds <= self.max_backoff_seconds < math.inf:
            raise ValueError(
                "0 <= initial_backoff_seconds <= max_backoff_seconds is needed, "
                f"got {self.initial_backoff_seconds} and {self.max_backoff_seconds}"
            )
        if not 0 < self.deadline_seconds < math.inf:
            raise ValueError(f"deadline_seconds must be positive and finite, got {self.deadline_seconds}")
        for name, given in (("stop", self.stop), ("wait", self.wait)):
            if given is not None and not callable(given):
                raise TypeError(f"{name} must be one of tenacity's {name} objects, got {type(given).__name__}")

    def next_pause(self, attempts: Attempts) -> float | None:
        """Seconds to wait before the next attempt; None if there is to be none."""
        overloaded = attempts.verdict is Verdict.OVERLOAD
        counted, made = attempts.state(max(attempts.counted, 1)), attempts.state(attempts.made)
        if self.stop is not None:
            if self.stop(made):
                return None
        elif not overloaded and tenacity.stop_after_attempt(self.max_attempts)(counted):
            return None
        if self.wait is not None:
            pause = float(self.wait(made))
            if math.isnan(pause):
                raise ValueError(f"{self.wait!r} returned NaN")
            return max(pause, 0.0)
        if overloaded:
            return float(tenacity.wait_random(0, self.max_backoff_seconds * _OVERLOAD_PAUSE_SHARE)(counted))
        wait = tenacity.wait_random_exponential(multiplier=self.initial_backoff_seconds, max=self.max_backoff_seconds)
        return float(wait(counted))


class Verdict(enum.Enum):
    """What an error says about the request that met it."""

    BAD_DATA = "some item of the batch can't be accepted: find it"
    TOO_LARGE = "the request or its answer is over a size limit: split it"
    PERMANENT = "no item of the batch will ever be accepted"
    TRANSIENT = "not executed, worth another try"
    OVERLOAD = "rejected unexecuted because there is too much: slow down, then try again"
    FULL = "not executed, and no use to try again before somebody makes room"
    AMBIGUOUS = "it may or may not have been executed"
    UNEXPECTED = "it may have been executed, and to try again would meet the same defect"

    @property
    def is_repeated(self) -> bool:
        """Whether the request is sent again without anybody's doing."""
        return self in _REPEATED

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed later."""
        return self in _REPEATED or self is Verdict.FULL

    @property
    def is_about_items(self) -> bool:
        """Whether a part of the request may succeed where the whole did not."""
        return self is Verdict.BAD_DATA or self is Verdict.TOO_LARGE

    @property
    def may_have_been_executed(self) -> bool:
        """Whether the server may have done what was asked."""
        return self is Verdict.AMBIGUOUS or self is Verdict.UNEXPECTED


_REPEATED = frozenset({Verdict.TRANSIENT, Verdict.OVERLOAD, Verdict.AMBIGUOUS})


class Attempts(NamedTuple):
    """The attempts at one request so far.

    Attributes:
        counted: Those that were not rejected for overload.
        made: All of them.
        first_at: When the first one was sent.
        now: When the last one ended.
        idle_seconds: Pauses between them.
        error: How the last one ended.
        verdict: What that means.
    """

    counted: int
    made: int
    first_at: float
    now: float
    idle_seconds: float
    error: BaseException
    verdict: Verdict

    def state(self, number: int) -> RetryCallState:
        """What tenacity's `stop` and `wait` look at, made from times that came in, not from a clock."""
        state = RetryCallState(tenacity.Retrying(), None, (), {})
        state.attempt_number = number
        state.start_time = self.first_at
        state.idle_for = self.idle_seconds
        state.outcome = tenacity.Future.construct(number, self.error, True)
        state.outcome_timestamp = self.now
        return state
