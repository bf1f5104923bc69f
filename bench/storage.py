"""`hga-kvd bench`, and its numbers as one line in bench/results/storage.jsonl.

    python bench/storage.py decode burst --trace routed_trace.npz --nvme build

All arguments are those of `hga-kvd bench`, but --json. See hga_kvd/bench for what is measured and how.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import results


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "numbers.json"
        code = subprocess.run(
            [sys.executable, "-m", "hga_kvd", "bench", *arguments, "--json", str(path)], check=False
        ).returncode
        if code:
            return code
        document = json.loads(path.read_text())
    directory = Path(arguments[arguments.index("--nvme") + 1]) if "--nvme" in arguments else Path.cwd()
    for case in document["cases"]:
        case["gb_per_s"] = [round(value, 4) for value in case["gb_per_s"]]
    numbers = {"memcpy_gb_per_s": document["memcpy_gb_per_s"], "cases": document["cases"]}
    way = {"transport": document["transport"], "landing": document["landing"]}
    results.append("storage", {**document["options"], **way}, numbers, directory)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
