"""Routing and attention of a token on a CPU in C (native.c), called with tensors. The twins run where LIBRARY is None: it
was not built, HGA_KVD_NATIVE=off, or the processor has no registers of eight floats. They are `log_mass_twin` of sketch.py,
`RoutingState.route`, and `decode_attention` over what `Bank.gather` copies together.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from hga_kvd_proto.native import Native, load
from torch import Tensor

from hga_kvd_client.float8 import widened

VERSION = 2  # as in native.c
DIMS_MAX = 512
TOGETHER = 4  # queries


class Spec(ctypes.Structure):
    """`spec` of native.c: sizes of a record of groups of 16 tokens."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("head_dim", "dims4", "dims2", "groups", "blocks")),
        ("float8", ctypes.c_void_p),
    )


class Seen(ctypes.Structure):
    """`seen` of native.c: sizes of what one token attends to in a layer."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("kv_heads", "ratio", "head_dim", "window_tokens", "window_apart", "slots", "group_tokens")
        ),
        ("scale", ctypes.c_float),
    )


def _loaded() -> tuple[Native | None, str]:
    library, state = load(Path(__file__).parent, VERSION)
    if library is None or library.held.hga_kvd_wide():
        return library, state
    return None, "off: it is written for processors with AVX2 and FMA"


LIBRARY, STATE = _loaded()
FLOAT8 = widened(torch.arange(256, dtype=torch.uint8)).contiguous()
_AT, _COUNT = ctypes.c_void_p, ctypes.c_int64
if LIBRARY is not None:
    LIBRARY.free.hga_kvd_route.restype = LIBRARY.free.hga_kvd_attend.restype = ctypes.c_int64
    LIBRARY.free.hga_kvd_route.argtypes = [
        ctypes.POINTER(Spec), ctypes.POINTER(Seen), *[_AT] * 5, *[_COUNT] * 3, *[_AT] * 3, _COUNT, _AT,
    ]  # fmt: skip
    LIBRARY.free.hga_kvd_attend.argtypes = [ctypes.POINTER(Seen), *[_AT] * 8, _COUNT, *[_AT] * 2]
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


def serves(q: Tensor, window_k: Tensor) -> bool:
    """Whether `route` and `attend` do: q [kv_heads, ratio, head_dim]; window_k [kv_heads, tokens, head_dim], as Window.layer
    has it."""
    same = q.dtype == window_k.dtype == torch.float32 and q.device.type == "cpu"
    return LIBRARY is not None and same and 0 < q.shape[2] <= DIMS_MAX and window_k.shape[1] > 0


def route(
    spec: Spec, q: Tensor, scale: float, window_k: Tensor, to_z: Tensor, centre: Tensor, records: Tensor, budget: int
) -> tuple[Tensor, Tensor]:
    """One layer of one token: the groups that route_sketch opens, bool [kv_heads, groups], and window_scores on the way.

    to_z, centre: of the layer's basis; records: as in log_mass.
    """
    assert LIBRARY is not None
    kv_heads, ratio, dim = q.shape
    chunks, chunk_bytes = records.shape[1:]
    assert to_z.shape == (kv_heads, dim, dim)
    assert centre.shape == (kv_heads, dim)
    assert to_z.dtype == centre.dtype == torch.float32
    assert records.dtype == torch.uint8
    assert spec.head_dim == dim
    assert records.shape[0] == kv_heads
    seen = _seen(q, window_k, scale)
    q, to_z, centre = q.contiguous(), to_z.contiguous(), centre.contiguous()
    if records.stride(2) != 1 or records.stride(1) < chunk_bytes:
        records = records.contiguous()
    groups = chunks * spec.groups
    near = torch.empty(kv_heads, ratio, window_k.shape[1])
    scratch = torch.empty((kv_heads + ratio) * groups + ratio * (dim + 1))
    heap = np.empty(min(budget, kv_heads * groups), np.int64)
    opened = torch.zeros(kv_heads, groups, dtype=torch.bool)
    code = LIBRARY.free.hga_kvd_route(
        spec, seen, q.data_ptr(), window_k.data_ptr(), to_z.data_ptr(), centre.data_ptr(), records.data_ptr(),
        records.stride(0), chunks, records.stride(1), near.data_ptr(), scratch.data_ptr(), heap.ctypes.data, budget,
        opened.data_ptr(),
    )  # fmt: skip
    assert not code, "sizes are checked by the caller"
    return opened, near


def attend(
    q: Tensor,
    scale: float,
    window_k: Tensor,
    window_v: Tensor,
    near: Tensor | None,
    bank: Tensor,
    places: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
) -> Tensor:
    """decode_attention over the window and slots of a bank, as they lie. Returns as q: [kv_heads, ratio, head_dim].

    bank: Bank.records; places: slots, of all KV heads in order, counts [kv_heads] of each; near: window_scores, if known.
    """
    assert LIBRARY is not None
    kv_heads, ratio, dim = q.shape
    _, heads, slots, group_tokens, bank_dim = bank.shape
    assert bank.is_contiguous()
    assert (bank.dtype, heads, bank_dim) == (torch.float32, kv_heads, dim)
    assert window_v.shape == window_k.shape
    assert window_v.stride() == window_k.stride()
    assert counts.shape == (kv_heads,)
    assert places.shape == (counts.sum(),)
    assert places.flags.c_contiguous
    assert counts.flags.c_contiguous
    assert near is None or (near.is_contiguous() and near.shape == (kv_heads, ratio, window_k.shape[1]))
    seen = _seen(q, window_k, scale, slots, group_tokens)
    q = q.contiguous()
    row = -(-(window_k.shape[1] + int(counts.max()) * group_tokens) // 8) * 8
    scratch, out = torch.empty(TOGETHER * row), torch.empty(kv_heads, ratio, dim)
    code = LIBRARY.free.hga_kvd_attend(
        seen, q.data_ptr(), window_k.data_ptr(), window_v.data_ptr(), None if near is None else near.data_ptr(),
        bank.data_ptr(), bank[1].data_ptr(), places.ctypes.data, counts.ctypes.data, row, scratch.data_ptr(),
        out.data_ptr(),
    )  # fmt: skip
    assert not code, "places are the bank's"
    return out


def _seen(q: Tensor, window_k: Tensor, scale: float, slots: int = 0, group_tokens: int = 1) -> Seen:
    kv_heads, ratio, dim = q.shape
    heads, tokens, window_dim = window_k.shape
    assert (heads, window_dim) == (kv_heads, dim)
    assert window_k.stride()[1:] == (dim, 1)
    # A single KV head has any stride.
    apart = max(window_k.stride(0), tokens * dim)
    return Seen(kv_heads, ratio, dim, tokens, apart, slots, group_tokens, scale)
