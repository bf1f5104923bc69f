"""Host memory that the device reads in place, for as long as somebody holds it. One for all sessions of a landing.

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
        # The device's address of it may be another, so it goes to kernels as a tensor, never as a number.
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
