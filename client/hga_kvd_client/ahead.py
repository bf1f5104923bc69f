"""Answers that follow one another, each asked for while the ones before it are used: neither the disk, the daemon nor the
caller waits for the others.

The part of the region where fetches land is cut into slots, and an answer stays in its slot until the caller asks for the
next one; without a region it is a message of its own. Everything goes over gRPC, which has many calls under way.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

from hga_kvd_client import errors
from hga_kvd_client.link import Link
from hga_kvd_client.payload import Slot
from hga_kvd_client.region import PAGE_BYTES

Answer = TypeVar("Answer")

# The daemon moves three large payloads at once (its turns.py); one is with the caller.
SLOTS = 4

Ask = Callable[
    [Slot | None], Callable[[], Answer]
]  # begins the call; what it returns waits for the answer, and then raises


def slots(link: Link, item_bytes: int) -> list[Slot | None]:
    """Where answers go in turns, if they have parts of this size: as many slots as there may be, one, or messages."""
    if link.region is None or item_bytes > link.region.fetch_part.nbytes:
        return [None] * SLOTS
    whole = link.region.fetch_part.nbytes
    size = whole // SLOTS // PAGE_BYTES * PAGE_BYTES
    return [(number * size, size) for number in range(SLOTS)] if item_bytes <= size else [(0, whole)]


def in_order(link: Link, asks: Iterable[Ask[Answer]], item_bytes: int) -> Generator[Answer, None, None]:
    """Their answers, each gone with the next one. What found no daemon is asked again. Close it before the region is used
    for something else: it waits for what is under way.

    Raises: KvdError, as a call of its own would.
    """
    link.ready()
    free, left = deque(slots(link, item_bytes)), iter(asks)
    under_way: deque[tuple[Ask[Answer], Slot | None, Callable[[], Answer]]] = deque()
    try:
        while True:
            while free and (ask := next(left, None)) is not None:
                slot = free.popleft()
                under_way.append((ask, slot, ask(slot)))
            if not under_way:
                return
            ask, slot, finish = under_way.popleft()
            try:
                answer = finish()
            except errors.Unavailable:
                answer = link.repeat(lambda ask=ask, slot=slot: ask(slot)())  # type: ignore[misc]
            yield answer
            free.append(slot)
    finally:
        for _, _, finish in under_way:
            with contextlib.suppress(errors.KvdError):
                finish()
