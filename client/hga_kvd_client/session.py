"""Session: one token sequence's K/V as a model sees it. The hub of the client; it alone knows the order of steps.

What always holds:
- Every token is in exactly one of three places for attention: the sinks, the tail (both in the window), or the daemon.
  Closed chunks are in the daemon as soon as the next block begins, also while they are still in the window.
- Layers are appended in order 0 .. L-1 for each block of tokens; `tokens` counts those that all layers have.
- Attention is exact over what it opens. A single token sees the window and the groups its router chose; a block of
  several tokens sees everything, or, if prefill is routed, what its tokens chose. Nothing damaged is ever attended.
- What this process holds is bounded by the window, the bank, the block at hand and the routing state, about 5 % of the
  K/V; the rest lives in the daemon.

Order of one block: append(0) closes the full chunks of the blocks before it (routing state, append, flush if it is
time), brings the routing state up if it lags, then takes the block; attend(0); append(1); attend(1); ...
Order of one routed step in a layer: route, plan on the bank, fetch what it misses, take it, attend.

Going back (`truncate`) and branching (`fork`) happen between blocks. Tokens that are not in closed chunks are taken back
here; closed chunks are taken back in the daemon, and then the window gets back what it would hold without them.

If the daemon is replaced under a named session, chunks that were not durable are appended again from the window.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hga_kvd_client import errors
from hga_kvd_client.answers import Fetched, Opened
from hga_kvd_client.attention import ExactAttention, decode_attention
from hga_kvd_client.bank import Bank, Plan
from hga_kvd_client.connection import Connection
from hga_kvd_client.geometry import Bytes, Keys
from hga_kvd_client.keys import check_statuses, extent_keys, record_keys, token_ranges
from hga_kvd_client.options import Rope, SessionOptions
from hga_kvd_client.routing import causal_union, window_log_mass
from hga_kvd_client.routing_state import BASIS_CHUNK, RoutingState
from hga_kvd_client.sketches import BASIS_KIND, PLAIN_KIND, Sketches, basis_kind, basis_parts, part_count, read_basis
from hga_kvd_client.stats import SessionStats
from hga_kvd_client.summaries import Summaries
from hga_kvd_client.window import Window

if TYPE_CHECKING:
    from hga_kvd_client.decode_step import DecodeStep, State

logger = logging.getLogger("hga_kvd_client")
Answer = TypeVar("Answer")

# Where a token takes the device's step. Tests add the CPU, where it runs the twins.
STEP_DEVICES = {"cuda"}
# Tokens that are routed together in a routed prefill, as in the paper.
ROUTED_BLOCK_TOKENS = 64
# Replacements of the daemon that one call survives before it gives up.
RECOVERIES_MAX = 3


def token_id_bytes(token_ids: Tensor | npt.NDArray[np.integer]) -> bytes:
    """As the wire has them: uint32, little-endian."""
    ids = token_ids.cpu().numpy() if isinstance(token_ids, Tensor) else token_ids
    return ids.reshape(-1).astype("<u4").tobytes()


class Session:
    """Made by Client.open. One caller at a time; sessions of one client take turns."""

    def __init__(
        self,
        connection: Connection,
        opened: Opened,
        rope: Rope,
        options: SessionOptions,
        device: torch.device,
        dtype: torch.dtype,
        tenant: str = "",
        ttl_s: int = 0,
    ) -> None:
        geometry = opened.geometry
        self.name = opened.name
        self.geometry = geometry
        self.options = options
        self.created = opened.created  # by this opening
        self.tenant, self.ttl_s = tenant, ttl_s
        self.stats = SessionStats()
        self.tokens = 0

        self._connection = connection
        self._session_id = opened.session_id
        self._epoch = opened.epoch
        self._generation = connection.generation
        self._durable_chunks = opened.durable_chunk_count
        self._flushes = bool(opened.name)
        self._closed = False

        self._device, self._dtype, self._rope = device, dtype, rope
        self._chunks = opened.chunk_count  # closed: appended to the daemon
        self._next_layer = 0  # 0: between blocks
        self._block = 0  # tokens of the block at hand, or of the last one
        self._step = 0
        # uint32 of all tokens, block at hand included; None once a block came without ids.
        self._token_ids: bytearray | None = bytearray()
        self._noted = b""

        shape = (geometry.layers, geometry.kv_heads)
        self._window = Window(
            *shape, geometry.head_dim, geometry.chunk_tokens, options.sink_chunks, options.recent_chunks, dtype, device
        )
        self._routing = RoutingState(geometry, rope, options, device, dtype)
        self._banks: list[Bank] = []  # made at the first routed step: prefill needs none
        # First group and mask, or the device step that knows.
        self._opened: list[tuple[int, Tensor] | DecodeStep | None] = [None] * geometry.layers
        self._device_step: DecodeStep | None = None  # made at the first routed step on a GPU
        self._device_step_refused = False
        self._states: tuple[Tensor, list[State]] | None = None  # and what they are views of

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()

    # The model's side.

    def note_tokens(self, token_ids: Tensor | npt.NDArray[np.integer]) -> None:
        """Ids of the next block's tokens, [tokens]; stored with its chunks. Leaving them out once is for good."""
        self._noted = token_id_bytes(token_ids)

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """K and V of a block's tokens in one layer: [kv_heads, tokens, head_dim], k after RoPE; copied.

        Raises: InvalidRequest for a layer out of order or another shape; with layer 0 all that storing chunks can
        raise, and then the block was not taken.
        """
        tokens = self._checked_block(layer, k, v)
        if layer == 0:
            far = self.tokens // self.geometry.chunk_tokens - self.options.recent_chunks > self.options.sink_chunks
            self._close_full_chunks(settle=far and (tokens == 1 or self.options.prefill == "routed"))
            self._begin_block(tokens)
        self._window.write(layer, self.tokens, k, v)
        self._next_layer = layer + 1
        if self._next_layer == self.geometry.layers:
            self._next_layer = 0
            self.tokens += tokens

    def attend(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """Attention of the tokens just appended to this layer.

        q: [heads, tokens, head_dim] after RoPE, heads a multiple of kv_heads. Returns the same shape and dtype.
        One token is routed; more are exact and causal, or routed if options.prefill says so.
        Raises: RecordsDamaged, SessionLost, InvalidRequest.
        """
        heads, tokens, dim = q.shape
        kv_heads = self.geometry.kv_heads
        if (self._next_layer or self.geometry.layers) - 1 != layer:
            raise errors.InvalidRequest(f"attend to layer {layer} must follow append to layer {layer}")
        if heads % kv_heads or dim != self.geometry.head_dim:
            raise errors.InvalidRequest(
                f"q is {tuple(q.shape)}; it must be [a multiple of {kv_heads}, tokens, {self.geometry.head_dim}]"
            )
        q_grouped = q.reshape(kv_heads, heads // kv_heads, tokens, dim)
        if tokens != self._block:
            raise errors.InvalidRequest(f"q has {tokens} tokens in a block of {self._block}")
        seen = self.tokens + (tokens if self._next_layer else 0)
        if tokens == 1:
            out = self._attend_routed(layer, q_grouped[:, :, 0], scale, seen)
            return out.reshape(heads, tokens, dim).to(q.dtype)
        if self._routing.searching:
            self._routing.look(layer, q_grouped, self._window.layer(layer, seen)[0][:, -tokens:])
        if self.options.prefill == "exact":
            out = self._attend_exact(layer, q_grouped, scale, seen)
        else:
            out = self._attend_block(layer, q_grouped, scale, seen)
        return out.reshape(heads, tokens, dim).to(q.dtype)

    def drop_block(self) -> None:
        """Forgets a block that some layers have and others have not, after a model that failed in between."""
        self._next_layer = self._block = 0  # nothing can be attended before the next append
        self._noted = b""
        if self._token_ids is not None:
            del self._token_ids[4 * self.tokens :]

    def opened(self, layer: int) -> Tensor:
        """What the last routed step opened in this layer: bool [kv_heads, groups], groups of all closed chunks."""
        groups = self._chunks * self.geometry.groups_per_chunk
        everything = torch.zeros(self.geometry.kv_heads, groups, dtype=torch.bool, device=self._device)
        last = self._opened[layer]
        if isinstance(last, tuple):
            first, mask = last
            everything[:, first : first + mask.shape[1]] = mask
        elif last is not None:
            opened, counts = last.opened(layer)
            real = torch.arange(opened.shape[1], device=self._device) < counts[:, None]
            everything.scatter_(1, torch.where(real, opened, opened[:, :1]).long(), real | (counts[:, None] > 0))
        return everything

    # Going back, and branching.

    def truncate(self, tokens: int) -> None:
        """Takes back all tokens from `tokens` on, and the block at hand: the session is as if they had never come.

        Closed chunks that go leave the daemon, durably if the session is named. Raises: InvalidRequest;
        RecordsDamaged if K/V that must come back into the window is damaged, and nothing was changed; SessionLost.
        """
        if not 0 <= tokens <= self.tokens:
            raise errors.InvalidRequest(f"cannot go back to token {tokens} in a session of {self.tokens}")
        self._checked_open()
        self.drop_block()
        if tokens < self._chunks * self.geometry.chunk_tokens:
            self._roll_back(tokens)
        self.tokens = tokens
        if self._token_ids is not None:
            del self._token_ids[4 * tokens :]

    def fork(self, name: str | None = None) -> Session:
        """A second session of the same tokens, which goes its own way from here; name as in Client.open.

        Closed chunks are shared in the daemon; window, bank and open chunk are copied. Raises: InvalidRequest in the
        middle of a block or if the name is taken, and what append can raise.
        """
        self._checked_open()
        if self._next_layer:
            raise errors.InvalidRequest(
                f"fork in the middle of a block: {self._next_layer} of {self.geometry.layers} layers have it"
            )
        self._close_full_chunks()
        opened = self._call(lambda: self._connection.fork(self._session_id, self._chunks, name or "", self._epoch))
        model_side = (self._rope, self.options, self._device, self._dtype)
        other = Session(self._connection, opened, *model_side, tenant=self.tenant, ttl_s=self.ttl_s)
        other.tokens, other._step = self.tokens, self._step
        other._token_ids = copy.copy(self._token_ids)
        self._window.reserve(self.tokens, 0)
        other._window, other._banks = copy.deepcopy((self._window, self._banks))
        other._routing = self._routing.fork()
        return other

    # Storage.

    def flush(self) -> None:
        """Closes the full chunks and returns when everything closed survives power loss.

        Raises: NotDurable (temporary session, or a daemon without NVMe), WriteFailed, and what append raises.
        """
        # Whoever takes the session up from here must route as this one goes on: with the basis of the same tokens.
        self._close_full_chunks(settle=self._routing.promising)
        if not self.name:
            raise errors.NotDurable("a temporary session is never durable: open it by a name")
        self._flush()

    def close(self) -> None:
        """Ends the session here. A named one is flushed and stays in the daemon; a temporary one is gone.

        May be called twice.
        """
        if self._closed:
            return
        if self.name:
            self._close_full_chunks(settle=self._routing.promising)
            if self._flushes and self._durable_chunks < self._chunks:
                self._flush_if_possible()
        self._call(lambda: self._connection.close(self._session_id))
        self._closed = True

    def delete(self) -> None:
        """Removes the session from the daemon, for every client."""
        self._call(lambda: self._connection.delete(self._session_id))
        self._closed = True

    def known_ids(self) -> npt.NDArray[np.uint32] | None:
        """Ids of all tokens, the open chunk's included: [tokens]; None if some were never told."""
        if self._token_ids is None:
            return None
        return np.frombuffer(bytes(self._token_ids[: 4 * self.tokens]), dtype="<u4").astype(np.uint32)

    def token_ids(self) -> npt.NDArray[np.uint32]:
        """Ids of the tokens in closed chunks, from the daemon: [tokens], or empty if some were never told."""
        info = self._call(lambda: self._connection.info(self._session_id))
        return np.frombuffer(info.token_ids, dtype="<u4").astype(np.uint32)

    def resume(self, salvage: bool = False) -> int:
        """Takes up a session that the daemon has chunks of: routing state, sinks and recent chunks come back.

        Called by Client.open. Returns the tokens restored, a multiple of chunk_tokens; those after them, less than a
        chunk, must be run through the model again. salvage: chunks from a damaged one on are given up.
        """
        assert self.tokens == 0
        assert self._block == 0
        while True:
            try:
                return self._resume()
            except errors.RecordsDamaged as error:
                if not salvage:
                    raise
                logger.warning("session %r is cut back to before the damage: %s", self.name, error)
                self._chunks = min(first for first, _ in error.token_ranges) // self.geometry.chunk_tokens
                self._call(lambda: self._cut(self._chunks))
                self._routing.truncate(self._chunks)
                self._durable_chunks = min(self._durable_chunks, self._chunks)

    def _resume(self) -> int:
        self._restore_routing()
        chunk_tokens = self.geometry.chunk_tokens
        sinks = min(self.options.sink_chunks, self._chunks)
        tail = max(sinks, self._chunks - self.options.recent_chunks)
        kept = (*self._stored_layers(0, sinks), *self._stored_layers(tail, self._chunks))
        self.tokens = self._chunks * chunk_tokens
        if tail > sinks:
            self._window.skip_to(tail * chunk_tokens)
        self._window.reserve(self.tokens, 0)
        for layer, first, k, v in kept:
            self._window.write(layer, first, k, v)
        ids = self._call(lambda: self._connection.info(self._session_id)).token_ids
        self._token_ids = bytearray(ids) if len(ids) == 4 * self.tokens else None
        return self.tokens

    # Sizes.

    def resident_bytes(self) -> int:
        """Bytes of K/V and of what stands for it in this process now: window, block at hand, bank, routing state."""
        banks = sum(bank.resident_bytes() for bank in self._banks)
        banks += self._device_step.resident_bytes() if self._device_step is not None else 0
        return self._window.resident_bytes() + self._routing.resident_bytes() + banks

    def full_bytes(self) -> int:
        """What a dense cache of these tokens takes."""
        geometry = self.geometry
        return self.tokens * geometry.layers * 2 * geometry.kv_heads * geometry.head_dim * geometry.dtype_bytes

    # A block.

    def _checked_open(self) -> None:
        if self._closed:
            raise errors.InvalidRequest("the session is closed: open it again")

    def _checked_block(self, layer: int, k: Tensor, v: Tensor) -> int:
        geometry = self.geometry
        self._checked_open()
        if layer != self._next_layer:
            raise errors.InvalidRequest(
                f"append to layer {layer}, but layer {self._next_layer} is next in this block; drop_block() forgets it"
            )
        tokens = k.shape[1] if k.dim() == 3 else 0
        if not tokens or k.shape != v.shape or k.shape[0] != geometry.kv_heads or k.shape[2] != geometry.head_dim:
            raise errors.InvalidRequest(
                f"k is {tuple(k.shape)} and v {tuple(v.shape)}; both must be [{geometry.kv_heads}, tokens, "
                f"{geometry.head_dim}] with at least one token"
            )
        if k.dtype != self._dtype or v.dtype != self._dtype:
            raise errors.InvalidRequest(f"k is {k.dtype} and v {v.dtype}; the session stores {self._dtype}")
        if layer and tokens != self._block:
            raise errors.InvalidRequest(f"layer {layer} has {tokens} tokens in a block of {self._block}")
        if not layer and self._noted and len(self._noted) != 4 * tokens:
            raise errors.InvalidRequest(f"{len(self._noted) // 4} token ids were noted for a block of {tokens} tokens")
        return tokens

    def _begin_block(self, tokens: int) -> None:
        self._window.reserve(self.tokens, tokens)
        self._block = tokens
        if self._token_ids is not None:
            if self._noted:
                self._token_ids += self._noted
            else:
                self._token_ids = None
        self._noted = b""
        if tokens == 1:
            self._step += 1
            self.stats.decode_steps += 1
        else:
            self.stats.prefill_tokens += tokens

    # Attention.

    def _attend_routed(self, layer: int, q: Tensor, scale: float, seen: int) -> Tensor:
        """q: [kv_heads, ratio, head_dim]. Returns the same shape, float32."""
        step = self._device_step_for(q)
        if step is not None:
            return self._attend_on_device(step, layer, q, scale, seen)
        window_k, window_v = self._window.layer(layer, seen)
        first, end = self._routable()
        if end <= first:
            self._opened[layer] = None
            return decode_attention(q, window_k, window_v, scale)
        geometry = self.geometry
        near = window_log_mass(q * scale, window_k) if self._routing.weighs_window else None
        mask = self._routing.route(layer, q, scale, first, end, near)
        first_group = first * geometry.groups_per_chunk
        plan, answer, (k, v, valid) = self._open(layer, mask, first_group)
        if answer is not None:
            self.stats.ram_bytes += answer.ram_records * geometry.record_bytes
            self.stats.nvme_bytes += answer.nvme_records * geometry.record_bytes
        self._opened[layer] = (first_group, mask)
        self.stats.opened_groups += plan.opened
        self.stats.routable_groups += mask.numel()
        self.stats.bank_bytes += (plan.opened - plan.misses) * geometry.record_bytes
        return decode_attention(q, window_k, window_v, scale, k, v, valid)

    def _open(
        self, layer: int, mask: Tensor, first_group: int
    ) -> tuple[Plan, Fetched | None, tuple[Tensor, Tensor, Tensor]]:
        """Records of what the mask opens, from the bank and the daemon: the plan, the fetch, and what Bank.take gives."""
        geometry, bank = self.geometry, self._bank(layer)
        plan = bank.plan(mask, first_group, self._step)
        if not plan.misses:
            return plan, None, bank.take(plan, None)
        heads, groups = plan.missing()
        answer = self._fetch(record_keys(layer, heads.cpu().numpy(), groups.cpu().numpy()))
        fetched = self._as_tensor(answer.records, (plan.misses, 2, geometry.group_tokens, geometry.head_dim))
        return plan, answer, bank.take(plan, fetched)

    def _attend_block(self, layer: int, q: Tensor, scale: float, seen: int) -> Tensor:
        """Routed prefill. q: [kv_heads, ratio, tokens, head_dim]. Returns the same shape, float32."""
        window_k, window_v = self._window.layer(layer, seen)
        first, end = self._routable()
        parts = []
        for start in range(0, q.shape[2], ROUTED_BLOCK_TOKENS):
            queries = q[:, :, start : start + ROUTED_BLOCK_TOKENS]
            attention = ExactAttention(queries, scale)
            attention.add(window_k, window_v, causal_offset=window_k.shape[1] - q.shape[2] + start)
            if end > first:
                self._add_routed(attention, layer, queries, scale, first, end)
            parts.append(attention.result())
        return torch.cat(parts, 2)

    def _add_routed(self, attention: ExactAttention, layer: int, q: Tensor, scale: float, first: int, end: int) -> None:
        """Adds what these tokens route to. A token sees what it or an earlier one of them asked for."""
        geometry = self.geometry
        near = attention.log_mass() if self._routing.weighs_window else None
        sees = causal_union(self._routing.route(layer, q, scale, first, end, near))
        self._step += 1  # of the bank: what the last tokens opened may go now
        first_group = first * geometry.groups_per_chunk
        plan, answer, (k, v, valid) = self._open(layer, sees[:, -1], first_group)
        if answer is not None:
            self.stats.prefill_ram_bytes += answer.ram_records * geometry.record_bytes
            self.stats.prefill_nvme_bytes += answer.nvme_records * geometry.record_bytes
        opened = torch.zeros(valid.shape, dtype=torch.int64, device=valid.device)
        opened[plan.heads, plan.ranks] = plan.groups - first_group
        visible = sees.gather(2, opened[:, None].expand(-1, q.shape[2], -1)) & valid[:, None]
        attention.add(k, v, visible=visible)

    def _attend_on_device(self, step: DecodeStep, layer: int, q: Tensor, scale: float, seen: int) -> Tensor:
        """As _attend_routed, with the kernels: what is resident is attended while the rest is fetched."""
        geometry = self.geometry
        first, end = self._routable()
        groups = (end - first) * geometry.groups_per_chunk
        if step.token != self._step:
            step.register(self._connection.landing)
            states, window = self._device_states(), self._window
            first_group = first * geometry.groups_per_chunk
            step.begin(self._step, window.everything, states, scale, window.place(seen), first_group, groups)
        step.start(layer, q)
        keys = step.misses(layer)
        if len(keys):
            try:
                answer = self._fetch(keys)
            except BaseException:
                step.abandon(layer)
                raise
            step.land(layer, answer.records)
            self._connection.reader = step.settle
            self.stats.ram_bytes += answer.ram_records * geometry.record_bytes
            self.stats.nvme_bytes += answer.nvme_records * geometry.record_bytes
        opened = step.opened_count(layer)
        self._opened[layer] = step
        self.stats.opened_groups += opened
        self.stats.routable_groups += groups * geometry.kv_heads
        self.stats.bank_bytes += (opened - len(keys)) * geometry.record_bytes
        # The step's own is overwritten by the layer's next token.
        return step.result(layer).view(q.shape).clone()

    def _device_step_for(self, q: Tensor) -> DecodeStep | None:
        """The device's step, if this token can take it: on a GPU, with something to route, and room for what is opened."""
        first, end = self._routable()
        if self._device.type not in STEP_DEVICES or self._device_step_refused or end <= first:
            return None
        ratio, most = q.shape[1], self._routing.opened_most(q.shape[1])
        window = self._window.everything.shape[3]
        if self._device_step is not None and self._device_step.fits(ratio, most, window):
            return self._device_step
        if not 0 < most <= self.options.bank_groups:
            return None
        try:
            from hga_kvd_client.decode_step import DecodeStep  # noqa: PLC0415
        except ImportError as error:
            logger.warning("decoding without kernels, slowly: %s", error)
            self._device_step_refused = True
            return None
        self._device_step = DecodeStep(
            self.geometry, ratio, self.options.bank_groups, most, window, self._dtype, self._device
        )
        return self._device_step

    def _device_states(self) -> list[State]:
        """What each layer routes with; the same list as long as nothing has moved."""
        from hga_kvd_client.decode_step import HgaState, SketchState  # noqa: PLC0415

        store, options = self._routing.store, self.options
        assert store is not None
        moved = store.groups if isinstance(store, Summaries) else store.records
        if self._states is None or self._states[0] is not moved:
            states: list[State]
            if isinstance(store, Summaries):
                both = zip(store.chunks, store.groups, strict=True)
                states = [HgaState(*layer, options.topk_chunks, options.topk_groups) for layer in both]
            else:
                budget = options.sketch_groups * self.geometry.kv_heads
                turns = zip(store.basis.to_z, store.basis.centre, store.records, strict=True)
                states = [SketchState(store.spec, z.contiguous(), c.contiguous(), r, budget) for z, c, r in turns]
            self._states = (moved, states)
        return self._states[1]

    def _attend_exact(self, layer: int, q: Tensor, scale: float, seen: int) -> Tensor:
        """q: [kv_heads, ratio, tokens, head_dim]. Returns the same shape, float32."""
        attention = ExactAttention(q, scale)
        for _, k, v, answer in self._stored_tiles(layer, *self._routable()):
            attention.add(k, v)
            self.stats.prefill_ram_bytes += answer.ram_records * self.geometry.record_bytes
            self.stats.prefill_nvme_bytes += answer.nvme_records * self.geometry.record_bytes
        window_k, window_v = self._window.layer(layer, seen)
        attention.add(window_k, window_v, causal_offset=window_k.shape[1] - q.shape[2])
        return attention.result()

    def _routable(self) -> tuple[int, int]:
        """Chunks that are in the daemon only: first, end."""
        return self.options.sink_chunks, self._window.tail_first // self.geometry.chunk_tokens

    def _bank(self, layer: int) -> Bank:
        if not self._banks:
            geometry = self.geometry
            self._banks = [
                Bank(
                    geometry.kv_heads,
                    self.options.bank_groups,
                    geometry.group_tokens,
                    geometry.head_dim,
                    self._dtype,
                    self._device,
                )
                for _ in range(geometry.layers)
            ]
        return self._banks[layer]

    # Closing chunks.

    def _close_full_chunks(self, settle: bool = False) -> None:
        """Appends every full chunk to the daemon, brings up the routing state, flushes if it is time, lets chunks older
        than the recent ones go. settle: the basis of the sketches is decided now."""
        geometry = self.geometry
        full = self.tokens // geometry.chunk_tokens
        if full > self._chunks:
            part = max(1, self._connection.append_bytes_max() // geometry.chunk_bytes)
            while self._chunks < full:
                end = min(self._chunks + part, full)
                first = self._chunks
                try:
                    self._call(lambda first=first, end=end: self._append_chunks(first, end))  # type: ignore[misc]
                except errors.LimitExceeded:
                    if end - first == 1:
                        raise
                    part = (end - first) // 2  # the daemon's arena may be smaller than our region
                    continue
                self._chunks = end
                self._call(lambda first=first, end=end: self._put_summaries(first, end))  # type: ignore[misc]
                self.stats.appended_chunks += end - first
        self._bring_up_routing(settle)
        if self._flushes and self._chunks - self._durable_chunks >= self.options.flush_chunks:
            self._flush_if_possible()
        longest = self.tokens + (self._block if self._next_layer else 0)
        self._window.drop((self._chunks - self.options.recent_chunks) * geometry.chunk_tokens, longest)

    def _bring_up_routing(self, settle: bool) -> None:
        """Settles the basis if it is time, and makes what the routing state lacks from stored keys."""
        routing = self._routing
        routing.settle(self._chunks, now=settle)
        count = routing.count
        while count is not None and count < self._chunks:
            end = min(count + self.options.prefill_tile_chunks, self._chunks)
            self._make_routing(count, end)
            count = routing.count
        if self._chunks and isinstance(routing.store, Sketches) and routing.basis_chunk is None:
            self._put_basis(routing.store)

    def _append_chunks(self, first: int, end: int) -> None:
        """Builds the payload of chunks first .. end-1 from the window, and appends it."""
        started = time.perf_counter()
        geometry = self.geometry
        payload = self._connection.append_buffer((end - first) * geometry.chunk_bytes)
        shape = (
            end - first,
            geometry.layers,
            geometry.kv_heads,
            geometry.groups_per_chunk,
            2,
            geometry.group_tokens,
            geometry.head_dim,
        )
        landing = torch.from_numpy(payload).view(self._dtype).view(shape)
        # On the CPU extents are built where the daemon reads them; on a GPU beside the model, and then copied once.
        extents = landing if self._device.type == "cpu" else torch.empty(shape, dtype=self._dtype, device=self._device)
        self._fill_extents(extents, first, end)
        entries = self._routing.make(first, extents[:, :, :, :, 0])
        if extents is not landing:
            landing.copy_(extents)
        ids = b""
        if self._token_ids is not None:
            ids = bytes(self._token_ids[4 * first * geometry.chunk_tokens : 4 * end * geometry.chunk_tokens])
        self._connection.append(self._session_id, first, end - first, payload, ids, epoch=self._epoch)
        self._routing.put(first, entries)
        self.stats.append_s += time.perf_counter() - started

    def _fill_extents(self, extents: Tensor, first: int, end: int) -> None:
        """extents: [chunks, layers, kv_heads, groups_per_chunk, K and V, group_tokens, head_dim], written."""
        geometry = self.geometry
        tokens = self._window.span(first * geometry.chunk_tokens, end * geometry.chunk_tokens)
        # [layers, K and V, kv_heads, chunks, groups, group_tokens, head_dim]
        blocks = (end - first, geometry.groups_per_chunk, geometry.group_tokens)
        apart = tokens.view(*tokens.shape[:3], *blocks, geometry.head_dim)
        extents.copy_(apart.permute(3, 0, 2, 4, 1, 5, 6))

    def _put_summaries(self, first: int, end: int) -> None:
        """What the routing state has of chunks first .. end-1."""
        end = min(end, self._routing.count or 0)
        if end <= first:
            return
        payload = self._routing.packed(first, end)
        try:
            self._connection.put_summaries(
                self._session_id, self._routing.kind, first, end - first, payload, epoch=self._epoch
            )
        except errors.LimitExceeded as error:
            # They are in memory here; only a later resume has to compute them again.
            logger.warning("summaries of chunks %d to %d are not stored: %s", first, end - 1, error)

    def _flush(self) -> None:
        self._durable_chunks = self._call(self._flush_everything)
        self.stats.flushes += 1

    def _flush_everything(self) -> int:
        durable = self._connection.flush(self._session_id)
        if durable < self._chunks:
            # A daemon replaced between two calls may have forgotten chunks that no call has missed yet.
            raise errors.SessionNotFound(f"the daemon holds {durable} of the {self._chunks} chunks appended to it")
        return durable

    def _flush_if_possible(self) -> None:
        try:
            self._flush()
        except errors.NotDurable as error:
            self._flushes = False
            logger.warning("session %r will not survive a restart of the daemon: %s", self.name, error)

    # Taking closed chunks back.

    def _roll_back(self, tokens: int) -> None:
        """Cuts the daemon's session to the whole chunks of `tokens`, and makes the window what it is for so many."""
        chunk_tokens = self.geometry.chunk_tokens
        chunks, needed = tokens // chunk_tokens, -(-tokens // chunk_tokens)
        tail = max(self.options.sink_chunks, chunks - self.options.recent_chunks)
        generation = self._generation
        try:
            if generation != self._connection.generation:
                self._recover(needed)
            # Before anything changes: what had left the window, the kept tokens of a chunk that opens again included.
            missing = self._stored_layers(tail, min(needed, self._window.tail_first // chunk_tokens))
            self._call(lambda: self._cut(chunks))
        except errors.KvdError:
            self._generation = generation
            raise
        self._window.rewind(tail * chunk_tokens, tokens)
        for layer, first, k, v in missing:
            kept = min(tokens - first, k.shape[1])
            self._window.write(layer, first, k[:, :kept], v[:, :kept])
        self._routing.truncate(chunks)
        for bank in self._banks:
            bank.forget(chunks * self.geometry.groups_per_chunk)
        if self._device_step is not None:
            self._device_step.forget()
        self._opened = [None] * self.geometry.layers
        self._chunks = chunks
        self._durable_chunks = min(self._durable_chunks, chunks)

    def _cut(self, chunks: int) -> None:
        try:
            self._epoch = self._connection.truncate(self._session_id, chunks, self._epoch)
        except errors.WriteFailed as error:
            # It is done, and a flush will say again what is wrong with the device.
            self._epoch += 1
            logger.warning("chunks from %d on may come back when the daemon is restarted: %s", chunks, error)

    # Stored K/V.

    def _stored_layers(self, first: int, end: int) -> list[tuple[int, int, Tensor, Tensor]]:
        """All layers of chunks first .. end-1: (layer, first token, k, v [kv_heads, tokens, head_dim]), in tiles."""
        return [
            (layer, chunk * self.geometry.chunk_tokens, k, v)
            for layer in range(self.geometry.layers)
            for chunk, k, v, _ in self._stored_tiles(layer, first, end)
        ]

    def _stored_tiles(self, layer: int, first: int, end: int) -> Iterator[tuple[int, Tensor, Tensor, Fetched]]:
        """K and V of chunks first .. end-1 in tiles: (first chunk, k, v [kv_heads, tile_tokens, head_dim], the fetch).

        Whole extents are read, in storage order. A tile is a copy.
        """
        geometry = self.geometry
        for start in range(first, end, self.options.prefill_tile_chunks):
            chunks = min(self.options.prefill_tile_chunks, end - start)
            answer = self._fetch(extent_keys(geometry, layer, start, chunks))
            shape = (chunks, geometry.kv_heads, geometry.groups_per_chunk, 2, geometry.group_tokens, geometry.head_dim)
            tile = self._as_tensor(answer.records, shape).permute(3, 1, 0, 2, 4, 5)
            k, v = tile.reshape(2, geometry.kv_heads, chunks * geometry.chunk_tokens, geometry.head_dim).unbind(0)
            yield start, k.to(self._device), v.to(self._device), answer

    def _fetch(self, keys: Keys) -> Fetched:
        started = time.perf_counter()
        answer = self._call(lambda: self._connection.fetch(self._session_id, keys, epoch=self._epoch))
        self.stats.fetch_s += time.perf_counter() - started
        self.stats.fetches += 1
        check_statuses(answer.statuses, keys, self.geometry.group_tokens)
        return answer

    def _as_tensor(self, records: Bytes, shape: tuple[int, ...]) -> Tensor:
        """A view of fetched bytes, in this process's memory; gone with the next fetch."""
        return torch.from_numpy(records.reshape(-1)).view(self._dtype).view(shape)

    # Routing state in the daemon.

    def _put_basis(self, sketches: Sketches) -> None:
        chunk = min(BASIS_CHUNK, self._chunks - 1)
        try:
            for kind, payload in basis_parts(None if sketches.plain else sketches.basis):
                self._call(
                    lambda kind=kind, payload=payload: self._connection.put_summaries(  # type: ignore[misc]
                        self._session_id, kind, chunk, 1, payload, epoch=self._epoch
                    )
                )
        except errors.LimitExceeded as error:
            # It is in memory here; a later resume makes another one, of the tokens that come then.
            logger.warning("the basis of the sketches is not stored: %s", error)
        self._routing.basis_chunk = chunk

    def _restore_routing(self) -> None:
        routing = self._routing
        routing.settle(self._chunks, now=False)
        if routing.searching:
            self._restore_basis()
        count = routing.count
        while count is not None and count < self._chunks:
            page = self._summary(routing.kind, count, self._chunks - count)
            if page is None:
                logger.warning("summaries of chunks from %d on are computed again from stored keys (slow)", count)
                self._make_routing(count, min(count + self.options.prefill_tile_chunks, self._chunks))
            else:
                routing.unpack(count, *page)
            count = routing.count

    def _restore_basis(self) -> None:
        """Takes the stored basis, if there is one; else it is still to be found."""
        geometry = self.geometry
        for chunk in range(min(BASIS_CHUNK, self._chunks - 1), -1, -1):
            found = self._summary(BASIS_KIND, chunk, 1)
            basis = None
            if found is not None:
                parts = [found] + [self._summary(basis_kind(n), chunk, 1) for n in range(1, part_count(found[1]))]
                shape = (geometry.layers, geometry.kv_heads, geometry.head_dim)
                try:
                    basis = read_basis([part[1] for part in parts if part is not None], shape, self._device)
                except ValueError as error:
                    logger.warning("the stored basis of session %r cannot be used: %s", self.name, error)
                    continue
            elif self._summary(PLAIN_KIND, chunk, 1) is None:
                continue
            self._routing.use_basis(basis)
            self._routing.basis_chunk = chunk
            return
        logger.warning(
            "session %r has no basis in the daemon: one is made of the prompt tokens that come now", self.name
        )

    def _summary(self, kind: str, first: int, count: int) -> tuple[int, bytes] | None:
        """Stored summaries from chunk `first` on, at least one, or None."""
        try:
            return self._call(
                lambda: self._connection.get_summaries(self._session_id, kind, first, count, epoch=self._epoch)
            )
        except errors.SummariesNotFound:
            return None

    def _make_routing(self, first: int, end: int) -> None:
        """Routing state of chunks first .. end-1, from stored keys."""
        geometry = self.geometry
        layers = []
        for layer in range(geometry.layers):
            for _, k, _, _ in self._stored_tiles(layer, first, end):
                apart = k.view(geometry.kv_heads, end - first, geometry.groups_per_chunk, geometry.group_tokens, -1)
                layers.append(apart.transpose(0, 1))
        self._routing.put(first, self._routing.make(first, torch.stack(layers, 1)))
        self._call(lambda: self._put_summaries(first, end))

    # A daemon that was replaced.

    def _call(self, call: Callable[[], Answer]) -> Answer:
        """Makes a call; if the daemon was replaced, finds or makes the session there first. Raises: SessionLost."""
        for _ in range(RECOVERIES_MAX):
            if self._generation != self._connection.generation:
                self._recover()
            try:
                return call()
            except (errors.SessionNotFound, errors.KeyOutOfRange, errors.AppendOutOfOrder):
                # What a daemon says that forgot something; or our own caller's mistake.
                if self._generation == self._connection.generation and not self._connection.notice_replacement():
                    raise
        raise errors.Unavailable(f"the daemon was replaced {RECOVERIES_MAX} times during one call: look at its log")

    def _recover(self, needed: int | None = None) -> None:
        """needed: chunks that must be there again, if not all: the others are about to be taken back."""
        # Kept only at the end: if this is cut short, or the daemon is replaced again, the next call comes back here.
        generation = self._connection.generation
        end = self._chunks if needed is None else needed
        if not self.name and (end or needed is None):
            raise errors.SessionLost("", [(0, self.tokens)])
        opened = self._connection.open(self.name, self.geometry, tenant=self.tenant, ttl_s=self.ttl_s)
        if opened.epoch != self._epoch and not opened.created and needed is None:
            raise errors.StaleEpoch(
                f"session {self.name!r} is at epoch {opened.epoch}, not {self._epoch}: somebody else took tokens back; "
                "open it again"
            )
        self._session_id, self._epoch = opened.session_id, opened.epoch
        # Chunks may be durable whose summaries are not: no flush of ours returned since they were put.
        unsure = self._durable_chunks
        self._durable_chunks = opened.durable_chunk_count
        lost = [c for c in range(opened.chunk_count, end) if not self._holds(c)]
        if lost:
            raise errors.SessionLost(self.name, token_ranges(lost, self.geometry.chunk_tokens))
        logger.warning(
            "session %r found again with %d of %d chunks; the others are appended again",
            self.name,
            opened.chunk_count,
            self._chunks,
        )
        for chunk in range(opened.chunk_count, end):
            self._append_chunks(chunk, chunk + 1)
        unsure = min(unsure, opened.chunk_count)
        if unsure < end:
            self._put_summaries(unsure, end)
        self._routing.doubt_basis(unsure)
        self.stats.recoveries += 1
        self._generation = generation

    def _holds(self, chunk: int) -> bool:
        return self._window.holds(chunk * self.geometry.chunk_tokens, (chunk + 1) * self.geometry.chunk_tokens)
