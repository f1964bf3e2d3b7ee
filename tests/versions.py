"""The tests on Milvus Lite with other Pythons, and the oldest and newest of what the package stands on.

    python -m tests.versions                           # all environments, those of a missing Python left out
    python -m tests.versions lowest pymilvus-3         # some
    python -m tests.versions --into docs/versions.md   # all, and the table into that page

Each environment is made anew under `build/versions`, by uv; beside it lies what pytest said. The package is taken from
the source tree. What needs PyTorch or Ray skips itself: neither is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDER = REPOSITORY / "build" / "versions"
START, END = "<!-- versions:start -->", "<!-- versions:end -->"
# Those that the package itself asks for, in their order.
DIRECT = re.findall(
    r'^    "([\w-]+)',
    (REPOSITORY / "pyproject.toml").read_text().partition("\ndependencies = [")[2].partition("]")[0],
    re.M,
)
COUNTS = ["passed", "failed", "skipped"]
# Ray weighs more than all else, and its tests ask about Ray. A requirement for no Python at all takes it out.
WITHOUT_RAY = "ray ; python_version < '3'"
TESTS = ["-m", "not server and not slow", "-p", "no:cacheprovider"]


@dataclass(frozen=True)
class Environment:
    """A Python and what is installed for it: `overrides` go over the heads of all who ask for something else."""

    name: str
    python: str
    lowest: bool = False
    overrides: tuple[str, ...] = ()


ENVIRONMENTS = [
    Environment("lowest", "3.10", lowest=True),
    Environment("newest-3.12", "3.12"),
    Environment("newest-3.13", "3.13"),
    Environment("pymilvus-3", "3.13", overrides=("pymilvus>=3,<4",)),
]


def uv(*arguments: str | Path) -> str:
    # Copies, as nltk refuses to read its files where they are hard links, by which uv saves space.
    command = [sys.executable, "-m", "uv", *map(str, arguments)]
    environment = {**os.environ, "UV_LINK_MODE": "copy", "UV_PYTHON_DOWNLOADS": "never"}
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, check=True, text=True, stdout=subprocess.PIPE
    ).stdout


def interpreter(version: str) -> str | None:
    """This machine's Python of a version: the one that its name starts, under pyenv too, or one that uv knows."""
    asked = [f"python{version}", "-c", "import sys; print(sys.executable)"]
    try:
        return subprocess.check_output(
            asked, env={**os.environ, "PYENV_VERSION": version}, text=True, stderr=subprocess.DEVNULL
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        pass
    try:
        return uv("python", "find", "--quiet", version).strip()
    except subprocess.CalledProcessError:
        return None


def installed(environment: Environment, python: str) -> Path:
    """The interpreter of an environment made anew: first what users get, then what the tests need besides."""
    folder = FOLDER / environment.name
    shutil.rmtree(folder, ignore_errors=True)
    uv("venv", "--quiet", "--python", python, folder)
    inside = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    overrides = folder / "overrides.txt"
    overrides.write_text("\n".join([WITHOUT_RAY, *environment.overrides]))
    install = ["pip", "install", "--quiet", "--python", inside, "--override", overrides, "-r", "pyproject.toml"]
    uv(*install, "--resolution", "lowest-direct" if environment.lowest else "highest")
    uv(*install, "--extra", "test")
    return inside


def tested(environment: Environment, python: Path, processes: str) -> dict[str, str]:
    """A column of the table."""
    packages = {
        each["name"]: each["version"]
        for each in json.loads(uv("pip", "list", "--quiet", "--format=json", "--python", python))
    }
    report, said = FOLDER / f"{environment.name}.xml", FOLDER / f"{environment.name}.txt"
    report.unlink(missing_ok=True)
    command = [python, "-m", "pytest", "-q", "--tb=short", "-rs", *TESTS, f"--junitxml={report}"]
    command += ["--numprocesses", processes, "--dist", "loadfile", "--no-loadscope-reorder"]
    settings = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with said.open("w") as output:
        subprocess.run(command, cwd=REPOSITORY, env=settings, stdout=output, stderr=subprocess.STDOUT)
    column = {"": environment.name, "Python": full_version(python)}
    column |= {name: packages[name] for name in DIRECT}
    if not report.exists():  # it did not come to tests
        print(said.read_text()[-5000:])
        return column | {"passed": "0", "failed": "all", "skipped": "0"}
    [suite] = ElementTree.parse(report).getroot().iter("testsuite")
    count = {key: int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    if failed:
        print(said.read_text()[-20_000:])
    return column | {
        "passed": str(count["tests"] - failed - count["skipped"]),
        "failed": str(failed),
        "skipped": str(count["skipped"]),
    }


def full_version(python: Path) -> str:
    return subprocess.check_output(
        [python, "-c", "import platform; print(platform.python_version())"], text=True
    ).strip()


def table(columns: list[dict[str, str]]) -> str:
    rows = [[head, *(column[head] for column in columns)] for head in ("", "Python", *DIRECT, *COUNTS)]
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.versions", description="The tests with other versions.")
    names = [environment.name for environment in ENVIRONMENTS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; all, if none is named")
    parser.add_argument("--processes", default="2", help="test processes beside each other (2)")
    parser.add_argument(
        "--into", type=Path, metavar="PAGE", help=f"write the table between {START} and {END} of a page"
    )
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(names):
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(names)}")

    FOLDER.mkdir(parents=True, exist_ok=True)
    columns: list[dict[str, str]] = []
    for environment in ENVIRONMENTS:
        if arguments.names and environment.name not in arguments.names:
            continue
        if (python := interpreter(environment.python)) is None:
            print(f"{environment.name}: left out, there is no Python {environment.python} here", flush=True)
            continue
        begun = time.monotonic()
        columns.append(tested(environment, installed(environment, python), arguments.processes))
        outcome = ", ".join(f"{columns[-1][count]} {count}" for count in COUNTS)
        print(f"{environment.name}: {outcome}, in {time.monotonic() - begun:.0f} s", flush=True)
    print(f"\n{table(columns)}")
    if arguments.into and columns:
        page = arguments.into.read_text(encoding="utf-8")
        before, after = page.partition(START)[0], page.partition(END)[2]
        arguments.into.write_text(f"{before}{START}\n{table(columns)}\n{END}{after}", encoding="utf-8")
    return 0 if columns and all(column["failed"] == "0" for column in columns) else 1


if __name__ == "__main__":
    sys.exit(main())
