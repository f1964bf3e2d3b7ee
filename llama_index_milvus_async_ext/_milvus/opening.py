"""Connects, and says what is in the way."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import TypeVar

import grpc
import tenacity
from pymilvus import MilvusClient
from pymilvus.exceptions import ConnectError, MilvusException

from llama_index_milvus_async_ext._lane import forks
from llama_index_milvus_async_ext._milvus import lite
from llama_index_milvus_async_ext._milvus.connection import Connection
from llama_index_milvus_async_ext._milvus.errors import RpcFailure
from llama_index_milvus_async_ext._milvus.settings import ConnectionSettings

T = TypeVar("T")

_ATTEMPTS = 6
_PAUSE_SECONDS = 0.2
_RECONNECTED_AFTER_SECONDS = 1.5  # gRPC's pause, at the most a second here, and a fifth more by chance


def connect(settings: ConnectionSettings) -> Connection:
    """Connect.

    Raises:
        ConnectError: The server can't be reached, refuses the token, or the file is in use.
    """
    attempt = functools.partial(_attempts(settings), Connection, settings)
    with forks.quiet.busy(), lite.files if settings.is_file else contextlib.nullcontext():
        return _explained(settings, attempt)


def another_client(settings: ConnectionSettings, uri: str) -> MilvusClient:
    """A client of pymilvus's at an address that has been connected to before; raises as `connect`."""
    return _explained(settings, lambda: _attempts(settings)(settings.client, uri))


def first_answer(settings: ConnectionSettings, ask: Callable[[], T]) -> T:
    """The answer to the first question that a store asks, by a connection that others may have opened long ago.

    Raises:
        ConnectError: The server can't be reached. One that is just back is: such a connection tries again after a
            second only, and until then says what the last attempt has said.
    """
    patiently = tenacity.Retrying(
        stop=tenacity.stop_after_delay(_RECONNECTED_AFTER_SECONDS),
        wait=tenacity.wait_fixed(_PAUSE_SECONDS),
        retry=tenacity.retry_if_exception(_is_unavailable),
        reraise=True,
    )
    try:
        return patiently(ask)
    except (MilvusException, grpc.RpcError) as error:
        if _is_unavailable(error):
            raise ConnectError(code=2, message=_explanation(settings, error)) from error
        raise


def _attempts(settings: ConnectionSettings) -> tenacity.Retrying:
    # In a forked child gRPC may have to find out first that the parent's connections are not its own; and a file may
    # just be let go of by this very process, for a plain store of its.
    is_worth_another = lite.is_forked() or (settings.is_file and lite.was_served_here(settings.uri))
    return tenacity.Retrying(
        stop=tenacity.stop_after_attempt(_ATTEMPTS if is_worth_another else 1),
        wait=tenacity.wait_fixed(_PAUSE_SECONDS),
        retry=tenacity.retry_if_exception(lambda error: settings.is_file or _is_unavailable(error)),
        reraise=True,
    )


def _explained(settings: ConnectionSettings, connect: Callable[[], T]) -> T:
    try:
        return connect()
    except (MilvusException, grpc.RpcError, OSError) as error:
        raise ConnectError(code=2, message=_explanation(settings, error)) from error


def _is_unavailable(error: BaseException) -> bool:
    failure = RpcFailure.cause_of(error)
    return failure is not None and failure.status == "UNAVAILABLE"


def _explanation(settings: ConnectionSettings, error: BaseException) -> str:
    uri = settings.uri
    if settings.is_file:
        return f"{uri} can't be opened: {lite.explain_unopened(uri) or error}"
    failure = RpcFailure.cause_of(error)
    reason = {
        "UNAVAILABLE": "no Milvus server answers there; check that it runs, the host and the port, and whether it "
        "expects TLS (https://) or not (http://)",
        "UNAUTHENTICATED": "it refuses the token; check token= (such as 'user:password' or an API key)",
        "PERMISSION_DENIED": "it refuses the token; check token= and the rights of its user",
        "DEADLINE_EXCEEDED": "it accepts connections, but does not answer; is it a healthy Milvus server?",
        "UNIMPLEMENTED": "the server there is no Milvus server, or the port is not its gRPC port (19530 by default)",
    }.get(failure.status if failure is not None else "")
    return f"can't connect to {uri}: {reason or error}"
