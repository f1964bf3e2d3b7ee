"""What this process still has of an address, or of a Milvus Lite file, when all its stores have gone."""

from __future__ import annotations

from pathlib import Path

import psutil

from llama_index_milvus_async_ext._milvus import lite
from llama_index_milvus_async_ext._milvus.endpoint import Endpoint
from tests.fault_proxy import FaultProxy

# Has each of gRPC's channels make a connection of its own, instead of one for all channels to an address.
UNSHARED = {"grpc.use_local_subchannel_pool": 1}


def connections_to(proxy: FaultProxy) -> int:
    """How many connections this process has to a proxy."""
    open_ones = (each for each in psutil.Process().net_connections("tcp") if each.status == psutil.CONN_ESTABLISHED)
    return sum(bool(each.raddr) and each.raddr.port == proxy.port for each in open_ones)


def is_counted(uri: str, address: str = "") -> bool:
    """Whether there is an endpoint for a uri, or anything that endpoints of an address share."""
    endpoints, addresses = Endpoint._sharing.everything
    settings = [*endpoints, *Endpoint._sharing._users]
    return address in addresses or any(each.uri == uri for each in settings)


def nothing_is_left_of(proxy: FaultProxy) -> bool:
    """Whether this process has no connection to a proxy, and keeps nothing for one."""
    return not connections_to(proxy) and not is_counted(proxy.uri, proxy.address)


def is_free(path: Path) -> bool:
    """Whether this process does not hold a Milvus Lite file, which is there, and keeps nothing for it."""
    # Milvus Lite's lock is one of an open file: it bars this very process from locking it once more.
    return path.exists() and lite.explain_unopened(str(path)) is None and not is_counted(lite.real_path(str(path)))
