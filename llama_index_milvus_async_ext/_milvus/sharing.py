"""What stores of one process share: an endpoint, if they are connected alike; a limit and an order, at one address."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from llama_index_milvus_async_ext._lane.entrance import Entrance
from llama_index_milvus_async_ext._lane.shell import Shell

E = TypeVar("E")


class Address:
    """What all endpoints of one address share.

    Attributes:
        shell: Runs their requests, within one limit.
        users: How many they are.
        creating: Held while one makes a collection, where two at once would be in each other's way.
    """

    def __init__(self, shell: Shell) -> None:
        self.shell = shell
        self.users = 0
        self.creating = threading.Lock()
        self._entrances: dict[tuple[str, str], Entrance] = {}

    def entrance(self, db_name: str, collection: str, capacity: int, tells_repeats: bool) -> Entrance:
        """Where all rows for a collection enter, and so the one order of equal ids."""
        entrance = self._entrances.setdefault((db_name, collection), Entrance(capacity, tells_repeats))
        entrance.capacity = max(entrance.capacity, capacity)
        entrance.tells_repeats |= tells_repeats
        return entrance


class Sharing(Generic[E]):
    """The endpoints that are open, by their settings, and the addresses that they go to.

    The lock is held for moments only: while one connects, or closes, others are served. It is re-entrant, as a store
    may be collected at any point of the code that holds it.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._open: dict[Any, Future[E | None]] = {}
        self._users: dict[Any, int] = {}
        self._addresses: dict[str, Address] = {}

    @property
    def everything(self) -> tuple[Any, ...]:
        """All that is shared now."""
        return self._open, self._addresses

    def join(self, settings: Any, connect: Callable[[], E]) -> E:
        """The endpoint for these settings; each `join` asks for one `leave`.

        Args:
            settings: What tells endpoints apart.
            connect: Makes one; called if there is none. Those who come meanwhile wait for it, and meet its error.
        """
        while True:
            with self._lock:
                opening = self._open.get(settings)
                is_mine = opening is None
                if opening is None:
                    opening = self._open[settings] = Future()
            if is_mine:
                try:
                    opening.set_result(connect())
                except BaseException as error:
                    with self._lock:
                        del self._open[settings]
                    if isinstance(error, Exception):
                        opening.set_exception(error)
                    else:  # Ctrl-C is this thread's own: the others try themselves
                        opening.set_result(None)
                    raise
            endpoint = opening.result()
            with self._lock:
                if endpoint is not None and self._open.get(settings) is opening:
                    self._users[settings] = self._users.get(settings, 0) + 1
                    return endpoint
            # It has been closed meanwhile, or its opening was interrupted: open it anew.

    def leave(self, settings: Any, close: Callable[[], object]) -> None:
        """Give up one use of an endpoint; the last one closes it, and who wants to join meanwhile waits for that."""
        closing: Future[E | None] = Future()
        with self._lock:
            self._users[settings] -= 1
            if self._users[settings]:
                return
            del self._users[settings]
            self._open[settings] = closing
        try:
            close()
        finally:
            with self._lock:
                del self._open[settings]
            closing.set_result(None)

    def join_address(self, address: str, make_shell: Callable[[], Shell]) -> Address:
        """What endpoints of this address share; each asks for one `leave_address`."""
        with self._lock:
            shared = self._addresses.get(address)
            if shared is None:
                shared = self._addresses[address] = Address(make_shell())
            shared.users += 1
            return shared

    def leave_address(self, address: str) -> None:
        """Give it up; with the last user it is forgotten."""
        with self._lock:
            shared = self._addresses[address]
            shared.users -= 1
            if not shared.users:
                del self._addresses[address]
