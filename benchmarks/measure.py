"""Times of alternating sides, and the ratios between them."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

import psutil

T = TypeVar("T")

_QUIET_PERCENT = 15.0
_QUIET_INTERVAL_SECONDS = 0.25
_PATIENCE_SECONDS = 10.0


@dataclass(frozen=True)
class Timing:
    """Wall time and this process's CPU time of one piece of work."""

    seconds: float
    cpu_seconds: float


def settle() -> None:
    """Collect garbage, then wait, for ten seconds at the most, until this machine does next to nothing.

    A server on the same machine goes on with what was written (it consumes its log, builds indexes, drops collections)
    after it has answered; without the pause, one side would pay for the work of the side before it.

    What is there now is kept from the garbage collector: to walk through the corpus takes it a tenth of a second and
    more, for which all callers stand still, and it would hit the one or the other side by chance.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    give_up_at = time.monotonic() + _PATIENCE_SECONDS
    while psutil.cpu_percent(_QUIET_INTERVAL_SECONDS) > _QUIET_PERCENT and time.monotonic() < give_up_at:
        pass


async def timed(work: Callable[[], Awaitable[object]]) -> Timing:
    """Run the work, once all is settled: it pays for nothing that came before."""
    settle()
    cpu_before, before = time.process_time(), time.perf_counter()
    await work()
    return Timing(time.perf_counter() - before, time.process_time() - cpu_before)


Side = Callable[[], Awaitable[Timing]]


async def alternate(sides: Mapping[str, Callable[[], Awaitable[T]]], rounds: int) -> dict[str, list[T]]:
    """Time each side once per round, in an order of its own in each round.

    Drift of the machine (other load, heat, a growing server) then meets all sides alike, and so does what the side
    before leaves behind: in a fixed order each would always follow the same one. The orders are the same in each run.
    """
    shuffle = random.Random(0).shuffle
    timings: dict[str, list[T]] = {name: [] for name in sides}
    for _ in range(rounds):
        names = list(sides)
        shuffle(names)
        for name in names:
            timings[name].append(await sides[name]())
    return timings


def seconds(timings: Sequence[Timing]) -> list[float]:
    return [timing.seconds for timing in timings]


def cpu_seconds(timings: Sequence[Timing]) -> list[float]:
    return [timing.cpu_seconds for timing in timings]


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Round by round, so that both parts of a ratio were measured next to each other."""
    return [above / below for above, below in zip(numerators, denominators, strict=True)]


def fastest(timings: Mapping[str, list[Timing]]) -> str:
    """The side with the shortest median time."""
    return min(timings, key=lambda name: statistics.median(seconds(timings[name])))


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(math.ceil(share * len(ordered)) - 1, len(ordered) - 1)]


@dataclass(frozen=True)
class Figure:
    """One line of the table: a figure of each round, and the one that was to be reached.

    Attributes:
        workload: What ours did.
        against: What it is compared with.
        target: The figure to reach; None where there is none, and the line is for information.
        is_lower_better: Whether the target is an upper bound.
        unit: "x" for a ratio, "%" for one that is shown as a percentage, "MB", "/s".
        rounds: The figure of each round.
    """

    workload: str
    against: str
    target: float | None
    rounds: list[float]
    is_lower_better: bool = False
    unit: Literal["x", "%", "MB", "/s"] = "x"
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def is_reached(self) -> bool | None:
        if self.target is None:
            return None
        return self.median <= self.target if self.is_lower_better else self.median >= self.target

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "median": self.median,
            "lowest": min(self.rounds),
            "highest": max(self.rounds),
            "is_reached": self.is_reached,
        }


@dataclass
class Outcome:
    """What a workload measured: lines for the table, and series for the charts and `results.json`."""

    figures: list[Figure] = field(default_factory=list)
    series: dict[str, Any] = field(default_factory=dict)
