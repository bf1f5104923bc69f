"""Attention over real tokens, in plain PyTorch with float32 accumulation. Pure; the same on CPU and CUDA tensors.

Query heads are grouped by KV head everywhere: q [kv_heads, ratio, ..., head_dim], head h = kv_head * ratio + r.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Scores held at once by exact attention; longer blocks of queries go in slices. On a CPU 4 MiB of float32 stay in the
# cache between the passes of the softmax: twice as fast as 64 MiB, hardly slower than the product of q and k alone.
SCORES_MAX_CPU = 1 << 20
SCORES_MAX = 16 << 20


def decode_attention(
    q: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    scale: float,
    opened_k: Tensor | None = None,
    opened_v: Tensor | None = None,
    valid: Tensor | None = None,
    near: Tensor | None = None,
) -> Tensor:
    """One query token over [window | opened], where every KV head has opened its own groups.

    q: [kv_heads, ratio, head_dim]; window_k, window_v: [kv_heads, window_tokens, head_dim];
    opened_k, opened_v: [kv_heads, groups * group_tokens, head_dim], padded; valid: bool [kv_heads, groups], False at
    padding. Values at padding must be finite; they have no weight. near: window_scores, if they are known already.
    Returns [kv_heads, ratio, head_dim], float32.
    """
    scores = window_scores(q, window_k, scale) if near is None else near
    if opened_k is None or opened_v is None or valid is None or not valid.shape[1]:
        return torch.bmm(torch.softmax(scores, -1), window_v.float())
    far = torch.bmm(q.float() * scale, opened_k.float().transpose(1, 2))
    far.view(*q.shape[:2], valid.shape[1], -1).masked_fill_(~valid[:, None, :, None], -torch.inf)
    # Scores are small; K and V are not, and are never concatenated.
    weights = torch.softmax(torch.cat((scores, far), -1), -1)
    first = window_k.shape[1]
    return torch.baddbmm(torch.bmm(weights[..., :first], window_v.float()), weights[..., first:], opened_v.float())


def window_scores(q: Tensor, window_k: Tensor, scale: float) -> Tensor:
    """What one token's softmax is over, of the keys it sees anyway: [kv_heads, ratio, window_tokens], float32."""
    return torch.bmm(q.float() * scale, window_k.float().transpose(1, 2))


class ExactAttention:
    """Attention of a block of queries over keys that come in tiles, in any order: online softmax, nothing approximate.

    Between tiles it holds, per query, the largest score, the sum of weights relative to it, and the weighted values.
    """

    def __init__(self, q: Tensor, scale: float) -> None:
        """q: [kv_heads, ratio, tokens, head_dim]."""
        kv_heads, ratio, tokens, _ = q.shape
        self._q = q.float() * scale
        self._largest = torch.full((kv_heads, ratio, tokens, 1), -torch.inf, device=q.device)
        self._total = torch.zeros(kv_heads, ratio, tokens, 1, device=q.device)
        self._values = torch.zeros_like(self._q)

    def add(self, k: Tensor, v: Tensor, causal_offset: int | None = None, visible: Tensor | None = None) -> None:
        """k, v: [kv_heads, keys, head_dim]. Query token t sees keys 0 .. causal_offset + t, or all if that is None.

        visible: bool [kv_heads, tokens, groups], equal runs of the keys that a token sees; a token that sees none of
        them must have seen a key before.
        """
        if not k.shape[1]:
            return
        k, v = k.float(), v.float()
        kv_heads, ratio, tokens, _ = self._q.shape
        scores_max = SCORES_MAX_CPU if k.device.type == "cpu" else SCORES_MAX
        step = max(1, scores_max // (kv_heads * ratio * k.shape[1]))
        for start in range(0, tokens, step):
            end = min(start + step, tokens)
            seen = k.shape[1] if causal_offset is None else min(causal_offset + end, k.shape[1])
            allowed = None if visible is None else visible[:, start:end]
            self._add_slice(start, end, k[:, :seen], v[:, :seen], causal_offset, allowed)

    def log_mass(self) -> Tensor:
        """Log of the mass of the keys so far, [kv_heads, ratio, tokens], natural, float32."""
        return (self._largest + self._total.log()).squeeze(3)

    def result(self) -> Tensor:
        """[kv_heads, ratio, tokens, head_dim], float32. Every query must have seen a key."""
        return self._values / self._total

    def _add_slice(
        self, start: int, end: int, k: Tensor, v: Tensor, causal_offset: int | None, visible: Tensor | None
    ) -> None:
        kv_heads, ratio, _, dim = self._q.shape
        rows = (kv_heads, ratio * (end - start))
        scores = torch.bmm(self._q[:, :, start:end].reshape(*rows, dim), k.transpose(1, 2))
        if causal_offset is not None:
            last = torch.arange(start, end, device=k.device)[:, None] + causal_offset
            hidden = torch.arange(k.shape[1], device=k.device) > last
            scores.view(kv_heads, ratio, end - start, -1).masked_fill_(hidden, -torch.inf)
        if visible is not None:
            by_group = scores.view(kv_heads, ratio, end - start, visible.shape[2], -1)
            by_group.masked_fill_(~visible[:, None, :, :, None], -torch.inf)
        old = self._largest[:, :, start:end].reshape(*rows, 1)
        largest = torch.maximum(old, scores.amax(-1, keepdim=True))
        weights = scores.sub_(largest).exp_()
        shape = (kv_heads, ratio, end - start, -1)
        kept = (old - largest).exp_().view(shape)
        self._total[:, :, start:end] = self._total[:, :, start:end] * kept + weights.sum(-1, keepdim=True).view(shape)
        self._values[:, :, start:end] = self._values[:, :, start:end] * kept + torch.bmm(weights, v).view(shape)
        self._largest[:, :, start:end] = largest.view(shape)


class FlashAttention:
    """As ExactAttention, on a GPU in half precision: torch's flash kernel a tile, merged by log-sum-exp in float32."""

    def __init__(self, q: Tensor, scale: float) -> None:
        """q: [kv_heads, ratio, tokens, head_dim]."""
        self._shape, self._scale = q.shape, scale
        self._q = q.reshape(1, -1, *q.shape[2:])
        self._out = torch.zeros(self._q.shape, device=q.device)
        self._lse = torch.full(self._q.shape[:3], -torch.inf, device=q.device)

    @staticmethod
    def serves(q: Tensor) -> bool:
        if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
            return False
        return q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 and torch.cuda.get_device_capability(q.device) >= (8, 0)

    def add(self, k: Tensor, v: Tensor, causal_offset: int | None = None) -> None:
        """As there; the block's own keys are the last ones where there is an offset."""
        if causal_offset is None:
            self._add(k, v, causal=False)
            return
        assert k.shape[1] == causal_offset + self._q.shape[2]
        self._add(k[:, :causal_offset], v[:, :causal_offset], causal=False)
        self._add(k[:, causal_offset:], v[:, causal_offset:], causal=True)

    def result(self) -> Tensor:
        """[kv_heads, ratio, tokens, head_dim], float32. Every query must have seen a key."""
        return self._out.view(self._shape)

    def _add(self, k: Tensor, v: Tensor, causal: bool) -> None:
        if not k.shape[1]:
            return
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse, *_ = flash(self._q, k[None], v[None], 0.0, causal, False, scale=self._scale)
        both = torch.logaddexp(self._lse, lse)
        old, new = (self._lse - both).exp_()[..., None], (lse - both).exp_()[..., None]
        self._out.mul_(old).addcmul_(out.float(), new)
        self._lse = both
