"""The native libraries are used where they were built from this tree's sources, and only then; the package says which."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import hga_kvd
import hga_kvd_client
import hga_kvd_proto
import pytest
from hga_kvd import native as store_native
from hga_kvd_client import native as client_native
from hga_kvd_proto import native
from hga_kvd_proto.native import load

NAME = "_native.abi3.so"
HAS_COMPILER = shutil.which("cc") is not None
built = pytest.mark.skipif(not HAS_COMPILER, reason="no C compiler")


@built
@pytest.mark.parametrize("module", [native, store_native, client_native])
def test_it_is_built_and_of_this_version(module: object) -> None:
    if os.environ.get("HGA_KVD_NATIVE") == "off":
        pytest.skip("HGA_KVD_NATIVE=off")
    assert module.STATE == "on"  # type: ignore[attr-defined]


def test_what_is_not_there_is_not_used(tmp_path: Path) -> None:
    library, state = load(tmp_path, 1)
    assert library is None
    assert state.startswith("off: not built")


def test_what_is_no_library_is_not_used(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"garbage")
    library, state = load(tmp_path, 1)
    assert library is None
    assert state.startswith("off: cannot be loaded")


@built
@pytest.mark.parametrize("package", [hga_kvd, hga_kvd_client, hga_kvd_proto])
def test_another_version_is_not_used(package: object) -> None:
    directory = Path(str(package.__file__)).parent  # type: ignore[attr-defined]
    library, state = load(directory, 1 << 40)
    assert library is None
    assert "`make native`" in state


def test_it_can_be_switched_off() -> None:
    code = "from hga_kvd import native; print(native.LIBRARY, native.STATE)"
    environment = {**os.environ, "HGA_KVD_NATIVE": "off"}
    said = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert said.stdout.strip() == "None off: HGA_KVD_NATIVE says so"
