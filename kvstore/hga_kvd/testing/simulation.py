"""The simulator: one seed, one trial on a disk that fails as its schedule says. The second of the three rings.

`run(seed)` draws a schedule and lives through it; `crash_points(seed)` counts the disk operations of one life, and
`crash_at(seed, n)` loses power in the n-th of them. Each raises `Violation`, which names the seed and what was done, if
the engine breaks the guarantee. docs/testing.md says how to replay one; ADR 10 is the model.
"""

from __future__ import annotations

import builtins
import random
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

from hga_kvd.checksum import checksum
from hga_kvd.config import Settings
from hga_kvd.engine import Engine
from hga_kvd.errors import KvdError, StartRefused, StorageFull, WriteFailed
from hga_kvd.format import (
    BLOCK_BYTES,
    BadBytes,
    ChunkFrame,
    Frame,
    LinkFrame,
    SummaryFrame,
    check_frame,
    decode_frame_header,
    decode_table,
    segment_id_of,
    segment_name,
)
from hga_kvd.geometry import Geometry
from hga_kvd.manifest import MANIFEST_NAME, decode_manifest
from hga_kvd.testing.faults import Fault, Life, Remains, Schedule, Severity
from hga_kvd.testing.judge import Clock
from hga_kvd.testing.simdisk import SECTOR_BYTES, PowerLoss, SimDisk
from hga_kvd.testing.trial import Trial

KIB, MIB = 1 << 10, 1 << 20

TINY = Geometry(2, 1, 5, "float16", chunk_tokens=8, group_tokens=4)  # records of 80 bytes: read through a buffer
SMALL = Geometry(1, 2, 32, "float16", chunk_tokens=16, group_tokens=8)  # records of 1024 bytes: read in place
WIDE = Geometry(2, 2, 64, "float32")  # extents of 64 KiB: 16 chunks fill the arena

# A read fault of these kinds is over when it has struck once.
PASSING = ("eio", "flip", "misdirect")


class Violation(AssertionError):
    """The guarantee was broken."""


@dataclass(eq=False)
class Result:
    crashes: int = 0
    starts: int = 0
    struck: Counter[str] = field(default_factory=Counter)


class Damage:
    """The `Excuses` of a simulated disk: what its faults have hit, read off the shadow of each file."""

    def __init__(self) -> None:
        self.disk = SimDisk()
        self.started_at = 0  # how many faults had struck before the last start
        self.called_at = 0  # ... and before the last call
        self.start_struck = False  # twice by faults that pass, since the oracle last judged one
        self._looked: tuple[SimDisk, int] | None = None
        self._digests: set[int] = set()
        self._sessions: set[int] = set()

    def start(self) -> bool:
        return self.start_struck or self._struck_since(self.started_at) > 1

    def session(self, session_id: int) -> bool:
        self.look()
        return session_id in self._sessions

    def bytes(self, digest: int) -> bool:
        # A bad record is read once more; only the second fault of one call is an excuse.
        if self._struck_since(self.called_at) > 1:
            return True
        self.look()
        return digest in self._digests

    def start_failed(self) -> None:
        """What it took for torn it may have erased."""
        self.start_struck |= self._struck_since(self.started_at) > 1

    def _struck_since(self, count: int) -> int:
        return sum(_passes(fault) for fault in self.disk.struck[count:])

    def look(self) -> None:
        """Takes down what is hit now: the engine may write over it, or erase what it takes for torn."""
        at = self.disk, self.disk.operations
        if at == self._looked:
            return
        self._looked = at
        for name in self.disk.names():
            segment_id = segment_id_of(name)
            sectors = self.disk.hits(name) if segment_id is not None else set()
            if segment_id is not None and sectors:
                self._look_at(segment_id, self.disk.meant(name), sectors)

    def _look_at(self, segment_id: int, content: builtins.bytes, sectors: set[int]) -> None:
        frames = list(frames_of(segment_id, content))
        vouched = self._vouched(segment_id)
        header_hit = _overlap(sectors, 0, BLOCK_BYTES)
        tail_hit = False
        links: dict[tuple[int, int, int, builtins.bytes], bool] = {}
        for frame in frames:
            header = frame.header
            end = header.offset + header.frame_bytes
            head_hit = header_hit or _overlap(sectors, header.offset, header.body_offset)
            # A frame that nothing vouches for ends the log if it is not whole: those behind it go with it.
            tail_hit |= end > vouched and _overlap(sectors, header.offset, end)
            lost = head_hit or tail_hit
            if isinstance(frame, LinkFrame):  # written twice: one is enough
                same = header.session_id, header.epoch, header.first_chunk, frame.uids.tobytes()
                links[same] = links.get(same, True) and lost
            elif lost:
                self._sessions.add(header.session_id)
            for start, stop, digest in _parts(frame, content):
                if lost or _overlap(sectors, start, stop):
                    self._digests.add(digest)
        self._sessions.update(same[0] for same, lost in links.items() if lost)

    def _vouched(self, segment_id: int) -> int:
        """Up to where the frames that are still sound, or the manifest, say that the segment was durable."""
        manifest = decode_manifest(self.disk.read_file(MANIFEST_NAME))
        used = [entry.used_bytes for entry in manifest.segments if entry.segment_id == segment_id]
        frames = frames_of(segment_id, self.disk.get(segment_name(segment_id)))
        return max([*used, *(frame.header.durable_bytes for frame in frames)], default=0)


