"""Which extents should stay in RAM? Routed traces of a real model, several sessions in turns, against policies of the arena.

What the engine does is done here too: the arena's unit is an extent (chunk x layer), records in it become valid one by
one as they are read, appends come in valid, a call first touches what it found and then makes room for what it did not.
The GPU bank in front (LRU, per KV head) takes most repeats away, so the daemon sees the rest: both views are measured.
Belady's optimum knows the future of every extent, and may refuse to keep one that comes back later than all others. It is
the optimum for extents; counted in records, a policy that keeps an extent longer may pass it.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Protocol

import numpy as np
import results
import typer
from hga_kvd.eviction import Lrfu
from rich.console import Console
from rich.table import Table

I64 = np.ndarray
GROUPS_PER_CHUNK, CHUNK_TOKENS = 4, 64
NEVER = 1 << 60


class Policy(Protocol):
    def touch(self, slots: I64) -> None: ...
    def admit(self, slots: Iterable[int], keys: Iterable[int]) -> None: ...
    def evict(self, count: int, pinned: np.ndarray) -> list[int]: ...


# 10 % is the published choice; the paper finds hit rates flat from 5 to 20 %.
SMALL_SHARE = 0.1
FREQUENCY_MAX = 3


class S3Fifo:
    """S3-FIFO (Yang et al., SOSP 2023): what is asked for once passes through a small queue. Ours until ADR 0012."""

    def __init__(self, slot_count: int) -> None:
        # One array, seen twice: single elements of a bytearray cost a quarter of numpy's.
        self._count_of = bytearray(slot_count)
        self._frequency = np.frombuffer(self._count_of, np.uint8)
        self._small: OrderedDict[int, int] = OrderedDict()  # slot -> key
        self._main: OrderedDict[int, int] = OrderedDict()
        self._ghost: OrderedDict[int, None] = OrderedDict()  # key

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def touch(self, slots: I64) -> None:
        """A call asked for these slots. A slot named twice in one call counts once."""
        self._frequency[slots] = np.minimum(self._frequency[slots] + 1, FREQUENCY_MAX)

    def admit(self, slots: Iterable[int], keys: Iterable[int]) -> None:
        """These slots now hold these clean extents and may be evicted."""
        for slot, key in zip(slots, keys, strict=True):
            self._count_of[slot] = 0
            if key in self._ghost:
                del self._ghost[key]
                self._main[slot] = key
            else:
                self._small[slot] = key

    def forget(self, slots: Iterable[int]) -> None:
        """These slots were freed for another reason; slots that were never admitted are fine."""
        for slot in slots:
            self._small.pop(slot, None)
            self._main.pop(slot, None)

    def evict(self, count: int, pinned: np.ndarray) -> list[int]:
        """Up to `count` slots to reuse now; fewer when the others are pinned (pinned[slot] != 0)."""
        small, main, count_of, pins = self._small, self._main, self._count_of, pinned.data
        victims: list[int] = []
        passed_over: list[tuple[OrderedDict[int, int], int, int]] = []
        while len(victims) < count and (small or main):
            from_small = bool(small) and (not main or len(small) > SMALL_SHARE * (len(small) + len(main)))
            queue = small if from_small else main
            slot, key = queue.popitem(last=False)
            if pins[slot]:
                passed_over.append((queue, slot, key))
            elif from_small and count_of[slot]:
                count_of[slot] = 0
                main[slot] = key
            elif count_of[slot]:
                count_of[slot] -= 1
                main[slot] = key
            else:
                victims.append(slot)
                if from_small:
                    self._ghost[key] = None
        for queue, slot, key in passed_over:
            queue[slot] = key
        while len(self._ghost) > max(1, len(self)):
            self._ghost.popitem(last=False)
        return victims


class Lru:
    """Least recently used first out, with the interface of Lrfu."""

    def __init__(self, slot_count: int) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()

    def touch(self, slots: I64) -> None:
        for slot in dict.fromkeys(slots.tolist()):
            self._order.move_to_end(slot)

    def admit(self, slots: Iterable[int], keys: Iterable[int]) -> None:
        for slot in slots:
            self._order[slot] = None

    def evict(self, count: int, pinned: np.ndarray) -> list[int]:
        victims = list(itertools.islice((slot for slot in self._order if not pinned[slot]), count))
        for slot in victims:
            del self._order[slot]
        return victims


class Sieve:
    """SIEVE (Zhang et al., NSDI 2024): one queue, a hand that spares what was visited; newcomers at the head."""

    def __init__(self, slot_count: int) -> None:
        self._visited = np.zeros(slot_count, bool)
        self._next: dict[int, int] = {}  # towards the head
        self._previous: dict[int, int] = {}
        self._hand = self._tail = self._head = -1

    def touch(self, slots: I64) -> None:
        self._visited[slots] = True

    def admit(self, slots: Iterable[int], keys: Iterable[int]) -> None:
        for slot in slots:
            self._visited[slot] = False
            self._previous[slot], self._next[slot] = self._head, -1
            if self._head >= 0:
                self._next[self._head] = slot
            else:
                self._tail = slot
            self._head = slot

    def evict(self, count: int, pinned: np.ndarray) -> list[int]:
        victims: list[int] = []
        passed = 0
        while len(victims) < count and self._next and passed <= 2 * len(self._next):
            slot = self._hand if self._hand >= 0 else self._tail
            self._hand = self._next[slot]
            if pinned[slot] or self._visited[slot]:
                self._visited[slot] &= bool(pinned[slot])
                passed += 1
                continue
            self._unlink(slot)
            victims.append(slot)
            passed = 0
        return victims

    def _unlink(self, slot: int) -> None:
        before, after = self._previous.pop(slot), self._next.pop(slot)
        if before >= 0:
            self._next[before] = after
        else:
            self._tail = after
        if after >= 0:
            self._previous[after] = before
        else:
            self._head = before


class Belady:
    """Furthest next use out first. `uses`: of each extent, the times at which it is asked for, ascending."""

    def __init__(self, slot_count: int, uses: list[list[int]]) -> None:
        self._uses = [iter(times) for times in uses]
        self._coming = np.array([next(times, NEVER) for times in self._uses], np.int64)
        self._key_of: dict[int, int] = {}
        self._heap: list[tuple[int, int, int]] = []  # (-next use, slot, key); stale ones are skipped

    def asked(self, extents: I64, now: int) -> None:
        """Before the call's own touch: these are asked for at this time."""
        for extent in extents.tolist():
            while self._coming[extent] <= now:
                self._coming[extent] = next(self._uses[extent], NEVER)

    def touch(self, slots: I64) -> None:
        for slot in dict.fromkeys(slots.tolist()):
            self._push(slot, self._key_of[slot])

    def admit(self, slots: Iterable[int], keys: Iterable[int]) -> None:
        for slot, key in zip(slots, keys, strict=True):
            self._key_of[slot] = key
            self._push(slot, key)

    def _push(self, slot: int, key: int) -> None:
        heapq.heappush(self._heap, (-int(self._coming[key]), slot, key))

    def wanted(self, extents: I64, free: int) -> I64:
        """Those of the extents that belong in the arena: the soonest ones, as long as they come back before a victim."""
        order = extents[np.argsort(self._coming[extents], kind="stable")]
        furthest = sorted(-self._coming[key] for key in self._key_of.values())[: max(0, len(order) - free)]
        count = min(len(order), free)
        for far, extent in zip(furthest, order[free:].tolist(), strict=False):
            if self._coming[extent] >= -far:
                break
            count += 1
        return order[:count]

    def evict(self, count: int, pinned: np.ndarray) -> list[int]:
        victims: list[int] = []
        later = []
        while len(victims) < count and self._heap:
            entry = heapq.heappop(self._heap)
            coming, slot, key = entry
            if self._key_of.get(slot) != key or -coming != self._coming[key]:
                continue
            if pinned[slot]:
                later.append(entry)
                continue
            del self._key_of[slot]
            victims.append(slot)
        for entry in later:
            heapq.heappush(self._heap, entry)
        return victims


