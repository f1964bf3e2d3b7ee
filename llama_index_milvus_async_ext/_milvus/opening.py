"""Connects, and says what is in the way."""

from __future__ import annotations

from pathlib import Path

import grpc
from pymilvus.exceptions import ConnectError, MilvusException

from llama_index_milvus_async_ext._milvus.connection import Connection
from llama_index_milvus_async_ext._milvus.errors import RpcFailure
from llama_index_milvus_async_ext._milvus.settings import ConnectionSettings


def connect(settings: ConnectionSettings) -> Connection:
    """Connect.

    Raises:
        ConnectError: The server can't be reached, refuses the token, or the file is in use.
    """
    try:
        return Connection(settings)
    except (MilvusException, grpc.RpcError, OSError) as error:
        raise ConnectError(code=2, message=_explanation(settings, error)) from error


def _explanation(settings: ConnectionSettings, error: BaseException) -> str:
    uri = settings.uri
    if settings.is_file:
        if not Path(uri).parent.is_dir():
            return f"{uri} can't be opened: its folder does not exist"
        return (
            f"{uri} can't be opened: most likely another process holds it, as Milvus Lite serves a file to one; "
            "close it there, or start `milvus-lite server` on the folder and give all processes its http:// address"
        )
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
