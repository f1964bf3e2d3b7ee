"""The lock by which the processes of a machine take turns to write to one Milvus Lite; another holds it here."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_index_milvus_async_ext import AsyncMilvusVectorStore, RetryPolicy
from llama_index_milvus_async_ext._milvus import write_lock
from llama_index_milvus_async_ext._milvus.errors import RpcFailure
from llama_index_milvus_async_ext._milvus.write_lock import WriteLock
from tests.conftest import MakeNodes
from tests.fault_proxy import FaultProxy
from tests.servers import free_ports
from tests.waiting import until

fcntl = pytest.importorskip("fcntl", reason="Windows has no such locks")

DIM = 8


class Other:
    """Another process: to the system, a lock file that is opened twice is as good as one that two processes open."""

    def __init__(self, path: str) -> None:
        Path(path).touch()
        self._descriptor = os.open(path, os.O_RDONLY)

    def take(self) -> bool:
        """Whether the lock was free, and is held now."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def give_back(self) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def close(self) -> None:
        os.close(self._descriptor)


@pytest.fixture
def address() -> str:
    """One where no Milvus Lite is."""
    return f"127.0.0.1:{free_ports(1)[0]}"


@pytest.fixture
def lock(address: str) -> Iterator[WriteLock]:
    lock, before = WriteLock(address), set(write_lock._descriptors)
    yield lock
    assert write_lock._descriptors <= before, "no file was left open"
    Path(lock.path).unlink(missing_ok=True)


@pytest.fixture
def other(lock: WriteLock) -> Iterator[Other]:
    """Holds the lock."""
    with contextlib.closing(Other(lock.path)) as other:
        assert other.take()
        yield other


_left_behind: set[threading.Thread] = set()


@pytest.fixture(autouse=True)
def left_behind_by_other_tests() -> None:
    _left_behind.clear()
    _left_behind.update(threading.enumerate())


def waiting_threads() -> list[threading.Thread]:
    """Those that wait for a lock's file, of this test's."""
    return [
        thread for thread in threading.enumerate() if thread.name == "milvus-lite-lock" and thread not in _left_behind
    ]


async def waits_for(lock: WriteLock, timeout: float = 30.0) -> asyncio.Task[Callable[[], None]]:
    """Somebody who waits for the lock by now."""
    acquiring = asyncio.create_task(lock.acquire(timeout))
    await until(lambda: bool(waiting_threads()))
    assert not acquiring.done()
    return acquiring


async def given_up(acquiring: asyncio.Task[Any]) -> None:
    acquiring.cancel()
    await asyncio.wait([acquiring])
    assert acquiring.cancelled()


async def is_free(other: Other) -> None:
    """Return once the lock is to be had, with nobody left who waits for it; leaves it so."""
    await until(other.take)
    other.give_back()
    await until(lambda: not waiting_threads())


async def test_it_is_held_until_it_is_released_however_often_that_is_said(lock: WriteLock) -> None:
    with contextlib.closing(Other(lock.path)) as other:
        release = await lock.acquire(timeout=1)
        assert not other.take()
        release()
        await is_free(other)
        again = await lock.acquire(timeout=1)
        release()
        assert not other.take(), "the second release was of the first one's"
        again()
        await is_free(other)


async def test_another_user_may_open_its_file_whatever_the_umask_of_who_made_it(lock: WriteLock) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(lock.path)
    before = os.umask(0o077)
    try:
        release = await lock.acquire(timeout=1)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(lock.path).st_mode) == 0o644
    release()


async def test_within_the_process_one_at_a_time_has_it(lock: WriteLock, address: str) -> None:
    release = await lock.acquire(timeout=1)
    waiting = [asyncio.create_task(WriteLock(address).acquire(timeout=5)) for _ in range(3)]
    for number in range(3):
        await asyncio.sleep(0)
        assert sum(task.done() for task in waiting) == number
        release()
        await until(lambda: sum(task.done() for task in waiting) == number + 1)  # noqa: B023
        release = waiting[number].result()
    release()
    with contextlib.closing(Other(lock.path)) as other:
        await is_free(other)


async def test_one_that_comes_after_its_waiter_was_cancelled_is_given_back(lock: WriteLock, other: Other) -> None:
    await given_up(await waits_for(lock))
    other.give_back()
    await is_free(other)
    (await lock.acquire(timeout=5))()


