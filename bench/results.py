"""What the benches measured, one JSON line a run in bench/results/NAME.jsonl: commit, machine, date, config, numbers.

A number without the machine that made it says nothing, and the machine is described here, the same way for every bench.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def append(bench: str, config: dict[str, Any], numbers: dict[str, Any], directory: Path = ROOT) -> Path:
    """Adds a line to bench/results/`bench`.jsonl; returns that file. `directory` is on the disk that was measured."""
    path = ROOT / "bench" / "results" / f"{bench}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    line = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(directory),
        "config": config,
        "numbers": numbers,
    }
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    return path


def commit() -> str:
    """Short hash of HEAD, `+` when the tree differs from it; `none` outside a repository or before the first commit."""
    head = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    dirty = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return f"{head}{'+' if dirty else ''}" if head else "none"


def machine(directory: Path = ROOT) -> dict[str, Any]:
    cpu = next((line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    memory_kib = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "cpu": cpu or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_kib / (1 << 20)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "disk": disk(directory),
    }


def disk(directory: Path) -> str:
    """`vda ext4 270 GB, logical block 512` of the device that holds `directory`, as far as the system tells."""
    device = directory.stat().st_dev
    block = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    kind = next(
        (f[f.index("-") + 1] for f in map(str.split, _lines("/proc/self/mountinfo")) if f[2] == _pair(device)), "?"
    )
    whole = block if (block / "queue").exists() else block.parent  # a partition has no queue of its own
    model = " ".join(_lines(whole / "device" / "model")).strip()
    logical = "".join(_lines(whole / "queue" / "logical_block_size")).strip()
    sectors = int("".join(_lines(block / "size")) or 0)
    return f"{model or block.name} {kind} {sectors * 512 / 1e9:.0f} GB, logical block {logical or '?'}"


def _pair(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""
