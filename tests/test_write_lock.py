"""The right to write to a Milvus Lite: whoever stops waiting for it, however late, keeps it from nobody."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import threading
import uuid
from collections.abc import Callable, Iterator

import pytest

from llama_index_milvus_async_ext._milvus.errors import RpcFailure
from llama_index_milvus_async_ext._milvus.write_lock import WriteLock
from tests.waiting import until


@pytest.fixture
def lock() -> Iterator[WriteLock]:
    """A lock that no Milvus Lite has."""
    lock = WriteLock(f"unix:/nowhere/{uuid.uuid4().hex}")
    yield lock
    with contextlib.suppress(FileNotFoundError):
        os.unlink(lock.path)


@contextlib.contextmanager
def another_process(lock: WriteLock) -> Iterator[int]:
    """Hold the lock as another process does: a file that was opened anew is another owner to `flock`."""
    descriptor = os.open(lock.path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
    finally:
        os.close(descriptor)


def is_free(lock: WriteLock) -> bool:
    try:
        with another_process(lock):
            return True
    except BlockingIOError:
        return False


@pytest.fixture
def threads_that_wait() -> Callable[[], list[threading.Thread]]:
    """Those for a lock file, but for what other tests have left behind."""
    others = set(threading.enumerate())
    return lambda: [
        thread for thread in threading.enumerate() if thread.name == "milvus-lite-lock" and thread not in others
    ]


async def take_and_give_back(lock: WriteLock) -> None:
    release = await asyncio.wait_for(lock.acquire(timeout=5), 5)
    assert not is_free(lock)
    release()
    release()
    assert is_free(lock)


async def test_it_is_held_by_one_and_given_back_once(lock: WriteLock) -> None:
    await take_and_give_back(lock)
    await take_and_give_back(lock)


async def test_a_wait_that_is_cancelled_just_as_its_turn_comes_gives_the_turn_to_the_next(lock: WriteLock) -> None:
    release = await lock.acquire(timeout=5)
    second, third = (asyncio.create_task(lock.acquire(timeout=5)) for _ in range(2))
    await asyncio.sleep(0)
    release()
    second.cancel()  # its turn has come, and it does not know that yet
    (await asyncio.wait_for(third, 5))()
    assert second.cancelled() and is_free(lock)


async def test_a_wait_for_another_process_that_is_cancelled_gives_the_lock_back_when_it_comes(
    lock: WriteLock, threads_that_wait: Callable[[], list[threading.Thread]]
) -> None:
    with another_process(lock):
        waiting = asyncio.create_task(lock.acquire(timeout=30))
        await until(lambda: bool(threads_that_wait()))
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    await until(lambda: not threads_that_wait())
    assert is_free(lock)
    await take_and_give_back(lock)


async def test_a_wait_for_another_process_that_is_cancelled_just_as_the_lock_comes_gives_it_back(
    lock: WriteLock, threads_that_wait: Callable[[], list[threading.Thread]]
) -> None:
    with another_process(lock):
        waiting = asyncio.create_task(lock.acquire(timeout=30))
        await until(lambda: bool(threads_that_wait()))
    for thread in threads_that_wait():  # the loop stands still: it has the lock, and does not know that yet
        thread.join(10)
    assert not is_free(lock)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert is_free(lock)
    await take_and_give_back(lock)


async def test_who_waits_in_vain_says_so_and_the_next_one_takes_over_its_wait(
    lock: WriteLock, threads_that_wait: Callable[[], list[threading.Thread]]
) -> None:
    with another_process(lock):
        for _ in range(2):
            with pytest.raises(RpcFailure, match="held by another process") as failed:
                await lock.acquire(timeout=0.05)
            assert not failed.value.sent
        assert len(threads_that_wait()) == 1
        waiting = asyncio.create_task(lock.acquire(timeout=30))
        await asyncio.sleep(0)
    release = await asyncio.wait_for(waiting, 10)
    assert not is_free(lock)
    release()
    assert is_free(lock)
