"""What stores of one process share is connected once, closed once, and never handed out while it is closed."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import pytest

from llama_index_milvus_async_ext._milvus.sharing import Sharing

Shared = Sharing[str]


@pytest.fixture
def sharing() -> Shared:
    return Sharing()


def is_empty(sharing: Shared) -> bool:
    return not any(sharing.everything) and not sharing._users


def test_only_the_last_one_closes(sharing: Shared) -> None:
    closed: list[str] = []
    assert [sharing.join("settings", lambda: "one") for _ in range(3)] == ["one"] * 3, "connected once"
    assert sharing.join("others", lambda: "two") == "two"
    for _ in range(2):
        sharing.leave("settings", lambda: closed.append("one"))
        assert closed == []
    sharing.leave("settings", lambda: closed.append("one"))
    assert closed == ["one"]
    assert sharing.join("settings", lambda: "anew") == "anew"
    for settings in ("settings", "others"):
        sharing.leave(settings, lambda: None)
    assert is_empty(sharing)


def test_an_address_is_forgotten_with_its_last_user(sharing: Shared) -> None:
    shell: Any = object
    first, second = sharing.join_address("here", shell), sharing.join_address("here", shell)
    assert first is second
    assert sharing.join_address("there", shell) is not first
    sharing.leave_address("here")
    assert sharing.join_address("here", shell) is first
    for address in ("here", "here", "there"):
        sharing.leave_address(address)
    assert is_empty(sharing)


def test_one_that_failed_to_close_is_forgotten_all_the_same(sharing: Shared) -> None:
    def fail() -> None:
        raise OSError("it can't be closed")

    sharing.join("settings", lambda: "one")
    with pytest.raises(OSError, match="can't be closed"):
        sharing.leave("settings", fail)
    assert is_empty(sharing)
    assert sharing.join("settings", lambda: "anew") == "anew"


class Settings:
    """Tells when somebody has looked for the endpoint of these settings: he has what he finds there by then."""

    def __init__(self) -> None:
        self.looked_up = threading.Semaphore(0)

    def __hash__(self) -> int:
        self.looked_up.release()
        return 0


@pytest.fixture
def join_too(sharing: Shared) -> Iterator[Callable[..., list[Future[str]]]]:
    """Has others join on threads of their own; when it returns they have found what is there."""

    def join_too(count: int, settings: Settings, connect: Callable[[], str]) -> list[Future[str]]:
        settings.looked_up = threading.Semaphore(0)
        others = [threads.submit(sharing.join, settings, connect) for _ in range(count)]
        assert all(settings.looked_up.acquire(timeout=5) for _ in others)
        assert not wait(others, timeout=0.05).done, "they wait"
        return others

    with ThreadPoolExecutor() as threads:
        yield join_too


def test_who_comes_while_one_is_closed_waits_and_gets_a_new_one(sharing: Shared, join_too: Any) -> None:
    settings, is_closed = Settings(), threading.Event()
    others: list[Future[str]] = []

    def anew() -> str:
        assert is_closed.is_set(), "not before the other one has let go"
        return "anew"

    def close() -> None:
        others.extend(join_too(2, settings, anew))
        is_closed.set()

    sharing.join(settings, lambda: "one")
    sharing.leave(settings, close)
    assert [other.result(5) for other in others] == ["anew"] * 2
    sharing.leave(settings, lambda: None)
    assert not is_empty(sharing)
    sharing.leave(settings, lambda: None)
    assert is_empty(sharing)


@pytest.mark.parametrize("error", [None, ConnectionError("refused")], ids=repr)
def test_who_comes_while_one_is_opened_shares_its_outcome(
    sharing: Shared, join_too: Any, error: Exception | None
) -> None:
    settings = Settings()
    others: list[Future[str]] = []

    def connect() -> str:
        others.extend(join_too(3, settings, lambda: "of another"))
        if error is not None:
            raise error
        return "mine"

    if error is None:
        assert sharing.join(settings, connect) == "mine"
        assert [other.result(5) for other in others] == ["mine"] * 3
        for _ in range(4):
            assert not is_empty(sharing)
            sharing.leave(settings, lambda: None)
    else:
        with pytest.raises(ConnectionError):
            sharing.join(settings, connect)
        assert [other.exception(5) for other in others] == [error] * 3
    assert is_empty(sharing)
    assert sharing.join(settings, lambda: "anew") == "anew"


def test_who_comes_while_one_is_opened_does_not_share_its_ctrl_c(sharing: Shared, join_too: Any) -> None:
    settings = Settings()
    others: list[Future[str]] = []

    def connect() -> str:
        others.extend(join_too(3, settings, lambda: "of another"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sharing.join(settings, connect)
    assert [other.result(5) for other in others] == ["of another"] * 3
    for _ in others:
        assert not is_empty(sharing)
        sharing.leave(settings, lambda: None)
    assert is_empty(sharing)


def test_who_waited_for_one_that_is_closed_by_then_gets_a_new_one(sharing: Shared, join_too: Any) -> None:
    settings = Settings()
    others: list[Future[str]] = []

    def connect() -> str:
        others.extend(join_too(2, settings, lambda: "anew"))
        sys.setswitchinterval(10)  # the others do not run before it is closed
        return "mine"

    switch_interval = sys.getswitchinterval()
    try:
        assert sharing.join(settings, connect) == "mine"
        sharing.leave(settings, lambda: None)
    finally:
        sys.setswitchinterval(switch_interval)
    assert [other.result(5) for other in others] == ["anew"] * 2
    for _ in others:
        sharing.leave(settings, lambda: None)
    assert is_empty(sharing)


async def test_hundreds_that_come_and_go_leave_nothing_and_meet_no_closed_one(sharing: Shared) -> None:
    live: set[object] = set()

    def connect() -> Any:
        live.add(endpoint := object())
        assert len(live) == 1
        return endpoint

    def use() -> None:
        for _ in range(100):
            endpoint = sharing.join("settings", connect)
            assert endpoint in live, "it is open"
            sharing.leave("settings", lambda: live.discard(endpoint))  # noqa: B023

    await asyncio.gather(*(asyncio.to_thread(use) for _ in range(6)))
    assert not live and is_empty(sharing)
