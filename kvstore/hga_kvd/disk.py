"""Disk: the only door to persistent storage. The engine sees names, handles, offsets and addresses, never a path or a flag.

Promises every implementation keeps, and the simulated one breaks on purpose:
- `read` and `write` take a batch (columns of equal length) and return when all of it is finished, in any order. Short
  transfers are finished or failed here, never counted as done: a result is 0, or -errno.
- Offsets, lengths and addresses are multiples of `alignment` (O_DIRECT). The caller keeps the memory alive.
- Nothing is durable before `sync(handle)` returned; a new or removed name not before `sync_names()`.
- `replace` is atomic and durable: after it returns, and after a crash at any time, the file has the old or new content.
- Methods may be called from several threads.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hga_kvd import native

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]


class Disk(Protocol):
    @property
    def alignment(self) -> int:
        """Bytes; what offsets, lengths and addresses must be multiples of. At most 4096."""

    @property
    def engine(self) -> str:
        """Which I/O engine serves this disk: uring, liburing or posix."""

    def names(self) -> list[str]:
        """All file names in the directory, sorted."""

    def create(self, name: str, reserve_bytes: int) -> int:
        """A new file of `reserve_bytes` preallocated bytes, opened for direct reads and writes; returns its handle.

        Raises: FileExistsError; OSError(ENOSPC) when the space is not there, and then no file is left.
        """

    def open(self, name: str) -> int:
        """Opens an existing file for direct reads and writes; returns its handle. Raises FileNotFoundError."""

    def size(self, handle: int) -> int:
        """Bytes."""

    def read(self, handles: I32, offsets: I64, addresses: U64, lengths: I64) -> I32:
        """Reads lengths[i] bytes at offsets[i] of file handles[i] into memory at addresses[i]. Returns 0 or -errno each.

        A read past the end of the file fails with -ENODATA.
        """

    def stream(self, handles: I32, offsets: I64, addresses: U64, lengths: I64, step: int) -> Generator[I32, None, None]:
        """Reads, as `read`, at most 1 GiB a row, and yields the results in order while later rows are under way: at least
        `step` at a time, but for the last. A short read has failed: with -EAGAIN, unless `read` would fail too.

        Closed early, it starts no more reads and waits for what has begun: close it before the memory is used again. For
        one thread, which makes no other call of the disk meanwhile.
        """

    def bring(self, handles: I64, batch: native.Batch, pool: native.Pool, found: native.Found) -> bool:
        """Reads, verifies and copies in C what the batch says, of these files, and what RAM has (native.bring). False:
        nothing was done, `stream` is the way: there is no ring here, or something is not aligned."""

    def write(self, handles: I32, offsets: I64, addresses: U64, lengths: I64) -> I32:
        """Writes, as `read` reads."""

    def sync(self, handle: int) -> None:
        """Makes the file's content durable. Raises OSError; after one, the file's unsynced content is unknown for ever."""

    def sync_names(self) -> None:
        """Makes creations and removals durable. Raises OSError."""

    def punch(self, handle: int, offset: int, length: int) -> None:
        """Gives the blocks of this range back; it reads as zeros from then on, or, after a crash, as before.

        Raises: OSError; EOPNOTSUPP where the file system cannot do that at all.
        """

    def taken(self, handle: int) -> int:
        """Bytes of the device that the file takes: its size less its holes."""

    def close(self, handle: int) -> None: ...

    def remove(self, name: str) -> None: ...

    def read_file(self, name: str) -> bytes:
        """A small file, whole. Raises FileNotFoundError."""

    def replace(self, name: str, content: bytes) -> None:
        """Gives a small file new content, atomically and durably (temporary file, sync, rename, directory sync)."""

    def free_bytes(self) -> int:
        """What the file system would still take from this process."""

    def shutdown(self) -> None:
        """Closes every handle and stops the I/O thread."""
