"""The committed stubs are what the .proto makes."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

PROTO = Path(__file__).parents[1] / "proto"
SOURCE = "hga_kvd_proto/v1/kvd.proto"
TOOLS = "1.78.0"  # the oldest grpcio that the stubs must work with


def tools_version():
    try:
        return importlib.metadata.version("grpcio-tools")
    except importlib.metadata.PackageNotFoundError:
        return None


@pytest.mark.skipif(tools_version() != TOOLS, reason=f"needs grpcio-tools {TOOLS}, found {tools_version()}")
def test_stubs_are_up_to_date(tmp_path):
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", "-I", PROTO),
            *(f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", f"--grpc_python_out={tmp_path}", SOURCE),
        ],
        cwd=PROTO,
        check=True,
        timeout=60,
    )
    made = sorted((tmp_path / SOURCE).parent.iterdir())
    assert [path.name for path in made] == ["kvd_pb2.py", "kvd_pb2.pyi", "kvd_pb2_grpc.py"]
    for path in made:
        committed = (PROTO / SOURCE).with_name(path.name)
        assert path.read_text() == committed.read_text(), f"{committed.name} is out of date: run make proto"
