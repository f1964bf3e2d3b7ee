"""Python programs in processes of their own, which need not import again what is slow to import.

    ended = programs.run("import sys; print(sys.argv[1])", "hello", timeout=10)
    assert ended.stdout == "hello\\n"

A template process imports the package once and forks for each program. From there on it is as with `python -c`: the
program is `__main__`, has the arguments, the environment and the streams that it is given, and its interpreter ends as
any other does. Where the import itself is what a test is about, use `subprocess`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from typing_extensions import Self

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ("llama_index_milvus_async_ext", "llama_index.core.ingestion", "tests.embedding")
# What the examples import: PyTorch alone takes longer than most of them run.
EXAMPLES = (*PACKAGE, "llama_index.embeddings.huggingface", "sentence_transformers", "transformers", "pypdf")


class Program:
    """A running program: as much of `subprocess.Popen` as tests need. Leaving its `with` block kills it."""

    def __init__(self, reply: socket.socket, stdin: IO[str], stdout: IO[str]) -> None:
        self._reply = reply
        self._said = reply.makefile()
        self.stdin = stdin
        self.stdout = stdout
        self.pid = int(self._said.readline())
        self.returncode: int | None = None

    def wait(self, timeout: float) -> int:
        """The exit code; negative, the number of the signal that ended it.

        Raises:
            subprocess.TimeoutExpired: it still runs after `timeout` seconds.
        """
        if self.returncode is None:
            self._reply.settimeout(timeout)
            try:
                self.returncode = os.waitstatus_to_exitcode(int(self._said.readline()))
            except TimeoutError:
                self._said = self._reply.makefile()  # a file whose read has timed out cannot be read again
                raise subprocess.TimeoutExpired([f"program {self.pid}"], timeout) from None
        return self.returncode

    def kill(self) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self.stdin.close()
        self.stdout.close()
        self.wait(10)
        self._said.close()
        self._reply.close()


class Template:
    """A process that has imported `modules` and forks a program whenever it is asked for one."""

    def __init__(self, modules: tuple[str, ...], environment: Mapping[str, str]) -> None:
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SERVE, str(theirs.fileno()), *modules],
                cwd=ROOT,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )

    def start(self, request: Mapping[str, Any], streams: tuple[int, int, int]) -> socket.socket:
        """Have a program forked; what comes back tells its pid, and later its status."""
        ours, theirs = socket.socketpair()
        with theirs, tempfile.TemporaryFile("w+") as asked:
            json.dump(request, asked)
            asked.seek(0)
            socket.send_fds(self._control, [b"."], [asked.fileno(), theirs.fileno(), *streams])
        return ours

    def close(self) -> None:
        self._control.close()  # which is how it learns that nobody will ask any more
        self._process.wait(10)


_SERVE = "import sys; import tests.programs as p; p.serve(int(sys.argv[1]), sys.argv[2:]); p.go()"

_program: dict[str, Any] = {}


def serve(control: int, modules: list[str]) -> None:
    """In the template: fork for each request. Returns in a forked child, with its program in `_program`."""
    for module in modules:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # so that no collection of a program's looks at, and so copies, what they all share
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait for the programs
    with socket.socket(fileno=control) as asked:
        while True:
            _, (*received,), _, _ = socket.recv_fds(asked, 1, 5)
            if not received:
                os._exit(0)
            if not os.fork():
                break
            for descriptor in received:
                os.close(descriptor)
    request, reply, *streams = received
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with open(request) as file:
        _program.update(json.load(file))
    if pid := os.fork():
        with socket.socket(fileno=reply) as answer:
            for stream in streams:
                os.close(stream)
            answer.sendall(f"{pid}\n".encode())
            answer.sendall(f"{os.waitpid(pid, 0)[1]}\n".encode())
        os._exit(0)
    os.close(reply)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)


def go() -> None:
    """In the forked child: be the program."""
    os.chdir(_program["cwd"])
    os.environ.clear()
    os.environ.update(_program["environment"])
    sys.argv = [_program["name"], *_program["arguments"]]
    sys.path[0] = _program["folder"]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # of a background job's shell, it would be ignored
    random.seed()
    tempfile.tempdir = None
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    if _program["folder"]:
        main.__file__ = _program["name"]
    exec(compile(_program["source"], _program["name"], "exec"), main.__dict__)


@functools.cache
def _template(modules: tuple[str, ...], offline: bool) -> Template:
    made = Template(modules, os.environ | (OFFLINE if offline else {}))
    atexit.register(made.close)
    return made


OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def start(
    source: str | Path,
    *arguments: str,
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    modules: tuple[str, ...] = PACKAGE,
) -> Program:
    """Start a program: its source, or the path of a script. Its output is `.stdout`, unless a descriptor is given."""
    is_script = isinstance(source, Path)
    request = {
        "name": str(source) if is_script else "-c",
        "folder": str(source.parent) if isinstance(source, Path) else "",
        "source": source.read_text(encoding="utf-8") if isinstance(source, Path) else source,
        "arguments": list(arguments),
        "cwd": str(cwd),
        "environment": dict(os.environ if environment is None else environment),
    }
    their_input, our_input = os.pipe()
    our_output, their_output = os.pipe()
    with open(os.devnull, "w") as nowhere:
        streams = (
            their_input,
            their_output if stdout is None else stdout,
            nowhere.fileno() if stderr is None else stderr,
        )
        reply = _template(modules, modules is EXAMPLES).start(request, streams)
    os.close(their_input)
    os.close(their_output)
    return Program(reply, open(our_input, "w"), open(our_output))


def run(
    source: str | Path,
    *arguments: str,
    timeout: float = 60,
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    modules: tuple[str, ...] = PACKAGE,
) -> subprocess.CompletedProcess[str]:
    """Run a program with nothing on its standard input to its end.

    Raises:
        subprocess.TimeoutExpired: it still runs after `timeout` seconds. It is killed.
    """
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        with start(
            source,
            *arguments,
            cwd=cwd,
            environment=environment,
            stdout=stdout.fileno(),
            stderr=stderr.fileno(),
            modules=modules,
        ) as program:
            program.stdin.close()
            program.wait(timeout)
        stdout.seek(0)
        stderr.seek(0)
        return subprocess.CompletedProcess(
            [str(source), *arguments], program.returncode or 0, stdout.read(), stderr.read()
        )
