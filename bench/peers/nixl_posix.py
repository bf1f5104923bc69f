"""NIXL's POSIX backend, on a file: prepared descriptors of all records, its io_uring; O_DIRECT when cold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hga_kvd.memory import address_of
from nixl_cu12 import nixl_agent, nixl_agent_config

from peers.base import Bytes, Numbers, Shape, State
from peers.preadv import Preadv

AGENT = "bench"


class NixlPosix(Preadv):
    """Records are put as Preadv puts them: the file's layout is the user's in NIXL."""

    def __init__(self, place: Path, shape: Shape, state: State) -> None:
        super().__init__(place, shape, state)
        self._agent = nixl_agent(AGENT, nixl_agent_config(backends=[]))
        self._agent.create_backend("POSIX", {"use_uring": "true"})
        self._memory: Bytes | None = None

    def finish(self) -> None:
        super().finish()
        size = self.shape.record_bytes
        self._file_registered = self._agent.register_memory([(0, size * self.shape.records, self.file, "")], "FILE")
        blocks = np.empty((self.shape.records, 3), np.uint64)
        blocks[:, 0], blocks[:, 1], blocks[:, 2] = np.arange(self.shape.records) * size, size, self.file
        self._blocks = self._agent.prep_xfer_dlist(AGENT, blocks, "FILE")

    def read(self, numbers: Numbers, out: Bytes) -> Bytes:
        if self._memory is not out:
            self._take_memory(out)
        handle = self._agent.make_prepped_xfer(
            "READ", self._places, np.arange(len(numbers), dtype=np.int32), self._blocks, numbers.astype(np.int32)
        )
        state = self._agent.transfer(handle)
        while state == "PROC":
            state = self._agent.check_xfer_state(handle)
        self._agent.release_xfer_handle(handle)
        if state != "DONE":
            raise OSError(f"NIXL: {state}")
        return out

    def _take_memory(self, out: Bytes) -> None:
        """Registers where reads go, once."""
        base, size = address_of(out), self.shape.record_bytes
        self._registered = self._agent.register_memory([(base, out.nbytes, 0, "")], "DRAM")
        places = np.empty((len(out), 3), np.uint64)
        places[:, 0], places[:, 1], places[:, 2] = base + np.arange(len(out)) * size, size, 0
        self._places = self._agent.prep_xfer_dlist("NIXL_INIT_AGENT", places, "DRAM")
        self._memory = out


PEER = NixlPosix
