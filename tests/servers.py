"""Real Milvus servers, to start, kill, freeze and start again from tests and benchmarks.

with MilvusServer(folder) as server:
    client = MilvusClient(server.uri)
    server.kill()
    server.start()  # same port, same rows
"""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
from typing_extensions import Self

from tests.milvus_binary import MilvusUnavailableError, configuration, etcd_configuration, find_package, unpacked

# Becomes the server by exec, so that its pid is the server's. Linux alone can tie the server's life to its parent's
# (1 is PR_SET_PDEATHSIG): a test run that is itself killed leaves nothing behind. A parent that died before the call
# is noticed by the changed parent id.
_TIED_TO_PARENT = """
import os, signal, sys
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""

# The death signal follows the THREAD that started the child. This one lives as long as the interpreter, whichever
# thread asks for a server.
_spawner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="server-spawner")

# Test runs beside each other each take every eighth port, beginning with their own.
_RUNS_BESIDE_EACH_OTHER = 8
_run = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _RUNS_BESIDE_EACH_OTHER

_handed_out: set[int] = set()
_running: weakref.WeakSet[ServerProcess] = weakref.WeakSet()


def free_ports(count: int) -> list[int]:
    """`count` ports that nobody listens on and that this process has not been given before.

    Below 32768, where outgoing connections do not take them; never twice, because Milvus silently listens elsewhere
    while an earlier server's connections linger in TIME_WAIT.
    """
    ports: list[int] = []
    choose = random.SystemRandom()
    while len(ports) < count:
        port = choose.randrange(10_000 + _run, 32_768, _RUNS_BESIDE_EACH_OTHER)
        if port in _handed_out or not _is_free(port):
            continue
        _handed_out.add(port)
        ports.append(port)
    return ports


def _is_free(port: int) -> bool:
    try:
        with socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True):
            return True
    except (OSError, ValueError):  # held; ValueError: no dual stack here
        pass
    try:
        with socket.create_server(("", port)):
            return not socket.has_dualstack_ipv6()
    except OSError:
        return False


class ServerProcess(ABC):
    """A server in a process group of its own, on one port and one data folder for as long as this object lives."""

    ready_within_seconds = 90.0
    grace_seconds = 10.0
    _stop_signal = signal.SIGTERM

    def __init__(self, data_dir: str | os.PathLike[str]) -> None:
        self.data_dir = Path(data_dir).resolve()
        self.port = free_ports(1)[0]
        self._process: subprocess.Popen[bytes] | None = None
        self._started_by = 0

    @abstractmethod
    def _prepare(self) -> tuple[list[str], dict[str, str]]:
        """Write what the server reads at its start; return its command line and environment."""

    @abstractmethod
    def is_ready(self) -> bool:
        """Whether the server answers now. False, after about a second, where it is frozen."""

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def uri(self) -> str:
        return f"http://{self.address}"

    @property
    def pid(self) -> int:
        """The running server's process id, which is also its process group.

        Raises:
            RuntimeError: it does not run.
        """
        if self._process is None:
            raise RuntimeError(f"{self!r} does not run")
        return self._process.pid

    @property
    def log(self) -> Path:
        return self.data_dir / "milvus.log"

    def start(self) -> Self:
        """Start on this object's port and data folder; return when the server is ready.

        Raises:
            RuntimeError: it runs already, or it ended or was not ready in time (the message ends with its log).
        """
        if self._process is not None:
            raise RuntimeError(f"{self!r} runs already")
        self.data_dir.mkdir(parents=True, exist_ok=True)
        command, environment = self._prepare()
        self._process = _spawner.submit(self._spawn, command, environment).result()
        self._started_by = os.getpid()
        _running.add(self)
        try:
            self.wait_until_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def _spawn(self, command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _TIED_TO_PARENT, str(os.getpid()), *command],
                cwd=self.data_dir,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        """Wait until the server answers, at most `ready_within_seconds`."""
        deadline = time.monotonic() + self.ready_within_seconds
        while not self.is_ready():
            if self._process is None or self._process.poll() is not None:
                raise RuntimeError(f"{self!r} ended at its start:\n{self._log_tail()}")
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"{self!r} was not ready after {self.ready_within_seconds:.0f} s:\n{self._log_tail()}"
                )
            time.sleep(0.05)

    def stop(self, grace_seconds: float | None = None) -> None:
        """End the server in order, or by force after `grace_seconds`. Does nothing where none runs."""
        if self._process is None:
            return
        self.thaw()  # a stopped process would not see the signal
        self._process.send_signal(self._stop_signal)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=self.grace_seconds if grace_seconds is None else grace_seconds)
        self.kill()

    def kill(self) -> None:
        """End the server by SIGKILL, as a crash would; return when its port is closed. Does nothing where none runs."""
        if self._process is None:
            return
        self._signal_group(signal.SIGKILL)
        self._process.wait()
        self._process = None
        _running.discard(self)

    def restart(self) -> Self:
        """Stop in order, then start on the same port and data folder. After `kill()`, use `start()`."""
        self.stop()
        return self.start()

    def freeze(self) -> None:
        """Stop the server's clock (SIGSTOP): connections are taken by the kernel, answers never come."""
        self._signal_group(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen server go on (SIGCONT)."""
        self._signal_group(signal.SIGCONT)

    def _signal_group(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(self.pid, number)

    def _log_tail(self, lines: int = 25) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        state = "stopped" if self._process is None else f"pid {self._process.pid}"
        return f"<{type(self).__name__} {self.address} {state}>"


@atexit.register
def _kill_what_still_runs() -> None:
    for server in list(_running):
        if server._started_by == os.getpid():  # a forked child has copies of servers that are not its own
            server.kill()


class MilvusServer(ServerProcess):
    """Milvus standalone, from the `milvus` package.

        extra = {"common": {"security": {"authorizationEnabled": True}}}
        with MilvusServer(folder, extra_config=extra) as server: ...

    `extra_config` is a tree laid over Milvus's own `milvus.yaml`. It is written at each start: change the attribute,
    then start again. Never write the file under a running 2.3.5, which reloads it and then answers nothing any more.

    After a restart, inserts work at once and reads of a loaded collection fail (101, not loaded) until the sessions
    of the killed server have run out: 30 s, or `extra_config={"common": {"session": {"ttl": 5}}}`.
    """

    # With a loaded collection, an orderly stop of 2.3.5 does not end within a minute. The log keeps all rows anyway.
    grace_seconds = 1.0

    _inner_servers = (
        *("root_coord", "query_coord", "index_coord", "data_coord"),
        *("query_node", "index_node", "data_node", "proxy_internal"),
    )

    def __init__(self, data_dir: str | os.PathLike[str], extra_config: Mapping[str, Any] | None = None) -> None:
        super().__init__(data_dir)
        self.extra_config: Mapping[str, Any] = extra_config or {}
        self._etcd_port, self._etcd_peer_port, self._health_port, *inner = free_ports(11)
        storage = self.data_dir / "data"
        self._settings: Mapping[str, object] = {
            "proxy_port": self.port,
            # The same over a restart: until the killed server's sessions in etcd run out, its parts look for each
            # other where they were, and with new ports a start takes a minute instead of seconds.
            **{f"{name}_port": port for name, port in zip(self._inner_servers, inner, strict=True)},
            "etcd_port": self._etcd_port,
            "etcd_data_dir": str(storage / "etcd.data"),
            "local_storage_dir": str(storage),
            "rocksmq_data_dir": str(storage / "rocksmq"),
            "system_log_path": "",  # to stdout alone, which is the log file here
        }

    @classmethod
    def unavailable_reason(cls) -> str | None:
        """Why Milvus standalone cannot run here; None where it can."""
        try:
            find_package()
        except MilvusUnavailableError as reason:
            return str(reason)
        return None

    def _prepare(self) -> tuple[list[str], dict[str, str]]:
        package = find_package()
        binary_dir = unpacked(package)
        (self.data_dir / "configs").mkdir(exist_ok=True)
        shutil.copy(package.data / "glog.conf", self.data_dir / "configs")
        (self.data_dir / "etcd.yaml").write_text(etcd_configuration(self._etcd_port, self._etcd_peer_port))
        settings = configuration(package, self._settings, self.extra_config)
        (self.data_dir / "configs" / "milvus.yaml").write_text(settings)
        environment = os.environ | {
            "DEPLOY_MODE": "STANDALONE",
            "METRICS_PORT": str(self._health_port),
            "MILVUS_RUN_DIR": str(self.data_dir / "run"),
            "LD_LIBRARY_PATH": str(binary_dir),
            "ETCD_CONFIG_PATH": str(self.data_dir / "etcd.yaml"),
        }
        return [str(binary_dir / "milvus"), "run", "standalone"], environment

    def is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._health_port}/healthz", timeout=1) as answer:
                if b"OK" not in answer.read():
                    return False
            # Milvus takes another port without a word where it thinks this one is held: then this fails.
            with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return True
        except OSError:
            return False


class LiteServer(ServerProcess):
    """Milvus Lite in a process of its own, on TCP."""

    _stop_signal = signal.SIGINT  # the only one it closes its files on

    def _prepare(self) -> tuple[list[str], dict[str, str]]:
        command = [sys.executable, "-m", "milvus_lite", "server", "--data-dir", str(self.data_dir / "lite")]
        return [*command, "--host", "127.0.0.1", "--port", str(self.port)], dict(os.environ)

    def is_ready(self) -> bool:
        # A TCP connection would do for a frozen server, too; only the process itself can shake hands over HTTP/2.
        with grpc.insecure_channel(self.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            try:
                grpc.channel_ready_future(channel).result(timeout=1)
                return True
            except grpc.FutureTimeoutError:
                return False
