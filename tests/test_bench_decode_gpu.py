"""bench/decode_gpu.py still runs: its smoke mode, with a real daemon, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the extra `client` brings triton where it exists")
ROOT = Path(__file__).resolve().parent.parent


def test_smoke(tmp_path):
    out = tmp_path / "rows.json"
    command = [sys.executable, str(ROOT / "bench" / "decode_gpu.py"), "--smoke", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=dict(os.environ), check=False)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())
    assert row["tokens"] == 16384
    assert 0.3 < row["bank_hit_rate"] < 1, "records came from the daemon"
    assert row["transport"] in ("lane", "shared")
