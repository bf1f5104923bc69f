"""A disk in memory that keeps every promise of `disk.Disk`, and breaks the ones a test names.

- What was not synced is lost by `crash()`; with a seed, a random subset of the unsynced sectors survives instead (a
  torn write). A created or removed name that was not followed by `sync_names()` is undone. `replace` is durable.
- `crash()` returns the disk after power came back. The old one is dead: threads that still use it get EIO.
- `fail(operation, n, error)`: the n-th read, write, sync, create or replace from now fails, with EIO or this errno.
- `die_after(n)`: all but the next n operations fail, as for a process that dies there.
- `flip(name, offset)` flips one bit of what is stored. `bytes_max` is the size of the device.
Nothing here is random unless a seed is given.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import threading
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

SECTOR_BYTES = 512


@dataclass(eq=False)
class _File:
    content: bytearray
    before: dict[int, bytes] = field(default_factory=dict)  # sector -> its synced bytes, while they differ

    def write(self, offset: int, data: bytes) -> None:
        for sector in range(offset // SECTOR_BYTES, -(-(offset + len(data)) // SECTOR_BYTES)):
            at = sector * SECTOR_BYTES
            self.before.setdefault(sector, bytes(self.content[at : at + SECTOR_BYTES]))
        self.content[offset : offset + len(data)] = data

    def after_crash(self, chance: random.Random | None) -> _File:
        content = bytearray(self.content)
        for sector in sorted(self.before):
            if chance is None or chance.random() < 0.5:
                at = sector * SECTOR_BYTES
                content[at : at + SECTOR_BYTES] = self.before[sector]
        return _File(content)


class SimDisk:
    alignment = 512
    engine = "sim"

    def __init__(self, bytes_max: int = 1 << 40) -> None:
        self.bytes_max = bytes_max
        self._lock = threading.Lock()
        self._files: dict[str, _File] = {}
        self._durable_names: dict[str, _File] = {}
        self._handles: dict[int, _File] = {}
        self._next_handle = 1
        self._faults: dict[str, dict[int, int]] = {}
        self._dead = False
        self._operations_left: int | None = None
        self.counts = {"read": 0, "write": 0, "sync": 0, "create": 0, "replace": 0, "remove": 0}

    # --- what a test does to it ---

    def crash(self, seed: int | None = None) -> SimDisk:
        """Power loss: the disk as it comes back. seed: keep a random half of the unsynced sectors."""
        with self._lock:
            self._dead = True
            chance = None if seed is None else random.Random(seed)
            disk = SimDisk(self.bytes_max)
            disk._files = {name: self._durable_names[name].after_crash(chance) for name in sorted(self._durable_names)}
            disk._durable_names = dict(disk._files)
            return disk

    def kill(self) -> SimDisk:
        """The process dies, the machine does not: everything written is still there."""
        with self._lock:
            self._dead = True
            disk = SimDisk(self.bytes_max)
            disk._files = {name: _File(bytearray(file.content)) for name, file in self._files.items()}
            disk._durable_names = dict(disk._files)
            return disk

    def fail(self, operation: str, n: int = 1, error: int = errno.EIO) -> None:
        """The n-th `operation` from now fails; reads and writes count one a column, name syncs count as syncs."""
        with self._lock:
            self._faults.setdefault(operation, {})[self.counts[operation] + n] = error

    def die_after(self, operations: int) -> None:
        """After so many more reads, writes, syncs, creations and replacements all fail with EIO; 0: never."""
        with self._lock:
            self._operations_left = operations or None

    def heal(self) -> None:
        """Takes back the faults that have not struck yet."""
        with self._lock:
            self._faults.clear()

    def flip(self, name: str, offset: int, bit: int = 0) -> None:
        with self._lock:
            self._files[name].content[offset] ^= 1 << bit

    def put(self, name: str, content: bytes) -> None:
        """A file as another program would have left it."""
        with self._lock:
            self._files[name] = self._durable_names[name] = _File(bytearray(content))

    def get(self, name: str) -> bytes:
        with self._lock:
            return bytes(self._files[name].content)

    # --- Disk ---

    def names(self) -> list[str]:
        with self._lock:
            return sorted(self._files)

    def create(self, name: str, reserve_bytes: int) -> int:
        with self._lock:
            self._step("create")
            if name in self._files:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
            if reserve_bytes > self._free():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
            self._files[name] = _File(bytearray(reserve_bytes))
            return self._handle(name)

    def open(self, name: str) -> int:
        with self._lock:
            if name not in self._files:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
            return self._handle(name)

    def size(self, handle: int) -> int:
        with self._lock:
            return len(self._handles[handle].content)

    def read(self, handles: I32, offsets: I64, addresses: U64, lengths: I64) -> I32:
        return self._transfer("read", handles, offsets, addresses, lengths)

    def write(self, handles: I32, offsets: I64, addresses: U64, lengths: I64) -> I32:
        return self._transfer("write", handles, offsets, addresses, lengths)

    def sync(self, handle: int) -> None:
        with self._lock:
            self._step("sync")
            self._handles[handle].before.clear()

    def sync_names(self) -> None:
        with self._lock:
            self._step("sync")
            self._durable_names = dict(self._files)

    def close(self, handle: int) -> None:
        with self._lock:
            del self._handles[handle]

    def remove(self, name: str) -> None:
        with self._lock:
            self._step("remove")
            del self._files[name]

    def read_file(self, name: str) -> bytes:
        with self._lock:
            if name not in self._files:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
            return bytes(self._files[name].content)

    def replace(self, name: str, content: bytes) -> None:
        with self._lock:
            self._step("replace")
            self._files[name] = self._durable_names[name] = _File(bytearray(content))

    def free_bytes(self) -> int:
        with self._lock:
            return self._free()

    def shutdown(self) -> None:
        with self._lock:
            self._handles.clear()

    # --- inside, under the lock ---

    def _free(self) -> int:
        return self.bytes_max - sum(len(file.content) for file in self._files.values())

    def _handle(self, name: str) -> int:
        handle = self._next_handle
        self._next_handle += 1
        self._handles[handle] = self._files[name]
        return handle

    def _step(self, operation: str) -> None:
        """Counts one operation; raises the fault that was ordered for it."""
        self.counts[operation] += 1
        if self._operations_left is not None:
            self._operations_left -= 1
            self._dead |= self._operations_left < 0
        error = errno.EIO if self._dead else self._faults.get(operation, {}).pop(self.counts[operation], 0)
        if error:
            raise OSError(error, os.strerror(error))

    def _transfer(self, operation: str, handles: I32, offsets: I64, addresses: U64, lengths: I64) -> I32:
        results = np.zeros(len(handles), np.int32)
        with self._lock:
            columns = zip(handles.tolist(), offsets.tolist(), addresses.tolist(), lengths.tolist(), strict=True)
            for i, (handle, offset, address, length) in enumerate(columns):
                assert offset % self.alignment == address % self.alignment == length % self.alignment == 0
                try:
                    self._step(operation)
                except OSError as error:
                    results[i] = -(error.errno or errno.EIO)
                    continue
                file = self._handles[handle]
                if offset + length > len(file.content):
                    results[i] = -errno.ENODATA if operation == "read" else -errno.ENOSPC
                elif operation == "read":
                    ctypes.memmove(address, bytes(file.content[offset : offset + length]), length)
                else:
                    file.write(offset, ctypes.string_at(address, length))
        return results