async def test_one_that_comes_just_as_its_waiter_is_cancelled_is_given_back(lock: WriteLock, other: Other) -> None:
    acquiring = await waits_for(lock)
    other.give_back()
    for thread in waiting_threads():
        thread.join(5)  # it has come; this loop, which stands still, has not heard of it yet
    acquiring.cancel()
    await asyncio.wait([acquiring])
    assert acquiring.cancelled()
    await is_free(other)
    (await lock.acquire(timeout=5))()


async def test_one_that_comes_after_its_waiter_ran_out_of_time_is_given_back(lock: WriteLock, other: Other) -> None:
    with pytest.raises(RpcFailure, match="held by another process") as failed:
        await lock.acquire(timeout=0.05)
    assert failed.value.status == "UNAVAILABLE" and not failed.value.sent
    other.give_back()
    await is_free(other)
    (await lock.acquire(timeout=5))()


async def test_who_waits_next_takes_the_place_of_one_that_gave_up(lock: WriteLock, other: Other) -> None:
    await given_up(await waits_for(lock))
    for _ in range(3):
        with pytest.raises(RpcFailure):
            await lock.acquire(timeout=0.01)
    assert len(waiting_threads()) == 1, "no thread for each"
    acquiring = await waits_for(lock)
    other.give_back()
    release = await acquiring
    assert not other.take()
    release()
    await is_free(other)


async def test_who_gives_up_as_its_turn_comes_gives_the_turn_to_the_next(lock: WriteLock) -> None:
    release = await lock.acquire(timeout=1)
    second, third = (asyncio.create_task(lock.acquire(timeout=5)) for _ in range(2))
    await asyncio.sleep(0)
    release()
    second.cancel()  # its turn has come, and it does not know that yet
    (await asyncio.wait_for(third, 5))()
    assert second.cancelled()


async def test_who_gives_up_behind_others_of_the_process_takes_nothing(lock: WriteLock) -> None:
    release = await lock.acquire(timeout=1)
    waiting = asyncio.create_task(lock.acquire(timeout=30))
    await asyncio.sleep(0)
    await given_up(waiting)
    release()
    (await lock.acquire(timeout=5))()
    with contextlib.closing(Other(lock.path)) as other:
        await is_free(other)


def test_one_that_comes_after_its_waiters_loop_was_closed_is_given_back(lock: WriteLock, other: Other) -> None:
    loop = asyncio.new_event_loop()
    acquiring = loop.run_until_complete(waits_for(lock))
    acquiring._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
    other.give_back()
    asyncio.run(is_free(other))
    write_lock._turns.pop(lock.path)  # of the closed loop's; the package's own loop ends with the process


async def test_one_whose_file_was_removed_meanwhile_is_taken_anew(lock: WriteLock, other: Other) -> None:
    acquiring = await waits_for(lock)
    os.unlink(lock.path)
    other.give_back()
    release = await acquiring
    with contextlib.closing(Other(lock.path)) as later:
        assert not later.take(), "it is the lock of the file that is there now"
        release()
        await is_free(later)


@pytest.mark.parametrize("call", ["write", "delete", "clear"])
async def test_a_call_that_changes_a_collection_waits_for_the_other_process(
    proxy: FaultProxy, collection_name: str, make_nodes: MakeNodes, call: str
) -> None:
    policy = RetryPolicy(max_attempts=100, initial_backoff_seconds=0.01, max_backoff_seconds=0.01, deadline_seconds=60)
    bounds: dict[str, Any] = {"retry": policy, "rpc_timeout_seconds": 5.0}
    async with AsyncMilvusVectorStore(proxy.uri, collection_name=collection_name, dim=DIM, **bounds) as store:
        await store.async_add(make_nodes(2, dim=DIM))
        calls: dict[str, Callable[[], Any]] = {
            "write": lambda: store.async_add(make_nodes(3, dim=DIM)),
            "delete": lambda: store.adelete("nobody's"),
            "clear": store.aclear,
        }
        with contextlib.closing(Other(WriteLock(proxy.address).path)) as other:
            assert other.take()
            proxy.clear()
            calling = asyncio.create_task(calls[call]())
            await until(lambda: bool(waiting_threads()))
            assert not proxy.requests and store.statistics().in_flight == 1
            began = time.monotonic()
            await asyncio.sleep(0.5)
            waited = time.monotonic() - began
            other.give_back()
            await calling
            timeout = proxy.requests[0].timeout or 0.0
            assert timeout < store.rpc_timeout_seconds - waited / 2, "what was waited for is part of the attempt"
            await is_free(other)
