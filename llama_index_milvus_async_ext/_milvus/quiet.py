"""What is logged of failures: a line by this package, and nothing by pymilvus and Milvus Lite."""

from __future__ import annotations

import contextlib
import logging
import threading
from typing import Any

from llama_index_milvus_async_ext._lane.effects import Retry
from llama_index_milvus_async_ext._milvus.errors import COLLECTION_NOT_LOADED

logger = logging.getLogger("llama_index_milvus_async_ext")

_silenced = threading.local()
_NOISY_LOGGERS = (
    "pymilvus.decorators",
    "pymilvus.client.connection_manager",
    "pymilvus.client.grpc_handler",
    "pymilvus.orm.iterator",
    "milvus_lite.server_manager",
)


class _MendableFailuresFilter(logging.Filter):
    """Drops pymilvus's traceback for a failure that is about to be retried or raised by this package."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not getattr(_silenced, "on", False)


class UnknownMethodsFilter(logging.Filter):
    """Drops what gRPC's server says when pymilvus asks Milvus Lite for a method that it does not have.

    pymilvus expects that answer and goes on; the traceback would reach the user's screen all the same.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and record.exc_info[0] is NotImplementedError)


def add_filter(logger_name: str, wanted: type[logging.Filter]) -> None:
    source = logging.getLogger(logger_name)
    if not any(isinstance(known, wanted) for known in source.filters):
        source.addFilter(wanted())


@contextlib.contextmanager
def silence_pymilvus() -> Any:
    """Keep pymilvus from logging the failures of calls made inside, in this thread only.

    Their errors reach the caller in any case, who knows whether a further attempt mends them.
    """
    for name in _NOISY_LOGGERS:
        add_filter(name, _MendableFailuresFilter)
    before = getattr(_silenced, "on", False)
    _silenced.on = True
    try:
        yield
    finally:
        _silenced.on = before


def log_retry(retry: Retry) -> None:
    """Tell of a request that failed and will be sent again: the first time as a warning."""
    # A collection that is not loaded yet is no fault: Milvus loads it after a restart, Milvus Lite when it is told to.
    is_loading = getattr(retry.error, "code", None) == COLLECTION_NOT_LOADED
    level = logging.WARNING if retry.attempt == 1 and not is_loading else logging.DEBUG
    logger.log(
        level,
        "request to Milvus: attempt %d failed, next one in %.2f s: %s",
        retry.attempt,
        retry.pause_seconds,
        retry.error,
    )
