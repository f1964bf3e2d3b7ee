"""One writer at a time to one Milvus Lite, over all processes of the machine."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import hashlib
import os
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Callable

from llama_index_milvus_async_ext._milvus.errors import RpcFailure

try:
    import fcntl
except ImportError:  # not on Windows, which has no fork either, nor a lock of this kind
    fcntl = None  # type: ignore[assignment]

_SHARED_FOLDER = "/tmp"  # the same for all processes, whatever their TMPDIR
_LOCK_NAME = "llama-index-milvus-lite-{}.lock"


class WriteLock:
    """The right to write to one Milvus Lite, over all processes of this machine.

        release = await WriteLock("127.0.0.1:19530").acquire(timeout=30)
        try:
            ...  # one write request
        finally:
            release()

    Milvus Lite appends the writes of several at once to its write-ahead log in pieces: what it acknowledged is lost
    when it is killed. It shows nothing of this while it runs.

    Args:
        address: Host and port. All names of this machine with one port are one address.
    """

    def __init__(self, address: str) -> None:
        self.path = lock_path(address)

    def __repr__(self) -> str:
        return f"WriteLock({self.path!r})"

    async def acquire(self, timeout: float) -> Callable[[], None]:
        """Take the lock, first within this process, then among processes; without contention no thread is made.

        Args:
            timeout: Seconds to wait for another process. Those who wait within this process wait for each other.

        Returns:
            What gives it back; to be called on the same event loop, more than once if need be.

        Raises:
            RpcFailure: Another process held it all the time, or the lock file can't be opened.
        """
        if fcntl is None:
            return lambda: None
        turn = _turns.setdefault(self.path, asyncio.Lock())
        await turn.acquire()
        try:
            descriptor = await self._locked(time.monotonic() + timeout)
        except BaseException:
            turn.release()
            raise
        held = [descriptor]

        def release() -> None:
            if held:
                _give_back(held.pop())
                turn.release()

        return release

    async def _locked(self, until: float) -> int:
        while True:
            waiter = _waiters.pop(self.path, None)  # of an earlier call that waited in vain
            if waiter is None:
                descriptor = _opened(self.path)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    waiter = _Waiter(self.path, descriptor)
                except BaseException:
                    _give_back(descriptor)
                    raise
            if waiter is not None:
                got = await waiter.descriptor(until)
                if got is None:
                    continue  # the earlier call's wait ended just before this one took it over
                descriptor = got
            if _is_file_at(descriptor, self.path):
                return descriptor
            _give_back(descriptor)  # somebody removed the file while it was waited for: others lock a new one


class _Waiter:
    """A thread that waits for a lock file, for whoever wants it when it comes; it is given back if nobody does."""

    def __init__(self, path: str, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self._taker: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None
        self._ended = False
        self._error: OSError | None = None
        self._switch = threading.Lock()
        threading.Thread(target=self._wait, name="milvus-lite-lock", daemon=True).start()

    def _wait(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        except OSError as error:  # such as ENOLCK: the system has no more locks
            self._error = error
        with self._switch:
            self._ended = True
            if self._taker is not None:
                loop, answer = self._taker
                with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits
                    loop.call_soon_threadsafe(_settle, answer)
                    return
            _give_back(self._descriptor)

    async def descriptor(self, until: float) -> int | None:
        """The locked file; None if the wait had ended before."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[None] = loop.create_future()
        with self._switch:
            if self._ended:
                return None
            self._taker = (loop, answer)
        try:
            # Not `wait_for`, which may lose a lock that comes as the caller is cancelled.
            await asyncio.wait([answer], timeout=max(until - time.monotonic(), 0))
        except BaseException:
            self._leave()
            raise
        if self._leave(unless=answer):
            raise RpcFailure("UNAVAILABLE", f"{self._path} is held by another process", sent=False)
        if self._error is not None:
            _give_back(self._descriptor)
            raise RpcFailure("UNAVAILABLE", f"{self._path} can't be locked: {self._error}", sent=False)
        return self._descriptor

    def _leave(self, unless: asyncio.Future[None] | None = None) -> bool:
        """Want the lock no more; whether it had not come."""
        with self._switch:
            if not self._ended:
                self._taker = None
                _waiters[self._path] = self  # the next call need not make a thread
                return True
            if unless is None:
                _give_back(self._descriptor)
            return False


