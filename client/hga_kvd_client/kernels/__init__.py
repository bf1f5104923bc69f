"""Triton kernels of the decode step. Each file is kernel, wrapper, twin: the wrapper asserts shape, stride and dtype, the
twin is plain PyTorch with the same signature, writes the same tensors, and is what tests compare with.

What always holds:
- Nothing here allocates, synchronises or reads a tensor on the host, so every call can be captured in a CUDA graph.
- Sizes that change from step to step (tokens of the window, groups that may be opened, the step's number) are read on
  the device from `control`, int64 [CONTROL_SIZE]; grids cover the largest size, and programs beyond the end leave.
- Without a GPU the kernels run in Triton's interpreter when TRITON_INTERPRET=1 was set before the first import.

Host and device talk about a layer's step through its *mailbox*, int64 in pinned memory, a row a layer:

    written by the host   MAIL_Q, MAIL_K, MAIL_V    addresses of the token's q, k and v on the device; 0: the window has it
                          MAIL_READY                step << 32 | where its fetched records begin, in 16 bytes from the start
                                                    of the landing; STAGED: in staging; NEVER: they will not come
    by the device         MAIL_POSTED + kv_head     step << 24 | groups opened << 12 | misses
                          mail_keys(kv_heads) + ..  keys of the misses, [kv_heads, most]

What the host writes is read once it has written the last of it, and the other way round. Reads of a mailbox cross the bus
one after the other, about 1 us each, and every warp of a program makes its own: one warp reads for all.

Query heads are grouped by KV head: q [kv_heads, ratio, head_dim], query head kv_head * ratio + r.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

# Places in `control`.
WINDOW_TOKENS, GROUPS, FIRST_GROUP, STEP = range(4)
CONTROL_SIZE = 4

# Places in a mailbox. The device's words begin a cache line of their own.
MAIL_Q, MAIL_K, MAIL_V, MAIL_READY, MAIL_POSTED = 0, 1, 2, 3, 8
STEP_SHIFT, OPENED_SHIFT, COUNT_MASK = 24, 12, 0xFFF
READY_SHIFT, STAGED, NEVER = 32, 0xFFFFFFFF, 0xFFFFFFFE

# Groups of a bank and KV head: their ages are compared all with all. 512 compile in 10 s, 1,024 in 75 s (Triton 3.6), and
# of more Triton makes no block.
SLOTS_MAX = 512


def mail_keys(kv_heads: int) -> int:
    """Where the keys begin."""
    return MAIL_POSTED + -(-kv_heads // 8) * 8


def mail_words(kv_heads: int, most: int) -> int:
    """Length of a row: a whole number of cache lines."""
    return mail_keys(kv_heads) + -(-kv_heads * most // 8) * 8


def at_address(address: int, like: Tensor) -> Tensor:
    """The values of `like`'s shape and dtype that lie there in the host's memory, for the twins."""
    return torch.frombuffer((ctypes.c_char * like.nbytes).from_address(address), dtype=like.dtype).view(like.shape)
