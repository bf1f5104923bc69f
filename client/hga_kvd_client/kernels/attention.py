"""Decode attention in parts: keys are split, every part gives its own softmax and log-sum-exp, and parts are merged.

A *part* is (out [heads, head_dim], lse [heads]), float32, lse natural; -inf says that the part saw no key, and then out
is undefined. Parts live in buffers out [parts, heads, head_dim] and lse [parts, heads]: each call writes its own rows,
`merge` reads all. So what is resident is attended while the rest travels, and nothing is computed twice.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from hga_kvd_client import float8
from hga_kvd_client.kernels import WINDOW_TOKENS

LN2 = 0.6931471805599453


@triton.jit
def _fp8(bits, NATIVE: tl.constexpr):
    """uint8 as float8 e4m3, in float16. NATIVE: the device can; else its exponent is 8 less biased, so the bits fit,
    subnormal ones too. No NaN is stored."""
    if NATIVE:
        values = bits.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        bits = bits.to(tl.int32)
        values = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.int16).to(tl.float16, bitcast=True) * 256.0
    return values


@triton.jit
def _scale(records, row, seen, EXPONENT_BIAS: tl.constexpr):
    """What the values of a record are multiplied by, from the lowest bits of its first eight (hga_kvd_client.float8)."""
    place = tl.arange(0, 8)
    bits = tl.load(records + row[:, None] + place[None, :], mask=seen[:, None], other=0).to(tl.int32) & 1
    exponent = tl.where(seen, tl.sum(bits << place[None, :], 1), EXPONENT_BIAS)
    return tl.exp2((EXPONENT_BIAS - exponent).to(tl.float32))


@functools.cache
def has_fp8(device: torch.device) -> bool:
    """Whether float8 is converted by the device itself."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@triton.jit
