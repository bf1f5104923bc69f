"""Routing on a CPU in C (native.c), called with tensors. The twin is `log_mass_twin` of sketch.py, which runs where LIBRARY
is None: it was not built, HGA_KVD_NATIVE=off, or the processor has no registers of eight floats.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from hga_kvd_proto.native import Native, load
from torch import Tensor

from hga_kvd_client.float8 import widened

VERSION = 1  # as in native.c
DIMS_MAX = 512


class Spec(ctypes.Structure):
    """`spec` of native.c: sizes of a record of groups of 16 tokens."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("head_dim", "dims4", "dims2", "groups", "blocks")),
        ("float8", ctypes.c_void_p),
    )


def _loaded() -> tuple[Native | None, str]:
    library, state = load(Path(__file__).parent, VERSION)
    if library is None or library.held.hga_kvd_wide():
        return library, state
    return None, "off: it is written for processors with AVX2 and FMA"


LIBRARY, STATE = _loaded()
FLOAT8 = widened(torch.arange(256, dtype=torch.uint8)).contiguous()
if LIBRARY is not None:
    LIBRARY.free.hga_kvd_log_mass.restype = ctypes.c_int64
    LIBRARY.free.hga_kvd_log_mass.argtypes = [
        ctypes.POINTER(Spec), ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64,
        ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip


def log_mass(spec: Spec, z: Tensor, offset: Tensor, records: Tensor) -> Tensor:
    """As sketch.log_mass: CPU tensors of the shapes there; records may be a slice of more chunks of more heads."""
    assert LIBRARY is not None
    kv_heads, chunks, chunk_bytes = records.shape
    queries = z.shape[1]
    assert z.shape == (kv_heads, queries, spec.head_dim)
    assert offset.shape == (kv_heads, queries)
    assert z.dtype == offset.dtype == torch.float32
    assert records.dtype == torch.uint8
    z, offset = z.contiguous(), offset.contiguous()
    if records.stride(2) != 1 or records.stride(1) < chunk_bytes:
        records = records.contiguous()
    out = torch.empty(kv_heads, queries, chunks * spec.groups)
    for head in range(kv_heads):
        code = LIBRARY.free.hga_kvd_log_mass(
            spec,
            z.data_ptr() + head * z.stride(0) * 4,
            offset.data_ptr() + head * offset.stride(0) * 4,
            queries,
            records.data_ptr() + head * records.stride(0),
            chunks,
            records.stride(1),
            out.data_ptr() + head * out.stride(0) * 4,
        )
        assert not code, "sizes are checked by the caller"
    return out
