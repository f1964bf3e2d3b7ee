"""What Milvus Lite needs that a Milvus server does not: its files, and what a forked child inherits of them."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
import threading
import weakref
from typing import Any

from pymilvus import AsyncMilvusClient, MilvusClient, connections
from pymilvus.client.connection_manager import ConnectionManager

from llama_index_milvus_async_ext._milvus.write_lock import lock_path

try:
    import fcntl
except ImportError:  # not on Windows, where Milvus Lite does not lock its folder either
    fcntl = None  # type: ignore[assignment]

IN_USE = "another process holds it"
_SQLITE = b"SQLite format 3\0"
_COPY_OVER = (
    "it was written by Milvus Lite 2, which kept a database in one file, and Milvus Lite 3 makes a folder. To copy its "
    "rows, read them in an environment with `pip install 'milvus-lite<3' 'pymilvus<2.6' 'setuptools<80'` "
    "(`MilvusClient(path).query_iterator(collection, output_fields=['*'])`), and `client.upsert` them here into the "
    "collection of a store with another path; or give another path and index the documents again"
)

# Held while a file is opened or let go of, so that nobody opens what is just being closed.
files = threading.RLock()

_is_forked = False


def real_path(uri: str) -> str:
    """The path by which a Milvus Lite file is opened: one for all its names."""
    path = os.path.realpath(uri)
    for known in _servers():
        if os.path.realpath(known) == path:
            return known
    # pymilvus knows a file by its ending, which the target of a link may lack.
    return path if path.endswith(".db") else os.path.abspath(uri)


def belongs_to_store(client: Any) -> None:
    """Have a client of pymilvus's, which a store made for itself, not count as a user of the file it is open on."""
    _of_stores.add(client)


def release(path: str) -> None:
    """Have the file let go of, if this process serves it and nobody here uses it any more: others may then open it.

    Clients of pymilvus, and stores of upstream's, count as users as long as they are not closed or collected; one
    that was made by `belongs_to_store` does not. May take seconds: Milvus Lite writes out what it holds in memory.
    """
    entry = _servers().get(path)
    if entry is None or isinstance(entry[0], _Inherited):
        return
    address = f"127.0.0.1:{entry[2]}"
    _served_before.add(path)
    if not _is_in_use(address):
        _server_manager().release_server(path)
        with contextlib.suppress(OSError):  # somebody else's, or gone
            os.unlink(lock_path(address))


def was_served_here(path: str) -> bool:
    """Whether this process has served a file before, and so may just be letting go of it."""
    return path in _served_before or path in _servers()


_served_before: set[str] = set()
_of_stores: weakref.WeakSet[Any] = weakref.WeakSet()


def _server_manager() -> Any:
    """Milvus Lite's own; None where it was not imported, and so serves nothing."""
    return getattr(sys.modules.get("milvus_lite.server_manager"), "server_manager_instance", None)


def _servers() -> dict[str, tuple[Any, Any, int]]:
    """Milvus Lite's servers in this process by path: (gRPC server, database, port)."""
    servers: dict[str, tuple[Any, Any, int]] = getattr(_server_manager(), "_servers", {})
    return servers


def _is_in_use(address: str) -> bool:
    """Whether a client of pymilvus's in this process is open on an address."""
    handlers = list(connections._alias_handlers.values())
    if any(getattr(handler, "server_address", None) == address for handler in handlers):
        return True
    # pymilvus keeps no list of its clients: an AsyncMilvusClient, for one, only connects with its first call.
    kinds = (MilvusClient, AsyncMilvusClient)
    for client in _all_objects():
        if issubclass(type(client), kinds) and client not in _of_stores:
            is_open = not getattr(client, "_closed", False) if isinstance(client, AsyncMilvusClient) else False
            is_open = is_open or getattr(client, "_handler", None) is not None
            if is_open and getattr(getattr(client, "_config", None), "address", None) == address:
                return True
    return False


def _all_objects() -> list[Any]:
    """What the garbage collector knows, also what a service has told it to leave alone.

    That is not put back: to freeze again would freeze all that has come since, too, and keep it for ever.
    """
    gc.unfreeze()
    return gc.get_objects()


def explain_unopened(path: str) -> str | None:
    """Why a Milvus Lite file can't be opened, and what to do; None if no reason shows."""
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        return "its folder does not exist"
    try:
        if os.path.isfile(path):
            with open(path, "rb") as file:
                is_lite_2 = file.read(len(_SQLITE)) == _SQLITE
            return _COPY_OVER if is_lite_2 else "it is a file, and no database of Milvus Lite's"
        if not os.path.isdir(path):
            return None if os.access(folder, os.W_OK) else "its folder can't be written to"
        with open(os.path.join(path, "LOCK"), "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return (
            f"{IN_USE}, as Milvus Lite serves a file to one; close it there, or start "
            "`milvus-lite server` on the folder and give all processes its http:// address"
        )
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"it can't be read: {error.strerror}"
    except AttributeError:  # no fcntl, and so no way to ask
        return None
    return None if os.access(path, os.W_OK) else "it can't be written to"


# --- forks


class _Inherited:
    """In a forked child, in the place of the parent's server and database."""

    def stop(self, grace: float | None = None) -> None:
        """Nothing: the server is not in this process."""

    def close(self) -> None:
        """Nothing: the parent writes to the files."""


def is_forked() -> bool:
    """Whether this process was forked from one that had this package imported."""
    return _is_forked


def never_collect(inherited: Any) -> None:
    """Keep an object of the parent's from ever being torn down, not even at the interpreter's exit.

    In a forked child gRPC's threads are missing, and an object of its that is collected waits for them, or crashes.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))


def _forget_inherited() -> None:
    global _is_forked, files
    _is_forked = True
    # Another thread may have held these at the fork, for as long as a connection takes.
    files = threading.RLock()
    pymilvus_manager = getattr(ConnectionManager, "_instance", None)
    if pymilvus_manager is not None:
        pymilvus_manager._lock = threading.RLock()
        ConnectionManager._instance_lock = threading.Lock()
    servers = _servers()
    for path, (server, db, port) in list(servers.items()):
        never_collect(server)
        never_collect(db)
        _let_go_of_files(db)
        # Clients in the child go on to reach the parent's server, and the child's exit does not stop it.
        servers[path] = (_Inherited(), _Inherited(), port)
    manager = _server_manager() if servers else None
    if manager is not None:
        manager._lock = threading.Lock()  # another thread may have held it at the fork


def _let_go_of_files(db: Any) -> None:
    """Point the inherited descriptors of an open database elsewhere: its lock, and its write-ahead logs.

    With its lock, the child would keep the file locked when the parent has been killed. In a log's buffer there may
    be half of a write, which the child would write once more when it exits. The descriptors stay open, as objects that
    the child inherited may close them.
    """
    with contextlib.suppress(OSError):
        nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        for descriptor in _descriptors_of(db):
            os.dup2(nowhere, descriptor, inheritable=False)
        os.close(nowhere)


def _descriptors_of(db: Any) -> list[int]:
    found = [getattr(db, "_lock_fd", None)]
    for collection in getattr(db, "_collections", {}).values():
        log = getattr(collection, "_wal", None)
        sinks: list[Any] = [getattr(log, "_data_sink", None), getattr(log, "_delta_sink", None)]
        for sink in sinks:
            with contextlib.suppress(AttributeError, ValueError):  # none yet, or closed
                found.append(sink.fileno())
    return [descriptor for descriptor in found if isinstance(descriptor, int)]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_inherited)
