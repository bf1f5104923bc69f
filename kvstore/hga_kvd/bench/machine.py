"""The machine that a number was measured on, described the same way by every bench."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any


def machine(directory: Path) -> dict[str, Any]:
    """directory: on the disk that was measured."""
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
