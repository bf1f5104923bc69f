"""FileDisk: the Disk of real files in one directory, opened O_DIRECT.

- Never buffered: a file system without O_DIRECT is refused at the start, not served slowly.
- A handle is never used twice, so a late transfer on a closed file is -EBADF, not another file's bytes. `close` while a
  transfer on that handle is under way is the caller's bug.
- One daemon a directory: the file LOCK is flocked for as long as the disk is open, and holds the owner's pid.
- Names that start with a dot, and LOCK, are the disk's own and no business of its user; `names` leaves them out. No
  file is removed but by `remove`, a failed `create` or a failed `replace`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Literal

import numpy as np
from structlog.typing import FilteringBoundLogger

from hga_kvd import native
from hga_kvd.config import Settings
from hga_kvd.disk import I32, I64, U64
from hga_kvd.errors import StartRefused
from hga_kvd.io_engine import EngineUnavailable, IoEngine, transfer_all, whole_or_failed
from hga_kvd.liburing_engine import LiburingEngine
from hga_kvd.memory import address_of, aligned_buffer
from hga_kvd.posix_engine import PosixEngine
from hga_kvd.uring import UringEngine

LOCK_NAME = "LOCK"
# One block of any device: the pid is rewritten in place, which works on a full disk too, and reads probe the alignment.
LOCK_BYTES = 4096
ALIGNMENT_MAX = 4096

_ENGINES: dict[str, Callable[[int], IoEngine]] = {
    "uring": UringEngine,
    "liburing": LiburingEngine,
    "posix": PosixEngine,
}
_MEMORY_FILE_SYSTEMS = {0x01021994: "tmpfs", 0x858458F6: "ramfs"}  # linux/magic.h

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate64.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.fstatfs64.argtypes = (ctypes.c_int, ctypes.c_void_p)
_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000  # Linux 6.1
_FALLOC_KEEP_SIZE = 1
_FALLOC_PUNCH_HOLE = 2


class FileDisk:
    """`directory` exists and holds `lock`, an open descriptor (-1: none) that is closed last."""

    def __init__(self, directory: Path, engine: IoEngine, alignment: int, lock: int = -1) -> None:
        self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._io = engine
        self._alignment = alignment
        self._lock = lock
        self._table_lock = threading.Lock()
        self._fds = np.array([-1, -1], np.int32)  # by handle, from 1 on; -1: closed, and what lies at either end

    @property
    def alignment(self) -> int:
        return self._alignment

    @property
    def engine(self) -> str:
        return self._io.name

    def names(self) -> list[str]:
        with os.scandir(self._directory) as entries:
            return sorted(e.name for e in entries if _is_users(e.name) and e.is_file(follow_symlinks=False))

    def create(self, name: str, reserve_bytes: int) -> int:
        assert _is_users(name)
        assert reserve_bytes > 0
        fd = self._open(name, os.O_RDWR | os.O_DIRECT | os.O_CREAT | os.O_EXCL)
        try:
            _fallocate(fd, 0, reserve_bytes)
        except BaseException:
            os.close(fd)
            os.unlink(name, dir_fd=self._directory)
            raise
        return self._add(fd)

    def open(self, name: str) -> int:
        return self._add(self._open(name, os.O_RDWR | os.O_DIRECT))

    def size(self, handle: int) -> int:
        return os.fstat(self._fd(handle)).st_size

    def read(self, handles: I32, offsets: I64, addresses: U64, lengths: I64) -> I32:
        return self._transfer(False, handles, offsets, addresses, lengths)

    def stream(self, handles: I32, offsets: I64, addresses: U64, lengths: I64, step: int) -> Generator[I32, None, None]:
        fds, first = self._checked(handles, offsets, addresses, lengths), 0
        for moved in self._io.stream(fds, offsets, addresses, lengths, step):
            yield whole_or_failed(moved, lengths[first : first + len(moved)])
            first += len(moved)

    def bring(self, handles: I64, batch: native.Batch, pool: native.Pool, found: native.Found) -> bool:
        if not isinstance(self._io, UringEngine):
            return False
        fds = self._fds.take(handles, mode="clip")
        batch.fds, batch.file_count, batch.alignment = address_of(fds), len(fds), self._alignment
        return self._io.bring(batch, pool, found)

    def write(self, handles: I32, offsets: I64, addresses: U64, lengths: I64) -> I32:
        return self._transfer(True, handles, offsets, addresses, lengths)

    def sync(self, handle: int) -> None:
        os.fdatasync(self._fd(handle))

    def sync_names(self) -> None:
        os.fsync(self._directory)

    def punch(self, handle: int, offset: int, length: int) -> None:
        _fallocate(self._fd(handle), _FALLOC_KEEP_SIZE | _FALLOC_PUNCH_HOLE, length, offset)

    def taken(self, handle: int) -> int:
        return os.fstat(self._fd(handle)).st_blocks * 512

    def close(self, handle: int) -> None:
        with self._table_lock:
            fd, self._fds[handle] = self._fd(handle), -1
        os.close(fd)

    def remove(self, name: str) -> None:
        assert _is_users(name)
        os.unlink(name, dir_fd=self._directory)

    def read_file(self, name: str) -> bytes:
        with open(self._open(name, os.O_RDONLY), "rb") as file:
            return file.read()

    def replace(self, name: str, content: bytes) -> None:
        assert _is_users(name)
        # One temporary name a file: what a crash leaves behind is overwritten here, never collected.
        temporary = f".{name}.new"
        try:
            with open(self._open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=self._directory)
            raise
        self.sync_names()

    def free_bytes(self) -> int:
        space = os.fstatvfs(self._directory)
        return space.f_bavail * space.f_frsize

    def shutdown(self) -> None:
        self._io.shutdown()
        for fd in (*self._fds[self._fds >= 0].tolist(), self._directory, self._lock):
            if fd >= 0:
                os.close(fd)
        self._fds = np.array([-1, -1], np.int32)
        self._directory = self._lock = -1

    def _transfer(self, write: bool, handles: I32, offsets: I64, addresses: U64, lengths: I64) -> I32:
        fds = self._checked(handles, offsets, addresses, lengths)
        return transfer_all(self._io, fds, offsets, addresses, lengths, write=write, alignment=self._alignment)

    def _checked(self, handles: I32, offsets: I64, addresses: U64, lengths: I64) -> I32:
        """The descriptors of a transfer that may be made."""
        bits = np.bitwise_or.reduce(offsets | lengths | addresses.view(np.int64))
        assert not bits & (self._alignment - 1), f"a transfer that is not aligned to {self._alignment} bytes"
        assert lengths.min(initial=1) > 0, "a transfer of no bytes"
        fds: I32 = self._fds.take(handles, mode="clip")
        return fds

    def _open(self, name: str, flags: int) -> int:
        return os.open(name, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=self._directory)

    def _add(self, fd: int) -> int:
        with self._table_lock:
            handle = len(self._fds) - 1
            self._fds = np.insert(self._fds, handle, fd)
            return handle

    def _fd(self, handle: int) -> int:
        fd = int(self._fds.take(handle, mode="clip"))
        if fd < 0:
            raise OSError(errno.EBADF, f"handle {handle} is not open")
        return fd


def make_disk(settings: Settings, log: FilteringBoundLogger) -> FileDisk:
    """The disk on `settings.nvme`, locked. Raises StartRefused, with what to do, when that cannot serve."""
    directory = settings.nvme
    assert directory is not None
    _check_directory(directory)
    lock = _take_lock(directory)
    try:
        alignment = _discover_alignment(directory, lock)
        engine = _make_engine(settings.io_engine, settings.queue_depth, log)
        try:
            disk = FileDisk(directory, engine, alignment, lock)
        except BaseException:
            engine.shutdown()
            raise
    except BaseException:
        os.close(lock)
        raise
    log.info("disk", directory=str(directory), engine=engine.name, alignment=alignment, free_bytes=disk.free_bytes())
    return disk


def _is_users(name: str) -> bool:
    return not name.startswith(".") and name != LOCK_NAME and "/" not in name and name != ""


def _check_directory(directory: Path) -> None:
    try:
        mode = directory.stat().st_mode
    except FileNotFoundError:
        raise StartRefused(
            f"--nvme {directory} does not exist: create the directory, or mount the device there"
        ) from None
    except OSError as error:
        raise StartRefused(f"--nvme {directory} cannot be entered ({error.strerror}): give this user access") from error
    if not stat.S_ISDIR(mode):
        raise StartRefused(f"--nvme {directory} is not a directory: name the directory that is to hold the segments")
    descriptor = os.open(directory, os.O_PATH | os.O_CLOEXEC)
    try:
        answer = np.zeros(64, np.int64)  # struct statfs; f_type is its first word
        if _libc.fstatfs64(descriptor, address_of(answer)):
            number = ctypes.get_errno()
            raise StartRefused(f"--nvme {directory} cannot be examined ({os.strerror(number)}): check the mount")
    finally:
        os.close(descriptor)
    kind = _MEMORY_FILE_SYSTEMS.get(int(answer[0]))
    if kind:
        raise StartRefused(
            f"--nvme {directory} is on {kind}, which is memory and lost on reboot: name a directory on a disk, "
            "or leave --nvme out to run from RAM only"
        )


def _take_lock(directory: Path) -> int:
    """The lock's descriptor. The kernel lets go of it when the process ends, however it ends."""
    path = directory / LOCK_NAME
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        cause = {
            errno.EROFS: "is on a read-only file system: remount it read-write",
            errno.ENOSPC: "is on a full file system: free some space there",
            errno.EDQUOT: "is over its disk quota: free some space there",
        }.get(error.errno or 0, f"cannot be written ({error.strerror}): give this user the right to create files there")
        raise StartRefused(f"--nvme {directory} {cause}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.pwrite(lock, f"{os.getpid()}\n".ljust(LOCK_BYTES).encode(), 0)
    except BlockingIOError as error:
        owner = os.pread(lock, LOCK_BYTES, 0).decode(errors="replace").strip() or "unknown"
        os.close(lock)
        raise StartRefused(
            f"--nvme {directory} is in use by another hga-kvd, pid {owner}: stop it, or name another directory"
        ) from error
    except OSError as error:
        os.close(lock)
        raise StartRefused(
            f"--nvme {directory} cannot be locked ({error.strerror}): free space there, or use a local file system"
        ) from error
    return lock


def _discover_alignment(directory: Path, lock: int) -> int:
    """Bytes that O_DIRECT wants offsets, lengths and addresses to be multiples of, asked of the lock file."""
    refused = f"--nvme {directory}: this file system does not support O_DIRECT: use ext4 or XFS on a local disk"
    try:
        fd = os.open(f"/proc/self/fd/{lock}", os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        raise StartRefused(f"{refused} ({error.strerror})") from error
    try:
        stated = _stated_alignment(fd)
        alignment = _tried_alignment(fd) if stated is None else stated
        if not 0 < alignment <= ALIGNMENT_MAX:
            raise StartRefused(refused)
        _fallocate(fd, _FALLOC_KEEP_SIZE, LOCK_BYTES)  # allocated already: asks only whether fallocate exists
    except OSError as error:
        raise StartRefused(
            f"--nvme {directory}: this file system cannot preallocate files ({error.strerror}): use ext4 or XFS"
        ) from error
    finally:
        os.close(fd)
    return alignment


def _stated_alignment(fd: int) -> int | None:
    """What statx says: 0 for no direct I/O, None where the kernel or file system does not say."""
    if not hasattr(_libc, "statx"):
        return None
    answer = np.zeros(64, np.uint32)  # struct statx: stx_mask first; stx_dio_mem_align, stx_dio_offset_align at 152
    arguments = (ctypes.c_int(fd), b"", ctypes.c_int(_AT_EMPTY_PATH), ctypes.c_uint(_STATX_DIOALIGN))
    if _libc.statx(*arguments, ctypes.c_void_p(address_of(answer))) or not int(answer[0]) & _STATX_DIOALIGN:
        return None
    return max(int(answer[152 // 4]), int(answer[156 // 4]))


def _tried_alignment(fd: int) -> int:
    buffer = aligned_buffer(2 * ALIGNMENT_MAX)
    for alignment in (512, ALIGNMENT_MAX):
        with contextlib.suppress(OSError):
            os.preadv(fd, [buffer[alignment : 2 * alignment].data], LOCK_BYTES - alignment)
            return alignment
    return 0


def _make_engine(
    choice: Literal["auto", "uring", "liburing", "posix"], queue_depth: int, log: FilteringBoundLogger
) -> IoEngine:
    if choice == "auto":
        try:
            return UringEngine(queue_depth)
        except EngineUnavailable as error:
            log.warning("io_uring refused, reading with a thread pool", reason=str(error))
            return PosixEngine(queue_depth)
    try:
        return _ENGINES[choice](queue_depth)
    except EngineUnavailable as error:
        raise StartRefused(f"--io-engine {choice} is refused here: {error}; use --io-engine auto") from error


def _fallocate(fd: int, mode: int, size: int, offset: int = 0) -> None:
    """Reserves, or as `mode` says. Not posix_fallocate: glibc emulates that by writing where the file system cannot."""
    while _libc.fallocate64(fd, mode, offset, size):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, "fallocate: " + os.strerror(number))
