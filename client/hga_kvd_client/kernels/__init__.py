"""Triton kernels of the decode step. Each file is kernel, wrapper, twin: the wrapper asserts shape, stride and dtype, the
twin is plain PyTorch with the same signature, writes the same tensors, and is what tests compare with.

What always holds:
- Nothing here allocates, synchronises or reads a tensor on the host, so every call can be captured in a CUDA graph.
- Sizes that change from step to step (tokens of the window, groups that may be opened, the step's number) are read on
  the device from `control`, int64 [CONTROL_SIZE]; grids cover the largest size, and programs beyond the end leave.
- Without a GPU the kernels run in Triton's interpreter when TRITON_INTERPRET=1 was set before the first import.

Query heads are grouped by KV head: q [kv_heads, ratio, head_dim], query head kv_head * ratio + r.
"""

from __future__ import annotations

# Places in `control`.
WINDOW_TOKENS, GROUPS, FIRST_GROUP, STEP = range(4)
CONTROL_SIZE = 4
