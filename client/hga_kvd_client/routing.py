"""Which stored groups a query opens. Pure: tensors in, a mask out; nothing here knows sessions, banks or transports.

A mask is bool [kv_heads, groups] over the routable groups, those between the sinks and the recent chunks, in order.
"""

from __future__ import annotations

import torch
from torch import Tensor


def route_hga(
    q: Tensor, chunk_summaries: Tensor, group_summaries: Tensor, topk_chunks: int, topk_groups: int
) -> Tensor:
    """The paper's rule: each query head takes its best chunks, then its best groups in them; a KV head's heads unite.

    Score = q . summary / sqrt(head_dim), arXiv 2606.30709, DESIGN section 6.

    q: [kv_heads, heads / kv_heads, head_dim], one token, after RoPE.
    chunk_summaries: [kv_heads, chunks, head_dim]; group_summaries: [kv_heads, chunks, groups_per_chunk, head_dim].
    Returns bool [kv_heads, chunks * groups_per_chunk].
    """
    kv_heads, _, dim = q.shape
    chunks, groups_per_chunk = group_summaries.shape[1:3]
    q = q.float() * dim**-0.5

    scores = torch.bmm(q, chunk_summaries.float().transpose(1, 2))
    taken = min(topk_chunks, chunks)
    best = scores.topk(taken, dim=2, sorted=False).indices  # [kv_heads, ratio, taken]

    # Every group is scored, then picked from: reading all in order costs less than gathering for each head.
    scores = torch.bmm(q, group_summaries.float().flatten(1, 2).transpose(1, 2))
    inside = torch.arange(groups_per_chunk, device=q.device)
    candidates = (best[..., None] * groups_per_chunk + inside).flatten(2)  # [kv_heads, ratio, taken * groups_per_chunk]
    picked = scores.gather(2, candidates).topk(min(topk_groups, candidates.shape[2]), dim=2, sorted=False).indices

    mask = torch.zeros(kv_heads, chunks * groups_per_chunk, dtype=torch.bool, device=q.device)
    return mask.scatter_(1, candidates.gather(2, picked).view(kv_heads, -1), True)


def route_all(kv_heads: int, groups: int, device: torch.device) -> Tensor:
    """Every group: attention is dense. Returns bool [kv_heads, groups]."""
    return torch.ones(kv_heads, groups, dtype=torch.bool, device=device)