def _settle(answer: asyncio.Future[None]) -> None:
    if not answer.done():
        answer.set_result(None)


_turns: dict[str, asyncio.Lock] = {}
_waiters: dict[str, _Waiter] = {}
# The lock files that are open here, held or waited for. A fork comes before or after each change of this set, never in
# the midst of one; re-entrant, as a signal handler may fork.
_descriptors: set[int] = set()
_made: set[str] = set()  # the lock files that this process made
_forks = threading.RLock()


def _opened(path: str) -> int:
    """Open a lock file, making it if need be.

    Made exclusively, and opened without O_CREAT: in a folder that all may write to, Linux refuses O_CREAT for
    another user's file. To lock it, reading is enough; so nobody needs the right to write to it.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    with _forks:
        try:
            try:
                descriptor = os.open(path, flags)
            except FileNotFoundError:
                try:
                    descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644)
                    os.fchmod(descriptor, 0o644)  # whatever the umask
                    _made.add(path)
                except FileExistsError:  # another process was quicker
                    descriptor = os.open(path, flags)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                os.close(descriptor)
                raise OSError("not a regular file")
        except OSError as error:
            raise RpcFailure("UNAVAILABLE", f"the lock file {path} can't be opened: {error}", sent=False) from error
        _descriptors.add(descriptor)
        return descriptor


def _give_back(descriptor: int) -> None:
    with _forks:
        if descriptor in _descriptors:  # not in a child, which closed what it inherited
            _descriptors.discard(descriptor)
            with contextlib.suppress(OSError):
                # Closing alone would not do: a child that was forked meanwhile may have a copy for a moment.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


@atexit.register
def _remove_made() -> None:
    """Leave no lock files behind. Each `.db` that a process opens has a port, and so a lock file, of its own.

    One that is held is left to others. Whoever waits for one that is removed finds that out by `_is_file_at`.
    """
    for path in _made:
        with contextlib.suppress(RpcFailure, OSError):
            descriptor = _opened(path)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_file_at(descriptor, path):
                os.unlink(path)


def _is_file_at(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except OSError:
        return False


def lock_path(address: str) -> str:
    """The lock file of an address, in a folder that is the same for all users and processes of the machine."""
    folder = _SHARED_FOLDER
    if not (os.name == "posix" and os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)):
        folder = tempfile.gettempdir()
    if address.startswith("unix:"):
        key = "unix:" + os.path.realpath(address.removeprefix("unix:"))
    else:
        host, _, port = address.rpartition(":")
        hosts = _ip_addresses(host.strip("[]"))
        if any(map(_is_of_this_machine, hosts)):
            return os.path.join(folder, _LOCK_NAME.format(port))
        key = f"{min(hosts)}:{port}"
    return os.path.join(folder, _LOCK_NAME.format(hashlib.sha256(key.encode()).hexdigest()[:16]))


def _ip_addresses(host: str) -> list[str]:
    try:
        return [str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_DGRAM)] or [host]
    except (OSError, UnicodeError):
        return [host]


def _is_of_this_machine(ip: str) -> bool:
    """Whether an address is one of this machine's own: only those can be bound to."""
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((ip, 0))
            return True
    except OSError:
        return ip == "::1" or ip.startswith("127.")  # also where the machine has no such interface


def _forget_inherited() -> None:
    """In a forked child: hold no lock of the parent's."""
    global _forks
    _forks = threading.RLock()
    for descriptor in _descriptors:
        # The parent keeps the lock; without this, so would the child, if the parent were killed.
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _descriptors.clear()
    _turns.clear()
    _waiters.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=lambda: _forks.acquire(),
        after_in_parent=lambda: _forks.release(),
        after_in_child=_forget_inherited,
    )
