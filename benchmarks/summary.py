"""From raw times to medians, ratios, a table and a chart.

Ratios are taken round by round, between neighbours in time, and then their median: a machine's noise is
mostly slow, and cancels.
"""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LABELS = {
    "roofline": "plain reads and writes",
    "ours": "pma merge",
    "naive": "naive torch loop",
    "mergekit": "mergekit",
}
COLOURS = {"cold": "#5b6b7b", "hot": "#d9730d"}
CACHES = ("cold", "hot")
Measured = Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]  # cache -> name -> rounds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {
        "median": round(statistics.median(values), 4),
        "lowest": round(min(values), 4),
        "highest": round(max(values), 4),
    }


def summarised(measured: Measured) -> dict[str, Any]:
    """Medians of every time and peak, and the ratios to ours."""
    result: dict[str, Any] = {}
    for cache, rounds_by_name in measured.items():
        result[cache] = {
            name: {key: spread([times[key] for times in rounds]) for key in rounds[0]}
            for name, rounds in rounds_by_name.items()
        }
        ours = rounds_by_name["ours"]
        for name, rounds in rounds_by_name.items():
            # the roofline is no command: it stands beside the same part of ours, as our command tells it
            keys = (
                {
                    "stream_seconds": own("stream_seconds", ours),
                    "durable_seconds": own("durable_seconds", ours),
                }
                if name == "roofline"
                else {"seconds": "seconds", "durable_seconds": "durable_seconds"}
            )
            if name != "ours":
                result[f"{name}_over_ours_{cache}"] = {
                    theirs: spread([a[theirs] / b[mine] for a, b in zip(rounds, ours, strict=True)])
                    for theirs, mine in keys.items()
                }
    return result


def own(key: str, ours: Sequence[Mapping[str, float]]) -> str:
    """Where our command tells this time; one that does not is compared by its `seconds`."""
    return f"own_{key}" if f"own_{key}" in ours[0] else "own_seconds"


def machine(mergekit: Mapping[str, str] | None) -> dict[str, Any]:
    """What the numbers depend on. `mergekit`: versions in its environment."""
    processors = Path("/proc/cpuinfo").read_text().splitlines()
    packages = {}
    for name in ("pma-llm", "torch", "numpy", "safetensors"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed as a package"
    return {
        "processor": next((x.split(": ")[1] for x in processors if x.startswith("model name")), "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_GiB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": packages,
        "packages_of_mergekit": mergekit,
    }


def markdown(results: Mapping[str, Any]) -> str:
    """The results as a table for a README."""
    lines = [
        f"| {results['checkpoints']} checkpoints of {results['checkpoint_bytes'] / 1e9:.2f} GB, "
        f"{results['shards']} shards, {results['threads']} threads, {results['machine']['cores']} cores | "
        "cold page cache | hot page cache |",
        "| --- | --- | --- |",
    ]
    ratios = [("roofline", "stream_seconds", "plain reads and writes ÷ streaming part, not synced")]
    ratios += [("roofline", "durable_seconds", "plain reads and writes ÷ streaming part, synced")]
    ratios += [(name, "seconds", f"{LABELS[name]} ÷ ours, whole command") for name in ("naive", "mergekit")]
    ratios += [(n, "durable_seconds", f"{LABELS[n]} ÷ ours, and synced") for n in ("naive", "mergekit")]
    for name, key, label in ratios:
        if name in results["hot"]:
            cells = (_ratio(results[f"{name}_over_ours_{cache}"][key]) for cache in CACHES)
            lines.append(f"| {label} | {' | '.join(cells)} |")
    for name in ("ours", "naive", "mergekit"):
        if name in results["hot"]:
            cells = (f"{results[cache][name]['seconds']['median']:.2f} s" for cache in CACHES)
            lines.append(f"| {LABELS[name]}, whole command | {' | '.join(cells)} |")
            cells = (f"{results[cache][name]['peak_MiB']['median']:.0f} MiB" for cache in CACHES)
            lines.append(f"| {LABELS[name]}, peak memory | {' | '.join(cells)} |")
    if "own_stream_seconds" not in results["hot"]["ours"]:
        lines.append(
            "\n`pma merge` did not tell `stream_seconds`: the first two rows compare with its `seconds`."
        )
    return "\n".join(lines)


def _ratio(found: Mapping[str, float]) -> str:
    return f"{found['median']:.2f} ({found['lowest']:.2f}–{found['highest']:.2f})"


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Bars of median seconds, cold and hot, with the range over the rounds."""
    import altair as alt

    rows = []
    for cache in CACHES:
        for name, times in results[cache].items():
            # the roofline starts no interpreter; its time with the sync is what a whole command cannot beat
            found = times["durable_seconds" if name == "roofline" else "seconds"]
            rows.append({"name": LABELS[name], "cache": f"{cache} page cache", **found})
            rows[-1]["text"] = f"{found['median']:.{1 if found['median'] >= 10 else 2}f} s"
    order, caches = [LABELS[name] for name in results["hot"]], [f"{cache} page cache" for cache in CACHES]
    highest = max(row["highest"] for row in rows)
    base = alt.Chart(alt.Data(values=rows)).encode(
        y=alt.Y(
            "name:N",
            title=None,
            sort=order,
            axis=alt.Axis(labelLimit=300, ticks=False, domain=False, labelPadding=8),
        ),
        yOffset=alt.YOffset("cache:N", sort=caches),
    )
    colour = alt.Color(
        "cache:N",
        title=None,
        scale=alt.Scale(domain=caches, range=list(COLOURS.values())),
        legend=alt.Legend(orient="top", offset=4),
    )
    # room on the right for the numbers
    scale = alt.Scale(domain=[0, 1.12 * highest], nice=False)
    x = alt.X(
        "median:Q", title="seconds, median and range over the rounds", scale=scale, axis=alt.Axis(tickCount=6)
    )
    bars = base.mark_bar(height=16).encode(x=x, color=colour)
    ranges = base.mark_rule(strokeWidth=1.5, color="#222222").encode(x="lowest:Q", x2="highest:Q")
    ends = [
        base.mark_tick(size=8, thickness=1.5, color="#222222").encode(x=f"{e}:Q")
        for e in ("lowest", "highest")
    ]
    texts = base.mark_text(align="left", dx=6, fontSize=11).encode(x="highest:Q", text="text:N")
    title = (
        f"Averaging {results['checkpoints']} bf16 checkpoints of {results['checkpoint_bytes'] / 1e9:.2f} GB, "
        f"{results['machine']['cores']} cores"
    )
    chart = alt.layer(bars, ranges, *ends, texts).properties(width=560, height=52 * len(order), title=title)
    (
        chart.configure_view(stroke=None)
        .configure_axis(gridColor="#e8e8e8", labelFontSize=12, titleFontSize=12, titleFontWeight="normal")
        .configure_axisY(grid=False)
        .configure_title(anchor="start", fontSize=13, fontWeight="normal")
        .configure_legend(labelFontSize=12)
        .save(path, scale_factor=2)
    )
