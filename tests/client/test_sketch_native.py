"""Routing and attention in C give what their twins in PyTorch give, for any sizes and bytes; and under the sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hga_kvd_client import native
from hga_kvd_client.attention import decode_attention, window_scores
from hga_kvd_client.bank import Bank
from hga_kvd_client.routing import route_sketch
from hga_kvd_client.sketch import Basis, SketchSpec, encode, log_mass, log_mass_twin, sizes
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
    torch.manual_seed(0)
    spec, none = SketchSpec.of_basis(64), Basis.none(3, 64, torch.device("cpu"))
    records = encode(spec, none, torch.randn(40, 3, 64, 64)).transpose(0, 1)
    z, offset = torch.randn(3, 7, 64) * 3, torch.randn(3, 7)
    torch.testing.assert_close(
        log_mass(spec, z, offset, records), log_mass_twin(spec, z, offset, records), rtol=2e-6, atol=1e-4
    )


def window_of(kv_heads, tokens, dim, generator):
    """K and V as a session's window has them: slices of buffers with room behind."""
    return torch.randn(2, kv_heads, tokens + 3, dim, generator=generator)[:, :, :tokens]


@settings(max_examples=60)
@given(
    kv_heads=st.integers(1, 3), ratio=st.integers(1, 9), dim=st.sampled_from([4, 5, 64, 80, 96, 128, 256]),
    chunks=st.integers(1, 5), window=st.integers(1, 70), budget=st.integers(0, 30), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_routes_as_the_twin(kv_heads, ratio, dim, chunks, window, budget, seed):
    """What is opened has the most mass: the twin's masses say so, up to what float32 cannot tell apart."""
    generator = torch.Generator().manual_seed(seed)
    spec = SketchSpec(dim, dim // 4, dim // 2, 64, 16)
    basis = Basis(
        *torch.randn(2, kv_heads, dim, dim, generator=generator) / dim, torch.randn(kv_heads, dim, generator=generator)
    )
    keys = torch.randn(chunks + 1, kv_heads, 64, dim, generator=generator) * dim**0.5
    records = encode(spec, basis, keys).transpose(0, 1).contiguous()[:, 1:]
    q = torch.randn(kv_heads, ratio, dim, generator=generator)
    window_k = window_of(kv_heads, window, dim, generator)[0]
    opened, near = native.route(sizes(spec), q, 0.3, window_k, basis.to_z, basis.centre, records, budget)
    torch.testing.assert_close(near, window_scores(q, window_k, 0.3), rtol=1e-5, atol=1e-4)
    far = log_mass_twin(spec, *basis.project(q * 0.3), records).view(kv_heads, ratio, -1)
    everything = torch.cat((far, near.logsumexp(2)[..., None]), -1)
    mass = everything.softmax(-1)[..., :-1].sum(1)
    assert int(opened.sum()) == min(budget, mass.numel())
    if opened.any() and not opened.all():
        assert float(mass[opened].min()) >= float(mass[~opened].max()) * (1 - 1e-4) - 1e-9
    wanted = route_sketch(far, near.logsumexp(2), budget)
    assert float(mass[wanted].sum()) == pytest.approx(float(mass[opened].sum()), rel=1e-4, abs=1e-7)


@settings(max_examples=60)
@given(
    kv_heads=st.integers(1, 3), ratio=st.integers(1, 9), dim=st.sampled_from([1, 5, 16, 64, 80, 200, 512]),
    group_tokens=st.sampled_from([4, 16]), slots=st.integers(1, 9), window=st.integers(1, 70),
    spread=st.sampled_from([1.0, 30.0]), known=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_attends_as_the_twin(kv_heads, ratio, dim, group_tokens, slots, window, spread, known, seed):
    generator = torch.Generator().manual_seed(seed)
    bank = Bank(kv_heads, slots, group_tokens, dim, torch.float32, torch.device("cpu"))
    plan = bank.plan(torch.rand(kv_heads, slots, generator=generator) < 0.6, 3, 0)
    fetched = torch.randn(plan.misses, 2, group_tokens, dim, generator=generator)
    kept = bank.keep(plan, fetched if plan.misses else None)
    q = torch.randn(kv_heads, ratio, dim, generator=generator) * spread
    window_k, window_v = window_of(kv_heads, window, dim, generator)
    near = window_scores(q, window_k, 0.2) if known else None
    out = native.attend(q, 0.2, window_k, window_v, near, bank.records, kept.places, plan.counts)
    twin = decode_attention(q, window_k, window_v, 0.2, *bank.gather(plan, kept))
    torch.testing.assert_close(out, twin, rtol=1e-4, atol=2e-5 * spread)


def test_places_outside_the_bank_are_refused():
    q, bank = torch.ones(1, 1, 8), torch.zeros(2, 1, 4, 16, 8)
    window = torch.ones(1, 2, 8)
    for place in (-1, 4, 1 << 40):
        with pytest.raises(AssertionError, match="places are the bank's"):
            native.attend(q, 1.0, window, window, None, bank, np.array([place]), np.array([1]))
    out = native.attend(q, 1.0, window, window, None, bank, np.array([3]), np.array([1]))
    assert out.shape == (1, 1, 8)
    for value in (torch.nan, torch.inf, -torch.inf, 3e38):  # garbage in, and no crash
        native.attend(q * value, 1.0, window, window, None, bank, np.array([3]), np.array([1]))
        opened, _ = native.route(
            sizes(SketchSpec(8, 4, 4)), q * value, 1.0, window, torch.eye(8)[None], torch.zeros(1, 8),
            torch.zeros(1, 3, SketchSpec(8, 4, 4).chunk_bytes, dtype=torch.uint8), 5,
        )  # fmt: skip
        assert int(opened.sum()) == 5


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
    for wrong in (
        (8, 5, 4, 4, 1),
        (8, -1, 4, 4, 1),
        (1024, 4, 4, 4, 1),
        (8, 4, 4, 4, 3),
        (8, 4, 4, 0, 1),
        (8, 4, 4, 4, 0),
    ):
        spec = native.Spec(*wrong, native.FLOAT8.data_ptr())
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
class Seen(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int64) for n in ("kv_heads", "ratio", "head_dim", "window_tokens", "window_apart", "slots",
        "group_tokens")] + [("scale", ctypes.c_float)]
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
    heads, ratio, window = random.randint(1, 2), random.randint(1, 9), random.randint(1, 20)
    slots, count = 3, random.randint(0, 3)
    floats = lambda count: (ctypes.c_float * count)(*(random.choice([0.0, 1e-3, 3e38, float("nan")]) for _ in range(count)))
    n = ctypes.c_int64
    seen = Seen(heads, ratio, dim, window, window * dim, slots, 4, 0.5)
    q, k, near = floats(heads * ratio * dim), floats(heads * window * dim), floats(heads * ratio * window)
    records = ctypes.create_string_buffer(os.urandom(heads * chunks * size), heads * chunks * size)
    budget = random.randint(0, 9)
    heap = (n * min(budget, heads * chunks * groups))()
    opened = (ctypes.c_uint8 * (heads * chunks * groups))()
    scratch = floats((heads + ratio) * chunks * groups + ratio * (dim + 1))
    assert library.hga_kvd_route(
        ctypes.byref(spec), ctypes.byref(seen), q, k, floats(heads * dim * dim), floats(heads * dim), records,
        n(chunks * size), n(chunks), n(size), near, scratch, heap, n(budget), opened) == 0
    assert sum(opened) == len(heap)
    bank, row = [floats(heads * slots * 4 * dim) for _ in "kv"], (window + 4 * count + 7) // 8 * 8
    places = (n * (heads * count))(*(random.randrange(slots) for _ in range(heads * count)))
    counts = (n * heads)(*[count] * heads)
    attend = lambda row: library.hga_kvd_attend(
        ctypes.byref(seen), q, k, k, random.choice([near, None]), *bank, places, counts, n(row), floats(4 * row),
        floats(heads * ratio * dim))
    assert attend(row) == 0
    assert attend(row - 8) == attend(row + 1) == -1
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
