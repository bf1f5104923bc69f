"""The window: K/V of the tokens that are always attended, sinks first, then the tail. Plain tensors, no routing, no
I/O.

One buffer for all layers, [layers, K and V, kv_heads, capacity, head_dim], holds [sinks | tail] without a gap, so a
layer's window is one slice and attention needs no copy of it. The tail is the recent closed chunks and everything
after them; it starts right behind the sinks until the first chunk leaves. The window knows places, not how many
tokens a layer has.

One token may be *held*: not yet written, because a device's step will write it on its way. Whatever looks at the buffer
writes it first.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Window:
    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        chunk_tokens: int,
        sink_chunks: int,
        recent_chunks: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._chunk_tokens = chunk_tokens
        self._sink_tokens = sink_chunks * chunk_tokens
        # What decoding needs: recent chunks, and the open chunk, which is closed once it is full.
        self._decode_capacity = self._sink_tokens + (recent_chunks + 1) * chunk_tokens
        self._gap_tokens = 0  # tokens between the sinks and the tail
        self._written = torch.zeros(layers, 2, kv_heads, 0, head_dim, dtype=dtype, device=device)
        self._held: tuple[int, int, Tensor, Tensor] | None = None  # as write has it

    @property
    def tail_first(self) -> int:
        """First token of the tail: a multiple of chunk_tokens, at least the number of sink tokens."""
        return self._sink_tokens + self._gap_tokens

    def place(self, token: int) -> int:
        """Where a token of the session is in the buffer; it must be a sink or in the tail."""
        if token < self._sink_tokens:
            return token
        assert token >= self.tail_first, "the token has left the window"
        return token - self._gap_tokens

    def holds(self, first: int, end: int) -> bool:
        """Whether tokens first .. end-1, once written, are all in the window."""
        return end <= self._sink_tokens or first >= self.tail_first or self._gap_tokens == 0

    def reserve(self, tokens: int, more: int) -> None:
        """Makes room for tokens .. tokens + more - 1. What a long block takes, the next short one gives back."""
        used = self.place(tokens)
        needed = max(used + more, self._decode_capacity)
        capacity = self.capacity
        if capacity == needed or capacity > needed > self._decode_capacity:
            return
        shape = list(self._buffer.shape)
        shape[3] = needed
        buffer = self._buffer.new_empty(shape)
        kept = min(used, capacity)
        buffer[..., :kept, :] = self._buffer[..., :kept, :]
        self._written = buffer

    def write(self, layer: int, first: int, k: Tensor, v: Tensor) -> None:
        """k, v: [kv_heads, tokens, head_dim] of tokens first, first + 1, ...; copied. Room must be reserved."""
        start = self.place(first)
        end = start + k.shape[1]
        self._buffer[layer, 0, :, start:end] = k
        self._buffer[layer, 1, :, start:end] = v

    def write_tiles(self, layer: int, first: int, tiles: Tensor, end: int) -> None:
        """As write, of several layers from `layer` on, as they are stored: [layers, K and V, kv_heads, chunks, groups,
        group_tokens, head_dim]; tokens from `end` on are left out."""
        tokens = min(end - first, tiles[0, 0, 0].numel() // tiles.shape[-1])
        start = self.place(first)
        place = self._buffer[layer : layer + len(tiles), :, :, start : start + tokens]
        if tokens % self._chunk_tokens:
            place.copy_(tiles.flatten(3, 5)[..., :tokens, :])
        else:
            kept = tiles[:, :, :, : tokens // self._chunk_tokens]
            place.view(*place.shape[:3], *kept.shape[3:]).copy_(kept)

    def hold(self, layer: int, token: int, k: Tensor, v: Tensor) -> None:
        """As write, of one token, k and v contiguous; but they may stay where they are until somebody looks."""
        self._write_held()
        self._held = (layer, token, k, v)

    def take_held(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """K and V that are held of this layer; the caller writes them to their place, and the window forgets them."""
        if self._held is None or self._held[0] != layer:
            return None
        _, _, k, v = self._held
        self._held = None
        return k, v

    def layer(self, layer: int, tokens: int) -> tuple[Tensor, Tensor]:
        """K and V of a layer that has `tokens` tokens, each [kv_heads, window_tokens, head_dim]: views."""
        end = self.place(tokens)
        return self._buffer[layer, 0, :, :end], self._buffer[layer, 1, :, :end]

    @property
    def capacity(self) -> int:
        """Tokens that the buffer has room for."""
        return self._written.shape[3]

    @property
    def everything(self) -> Tensor:
        """All layers, with the room that is not used: [layers, K and V, kv_heads, capacity, head_dim]."""
        return self._buffer

    def span(self, first: int, end: int) -> Tensor:
        """All layers of tokens first .. end-1, which must lie in one piece; [layers, 2, kv_heads, tokens, dim]."""
        assert self.holds(first, end)
        start = self.place(first)
        return self._buffer[..., start : start + end - first, :]

    def start_at(self, tail_first: int) -> None:
        """Empties the window and starts its tail at token tail_first: what lies between it and the sinks is elsewhere."""
        self._held, self._written = None, self._written[..., :0, :]
        self._gap_tokens = tail_first - self._sink_tokens

    def drop(self, tail_first: int, tokens: int) -> None:
        """Forgets the tail before token tail_first; `tokens` is how many tokens the longest layer has."""
        tail_first = max(tail_first, self._sink_tokens)
        shift = tail_first - self.tail_first
        if shift <= 0:
            return
        start, end = self._sink_tokens, self.place(tokens)
        kept = self._buffer[..., start + shift : end, :]
        # Ranges that overlap must not be copied onto themselves.
        self._buffer[..., start : end - shift, :] = kept.clone() if shift < end - start - shift else kept
        self._gap_tokens += shift

    def rewind(self, tail_first: int, tokens: int) -> None:
        """Starts the tail earlier, at token tail_first, in a session that is cut back to `tokens`.

        Tokens from there to the old start of the tail have left the window: the caller writes them again.
        """
        tail_first = max(tail_first, self._sink_tokens)
        shift = self.tail_first - tail_first
        if shift <= 0:
            return
        sinks, kept = self._sink_tokens, self.place(max(tokens, self.tail_first))
        buffer = self._buffer
        self._gap_tokens -= shift
        shape = list(buffer.shape)
        shape[3] = max(self.place(tokens), kept + shift, self._decode_capacity)
        self._written = buffer.new_empty(shape)
        self._buffer[..., :sinks, :] = buffer[..., :sinks, :]
        self._buffer[..., sinks + shift : kept + shift, :] = buffer[..., sinks:kept, :]

    def resident_bytes(self) -> int:
        return self._written.nbytes

    @property
    def _buffer(self) -> Tensor:
        self._write_held()
        return self._written

    def _write_held(self) -> None:
        if self._held is not None:
            held, self._held = self._held, None
            self.write(*held)
