"""Spans and events of a call: made on its caller's thread, in its context, and only if somebody listens.

The I/O thread serves all callers, and notes facts only (`Submission.trips`); the call that they are about tells them.
"""

from __future__ import annotations

import contextlib
import inspect
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextvars import Token
from typing import TYPE_CHECKING, Any, TypeVar

from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.dispatcher import Dispatcher, active_instrument_tags
from llama_index_instrumentation.event_handlers import NullEventHandler
from llama_index_instrumentation.events.span import SpanDropEvent
from llama_index_instrumentation.span import active_span_id
from llama_index_instrumentation.span_handlers import NullSpanHandler

from llama_index_milvus_async_ext._lane.effects import Retry
from llama_index_milvus_async_ext._lane.items import Submission
from llama_index_milvus_async_ext._lane.journey import Request
from llama_index_milvus_async_ext._lane.port import Port
from llama_index_milvus_async_ext._lane.trips import Trip
from llama_index_milvus_async_ext._milvus.session import Connected
from llama_index_milvus_async_ext.events import MilvusRetryEvent, MilvusSearchEvent, MilvusWriteBatchEvent

if TYPE_CHECKING:
    from llama_index_milvus_async_ext._store.open_store import OpenStore

T = TypeVar("T")

dispatcher = get_dispatcher(__name__)

_NO_PARAMETERS = inspect.Signature()


def _with_parents(first: Dispatcher) -> tuple[Dispatcher, ...]:
    chain = [first]
    while chain[-1].name != chain[-1].root_name:
        chain.append(chain[-1].parent)
    return tuple(chain)


_chain = _with_parents(dispatcher)  # which never changes: to walk it at each call takes twice as long


def is_listened_to() -> bool:
    """Whether a span or an event would reach a handler; to make one takes longer than to find that out."""
    for current in _chain:
        for events in current.event_handlers:
            if type(events) is not NullEventHandler:
                return True
        for spans in current.span_handlers:
            if type(spans) is not NullSpanHandler:
                return True
        if not current.propagate:
            break
    return False


async def traced_call(
    function: Callable[..., Awaitable[T]], store: OpenStore, connected: Connected, port: Port, *arguments: Any
) -> T:
    """One public call of a store, in a span that has the name of what it does."""
    with span(f"{type(store).__name__}.{getattr(function, '__name__', 'call')}"):
        return await function(store, connected, traced(port, store.collection_name), *arguments)


def traced(port: Port, collection_name: str) -> Port:
    """The port; if somebody listens, one that tells of the requests which take it."""
    if isinstance(port, TracedPort) or not is_listened_to():
        return port
    return TracedPort(port, collection_name)


class TracedPort:
    """A caller's port, with a span around what is submitted by it, and an event for each batch and each retry."""

    def __init__(self, port: Port, collection_name: str) -> None:
        self._port = port
        self._collection_name = collection_name
        self.awaits = port.awaits

    async def submit(self, *requests: Request) -> list[Submission[Any]]:
        """See `Port`."""
        if not requests:
            return await self._port.submit()
        kind = requests[0].kind
        with span(f"Milvus.{kind}"):
            try:
                submissions = await self._port.submit(*(request._replace(watched=True) for request in requests))
            except BaseException as interruption:
                self._tell(kind, getattr(interruption, "submissions", ()))
                raise
            self._tell(kind, submissions)
        return submissions

    def _tell(self, kind: str, submissions: Sequence[Submission[Any]]) -> None:
        for submission in submissions:
            for trip in tuple(submission.trips or ()):
                event = self._retry(kind, trip) if isinstance(trip, Retry) else self._batch(kind, trip)
                if event is not None:
                    dispatcher.event(event)

    def _retry(self, kind: str, retry: Retry) -> MilvusRetryEvent:
        # No message: a server's may quote the row that it refuses.
        code = getattr(retry.error, "code", None)
        return MilvusRetryEvent(
            collection_name=self._collection_name,
            request=kind,
            attempt=retry.attempt,
            error_type=type(retry.error).__name__,
            code=code if isinstance(code, int) else None,
            grpc_status=str(getattr(retry.error, "status", "")),
            backoff_seconds=retry.pause_seconds,
        )

    def _batch(self, kind: str, trip: Trip) -> MilvusSearchEvent | MilvusWriteBatchEvent | None:
        shared: dict[str, Any] = {
            "collection_name": self._collection_name,
            "waiting_seconds": trip.waiting_seconds,
            "sending_seconds": trip.sending_seconds,
            "attempts": trip.attempts,
            "error_type": type(trip.error).__name__ if trip.error is not None else "",
        }
        if kind == "search_request":
            return MilvusSearchEvent(nq=trip.items, own_queries=trip.own_items, **shared)
        if kind == "write_request":
            return MilvusWriteBatchEvent(rows=trip.items, own_rows=trip.own_items, row_bytes=trip.nbytes, **shared)
        return None


@contextlib.contextmanager
def span(name: str) -> Iterator[None]:
    """A span around what is done inside, under the caller's own.

    It is what `dispatcher.span` makes of a function, but that it holds no arguments, no result and no store: no node,
    no query and no secret goes to a handler. (The decorator would also cost each call 30 us, whoever listens.)
    """
    id_ = f"{name}-{uuid.uuid4()}"
    token = active_span_id.set(id_)
    parent_id = None if token.old_value is Token.MISSING else token.old_value
    arguments = _NO_PARAMETERS.bind()
    dispatcher.span_enter(id_=id_, bound_args=arguments, parent_id=parent_id, tags=active_instrument_tags.get())
    try:
        yield
    except BaseException as error:
        dispatcher.event(SpanDropEvent(span_id=id_, err_str=str(error)))
        dispatcher.span_drop(id_=id_, bound_args=arguments, err=error)
        raise
    else:
        dispatcher.span_exit(id_=id_, bound_args=arguments)
    finally:
        with contextlib.suppress(ValueError):  # a coroutine that nobody awaits any more is closed in another context
            active_span_id.reset(token)
