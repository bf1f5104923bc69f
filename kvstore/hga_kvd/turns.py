"""Whose payload is moved next: calls that move bytes take turns, tenants first, then the clients of one. ADR 0030.

- Tenants that wait get equal shares of the bytes that are moved, and so do the clients of one, whatever each asks for: fair
  queueing by start times (Goyal et al., SIGCOMM 1996) in two levels. One that asked for nothing has no credit for that.
- Small calls have places of their own, so none waits behind a large one. Fetches of a few records that RAM has take none.
- What waits is bounded for each tenant; over it, LimitExceeded. A call with a deadline waits no longer than that.

`FairQueue` is pure. `Turns` puts threads in its order.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from hga_kvd.errors import LimitExceeded

Item = TypeVar("Item")
Name = TypeVar("Name", bound=Hashable)

# A decode step's fetch is smaller, a chunk of K/V larger.
SMALL_BYTES = 256 << 10
# Calls at once. Of large ones two would be enough, if they did not come to end together: a disk answers what it was given
# at once, and has nothing to do while both are verified. (Resume of 64 K tokens: 1.1 GB/s with two, 1.55 with three.)
# Small ones wait for the disk for a part of their time.
SMALL_AT_ONCE, LARGE_AT_ONCE = 4, 3
# Flows that have nothing waiting are forgotten in bulk, once they are so many.
IDLE_FLOWS_MAX = 256


_NOW = threading.Event()  # of a call that need not wait


@dataclass(eq=False)
class _Flow(Generic[Item]):
    """start: bytes moved before its next item, had it always waited. A client has items, a tenant has clients."""

    start: float = 0.0
    waits: bool = False
    items: deque[tuple[int, Item]] = field(default_factory=deque)
    clients: _Level[Hashable, Item] | None = None


class _Level(Generic[Name, Item]):
    def __init__(self) -> None:
        self.now = 0.0  # start of what was served last
        self.flows: dict[Name, _Flow[Item]] = {}

    def joined(self, name: Name) -> _Flow[Item]:
        """This flow, which has something waiting from now on."""
        flow = self.flows.setdefault(name, _Flow())
        if not flow.waits:
            flow.waits, flow.start = True, max(flow.start, self.now)
        return flow

    def next(self) -> tuple[Name, _Flow[Item]]:
        return min(((n, f) for n, f in self.flows.items() if f.waits), key=lambda entry: entry[1].start)

    def served(self, flow: _Flow[Item], size: int, waits: bool) -> None:
        self.now = flow.start
        flow.start += size
        flow.waits = waits
        if len(self.flows) > IDLE_FLOWS_MAX:
            self.flows = {n: f for n, f in self.flows.items() if f.waits or f.start > self.now}
            if len(self.flows) > 2 * IDLE_FLOWS_MAX:  # so many new ones that nobody's turn comes twice
                self.flows = {n: f for n, f in self.flows.items() if f.waits}


class FairQueue(Generic[Item]):
    def __init__(self) -> None:
        self._tenants: _Level[str, Item] = _Level()
        self.counts: dict[str, int] = {}  # of items that wait, by tenant

    def put(self, tenant: str, client: Hashable, size: int, item: Item) -> None:
        of_tenant = self._tenants.joined(tenant)
        of_tenant.clients = of_tenant.clients or _Level()
        of_tenant.clients.joined(client).items.append((size, item))
        self.counts[tenant] = self.counts.get(tenant, 0) + 1

    def take(self) -> Item:
        """The next item; there must be one."""
        tenant, of_tenant = self._tenants.next()
        clients = of_tenant.clients
        assert clients is not None
        _, of_client = clients.next()
        size, item = of_client.items.popleft()
        clients.served(of_client, size, bool(of_client.items))
        self._count_out(tenant)
        self._tenants.served(of_tenant, size, tenant in self.counts)
        return item

    def remove(self, tenant: str, client: Hashable, size: int, item: Item) -> None:
        """It waits no longer."""
        of_tenant = self._tenants.flows[tenant]
        assert of_tenant.clients is not None
        of_client = of_tenant.clients.flows[client]
        of_client.items.remove((size, item))
        of_client.waits = bool(of_client.items)
        self._count_out(tenant)
        of_tenant.waits = tenant in self.counts

    def _count_out(self, tenant: str) -> None:
        self.counts[tenant] -= 1
        if not self.counts[tenant]:
            del self.counts[tenant]

    def rest(self) -> None:
        """Nothing waits and nothing is under way: who had how much before does not matter any more."""
        assert not self.counts
        self._tenants = _Level()


class _Places:
    """Of one size of calls. lock: of the Turns."""

    def __init__(self, count: int, lock: threading.Lock) -> None:
        self._count = self._free = count
        self._lock = lock
        self.queue: FairQueue[threading.Event] = FairQueue()

    def enter(self, tenant: str, client: Hashable, size: int, waiting_max: int, end: float | None) -> bool:
        """Returns once there is a place; False: time was up, there is none. Raises: LimitExceeded."""
        with self._lock:
            if self._free and not self.queue.counts:  # nobody waits: it is counted as served, and goes on
                self.queue.put(tenant, client, size, _NOW)
                self.queue.take()
                self._free -= 1
                return True
            turn = threading.Event()
            waiting = self.queue.counts.get(tenant, 0)
            if waiting >= waiting_max:
                raise LimitExceeded(
                    f"{waiting} calls of this tenant wait for their turn, which is the limit: repeat the call later, or "
                    "make fewer at once"
                )
            self.queue.put(tenant, client, size, turn)
            self._admit()
        if turn.is_set() or turn.wait(None if end is None else max(0.0, end - time.perf_counter())):
            return True
        with self._lock:
            if not turn.is_set():
                self.queue.remove(tenant, client, size, turn)
            return turn.is_set()

    def leave(self) -> None:
        with self._lock:
            self._free += 1
            self._admit()
            if self._free == self._count:
                self.queue.rest()

    def _admit(self) -> None:
        while self._free and self.queue.counts:
            self.queue.take().set()
            self._free -= 1


class Turns:
    def __init__(self, waiting_max: int, observe: Callable[[str, float], None] | None = None) -> None:
        """waiting_max: calls of one tenant and size that wait. observe: gets "small" or "large" and the seconds of each
        wait."""
        self._waiting_max = waiting_max
        self._observe = observe
        self._lock = threading.Lock()
        self._places = {
            "small": _Places(SMALL_AT_ONCE, self._lock),
            "large": _Places(LARGE_AT_ONCE, self._lock),
        }

    def waiting(self) -> dict[str, int]:
        """Calls that wait, by size."""
        with self._lock:
            return {name: sum(places.queue.counts.values()) for name, places in self._places.items()}

    @contextmanager
    def turn(self, tenant: str, client: Hashable, size: int, end: float | None = None) -> Iterator[None]:
        """The call moves its `size` bytes while the context is open. Entering waits; not after `end`, of perf_counter: what
        then is still to do, the call leaves undone by itself.

        Raises: LimitExceeded.
        """
        name = "small" if size <= SMALL_BYTES else "large"
        places = self._places[name]
        began = time.perf_counter()
        entered = places.enter(tenant, client, size, self._waiting_max, end)
        try:
            if self._observe is not None:
                self._observe(name, time.perf_counter() - began)
            yield
        finally:
            if entered:
                places.leave()
