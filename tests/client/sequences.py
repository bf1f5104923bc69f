"""A random sequence in the place of a model: q, k, v and ids of every token, and what dense attention makes of them."""

from __future__ import annotations

import numpy as np
import torch
from hga_kvd_client import Geometry, Rope

LAYERS, KV_HEADS, RATIO, DIM = 3, 2, 3, 16
ROPE = Rope(tuple(10000.0 ** (-i / 8) for i in range(8)), 16)
GEOMETRY = Geometry(LAYERS, KV_HEADS, DIM, "float32", model_fingerprint="test")
SCALE = 0.3


class Tokens:
    """Random q, k, v and ids of a sequence: the model."""

    def __init__(self, count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.k = torch.randn(LAYERS, KV_HEADS, count, DIM, generator=generator).to(dtype)
        self.v = torch.randn(LAYERS, KV_HEADS, count, DIM, generator=generator).to(dtype)
        self.q = torch.randn(LAYERS, KV_HEADS * RATIO, count, DIM, generator=generator).to(dtype) * 2
        self.ids = np.arange(count) * 7 % 50021

    def run(self, session, first: int, end: int) -> torch.Tensor:
        """One block through all layers: [layers, heads, tokens, dim]."""
        session.note_tokens(self.ids[first:end])
        outs = []
        for layer in range(LAYERS):
            session.append(layer, self.k[layer, :, first:end], self.v[layer, :, first:end])
            outs.append(session.attend(layer, self.q[layer, :, first:end], SCALE))
        return torch.stack(outs)

    def dense(self, first: int, end: int) -> torch.Tensor:
        k = self.k[:, :, :end].double().repeat_interleave(RATIO, 1)
        v = self.v[:, :, :end].double().repeat_interleave(RATIO, 1)
        seen = torch.arange(end, device=k.device) <= torch.arange(first, end, device=k.device)[:, None]
        return torch.nn.functional.scaled_dot_product_attention(
            self.q[:, :, first:end].double(), k, v, attn_mask=seen, scale=SCALE
        )


def blocks(sizes, count):
    first = 0
    while first < count:
        for size in sizes:
            if first < count:
                yield first, min(first + size, count)
                first = min(first + size, count)
