"""Host memory that the device reads in place, for as long as somebody holds it. One for all sessions of a landing. And the
way from there to the device's own.

What nobody holds any more is given back at the next registration, never by the garbage collector: giving back waits for
the device, which may at that moment wait for this thread (decode_step.py).
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from hga_kvd_client.geometry import Bytes

logger = logging.getLogger("hga_kvd_client")
# Torch has no types for some of it.
cuda: Any = torch.cuda


class Registered:
    """words: int64; None where the driver refused. place: its address."""

    _known: ClassVar[WeakValueDictionary[int, Registered]] = WeakValueDictionary()
    _retired: ClassVar[list[Bytes]] = []

    def __init__(self, memory: Bytes) -> None:
        self.place, self.memory = memory.ctypes.data, memory
        # The device's address of it may be another (here it is the same): to kernels it goes as a tensor.
        self.words: Tensor | None = torch.from_numpy(memory[: memory.nbytes // 8 * 8]).view(torch.int64)
        if int(cuda.cudart().cudaHostRegister(self.place, memory.nbytes, 2)):  # 2: mapped
            self.words = None
            logger.warning("the device cannot read the landing in place; fetched records are copied once more")
            with suppress(RuntimeError):
                torch.zeros(1, device="cuda")  # torch would raise the refusal at its next launch

    @classmethod
    def of(cls, memory: Bytes) -> Registered:
        """Between steps only."""
        while cls._retired:
            torch.cuda.synchronize()
            cuda.cudart().cudaHostUnregister(cls._retired.pop().ctypes.data)
        known = cls._known.get(memory.ctypes.data)
        if known is None:
            known = cls._known[memory.ctypes.data] = cls(memory)
        return known

    def __del__(self) -> None:
        if self.words is not None:
            self._retired.append(self.memory)


class Carrier:
    """Takes fetched bytes to a device beside what it is doing, as fast as the bus is where it can reach the landing."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._side = device, cuda.Stream(device)
        self._landing: Registered | None = None

    def reach(self, landing: Bytes | None) -> None:
        """Copies from and to this memory are the device's own from now on. Between steps only."""
        if landing is not None:
            self._landing = Registered.of(landing)

    def carried(self, records: Tensor, landing: Bytes | None) -> Tensor:
        """A copy on the device. Returns when the records have been read and may be written over. Between steps only."""
        self.reach(landing)
        with cuda.stream(self._side):
            copied = records.to(self._device, non_blocking=True)
        self._side.synchronize()
        copied.record_stream(torch.cuda.current_stream(self._device))
        return copied
