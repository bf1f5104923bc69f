"""The first kernel of a layer's step: takes q, k and v from where the model left them.

Their addresses come through the mailbox, so one graph serves every token and the host copies nothing. q is kept for the
kernels after it, k and v go to their place in the window, q is turned into the coordinates of the sketches, and what the
selection of an earlier layer has left is cleared.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hga_kvd_client.kernels import MAIL_K, MAIL_Q, MAIL_V, WINDOW_TOKENS, at_address
from hga_kvd_client.kernels.select import BINS, Chosen

# Of z in one program: 32 programs at head_dim 128 and 4 KV heads, so as many reads of the mailbox; 9.5 us, and 20 where each
# of 128 one-warp programs read three words of it.
COLUMNS, WARPS = 16, 8


@triton.jit
def _take(
    mailbox,
    control,
    q,  # [kv_heads, ratio, head_dim]
    k,  # [kv_heads, capacity, head_dim]
    v,
    to_z,
    z,
    bins,
    chosen_counts,
    tie_count,
    scale,
    head_stride,  # of k and v
    RATIO: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COLUMNS: tl.constexpr,
    THREADS: tl.constexpr,
    PROJECTS: tl.constexpr,
    BINS: tl.constexpr,
    WINDOW_TOKENS: tl.constexpr,
    MAIL_Q: tl.constexpr,
    MAIL_K: tl.constexpr,
    MAIL_V: tl.constexpr,
):
    part, head = tl.program_id(0), tl.program_id(1)
    dim = tl.arange(0, BLOCK_D)
    column = part * COLUMNS + tl.arange(0, COLUMNS)
    # One read of the host's memory for the program, not three a warp.
    word = tl.arange(0, THREADS)
    mail = tl.load(mailbox + word, mask=word <= MAIL_V, other=0)
    if PROJECTS:
        inside = (column < DIM)[:, None] & (dim < DIM)[None, :]
        turn = tl.load(to_z + head * DIM * DIM + column[:, None] * DIM + dim[None, :], mask=inside, other=0.0)
    to = head.to(tl.int64) * head_stride + (tl.load(control + WINDOW_TOKENS) - 1) * DIM + dim
    given = tl.sum(tl.where(word == MAIL_Q, mail, 0), 0).to(tl.pointer_type(q.dtype.element_ty))
    key_at, value_at = tl.sum(tl.where(word == MAIL_K, mail, 0), 0), tl.sum(tl.where(word == MAIL_V, mail, 0), 0)
    # Limits, not masks of scalars: these become integers in the interpreter of Triton 3.9, which takes no such mask.
    row = dim < tl.where((key_at != 0) & (part == 0), DIM, 0)
    key = tl.load(key_at.to(tl.pointer_type(k.dtype.element_ty)) + head * DIM + dim, mask=row)
    value = tl.load(value_at.to(tl.pointer_type(v.dtype.element_ty)) + head * DIM + dim, mask=row)
    each = tl.arange(0, ROWS)
    at = (head * RATIO + each) * DIM
    inside_q = (each < RATIO)[:, None] & (dim < DIM)[None, :]
    query = tl.load(given + at[:, None] + dim[None, :], mask=inside_q, other=0.0)
    if PROJECTS:
        turned = tl.sum(turn.to(tl.float32)[None, :, :] * (query.to(tl.float32) * scale)[:, None, :], 2)
        tl.store(z + at[:, None] + column[None, :], turned, mask=(each < RATIO)[:, None] & (column < DIM)[None, :])
    kept = (each < RATIO)[:, None] & (dim < tl.where(part == 0, DIM, 0))[None, :]
    tl.store(q + at[:, None] + dim[None, :], query, mask=kept)
    tl.store(k + to, key, mask=row)
    tl.store(v + to, value, mask=row)
    if part == 0:
        tl.store(chosen_counts + head, 0)
        if head == 0:
            tl.store(bins + tl.arange(0, BINS), 0)
            tl.store(tie_count, 0)


def take(
    mailbox: Tensor,
    control: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Chosen,
    scale: float = 1.0,
    to_z: Tensor | None = None,
    z: Tensor | None = None,
) -> None:
    """q: [kv_heads, ratio, head_dim], written. k, v: [kv_heads, capacity, head_dim], a window; row control[WINDOW_TOKENS]
    - 1 is written. At their addresses: values of the same dtype, q as here, k and v [kv_heads, head_dim], contiguous.

    to_z: [kv_heads, head_dim, head_dim], then z = to_z q scale, float32 [kv_heads, ratio, head_dim], is written.
    """
    kv_heads, ratio, dim = q.shape
    assert q.is_contiguous()
    assert k.shape == v.shape
    assert k.stride() == v.stride()
    assert k.stride(1) == dim
    assert k.stride(2) == 1
    assert k.dtype == v.dtype == q.dtype
    if to_z is not None:
        assert z is not None
        assert to_z.is_contiguous()
        assert z.is_contiguous()
        assert to_z.shape == (kv_heads, dim, dim)
        assert z.dtype == torch.float32
        assert z.shape == q.shape
    parts = 1 if to_z is None else triton.cdiv(dim, COLUMNS)
    _take[(parts, kv_heads)](
        mailbox, control, q, k, v, q if to_z is None else to_z, q if z is None else z, chosen.bins, chosen.counts,
        chosen.tie_count, scale, k.stride(0),
        RATIO=ratio, ROWS=triton.next_power_of_2(ratio), DIM=dim, BLOCK_D=triton.next_power_of_2(dim), COLUMNS=COLUMNS,
        THREADS=32 * WARPS, PROJECTS=to_z is not None, BINS=BINS, WINDOW_TOKENS=WINDOW_TOKENS, MAIL_Q=MAIL_Q,
        MAIL_K=MAIL_K, MAIL_V=MAIL_V, num_warps=WARPS,
    )  # fmt: skip


def take_twin(
    mailbox: Tensor,
    control: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Chosen,
    scale: float = 1.0,
    to_z: Tensor | None = None,
    z: Tensor | None = None,
) -> None:
    q.copy_(at_address(int(mailbox[MAIL_Q]), q))
    place = int(control[WINDOW_TOKENS]) - 1
    if int(mailbox[MAIL_K]):
        k[:, place] = at_address(int(mailbox[MAIL_K]), k[:, 0])
        v[:, place] = at_address(int(mailbox[MAIL_V]), v[:, 0])
    if to_z is not None and z is not None:
        z.copy_(torch.bmm(q.float() * scale, to_z.float().transpose(1, 2)))
    for tensor in (chosen.bins, chosen.counts, chosen.tie_count):
        tensor.zero_()
