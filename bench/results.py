"""What the benches measured, one JSON line a run in bench/results/NAME.jsonl: commit, machine, date, config, numbers.

A number without the machine that made it says nothing; this is the only file that writes them.
"""

from __future__ import annotations

import json
import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hga_kvd.bench.machine import machine

ROOT = Path(__file__).resolve().parent.parent


def append(
    bench: str,
    config: dict[str, Any],
    numbers: dict[str, Any],
    directory: Path = ROOT,
    made: dict[str, Any] | None = None,
) -> Path:
    """Adds a line to bench/results/`bench`.jsonl; returns that file. `directory` is on the disk that was measured; `made`
    is the stamp of where and when it was, if not here and now."""
    path = ROOT / "bench" / "results" / f"{bench}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    line = {**(made or stamp(directory)), "config": config, "numbers": numbers}
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    return path


def stamp(directory: Path = ROOT) -> dict[str, Any]:
    """What makes a number worth something: date, commit, machine, load."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(directory),
        # Processes that wanted a core in the last minute, the bench's own included.
        "load": round(os.getloadavg()[0], 1),
    }


def commit() -> str:
    """Short hash of HEAD, `+` when the tree differs from it; `none` outside a repository or before the first commit."""
    head = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    dirty = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return f"{head}{'+' if dirty else ''}" if head else "none"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
