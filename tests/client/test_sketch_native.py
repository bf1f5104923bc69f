"""Routing in C gives what its twin in PyTorch gives, for any sizes and any bytes; and once more under the sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hga_kvd_client import native
from hga_kvd_client.sketch import SketchSpec, log_mass, log_mass_twin
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(native.LIBRARY is None, reason=f"native code is {native.STATE}")


@st.composite
def specs(draw):
    dim = draw(st.sampled_from([4, 5, 16, 64, 80, 96, 128, 256, 512]))
    four = draw(st.integers(0, dim))
    two = draw(st.integers(0 if four else 1, dim - four))
    groups = draw(st.sampled_from([1, 2, 4]))
    return SketchSpec(dim, four, two, 16 * groups, 16, draw(st.sampled_from([1, groups])))


@settings(max_examples=60)
@given(specs(), st.integers(1, 3), st.integers(1, 9), st.integers(1, 5), st.integers(0, 2), st.integers(0, 2**31))
def test_as_the_twin(spec, kv_heads, queries, chunks, before, seed):
    """Of any bytes, in a slice of a larger buffer as a session's sketches are. e4m3's own NaN counts as 480 in both."""
    generator = torch.Generator().manual_seed(seed)
    shape = (kv_heads, before + chunks + 1, spec.chunk_bytes)
    records = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)[:, before : before + chunks]
    # Of bytes like these, scores are some hundred thousand times as large as z.
    z = torch.randn(kv_heads, queries, spec.head_dim, generator=generator) * 1e-3
    offset = torch.randn(kv_heads, queries, generator=generator)
    ours, theirs = log_mass(spec, z, offset, records), log_mass_twin(spec, z, offset, records)
    assert ours.shape == theirs.shape == (kv_heads, queries, chunks * spec.groups_per_chunk)
    # Sums of up to 512 products of 480 x 480 x 7.5: float32 in another order.
    sizes = 1 + 480 * 15 * z.abs().sum(2, keepdim=True)
    assert bool(((ours - theirs).abs() <= 2e-6 * 480 * sizes.clamp(max=1e9)).all())


def test_as_the_twin_where_scores_are_those_of_keys():
    from hga_kvd_client.sketch import Basis, encode  # noqa: PLC0415

    torch.manual_seed(0)
    spec, none = SketchSpec.of_basis(64), Basis.none(3, 64, torch.device("cpu"))
    records = encode(spec, none, torch.randn(40, 3, 64, 64)).transpose(0, 1)
    z, offset = torch.randn(3, 7, 64) * 3, torch.randn(3, 7)
    torch.testing.assert_close(
        log_mass(spec, z, offset, records), log_mass_twin(spec, z, offset, records), rtol=2e-6, atol=1e-4
    )


def test_far_below_and_not_a_number():
    """A token whose weight is nothing beside another's adds nothing; what is not a number leads to no crash."""
    spec = SketchSpec.of_basis(16)
    records = torch.full((1, 2, spec.chunk_bytes), 0x7E, dtype=torch.uint8)
    records[:, :, : spec.mean_offset] = torch.randint(0, 256, (1, 2, spec.mean_offset), dtype=torch.uint8)
    z, offset = torch.full((1, 1, 16), 3.0), torch.zeros(1, 1)
    ours, theirs = log_mass(spec, z, offset, records), log_mass_twin(spec, z, offset, records)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    for value in (torch.nan, torch.inf, -torch.inf, 3e38):
        assert log_mass(spec, z * 0 + value, offset, records).shape == ours.shape


def test_sizes_that_are_not_served_are_refused():
    assert native.LIBRARY is not None
    some = torch.zeros(4096)
    at = some.data_ptr()
    good = (8, 4, 4, 4, 1)
    for sizes in (
        (8, 5, 4, 4, 1),
        (8, -1, 4, 4, 1),
        (1024, 4, 4, 4, 1),
        (8, 4, 4, 4, 3),
        (8, 4, 4, 0, 1),
        (8, 4, 4, 4, 0),
    ):
        spec = native.Spec(*sizes, native.FLOAT8.data_ptr())
        assert called(spec, at, at, 1, at, 1, 4096, at) == -1
    spec = native.Spec(*good, native.FLOAT8.data_ptr())
    assert called(spec, at, at, 1, at, 1, 207, at) == -1
    assert called(spec, at, at, 1, at, 0, 208, at) == 0


def called(*arguments):
    return native.LIBRARY.free.hga_kvd_log_mass(*arguments)


# Without torch, which takes a minute to be watched. Every buffer is as large as it must be, and not a byte larger.
WATCHED = """
import ctypes, os, random, sys
library = ctypes.CDLL(sys.argv[1])
class Spec(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int64) for n in ("head_dim", "dims4", "dims2", "groups", "blocks")] + [("at", ctypes.c_void_p)]
random.seed(1)
float8 = (ctypes.c_float * 256)(*(random.uniform(-480, 480) for _ in range(256)))
for _ in range(200):
    dim = random.choice([1, 4, 5, 64, 80, 128, 512])
    four = random.randint(0, dim)
    two, groups = random.randint(0, dim - four), random.choice([1, 2, 4])
    blocks, queries, chunks = random.choice([1, groups]), random.randint(0, 9), random.randint(0, 3)
    size = groups * (8 * four + 4 * two) + blocks * (dim + four + two)
    records = ctypes.create_string_buffer(os.urandom(chunks * size), chunks * size)
    z = (ctypes.c_float * (queries * dim))(*(random.choice([0.0, 1e-3, 3e38, float("nan")]) for _ in range(queries * dim)))
    offset, out = (ctypes.c_float * queries)(), (ctypes.c_float * (queries * chunks * groups))()
    spec = Spec(dim, four, two, groups, blocks, ctypes.addressof(float8))
    call = lambda size: library.hga_kvd_log_mass(
        ctypes.byref(spec), z, offset, ctypes.c_int64(queries), records, ctypes.c_int64(chunks), ctypes.c_int64(size), out)
    assert call(size) == 0
    assert call(size - 1) == -1
print("watched")
"""


def test_under_the_sanitizers(tmp_path: Path) -> None:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no gcc")
    source, library = Path(str(native.__file__)).parent / "native.c", tmp_path / "native.so"
    flags = ["-std=gnu11", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-shared", "-fPIC"]
    build = [compiler, *flags, "-o", str(library), str(source), "-lm"]
    built = subprocess.run(build, capture_output=True, text=True, check=False)
    found = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    if built.returncode or not Path(found.stdout.strip()).is_absolute():
        pytest.skip(f"gcc has no sanitizers here: {built.stderr[-200:]}")
    watched = {"LD_PRELOAD": found.stdout.strip(), "PYTHONMALLOC": "malloc", "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-c", WATCHED, str(library)]
    ran = subprocess.run(command, env=os.environ | watched, capture_output=True, text=True, check=False, timeout=120)
    assert ran.stdout == "watched\n", ran.stdout + ran.stderr[-4000:]
