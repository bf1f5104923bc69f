"""Estimated attention mass of every stored group, from the sketches: what routing of a decode step mostly costs.

`log_mass` reads all of a layer's records once, for queries in their coordinates (`take`). Codes times steps, and means,
are exact in float16; queries are rounded to it; sums are float32. hga_kvd_client.sketch has the record's layout, its
encoder and the maths.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hga_kvd_client import sketch
from hga_kvd_client.kernels import FIRST_GROUP, GROUPS
from hga_kvd_client.kernels.attention import _fp8, has_fp8
from hga_kvd_client.sketch import SketchSpec

# Groups that a program scores at a time: 64 are 16 chunks, 256 blocks a layer at 64 K tokens and 4 KV heads. Programs beyond
# two on each multiprocessor of an H100 take several blocks instead, and load the next one while they score: 22.9 us for 24.4
# at 256 K tokens. A limit of registers, for more programs at once, made them slower.
BLOCK_GROUPS, PROGRAMS = 64, 264
AHEAD_BYTES_MAX = 48 << 10  # of codes of one block that are loaded ahead: shared memory
WARPS = 4
# A product has 8 columns at least; those beyond the query heads are masked.
ROWS_MIN = 8
GROUP_TOKENS = 16  # what the packing of codes into words is written for


@triton.jit
def _halves(words, INTERPRETED: tl.constexpr):
    """Lower and upper halves of words, int16, so that neighbours share a register."""
    if INTERPRETED:
        low, high = words.to(tl.int16), (words >> 16).to(tl.int16)
    else:
        low, high = tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, $3, 0x5410; prmt.b32 $1, $2, $3, 0x7632;",
            "=r,=r,r,r", [words], dtype=(tl.int16, tl.int16), is_pure=True, pack=2,
        )  # fmt: skip
    return low, high


@triton.jit
def _codes(halves, shift: tl.constexpr, FIELD: tl.constexpr, INTERPRETED: tl.constexpr):
    """1 + code / 64, as float16, of the codes of FIELD + 1 values that begin at bit `shift` of every half word.

    Ored into the bits of 1, from bit 4 on, a code needs no conversion: three instructions for two codes. Times 64 steps it
    is (64 + code) steps, exactly; what is too much is the same for all tokens of a chunk.
    """
    if INTERPRETED:
        values = ((halves >> shift) & FIELD).to(tl.float16) * 0.015625 + 1.0
    elif shift < 4:
        values = tl.inline_asm_elementwise(
            "{ .reg .b32 a, one; mov.b32 one, 0x3C003C00; shl.b32 a, $1, $2; lop3.b32 $0, a, $4, one, 0xEA; }",
            "=r,r,r,r,r,r", [halves, 4 - shift, FIELD * 16 * 65537], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        values = tl.inline_asm_elementwise(
            "{ .reg .b32 a, one; mov.b32 one, 0x3C003C00; shr.u32 a, $1, $2; lop3.b32 $0, a, $4, one, 0xEA; }",
            "=r,r,r,r,r,r", [halves, shift - 4, FIELD * 16 * 65537], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    return values


@triton.jit
def _log_mass(
    z,  # [kv_heads, ratio, dim]
    centre,  # [kv_heads, dim]
    records,  # bytes
    words,  # the same as int32
    control,
    out,  # [kv_heads, capacity, ratio]
    lse,  # [programs, heads]
    capacity,
    head_bytes,  # of all records of a KV head
    RATIO: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DIMS4: tl.constexpr,
    BLOCK_4: tl.constexpr,
    DIMS2: tl.constexpr,
    BLOCK_2: tl.constexpr,
    PER_CHUNK: tl.constexpr,  # groups
    PER_BLOCK: tl.constexpr,  # groups that share mean and step
    GROUP_BYTES: tl.constexpr,
    MEAN: tl.constexpr,
    STEPS: tl.constexpr,
    CHUNK_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # of a program
    STAGES: tl.constexpr,
    GROUPS: tl.constexpr,
    FIRST_GROUP: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    part, head = tl.program_id(0), tl.program_id(1)
    kv_heads = tl.num_programs(1)
    first_block = part * BLOCKS
    count = tl.load(control + GROUPS).to(tl.int32)
    first = tl.load(control + FIRST_GROUP).to(tl.int32)
    each = tl.arange(0, ROWS)
    live = each < RATIO
    blocks = tl.minimum(tl.maximum(tl.cdiv(count, BLOCK) - first_block, 0), BLOCKS)
    highest = tl.full((ROWS,), -1e30, tl.float32)
    stored = tl.zeros((ROWS,), tl.float32)

    # Queries; masses are powers of 2 in here.
    dim = tl.arange(0, BLOCK_D)
    query = z + (head * RATIO + each)[None, :] * DIM
    full = tl.load(query + dim[:, None], mask=(dim < DIM)[:, None] & live[None, :], other=0.0) * 1.4426950408889634
    about = tl.load(centre + head * DIM + dim, mask=dim < DIM, other=0.0)
    offset = tl.sum(full * about[:, None], 0)
    full = full.to(tl.float16)
    if DIMS4 > 0:
        dim4, pair = tl.arange(0, BLOCK_4), tl.arange(0, 2 * BLOCK_4)
        asked = (dim4 < DIMS4)[:, None] & live[None, :]
        query4 = (tl.load(query + dim4[:, None], mask=asked, other=0.0) * 1.4426950408889634).to(tl.float16)
    if DIMS2 > 0:
        dim2 = tl.arange(0, BLOCK_2)
        asked = (dim2 < DIMS2)[:, None] & live[None, :]
        query2 = (tl.load(query + DIMS4 + dim2[:, None], mask=asked, other=0.0) * 1.4426950408889634).to(tl.float16)

    # The interpreter takes no bound that is only known as it runs: it finds nothing in blocks beyond the end.
    for number in tl.range(0, BLOCKS if INTERPRETED else blocks, num_stages=STAGES):
        block = first_block + number
        start = block * BLOCK
        group = start + tl.arange(0, BLOCK)
        inside = group < count
        place = first + group
        chunk = head.to(tl.int64) * head_bytes + (place // PER_CHUNK).to(tl.int64) * CHUNK_BYTES
        block_of = (place % PER_CHUNK) // PER_BLOCK

        # What does not differ between the tokens of a block: the mean, and the mean of all keys.
        row = tl.arange(0, BLOCK // PER_BLOCK) * PER_BLOCK
        where = first + start + row
        where = (
            head.to(tl.int64) * head_bytes
            + (where // PER_CHUNK).to(tl.int64) * CHUNK_BYTES
            + ((where % PER_CHUNK) // PER_BLOCK * DIM)
        )
        mask = (start + row < count)[:, None] & (dim < DIM)[None, :]
        mean = _fp8(tl.load(records + MEAN + where[:, None] + dim[None, :], mask=mask, other=0), NATIVE_FP8)
        shared = tl.dot(mean, full) + offset[None, :]
        if PER_BLOCK > 1:
            shared = tl.broadcast_to(shared[:, None, :], (BLOCK // PER_BLOCK, PER_BLOCK, ROWS))
            shared = tl.reshape(shared, (BLOCK, ROWS))

        codes = words + (chunk + (place % PER_CHUNK) * GROUP_BYTES)[:, None] // 4
        steps = records + (chunk + STEPS + block_of * (DIMS4 + DIMS2))[:, None]
        # Codes count from 0 and have 64 too much; their values are around the mean.
        if DIMS4 > 0:
            mask = inside[:, None] & (dim4 < DIMS4)[None, :]
            step4 = _fp8(tl.load(steps + dim4[None, :], mask=mask, other=0), NATIVE_FP8)
            packed = tl.load(codes + pair[None, :], mask=inside[:, None] & (pair < 2 * DIMS4)[None, :], other=0)
            early, late = tl.split(tl.reshape(packed, (BLOCK, BLOCK_4, 2)))
            early_low, early_high = _halves(early, INTERPRETED)
            late_low, late_high = _halves(late, INTERPRETED)
            shared = tl.dot(step4 * -7.5, query4, shared)
            step4 *= 64.0
            shared = tl.dot(-step4, query4, shared)
        if DIMS2 > 0:
            mask = inside[:, None] & (dim2 < DIMS2)[None, :]
            step2 = _fp8(tl.load(steps + DIMS4 + dim2[None, :], mask=mask, other=0), NATIVE_FP8)
            low2, high2 = _halves(tl.load(codes + 2 * DIMS4 + dim2[None, :], mask=mask, other=0), INTERPRETED)
            shared = tl.dot(step2 * -1.5, query2, shared)
            step2 *= 64.0
            shared = tl.dot(-step2, query2, shared)

        largest = tl.full((BLOCK, ROWS), -1e30, tl.float32)
        total = tl.zeros((BLOCK, ROWS), tl.float32)
        # Tokens t = 4 quarter, and the three after it: t and t + 1 lie 8 bits apart, t and t + 2 in the halves of a word.
        for quarter in tl.static_range(4):
            score0, score1, score2, score3 = shared, shared, shared, shared
            if DIMS4 > 0:
                low4 = early_low if quarter % 2 == 0 else late_low
                high4 = early_high if quarter % 2 == 0 else late_high
                score0 = tl.dot(_codes(low4, 4 * (quarter // 2), 15, INTERPRETED) * step4, query4, score0)
                score1 = tl.dot(_codes(low4, 4 * (quarter // 2) + 8, 15, INTERPRETED) * step4, query4, score1)
                score2 = tl.dot(_codes(high4, 4 * (quarter // 2), 15, INTERPRETED) * step4, query4, score2)
                score3 = tl.dot(_codes(high4, 4 * (quarter // 2) + 8, 15, INTERPRETED) * step4, query4, score3)
            if DIMS2 > 0:
                score0 = tl.dot(_codes(low2, 2 * quarter, 3, INTERPRETED) * step2, query2, score0)
                score1 = tl.dot(_codes(low2, 2 * quarter + 8, 3, INTERPRETED) * step2, query2, score1)
                score2 = tl.dot(_codes(high2, 2 * quarter, 3, INTERPRETED) * step2, query2, score2)
                score3 = tl.dot(_codes(high2, 2 * quarter + 8, 3, INTERPRETED) * step2, query2, score3)
            higher = tl.maximum(tl.maximum(score0, score1), tl.maximum(score2, score3))
            higher = tl.maximum(largest, higher)
            total *= tl.exp2(largest - higher)
            total += tl.exp2(score0 - higher) + tl.exp2(score1 - higher)
            total += tl.exp2(score2 - higher) + tl.exp2(score3 - higher)
            largest = higher
        result = (largest + tl.log2(total)) * 0.6931471805599453
        seen = inside[:, None] & live[None, :]
        tl.store(out + (head.to(tl.int64) * capacity + group)[:, None] * RATIO + each[None, :], result, mask=seen)
        result = tl.where(seen, result, -1e30)
        higher = tl.maximum(highest, tl.max(result, 0))
        stored = stored * tl.exp(highest - higher) + tl.sum(tl.exp(result - higher[None, :]), 0)
        highest = higher
    some = tl.where(first_block * BLOCK < count, highest + tl.log(stored), float("-inf"))
    tl.store(lse + (part * kv_heads + head) * RATIO + each, some, mask=live)


def lse_rows(capacity: int, kv_heads: int) -> int:
    """Programs a KV head, each with a row of `lse`, for so many groups."""
    blocks = triton.cdiv(capacity, BLOCK_GROUPS)
    return int(triton.cdiv(blocks, _blocks_each(blocks * kv_heads)))


def _blocks_each(blocks: int) -> int:
    return int(triton.next_power_of_2(triton.cdiv(blocks, PROGRAMS)))


def log_mass(
    spec: SketchSpec, z: Tensor, centre: Tensor, records: Tensor, control: Tensor, out: Tensor, lse: Tensor
) -> None:
    """Log-masses of control[GROUPS] groups from group control[FIRST_GROUP], the start of a chunk, on.

    z: [kv_heads, ratio, head_dim], from `take`; centre: [kv_heads, head_dim]; records: uint8 [kv_heads, chunks,
    chunk_bytes]; out: [kv_heads, capacity, ratio]; lse: [lse_rows(capacity, kv_heads), kv_heads * ratio], the logsumexp of
    equal runs of groups, -inf for none. All but records float32 and contiguous.
    """
    kv_heads, ratio, dim = z.shape
    capacity = out.shape[1]
    for tensor in (z, centre, out, lse):
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
    assert records.dtype == torch.uint8
    assert records.stride(1) == spec.chunk_bytes
    assert records.stride(2) == 1
    assert spec.chunk_bytes % 4 == 0
    assert records.stride(0) % 4 == 0
    assert spec.group_tokens == GROUP_TOKENS
    assert centre.shape == (kv_heads, dim)
    assert out.shape == (kv_heads, capacity, ratio)
    assert lse.shape == (lse_rows(capacity, kv_heads), kv_heads * ratio)
    blocks = _blocks_each(triton.cdiv(capacity, BLOCK_GROUPS) * kv_heads)
    _log_mass[(lse.shape[0], kv_heads)](
        z, centre, records, records.view(torch.int32), control, out, lse, capacity, records.stride(0),
        RATIO=ratio, ROWS=max(ROWS_MIN, triton.next_power_of_2(ratio)), DIM=dim, BLOCK_D=_block(dim),
        DIMS4=spec.dims4, BLOCK_4=_block(spec.dims4), DIMS2=spec.dims2, BLOCK_2=_block(spec.dims2),
        PER_CHUNK=spec.groups_per_chunk, PER_BLOCK=spec.groups_per_chunk // spec.blocks, GROUP_BYTES=spec.group_bytes,
        MEAN=spec.mean_offset, STEPS=spec.step_offset, CHUNK_BYTES=spec.chunk_bytes, BLOCK=BLOCK_GROUPS,
        BLOCKS=blocks, STAGES=2 if blocks > 1 and BLOCK_GROUPS * spec.group_bytes <= AHEAD_BYTES_MAX else 1,
        GROUPS=GROUPS, FIRST_GROUP=FIRST_GROUP,
        NATIVE_FP8=has_fp8(z.device), INTERPRETED=not z.is_cuda, num_warps=WARPS,
    )  # fmt: skip


def _block(dims: int) -> int:
    return max(16, int(triton.next_power_of_2(max(1, dims))))


def log_mass_twin(
    spec: SketchSpec, z: Tensor, centre: Tensor, records: Tensor, control: Tensor, out: Tensor, lse: Tensor
) -> None:
    count, first = int(control[GROUPS]), int(control[FIRST_GROUP]) // spec.groups_per_chunk
    chunks = slice(first, first + count // spec.groups_per_chunk)
    found = sketch.log_mass(spec, z, (z * centre[:, None]).sum(2), records[:, chunks])
    out[:, :count] = found.transpose(1, 2)
    lse.fill_(-torch.inf)
    run = BLOCK_GROUPS * _blocks_each(triton.cdiv(out.shape[1], BLOCK_GROUPS) * z.shape[0])
    for row in range((count + run - 1) // run):
        lse[row] = found[:, :, row * run : (row + 1) * run].logsumexp(2).flatten()
