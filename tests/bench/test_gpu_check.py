"""bench/gpu_check.sh without a GPU: its parts with a Python that only says what it was asked, and the benches' refusals."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

# In the place of Python: one part fails, one stands still, all say that they began.
STAND_IN = """#!/bin/sh
echo "began $*"
case "$*" in *prefill*) exit 3;; *decode_gpu*) sleep 60;; esac
echo "ended"
"""


def test_every_part_runs_whatever_became_of_those_before(tmp_path):
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    out = tmp_path / "out"
    done = subprocess.run(
        [ROOT / "bench" / "gpu_check.sh", out],
        capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHON": str(stand_in), "DECODE_S": "2"},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    told = {line.split(":")[0]: line.split(": ")[1] for line in (out / "summary").read_text().splitlines()}
    assert list(told) == ["tests", "decode", "prefill", "kernels", "clients"]
    assert told["decode"].startswith("exit code 124, cut short")
    assert told["prefill"].startswith("exit code 3,")
    assert {told[name].split(",")[0] for name in ("tests", "kernels", "clients")} == {"exit code 0"}
    for name, asked in (
        ("tests", "-m pytest -n 8 -ra -p no:cacheprovider -p no:benchmark -m gpu"),
        ("decode", "bench/decode_gpu.py --record --steps 60"),
    ):
        assert (out / f"{name}.log").read_text().startswith(f"began {asked}")
    assert (out / "clients.log").read_text().endswith("ended\n")
    assert (out / "decode_gpu.jsonl").read_bytes() == (ROOT / "bench" / "results" / "decode_gpu.jsonl").read_bytes()


def test_the_parts_fit_into_ten_minutes():
    text = (ROOT / "bench" / "gpu_check.sh").read_text()
    limits = [int(seconds) for seconds in re.findall(r"\$\{[A-Z]+_S:-(\d+)\}", text)]
    assert len(limits) == 5
    assert sum(limits) <= 570


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
@pytest.mark.parametrize("name", ["decode_gpu", "prefill_gpu"])
def test_without_a_gpu_the_benches_say_so(name, monkeypatch, capsys):
    bench = pytest.importorskip(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--record"])
    with pytest.raises(SystemExit) as refused:
        bench.main()
    assert refused.value.code == 1
    assert capsys.readouterr().err.startswith(f"bench/{name}.py needs an NVIDIA GPU")
