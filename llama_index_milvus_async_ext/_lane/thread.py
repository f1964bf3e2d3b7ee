"""The process's one I/O thread, whose event loop runs all shells."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

from llama_index_milvus_async_ext._lane.shell import Shell

_JOIN_SECONDS = 2.0
_TURN_SECONDS = 0.004  # of work for callers, before answers are looked at again


class IoThread:
    """One event loop in one daemon thread.

    Callers reach it through a `port`; what they have it do is called in the order in which it was posted.
    """

    _instance: IoThread | None = None
    _lock = threading.Lock()

    @classmethod
    def get(cls) -> IoThread:
        """The thread of this process, started on first use; a forked child has its own."""
        if cls._instance is None:
            with cls._lock:
                if cls._instance is None:
                    cls._instance = cls()
        return cls._instance

    @classmethod
    def running(cls) -> IoThread | None:
        """The thread of this process, if it has been started."""
        return cls._instance

    @classmethod
    def forget(cls) -> None:
        """Start anew, in a forked child, where the thread is not."""
        cls._instance, cls._lock = None, threading.Lock()

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.ended = False
        self.shells: weakref.WeakSet[Shell] = weakref.WeakSet()
        self.serves_in_process = False  # whether a Milvus Lite file is open
        self.ports: weakref.WeakSet[_Port] = weakref.WeakSet()  # of event loops
        self.blocked: set[threading.Thread] = set()  # threads that Python waits for, and that wait for this one
        self._pid = os.getpid()
        self._inbox: deque[Callable[[], object]] = deque()
        self._woken = False
        self._busy_callers = 0
        # Of its own: else what a caller has in its context, such as the tags of its events, would go on here.
        self._context = contextvars.Context()
        self._thread = threading.Thread(target=self._run, name="milvus-io", daemon=True)
        self._thread.start()
        # An in-process Milvus Lite serves requests with a thread pool, which Python shuts down before it calls atexit
        # functions; what is sent afterwards makes gRPC print a traceback. There is no public way to be earlier.
        getattr(threading, "_register_atexit", atexit.register)(self._end_before_thread_pools)
        atexit.register(self.end)

    @property
    def is_current(self) -> bool:
        """Whether the caller is the I/O thread itself."""
        return threading.get_ident() == self._thread.ident

    def check(self) -> None:
        """Raise `RuntimeError` once the interpreter exits."""
        if self.ended:
            raise RuntimeError("nothing can be sent to Milvus any more: the interpreter is exiting")

    def post(self, *functions: Callable[[], object]) -> None:
        """Have functions called in the thread, in this order."""
        # First the functions, then the look at the flag; the thread does the reverse. So nothing is left behind.
        self._inbox.extend(functions)
        if not self._woken:
            try:
                self._woken = True
                self.loop.call_soon_threadsafe(self._empty_inbox, context=self._context)
            except RuntimeError:  # closed at the interpreter's exit
                pass
            except BaseException:  # Ctrl-C: were the flag left up, nobody would wake the thread ever again
                self._woken = False
                raise

    # --- sharing Python's lock

    def takes_turns(self) -> bool:
        """Whether a caller has work of its own for Python, so that long work in the thread should make pauses."""
        return self._busy_callers > 0

    @contextlib.contextmanager
    def taking_turns(self) -> Iterator[None]:
        """For a caller that works on, embedding for instance, while the thread writes for it."""
        with self._lock:
            self._busy_callers += 1
        try:
            yield
        finally:
            with self._lock:
                self._busy_callers -= 1

    # --- in the thread

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            while not self._has_run():
                pass
        finally:
            with contextlib.suppress(Exception):
                self.loop.close()

    def _has_run(self) -> bool:
        """Run the loop; whether it was stopped, and not ended by what ends threads: a `SystemExit` of somebody's."""
        try:
            self.loop.run_forever()
        except BaseException as error:  # everybody's calls would wait for ever
            self._tell(error)
            return False
        return True

    def _tell(self, error: BaseException) -> None:
        with contextlib.suppress(BaseException):  # of the handlers of logs
            self.loop.call_exception_handler({"message": "a call in the I/O thread failed", "exception": error})

    def _empty_inbox(self) -> None:
        until = time.monotonic() + _TURN_SECONDS
        while True:
            # The flag stays up meanwhile: were it down, each of the next posts would have this called once more in the
            # turn that follows, which would then last many times as long.
            while self._inbox:
                try:
                    self._inbox.popleft()()
                except BaseException as error:  # one caller's defect does not stop the others' requests
                    self._tell(error)
                if self._inbox and time.monotonic() > until:
                    self.loop.call_soon(self._empty_inbox)
                    return
            self._woken = False
            if not self._inbox:
                return
            self._woken = True  # posted just before the flag was down

    # --- the end

    def _end_before_thread_pools(self) -> None:
        """End early if a Milvus Lite is served here and no thread that Python will wait for needs it."""
        needed = self.blocked or any(port.keeps_interpreter for port in list(self.ports))
        if self.serves_in_process and not needed:
            self.end()

    def end(self) -> None:
        """Stop, for the interpreter's exit; who calls later gets an error."""
        if self.ended or self._pid != os.getpid() or not self._thread.is_alive():
            return
        self.ended = True

        async def wind_up() -> None:
            for shell in list(self.shells):
                shell.end()
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            if others and self.serves_in_process:
                # What has been sent may not have reached the server yet, whose threads are about to end.
                await asyncio.wait(others, timeout=_JOIN_SECONDS / 2)
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            self.loop.stop()

        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(lambda: self.loop.create_task(wind_up()))
            self._thread.join(_JOIN_SECONDS)


class _Port(Protocol):
    @property
    def keeps_interpreter(self) -> bool: ...


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=IoThread.forget)
