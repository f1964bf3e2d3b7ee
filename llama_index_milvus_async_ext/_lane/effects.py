"""What the core asks its shell to do."""

from __future__ import annotations

from typing import Any, NamedTuple

from llama_index_milvus_async_ext._lane.items import Submission
from llama_index_milvus_async_ext._lane.lanes import Flight


class Send(NamedTuple):
    """A request to be sent now; its end is to be told to `Core.ended`."""

    flight: Flight[Any]
    payloads: list[Any]
    upsert: bool
    timeout_seconds: float


class Retry(NamedTuple):
    """A failed request that will be sent again."""

    error: BaseException
    attempt: int
    pause_seconds: float


class Effects(NamedTuple):
    """All that is to be done: requests to send, callers to answer, requests to abort, retries to tell of."""

    sends: list[Send]
    settled: list[Submission[Any]]
    aborts: list[Flight[Any]]
    retries: list[Retry]