def _passes(fault: Fault) -> bool:
    return fault.operation == "read" and fault.kind in PASSING


def _overlap(sectors: set[int], start: int, stop: int) -> bool:
    return not sectors.isdisjoint(range(start // SECTOR_BYTES, -(-stop // SECTOR_BYTES)))


def frames_of(segment_id: int, content: bytes) -> list[Frame]:
    """Every sound frame in a segment, wherever it is."""
    frames = []
    for offset in range(BLOCK_BYTES, len(content), BLOCK_BYTES):
        if content[offset] != ord("K"):
            continue
        try:
            header = decode_frame_header(content[offset : offset + BLOCK_BYTES], segment_id, offset, len(content))
            table = check_frame(header, content[offset : offset + header.head_bytes])
            frames.append(decode_table(header, table))
        except BadBytes:
            continue
    return frames


def _parts(frame: Frame, content: bytes) -> list[tuple[int, int, int]]:
    """(from, to, digest) of each chunk or summary in the frame's body."""
    header = frame.header
    parts = []
    if isinstance(frame, ChunkFrame):
        count, layers, records = frame.checksums.shape
        size = records * frame.record_bytes
        for at in range(header.body_offset, header.body_offset + count * frame.chunk_stride, frame.chunk_stride):
            extents = [content[at + i * frame.stride :][:size] for i in range(layers)]
            parts.append((at, at + frame.chunk_stride, checksum(b"".join(extents))))
    elif isinstance(frame, SummaryFrame):
        size = frame.bytes_per_chunk
        for at in range(header.body_offset, header.body_offset + header.body_bytes, frame.stride):
            parts.append((at, at + size, checksum(content[at : at + size])))
    return parts


class Simulation:
    """One trial. The schedule says what happens; the rest follows from its seed too."""

    def __init__(self, schedule: Schedule) -> None:
        chance = random.Random(f"simulation {schedule.seed}")
        wide = chance.random() < 0.15
        self.schedule = schedule
        self.result = Result()
        self.operations: list[int] = []  # of each disk, from power on to power loss
        self._noted = 0  # faults in the trace
        self.nvme_max = chance.choice((0, 0, 2 * MIB)) if wide else chance.choice((0, 0, 256 * KIB, 512 * KIB))
        evicts = self.nvme_max > 0 and chance.random() < 0.5
        if evicts and not wide:
            self.nvme_max = 128 * KIB  # two small segments: space is short soon
        self.settings = _settings(
            (512 if wide else 64 if evicts else chance.choice((64, 64, 256))) * KIB, self.nvme_max, evicts
        )
        self.clock = Clock()
        self.disk = SimDisk(chance.choice((1 << 40, 4 * MIB)), schedule.seed)
        self.damage = Damage()
        self.disk.on_rot = self.damage.look
        self.damage.disk = self.disk
        refusals = schedule.severity == "failing" or self.nvme_max > 0 or self.disk.bytes_max < 1 << 40
        geometries = (WIDE, TINY) if wide else (TINY, SMALL)
        engine = self._engine()
        self.trial = Trial(
            engine, schedule.seed, geometries, refusals=refusals, excuses=self.damage, clock=self.clock, evicts=evicts
        )

    def run(self) -> Result:
        try:
            for life in self.schedule.lives:
                self._live(life)
            # Whatever happened: one more start on a disk that does not fail.
            self._start(())
            self._end()
        except (AssertionError, KvdError, OSError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise Violation(self.report(error)) from error
        return self.result

    def _end(self) -> None:
        """Without sessions nothing is held: no reference was lost or kept by all that happened."""
        engine = self.trial.store
        self.trial.delete_all()
        stats = engine.stats()
        assert stats.chunks == 0, f"{stats.chunks} chunks are held by no session"
        used = self.disk.stored_bytes("segment-")
        assert used <= self.settings.segment_bytes, f"{used} bytes are taken by no session"

    def report(self, error: BaseException) -> str:
        lives = "\n".join(f"  {life}" for life in self.schedule.lives)
        self._note_faults()
        trace = "\n".join(f"  {line}" for line in self.trial.trace)
        return (
            f"seed {self.schedule.name} ({self.schedule.severity}): {error!r}\n"
            f"replay: python -m hga_kvd.testing.replay {self.schedule.name}\n{self.settings.segment_bytes=} "
            f"{self.nvme_max=}\n{lives}\n{trace}"
        )

    def _note_faults(self) -> None:
        struck, self._noted = self.disk.struck[self._noted :], len(self.disk.struck)
        self.trial.trace += [f"struck: {fault.operation} {fault.n} {fault.kind}" for fault in struck]

    def _live(self, life: Life) -> None:
        self.disk.schedule(life.faults)
        self.disk.lose_power_at(life.crash_at)
        try:
            self._begin(self._engine())
            for _ in range(life.steps):
                self.damage.called_at = len(self.disk.struck)
                self.trial.step()
                self._note_faults()
                self.damage.look()
                self._check_space()
            if life.stops:
                self._stop()
        except PowerLoss:
            self.trial.trace.append("power lost")
        except StartRefused as error:
            self.trial.trace.append(f"start refused: {error}")
            if not self.disk.struck[self.damage.started_at :]:
                raise
        self._lose_power(life.remains)
        self._start(life.recovery_crashes)

    def _stop(self) -> None:
        self.trial.trace.append("stop")
        engine = self.trial.store
        assert isinstance(engine, Engine)
        try:
            engine.shutdown()
        except (StorageFull, WriteFailed) as error:
            self.trial.trace[-1] += f" refused: {error!r}"
            if not self.trial.refusals:
                raise
            return
        finally:
            self.trial.note_evicted()
        self.trial.stopped()

    def _lose_power(self, remains: Remains) -> None:
        self._note_faults()
        self._noted = 0
        self.damage.look()
        self.result.crashes += 1
        self.operations.append(self.disk.operations)
        self.result.struck.update(f"{fault.operation} {fault.kind}" for fault in self.disk.struck)
        self.disk = self.disk.crash(remains)
        self.disk.on_rot = self.damage.look
        self.damage.disk, self.damage.started_at, self.damage.called_at = self.disk, 0, 0
        self.damage.look()

    def _start(self, crashes: tuple[tuple[int, Remains], ...]) -> None:
        """Starts until it comes through, losing power on the way as told."""
        for operation, remains in crashes:
            self.disk.lose_power_at(operation)
            try:
                self._engine()
            except PowerLoss:
                self.trial.trace.append(f"power lost in operation {operation} of a start")
            self._lose_power(remains)
        self._begin(self._engine())

    def _engine(self) -> Engine:
        self.damage.started_at = self.damage.called_at = len(self.disk.struck)
        try:
            engine = Engine(self.settings, self.disk, background=False, clock=self.clock)
        except BaseException:
            self.damage.start_failed()
            raise
        self.result.starts += 1
        return engine

    def _begin(self, engine: Engine) -> None:
        self.trial.trace.append("started")
        self.trial.restarted(engine)
        self.damage.start_struck, self.damage.started_at = False, len(self.disk.struck)
        self._check_space()
        taken = self.disk.stored_bytes("segment-")
        if not self.disk.struck:
            used = engine.stats().nvme_bytes_used
            assert used == taken, f"the files take {taken} bytes, the engine knows of {used}"

    def _check_space(self) -> None:
        taken = self.disk.stored_bytes("segment-")
        assert not self.nvme_max or taken <= self.nvme_max, f"segments take {taken} bytes of at most {self.nvme_max}"
        expected, held = self.trial.chunk_count(), self.trial.store.stats().chunks
        assert expected in (None, held), f"the store holds {held} chunks, sessions have {expected}"


@cache
def _settings(segment_bytes: int, nvme_max: int, evicts: bool) -> Settings:
    evict: Literal["none", "lru"] = "lru" if evicts else "none"
    return Settings(ram=2 * MIB, segment_bytes=segment_bytes, nvme_max=nvme_max, nvme_reserve=64 * KIB, evict=evict)


def run(seed: int, severity: Severity | None = None) -> Result:
    """A schedule of faults. Raises: Violation."""
    return Simulation(Schedule.draw(seed, severity)).run()


def crash_at(seed: int, operation: int) -> Result:
    """Power is lost in this disk operation of one fixed life, and once more in the life after it. Raises: Violation."""
    return Simulation(crash_schedule(seed, operation)).run()


def crash_points(seed: int) -> int:
    """How many disk operations that life has."""
    simulation = Simulation(crash_schedule(seed, 0))
    simulation.run()
    return simulation.operations[0]


def crash_schedule(seed: int, operation: int) -> Schedule:
    chance = random.Random(f"crash {seed} {operation}")
    again = Life(6, chance.randint(1, 40), Remains.draw(chance))
    return Schedule(seed, "clean", (Life(36, operation, Remains.draw(chance)), again), f"{seed}:{operation}")
