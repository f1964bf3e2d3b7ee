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

from benchmarks.measure import ratios

_PLAIN_NUMBERS = FuncFormatter(lambda value, _: f"{value:,.0f}")
_OURS, _UPSTREAM, _CEILING, _CPU = "#1f77b4", "#b0b0b0", "#2ca02c", "#ff7f0e"


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the charts that the results have numbers for."""
    series = results["series"]
    drawn = []
    if {"bulk", "searches", "lite"} <= series.keys():
        drawn.append(_throughput(series, results["machine"], folder / "throughput.png"))
    if "clients" in series:
        drawn.append(_clients(series["clients"], folder / "clients.png"))
    if "latency" in series:
        drawn.append(_latency(series["latency"], folder / "latency.png"))
    if "sizes" in series:
        drawn.append(_cost_per_row(series["sizes"], folder / "cost_per_row.png"))
    if "ingestion-memory" in series:
        drawn.append(_memory(series["ingestion-memory"], folder / "ingestion_memory.png"))
    if "ingestion-stages" in series:
        drawn.append(_stages(series["ingestion-stages"], folder / "ingestion_stages.png"))
    return drawn


def _throughput(series: dict[str, Any], machine: dict[str, Any], path: Path) -> Path:
    bulk, searches, lite = series["bulk"], series["searches"], series["lite"]
    figure, (first, second, third) = plt.subplots(1, 3, figsize=(13, 4.6))
    written = bulk["seconds"]
    _bars(
        first,
        f"Milvus server\n{bulk['count']:,} nodes in one call, nodes/s",
        bulk["count"],
        {
            "plain store": (written["upstream, one call"], _UPSTREAM),
            "this package": (written["ours, one call"], _OURS),
            "ceiling": (written[bulk["ceiling"]], _CEILING),
        },
    )
    found = searches["seconds"]["Bounded"]
    _bars(
        second,
        f"Milvus server\n{searches['count']:,} searches at once, searches/s",
        searches["count"],
        {
            "plain store": (found["upstream, async"], _UPSTREAM),
            "this package": (found["ours, async"], _OURS),
            "ceiling": (found[searches["ceiling"]], _CEILING),
        },
    )
    _bars(
        third,
        f"Milvus Lite, {lite['rows']:,} rows\n{lite['count']:,} searches at once, searches/s",
        lite["count"],
        {
            "plain store": (lite["searches"]["upstream"], _UPSTREAM),
            "this package": (lite["searches"]["ours"], _OURS),
        },
    )
    figure.text(
        0.5,
        0.01,
        "Ceiling: the same requests, built beforehand, sent as fast as the server takes them. Medians, lowest and "
        f"highest round. {machine['cores']} cores for client and server together, Milvus {machine['milvus']},\n"
        f"{series['dim']} dimensions, cosine, consistency Session (writes) and Bounded (searches), 3 hits each.",
        ha="center",
        fontsize=8.5,
        color="#444444",
    )
    return _save(figure, path, bottom=0.09)


def _bars(axes: Axes, title: str, count: int, bars: dict[str, tuple[list[float], str]]) -> None:
    rates = {name: [count / taken for taken in seconds] for name, (seconds, _) in bars.items()}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    below = [medians[name] - min(values) for name, values in rates.items()]
    above = [max(values) - medians[name] for name, values in rates.items()]
    colors = [color for _, color in bars.values()]
    drawn = axes.bar(list(bars), list(medians.values()), color=colors, yerr=[below, above], capsize=3)
    ours, plain = rates["this package"], rates["plain store"]
    factor = statistics.median(ratios(ours, plain))  # as in the table
    labels = [f"{rate:,.0f}" + (f"\n{factor:.1f}x" if name == "this package" else "") for name, rate in medians.items()]
    axes.bar_label(drawn, labels, padding=4)
    axes.set_title(title, fontsize=10)
    axes.margins(y=0.22)
    axes.yaxis.set_major_formatter(_PLAIN_NUMBERS)
    axes.spines[["top", "right"]].set_visible(False)


def _clients(series: dict[str, Any], path: Path) -> Path:
    """What clients feel that search one after the other: how many are answered, and after how long."""
    figure, (first, second, third) = plt.subplots(1, 3, figsize=(13, 4))
    sides = {"plain store": ("upstream", _UPSTREAM), "this package": ("ours", _OURS)}
    alone, beside = series["clients"], series["beside"]
    for axes, title, key, scale in (
        (first, "64 clients: searches answered per second", "rate", 1.0),
        (second, "64 clients: 99th percentile of a search, ms", "p99", 1e3),
    ):
        _medians(axes, title, {name: [r[key] * scale for r in alone[of]] for name, (of, _) in sides.items()})
    _medians(
        third,
        "8 clients beside a bulk write: 99th percentile, ms",
        {name: [r["p99"] * 1e3 for r in beside[f"{of} beside {of}"]] for name, (of, _) in sides.items()},
    )
    return _save(figure, path)


def _medians(axes: Axes, title: str, values: dict[str, list[float]]) -> None:
    medians = [statistics.median(of) for of in values.values()]
    spread = [[m - min(of) for m, of in zip(medians, values.values(), strict=True)]]
    spread.append([max(of) - m for m, of in zip(medians, values.values(), strict=True)])
    drawn = axes.bar(list(values), medians, color=[_UPSTREAM, _OURS], yerr=spread, capsize=3, width=0.6)
    axes.bar_label(drawn, [f"{median:,.0f}" for median in medians], padding=4)
    axes.set_title(title, fontsize=10)
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)


def _latency(series: dict[str, Any], path: Path) -> Path:
    figure, (first, second) = plt.subplots(1, 2, figsize=(12, 4.5))
    for name, color in (("upstream", "#7f7f7f"), ("ours", _OURS)):
        label = {"upstream": "plain store", "ours": "this package"}[name]
        concurrencies = sorted(int(concurrency) for concurrency in series[name])
        for share, style in (("p50", "-o"), ("p95", "--o")):
            values = [_at(series[name], concurrency)[share] * 1e3 for concurrency in concurrencies]
            first.plot(concurrencies, values, style, color=color, label=f"{label}, {share}", markersize=4)
        rates = [_at(series[name], concurrency)["rate"] for concurrency in concurrencies]
        second.plot(concurrencies, rates, "-o", color=color, label=label, markersize=4)
    first.set(xscale="log", yscale="log", xlabel="clients that search one after the other", ylabel="latency in ms")
    second.set(xscale="log", xlabel="clients that search one after the other", ylabel="searches per second")
    for axes, title in ((first, "Latency of one search (Bounded)"), (second, "Searches answered per second")):
        axes.xaxis.set_major_formatter(_PLAIN_NUMBERS)
        axes.yaxis.set_major_formatter(_PLAIN_NUMBERS)
        axes.set_title(title, fontsize=11)
        axes.grid(alpha=0.3)
        axes.legend()
    second.set_ylim(bottom=0)
    return _save(figure, path)


def _cost_per_row(series: dict[str, Any], path: Path) -> Path:
    figure, axes = plt.subplots(figsize=(7.5, 4.5))
    for key, label, color in (
        ("upstream_seconds_per_row", "plain store, wall time", _UPSTREAM),
        ("upstream_cpu_seconds_per_row", "plain store, client CPU", "#d9b08c"),
        ("seconds_per_row", "this package, wall time", _OURS),
        ("ready_made_seconds_per_row", "ready-made requests, wall time", _CEILING),
        ("cpu_seconds_per_row", "this package, client CPU", _CPU),
    ):
        sizes = sorted(int(size) for size in series.get(key, ()))
        if not sizes:
            continue
        costs = [[cost * 1e6 for cost in _at(series[key], size)] for size in sizes]
        axes.plot(sizes, [statistics.median(values) for values in costs], "-o", color=color, label=label)
        axes.fill_between(sizes, [min(v) for v in costs], [max(v) for v in costs], color=color, alpha=0.15)
    axes.set(xscale="log", xlabel="rows in one call", ylabel="µs per row")
    axes.xaxis.set_major_formatter(_PLAIN_NUMBERS)
    axes.set_ylim(0, 1.4 * axes.get_ylim()[1])  # room for the legend
    axes.set_title("Cost of a row against the size of the write", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", ncols=2, fontsize=9)
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


def _save(figure: Any, path: Path, bottom: float = 0.0) -> Path:
    figure.tight_layout(rect=(0, bottom, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
