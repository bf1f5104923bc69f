"""native.c's rings under the sanitizers: every wait is ended by its ring, and who sees a counter sees what it counts."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import hga_kvd_proto
import pytest

# gcc knows fences, its thread sanitizer does not: it says so, and takes them for nothing. Counters do not need them.
KINDS = {"address,undefined": [], "thread": ["-Wno-tsan"]}


@pytest.mark.parametrize("kind", KINDS)
def test_two_clients_and_a_hostile_one(tmp_path: Path, kind: str) -> None:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no gcc")
    sources = Path(str(hga_kvd_proto.__file__)).parent
    flags = ["-std=gnu11", "-O1", "-g", "-pthread", f"-fsanitize={kind}", "-fno-sanitize-recover=all", *KINDS[kind]]
    program = tmp_path / "rings"
    driver = Path(__file__).with_name("rings.c")
    command = [compiler, *flags, f"-I{sources}", "-o", str(program), str(driver)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cannot find" in built.stderr:
        pytest.skip(f"gcc has no such sanitizer here: {built.stderr[-200:]}")
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([str(program)], capture_output=True, text=True, check=False, timeout=120)
    if "unexpected memory mapping" in ran.stderr:
        pytest.skip("the thread sanitizer cannot run with this kernel's address layout")
    assert (ran.returncode, ran.stdout) == (0, "sound\n"), ran.stderr
