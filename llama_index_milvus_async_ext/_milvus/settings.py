"""Where to connect, and as whom."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from pymilvus import MilvusClient

from llama_index_milvus_async_ext._milvus import lite

_LOOPBACK_KEEPALIVE_MS = 600_000
_ADDRESS = re.compile(r"((?:[a-z][a-z0-9+.-]*://)?)([^/?#]*)(.*)", re.IGNORECASE | re.DOTALL)
_HOST_AND_PORT = re.compile(r"(\[[^\]]*\]|[^:\[\]]*)(:\d*)?")
_PATH = re.compile(r"[/.~\\]|[a-z]:[/\\]|unix:|file:", re.IGNORECASE)


class ConnectionSettings:
    """Where to connect, and as whom; equal settings may share a connection.

    The token and the other options never show in the `repr`.

    Args:
        uri: Path of a Milvus Lite file (ending in ".db"), or address of a server. User and password, or an API key, in
            it are moved into the token.
        token: API key, or "user:password".
        options: Further arguments of `MilvusClient`.
        served_at: For a Milvus Lite file, the address at which another process serves it, and that process's number,
            for when it can't be opened here: "127.0.0.1:1234#5678".
    """

    def __init__(
        self, uri: str, token: str = "", options: Mapping[str, Any] | None = None, served_at: str | None = None
    ) -> None:
        uri, found = _parted(uri)
        token = token or found
        if uri.endswith(".db"):
            uri = lite.real_path(uri)
        self.uri = uri
        self.served_at = served_at
        self.token = token
        self.options = dict(options or {})
        self.options["grpc_options"] = {
            # gRPC would wait up to two minutes before it tries a lost server again, longer than our own deadline.
            "grpc.initial_reconnect_backoff_ms": 100,
            "grpc.max_reconnect_backoff_ms": 1_000,
            # Milvus Lite answers the ten-second pings of pymilvus with "too many pings" on stderr; and on loopback,
            # where it mostly is, no connection dies unnoticed.
            **({"grpc.keepalive_time_ms": _LOOPBACK_KEEPALIVE_MS} if self.is_file or _is_loopback(uri) else {}),
            **self.options.get("grpc_options", {}),
        }
        self._key = (uri, token, repr(sorted(self.options.items())))

    @classmethod
    def of_client(cls, client: MilvusClient) -> ConnectionSettings:
        """The settings that a pymilvus client was made with."""
        config: Any = client._config
        options = dict(config.handler_kwargs)
        if config.db_name:
            options["db_name"] = config.db_name
        return cls(_lite_file_at(config.address) or config.uri, config.token, options)

    @property
    def is_file(self) -> bool:
        """Whether this is a Milvus Lite file, served within a process."""
        return self.uri.endswith(".db")

    @property
    def living_server(self) -> str | None:
        """Where another process that still lives serves the file; None if there is none, or the file is not in use."""
        address, _, pid = (self.served_at or "").partition("#")
        if not pid or lite.IN_USE not in (lite.explain_unopened(self.uri) or ""):
            return None
        try:
            os.kill(int(pid), 0)
        except OSError:
            return None
        return address

    @property
    def client_options(self) -> dict[str, Any]:
        """What to make pymilvus's clients with: each a connection of its own.

        pymilvus would share one by address and token, whatever the TLS settings.
        """
        options = {"dedicated": True, **self.options}
        if lite.is_forked():
            # gRPC would else use the parent's connection, whose descriptors mean something else here.
            options["grpc_options"] = {"grpc.use_local_subchannel_pool": 1, **options["grpc_options"]}
        return options

    def client(self, uri: str | None = None) -> MilvusClient:
        """A pymilvus client with a connection of its own."""
        return MilvusClient(uri=uri or self.uri, token=self.token, **self.client_options)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConnectionSettings) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"ConnectionSettings({self.uri!r})"


def _parted(uri: str) -> tuple[str, str]:
    """An address, and the token that stood in it; "" for none.

    It is read as text, whatever its scheme, or without one: an address that will be refused must have no secret either,
    as the refusal shows it.
    """
    found = _ADDRESS.fullmatch(uri)
    if found is None or _PATH.match(uri) or (uri.endswith(".db") and "://" not in uri):
        return uri, ""
    scheme, authority, rest = found.groups()
    if "@" not in authority and not _HOST_AND_PORT.fullmatch(authority):
        authority, rest = authority + rest, ""  # a password with one of "/?#" in it
    who, at, where = authority.rpartition("@")
    if not at:
        return uri, ""
    # As pymilvus sends it: "user:password"; or what is alone, on either side of the colon, an API key.
    return scheme + where + rest, ":".join(filter(None, who.partition(":")[::2]))


def _is_loopback(uri: str) -> bool:
    host = urlsplit(uri).hostname or ""
    return host == "localhost" or host == "::1" or host.startswith("127.")


def _lite_file_at(address: str) -> str | None:
    """The file of the Milvus Lite server that this process runs at an address."""
    try:
        from milvus_lite.server_manager import server_manager_instance

        servers = dict(server_manager_instance._servers)
    except (ImportError, AttributeError):
        return None
    return next((path for path, (*_, port) in servers.items() if address == f"127.0.0.1:{port}"), None)
