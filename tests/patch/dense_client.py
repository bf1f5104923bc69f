"""A client of the same interface as hga_kvd_client that keeps everything in this process and attends to all of it.

It is strict about what it is given, and it remembers the sizes of the blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from hga_kvd_client import Geometry, Rope, SessionOptions
from torch import Tensor

CHUNK = 64


@dataclass
class Stored:
    """Closed chunks of a named session: k and v a layer [kv_heads, tokens, head_dim], and ids or None."""

    geometry: Geometry
    layers: list[tuple[Tensor, Tensor]]
    ids: np.ndarray | None


class DenseSession:
    def __init__(self, client: DenseClient, name: str | None, geometry: Geometry, like: Tensor) -> None:
        self.client, self.name, self.geometry = client, name or "", geometry
        self.tokens = 0
        self.created = True
        self.blocks: list[int] = []
        self.closed = False
        empty = like.new_empty(geometry.kv_heads, 0, geometry.head_dim)
        self.layers = [(empty, empty) for _ in range(geometry.layers)]
        self._ids: list[np.ndarray] | None = []
        self._noted: np.ndarray | None = None
        self._next_layer = 0
        if name and name in client.stored:
            stored = client.stored[name]
            assert stored.geometry == geometry
            self.layers = list(stored.layers)
            self.tokens = self.layers[0][0].shape[1]
            self._ids = None if stored.ids is None else [stored.ids]
            self.created = False

    def note_tokens(self, token_ids: Tensor) -> None:
        self._noted = token_ids.cpu().numpy().astype(np.uint32)

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        assert not self.closed
        assert layer == self._next_layer
        assert k.shape == v.shape
        assert k.shape[0::2] == (self.geometry.kv_heads, self.geometry.head_dim)
        if layer == 0:
            self.client.before_block()
            self.blocks.append(k.shape[1])
            if self._noted is None or len(self._noted) != k.shape[1]:
                self._ids = None
            if self._ids is not None:
                self._ids.append(self._noted)
            self._noted = None
        assert k.shape[1] == self.blocks[-1]
        old_k, old_v = self.layers[layer]
        self.layers[layer] = torch.cat((old_k, k), 1), torch.cat((old_v, v), 1)
        self._next_layer = (layer + 1) % self.geometry.layers
        if self._next_layer == 0:
            self.tokens += k.shape[1]

    def attend(self, layer: int, q: Tensor, scale: float) -> Tensor:
        k, v = self.layers[layer]
        ratio, tokens = q.shape[0] // k.shape[0], q.shape[1]
        scores = q @ k.repeat_interleave(ratio, 0).transpose(1, 2) * scale
        hidden = torch.ones(tokens, k.shape[1], dtype=torch.bool, device=q.device).triu(1 + k.shape[1] - tokens)
        return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v.repeat_interleave(ratio, 0)

    def known_ids(self) -> np.ndarray | None:
        return None if self._ids is None else np.concatenate([*self._ids, np.empty(0, np.uint32)])

    def truncate(self, tokens: int) -> None:
        assert not self.closed
        assert 0 <= tokens <= self.tokens
        self.tokens, self._next_layer, self._noted = tokens, 0, None
        self.layers = [(k[:, :tokens], v[:, :tokens]) for k, v in self.layers]
        if self._ids is not None:
            self._ids = [self.known_ids()[:tokens]]

    def fork(self) -> DenseSession:
        assert not self.closed
        assert self._next_layer == 0
        other = DenseSession(self.client, None, self.geometry, self.layers[0][0])
        other.tokens, other.layers = self.tokens, list(self.layers)
        other._ids = None if self._ids is None else list(self._ids)
        self.client.sessions.append(other)
        return other

    def close(self) -> None:
        if self.name and not self.closed:
            whole = self.tokens // CHUNK * CHUNK
            layers = [(k[:, :whole], v[:, :whole]) for k, v in self.layers]
            ids = None if self._ids is None else self.known_ids()[:whole]
            self.client.stored[self.name] = Stored(self.geometry, layers, ids)
        self.closed = True


@dataclass
class DenseClient:
    stored: dict[str, Stored] = field(default_factory=dict)
    sessions: list[DenseSession] = field(default_factory=list)
    fail_at_block: int = 0  # the block, counted from 1, whose append fails

    def before_block(self) -> None:
        self.fail_at_block -= 1
        if self.fail_at_block == 0:
            raise ConnectionError("the daemon is away")

    def open(
        self,
        name: str | None,
        geometry: Geometry,
        rope: Rope,
        options: SessionOptions,
        device: torch.device,
        dtype: torch.dtype,
        tenant: str = "",
        ttl_s: int = 0,
    ) -> DenseSession:
        self.sessions.append(DenseSession(self, name, geometry, torch.empty(0, device=device, dtype=dtype)))
        return self.sessions[-1]

    def close(self) -> None:
        raise AssertionError("a client that was given to patch is not patch's to close")
