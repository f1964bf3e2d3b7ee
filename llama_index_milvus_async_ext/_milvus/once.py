"""pymilvus's client without its own repeats: when to try again is the retry policy's to say."""

from __future__ import annotations

import functools
import inspect
from types import MethodType
from typing import Any

import grpc
from pymilvus import MilvusClient
from pymilvus.exceptions import MilvusException


def once(client: MilvusClient) -> Any:
    """A twin of a client, each of whose requests goes out once; the client itself if its insides are not as known.

    Each method of pymilvus's handler, which sends the requests, stands within a decorator that repeats it: until the
    time-out, if there is one, whatever `retry_times` says. The twin's handler has the methods that stand within.
    """
    handler = getattr(client, "_handler", None)
    if getattr(getattr(client, "_config", None), "is_global", False):
        return client  # the decorator has pymilvus find the new primary of a global cluster
    return client if handler is None else _Twin(client, _handler=_Handler(handler))


class _Twin:
    """What an object is, but for some of its attributes, which its methods find in the place of its own."""

    def __init__(self, original: Any, **others: Any) -> None:
        self.__dict__.update(others, _original=original)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._original, name)
        is_own = inspect.ismethod(found) and found.__self__ is self._original
        return MethodType(self._inner(found.__func__), self) if is_own else found

    def _inner(self, function: Any) -> Any:
        return function


class _Handler(_Twin):
    """pymilvus's handler, without the outermost decorator of each method."""

    def _inner(self, function: Any) -> Any:
        inner = getattr(function, "__wrapped__", None)
        return function if inner is None else _explained(inner)


def _explained(function: Any) -> Any:
    """The function, whose errors are those that the decorator makes of them: Milvus's, or gRPC's."""

    @functools.wraps(function)
    def attempt(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (MilvusException, grpc.RpcError, grpc.FutureTimeoutError):
            raise
        except Exception as error:
            raise MilvusException(message=f"Unexpected error, message=<{error!s}>") from error

    return attempt
