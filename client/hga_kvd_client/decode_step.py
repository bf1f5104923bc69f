"""The decode step of one token on the device: route, bank and attention of a layer, without a synchronisation but one.

    step.begin(...)                # once a token
    step.start(layer, q)           # queued: route, bank, attention to what is resident
    keys = step.misses(layer)      # the one synchronisation
    step.land(layer, records)      # only if there are misses: their bytes to the bank, and attention to them
    out = step.result(layer)

What always holds:
- Attention is over [window | opened groups], in parts; what is resident is attended while the misses travel, and the
  parts are merged by log-sum-exp. A layer without misses is done when the host learns that.
- All shapes are fixed; nothing is allocated in a step. Each half of a layer's step is a CUDA graph, made at the second
  step that finds its tensors in the same places, and made again when one has moved (a window or a routing state grew).
- The bank names misses before their bytes are there. `abandon` forgets the layer if they do not come.
- On CPU tensors the twins run in the same order.

Shared by the layers: buffers of the parts and lists. Per layer: the bank (records and tables) and a mailbox.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hga_kvd_client.geometry import KEY_DTYPE, Bytes, Geometry, Keys
from hga_kvd_client.kernels import CONTROL_SIZE, FIRST_GROUP, GROUPS, STEP, WINDOW_TOKENS, attention, bank, select
from hga_kvd_client.kernels import sketch as sketch_kernels
from hga_kvd_client.kernels.hga import open_hga
from hga_kvd_client.sketch import SketchSpec

logger = logging.getLogger("hga_kvd_client")
# Torch has no types for some of it.
cuda: Any = torch.cuda

# Keys of one part: few enough that a window of 768 tokens and 4 KV heads fill 48 of 132 multiprocessors.
PART_KEYS = 64
# A route that takes longer than this has failed: the device is asked why.
ROUTE_MAX_S = 10.0


@dataclass(frozen=True)
class SketchState:
    """Of one layer: to_z [kv_heads, head_dim, head_dim], centre [kv_heads, head_dim], records [kv_heads, chunks, bytes];
    budget: groups of the layer."""

    spec: SketchSpec
    to_z: Tensor
    centre: Tensor
    records: Tensor
    budget: int

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
    project: Callable[..., None]
    log_mass: Callable[..., None]
    pool: Callable[..., None]
    gather: Callable[..., None]
    gather_mask: Callable[..., None]
    place: Callable[..., None]
    land: Callable[..., None]

    @classmethod
    def of(cls, suffix: str) -> Calls:
        modules = (attention, sketch_kernels, select, bank)
        return cls(*(next(getattr(m, n + suffix) for m in modules if hasattr(m, n + suffix)) for n in cls._fields))


KERNELS, TWINS = Calls.of(""), Calls.of("_twin")


class _Replayed:
    """Calls of one layer's half: run as they are the first time, then as a graph while their tensors stay in place."""

    def __init__(self) -> None:
        self._seen = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(self, work: Callable[[], None], version: int, pool: Any) -> None:
        """version: another one, never 0, when the tensors that `work` uses have moved. pool: of graphs of one version: with
        the last graph of a pool goes the pool."""
        if version != self._seen:
            # The first run compiles what is not compiled yet, which a capture must not.
            self._seen, self._graph = version, None
            work()
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            stream = cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    work()
                finally:
                    self._graph.capture_end()
            torch.cuda.current_stream().wait_stream(stream)
        self._graph.replay()


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

        self.records = torch.zeros(layers, kv_heads, slots, 2, geometry.group_tokens, dim, dtype=dtype, device=device)
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
        self._results, self._lse_of_all = empty(layers, heads, dim, kind=dtype), empty(heads)

        # Of the sketch's selection; grows with its state.
        self._log_mass = self._mass = self._group_lse = empty(0)
        self._mask = empty(0, kind=torch.bool)

        pinned = self._on_gpu
        self._control_host = torch.zeros(CONTROL_SIZE, dtype=torch.int64, pin_memory=pinned)
        self._control_numbers = self._control_host.numpy()
        self._control = self._control_host.to(device) if self._on_gpu else self._control_host
        words = bank.MAILBOX_KEYS + kv_heads * most
        self._mail = torch.zeros(layers, words, dtype=torch.int64, pin_memory=pinned)
        self._mail_host = self._mail.numpy()
        self._staging = torch.empty(kv_heads * most * geometry.record_bytes // 8, dtype=torch.int64, pin_memory=pinned)
        self._landing: _Registered | None = None
        self._source = self._staging

        self._pool: Any = None
        self._routes = [_Replayed() for _ in range(layers)]
        self._lands = [_Replayed() for _ in range(layers)]
        self._side = cuda.Stream() if self._on_gpu else None
        self._reading = False
        self._step = 0
        self._window, self._scale = empty(0), 0.0
        self._states: Sequence[State] = ()
        self._moved = True
        self._version = 0

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
            self._window, self._states, self._scale = window, states, scale
            self._reserve(states[0])
            self._version, self._moved = self._version + 1, False
            self._pool = torch.cuda.graph_pool_handle() if self._on_gpu else None
        self._step += 1
        numbers = self._control_numbers
        numbers[WINDOW_TOKENS], numbers[FIRST_GROUP], numbers[GROUPS], numbers[STEP] = (
            window_tokens, first_group, groups, self._step,
        )  # fmt: skip
        if self._on_gpu:
            self._control.copy_(self._control_host, non_blocking=True)

    def start(self, layer: int, q: Tensor) -> None:
        """Queues one layer's route and its attention to what is resident. q: [kv_heads, ratio, head_dim]."""
        self._q.copy_(q)
        work = partial(self._route, layer)
        if self._on_gpu:
            self._routes[layer].run(work, self._version, self._pool)
        else:
            work()

    def misses(self, layer: int) -> Keys:
        """Keys of what the layer opened and the bank did not hold, [misses]; valid until the layer's next step.

        Returns when the device has posted them.
        """
        mail = self._mail_host[layer]
        if self._on_gpu:
            self._wait(mail)
            self._reading = False
        keys: Keys = mail[bank.MAILBOX_KEYS : bank.MAILBOX_KEYS + int(mail[bank.MAIL_MISSES])].view(KEY_DTYPE)
        return keys

    def land(self, layer: int, records: Bytes) -> None:
        """Takes what was fetched for the keys that `misses` returned: uint8 [misses, record_bytes], in their order.

        Read in place if it lies in the registered landing: it must stay until `settle` or the next `misses` returns.
        """
        source, offset = self._placed(records)
        self._mail_host[layer, bank.MAIL_OFFSET] = offset
        work = partial(self._land, layer, source)
        if self._on_gpu:
            version = self._version if source is not self._staging else -self._version
            self._lands[layer].run(work, version, self._pool)
            self._reading = True
        else:
            work()

    def settle(self) -> None:
        """Returns when the device has read what `land` was given last."""
        if self._reading:
            torch.cuda.current_stream().synchronize()
            self._reading = False

    def result(self, layer: int) -> Tensor:
        """Attention of the layer, [heads, head_dim] in the dtype of K and V; overwritten by its next token."""
        return self._results[layer]

    def opened(self, layer: int) -> tuple[Tensor, Tensor]:
        """Groups that the layer's last step opened: int32 [kv_heads, most], sorted, and how many, [kv_heads]."""
        tables = self._tables[layer]
        return tables.opened, tables.opened_counts

    def opened_count(self, layer: int) -> int:
        return int(self._mail_host[layer, bank.MAIL_OPENED])

    def abandon(self, layer: int) -> None:
        """Forgets what the layer's bank holds: a fetch failed."""
        self._tables[layer].forget()

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
            self._landing = _Registered.of(landing)
            self._moved = True  # graphs that read the old one are made again

    def resident_bytes(self) -> int:
        """Bytes on the device: bank, tables, buffers of the step."""
        held = [self.records, self._q, self._z, self._out, self._lse, self._results, self._log_mass, self._mass]
        held += [self._group_lse, self._mask]
        for item in (*self._tables, self._chosen, self._lists):
            held += vars(item).values()
        return sum(t.nbytes for t in held)

    # The two halves.

    def _route(self, layer: int) -> None:
        calls, lists, tables = self._calls, self._lists, self._tables[layer]
        (k, v), scale, state = self._window[layer], self._scale, self._states[layer]
        near, held = slice(0, self._near), slice(self._near, self._early)
        with self._beside():
            calls.window_parts(self._q, k, v, self._control, scale, PART_KEYS, self._out[near], self._lse[near])
        if isinstance(state, SketchState):
            self._choose_by_sketch(state, scale)
            budget, capacity = state.budget, self._mass.shape[1]
        else:
            self._choose_by_hga(state)
            budget, capacity = self._geometry.kv_heads * self.most, self._mask.shape[1]
        calls.place(self._chosen, self._control, layer, budget, capacity, tables, lists, self._mail[layer])
        calls.paged_parts(
            self._q, self.records[layer], lists.held, lists.held_counts, scale, self._part_slots, self._out[held],
            self._lse[held],
        )  # fmt: skip
        calls.merge(self._out[: self._early], self._lse[: self._early], self._results[layer], self._lse_of_all)

    def _choose_by_sketch(self, state: SketchState, scale: float) -> None:
        calls = self._calls
        calls.project(self._q, state.to_z, scale, self._z)
        calls.log_mass(state.spec, self._z, state.centre, state.records, self._control, self._log_mass, self._group_lse)
        self._join()
        near = self._lse[: self._near]
        calls.pool(self._log_mass, near, self._group_lse, self._control, self._mass, self._chosen)
        calls.gather(self._mass, self._control, state.budget, self._chosen)

    def _choose_by_hga(self, state: HgaState) -> None:
        open_hga(self._q, state.chunks, state.groups, self._control, state.topk_chunks, state.topk_groups, self._mask)
        self._join()
        self._calls.gather_mask(self._mask, self._control, self._chosen)

    def _land(self, layer: int, source: Tensor) -> None:
        calls, lists, late, scale = self._calls, self._lists, slice(self._early, None), self._scale
        calls.land(source, self._mail[layer], lists, self.records[layer])
        calls.paged_parts(
            self._q, self.records[layer], lists.late, lists.late_counts, scale, self._part_slots, self._out[late],
            self._lse[late],
        )  # fmt: skip
        calls.merge(self._out, self._lse, self._results[layer], self._lse_of_all)

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

    def _wait(self, mail: npt.NDArray[np.int64]) -> None:
        """Returns when the device has posted a layer's misses."""
        step = self._step
        give_up_at = time.monotonic() + ROUTE_MAX_S
        while True:
            for _ in range(1000):
                if mail[bank.MAIL_STEP] == step:
                    return
            if time.monotonic() > give_up_at:
                torch.cuda.synchronize()  # raises what went wrong there
                assert mail[bank.MAIL_STEP] == step, "the device is idle and did not post its misses"

    def _placed(self, records: Bytes) -> tuple[Tensor, int]:
        """Where the device reads them: the source tensor and the offset into it, in bytes."""
        if self._landing is not None and self._landing.words is not None:
            offset = records.ctypes.data - self._landing.place
            if offset >= 0 and offset + records.nbytes <= self._landing.words.nbytes and offset % 8 == 0:
                return self._landing.words, offset
        if self._on_gpu:
            torch.cuda.current_stream().synchronize()  # an earlier layer may still read it
        self._staging.numpy().view(np.uint8)[: records.nbytes] = records.reshape(-1)
        return self._staging, 0

    def _reserve(self, state: State) -> None:
        kv_heads, ratio, _ = self._q.shape
        if isinstance(state, SketchState):
            capacity = state.records.shape[1] * state.spec.groups_per_chunk
            if self._mass.numel() != kv_heads * capacity:
                rows = -(-capacity // sketch_kernels.BLOCK_GROUPS)
                self._log_mass = torch.empty(kv_heads, capacity, ratio, device=self._device)
                self._mass = torch.empty(kv_heads, capacity, device=self._device)
                self._group_lse = torch.empty(rows, kv_heads * ratio, device=self._device)
        elif self._mask.numel() != kv_heads * state.groups.shape[1] * state.groups.shape[2]:
            groups = state.groups.shape[1] * state.groups.shape[2]
            self._mask = torch.empty(kv_heads, groups, dtype=torch.bool, device=self._device)


class _Registered:
    """Host memory that the device reads in place, for as long as somebody holds this. One for all sessions of a landing.

    words: int64; None where the driver refused.
    """

    _known: ClassVar[WeakValueDictionary[int, _Registered]] = WeakValueDictionary()

    def __init__(self, memory: Bytes) -> None:
        self.place = memory.ctypes.data
        self._runtime: Any = cuda.cudart()
        self.words: Tensor | None = torch.from_numpy(memory).view(torch.int64)
        if int(self._runtime.cudaHostRegister(self.place, memory.nbytes, 2)):  # 2: mapped
            logger.warning("the device cannot read the landing in place; fetched records are copied once more")
            self.words = None
            with suppress(RuntimeError):
                torch.zeros(1, device="cuda")  # torch would raise the refusal at its next launch

    @classmethod
    def of(cls, memory: Bytes) -> _Registered:
        known = cls._known.get(memory.ctypes.data)
        if known is None:
            known = cls._known[memory.ctypes.data] = cls(memory)
        return known

    def __del__(self) -> None:
        if self.words is not None:
            torch.cuda.synchronize()
            self._runtime.cudaHostUnregister(self.place)
