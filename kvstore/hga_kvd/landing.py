"""Landing: the shared-memory regions that records are read into and appends are taken from.

Always true here:
- A region's size never changes: it is sealed against shrinking and growing, and its pages are allocated before anyone
  hears of it, so touching it neither faults for want of memory nor runs past its end.
- Nobody else knows a client's id: it is 63 random bits, and naming a range takes the id.
- Ranges on loan do not overlap. A call waits until an older call on the same bytes has ended, so a fetch that its
  client gave up can never write into the answer of the next one.
- `release` only forgets a region. The memory is unmapped when the last borrower's view is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import threading
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hga_kvd.errors import InvalidRequest, KvdError, LimitExceeded
from hga_kvd.memory import HUGE_PAGE_BYTES, file_buffer

U8 = npt.NDArray[np.uint8]

RANGE_ALIGNMENT_BYTES = 4096  # covers O_DIRECT on every device
_MFD_HUGE_2MB = 21 << 26
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class NotAttached(KvdError):
    """A call names a client that is not attached (any more). Attaching again helps; the old region is gone."""


@dataclass
class Region:
    """One client's memory, mapped here for as long as `memory` or a slice of it is alive."""

    client_id: int
    memory: U8
    huge_pages: bool
    lent: list[tuple[int, int]] = field(default_factory=list)  # [start, end) of ranges on loan

    view: memoryview = field(init=False)

    def __post_init__(self) -> None:
        self.view = self.memory.data

    @property
    def bytes(self) -> int:
        return self.memory.size


class Loan:
    """A range on loan while its context is open. A class because a generator costs twice as much: 2 us a fetch."""

    __slots__ = ("_asked", "_landing", "_loan", "_region")

    def __init__(self, landing: Landing, client_id: int, offset: int, size: int) -> None:
        self._landing = landing
        self._asked = (client_id, offset, size)

    def __enter__(self) -> U8:
        self._region, self._loan = self._landing.lend(*self._asked)
        start, end = self._loan
        return self._region.memory[start:end]

    def __exit__(self, *error: object) -> None:
        self._landing.take_back(self._region, self._loan)


class Landing:
    def __init__(self, region_bytes_max: int, clients_max: int, regions_bytes_max: int) -> None:
        self._region_bytes_max = region_bytes_max
        self._clients_max = clients_max
        self._regions_bytes_max = regions_bytes_max
        self._regions: dict[int, Region] = {}
        self._reserved: list[int] = []  # bytes of regions being made
        self.lock = threading.Lock()
        self._returned = threading.Condition(self.lock)
        self._waiting = 0  # calls that wait for a range

    def __len__(self) -> int:
        return len(self._regions)

    def __contains__(self, client_id: int) -> bool:
        return client_id in self._regions

    def create(self, region_bytes: int) -> tuple[Region, int]:
        """A new client's region of at least `region_bytes`, and its descriptor, which the caller must close.

        Raises: InvalidRequest for no bytes; LimitExceeded when too large, too many, or memory is short.
        """
        if region_bytes < 1:
            raise InvalidRequest("region_bytes is 0; ask for the bytes that your largest call needs")
        size = -(-region_bytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        if size > self._region_bytes_max:
            raise LimitExceeded(
                f"a region of {size} bytes is more than this daemon gives one client, {self._region_bytes_max} bytes; "
                "ask for less, or raise region_bytes_max"
            )
        with self.lock:
            if len(self._regions) + len(self._reserved) >= self._clients_max:
                raise LimitExceeded(
                    f"{self._clients_max} clients are attached, which is the limit; end one, or raise clients_max"
                )
            taken = sum(self._reserved) + sum(region.bytes for region in self._regions.values())
            if taken + size > self._regions_bytes_max:
                raise LimitExceeded(
                    f"the regions of all clients have {taken} of {self._regions_bytes_max} bytes, and {size} more do not "
                    "fit; end a client, ask for less, or raise regions_bytes_max"
                )
            self._reserved.append(size)
        region = None
        try:
            memory, descriptor, huge_pages = _allocate(size)
            region = Region(secrets.randbits(63) | 1, memory, huge_pages)
        finally:
            with self.lock:
                self._reserved.remove(size)
                if region is not None:
                    self._regions[region.client_id] = region
        return region, descriptor

    def borrow(self, client_id: int, offset: int, size: int) -> Loan:
        """The bytes [offset, offset + size) of a client's region: `with landing.borrow(...) as memory`, for the caller
        alone while the context is open. Entering waits for the end of older loans that overlap.

        Entering raises: NotAttached; InvalidRequest when the range is not aligned or not inside the region.
        """
        return Loan(self, client_id, offset, size)

    def unlent(self, client_id: int, offset: int, size: int) -> memoryview | None:
        """These bytes, as far as the region has them, if nothing of the region is on loan; None: `borrow` will say why
        not, or wait. `lock` must be held, and nothing is lent while it is.
        """
        region = self._regions.get(client_id)
        if region is None or region.lent or offset % RANGE_ALIGNMENT_BYTES:
            return None
        return region.view[offset : offset + size]

    def lend(self, client_id: int, offset: int, size: int) -> tuple[Region, tuple[int, int]]:
        """As `borrow`; the loan must be taken back."""
        with self.lock:
            region = self._get(client_id)
            if offset % RANGE_ALIGNMENT_BYTES:
                raise InvalidRequest(f"shared.offset {offset} is not a multiple of {RANGE_ALIGNMENT_BYTES}")
            if offset + size > region.bytes:
                raise InvalidRequest(
                    f"the shared range {offset} to {offset + size} is outside the region of {region.bytes} bytes"
                )
            loan = (offset, offset + size)
            while region.lent and any(start < loan[1] and loan[0] < end for start, end in region.lent):
                self._waiting += 1
                try:
                    self._returned.wait()
                finally:
                    self._waiting -= 1
                self._get(client_id)
            region.lent.append(loan)
        return region, loan

    def take_back(self, region: Region, loan: tuple[int, int]) -> None:
        with self.lock:
            region.lent.remove(loan)
            if self._waiting:
                self._returned.notify_all()

    def release(self, client_id: int) -> None:
        """Forgets a client. Calls that hold a range of its region finish undisturbed."""
        with self.lock:
            self._regions.pop(client_id, None)
            self._returned.notify_all()

    def _get(self, client_id: int) -> Region:
        try:
            return self._regions[client_id]
        except KeyError:
            raise NotAttached(f"client {client_id} is not attached; call Attach again, then repeat the call") from None


def _allocate(size: int) -> tuple[U8, int, bool]:
    # Huge pages are physically contiguous: direct reads into them are 1.7 times faster (DESIGN section 4). Those that the
    # host set aside (/proc/sys/vm/nr_hugepages) come first; finding out is trying.
    with contextlib.suppress(OSError):
        return _memfd(size, os.MFD_HUGETLB | _MFD_HUGE_2MB)
    try:
        return _memfd(size, 0)
    except OSError as error:
        raise LimitExceeded(f"this host has no memory for a region of {size} bytes: {error.strerror}") from error


def _memfd(size: int, flags: int) -> tuple[U8, int, bool]:
    descriptor = os.memfd_create("hga-kvd-landing", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    try:
        os.ftruncate(descriptor, size)
        memory, huge_pages = file_buffer(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
        return memory, descriptor, huge_pages or flags != 0
    except BaseException:
        os.close(descriptor)
        raise
