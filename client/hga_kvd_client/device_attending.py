"""A routed token on the device: the session's window, routing state and stored records, handed to the device's step.

Triton is imported at the first token that could use it; without it `takes` says no, and the token goes the plain way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hga_kvd_client import errors
from hga_kvd_client.held import Held
from hga_kvd_client.kernels import SLOTS_MAX
from hga_kvd_client.stored import StoredSession
from hga_kvd_client.summaries import Summaries

if TYPE_CHECKING:
    from hga_kvd_client.decode_step import DecodeStep, State

logger = logging.getLogger("hga_kvd_client")

# Where a token takes the device's step. Tests add the CPU, where it runs the twins.
STEP_DEVICES = {"cuda"}


class DeviceAttending:
    """Of one session."""

    def __init__(self, held: Held, stored: StoredSession) -> None:
        self._options, self._device, self._dtype = held.options, held.device, held.dtype
        self._row_bytes = stored.geometry.record_bytes // (2 * stored.geometry.group_tokens)
        self._window, self._routing, self._stored, self._stats = held.window, held.routing, stored, held.stats
        self.step: DecodeStep | None = None  # made at the first token that it takes
        self._refused = False
        self._settle: Callable[[], None] | None = None  # the step's
        self._states: tuple[Tensor, list[State]] | None = None  # and what they are views of

    @property
    def may_take(self) -> bool:
        """Whether a token may be the device's at all."""
        return self._device.type in STEP_DEVICES and not self._refused

    def takes(self, q: Tensor, first: int, end: int) -> bool:
        """Whether this token is the device's: on a GPU, with something to route in chunks first .. end-1, room for what is
        opened, and a bank and records that kernels can move. q: [kv_heads, ratio, head_dim]."""
        if not self.may_take or end <= first:
            return False
        ratio, most = q.shape[1], self._routing.opened_most(q.shape[1])
        window = self._window.capacity
        if self.step is not None and self.step.fits(ratio, most, window):
            return True
        if not 0 < most <= self._options.bank_groups <= SLOTS_MAX or self._row_bytes % 8:
            return False
        try:
            from hga_kvd_client.decode_step import DecodeStep  # noqa: PLC0415
        except ImportError as error:
            logger.warning("decoding without kernels, slowly: %s", error)
            self._refused = True
            return False
        self.step = DecodeStep(
            self._stored.geometry, ratio, self._options.bank_groups, most, window, self._dtype, self._device
        )
        self._settle = self.step.settle
        return True

    def attend(self, layer: int, q: Tensor, scale: float, seen: int, token: int, first: int, end: int) -> Tensor:
        """As Attending.one, in the dtype of K and V: what is resident is attended while the rest is fetched.

        token: another number for every token.
        """
        if self._device.type == "cuda" and self._device.index not in (None, torch.cuda.current_device()):
            with torch.cuda.device(self._device):  # where kernels go
                return self.attend(layer, q, scale, seen, token, first, end)
        geometry, stats, step, connection = self._stored.geometry, self._stats, self.step, self._stored.connection
        assert step is not None, "takes said so"
        if connection.reader not in (None, self._settle):
            # Another session's step still reads the landing. Its device may be ours, which is about to wait for us.
            connection.reader()
            connection.reader = None
        q = q.to(self._dtype).contiguous()
        held = self._window.take_held(layer) or ()
        groups = (end - first) * geometry.groups_per_chunk
        answer = None
        while True:
            if step.token != token:
                step.register(connection.landing)
                states, window = self._layer_states(), self._window
                first_group = first * geometry.groups_per_chunk
                step.begin(token, window.everything, states, scale, window.place(seen), first_group, groups)
            keys = None
            try:
                step.start(layer, q, *held)
                keys = step.misses(layer)
                if len(keys):
                    answer = self._stored.fetch(keys, recovers=False)
                    step.land(layer, answer.records)
                    connection.reader = self._settle
                break
            except errors.KvdError:
                step.abandon(layer)
            except BaseException:
                step.abandon(layer)
                raise
            # The device waits no more: what a call can recover from is put right now, and the layer is done again.
            assert keys is not None, "only a fetch raises such an error"
            self._stored.fetch(keys)
        if answer is not None:
            stats.ram_bytes += answer.ram_records * geometry.record_bytes
            stats.nvme_bytes += answer.nvme_records * geometry.record_bytes
        opened = step.opened_count(layer)
        stats.opened_groups += opened
        stats.routable_groups += groups * geometry.kv_heads
        stats.bank_bytes += (opened - len(keys)) * geometry.record_bytes
        # The step's own is overwritten by the next layer.
        return step.result().view(q.shape).clone()

    def opened(self, layer: int) -> tuple[Tensor, Tensor]:
        """As DecodeStep.opened."""
        assert self.step is not None
        return self.step.opened(layer)

    def forget(self) -> None:
        """Groups are no longer what they were."""
        if self.step is not None:
            self.step.forget()

    def resident_bytes(self) -> int:
        return 0 if self.step is None else self.step.resident_bytes()

    def _layer_states(self) -> list[State]:
        """What each layer routes with; the same list as long as nothing has moved."""
        from hga_kvd_client.decode_step import HgaState, SketchState  # noqa: PLC0415

        store, options = self._routing.store, self._options
        assert store is not None
        moved = store.groups if isinstance(store, Summaries) else store.records
        if self._states is None or self._states[0] is not moved:
            states: list[State]
            if isinstance(store, Summaries):
                both = zip(store.chunks, store.groups, strict=True)
                states = [HgaState(*layer, options.topk_chunks, options.topk_groups) for layer in both]
            else:
                budget = options.sketch_groups * self._stored.geometry.kv_heads
                turns = zip(store.basis.to_z, store.basis.centre, store.records, strict=True)
                states = [
                    SketchState(store.spec, z.contiguous(), c.contiguous(), r, budget, options.cover)
                    for z, c, r in turns
                ]
            self._states = (moved, states)
        return self._states[1]
