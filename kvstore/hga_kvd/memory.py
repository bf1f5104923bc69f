"""Memory as numpy arrays, for buffers that disks read into.

A buffer is zero, page-aligned, and lives as long as any view of it: the array's base is the mapping, so nobody frees it by
hand. It is private to this process, or one file's.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from typing import Any

import numpy as np
import numpy.typing as npt

HUGE_PAGE_BYTES = 2 << 20

_MAP_FIXED = 16
_MADV_COLLAPSE = 25  # Linux 6.1
_HOLES: list[mmap.mmap] = []  # never unmapped: what was refused in their middle left a place that others may have now
_ANYTHING = ctypes.c_char * 0
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.mmap.restype = ctypes.c_void_p
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def aligned_buffer(size: int, huge: bool = False) -> npt.NDArray[np.uint8]:
    """`size` > 0 zero bytes, 4096-aligned; with `huge`, 2 MiB-aligned and in huge pages as far as the kernel has them.

    Physically contiguous destinations are what a disk reads into fastest (DESIGN section 4: 1.54 against 0.89 GB/s).
    """
    assert size > 0
    slack = HUGE_PAGE_BYTES if huge else 0
    mapping = mmap.mmap(-1, size + slack, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge:
        _advise_huge(mapping)
    whole = np.frombuffer(mapping, np.uint8)
    start = -address_of(whole) % HUGE_PAGE_BYTES if huge else 0
    return whole[start : start + size]


def file_buffer(descriptor: int, size: int) -> tuple[npt.NDArray[np.uint8], bool]:
    """The first `size` bytes of a memory file, 2 MiB-aligned and shared with it, all of them allocated; whether they lie
    in huge pages. size: whole huge pages of an empty file.

    Where the host has set none aside, the kernel makes them of ordinary memory, for anybody who asks: one page of each
    2 MiB is taken, and the rest is put there with it. (64 MiB: 100 ms, and 50 in plain pages.) Raises: OSError.
    """
    for at in range(0, size, HUGE_PAGE_BYTES):
        os.posix_fallocate(descriptor, at, 1)
    mapping = mmap.mmap(-1, size + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = np.frombuffer(mapping, np.uint8)
    start = -address_of(whole) % HUGE_PAGE_BYTES
    buffer = whole[start : start + size]
    # The file takes the place of the anonymous pages, and goes with them when the mapping does.
    shared = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED
    if _libc.mmap(address_of(buffer), size, *shared, descriptor, 0) != address_of(buffer):
        _HOLES.append(mapping)
        raise OSError(ctypes.get_errno(), "a memory file cannot be mapped")
    huge = not _libc.madvise(address_of(buffer), size, _MADV_COLLAPSE)
    os.posix_fallocate(descriptor, 0, size)
    return buffer, huge


def address_of(array: Any) -> int:
    """Where the first byte of an array or a memoryview lies. (0.4 us, where `array.ctypes.data` takes 3.)"""
    try:
        return ctypes.addressof(_ANYTHING.from_buffer(array))
    except (TypeError, ValueError):  # read-only; columns that lie together
        return int(np.asarray(array).__array_interface__["data"][0])


def give_back_freed() -> None:
    """Gives what was freed back to the system. Worth its milliseconds after a start: the tables that the index was made
    of took as much as it does, and the allocator would keep them for ever. Only glibc can."""
    with contextlib.suppress(AttributeError, OSError):
        _libc.malloc_trim(0)


def _advise_huge(mapping: mmap.mmap) -> None:
    """Huge pages are a speed, not a need: a kernel built without them says EINVAL, and the buffer is plain."""
    with contextlib.suppress(OSError):
        mapping.madvise(mmap.MADV_HUGEPAGE)
