"""Writes the tables of README.md and bench/README.md from bench/results/*.jsonl: no number in them is typed by hand.

    make tables            # or python bench/tables.py; with --check it only says which file is not what it would write

A table stands between `<!-- table NAME -->` and `<!-- end -->`; NAME is one of TABLES. It is made of the newest lines that
it needs, with the machine and commit that made them below it. A test compares the committed files with what is made here.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import results

FILES = ("README.md", "bench/README.md")
MARK = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
Line = dict[str, Any]


def lines(name: str, root: Path) -> list[Line]:
    """All results of a bench, oldest first; of one that never ran, none."""
    path = root / "bench" / "results" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def peers(root: Path) -> str:
    """The newest run at each record size, fastest cold first."""
    made = []
    of_size: dict[int, list[Line]] = {}
    for line in lines("peers", root):
        of_size.setdefault(line["config"]["record_bytes"], []).append(line)
    for size, found in sorted(of_size.items(), reverse=True):
        run = max(line["config"]["run"] for line in found)
        newest = [line for line in found if line["config"]["run"] == run]
        newest.sort(key=lambda line: -statistics.median(line["numbers"].get("cold_gbs", [0])))
        rows = [
            (line["config"]["peer"], _spread(line["numbers"].get("cold_gbs")), _spread(line["numbers"].get("hot_gbs")))
            for line in newest
        ]
        config = newest[0]["config"]
        title = f"{config['batch']} random records of {size >> 10} KiB, GB/s"
        made.append(_table((title, "cold", "hot"), rows) + _made_by(newest[0]))
    return "\n".join(made)


def storage(root: Path) -> str:
    """Of every case of `hga-kvd bench`, the newest run; the replay of a trace counts by its name."""
    newest: dict[tuple[str, str, str, str], tuple[Line, Line]] = {}
    for line in lines("storage", root):
        for case in line["numbers"]["cases"]:
            parameters = case["parameters"]
            key = (case["profile"], case["case"], parameters.get("trace", ""), str(parameters.get("record_bytes", "")))
            newest[key] = (case, line)
    rows = []
    for (profile, name, trace, _), (case, _) in newest.items():
        what = f"{profile}: {name}"
        if trace:
            what += f" ({trace.removesuffix('.npz')}, {case['parameters']['record_bytes'] >> 10} KiB records)"
        latency = case["latency_us"]
        ratio = f"{statistics.median(case['of_reference']):.2f} of {case['reference']}" if case["of_reference"] else ""
        if "p99_over_alone" in case["parameters"] and case["parameters"]["p99_over_alone"] != 1:
            ratio = f"p99 {case['parameters']['p99_over_alone']:.2f} times alone"
        rows.append(
            (what, _spread(case["gb_per_s"]), f"{latency['p50']:.0f} / {latency['p99']:.0f}", ratio, case["limit"])
        )
    heading = ("`hga-kvd bench`", "GB/s", "p50 / p99, us", "beside", "limit")
    last = [line for _, line in newest.values()]
    return _table(heading, rows) + (_made_by(last[-1]) if last else "")


def decode_gpu(root: Path) -> str:
    """The newest run."""
    found = lines("decode_gpu", root)
    rows = []
    for row in found[-1]["numbers"]["rows"] if found else ():
        dense = min(value for name, value in row.items() if name.startswith("dense_"))
        times = (row["total"], dense, row["naive"], row["routing_gpu"], row["attention_gpu"])
        state = f"{100 * row['resident_fraction']:.2f} %"
        rows.append((f"{row['tokens'] >> 10} K", f"{row['bank_hit_rate']:.2f}", *(f"{t:.1f}" for t in times), state))
    heading = (
        "tokens, ms a token",
        "bank's hit rate",
        "total",
        "dense",
        "naive",
        "routing",
        "attention",
        "memory of K/V",
    )
    return _table(heading, rows) + (_made_by(found[-1]) if found else "")


# Rows of the README's table; all others are in bench/README.md.
QUALITY_KINDS = ("window", "hga", "sketch", "oracle")


def quality(root: Path) -> str:
    """The newest table of bench/quality.py: both routers and their bounds."""
    found = _studies(root).get(("table", ""))
    return (_quality([found], QUALITY_KINDS) if found else "") + _through_daemon(root)


def quality_studies(root: Path) -> str:
    """All rows of the newest run of every study of bench/quality.py; what was run of some rows only stands beside it."""
    return _quality(list(_studies(root).values()), ())


def _through_daemon(root: Path) -> str:
    """The newest text that went through patch and daemon, in a sentence."""
    for line in reversed(lines("quality", root)):
        if line["config"]["what"] == "daemon":
            c, n = line["config"], line["numbers"]
            return (
                f"\nThrough the patch and a real daemon, {c['tokens']} tokens behind {c['prompt']:,} of one text, "
                f"{c['row']}: loss {n['loss_daemon']:.5f}, simulated {n['loss_simulated']:.5f}, dense "
                f"{n['loss_dense']:.5f}; groups opened {n['opened_daemon']:,}, simulated {n['opened_simulated']:,}.\n"
            )
    return ""


def _studies(root: Path) -> dict[tuple[str, str], Line]:
    """By name, and by the rows that it was run of (`--only`); without those of which every row was run again later."""
    found = [line for line in lines("quality", root) if "table" in line["numbers"]]
    kept, later = [], set()
    for line in reversed(found):
        rows = {(line["config"]["what"], row["row"]) for row in line["numbers"]["table"]}
        if not rows <= later:
            kept.append(line)
        later |= rows
    return {(line["config"]["what"], line["config"].get("only", "")): line for line in reversed(kept)}


def _quality(studies: list[Line], kinds: tuple[str, ...]) -> str:
    made = []
    for line in studies:
        config = line["config"]
        rows = [
            (
                row["row"],
                f"{row['state']:.1%}",
                f"{row['fetched']:.1%}",
                f"{row['gap_nats']:+.4f}",
                f"{row['gap_standard_error']:.4f}",
            )
            for row in line["numbers"]["table"]
            if not kinds or row["spec"]["kind"] in kinds
        ]
        texts = f"{config['what']}: {line['numbers']['table'][0]['texts']} texts of {config['length']:,} tokens"
        heading = (texts, "state of K/V", "fetched", "loss gap, nats", "standard error")
        under = (
            f"\n<sub>{line['date'][:10]}, commit {line['commit']}, {config['device']}: `{config['command']}`</sub>\n"
        )
        made.append(_table(heading, rows) + under)
    return "\n".join(made)


TABLES: dict[str, Callable[[Path], str]] = {
    "peers": peers,
    "storage": storage,
    "decode_gpu": decode_gpu,
    "quality": quality,
    "quality_studies": quality_studies,
}


def filled(text: str, root: Path) -> str:
    """The text with every table made anew. Raises: KeyError for a name that is not in TABLES."""
    return MARK.sub(lambda match: f"{match[1]}{TABLES[match[2]](root)}{match[3]}", text)


def _spread(values: list[float] | None) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else "-"


def _table(heading: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    rule = ("---", *("---:" for _ in heading[1:]))
    return "".join(f"| {' | '.join(row)} |\n" for row in (heading, rule, *rows))


def _made_by(line: Line) -> str:
    m = line["machine"]
    on = f"{m['cpu']}, {m['cores']} cores, {m['memory_gib']} GiB, {m['disk']}, Linux {m['kernel'].split('-')[0]}"
    if "gpu" in line["config"]:
        on = f"{line['config']['gpu']}, {on}"
    return (
        f"\n<sub>{line['date'][:10]}, commit {line['commit']}, {on}; medians, lowest and highest in brackets.</sub>\n"
    )


def main(check: bool, root: Path = results.ROOT) -> int:
    differ = []
    for name in FILES:
        path = root / name
        text = path.read_text()
        wanted = filled(text, root)
        if wanted != text:
            differ.append(name)
            if not check:
                path.write_text(wanted)
    for name in differ:
        print(f"{name}: {'is not what `make tables` makes of bench/results' if check else 'written'}")
    return 1 if check and differ else 0


if __name__ == "__main__":
    raise SystemExit(main("--check" in sys.argv[1:]))
