"""The paper's rule at a fixed capacity, so that it can be part of a CUDA graph. Torch's products and topk serve it well.

The same choice as routing.route_hga over chunks control[FIRST_GROUP] and on; there is no kernel of our own here, so the
same function serves CPU and GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hga_kvd_client.kernels import FIRST_GROUP, GROUPS


def open_hga(
    q: Tensor, chunks: Tensor, groups: Tensor, control: Tensor, topk_chunks: int, topk_groups: int, mask: Tensor
) -> None:
    """q: [kv_heads, ratio, head_dim]; chunks: [kv_heads, capacity, head_dim]; groups: [kv_heads, capacity,
    groups_per_chunk, head_dim]; mask: bool [kv_heads, capacity *
    groups_per_chunk], written."""
    _, capacity, per_chunk, dim = groups.shape
    q = q.float() * dim**-0.5
    place = torch.arange(capacity * per_chunk, device=q.device)
    hidden = (place < control[FIRST_GROUP]) | (place >= control[FIRST_GROUP] + control[GROUPS])
    scores = torch.bmm(q, chunks.float().transpose(1, 2)).masked_fill_(hidden[::per_chunk], -torch.inf)
    best = scores.topk(min(topk_chunks, capacity), dim=2, sorted=False).indices
    scores = torch.bmm(q, groups.float().flatten(1, 2).transpose(1, 2)).masked_fill_(hidden, -torch.inf)
    candidates = (best[..., None] * per_chunk + place[:per_chunk]).flatten(2)
    found = scores.gather(2, candidates).topk(min(topk_groups, candidates.shape[2]), dim=2, sorted=False)
    # What is hidden is picked only where nothing else is left; it is hidden from every query head, so none disagree.
    picked = candidates.gather(2, found.indices).flatten(1)
    mask.zero_().scatter_(1, picked, (found.values > -torch.inf).flatten(1))
