"""The results as text: the table on the terminal and in the documentation, and the machine they were measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any

import psutil
from pymilvus import MilvusClient

START, END = "<!-- bench:start -->", "<!-- bench:end -->"
_PACKAGES = ("llama-index-core", "llama-index-vector-stores-milvus", "pymilvus", "milvus-lite", "grpcio")
_HEADINGS = ("workload", "against", "target", "measured", "spread", "")


def describe_machine(client: MilvusClient, load_before: float) -> dict[str, Any]:
    """What the results depend on, without a name of the machine itself."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "system": platform.system(),
        "python": platform.python_version(),
        "milvus": client.get_server_version().removeprefix("v").removesuffix("-lite"),  # the PyPI build's own suffix
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "load_before": round(load_before, 2),
    }


def table(figures: list[dict[str, Any]]) -> str:
    """The lines of the table, in columns."""
    lines = [_HEADINGS, *(_cells(figure) for figure in figures)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADINGS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def markdown(results: dict[str, Any]) -> str:
    """The table for the documentation."""
    machine = results["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    rounds = min(len(figure["rounds"]) for figure in results["figures"] if len(figure["rounds"]) > 1)
    lines = [
        f"Measured on {machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, {machine['system']}, with "
        f"Milvus {machine['milvus']} on the same machine, Python {machine['python']}, {packages}. Medians of "
        f"{rounds} rounds or more in which the sides take turns; spread: the lowest and the highest round."
        + (" A quick run, with smaller sizes." if results["is_quick"] else ""),
        "",
        "| " + " | ".join((*_HEADINGS[:-1], "reached")) + " |",
        "| --- | --- | --- | --- | --- | --- |",
        *("| " + " | ".join(_cells(figure)) + " |" for figure in results["figures"]),
    ]
    return "\n".join(lines)


def update(page: Path, results: dict[str, Any]) -> None:
    """Replace what stands between a page's two markers.

    Raises:
        ValueError: The markers are not there.
    """
    before = page.read_text(encoding="utf-8")
    pattern = re.compile(re.escape(START) + ".*" + re.escape(END), re.DOTALL)
    if not pattern.search(before):
        raise ValueError(f"{page.name} needs the lines {START} and {END}, to have the table put between them")
    block = f"{START}\n{markdown(results)}\n{END}"
    page.write_text(pattern.sub(lambda _: block, before), encoding="utf-8")


def _cells(figure: dict[str, Any]) -> tuple[str, ...]:
    bound = "" if figure["target"] is None else ("≤ " if figure["is_lower_better"] else "≥ ")
    target = "" if figure["target"] is None else bound + _shown(figure["target"], figure["unit"])
    spread = f"{_shown(figure['lowest'], figure['unit'])} to {_shown(figure['highest'], figure['unit'])}"
    verdict = {True: "yes", False: "MISSED", None: ""}[figure["is_reached"]]
    return (
        figure["workload"],
        figure["against"],
        target,
        _shown(figure["median"], figure["unit"]),
        spread if len(figure["rounds"]) > 1 else "",
        verdict,
    )


def _shown(value: float, unit: str) -> str:
    if unit == "%":
        return f"{value:.0%}"
    if unit == "MB":
        return f"{value:.0f} MB"
    if unit == "/s":
        return f"{value:,.0f}/s"
    return f"{value:.2f}x" if value < 10 else f"{value:.0f}x"


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()