# --- what the daemon is asked for ---


def bank_misses(trace: np.ndarray, bank_groups: int) -> np.ndarray:
    """The trace [layers, heads, steps, groups] without what an LRU bank of so many groups per KV head answers."""
    if not bank_groups:
        return trace
    left = np.zeros_like(trace)
    for layer, head in np.ndindex(trace.shape[:2]):
        bank: OrderedDict[int, None] = OrderedDict()
        for step, opened in enumerate(trace[layer, head]):
            groups = np.flatnonzero(opened).tolist()
            for group in groups:
                left[layer, head, step, group] = group not in bank
                bank[group] = None
                bank.move_to_end(group)
            while len(bank) > bank_groups:
                bank.popitem(last=False)
    return left


def turns(sessions: int, steps: int, burst: int) -> Iterator[tuple[int, int]]:
    """(session, step): each session takes `burst` steps, then the next one does."""
    for first in range(0, steps, burst):
        for session in range(sessions):
            for step in range(first, first + burst):
                yield session, step


class Load:
    """Sessions that decode in turns: session i begins its trace at step i * shift, over the prompt before that step."""

    def __init__(self, trace: np.ndarray, sessions: int, steps: int, burst: int, prompt_tokens: int) -> None:
        self.layers, self.heads, trace_steps, groups = trace.shape
        self.chunks = groups // GROUPS_PER_CHUNK
        self.sessions, self.burst, self.prompt_tokens = sessions, burst, prompt_tokens
        self.shift = (trace_steps - steps) // max(1, sessions - 1)
        # calls[i]: (session, step, extents, records): what it asks for
        per_step = [[np.nonzero(trace[:, :, step])] for step in range(trace_steps)]
        self.calls: list[tuple[int, int, I64, I64]] = []
        for session, step in turns(sessions, steps, burst):
            layer, head, group = per_step[session * self.shift + step][0]
            extents = self.extent(session, group // GROUPS_PER_CHUNK, layer)
            self.calls.append((session, step, extents, head * GROUPS_PER_CHUNK + group % GROUPS_PER_CHUNK))

    def extent(self, session: int, chunk: I64, layer: I64) -> I64:
        return (session * self.chunks + chunk) * self.layers + layer

    def prompt_chunks(self, session: int, step: int) -> int:
        return (self.prompt_tokens + session * self.shift + step) // CHUNK_TOKENS

    @property
    def extent_count(self) -> int:
        return self.sessions * self.chunks * self.layers

    @property
    def data_extents(self) -> int:
        """That the sessions have at the end."""
        last = max(step for _, step, _, _ in self.calls)
        return sum(self.prompt_chunks(session, last) for session in range(self.sessions)) * self.layers

    def uses(self) -> list[list[int]]:
        times: list[list[int]] = [[] for _ in range(self.extent_count)]
        for now, (_, _, extents, _) in enumerate(self.calls):
            for extent in np.unique(extents).tolist():
                times[extent].append(now)
        return times


class Arena:
    """Slots, what is valid in them, and a policy: `claim` and `make_room` of residency.py."""

    def __init__(self, load: Load, slot_count: int, policy: Policy, touch_all: bool) -> None:
        self.policy, self.touch_all = policy, touch_all
        self.slot_of = np.zeros(load.extent_count, np.int64)  # slot 0 is nobody's
        self.holder = np.zeros(slot_count + 1, np.int64)
        self.valid = np.zeros((slot_count + 1, load.heads * GROUPS_PER_CHUNK), bool)
        self.pins = np.zeros(slot_count + 1, np.int32)
        self.free = list(range(slot_count, 0, -1))

    def make_room(self, count: int) -> int:
        if len(self.free) < count:
            victims = self.policy.evict(count - len(self.free), self.pins)
            self.slot_of[self.holder[victims]] = 0
            self.valid[victims] = False
            self.free += victims[::-1]
        return min(count, len(self.free))

    def put(self, extents: I64, valid: bool) -> None:
        count = self.make_room(len(extents))
        slots = np.array([self.free.pop() for _ in range(count)], np.int64)
        self.slot_of[extents[:count]] = slots
        self.holder[slots] = extents[:count]
        self.valid[slots] = valid
        self.policy.admit(slots.tolist(), extents[:count].tolist())

    def append(self, extents: I64) -> None:
        if isinstance(self.policy, Belady):
            extents = self.policy.wanted(extents, len(self.free))
        self.put(extents, True)

    def fetch(self, extents: I64, records: I64, now: int) -> int:
        """Returns how many records were valid."""
        slots = self.slot_of[extents]
        hit = self.valid[slots, records]
        if isinstance(self.policy, Belady):
            self.policy.asked(np.unique(extents), now)
        self.policy.touch(slots[slots != 0] if self.touch_all or isinstance(self.policy, Belady) else slots[hit])
        present = np.unique(slots[slots != 0])
        self.pins[present] += 1
        absent = np.unique(extents[slots == 0])
        if isinstance(self.policy, Belady):
            absent = self.policy.wanted(absent, len(self.free))
        self.put(absent, False)
        self.pins[present] -= 1
        kept = self.slot_of[extents]
        self.valid[kept[kept != 0], records[kept != 0]] = True
        return int(hit.sum())


def replay(load: Load, share: float, make: Callable[[int], Policy], touch_all: bool) -> dict[str, float]:
    """Prompts in turns of 8 chunks, then the calls. Hit rate over the last three quarters of them."""
    slot_count = max(1, int(share * load.data_extents))
    arena = Arena(load, slot_count, make(slot_count + 1), touch_all)
    layers = np.arange(load.layers)
    prompts = [load.prompt_chunks(session, 0) for session in range(load.sessions)]
    for first in range(0, max(prompts), 8):
        for session, count in enumerate(prompts):
            for chunk in range(first, min(first + 8, count)):
                arena.append(load.extent(session, np.full(load.layers, chunk), layers))
    asked = found = 0
    started = time.perf_counter()
    for now, (session, step, extents, records) in enumerate(load.calls):
        chunks = load.prompt_chunks(session, step)
        if chunks > prompts[session]:
            arena.append(load.extent(session, np.full(load.layers, prompts[session]), layers))
            prompts[session] = chunks
        hits = arena.fetch(extents, records, now)
        if 4 * now >= len(load.calls):
            asked, found = asked + len(extents), found + hits
    return {"hit_rate": found / max(1, asked), "us_a_call": (time.perf_counter() - started) / len(load.calls) * 1e6}


def main(
    traces: Annotated[Path, typer.Option(help="directory of routed_trace_*_8192.npz")],
    sessions: Annotated[int, typer.Option(min=1)] = 6,
    steps: Annotated[int, typer.Option(help="decode steps a session; a multiple of 64", min=64)] = 512,
) -> None:
    """Prints hit rates of records; appends to bench/results/eviction.jsonl."""
    rows = []
    table = Table(title=f"{sessions} sessions, {steps} steps each: records found in RAM, %")
    policies: dict[str, tuple[Callable[[int], Policy], bool]] = {
        "LRFU": (Lrfu, True),
        "LRFU, hits only": (Lrfu, False),
        "S3-FIFO": (S3Fifo, True),
        "S3-FIFO, hits only": (S3Fifo, False),
        "SIEVE": (Sieve, True),
        "LRU": (Lru, True),
    }
    names = (*policies, "Belady")
    for name in ("trace", "bank", "turns of", "arena", *names):
        table.add_column(name, justify="left" if name == "trace" else "right")
    for file in sorted(traces.glob("routed_trace_*_8192.npz")):
        trace = np.unpackbits(np.load(file)["trace"], axis=-1).astype(bool)
        prompt_tokens = CHUNK_TOKENS * (trace.shape[3] // GROUPS_PER_CHUNK) - trace.shape[2]
        for bank in (0, 128):
            asked = bank_misses(trace, bank)
            for burst in (1, 64):
                load = Load(asked, sessions, steps, burst, prompt_tokens)
                uses = load.uses()
                for share in (0.10, 0.25, 0.50):
                    belady = (lambda count, uses=uses: Belady(count, uses), True)
                    makers = {**policies, "Belady": belady}
                    numbers = {name: replay(load, share, *maker) for name, maker in makers.items()}
                    place = {"trace": file.stem.split("_")[2], "bank": bank, "burst": burst, "share": share}
                    rows.append({**place, "policies": numbers})
                    shown = (f"{100 * numbers[name]['hit_rate']:.1f}" for name in names)
                    table.add_row(place["trace"], str(bank), str(burst), f"{share:.0%}", *shown)
    Console(width=140).print(table)
    results.append("eviction", {"sessions": sessions, "steps": steps}, {"rows": rows})


if __name__ == "__main__":
    typer.run(main)
