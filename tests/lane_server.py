"""The far end of a lane, in memory, which fails by script."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llama_index_milvus_async_ext._lane.entrance import Entrance
from llama_index_milvus_async_ext._lane.lanes import Lane
from llama_index_milvus_async_ext.retry import RetryPolicy, Verdict


class FaultError(Exception):
    def __init__(self, verdict: Verdict, executed: bool = False) -> None:
        super().__init__(verdict.value)
        self.verdict = verdict
        self.executed = executed


def classify(error: BaseException) -> Verdict:
    return error.verdict if isinstance(error, FaultError) else Verdict.UNEXPECTED


def applied_unanswered() -> FaultError:
    return FaultError(Verdict.AMBIGUOUS, executed=True)


def lost() -> FaultError:
    return FaultError(Verdict.AMBIGUOUS)


def overload() -> FaultError:
    return FaultError(Verdict.OVERLOAD)


def not_ready() -> FaultError:
    return FaultError(Verdict.TRANSIENT)


def denied() -> FaultError:
    return FaultError(Verdict.PERMANENT)


@dataclass(frozen=True)
class Item:
    name: int
    key: Any = None
    bad: bool = False
    unprepared: bool = False
    nbytes: int = 1


_broken: list[str] = []


def raise_broken_promises() -> None:
    """Fail if a lane has sent to any `Server` what it must not, since the last time that this was asked.

    An assertion in `Server.send` would be one more failed request to the lane, and the test might pass.
    """
    broken = _broken.copy()
    _broken.clear()
    assert not broken, broken


@dataclass
class Server:
    """The far end of a lane, in memory: applies rows as Milvus does, and fails by script.

    It stands for no Milvus: the lane knows nothing of Milvus, and this checks what the lane promises; see
    `raise_broken_promises`.
    """

    script: list[Callable[[], FaultError] | None] = field(default_factory=list)
    seconds: float = 1.0
    rows: list[Item] = field(default_factory=list)
    batches: list[list[Item]] = field(default_factory=list)
    in_flight: int = 0
    peak: int = 0
    keys_in_flight: set[Any] = field(default_factory=set)
    broken: list[str] = field(default_factory=list)

    def _note(self, broken: str) -> None:
        self.broken.append(broken)
        _broken.append(broken)

    async def send(self, items: list[Item], upsert: bool, timeout: float) -> list[str]:
        self.batches.append(list(items))
        keys = [item.key for item in items if item.key is not None]
        if len(set(keys)) < len(keys):
            self._note(f"two items of one key in one request: {keys}")
        if self.keys_in_flight.intersection(keys):
            self._note(f"two requests with one key at a time: {keys}, beside {self.keys_in_flight}")
        self.keys_in_flight.update(keys)
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        try:
            make_fault = self.script.pop(0) if self.script else None
            fault = make_fault() if make_fault is not None else None
            await asyncio.sleep(min(self.seconds, timeout))
            executed = fault is None or fault.executed
            if executed and any(item.bad for item in items):
                raise FaultError(Verdict.BAD_DATA)
            if executed:
                for item in items:
                    if upsert:
                        self.rows = [row for row in self.rows if row.key != item.key or item.key is None]
                    self.rows.append(item)
            if fault is not None:
                raise fault
            return [f"result of {item.name}" for item in items]
        finally:
            self.in_flight -= 1
            self.keys_in_flight.difference_update(keys)


def prepare(item: Item) -> tuple[Item, int]:
    if item.unprepared:
        raise ValueError(f"item {item.name} can't be prepared")
    return item, item.nbytes


def make_lane(server: Server, **changes: Any) -> Lane[Item, str]:
    arguments: dict[str, Any] = {
        "kind": "items",
        "prepare": prepare,
        "send": server.send,
        "entrance": Entrance(10_000),
        "policy": RetryPolicy(),
        "max_items": 8,
        "max_bytes": 1_000,
        "max_in_flight": 4,
        "ceiling": 4,
        "rpc_timeout_seconds": 30.0,
    }
    return Lane(**(arguments | changes))


def items(count: int, start: int = 0) -> list[Item]:
    return [Item(name) for name in range(start, start + count)]
