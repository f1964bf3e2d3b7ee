"""The Milvus standalone binary that the `milvus` package carries: where it is, unpacked once, its configuration."""

from __future__ import annotations

import fcntl
import importlib.metadata
import importlib.util
import json
import lzma
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import platformdirs
import yaml

REPOSITORY = Path(__file__).resolve().parent.parent

# Found without importing it: importing `milvus` opens its own configuration and registers finalizers.
_LOCATE = """
import importlib.metadata, importlib.util, json
spec = importlib.util.find_spec("milvus")
print(json.dumps([spec.origin, importlib.metadata.version("milvus")] if spec and spec.origin else None))
"""


class MilvusUnavailableError(RuntimeError):
    """Milvus standalone cannot run here; the message says why."""


@dataclass(frozen=True)
class MilvusPackage:
    """An installed `milvus` package (a binary distribution of Milvus standalone)."""

    data: Path
    version: str


@cache
def find_package() -> MilvusPackage:
    """Where the `milvus` package is installed.

    Asked in this order: the Python named by `MILVUS_SERVER_PYTHON`, `.venv-milvus` at the repository's root, and the
    running Python. The package has an environment of its own because its dependencies are older than everybody's.

    Raises:
        MilvusUnavailableError: it is nowhere, or its binary does not run on this machine.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise MilvusUnavailableError(
            f"the milvus package runs on Linux x86-64, not {sys.platform} {platform.machine()}"
        )
    named = os.environ.get("MILVUS_SERVER_PYTHON")
    beside = REPOSITORY / ".venv-milvus" / "bin" / "python"
    if named or beside.exists():
        python = named or str(beside)
        try:
            answer = subprocess.run([python, "-c", _LOCATE], capture_output=True, text=True, check=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as error:
            raise MilvusUnavailableError(f"cannot ask {python} for the milvus package: {error}") from error
        located = json.loads(answer.stdout)
        if located is None:
            raise MilvusUnavailableError(f"{python} has no milvus package: pip install --no-deps milvus==2.3.5")
        return MilvusPackage(Path(located[0]).parent / "data", located[1])
    spec = importlib.util.find_spec("milvus")
    if spec is None or spec.origin is None:
        raise MilvusUnavailableError(
            "no milvus package: python -m venv .venv-milvus && .venv-milvus/bin/pip install --no-deps milvus==2.3.5"
            " (or name a Python that has it in MILVUS_SERVER_PYTHON)"
        )
    return MilvusPackage(Path(spec.origin).parent / "data", importlib.metadata.version("milvus"))


def unpacked(package: MilvusPackage) -> Path:
    """The folder with `milvus` and its libraries, unpacked into the user's cache by whoever needs it first.

    Unpacking takes seconds and 250 MB, so it is done once per version, not once per data folder as the
    package's own `milvus-server` does it.
    """
    cache_dir = platformdirs.user_cache_path("llama-index-milvus-async-ext")
    cache_dir.mkdir(parents=True, exist_ok=True)
    target = cache_dir / f"milvus-{package.version}"
    if target.exists():
        return target
    with open(cache_dir / f"milvus-{package.version}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():  # another process was quicker
            return target
        # Under another name first: an interrupted unpacking must never look like a finished one.
        partial = Path(tempfile.mkdtemp(dir=cache_dir, prefix="unpacking-"))
        try:
            for packed in sorted((package.data / "bin").glob("*.lzma")):
                with lzma.open(packed) as source, open(partial / packed.stem, "wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
                (partial / packed.stem).chmod(0o755)
            partial.rename(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return target


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it, branch by branch."""
    result = dict(base)
    for key, value in changes.items():
        known = result.get(key)
        result[key] = merged(known, value) if isinstance(known, Mapping) and isinstance(value, Mapping) else value
    return result


def configuration(package: MilvusPackage, settings: Mapping[str, object], changes: Mapping[str, Any]) -> str:
    """The text of `milvus.yaml`: the package's template, filled in with `settings`, with `changes` laid over it."""
    template = (package.data / "config.yaml.template").read_text(encoding="utf-8")

    def fill(match: re.Match[str]) -> str:
        value = settings.get(match["name"], match["default"] or "")
        return json.dumps(value) if not isinstance(value, str) else value

    filled = re.sub(r"\{\{\s*(?P<name>\w+)(?:\(\w+\))?\s*(?::\s*(?P<default>.*?))?\s*\}\}", fill, template)
    text: str = yaml.safe_dump(merged(yaml.safe_load(filled), changes), sort_keys=False)
    return text


def etcd_configuration(client_port: int, peer_port: int) -> str:
    """The embedded etcd's own file: without one it always takes 2379 and 2380, so that no second server could run."""
    client, peer = f"http://127.0.0.1:{client_port}", f"http://127.0.0.1:{peer_port}"
    text: str = yaml.safe_dump(
        {
            "name": "default",
            "listen-client-urls": client,
            "advertise-client-urls": client,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": f"default={peer}",
        }
    )
    return text
