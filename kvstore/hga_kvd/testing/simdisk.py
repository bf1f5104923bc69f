"""A disk in memory that keeps every promise of `disk.Disk`, and breaks the ones a test or a `Schedule` names.

- What was not synced is lost by `crash()`; with a seed, a random subset of the unsynced sectors survives instead (a
  torn write), and `Remains` knows more ways. A created or removed name that was not followed by `sync_names()` is undone.
  `replace` is durable.
- `crash()` returns the disk after power came back. The old one is dead: threads that still use it get EIO.
- `fail(operation, n, error)`: the n-th read, write, sync, create or replace from now fails, with EIO or this errno.
- `die_after(n)`: all but the next n operations fail, as for a process that dies there. `lose_power_at(n)`: the n-th
  from now does not return, it raises PowerLoss, and so does all that comes after it.
- `schedule(faults)`: each strikes its operation once.
- `flip(name, offset)` flips one bit of what is stored. `bytes_max` is the size of the device.
- Every file has a shadow: what it would hold if nothing had been corrupted. `hits(name)` is where the two differ.
Transfers go through `transfer_all`, the same code that finishes short ones for real files. Nothing here is random unless a
seed is given.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import threading
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field

import numpy as np

from hga_kvd import native
from hga_kvd.disk import I32, I64, U64
from hga_kvd.io_engine import transfer_all, whole_or_failed
from hga_kvd.testing.faults import Fault, Remains

SECTOR_BYTES = 512
BLOCK_BYTES = 4096
SLOW_S = 0.0005


class PowerLoss(BaseException):
    """The machine is gone. Not an Exception: no code of a dead process may handle it."""


def _sectors(offset: int, length: int) -> range:
    return range(offset // SECTOR_BYTES, -(-(offset + length) // SECTOR_BYTES))


@dataclass(eq=False)
class _File:
    content: bytearray
    shadow: bytearray | None = None  # None: the same
    before: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)  # sector -> synced (content, shadow)
    bad: set[int] = field(default_factory=set)  # sectors that cannot be read
    holes: set[int] = field(default_factory=set)  # sectors that take no space

    def write(self, offset: int, data: bytes, stored_at: int | None = -1, stored: bytes | None = None) -> None:
        """data belongs at offset. A fault stores other bytes, or stores them elsewhere (None: nowhere)."""
        stored_at = offset if stored_at == -1 else stored_at
        stored = data if stored is None else stored
        if (stored_at, stored) != (offset, data) and self.shadow is None:
            self.shadow = bytearray(self.content)
        shadow = self.shadow if self.shadow is not None else self.content
        for at in {offset, offset if stored_at is None else stored_at}:
            for sector in _sectors(at, len(data)):
                here = slice(sector * SECTOR_BYTES, (sector + 1) * SECTOR_BYTES)
                self.before.setdefault(sector, (bytes(self.content[here]), bytes(shadow[here])))
        if self.shadow is not None:
            self.shadow[offset : offset + len(data)] = data
        if stored_at is not None:
            self.holes.difference_update(_sectors(stored_at, len(data)))
            self.content[stored_at : stored_at + len(data)] = stored
            self.bad -= set(_sectors(stored_at, len(data)))

    def punch(self, offset: int, length: int) -> None:
        self.write(offset, bytes(length))
        self.holes.update(_sectors(offset, length))

    def taken(self) -> int:
        return len(self.content) - SECTOR_BYTES * len(self.holes)

    def rot(self, offset: int, bit: int) -> None:
        if self.shadow is None:
            self.shadow = bytearray(self.content)
        self.content[offset] ^= 1 << bit

    def revert(self, sectors: Iterable[int]) -> None:
        """These are as they were when last synced."""
        for sector in sectors:
            here = slice(sector * SECTOR_BYTES, (sector + 1) * SECTOR_BYTES)
            self.holes.discard(sector)
            self.content[here], shadow = self.before[sector]
            if self.shadow is not None:
                self.shadow[here] = shadow

    def hits(self) -> set[int]:
        """Sectors that are not what was written, or cannot be read."""
        if self.shadow is None:
            return set(self.bad)
        differ = np.frombuffer(self.content, np.uint8) != np.frombuffer(self.shadow, np.uint8)
        return self.bad | set((np.flatnonzero(differ) // SECTOR_BYTES).tolist())


class SimDisk:
    alignment = 512
    engine = "sim"

    def __init__(self, bytes_max: int = 1 << 40, seed: int | None = None) -> None:
        """seed: completions come in a random order, and what is under way when power fails is done by halves."""
        self.bytes_max = bytes_max
        self.can_punch = True
        self.struck: list[Fault] = []  # scheduled faults that have happened
        self.operations = 0
        self.on_rot: Callable[[], None] = lambda: None  # called when what is stored here has gone bad
        self.counts = dict.fromkeys(("read", "write", "sync", "names", "create", "replace", "remove", "punch"), 0)
        self._chance = None if seed is None else random.Random(seed)
        self._lock = threading.RLock()
        self._files: dict[str, _File] = {}
        self._durable_names: dict[str, _File] = {}
        self._handles: dict[int, _File] = {}
        self._next_handle = 1
        self._faults: dict[tuple[str, int], Fault] = {}
        self._errors: dict[tuple[str, int], int] = {}
        self._dead = False
        self._dark = False  # power is lost
        self._operations_left: int | None = None
        self._power_until: int | None = None
        self._last_write: tuple[_File, range] | None = None

    # --- what a test does to it ---

    def crash(self, remains: Remains | int | None = None) -> SimDisk:
        """Power loss: the disk as it comes back. A seed: keep a random half of the unsynced sectors; None: none."""
        if not isinstance(remains, Remains):
            remains = Remains("lose", 0) if remains is None else Remains("half", remains)
        with self._lock:
            self._dead = True
            chance = random.Random(remains.seed)
            names = self._names_after(remains, chance)
            for file in names.values():
                file.revert(self._lost_sectors(file, remains, chance))
            return self._next(names)

    def kill(self) -> SimDisk:
        """The process dies, the machine does not: everything written is still there."""
        with self._lock:
            self._dead = True
            return self._next(self._files)

    def fail(self, operation: str, n: int = 1, error: int = errno.EIO) -> None:
        """The n-th `operation` from now fails; reads and writes count one a column, `names` are name syncs."""
        with self._lock:
            self._errors[operation, self.counts[operation] + n] = error

    def schedule(self, faults: Iterable[Fault]) -> None:
        """These strike, counted from now."""
        with self._lock:
            self._faults = {(f.operation, self.counts[f.operation] + f.n): f for f in faults}

    def die_after(self, operations: int) -> None:
        """After so many more reads, writes, syncs, creations and replacements all fail with EIO; 0: never."""
        with self._lock:
            self._operations_left = operations or None

    def lose_power_at(self, operation: int) -> None:
        """The n-th operation from now never returns; 0: none."""
        with self._lock:
            self._power_until = self.operations + operation if operation else None

    @property
    def dark(self) -> bool:
        """Whether the power was lost."""
        return self._dark

    def heal(self) -> None:
        """Takes back the faults that have not struck yet."""
        with self._lock:
            self._errors.clear()
            self._faults.clear()

    def flip(self, name: str, offset: int, bit: int = 0) -> None:
        with self._lock:
            self._files[name].rot(offset, bit)

    def spoil(self, name: str, sector: int) -> None:
        """This sector cannot be read until it is written again."""
        with self._lock:
            self._files[name].bad.add(sector)

    def put(self, name: str, content: bytes) -> None:
        """A file as another program would have left it."""
        with self._lock:
            self._files[name] = self._durable_names[name] = _File(bytearray(content))

    def get(self, name: str) -> bytes:
        with self._lock:
            return bytes(self._files[name].content)

    def stored_bytes(self, prefix: str) -> int:
        """What files whose name starts so take on the device."""
        with self._lock:
            return sum(file.taken() for name, file in self._files.items() if name.startswith(prefix))

    def meant(self, name: str) -> bytes:
        """What `get` would return if nothing had been corrupted."""
        with self._lock:
            file = self._files[name]
            return bytes(file.content if file.shadow is None else file.shadow)

    def hits(self, name: str) -> set[int]:
        """Sectors of the file that are not what was written to them, or cannot be read."""
        with self._lock:
            return self._files[name].hits()

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
        return self._transfer(False, handles, offsets, addresses, lengths)

    def stream(self, handles: I32, offsets: I64, addresses: U64, lengths: I64, step: int) -> Generator[I32, None, None]:
        self._check(offsets, addresses, lengths)
        for first in range(0, len(handles), step):
            part = slice(first, first + step)
            moved = self.transfer(False, handles[part], offsets[part], addresses[part], lengths[part])
            yield whole_or_failed(moved, lengths[part])

    def bring(self, handles: I64, batch: native.Batch, pool: native.Pool, found: native.Found) -> bool:
        return False

    def write(self, handles: I32, offsets: I64, addresses: U64, lengths: I64) -> I32:
        return self._transfer(True, handles, offsets, addresses, lengths)

    def sync(self, handle: int) -> None:
        with self._lock:
            file = self._handles[handle]
            fault = self._step("sync", fails=False)
            if fault is not None:
                if fault.kind == "lost":  # the kernel has dropped some of it, and called it clean
                    chance = random.Random(fault.seed)
                    file.revert([sector for sector in sorted(file.before) if chance.random() < 0.5])
                    file.before.clear()
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            file.before.clear()

    def sync_names(self) -> None:
        with self._lock:
            self._step("names")
            self._durable_names = dict(self._files)

    def punch(self, handle: int, offset: int, length: int) -> None:
        assert offset % BLOCK_BYTES == length % BLOCK_BYTES == 0
        with self._lock:
            if not self.can_punch:
                raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
            self._step("punch")
            self._handles[handle].punch(offset, length)

    def taken(self, handle: int) -> int:
        with self._lock:
            return self._handles[handle].taken()

    def close(self, handle: int) -> None:
        with self._lock:
            del self._handles[handle]

    def remove(self, name: str) -> None:
        with self._lock:
            self._step("remove")
            if name not in self._files:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
            del self._files[name]

    def read_file(self, name: str) -> bytes:
        with self._lock:
            if name not in self._files:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
            return bytes(self._files[name].content)

    def replace(self, name: str, content: bytes) -> None:
        with self._lock:
            file = _File(bytearray(content))
            try:
                fault = self._step("replace", fails=False)
            except PowerLoss:
                if self._chance is not None and self._chance.random() < 0.5:
                    self._files[name] = self._durable_names[name] = file
                raise
            if len(content) > self._free():  # the old one is there until this one is
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
            if fault is not None:
                if fault.kind == "done":  # renamed, and then the directory's sync failed
                    self._files[name] = file
                error = errno.ENOSPC if fault.kind == "enospc" else errno.EIO
                raise OSError(error, os.strerror(error), name)
            self._files[name] = self._durable_names[name] = file

    def free_bytes(self) -> int:
        with self._lock:
            return self._free()

    def shutdown(self) -> None:
        with self._lock:
            self._handles.clear()

    # --- IoEngine: what `transfer_all` asks, and what comes back raw ---

    name = engine

    def transfer(self, write: bool, fds: I32, offsets: I64, addresses: U64, lengths: I64) -> I64:
        moved = np.zeros(len(fds), np.int64)
        with self._lock:
            columns = list(zip(fds.tolist(), offsets.tolist(), addresses.tolist(), lengths.tolist(), strict=True))
            order = list(range(len(columns)))
            if self._chance is not None and len(order) > 1:
                self._chance.shuffle(order)
            for i in order:
                moved[i] = self._move(write, *columns[i])
        return moved

    # --- inside, under the lock ---

    def _next(self, files: dict[str, _File]) -> SimDisk:
        disk = SimDisk(self.bytes_max)
        for name, file in sorted(files.items()):
            shadow = None if file.shadow is None else bytearray(file.shadow)
            disk._files[name] = _File(bytearray(file.content), shadow, {}, set(file.bad), set(file.holes))
        disk._durable_names = dict(disk._files)
        disk._chance = self._chance
        disk.can_punch = self.can_punch
        return disk

    def _names_after(self, remains: Remains, chance: random.Random) -> dict[str, _File]:
        if remains.mode == "lose":
            return self._durable_names
        if remains.mode == "keep":
            return self._files
        both = [self._files, self._durable_names]
        names = {name: chance.choice(both).get(name) for name in sorted({*both[0], *both[1]})}
        return {name: file for name, file in names.items() if file is not None}

    def _lost_sectors(self, file: _File, remains: Remains, chance: random.Random) -> list[int]:
        unsynced = sorted(file.before)
        if remains.mode == "keep":
            return []
        if remains.mode == "half":
            return [sector for sector in unsynced if chance.random() < 0.5]
        if remains.mode == "torn":
            if self._last_write is None or self._last_write[0] is not file:
                return []
            sectors = self._last_write[1]
            cut = chance.randint(sectors.start, sectors.stop)
            return [sector for sector in unsynced if sector in sectors and sector >= cut]
        return unsynced

    def _free(self) -> int:
        return self.bytes_max - sum(file.taken() for file in self._files.values())

    def _handle(self, name: str) -> int:
        handle = self._next_handle
        self._next_handle += 1
        self._handles[handle] = self._files[name]
        return handle

    def _step(self, operation: str, fails: bool = True) -> Fault | None:
        """Counts one operation. Raises what was ordered for it; with `fails`, also a scheduled fault, else returns it."""
        self.operations += 1
        self.counts[operation] += 1
        self._dark |= self.operations == self._power_until
        if self._dark:
            raise PowerLoss
        if self._operations_left is not None:
            self._operations_left -= 1
            self._dead |= self._operations_left < 0
        at = operation, self.counts[operation]
        error = errno.EIO if self._dead else self._errors.pop(at, 0)
        if error:
            raise OSError(error, os.strerror(error))
        fault = self._faults.pop(at, None)
        if fault is not None:
            self.struck.append(fault)
            if fails:
                error = errno.ENOSPC if fault.kind == "enospc" else errno.EIO
                raise OSError(error, os.strerror(error))
        return fault

    def _transfer(self, write: bool, handles: I32, offsets: I64, addresses: U64, lengths: I64) -> I32:
        self._check(offsets, addresses, lengths)
        return transfer_all(self, handles, offsets, addresses, lengths, write=write, alignment=self.alignment)

    def _check(self, offsets: I64, addresses: U64, lengths: I64) -> None:
        bits = np.bitwise_or.reduce(offsets | lengths | addresses.view(np.int64), initial=0)
        assert not bits & (self.alignment - 1), f"a transfer that is not aligned to {self.alignment} bytes"
        assert lengths.min(initial=1) > 0, "a transfer of no bytes"

    def _move(self, write: bool, handle: int, offset: int, address: int, length: int) -> int:
        """One transfer: bytes moved, or -errno."""
        file = self._handles[handle]
        try:
            fault = self._step("write" if write else "read", fails=False)
        except OSError as error:
            return -(error.errno or errno.EIO)
        except PowerLoss:
            if write and self._chance is not None and self._power_until == self.operations:  # some of it got there
                part = self._chance.randrange(0, length + 1, SECTOR_BYTES)
                self._put(file, offset, ctypes.string_at(address, part))
            raise
        length = min(length, max(0, len(file.content) - offset))
        if not length:
            return -errno.ENOSPC if write else 0
        if fault is None:
            if write:
                self._put(file, offset, ctypes.string_at(address, length))
                return length
            return self._get(file, offset, address, length)
        return self._strike(fault, write, file, offset, address, length)

    def _strike(self, fault: Fault, write: bool, file: _File, offset: int, address: int, length: int) -> int:
        chance = random.Random(fault.seed)
        errors = {"eio": errno.EIO, "enospc": errno.ENOSPC, "again": errno.EAGAIN}
        if fault.kind in errors:
            return -errors[fault.kind]
        if fault.kind == "slow":
            time.sleep(SLOW_S)
        elif fault.kind == "short" and length > SECTOR_BYTES:
            length = chance.randrange(SECTOR_BYTES, length)
        if not write:
            return self._strike_read(fault, chance, file, offset, address, length)
        data = ctypes.string_at(address, length)
        if fault.kind == "torn":
            self._put(file, offset, data[: chance.randrange(0, length, SECTOR_BYTES)])
            return -errno.EIO
        if fault.kind == "flip":
            file.write(offset, data, stored=_flipped(data, chance))
        elif fault.kind == "lost":
            file.write(offset, data, stored_at=None)
        elif fault.kind == "misdirect":
            file.write(offset, data, stored_at=_elsewhere(file, offset, length, chance))
        else:
            self._put(file, offset, data)
        if fault.kind == "rot":
            file.rot(offset + chance.randrange(length), chance.randrange(8))
        return length

    def _strike_read(
        self, fault: Fault, chance: random.Random, file: _File, offset: int, address: int, length: int
    ) -> int:
        if fault.kind == "rot":
            file.rot(offset + chance.randrange(length), chance.randrange(8))
            self.on_rot()
        elif fault.kind == "bad":
            file.bad.add(chance.choice(_sectors(offset, length)))
            self.on_rot()
        elif fault.kind == "misdirect":
            offset = _elsewhere(file, offset, length, chance)
        moved = self._get(file, offset, address, length)
        if fault.kind == "flip" and moved > 0:
            ctypes.memmove(address, _flipped(ctypes.string_at(address, length), chance), length)
        return moved

    def _get(self, file: _File, offset: int, address: int, length: int) -> int:
        if file.bad and not file.bad.isdisjoint(_sectors(offset, length)):
            return -errno.EIO
        source = (ctypes.c_char * length).from_buffer(file.content, offset)
        ctypes.memmove(address, source, length)
        return length

    def _put(self, file: _File, offset: int, data: bytes) -> None:
        if data:
            file.write(offset, data)
            self._last_write = file, _sectors(offset, len(data))


def _flipped(data: bytes, chance: random.Random) -> bytes:
    flipped = bytearray(data)
    flipped[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(flipped)


def _elsewhere(file: _File, offset: int, length: int, chance: random.Random) -> int:
    """Another place of the same file; the same if it has no other."""
    places = [at for at in range(0, len(file.content) - length + 1, SECTOR_BYTES) if at != offset]
    return chance.choice(places) if places else offset