def _part(
    q,  # [kv_heads, ratio, head_dim], contiguous
    k,
    v,
    slots,  # [kv_heads, slots_stride] where PAGED
    lengths,  # keys or slots: one number, or one a head where PAGED
    out,
    lse,
    scale_log2,
    head_stride,
    slots_stride,
    RATIO: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,  # tokens of a slot; 1 where not PAGED
    PAGED: tl.constexpr,
    QUANTISED: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    EXPONENT_BIAS: tl.constexpr,
    PART_KEYS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    part, head = tl.program_id(0), tl.program_id(1)
    kv_heads = tl.num_programs(1)
    rows, dims = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    live = rows < RATIO
    to = (part * kv_heads + head) * RATIO + rows
    length = tl.load(lengths + head if PAGED else lengths).to(tl.int32) * GROUP
    start = part * PART_KEYS
    if start >= length:
        tl.store(lse + to, tl.full((ROWS,), float("-inf"), tl.float32), mask=live)
        return
    in_row = (dims < DIM)[None, :]
    query = tl.load(q + (head * RATIO + rows)[:, None] * DIM + dims[None, :], mask=live[:, None] & in_row, other=0.0)
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    values = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for first in range(0, PART_KEYS, BLOCK_N):  # the first block sees a key; later ones may see none
        keys = start + first + tl.arange(0, BLOCK_N)
        seen = keys < length
        if PAGED:
            slot = tl.load(slots + head * slots_stride + keys // GROUP, mask=seen, other=0).to(tl.int64)
            record = head.to(tl.int64) * head_stride + slot * 2 * GROUP * DIM
            row = record + (keys % GROUP) * DIM
        else:
            row = head.to(tl.int64) * head_stride + keys.to(tl.int64) * DIM
        where = row[:, None] + dims[None, :]
        inside = seen[:, None] & in_row
        key = tl.load(k + where, mask=inside, other=0.0)
        if QUANTISED:
            # One scale for the keys of a record: it goes with the scores.
            scores = tl.dot(query, tl.trans(_fp8(key, NATIVE_FP8).to(query.dtype)), input_precision="ieee")
            scores *= _scale(k, record, seen, EXPONENT_BIAS)[None, :]
        else:
            scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        scores = tl.where(seen[None, :], scores * scale_log2, float("-inf"))
        higher = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        kept = tl.exp2(largest - higher)
        total = total * kept + tl.sum(weights, 1)
        value = tl.load(v + where, mask=inside, other=0.0)
        if QUANTISED:
            weights *= _scale(v, record, seen, EXPONENT_BIAS)[None, :]
            value = _fp8(value, NATIVE_FP8).to(query.dtype)
        values = values * kept[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        largest = higher
    tl.store(out + to[:, None] * DIM + dims[None, :], values / total[:, None], mask=live[:, None] & in_row)
    tl.store(lse + to, (largest + tl.log2(total)) * 0.6931471805599453, mask=live)


@triton.jit
def _merge(
    out,
    lse,
    merged,  # [heads, head_dim]
    merged_lse,  # [heads]
    parts,
    DIM: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    head, heads = tl.program_id(0), tl.num_programs(0)
    part, dims = tl.arange(0, PARTS), tl.arange(0, BLOCK_D)
    each = tl.load(lse + part * heads + head, mask=part < parts, other=float("-inf"))
    largest = tl.max(each, 0)
    weights = tl.exp(each - largest)
    total = tl.sum(weights, 0)
    inside = (weights > 0)[:, None] & (dims < DIM)[None, :]
    values = tl.load(out + (part * heads + head)[:, None] * DIM + dims[None, :], mask=inside, other=0.0)
    values = tl.sum(values * weights[:, None], 0) / total
    tl.store(merged + head * DIM + dims, values, mask=dims < DIM)
    tl.store(merged_lse + head, largest + tl.log(total))


def window_parts(
    q: Tensor, k: Tensor, v: Tensor, control: Tensor, scale: float, part_keys: int, out: Tensor, lse: Tensor
) -> None:
    """Parts over the first control[WINDOW_TOKENS] keys of k, v: [kv_heads, capacity, head_dim], rows contiguous.

    q: [kv_heads, ratio, head_dim]. Part i sees keys i * part_keys and on; out, lse: [parts, heads(, head_dim)].
    """
    kv_heads, ratio, dim = _checked(q, out, lse)
    assert k.shape == v.shape
    assert k.stride() == v.stride()
    assert k.stride(1) == dim
    assert k.stride(2) == 1
    assert k.dtype == v.dtype == q.dtype
    assert out.shape[0] * part_keys >= k.shape[1], "the parts must cover the window"
    block = min(64, part_keys)
    assert part_keys % block == 0
    _part[(out.shape[0], kv_heads)](
        q, k, v, q, control[WINDOW_TOKENS:], out, lse, scale / LN2, k.stride(0), 0,
        RATIO=ratio, DIM=dim, GROUP=1, PAGED=False, QUANTISED=False, NATIVE_FP8=False, EXPONENT_BIAS=0,
        PART_KEYS=part_keys, BLOCK_N=block, **_shape(ratio, dim),
    )  # fmt: skip


def paged_parts(
    q: Tensor,
    records: Tensor,
    slots: Tensor,
    counts: Tensor,
    scale: float,
    part_slots: int,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Parts over records that lie in slots, for every KV head its own.

    records: [kv_heads, slots, K and V, group_tokens, head_dim], in the dtype of q, or uint8, as float8.pack makes them.
    slots: int32 [kv_heads, most], the first counts[kv_head] of each row; counts: int32 [kv_heads]. Part i sees the records
    i * part_slots and on.
    """
    kv_heads, ratio, dim = _checked(q, out, lse)
    _, _, two, group, _ = records.shape
    assert two == 2
    assert records.is_contiguous()
    assert records.shape[0] == kv_heads
    assert records.shape[4] == dim
    assert slots.dtype == counts.dtype == torch.int32
    assert slots.stride(1) == 1
    assert out.shape[0] * part_slots >= slots.shape[1], "the parts must cover the slots"
    quantised = records.dtype == torch.uint8
    assert quantised or records.dtype == q.dtype
    assert group * dim >= 8
    flat = records.flatten()
    part_keys = part_slots * group
    assert part_keys % min(64, part_keys) == 0
    _part[(out.shape[0], kv_heads)](
        q, flat, flat[group * dim :], slots, counts, out, lse, scale / LN2, records.stride(0), slots.stride(0),
        RATIO=ratio, DIM=dim, GROUP=group, PAGED=True, QUANTISED=quantised, NATIVE_FP8=has_fp8(q.device),
        EXPONENT_BIAS=float8.BIAS, PART_KEYS=part_keys, BLOCK_N=min(64, part_keys), **_shape(ratio, dim),
    )  # fmt: skip


def merge(out: Tensor, lse: Tensor, merged: Tensor, merged_lse: Tensor) -> None:
    """All parts into one. out: [parts, heads, head_dim]; merged: [heads, head_dim], any float dtype."""
    parts, heads, dim = out.shape
    assert out.is_contiguous()
    assert lse.is_contiguous()
    assert lse.shape == (parts, heads)
    assert merged.shape == (heads, dim)
    assert merged.is_contiguous()
    assert merged_lse.shape == (heads,)
    _merge[(heads,)](
        out, lse, merged, merged_lse, parts, DIM=dim, PARTS=max(2, triton.next_power_of_2(parts)),
        BLOCK_D=triton.next_power_of_2(dim),
    )  # fmt: skip


def _checked(q: Tensor, out: Tensor, lse: Tensor) -> tuple[int, int, int]:
    kv_heads, ratio, dim = q.shape
    assert q.is_contiguous()
    assert out.dtype == lse.dtype == torch.float32
    assert out.is_contiguous()
    assert lse.is_contiguous()
    assert out.shape[1:] == (kv_heads * ratio, dim)
    assert lse.shape == out.shape[:2]
    return kv_heads, ratio, dim


def _shape(ratio: int, dim: int) -> dict[str, int]:
    """A product needs 16 rows; query heads beyond the ratio are masked."""
    return {"ROWS": max(16, triton.next_power_of_2(ratio)), "BLOCK_D": max(16, triton.next_power_of_2(dim))}


def window_parts_twin(
    q: Tensor, k: Tensor, v: Tensor, control: Tensor, scale: float, part_keys: int, out: Tensor, lse: Tensor
) -> None:
    tokens = int(control[WINDOW_TOKENS])
    for part in range(out.shape[0]):
        keys = slice(part * part_keys, min((part + 1) * part_keys, tokens))
        for head in range(q.shape[0]):
            _part_twin(q, k[head, keys], v[head, keys], scale, head, out[part], lse[part])


def paged_parts_twin(
    q: Tensor,
    records: Tensor,
    slots: Tensor,
    counts: Tensor,
    scale: float,
    part_slots: int,
    out: Tensor,
    lse: Tensor,
) -> None:
    for part in range(out.shape[0]):
        for head in range(q.shape[0]):
            chosen = slots[head, part * part_slots : min((part + 1) * part_slots, int(counts[head]))].long()
            opened = records[head, chosen]
            if records.dtype == torch.uint8:
                opened = float8.unpack(opened.flatten(2), torch.float32).view(opened.shape)
            k, v = opened.transpose(0, 1).flatten(1, 2).unbind(0)
            _part_twin(q, k, v, scale, head, out[part], lse[part])


def merge_twin(out: Tensor, lse: Tensor, merged: Tensor, merged_lse: Tensor) -> None:
    seen = torch.where(torch.isinf(lse)[..., None], 0.0, out)
    merged.copy_((torch.softmax(lse, 0)[..., None] * seen).sum(0))
    merged_lse.copy_(lse.logsumexp(0))


def _part_twin(q: Tensor, k: Tensor, v: Tensor, scale: float, head: int, out: Tensor, lse: Tensor) -> None:
    heads = slice(head * q.shape[1], (head + 1) * q.shape[1])
    scores = q[head].float() @ k.float().T * scale
    lse[heads] = scores.logsumexp(1)
    if k.shape[0]:
        out[heads] = torch.softmax(scores, 1) @ v.float()
