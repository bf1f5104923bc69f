"""The table, the sentences and the plots that the measured cases make."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from hga_kvd.bench.meter import Case, limit


def table(cases: Iterable[Case], memory_gb_per_s: float) -> Table:
    """One line a case: medians over the samples, latencies over all calls."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in ("", "GB/s", "spread", "p50 us", "p99 us", "of ref.", "disk", "s/GB", "limit"):
        # Where the line is too short, names are folded and numbers stay whole.
        made.add_column(heading, justify="left" if heading in ("", "limit") else "right", no_wrap=heading != "")
    profile = ""
    for case in cases:
        if case.profile != profile:
            profile = case.profile
            made.add_row(f"[bold]{profile}[/bold]")
        speeds, ratios = case.over(lambda s: s.gb_per_s), case.over(lambda s: s.of_reference)
        shares = case.over(lambda s: s.disk_bytes / s.bytes)
        cost = case.cpu_s_per_gb()
        made.add_row(
            f"  {case.case}",
            f"{statistics.median(speeds):.2f}",
            f"{min(speeds):.2f}-{max(speeds):.2f}",
            f"{1e6 * case.latency_s(0.5):.0f}",
            f"{1e6 * case.latency_s(0.99):.0f}",
            f"{statistics.median(ratios):.2f}" if ratios else _beside(case),
            f"{statistics.median(shares):.0%}",
            f"{cost:.2f}" if cost is not None else "",
            limit(case.shares(memory_gb_per_s)),
        )
    return made


def _beside(case: Case) -> str:
    ratio = case.parameters.get("p99_over_alone", 1)
    return f"{ratio:.1f}x" if ratio != 1 else ""


def legend(cases: list[Case], memory_gb_per_s: float) -> list[str]:
    """What the columns compare with, and what limits which cases, with the shares of the time that say so."""
    lines = []
    for name in dict.fromkeys(case.reference for case in cases if case.reference):
        of_it = dict.fromkeys(case.profile for case in cases if case.reference == name)
        lines.append(f"of ref., {', '.join(of_it)}: speed over that of {name}, in the same run")
    if any(_beside(case) for case in cases):
        lines.append("of ref., mixed: p99 over that of the same fetches alone, as 1.5x, in the same run")
    for case in cases:
        if "resume_s" in case.parameters:
            lines.append(f"{case.profile}: {1e3 * statistics.median(case.parameters['resume_s']):.0f} ms in all")
        if case.parameters.get("of_fio") and case.call == "step":
            times = 1 / statistics.median(case.parameters["of_fio"])
            lines.append(f"decode: a step takes {times:.2f} times what fio takes for as many reads of a record")
    by_limit: dict[str, list[dict[str, float]]] = {}
    for case in cases:
        shares = case.shares(memory_gb_per_s)
        by_limit.setdefault(limit(shares), []).append(shares)
    for name, found in by_limit.items():
        ranges = ", ".join(f"{part} {_range([s[part] for s in found if part in s])}" for part in found[0])
        lines.append(f"limit {name}, {len(found)} of {len(cases)} cases. Shares of the time: {ranges}")
    return lines


def _range(values: list[float]) -> str:
    return f"{min(values):.0%}" if max(values) - min(values) < 0.01 else f"{min(values):.0%} to {max(values):.0%}"


def document(cases: Iterable[Case], memory_gb_per_s: float, facts: dict[str, Any]) -> dict[str, Any]:
    """What `--json` writes: `facts` (machine, daemon, options) and every case."""
    return {
        **facts,
        "memcpy_gb_per_s": memory_gb_per_s,
        "cases": [case.as_dict(memory_gb_per_s) for case in cases],
    }


def plots(cases: list[Case], directory: Path) -> list[Path]:
    """Latency percentiles of every case; throughput over depth and read size, beside what it is compared with.

    Raises: ImportError without matplotlib.
    """
    import matplotlib as mpl  # noqa: PLC0415  (optional)

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    directory.mkdir(parents=True, exist_ok=True)
    groups: dict[str, list[Case]] = {}
    for case in cases:
        of_burst = f", {case.parameters['from']}" if case.profile == "burst" else ""
        groups.setdefault(case.profile + of_burst, []).append(case)
    rows = -(-len(groups) // 2)
    figure, panels = plt.subplots(rows, 2, figsize=(13, 4.5 * rows), sharex=True, sharey=True, squeeze=False)
    tails = np.logspace(0, 3, 60)  # one call in so many is slower
    for axes, (name, of_group) in zip(panels.flat, groups.items(), strict=False):
        colors = mpl.colormaps["tab20"](np.arange(20))
        for number, case in enumerate(of_group):
            values = [1e6 * case.latency_s(1 - 1 / tail) for tail in tails]
            axes.plot(tails, values, color=colors[number % len(colors)], label=case.case)
        axes.set(ylabel="microseconds a call", xscale="log", yscale="log", title=name)
        axes.set_xticks([1, 2, 10, 100, 1000], ["least", "50", "90", "99", "99.9"])
        axes.tick_params(labelbottom=True)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    for axes in panels.flat[len(groups) :]:
        axes.set_axis_off()
    figure.suptitle("latency by percentile")
    written = [directory / "latency.png"]
    figure.tight_layout()
    figure.savefig(written[0], dpi=110)
    plt.close(figure)

    for origin in ("disk", "ram"):
        curves: dict[int, list[Case]] = {}
        for case in cases:
            if case.profile == "burst" and case.parameters["from"] == origin:
                curves.setdefault(case.parameters["read_bytes"], []).append(case)
        if not curves:
            continue
        figure, axes = plt.subplots(figsize=(7, 5))
        for read_bytes, of_size in curves.items():
            depths = [case.parameters["depth"] for case in of_size]
            ours = [statistics.median(case.over(lambda s: s.gb_per_s)) for case in of_size]
            (line,) = axes.plot(depths, ours, marker="o", label=f"{read_bytes >> 10} KiB")
            theirs = [case.over(lambda s: s.gb_per_s / s.of_reference if s.of_reference else None) for case in of_size]
            if all(theirs):
                medians = [statistics.median(values) for values in theirs]
                label = f"{read_bytes >> 10} KiB, {of_size[0].reference}"
                axes.plot(depths, medians, color=line.get_color(), linestyle="--", marker=".", label=label)
        axes.set(xlabel="reads a fetch", ylabel="GB/s", xscale="log", title=f"burst from {origin}")
        axes.set_xticks(depths, [str(depth) for depth in depths])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        written.append(directory / f"burst_{origin}.png")
        figure.tight_layout()
        figure.savefig(written[-1], dpi=120)
        plt.close(figure)
    return written
