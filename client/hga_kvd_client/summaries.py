"""Mixed-RoPE means: one vector that stands for the keys of a block. Pure tensor maths, from keys as they are stored.

arXiv 2606.30709, DESIGN section 6. A RoPE pair with frequency f is *fast* if it turns by more than 0.5 rad over a
chunk, (chunk_tokens - 1) f > 0.5. Fast pairs: the mean of the rotated keys. Slow pairs: the mean of the unrotated
keys, rotated to the block's middle position start + (n - 1)//2. Other dims: the mean. Both chunks and groups split by
chunk_tokens.

Rotations compose: the slow part is the mean of R(p_mid - p_j) k_j over the stored keys k_j. The turn depends on the
place in the block alone, so a table of [n, rotary_dim / 2] turns serves every block, wherever it is.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from hga_kvd_client.options import Rope

FAST_RADIANS = 0.5


@dataclass(frozen=True)
class Turns:
    """Turns that bring the keys of a block to its middle; fast pairs are left where they are.

    cos, sin: [block_tokens, rotary_dim / 2], float32.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def of_block(cls, rope: Rope, block_tokens: int, chunk_tokens: int, device: torch.device) -> Turns:
        frequency = torch.tensor(rope.inv_freq, dtype=torch.float64)
        slow = (chunk_tokens - 1) * frequency <= FAST_RADIANS
        steps = (block_tokens - 1) // 2 - torch.arange(block_tokens, dtype=torch.float64)
        angle = steps[:, None] * torch.where(slow, frequency, 0.0)
        return cls(angle.cos().float().to(device), angle.sin().float().to(device))


def mixed_mean(keys: Tensor, turns: Turns) -> Tensor:
    """Summary of each block. keys: [..., block_tokens, head_dim], after RoPE. Returns [..., head_dim], float32."""
    pairs = turns.cos.shape[1]
    mean = keys.mean(-2, dtype=torch.float32)
    if pairs:
        # Means of k1 cos - k2 sin and k2 cos + k1 sin over the block, without a temporary the size of the keys' turn.
        first, second = keys[..., :pairs].float(), keys[..., pairs : 2 * pairs].float()
        tokens = turns.cos.shape[0]
        mean[..., :pairs] = ((first * turns.cos).sum(-2) - (second * turns.sin).sum(-2)) / tokens
        mean[..., pairs : 2 * pairs] = ((second * turns.cos).sum(-2) + (first * turns.sin).sum(-2)) / tokens
    return mean


class Summaries:
    """Summaries of all chunks of a session, in buffers that grow. Chunk c is at index c.

    chunks: [layers, kv_heads, capacity, head_dim]; groups: [layers, kv_heads, capacity, groups_per_chunk, head_dim].
    """

    # Chunks of head room at least: 4,096 tokens between growths; a quarter more once there are many.
    GROWTH_CHUNKS = 64

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        groups_per_chunk: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.count = 0
        self._shared = False
        self.chunks = torch.empty(layers, kv_heads, 0, head_dim, dtype=dtype, device=device)
        self.groups = torch.empty(layers, kv_heads, 0, groups_per_chunk, head_dim, dtype=dtype, device=device)

    @property
    def bytes_per_chunk(self) -> int:
        """All layers."""
        layers, kv_heads, _, groups, dim = self.groups.shape
        return layers * kv_heads * (1 + groups) * dim * self.groups.itemsize

    def put(self, first_chunk: int, packed: Tensor) -> None:
        """packed: [chunks, layers, kv_heads, 1 + groups_per_chunk, head_dim], the chunk's summary first."""
        end = first_chunk + packed.shape[0]
        assert first_chunk <= self.count, "summaries are put without a gap"
        if self._shared:
            self.chunks, self.groups, self._shared = self.chunks.clone(), self.groups.clone(), False
        self._reserve(end)
        values = packed.permute(1, 2, 0, 3, 4)
        self.chunks[:, :, first_chunk:end] = values[:, :, :, 0]
        self.groups[:, :, first_chunk:end] = values[:, :, :, 1:]
        self.count = max(self.count, end)

    def packed(self, first_chunk: int, end_chunk: int) -> Tensor:
        """What `put` was given for these chunks: [chunks, layers, kv_heads, 1 + groups_per_chunk, head_dim]."""
        assert end_chunk <= self.count
        chosen = slice(first_chunk, end_chunk)
        values = torch.cat((self.chunks[:, :, chosen, None], self.groups[:, :, chosen]), 3)
        return values.permute(2, 0, 1, 3, 4).contiguous()

    def truncate(self, count: int) -> None:
        """Forgets those of chunks from `count` on."""
        self.count = min(self.count, count)

    def fork(self) -> Summaries:
        """The same summaries for another session. Tensors are shared until one of the two puts more."""
        other = copy.copy(self)
        self._shared = other._shared = True
        return other

    def resident_bytes(self) -> int:
        return self.chunks.nbytes + self.groups.nbytes

    def _reserve(self, count: int) -> None:
        capacity = self.chunks.shape[2]
        if count <= capacity:
            return
        more = max(count, capacity + max(self.GROWTH_CHUNKS, capacity // 4)) - capacity
        self.chunks = grown(self.chunks, more)
        self.groups = grown(self.groups, more)


def grown(tensor: Tensor, more: int) -> Tensor:
    """A copy with `more` uninitialised places at the end of dim 2."""
    shape = list(tensor.shape)
    shape[2] += more
    grown = tensor.new_empty(shape)
    grown[:, :, : tensor.shape[2]] = tensor
    return grown
