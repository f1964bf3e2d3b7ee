"""The process's one I/O thread, and the way there and back for callers on any loop or thread."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import os
import threading
import weakref
from asyncio import CancelledError
from collections import deque
from collections.abc import Callable, Coroutine, Hashable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

from llama_index_milvus_async_ext._lane import Lane, Submission

T = TypeVar("T")

_JOIN_SECONDS = 2.0


class IoThread:
    """One event loop in one daemon thread, which runs all lanes.

        submission = await IoThread.get().submit(lane, nodes)      # from any event loop
        report = IoThread.get().run(coroutine)                # from any thread, also inside a running loop

    What one turn of a caller's loop submits crosses over together, in one wake-up of the thread, and so do the
    outcomes on their way back: a thousand concurrent calls cost two wake-ups, not two thousand.
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
    def forget(cls) -> None:
        """Start anew, in a forked child, where the thread is not."""
        cls._instance, cls._lock = None, threading.Lock()

    def __init__(self) -> None:
        self._pid = os.getpid()
        self.loop = asyncio.new_event_loop()
        self._inbox: deque[Callable[[], object]] = deque()
        self._woken = False
        self._ports: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Port] = weakref.WeakKeyDictionary()
        self._recent_port: _Port | None = None
        self._blocked: set[threading.Thread] = set()  # threads that Python waits for, and that wait for this one
        self._ended = False
        self._busy_callers = 0
        self.serves_in_process = False  # whether a Milvus Lite file is open
        self._thread = threading.Thread(target=self._run, name="milvus-io", daemon=True)
        self._thread.start()
        # An in-process Milvus Lite serves requests with a thread pool, which Python shuts down before it calls atexit
        # functions; what is sent afterwards makes gRPC print a traceback. There is no public way to be earlier.
        getattr(threading, "_register_atexit", atexit.register)(self._end_before_thread_pools)
        atexit.register(self._end)

    @property
    def is_current(self) -> bool:
        """Whether the caller is the I/O thread itself."""
        return threading.get_ident() == self._thread.ident

    # --- sharing Python's lock

    @property
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

    # --- to the thread

    def post(self, *functions: Callable[[], object]) -> None:
        """Have functions called in the thread, in this order."""
        # First the functions, then the look at the flag; the thread does the reverse. So nothing is left behind.
        self._inbox.extend(functions)
        if not self._woken:
            self._woken = True
            with contextlib.suppress(RuntimeError):  # closed at the interpreter's exit
                self.loop.call_soon_threadsafe(self._empty_inbox)

    async def submit(
        self, lane: Lane[T, Any], values: Sequence[T], keys: Sequence[Hashable] | None = None
    ) -> Submission[Any]:
        """Submit items to a lane, and wait for their outcomes.

        If the caller is cancelled, so is the submission: its outcomes are complete when `CancelledError` is raised,
        and stand in that error's attribute `submission`.
        """
        loop = asyncio.get_running_loop()
        if self._ended and loop is not self.loop:
            self._refuse_at_exit()
        port = self._recent_port
        if port is None or port.loop is not loop:
            port = self._recent_port = self._port(loop)
        future: asyncio.Future[Submission[Any]] = loop.create_future()
        ticket = _Ticket(port, future, lane, values, keys)
        port.send(ticket.start)
        try:
            return await future
        except asyncio.CancelledError as cancelled:
            outcome: asyncio.Future[Submission[Any]] = loop.create_future()
            port.send(lambda: port.deliver(outcome, ticket.cancel()))
            with contextlib.suppress(asyncio.CancelledError):  # a second cancellation does not wait
                cancelled.submission = await outcome  # type: ignore[attr-defined]
            raise

    def _port(self, loop: asyncio.AbstractEventLoop) -> _Port:
        port = self._ports.get(loop)
        if port is None:
            with self._lock:
                port = self._ports.setdefault(loop, _Port(loop, self))
        return port

    def start(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run a coroutine in the thread; cancelling the future cancels it."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def begin() -> None:
            task = self.loop.create_task(coroutine)

            def finish(task: asyncio.Task[T]) -> None:
                error = CancelledError() if task.cancelled() else task.exception()
                with contextlib.suppress(concurrent.futures.InvalidStateError):
                    if self._ended:
                        pass  # nobody is told at the interpreter's exit: a traceback is all that it would be
                    elif error is not None:
                        future.set_exception(error)
                    else:
                        future.set_result(task.result())

            def pass_cancellation_on(future: concurrent.futures.Future[T]) -> None:
                if future.cancelled():
                    self.post(task.cancel)

            task.add_done_callback(finish)
            future.add_done_callback(pass_cancellation_on)

        if self._ended:
            coroutine.close()
            self._refuse_at_exit()
        self.post(begin)
        return future

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the thread, and block until it is done. Ctrl-C cancels it."""
        if self.is_current:
            coroutine.close()
            raise RuntimeError("a blocking call on the I/O thread would wait for itself; use the async method")
        future = self.start(coroutine)
        thread = threading.current_thread()
        waited_for = not thread.daemon and thread is not threading.main_thread()
        if waited_for:
            self._blocked.add(thread)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise
        finally:
            self._blocked.discard(thread)

    def call(self, function: Callable[[], T]) -> T:
        """Call a function in the thread, and block until it has returned."""
        if self.is_current:
            return function()
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def settle() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self.post(settle)
        return future.result()

    def _refuse_at_exit(self) -> NoReturn:
        raise RuntimeError("nothing can be sent to Milvus any more: the interpreter is exiting")

    # --- in the thread

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
        finally:
            with contextlib.suppress(Exception):
                self.loop.close()

    def _empty_inbox(self) -> None:
        self._woken = False
        for function in _drained(self._inbox):
            try:
                function()
            except Exception as error:  # one caller's defect does not stop the others' requests
                self.loop.call_exception_handler({"message": "a call in the I/O thread failed", "exception": error})

    def _end_before_thread_pools(self) -> None:
        """End early if a Milvus Lite is served here and no thread that Python will wait for needs it."""
        main = threading.main_thread()
        needed = self._blocked or any(
            port.thread is not main and not port.thread.daemon and loop.is_running()
            for loop, port in list(self._ports.items())
        )
        if self.serves_in_process and not needed:
            self._end()

    def _end(self) -> None:
        if self._ended or self._pid != os.getpid() or not self._thread.is_alive():
            return
        self._ended = True

        async def wind_up() -> None:
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            self.loop.stop()

        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(lambda: self.loop.create_task(wind_up()))
            self._thread.join(_JOIN_SECONDS)


class _Ticket:
    """A submission on its way to its lane, which may be cancelled before it is made."""

    __slots__ = ("_future", "_keys", "_lane", "_port", "_submission", "_values")

    def __init__(
        self,
        port: _Port,
        future: asyncio.Future[Submission[Any]],
        lane: Lane[Any, Any],
        values: Sequence[Any],
        keys: Sequence[Hashable] | None,
    ) -> None:
        self._port = port
        self._future = future
        self._lane = lane
        self._values = values
        self._keys = keys
        self._submission: Submission[Any] | None = None

    def start(self) -> None:
        self._submission = self._lane.submit(self._values, self._keys, self._finish)

    def _finish(self, submission: Submission[Any]) -> None:
        self._port.deliver(self._future, submission)

    def cancel(self) -> Submission[Any] | None:
        """Cancel, and return the submission with all its outcomes."""
        if self._submission is not None:
            self._lane.cancel(self._submission)
        return self._submission


class _Port:
    """What crosses between one caller's loop and the I/O thread, gathered by turns of the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, io: IoThread) -> None:
        self.thread = threading.current_thread()
        self._loop = weakref.ref(loop)
        self._is_of_io_thread = loop is io.loop
        self._io = io
        self._outgoing: list[Callable[[], object]] = []
        self._incoming: deque[tuple[asyncio.Future[Any], Any]] = deque()
        self._woken = False

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """The caller's loop; None once it is gone."""
        return self._loop()

    def send(self, function: Callable[[], object]) -> None:
        """Have a function called in the I/O thread; from the caller's loop."""
        if self._is_of_io_thread:
            self._io.loop.call_soon(function)
            return
        if not self._outgoing:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outgoing.append(function)

    def _flush(self) -> None:
        outgoing, self._outgoing = self._outgoing, []
        self._io.post(*outgoing)

    def deliver(self, future: asyncio.Future[Any], result: Any) -> None:
        """Set a future's result on the caller's loop; from the I/O thread."""
        if self._is_of_io_thread:
            if not future.done():
                future.set_result(result)
            return
        self._incoming.append((future, result))
        if not self._woken:
            # Once all outcomes of this turn are there: a caller that is woken by the first of them would, for each of
            # the others, wait for Python's lock again.
            self._woken = True
            self._io.loop.call_soon(self._wake)

    def _wake(self) -> None:
        loop = self.loop
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
                loop.call_soon_threadsafe(self._receive)

    def _receive(self) -> None:
        self._woken = False
        for future, result in _drained(self._incoming):
            if not future.done():
                future.set_result(result)


def _drained(queue: deque[T]) -> Iterator[T]:
    while queue:
        yield queue.popleft()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=IoThread.forget)
