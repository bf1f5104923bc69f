"""Breaks the engine on purpose, in a copy of the tree, and shows which test notices: `make mutants`.

Each mutant is one line changed. The tree itself is never touched. A mutant that no test notices fails the command, and
so does one whose line is no longer there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENGINE = ROOT / "kvstore" / "hga_kvd"
ROOTS = ("proto", "kvstore", "client", "model_patch")
# Those that hold the guarantee; the first failure ends the run.
TESTS = tuple(
    f"tests/kvstore/test_{name}.py"
    for name in ("recovery", "found_by_simulation", "adversary", "threads", "simulation", "hot_path")
)
RUN_S = 900  # a mutant that nobody notices runs through all of them


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    line: str
    instead: str


# The first three always; the others in `make mutants`.
MUTANTS = (
    Mutant(
        "skip a sync",
        "segments.py",
        "            self._disk.sync(segment.handle)\n            segment.synced_bytes",
        "            segment.synced_bytes",
    ),
    Mutant(
        "skip a checksum",
        "reads.py",
        "        return wrong\n\n\n@dataclass",
        "        return np.zeros_like(wrong)\n\n\n@dataclass",
    ),
    Mutant("skip a reference count", "index.py", "        self.refs[rows] += 1\n", "        pass\n"),
    Mutant(
        "skip a checksum of summaries",
        "recall.py",
        "bad = read_verified(disk, found.items, destination)",
        "bad = np.zeros_like(read_verified(disk, found.items, destination))",
    ),
    Mutant("skip a checksum in C", "misses.py", "wrong[few] = batch.wrong_items[few]", "wrong[few] = failed"),
    Mutant(
        "believe the ring in C", "misses.py", "return batch.wrong_items\n", "return np.zeros_like(batch.wrong_items)\n"
    ),
    Mutant("keep a reference count", "index.py", "        self.refs[rows] -= 1\n", ""),
    Mutant("leave torn frames", "startup.py", "erase_heads(disk, handle, found.stale)", "pass"),
    # Still a generator: a break that only raises would show nothing.
    Mutant("take torn bodies", "recovery.py", "_body_is_whole(frame)):", "_body_is_whole(frame)) and False:"),
    Mutant("evict an open session", "residency.py", ' and s.state != "open"', ""),
    Mutant("expire a pinned session", "engine.py", "s.ttl_s and not s.pinned and", "s.ttl_s and"),
    Mutant("forget that a manifest may be there", "writeout.py", " or self.unsure:", ":"),
    Mutant("write a list of chunks in pieces", "jobs.py", "run = run if whole else min(run, L", "run = min(run, L"),
    Mutant(
        "believe a row that was used again",
        "jobs.py",
        "alive = table.uid[job.rows] == job.uids",
        "alive = job.uids > 0",
    ),
    Mutant("write a manifest of any size", "writeout.py", "len(content) > MANIFEST_TEXT_BYTES_MAX", "not content"),
    Mutant("take all of the file system", "segments.py", "free_bytes() - self._reserve_bytes", "free_bytes()"),
)


def broken(mutant: Mutant) -> str:
    """The file with the line changed."""
    text = (ENGINE / mutant.file).read_text()
    assert text.count(mutant.line) == 1, f"{mutant.file} has {text.count(mutant.line)} of the line to break"
    return text.replace(mutant.line, mutant.instead)


def caught_by(mutant: Mutant) -> str | None:
    """The test that notices, or None."""
    with tempfile.TemporaryDirectory(prefix="mutant") as directory:
        copy = Path(directory)
        for part in (*ROOTS, "tests", "bench"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__", "peers", "results"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        (copy / ENGINE.relative_to(ROOT) / mutant.file).write_text(broken(mutant))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no", *TESTS]
        paths = os.pathsep.join(str(copy / root) for root in ROOTS)
        done = subprocess.run(
            command, check=False, cwd=copy, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True,
            timeout=RUN_S,
        )  # fmt: skip
    if done.returncode == 0:
        return None
    assert done.returncode == 1, done.stdout + done.stderr
    found = re.search(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
    assert found is not None, done.stdout
    return found[1]


def main() -> int:
    survived = 0
    for mutant in MUTANTS:
        test = caught_by(mutant)
        survived += test is None
        print(f"{mutant.name} ({mutant.file}): {'caught by ' + test if test else 'NOT CAUGHT'}", flush=True)
    return min(survived, 1)


if __name__ == "__main__":
    sys.exit(main())
