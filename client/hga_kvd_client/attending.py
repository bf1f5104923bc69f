"""Attention of one block of tokens in one layer: the window, and what is opened of the stored groups.

One token, routed: route, plan on the bank, fetch what it misses, keep it, attend; in that order, each once. A block of
several tokens is exact over everything stored, tile by tile, or routed 64 tokens at a time with the paper's
visibility. Attention is exact over what is opened.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from hga_kvd_client import native
from hga_kvd_client.answers import Fetched
from hga_kvd_client.attention import ExactAttention, FlashAttention, decode_attention
from hga_kvd_client.bank import Bank, Kept, Plan
from hga_kvd_client.device_attending import DeviceAttending
from hga_kvd_client.held import Held
from hga_kvd_client.keys import record_keys
from hga_kvd_client.routing import causal_union
from hga_kvd_client.stored import StoredSession

# Tokens that are routed together in a routed prefill, as in the paper.
ROUTED_BLOCK_TOKENS = 64
# Numbers in a layer's routable keys up to which a token stays on one core of a CPU: its operations take some tens of us
# each, and to wake another core for one takes as long.
ONE_CORE_VALUES_MAX = 4 << 20


class Attending:
    """Of one session. q is [kv_heads, ratio, (tokens,) head_dim] after RoPE throughout; results have its shape."""

    def __init__(self, held: Held, stored: StoredSession) -> None:
        self.step = 0  # of the banks: tokens, and blocks of a routed prefill
        self.banks: list[Bank] = []  # made at the first routed step: prefill needs none
        self._options, self._device, self._dtype = held.options, held.device, held.dtype
        self._window, self._routing, self._stored, self._stats = held.window, held.routing, stored, held.stats
        self.on_device = DeviceAttending(held, stored)
        # What the last step opened, of each layer: first group and mask, or that the device's step knows.
        self._opened: list[tuple[int, Tensor] | DeviceAttending | None] = [None] * stored.geometry.layers

    def one(self, layer: int, q: Tensor, scale: float, seen: int) -> Tensor:
        """One token that sees `seen` tokens, itself included. Float32, or the K/V's dtype from a GPU's step."""
        geometry, stats = self._stored.geometry, self._stats
        first, end = self.routable()
        if self.on_device.takes(q, first, end):
            out = self.on_device.attend(layer, q, scale, seen, self.step, first, end)
            self._opened[layer] = self.on_device
            return out
        window_k, window_v = self._window.layer(layer, seen)
        if end <= first:
            self._opened[layer] = None
            return decode_attention(q, window_k, window_v, scale)
        first_group = first * geometry.groups_per_chunk
        values = geometry.kv_heads * (end - first) * geometry.chunk_tokens * geometry.head_dim
        with _one_core() if q.device.type == "cpu" and values <= ONE_CORE_VALUES_MAX else contextlib.nullcontext():
            mask, near = self._routing.route_one(layer, q, scale, first, end, window_k)
            plan, answer, kept = self._open(layer, mask, first_group)
            bank = self._bank(layer)
            if kept.over is None and native.serves(q, window_k):
                out = native.attend(q, scale, window_k, window_v, near, bank.records, kept.places, plan.counts)
            else:
                out = decode_attention(q, window_k, window_v, scale, *bank.gather(plan, kept), near)
        if answer is not None:
            stats.ram_bytes += answer.ram_records * geometry.record_bytes
            stats.nvme_bytes += answer.nvme_records * geometry.record_bytes
        self._opened[layer] = (first_group, mask)
        stats.opened_groups += plan.opened
        stats.routable_groups += mask.numel()
        stats.bank_bytes += (plan.opened - plan.misses) * geometry.record_bytes
        return out

    def exact_block(self, layer: int, q: Tensor, scale: float, seen: int) -> Tensor:
        """Tokens up to `seen`, each sees everything before it. Float32."""
        attention = FlashAttention(q, scale) if FlashAttention.serves(q) else ExactAttention(q, scale)
        for _, k, v, answer in self._stored.tiles(layer, *self.routable()):
            attention.add(k, v)
            self._count_prefill(answer)
        window_k, window_v = self._window.layer(layer, seen)
        attention.add(window_k, window_v, causal_offset=window_k.shape[1] - q.shape[2])
        return attention.result()

    def routed_block(self, layer: int, q: Tensor, scale: float, seen: int) -> Tensor:
        """Tokens up to `seen`, each sees the window and what it or an earlier one of its 64 asked for. Float32."""
        window_k, window_v = self._window.layer(layer, seen)
        first, end = self.routable()
        parts = []
        for start in range(0, q.shape[2], ROUTED_BLOCK_TOKENS):
            queries = q[:, :, start : start + ROUTED_BLOCK_TOKENS]
            attention = ExactAttention(queries, scale)
            attention.add(window_k, window_v, causal_offset=window_k.shape[1] - q.shape[2] + start)
            if end > first:
                self._add_routed(attention, layer, queries, scale, first, end)
            parts.append(attention.result())
        return torch.cat(parts, 2)

    def routable(self) -> tuple[int, int]:
        """Chunks that are in the daemon only: first, end."""
        return self._options.sink_chunks, self._window.tail_first // self._stored.geometry.chunk_tokens

    def opened(self, layer: int) -> Tensor:
        """What the last routed step opened in this layer: bool [kv_heads, groups], groups of all closed chunks."""
        geometry = self._stored.geometry
        groups = self._stored.chunks * geometry.groups_per_chunk
        everything = torch.zeros(geometry.kv_heads, groups, dtype=torch.bool, device=self._device)
        last = self._opened[layer]
        if isinstance(last, tuple):
            first, mask = last
            everything[:, first : first + mask.shape[1]] = mask
        elif last is not None:
            opened, counts = last.opened(layer)
            real = torch.arange(opened.shape[1], device=self._device) < counts[:, None]
            everything.scatter_(1, torch.where(real, opened, opened[:, :1]).long(), real | (counts[:, None] > 0))
        return everything

    def go_on_from(self, other: Attending) -> None:
        """Takes a copy of what another session of the same tokens has in its banks."""
        self.step, self.banks = other.step, copy.deepcopy(other.banks)

    def forget(self, chunks: int) -> None:
        """Groups of chunks from `chunks` on are no longer what they were."""
        for bank in self.banks:
            bank.forget(chunks * self._stored.geometry.groups_per_chunk)
        self.on_device.forget()
        self._opened = [None] * self._stored.geometry.layers

    def resident_bytes(self) -> int:
        return sum(bank.resident_bytes() for bank in self.banks) + self.on_device.resident_bytes()

    def _open(self, layer: int, mask: Tensor, first_group: int) -> tuple[Plan, Fetched | None, Kept]:
        """What the mask opens, from the bank and the daemon: the plan, the fetch, and where the records are now."""
        geometry, bank = self._stored.geometry, self._bank(layer)
        plan = bank.plan(mask, first_group, self.step)
        if not plan.misses:
            return plan, None, bank.keep(plan, None)
        answer = self._stored.fetch(record_keys(layer, *plan.missing()))
        shape = (plan.misses, 2, geometry.group_tokens, geometry.head_dim)
        return plan, answer, bank.keep(plan, self._stored.as_tensor(answer.records, shape))

    def _add_routed(self, attention: ExactAttention, layer: int, q: Tensor, scale: float, first: int, end: int) -> None:
        """Adds what these tokens route to. A token sees what it or an earlier one of them asked for."""
        near = attention.log_mass() if self._routing.weighs_window else None
        sees = causal_union(self._routing.route(layer, q, scale, first, end, near))
        self.step += 1  # what the last tokens opened may go now
        first_group = first * self._stored.geometry.groups_per_chunk
        plan, answer, kept = self._open(layer, sees[:, -1], first_group)
        k, v, valid = self._bank(layer).gather(plan, kept)
        if answer is not None:
            self._count_prefill(answer)
        columns = np.zeros(valid.shape, np.int64)
        columns[plan.heads, plan.ranks] = plan.groups - first_group
        opened = torch.from_numpy(columns).to(valid.device)
        visible = sees.gather(2, opened[:, None].expand(-1, q.shape[2], -1)) & valid[:, None]
        attention.add(k, v, visible=visible)

    def _count_prefill(self, answer: Fetched) -> None:
        record_bytes = self._stored.geometry.record_bytes
        self._stats.prefill_ram_bytes += answer.ram_records * record_bytes
        self._stats.prefill_nvme_bytes += answer.nvme_records * record_bytes

    def _bank(self, layer: int) -> Bank:
        if not self.banks:
            geometry = self._stored.geometry
            sizes = (geometry.kv_heads, self._options.bank_groups, geometry.group_tokens, geometry.head_dim)
            self.banks = [Bank(*sizes, self._dtype, self._device) for _ in range(geometry.layers)]
        return self.banks[layer]


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
