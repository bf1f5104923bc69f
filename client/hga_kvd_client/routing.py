"""Which stored groups a query opens. Pure: tensors in, a mask out; nothing here knows sessions, banks or transports.

A mask is bool [kv_heads, groups] over the routable groups, those between the sinks and the recent chunks, in order.
One decode step routes one token. A block of tokens is routed in one call by an extra dim `tokens`: every token on its
own, as if it came alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def route_hga(
    q: Tensor,
    chunk_summaries: Tensor,
    group_summaries: Tensor,
    topk_chunks: int,
    topk_groups: int,
    pooled: bool = False,
) -> Tensor:
    """The paper's rule: each query head takes its best chunks, then its best groups in them; a KV head's heads unite.

    Score = q . summary / sqrt(head_dim), arXiv 2606.30709, DESIGN section 6. pooled: a KV head's query heads choose
    together, by the sum of their softmaxes over chunks, then over groups.

    q: [kv_heads, ratio, head_dim] or [kv_heads, ratio, tokens, head_dim], after RoPE; ratio = heads / kv_heads.
    chunk_summaries: [kv_heads, chunks, head_dim]; group_summaries: [kv_heads, chunks, groups_per_chunk, head_dim].
    Returns bool [kv_heads, chunks * groups_per_chunk] or [kv_heads, tokens, chunks * groups_per_chunk].
    """
    kv_heads, *queries, dim = q.shape
    chunks, groups_per_chunk = group_summaries.shape[1:3]
    q = q.float().reshape(kv_heads, -1, dim) * dim**-0.5

    def pool(scores: Tensor) -> Tensor:
        apart = scores.softmax(2).view(kv_heads, *queries, -1)
        return apart.sum(1, keepdim=True).expand_as(apart).reshape(scores.shape)

    scores = torch.bmm(q, chunk_summaries.float().transpose(1, 2))
    scores = pool(scores) if pooled else scores
    taken = min(topk_chunks, chunks)
    best = scores.topk(taken, dim=2, sorted=False).indices  # [kv_heads, queries, taken]

    # Every group is scored, then picked from: reading all in order costs less than gathering for each head.
    scores = torch.bmm(q, group_summaries.float().flatten(1, 2).transpose(1, 2))
    scores = pool(scores) if pooled else scores
    inside = torch.arange(groups_per_chunk, device=q.device)
    candidates = (best[..., None] * groups_per_chunk + inside).flatten(2)  # [.., taken * groups_per_chunk]
    picked = scores.gather(2, candidates).topk(min(topk_groups, candidates.shape[2]), dim=2, sorted=False).indices

    opened = torch.zeros(kv_heads, q.shape[1], chunks * groups_per_chunk, dtype=torch.bool, device=q.device)
    opened.scatter_(2, candidates.gather(2, picked), True)
    return opened.view(kv_heads, *queries, -1).any(1)


def route_sketch(log_mass: Tensor, window_log_mass: Tensor, budget: int, cover: float = 1.0) -> Tensor:
    """One budget of groups for a layer: the KV heads' groups compete by attention mass, DESIGN section 6.

    A query head's masses are normalised over everything it can see, so a head that is busy with its window claims
    little; the query heads of a KV head add up.

    log_mass: [kv_heads, ratio, groups] or [kv_heads, ratio, tokens, groups], of every routable group, as sketched.
    window_log_mass: the same without groups: of everything that is attended anyway, exact.
    budget: groups of the layer, all KV heads together; at most that many are opened for a token.
    cover: stop earlier once the estimated share of attention that is opened or in the window, on average over the
    layer's query heads, has reached this. Returns a mask, [kv_heads, groups] or [kv_heads, tokens, groups].
    """
    kv_heads, ratio, *_, groups = log_mass.shape
    everything = torch.cat((log_mass, window_log_mass[..., None]), -1)
    mass = everything.softmax(-1)[..., :-1].sum(1)  # [kv_heads, *tokens, groups]
    rows = mass.movedim(0, -2).flatten(-2)  # [*tokens, kv_heads * groups]
    best = rows.topk(min(budget, rows.shape[-1]), dim=-1)
    opened = torch.zeros_like(rows, dtype=torch.bool)
    if cover < 1.0:
        # Taken while what was left before it is more than may be left. The largest come first.
        left = rows.sum(-1, keepdim=True) - best.values.cumsum(-1) + best.values
        opened.scatter_(-1, best.indices, left > (1.0 - cover) * kv_heads * ratio)
    else:
        opened.scatter_(-1, best.indices, True)
    return opened.view(*mass.shape[1:-1], kv_heads, groups).movedim(-2, 0)


def route_all(kv_heads: int, groups: int, device: torch.device) -> Tensor:
    """Every group: attention is dense. Returns bool [kv_heads, groups]."""
    return torch.ones(kv_heads, groups, dtype=torch.bool, device=device)


def causal_union(masks: Tensor) -> Tensor:
    """What the tokens of a block see when they are routed together: what they or an earlier token of the block opened.

    The paper's visibility in prefill. masks: bool [kv_heads, tokens, groups]. Returns the same shape.
    """
    return masks.to(torch.uint8).cummax(1).values.bool()
