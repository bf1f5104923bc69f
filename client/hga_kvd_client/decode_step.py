"""The decode step of one token on the device: route, bank and attention of a layer, without a synchronisation but one.

    step.begin(...)                # once a token
    step.start(layer, q, k, v)     # the whole layer is queued
    keys = step.misses(layer)      # the one synchronisation
    step.land(layer, records)      # only if there are misses: they are there, the device may go on
    out = step.result()

What always holds:
- Attention is over [window | opened groups], in parts; what is resident is attended while the misses travel, and the
  parts are merged by log-sum-exp.
- All shapes are fixed; nothing is allocated in a step. A layer's step is one CUDA graph, made the second time and made
  again when one of its tensors has moved (a window or a routing state grew).
- Inside the graph the device waits for `land`. From `start` until `land` or `abandon` the caller must make no other call
  that waits for the device: it would wait for the caller.
- The bank names misses before their bytes are there. `abandon` forgets the layer if they do not come.
- On CPU tensors, and before the graph is made, the same work is done in two halves, before `misses` and after `land`.

Shared by the layers: buffers of the parts and lists. Per layer: the bank (records and tables) and a mailbox.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hga_kvd_client.geometry import KEY_DTYPE, Bytes, Geometry, Keys
from hga_kvd_client.kernels import (
    CONTROL_SIZE,
    COUNT_MASK,
    FIRST_GROUP,
    GROUPS,
    MAIL_K,
    MAIL_POSTED,
    MAIL_Q,
    MAIL_READY,
    MAIL_V,
    NEVER,
    OPENED_SHIFT,
    READY_SHIFT,
    STAGED,
    STEP,
    STEP_SHIFT,
    WINDOW_TOKENS,
    attention,
    bank,
    mail_keys,
    mail_words,
    select,
    take,
)
from hga_kvd_client.kernels import sketch as sketch_kernels
from hga_kvd_client.kernels.hga import open_hga
from hga_kvd_client.registered import Registered
from hga_kvd_client.sketch import SketchSpec

# Torch has no types for some of it.
cuda: Any = torch.cuda

# Keys of one part: few enough that a window of 768 tokens and 4 KV heads fill 48 of 132 multiprocessors.
PART_KEYS = 64
# A route that takes longer than this may have failed: the device is asked.
ROUTE_MAX_S = 10.0
NO_KEYS: Keys = np.empty(0, KEY_DTYPE)


@dataclass(frozen=True)
class SketchState:
    """Of one layer: to_z [kv_heads, head_dim, head_dim], centre [kv_heads, head_dim], records [kv_heads, chunks, bytes];
    budget: groups of the layer; cover: as in SessionOptions."""

    spec: SketchSpec
    to_z: Tensor
    centre: Tensor
    records: Tensor
    budget: int
    cover: float = 1.0

    def tensors(self) -> tuple[Tensor, ...]:
        return self.to_z, self.centre, self.records


@dataclass(frozen=True)
class HgaState:
    """Of one layer: chunks [kv_heads, chunks, head_dim], groups [kv_heads, chunks, groups_per_chunk, head_dim]."""

    chunks: Tensor
    groups: Tensor
    topk_chunks: int
    topk_groups: int

    def tensors(self) -> tuple[Tensor, ...]:
        return self.chunks, self.groups


State = SketchState | HgaState


class Calls(NamedTuple):
    """The kernels, or their twins."""

    window_parts: Callable[..., None]
    paged_parts: Callable[..., None]
    merge: Callable[..., None]
    take: Callable[..., None]
    log_mass: Callable[..., None]
    pool: Callable[..., None]
    gather: Callable[..., None]
    gather_mask: Callable[..., None]
    place: Callable[..., None]
    land: Callable[..., None]

    @classmethod
    def of(cls, suffix: str) -> Calls:
        modules = (attention, take, sketch_kernels, select, bank)
        return cls(*(next(getattr(m, n + suffix) for m in modules if hasattr(m, n + suffix)) for n in cls._fields))


KERNELS, TWINS = Calls.of(""), Calls.of("_twin")


def _captured(work: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    """pool: of graphs that are made and dropped together; with the last of them goes the pool."""
    graph = torch.cuda.CUDAGraph()
    stream = cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            work()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


class DecodeStep:
    """Of one session. ratio: query heads of a KV head. most: groups that a KV head can open in a step, at most `slots`.

    window_capacity: tokens that the window can have.
    """

    def __init__(
        self,
        geometry: Geometry,
        ratio: int,
        slots: int,
        most: int,
        window_capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        calls: Calls | None = None,
    ) -> None:
        layers, kv_heads, dim = geometry.layers, geometry.kv_heads, geometry.head_dim
        most = 1 << max(4, (most - 1).bit_length())
        assert most <= slots, "everything opened in a step must fit in the bank"
        self.most, self.token = most, -1
        self._geometry, self._device = geometry, device
        self._on_gpu = device.type == "cuda"
        self._calls = calls or (KERNELS if self._on_gpu else TWINS)
        heads = kv_heads * ratio

        def empty(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=kind, device=device)

        # As they are stored: in the dtype of the window, or in 8 bits.
        stored = torch.uint8 if geometry.dtype == "float8_e4m3fn" else dtype
        self.records = empty(layers, kv_heads, slots, 2, geometry.group_tokens, dim, kind=stored).zero_()
        self._tables = [bank.Tables.empty(kv_heads, slots, most, device) for _ in range(layers)]
        self._chosen = select.Chosen.empty(kv_heads, most, device)
        self._lists = bank.Lists.empty(kv_heads, most, device)
        self._q = empty(kv_heads, ratio, dim, kind=dtype)
        self._z = empty(kv_heads, ratio, dim)

        self._near = -(-window_capacity // PART_KEYS)
        self._part_slots = max(1, PART_KEYS // geometry.group_tokens)
        paged = -(-most // self._part_slots)
        self._early = self._near + paged
        self._out, self._lse = empty(self._early + paged, heads, dim), empty(self._early + paged, heads)
        self._result, self._lse_of_all = empty(heads, dim, kind=dtype), empty(heads)

        # Of the sketch's selection; grows with its state.
        self._log_mass = self._mass = self._group_lse = empty(0)
        self._mask = empty(0, kind=torch.bool)

        pinned = self._on_gpu
        self._control_host = torch.zeros(CONTROL_SIZE, dtype=torch.int64, pin_memory=pinned)
        self._control_numbers = self._control_host.numpy()
        self._control = self._control_host.to(device) if self._on_gpu else self._control_host
        self._mail = torch.zeros(layers, mail_words(kv_heads, most), dtype=torch.int64, pin_memory=pinned)
        # The host's side of it: views that cost little to index.
        self._mail_host = [memoryview(row) for row in self._mail.numpy()]
        first, width = mail_keys(kv_heads), most
        self._keys_host = [[row[first + h * width :][:width] for h in range(kv_heads)] for row in self._mail_host]
        self._posted_host = [row[MAIL_POSTED:][:kv_heads] for row in self._mail_host]
        self._staging = torch.empty(kv_heads * most * geometry.record_bytes // 8, dtype=torch.int64, pin_memory=pinned)
        self._staging_host = self._staging.numpy().view(np.uint8)
        self._landing: Registered | None = None
        self._moved = True

        self._graphs: list[torch.cuda.CUDAGraph | None] = [None] * layers
        self._warm = [False] * layers  # whether a layer's work was done without a graph
        self._pool: Any = None
        # A launch that returns only when its work is done never would.
        self._replays = self._on_gpu and os.environ.get("CUDA_LAUNCH_BLOCKING", "0") in ("", "0")
        self._whole = False  # whether the layer under way is a graph
        self._side = cuda.Stream(device) if self._on_gpu else None
        self._reading = False
        self._step = 0
        self._window, self._scale = empty(0), 0.0
        self._states: Sequence[State] = ()

    def begin(
        self,
        token: int,
        window: Tensor,
        states: Sequence[State],
        scale: float,
        window_tokens: int,
        first_group: int,
        groups: int,
    ) -> None:
        """Before the first layer of a token: what the layers of this step see.

        token: the caller's number of it, kept as `token`.
        window: [layers, K and V, kv_heads, capacity, head_dim], the first window_tokens of it. states: one a layer. While
        both are the same objects as before, their tensors must be where they were.
        groups: how many may be opened, from first_group on.
        """
        self.token = token
        if self._moved or window is not self._window or states is not self._states or scale != self._scale:
            self._window, self._states, self._scale, self._moved = window, states, scale, False
            self._reserve(states[0])
            layers = len(self._graphs)
            self._graphs, self._warm = [None] * layers, [False] * layers
            self._pool = torch.cuda.graph_pool_handle() if self._on_gpu else None
        self._step += 1
        numbers = self._control_numbers
        numbers[WINDOW_TOKENS], numbers[FIRST_GROUP], numbers[GROUPS], numbers[STEP] = (
            window_tokens, first_group, groups, self._step,
        )  # fmt: skip
        if self._on_gpu:
            self._control.copy_(self._control_host, non_blocking=True)

    def start(self, layer: int, q: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> None:
        """Queues one layer's step. q: [kv_heads, ratio, head_dim]; k, v: [kv_heads, 1, head_dim] of the token, or None:
        the window has them. All in the dtype of K and V, contiguous, unchanged until the device has come to them.
        """
        mail = self._mail_host[layer]
        mail[MAIL_Q] = q.data_ptr()
        mail[MAIL_K], mail[MAIL_V] = (0, 0) if k is None or v is None else (k.data_ptr(), v.data_ptr())
        # Without a graph at first: what is not compiled and loaded yet could not be while the device waits.
        self._whole = self._replays and self._warm[layer]
        if not self._whole:
            self._warm[layer] = True
            self._route(layer)
            return
        graph = self._graphs[layer]
        if graph is None:
            graph = self._graphs[layer] = _captured(lambda: self._both(layer), self._pool)
        graph.replay()

    def misses(self, layer: int) -> Keys:
        """Keys of what the layer opened and the bank did not hold, [misses], by KV head, then group.

        Returns when the device has posted them.
        """
        step, words, parts = self._step, self._posted_host[layer], []
        for head, keys in enumerate(self._keys_host[layer]):
            word = words[head]
            if word >> STEP_SHIFT != step:
                word = self._posted(layer, head)
            if word & COUNT_MASK:
                parts.append(keys[: word & COUNT_MASK])
        self._reading = False  # graphs follow each other: what an earlier layer had to read is read
        if not parts and not self._whole:
            self._finish(layer)
        return np.frombuffer(b"".join(parts), KEY_DTYPE) if parts else NO_KEYS

    def land(self, layer: int, records: Bytes) -> None:
        """Takes what was fetched for the keys that `misses` returned: uint8 [misses, record_bytes], in their order.

        Read in place if it lies in the registered landing: it must stay until `settle` or the next `misses` returns.
        """
        self._mail_host[layer][MAIL_READY] = self._step << READY_SHIFT | self._placed(records)
        if not self._whole:
            self._finish(layer)
        self._reading = self._on_gpu

    def settle(self) -> None:
        """Returns when the device has read what `land` was given last."""
        if self._reading:
            torch.cuda.current_stream(self._device).synchronize()
            self._reading = False

    def result(self) -> Tensor:
        """Attention of the layer, [heads, head_dim] in the dtype of K and V; overwritten by the next layer."""
        return self._result

    def opened(self, layer: int) -> tuple[Tensor, Tensor]:
        """Groups that the layer's last step opened: int32 [kv_heads, most], sorted, and how many, [kv_heads]."""
        tables = self._tables[layer]
        return tables.opened, tables.opened_counts

    def opened_count(self, layer: int) -> int:
        return sum((word >> OPENED_SHIFT) & COUNT_MASK for word in self._posted_host[layer])

    def abandon(self, layer: int) -> None:
        """A fetch failed: the device goes on without it, and the layer's bank forgets what it holds. The token's other
        layers stay as they are; the next thing to do is `begin`."""
        self._mail_host[layer][MAIL_READY] = self._step << READY_SHIFT | NEVER
        self._tables[layer].forget()
        self.token = -1

    def forget(self) -> None:
        """Forgets what all banks hold: groups are no longer what they were."""
        for tables in self._tables:
            tables.forget()

    def fits(self, ratio: int, most: int, window_capacity: int) -> bool:
        """Whether it was made for such queries, for as many groups, and for a window of this size."""
        return self._q.shape[1] == ratio and self.most == most and window_capacity <= self._near * PART_KEYS

    def register(self, landing: Bytes | None) -> None:
        """Makes the memory where fetched records arrive readable by the device; None: there is none."""
        if not self._on_gpu or landing is None:
            return
        if self._landing is None or self._landing.place != landing.ctypes.data:
            self._landing = Registered.of(landing)
            self._moved = True  # graphs that read the old one are made again

    def resident_bytes(self) -> int:
        """Bytes on the device: bank, tables, buffers of the step."""
        held = [self.records, self._q, self._z, self._out, self._lse, self._result, self._log_mass, self._mass]
        held += [self._group_lse, self._mask]
        for item in (*self._tables, self._chosen, self._lists):
            held += vars(item).values()
        return sum(t.nbytes for t in held)

    # The two halves.

    def _both(self, layer: int) -> None:
        self._route(layer)
        self._finish(layer)

    def _route(self, layer: int) -> None:
        """Up to what is resident."""
        calls, lists, tables, mail = self._calls, self._lists, self._tables[layer], self._mail[layer]
        (k, v), scale, state = self._window[layer], self._scale, self._states[layer]
        near = slice(0, self._near)
        if isinstance(state, SketchState):
            calls.take(mail, self._control, self._q, k, v, self._chosen, scale, state.to_z, self._z)
        else:
            calls.take(mail, self._control, self._q, k, v, self._chosen)
        with self._beside():
            calls.window_parts(self._q, k, v, self._control, scale, PART_KEYS, self._out[near], self._lse[near])
        if isinstance(state, SketchState):
            self._choose_by_sketch(state)
            budget, capacity = state.budget, self._mass.shape[1]
            uncovered = (1.0 - state.cover) * self._lse.shape[1] if state.cover < 1.0 else None
        else:
            self._choose_by_hga(state)
            budget, capacity, uncovered = self._geometry.kv_heads * self.most, self._mask.shape[1], None
        calls.place(self._chosen, self._control, layer, budget, capacity, tables, lists, mail, uncovered)
        self._attend(layer, lists.held, lists.held_counts, slice(self._near, self._early))

    def _choose_by_sketch(self, state: SketchState) -> None:
        calls = self._calls
        calls.log_mass(state.spec, self._z, state.centre, state.records, self._control, self._log_mass, self._group_lse)
        self._join()
        near = self._lse[: self._near]
        calls.pool(self._log_mass, near, self._group_lse, self._control, self._mass, self._chosen)
        calls.gather(self._mass, self._control, state.budget, self._chosen, state.cover < 1.0)

    def _choose_by_hga(self, state: HgaState) -> None:
        open_hga(self._q, state.chunks, state.groups, self._control, state.topk_chunks, state.topk_groups, self._mask)
        self._join()
        self._calls.gather_mask(self._mask, self._control, self._chosen)

    def _attend(self, layer: int, slots: Tensor, counts: Tensor, parts: slice) -> None:
        out, lse = self._out[parts], self._lse[parts]
        self._calls.paged_parts(self._q, self.records[layer], slots, counts, self._scale, self._part_slots, out, lse)

    def _finish(self, layer: int) -> None:
        """What came late, and the result."""
        lists, tables, records = self._lists, self._tables[layer], self.records[layer]
        landing = self._staging if self._landing is None or self._landing.words is None else self._landing.words
        self._calls.land(landing, self._staging, self._mail[layer], self._control, lists, tables, records)
        self._attend(layer, lists.late, lists.late_counts, slice(self._early, None))
        self._calls.merge(self._out, self._lse, self._result, self._lse_of_all)

    # Host and device.

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """On another stream, from the current one's present on; `_join` waits for it."""
        if self._side is None:
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            yield

    def _join(self) -> None:
        if self._side is not None:
            torch.cuda.current_stream().wait_stream(self._side)

    def _posted(self, layer: int, head: int) -> int:
        """The word of a KV head, once the device has posted it."""
        step, words = self._step, self._posted_host[layer]
        give_up_at = time.monotonic() + ROUTE_MAX_S
        while True:
            for _ in range(1000):
                word = words[head]
                if word >> STEP_SHIFT == step:
                    return word
            if time.monotonic() > give_up_at:
                give_up_at += ROUTE_MAX_S
                # Raises what went wrong there. To wait for the device would be to wait for ever: it waits for us.
                idle = torch.cuda.current_stream(self._device).query()
                assert not idle or words[head] >> STEP_SHIFT == step, "the device is idle and did not post its misses"

    def _placed(self, records: Bytes) -> int:
        """Where the device reads them, as MAIL_READY has it."""
        landing = self._landing
        if landing is not None and landing.words is not None:
            offset = records.ctypes.data - landing.place
            if offset >= 0 and offset + records.nbytes <= landing.memory.nbytes and offset % 16 == 0:
                return int(offset) // 16
        # An earlier layer has read what was there: it came before the misses of this one.
        self._staging_host[: records.nbytes] = records.reshape(-1)
        return STAGED

    def _reserve(self, state: State) -> None:
        kv_heads, ratio, _ = self._q.shape
        if isinstance(state, SketchState):
            capacity = state.records.shape[1] * state.spec.groups_per_chunk
            if self._mass.numel() != kv_heads * capacity:
                rows = sketch_kernels.lse_rows(capacity, kv_heads)
                self._log_mass = torch.empty(kv_heads, capacity, ratio, device=self._device)
                self._mass = torch.empty(kv_heads, capacity, device=self._device)
                self._group_lse = torch.empty(rows, kv_heads * ratio, device=self._device)
        elif self._mask.numel() != kv_heads * state.groups.shape[1] * state.groups.shape[2]:
            groups = state.groups.shape[1] * state.groups.shape[2]
            self._mask = torch.empty(kv_heads, groups, dtype=torch.bool, device=self._device)
