"""Runs profiles, shows how far they are, and tells what came out. The one place that knows all profiles."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hga_kvd_client.errors import KvdError
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from hga_kvd import __version__
from hga_kvd.bench import report
from hga_kvd.bench.burst import burst
from hga_kvd.bench.daemon import BenchFailed, Daemon
from hga_kvd.bench.decode import decode
from hga_kvd.bench.machine import machine
from hga_kvd.bench.meter import Case, NothingToMeasure, Stage
from hga_kvd.bench.mixed import mixed
from hga_kvd.bench.options import Options
from hga_kvd.bench.prefill import prefill
from hga_kvd.bench.probes import memcpy_gb_per_s
from hga_kvd.bench.resume import resume

PROFILES: dict[str, Callable[[Daemon, Options], Iterator[Stage | Case]]] = {
    "decode": decode,
    "burst": burst,
    "prefill": prefill,
    "resume": resume,
    "mixed": mixed,
}
LINE_WIDTH = 128  # of the table in a file or a pipe


def measure(
    daemon: Daemon, profiles: list[str], options: Options, directory: Path, as_json: Path | None, plots: Path | None
) -> dict[str, Any]:
    """Prints a table, writes what was asked for, and returns what `--json` writes. Raises: BenchFailed, WrongBytes."""
    console = Console()
    if not console.is_terminal:
        console.width = LINE_WIDTH
    cases: list[Case] = []
    notes: list[str] = []
    bar = (SpinnerColumn(), BarColumn(24), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*bar, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("a memcpy", total=len(profiles))
        memory_gb_per_s = memcpy_gb_per_s()
        try:
            for number, name in enumerate(profiles):
                try:
                    for told in PROFILES[name](daemon, options):
                        if isinstance(told, Case):
                            cases.append(told)
                        else:
                            progress.update(task, description=f"{name}: {told.text}", completed=number + told.done)
                except NothingToMeasure as reason:
                    notes.append(f"{name}: {reason}")
        except KvdError as error:
            raise BenchFailed(f"{type(error).__name__}: {error}") from error
    if not cases:
        raise BenchFailed("; ".join(notes))
    connection = daemon.connect()
    way = {"transport": connection.transport, "landing": "huge pages" if connection.huge_pages else "4 KiB pages"}
    connection.disconnect()
    console.print(report.table(cases, memory_gb_per_s))
    console.print(*report.legend(cases, memory_gb_per_s), *notes, sep="\n", highlight=False)
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "machine": machine(directory),
        **way,
        "options": {f.name: getattr(options, f.name) for f in dataclasses.fields(options) if f.name != "trace"},
    }
    document = report.document(cases, memory_gb_per_s, facts)
    if as_json is not None:
        as_json.write_text(json.dumps(document, indent=1) + "\n")
    if plots is not None:
        try:
            console.print(*(f"wrote {path}" for path in report.plots(cases, plots)), sep="\n")
        except ImportError:
            console.print("no plots: matplotlib is not installed")
    return document
