"""The charts, drawn from `results.json`."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

_PLAIN_NUMBERS = FuncFormatter(lambda value, _: f"{value:,.0f}")
_OURS, _UPSTREAM, _CEILING, _CPU = "#1f77b4", "#b0b0b0", "#2ca02c", "#ff7f0e"


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the charts that the results have numbers for."""
    series = results["series"]
    drawn = []
    if {"adds", "bulk", "searches"} <= series.keys():
        drawn.append(_throughput(series, folder / "throughput.png"))
    if "latency" in series:
        drawn.append(_latency(series["latency"], folder / "latency.png"))
    if "sizes" in series:
        drawn.append(_cost_per_row(series["sizes"], folder / "cost_per_row.png"))
    if "ingestion-memory" in series:
        drawn.append(_memory(series["ingestion-memory"], folder / "ingestion_memory.png"))
    if "ingestion-stages" in series:
        drawn.append(_stages(series["ingestion-stages"], folder / "ingestion_stages.png"))
    return drawn


def _throughput(series: dict[str, Any], path: Path) -> Path:
    bulk, adds, searches = series["bulk"], series["adds"], series["searches"]
    figure, (first, second, third) = plt.subplots(1, 3, figsize=(13, 4.2))
    written = bulk["seconds"]
    _bars(
        first,
        f"{bulk['count']:,} nodes in bulk, rows/s",
        bulk["count"],
        {
            "upstream,\none call": (written["upstream, one call"], _UPSTREAM),
            "upstream,\nsemaphore": (written["upstream, batches behind a semaphore"], _UPSTREAM),
            "ours,\none call": (written["ours, one call"], _OURS),
            "ceiling:\nready-made": (written[bulk["ceiling"]], _CEILING),
        },
    )
    count = max(adds["adds"], key=int)
    added = adds["adds"][count]
    _bars(
        second,
        f"{int(count):,} single adds, rows/s",
        int(count),
        {
            "upstream,\nsync": (added["upstream, sync"], _UPSTREAM),
            "upstream,\nasync": (added["upstream, async"], _UPSTREAM),
            "ours,\nsync": (added["ours, sync"], _OURS),
            "ours,\nasync": (added["ours, async"], _OURS),
        },
    )
    found = searches["seconds"]["Bounded"]
    _bars(
        third,
        f"{searches['count']:,} concurrent searches, queries/s",
        searches["count"],
        {
            "upstream,\nasync": (found["upstream, async"], _UPSTREAM),
            "ours,\nasync": (found["ours, async"], _OURS),
            "ceiling:\nready-made": (found[searches["ceiling"]], _CEILING),
        },
    )
    return _save(figure, path)


def _bars(axes: Axes, title: str, count: int, bars: dict[str, tuple[list[float], str]]) -> None:
    rates = {name: [count / taken for taken in seconds] for name, (seconds, _) in bars.items()}
    medians = [statistics.median(values) for values in rates.values()]
    below = [median - min(values) for median, values in zip(medians, rates.values(), strict=True)]
    above = [max(values) - median for median, values in zip(medians, rates.values(), strict=True)]
    drawn = axes.bar(list(bars), medians, color=[color for _, color in bars.values()], yerr=[below, above], capsize=3)
    axes.bar_label(drawn, [f"{median:,.0f}" for median in medians], padding=4)
    axes.set_title(title, fontsize=11)
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)


def _latency(series: dict[str, Any], path: Path) -> Path:
    figure, axes = plt.subplots(figsize=(7.5, 4.5))
    for name, color in (("upstream", "#7f7f7f"), ("ours", _OURS)):
        concurrencies = sorted(int(concurrency) for concurrency in series[name])
        for share, style in (("p50", "-o"), ("p95", "--o")):
            values = [_at(series[name], concurrency)[share] * 1e3 for concurrency in concurrencies]
            axes.plot(concurrencies, values, style, color=color, label=f"{name}, {share}", markersize=4)
    axes.set(xscale="log", yscale="log", xlabel="searches at the same time", ylabel="latency in ms")
    axes.xaxis.set_major_formatter(_PLAIN_NUMBERS)
    axes.yaxis.set_major_formatter(_PLAIN_NUMBERS)
    axes.set_title("Latency of one search against concurrency (Bounded)", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend()
    return _save(figure, path)


def _cost_per_row(series: dict[str, Any], path: Path) -> Path:
    figure, axes = plt.subplots(figsize=(7.5, 4.5))
    for key, label, color in (
        ("seconds_per_row", "ours, wall time", _OURS),
        ("ready_made_seconds_per_row", "ready-made requests, wall time", _CEILING),
        ("cpu_seconds_per_row", "ours, client CPU", _CPU),
    ):
        sizes = sorted(int(size) for size in series[key])
        costs = [[cost * 1e6 for cost in _at(series[key], size)] for size in sizes]
        axes.plot(sizes, [statistics.median(values) for values in costs], "-o", color=color, label=label)
        axes.fill_between(sizes, [min(v) for v in costs], [max(v) for v in costs], color=color, alpha=0.15)
    axes.set(xscale="log", xlabel="rows in one call", ylabel="µs per row")
    axes.xaxis.set_major_formatter(_PLAIN_NUMBERS)
    axes.set_ylim(bottom=0)
    axes.set_title("Cost of a row against the size of the write", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend()
    return _save(figure, path)


def _memory(series: dict[str, Any], path: Path) -> Path:
    figure, axes = plt.subplots(figsize=(7.5, 4.5))
    for curve, color, label in (
        (series["plain"]["curve"], _UPSTREAM, "`pipeline.arun`, plain store"),
        (series["curve"], _OURS, "`aingest`"),
    ):
        axes.plot([nodes for nodes, _ in curve], [size for _, size in curve], "-", color=color, label=label)
    axes.set(xlabel="nodes embedded", ylabel="resident memory of the process in MB")
    axes.xaxis.set_major_formatter(_PLAIN_NUMBERS)
    axes.yaxis.set_major_formatter(_PLAIN_NUMBERS)
    axes.set_ylim(bottom=0)
    axes.set_title(f"Memory while {series['count']:,} nodes of a generator's documents are ingested", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend()
    return _save(figure, path)


def _stages(series: dict[str, Any], path: Path) -> Path:
    figure, all_axes = plt.subplots(len(series), 1, figsize=(10, 2.9 * len(series)), squeeze=False)
    names = ("read", "look-up", "transform", "embed", "write", "settle")
    for axes, runs in zip(all_axes[:, 0], series.values(), strict=True):
        for place, name in enumerate(names):
            spans = [(begin, end - begin) for stage, begin, end in runs["spans"] if stage == name]
            axes.broken_barh(spans, (place - 0.38, 0.76), color=_OURS)
        slowest = max(statistics.median(runs["seconds"][name]["wall"]) for name in ("split", "embed", "write"))
        axes.axvline(slowest, color=_CPU, linestyle="--")
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel("seconds since the run began")
        title = f"When each stage was at work: {runs['name']} (dashed: the slowest stage alone, {slowest:.1f} s)"
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, path)


def _at(series: dict[Any, Any], key: int) -> Any:
    return series[key] if key in series else series[str(key)]


def _save(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
