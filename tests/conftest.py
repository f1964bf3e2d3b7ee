"""What all tests share: real Milvus in its two forms, a fault proxy before it, collections, nodes."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import llama_index.core
import pytest
from hypothesis import Phase, settings
from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode
from pymilvus import MilvusClient, MilvusException

from tests.fault_proxy import FaultProxy
from tests.faults import Held
from tests.servers import LiteServer, MilvusServer

# A splitter that is unpickled in a worker process loads its tokenizer anew, and from the network unless this names the
# copy that LlamaIndex carries. A worker without a network never answers, and its pipeline waits for ever.
os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(Path(llama_index.core.__file__).parent / "_static" / "tiktoken_cache"))

# Of `make mutants`: each mutant meets the same examples, few of them, and one that fails is enough.
MUTANTS = "mutants"
MUTANT_EXAMPLES = 100
settings.register_profile(
    MUTANTS,
    max_examples=MUTANT_EXAMPLES,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
)


# A read with Strong consistency waits for the server's next tick, and a collection that is made or loaded for the next
# look of several of its parts: most of the tests' time with the usual intervals, which `MilvusServer` itself has.
IN_QUICK_STEP = {
    "proxy": {"timeTickInterval": 50},  # ms, as all of these; 200
    "queryCoord": {
        "checkInterval": 100,  # 1000
        "checkChannelInterval": 100,
        "checkSegmentInterval": 100,
        "distPullInterval": 100,  # 500
    },
}


@dataclass(frozen=True)
class Backend:
    """A running Milvus. `address` is its gRPC address, `has_sparse` whether it has BM25 and hybrid search."""

    name: str
    uri: str
    address: str
    has_sparse: bool


class MakeNodes(Protocol):
    def __call__(self, n: int, dim: int = 8, seed: int = 0, prefix: str | None = None) -> list[TextNode]: ...


def examples(number: int) -> int:
    """How many examples a test of Hypothesis tries: so many, but for mutants."""
    return min(number, MUTANT_EXAMPLES) if is_for_mutants() else number


def is_for_mutants() -> bool:
    return bool(settings.default == settings.get_profile(MUTANTS))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "milvus_server" in getattr(item, "fixturenames", ()):
            item.add_marker("server")
    # Of processes that share the work file by file, none is to begin with the longest when the others are done.
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if is_for_mutants():  # the first test that fails ends a run: the quick ones first
        items.sort(key=lambda item: getattr(getattr(item, "obj", None), "is_hypothesis_test", False))


@pytest.fixture(scope="session")
def lite_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The `.db` path of a Milvus Lite in the tests' own process."""
    uri = str(tmp_path_factory.mktemp("lite") / "shared.db")
    # Without one, the file would be let go of with each test's last store, and have another address then. Its pings
    # would be too many for Lite, which closes the connection: for all clients that share it.
    user = MilvusClient(uri, grpc_options={"grpc.keepalive_time_ms": 600_000})
    yield uri
    user.close()


@pytest.fixture(scope="session")
def milvus_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MilvusServer]:
    """The Milvus standalone that tests share: do not kill or freeze this one."""
    if reason := MilvusServer.unavailable_reason():
        pytest.skip(reason)
    with MilvusServer(tmp_path_factory.mktemp("milvus"), extra_config=IN_QUICK_STEP) as server:
        yield server


@pytest.fixture(params=["lite", pytest.param("server", marks=pytest.mark.server)])
def own_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LiteServer | MilvusServer]:
    """A server of the test's own, to kill."""
    if request.param == "lite":
        with LiteServer(tmp_path / "data") as server:
            yield server
    else:
        if reason := MilvusServer.unavailable_reason():
            pytest.skip(reason)
        with MilvusServer(tmp_path / "data") as server:
            yield server


@pytest.fixture(scope="session", params=["lite", pytest.param("server", marks=pytest.mark.server)])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Both forms of Milvus, one after the other."""
    if request.param == "lite":
        uri = request.getfixturevalue("lite_uri")
        return Backend("lite", uri, lite_address(uri), has_sparse=True)
    server = request.getfixturevalue("milvus_server")
    return Backend("server", server.uri, server.address, has_sparse=False)


def lite_address(uri: str | Path) -> str:
    """Where the Milvus Lite of a `.db` path listens on loopback; started if need be, in this process."""
    from milvus_lite.server_manager import server_manager_instance

    loopback_uri = server_manager_instance.start_and_get_uri(str(uri))
    if loopback_uri is None:
        raise RuntimeError(f"Milvus Lite did not open {uri}")
    return str(loopback_uri).removeprefix("http://")


@pytest.fixture
def fault_proxy(backend: Backend) -> Iterator[FaultProxy]:
    """A fault proxy before the `backend` of this test."""
    with FaultProxy(backend.address) as proxy:
        yield proxy


@pytest.fixture
def proxy(lite_uri: str) -> Iterator[FaultProxy]:
    """A fault proxy before the tests' Lite, of each test's own: and so an endpoint of which nothing is taken yet."""
    with FaultProxy(lite_address(lite_uri)) as proxy:
        yield proxy


@pytest.fixture
def held() -> Iterator[Held]:
    """A fault that holds requests up until the test's end, or until they are let go."""
    held = Held()
    yield held
    held.let_go()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """All that is logged, from DEBUG on; pymilvus's too, which never comes to the root logger that `caplog` hears."""
    pymilvus = logging.getLogger("pymilvus")
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger=pymilvus.name)
    pymilvus.addHandler(caplog.handler)
    yield caplog
    pymilvus.removeHandler(caplog.handler)


@pytest.fixture
def collection_name(request: pytest.FixtureRequest) -> Iterator[str]:
    """A name that no other test has; what is there under it afterwards, on the test's Milvus, is dropped."""
    uris = [
        request.getfixturevalue("backend").uri if "backend" in request.fixturenames else None,
        request.getfixturevalue("lite_uri") if "lite_uri" in request.fixturenames else None,
        request.getfixturevalue("milvus_server").uri if "milvus_server" in request.fixturenames else None,
    ]
    name = f"t_{uuid.uuid4().hex}"
    yield name
    for uri in dict.fromkeys(filter(None, uris)):
        client = MilvusClient(uri)
        try:
            with contextlib.suppress(MilvusException):  # a test may have dropped it itself
                client.drop_collection(name)
        finally:
            client.close()


@pytest.fixture(scope="session")
def make_nodes() -> MakeNodes:
    """A factory of nodes with embeddings: `make_nodes(100, dim=8, seed=1, prefix="a")`.

    Ids are "<prefix>-<number>", with a fresh prefix where none is given; ten nodes share a document. Text, metadata
    and embeddings follow from seed and number alone.
    """

    def make(n: int, dim: int = 8, seed: int = 0, prefix: str | None = None) -> list[TextNode]:
        chance = random.Random(seed)
        prefix = prefix if prefix is not None else uuid.uuid4().hex[:12]
        nodes = []
        for number in range(n):
            document = f"{prefix}-doc-{number // 10}"
            nodes.append(
                TextNode(
                    id_=f"{prefix}-{number}",
                    text=f"node {number} of seed {seed}: {chance.getrandbits(64):016x}",
                    metadata={"number": number, "group": f"g{number % 5}", "file_name": f"{document}.txt"},
                    embedding=[chance.uniform(-1.0, 1.0) for _ in range(dim)],
                    relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=document)},
                )
            )
        return nodes

    return make
