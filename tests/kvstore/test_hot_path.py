"""The hot path in C does what its twin in Python does, whatever the index, the disk and the request say, and stays inside
the memory that it was given: this file runs once more under the sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import hga_kvd
import numpy as np
import pytest
import xxhash
from hga_kvd import hits, misses, native
from hga_kvd.arena import VALID
from hga_kvd.config import Settings
from hga_kvd.engine import Engine
from hga_kvd.errors import KeyOutOfRange
from hga_kvd.filedisk import FileDisk
from hga_kvd.geometry import KEY_DTYPE, Geometry
from hga_kvd.index import Session
from hga_kvd.io_engine import EngineUnavailable
from hga_kvd.memory import aligned_buffer
from hga_kvd.misses import Misses
from hga_kvd.posix_engine import PosixEngine
from hga_kvd.residency import Pool
from hga_kvd.testing.oracle import random_keys
from hga_kvd.uring import UringEngine
from hypothesis import given
from hypothesis import strategies as st

MIB = 1 << 20
RECORD = 8192
WIDE = Geometry(2, 2, 64, "float32")  # records of 8192 bytes, extents of 64 KiB
SANITIZED = "HGA_KVD_TEST_SANITIZED" in os.environ
seeds = st.integers(0, 1 << 32)

pytestmark = pytest.mark.skipif(native.LIBRARY is None, reason=f"native code is {native.STATE}")


@given(st.integers(241, 20000), st.integers(0, (1 << 64) - 1), st.randoms(use_true_random=False))
def test_the_checksum_is_the_packages(size: int, seed: int, chance: object) -> None:
    data = chance.randbytes(size)  # type: ignore[attr-defined]
    assert native.checksum(np.frombuffer(bytearray(data), np.uint8), seed) == xxhash.xxh3_64_intdigest(data, seed)


# --- what RAM has ---


def in_ram(seed: int, chunks: int = 12) -> tuple[Engine, Session, Pool]:
    """A session whose extents are in RAM or not, with records in all states."""
    chance = np.random.default_rng(seed)
    engine = Engine(Settings(ram=8 * MIB), None, background=False)
    session_id = engine.open("", WIDE, create=True).session_id
    payload = chance.integers(0, 256, chunks * WIDE.chunk_bytes, np.uint8)
    engine.append(session_id, 0, chunks, payload, b"")
    session = engine._residency.sessions[session_id]
    pool = engine._residency.pools[session.pool]
    pool.slots.state[1:] = chance.choice([0, 1, 2, 2, 2, 2, 3], pool.slots.state[1:].shape)
    gone = chance.random(pool.table.slot.shape) < 0.1
    pool.table.slot[gone] = 0
    assert pool.view is not None
    return engine, session, pool


def keys_of(chance: np.random.Generator, chunks: int, count: int) -> np.ndarray:
    """Random ones, named twice too, and runs of neighbours."""
    keys = random_keys(chance, WIDE, chunks, count) if count else np.zeros(0, KEY_DTYPE)
    groups = chunks * WIDE.groups_per_chunk
    runs = np.repeat(keys[: count // 4], 4)
    runs["group"] = np.minimum(runs["group"] + np.tile(np.arange(4, dtype=np.uint32), count // 4), groups - 1)
    return np.concatenate((keys, runs, keys[: count // 3]))


@given(seeds, st.integers(0, 200))
def test_finding_and_copying(seed: int, count: int) -> None:
    _, session, pool = in_ram(seed)
    chance = np.random.default_rng(seed)
    keys = keys_of(chance, 12, count)
    twin = replace(pool, view=None)
    pool.policy.log_worth[1:] = chance.choice([np.inf, -1.0, 0.0, 2.5], pool.slots.slot_count - 1)
    worth = pool.policy.log_worth.copy()
    found, valid = hits.find(session, pool, keys)
    counted, now = pool.policy.log_worth.copy(), pool.policy.now
    pool.policy.log_worth[:], pool.policy.clock[:] = worth, 0.0
    pinned = set(np.flatnonzero(pool.slots.pins).tolist())
    hits.unpin(pool, found)
    assert not pool.slots.pins.any()
    expected, expected_valid = hits.find(session, twin, keys)
    assert set(np.flatnonzero(pool.slots.pins).tolist()) == pinned
    hits.unpin(twin, expected)
    assert counted == pytest.approx(pool.policy.log_worth, rel=1e-12)
    assert now == pytest.approx(pool.policy.now, rel=1e-12)
    assert valid == expected_valid == np.count_nonzero(found["state"] == VALID)
    named = found["slot"] != 0
    assert (found["start"][named] == expected["start"][named]).all()
    for name in ("row", "layer", "record", "slot", "state"):
        assert (found[name] == expected[name]).all()
    ours, theirs = (chance.integers(0, 256, len(keys) * RECORD, np.uint8) for _ in range(2))
    theirs[:] = ours
    hits.copy(pool, found, ours)
    hits.copy(twin, expected, theirs)
    assert (ours == theirs).all()  # also where nothing was to be copied


@given(seeds, st.integers(0, 40), st.booleans())
def test_a_few_in_one_call(seed: int, count: int, whole: bool) -> None:
    engine, session, pool = in_ram(seed)
    if whole:
        pool.slots.state[1:] = VALID
    keys = keys_of(np.random.default_rng(seed), 12, count)
    ours, theirs = np.zeros(len(keys) * RECORD, np.uint8), np.zeros(len(keys) * RECORD, np.uint8)
    worth, now = pool.policy.log_worth.copy(), pool.policy.now
    done = hits.fetch_few(engine._parts, session.session_id, keys.tobytes(), ours.data, 0, 1.0)
    found = pool.policy.log_worth.copy(), pool.policy.now
    pool.policy.log_worth[:], pool.policy.clock[:] = worth, now
    engine._residency.pools[session.pool] = replace(pool, view=None)
    assert done == hits.fetch_few(engine._parts, session.session_id, keys.tobytes(), theirs.data, 0, 1.0)
    assert (ours == theirs).all()
    if done or not len(keys):
        assert found[1] == pytest.approx(pool.policy.now)
        assert found[0] == pytest.approx(pool.policy.log_worth)


@given(seeds, st.sampled_from(["group", "kv_head", "layer"]), st.integers(0, 49))
def test_a_key_that_does_not_exist_is_named(seed: int, what: str, bad: int) -> None:
    _, session, pool = in_ram(seed)
    keys = random_keys(np.random.default_rng(seed), WIDE, 12, 50)
    keys[what][bad] = {"group": 12 * WIDE.groups_per_chunk, "kv_head": WIDE.kv_heads, "layer": WIDE.layers}[what]
    with pytest.raises(KeyOutOfRange, match=f"^key {bad} "):
        hits.find(session, pool, keys)
    assert not pool.slots.pins.any()


@given(seeds, st.sampled_from([-1, 1 << 20, -(1 << 62), (1 << 62)]), st.sampled_from(["slot", "row"]))
def test_an_index_that_cannot_be_is_an_error_and_no_crash(seed: int, wrong: int, what: str) -> None:
    engine, session, pool = in_ram(seed)
    keys = random_keys(np.random.default_rng(seed), WIDE, 12, 20)
    if what == "slot":
        pool.table.slot[:] = wrong
    else:
        session.rows = np.full_like(session.rows, wrong)
    with pytest.raises(AssertionError, match="cannot be"):
        hits.find(session, pool, keys)
    assert not pool.slots.pins.any()
    into = np.zeros(20 * RECORD, np.uint8)
    assert not hits.fetch_few(engine._parts, session.session_id, keys.tobytes(), into.data, 0, 1.0)
    assert not into.any()


@given(seeds, st.sampled_from([-1, 8 * MIB - RECORD + 1, 1 << 40, -(1 << 62), (1 << 62)]))
def test_a_place_outside_the_arena_is_an_error(seed: int, wrong: int) -> None:
    _, session, pool = in_ram(seed)
    found, _ = hits.find(session, pool, random_keys(np.random.default_rng(seed), WIDE, 12, 20))
    found["state"], found["start"][seed % 20] = VALID, wrong
    with pytest.raises(AssertionError, match="outside"):
        hits.copy(pool, found, np.zeros(20 * RECORD, np.uint8))
    with pytest.raises(AssertionError, match="outside"):
        hits.copy(pool, found[:0].copy() if len(found) < 20 else found, np.zeros(19 * RECORD, np.uint8))


# --- what is on disk ---


@given(seeds, st.integers(0, 150), st.sampled_from([0, 2, 1]))
def test_planning_claiming_and_settling(seed: int, count: int, room_share: int) -> None:
    """Two equal stores, one planned in C and one in numpy: the same order, the same slots, the same states and pins."""
    results, policies = [], []
    for which in ("native", "twin"):
        engine, session, pool = in_ram(seed)
        chance, table, residency = np.random.default_rng(seed), pool.table, engine._residency
        table.segment[:] = chance.integers(0, 4, len(table.segment))
        table.offset[:] = chance.integers(0, 1 << 30, len(table.offset)) * 512
        pool.policy.log_worth[1:] = chance.choice([np.inf, -1.0, 0.0, 2.5], pool.slots.slot_count - 1)
        known = np.arange(12 * WIDE.layers) // WIDE.layers << 10 | np.arange(12 * WIDE.layers) % WIDE.layers
        pool.policy.past.remember(known[::2], chance.random(len(known[::2])))
        if which == "twin":
            pool = replace(pool, view=None)
        residency.make_room = lambda pool, wanted: wanted * room_share // 2  # type: ignore[method-assign]
        keys = keys_of(chance, 12, count)
        found, valid = hits.find(session, pool, keys)
        made = native.plan(pool.view, found, len(keys) - valid) if pool.view is not None else misses._plan(pool, found)
        planned = made.keys, made.records, made.slots.copy(), made.offsets, made.seeds, made.expected
        lists = made.copies_to, made.copies_of, made.awaited, made.lost, made.absent_rows, made.absent_layers
        fresh = residency.claim(pool, made)
        claimed = fresh, made.slots, made.starts, made.segment_ids[made.segments], pool.slots.state.copy()
        where = table.slot.copy(), pool.slots.holder.copy(), pool.policy.key.copy()
        policies.append((pool.policy.log_worth.copy(), pool.policy.now))
        pinned = np.flatnonzero(pool.slots.pins[1:])
        pool.slots.doomed[fresh[::3]] = True
        with residency.lock:
            residency.end_reads(pool, made, chance.random(len(made.keys)) < 0.7, fresh)
        hits.unpin(pool, found)
        assert not pool.slots.pins.any()
        results.append((*planned, *lists, *claimed, *where, pinned, pool.slots.state.copy()))
    for ours, theirs in zip(*results, strict=True):
        assert np.array_equal(ours, theirs)
    (worth, now), (twins_worth, twins_now) = policies
    assert np.allclose(worth, twins_worth, rtol=1e-12, atol=1e-12)
    assert now == pytest.approx(twins_now, rel=1e-12)


@given(seeds, st.integers(1, 80), st.booleans())
def test_evicting(seed: int, count: int, alone: bool) -> None:
    """The same victims in C and in numpy, and the same index, states and books after it; also of two geometries."""
    results = []
    for which in ("native", "twin"):
        engine, _, pool = in_ram(seed)
        chance, residency = np.random.default_rng(seed), engine._residency
        slots, policy = pool.slots, pool.policy
        if not alone:
            other = residency.pool_for(replace(WIDE, model_fingerprint="another"))
            assert other.slots is slots
            other.table.add(30)
            slots.holder[np.flatnonzero(slots.held)[::5], 0] = other.number
        held = np.flatnonzero(slots.held)
        policy.admit(held, chance.permutation(1000)[: len(held)])
        policy.log_worth[held] = chance.permutation(len(held))
        slots.dirty[held] = False
        slots.pins[held] = chance.random(len(held)) < 0.2
        if which == "twin":
            pool = replace(pool, view=None)
        residency.arena.grow = lambda slots, count: None  # type: ignore[method-assign]
        before, evictable = slots.free_count, int(np.count_nonzero(slots.pins[held] == 0))
        slots._free.clear()
        slots.held_count += before  # so that nothing is free
        found = residency.make_room(pool, count)
        assert found == min(count, slots.free_count)
        tables = [pool.table.slot.copy() for pool in residency.pools]
        past = policy.past.key.copy(), policy.past.log_worth.copy()
        books = slots.held.copy(), slots.state.copy(), np.array(slots._free), policy.log_worth.copy()
        counts = np.array([found, slots.held_count, residency.evicted_extents])
        results.append((*tables, *past, *books, counts))
        assert found == min(count, evictable)
    for ours, theirs in zip(*results, strict=True):
        assert np.array_equal(ours, theirs)


@given(seeds, st.sampled_from([-1, 0, 1 << 20, -(1 << 62), 1 << 62]), st.integers(0, 2))
def test_emptying_what_cannot_be_is_an_error(seed: int, wrong: int, what: int) -> None:
    _, _, pool = in_ram(seed, 2)
    held = np.flatnonzero(pool.slots.held)
    assert pool.view is not None
    before = pool.table.slot.copy()
    if what == 0 or wrong == 0:
        held[3] = wrong
    else:
        pool.slots.holder[held[3], what] = wrong
    with pytest.raises(AssertionError, match="cannot be"):
        native.empty(pool.view, held)
    assert np.array_equal(pool.table.slot, before)


@given(seeds, st.sampled_from(["row", "layer", "record", "slot"]), st.sampled_from([-1, 1 << 20, -(1 << 62), 1 << 62]))
def test_a_plan_of_what_cannot_be_is_an_error(seed: int, what: str, wrong: int) -> None:
    _, session, pool = in_ram(seed)
    found, valid = hits.find(session, pool, random_keys(np.random.default_rng(seed), WIDE, 12, 50))
    bad = int(np.flatnonzero(found["state"] != VALID)[0])
    assert pool.view is not None
    with pytest.raises(AssertionError, match="cannot be"):
        native.plan(pool.view, found, 50 - valid - 1)
    made = native.plan(pool.view, found, 50 - valid)
    if len(made.absent_rows):
        with pytest.raises(AssertionError, match="cannot be"):
            native.claim(pool.view, made, np.array([wrong]))
    found[what][bad] = wrong
    with pytest.raises(AssertionError, match="cannot be"):
        native.plan(pool.view, found, 50 - valid)


FILE_RECORDS = 64


@dataclass(frozen=True)
class Files:
    disk: FileDisk
    posix: FileDisk
    handles: tuple[int, ...]  # of the file on either disk, and one that is closed
    content: np.ndarray


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Files]:
    directory = tmp_path_factory.mktemp("files")
    content = np.random.default_rng(0).integers(0, 256, (FILE_RECORDS, RECORD), np.uint8)
    (directory / "data").write_bytes(content.tobytes())
    try:
        disk = FileDisk(directory, UringEngine(8), 512)
    except EngineUnavailable as error:
        pytest.skip(str(error))
    posix = FileDisk(directory, PosixEngine(8), 512)
    handles = disk.open("data"), disk.open("data")
    assert (posix.open("data"), posix.open("data")) == handles
    for each in (disk, posix):
        each.close(handles[1])
    yield Files(disk, posix, handles, content)
    disk.shutdown()
    posix.shutdown()


def misses_of(
    handles: np.ndarray, starts: np.ndarray, keys: np.ndarray, offsets: np.ndarray, *sums: np.ndarray
) -> Misses:
    """Records to read, as if they were planned and claimed."""
    count = len(handles)
    made = native.Plan(count).laid_out(count)
    made.segments[:] = np.arange(count)
    made.starts[:], made.keys[:], made.offsets[:] = starts, keys, offsets
    made.seeds[:], made.expected[:] = sums
    return Misses(made, RECORD, handles, (), np.zeros(0, np.int64))


@given(seeds, st.integers(1, 150))
def test_reading_verifying_and_copying(files: Files, seed: int, count: int) -> None:
    """Runs and single ones, into slots and past them; damaged, past the end of the file, of a file that is closed."""
    chance = np.random.default_rng(seed)
    engine, session, pool = in_ram(seed, 2)
    residency = engine._residency
    hit_count = int(chance.integers(0, 20))
    positions = hit_count + chance.permutation(count)
    record = (
        np.sort(chance.integers(0, FILE_RECORDS + 2, count)) if seed % 2 else chance.integers(0, FILE_RECORDS, count)
    )
    there = np.minimum(record, FILE_RECORDS - 1)
    sums = chance.integers(0, 1 << 62, count, np.int64).view(np.uint64)
    expected = np.array(
        [
            xxhash.xxh3_64_intdigest(files.content[at].tobytes(), seed)
            for at, seed in zip(there, sums.tolist(), strict=True)
        ],
        np.uint64,
    )
    damaged = chance.random(count) < 0.1
    expected[damaged] ^= np.uint64(1)
    handles = np.where(chance.random(count) < 0.05, files.handles[1], files.handles[0])
    first = len(residency.arena.region) // 2  # behind what the session has
    starts = np.where(chance.random(count) < 0.7, first + RECORD * chance.permutation(count), -1)
    part = slice(0, count)
    found, _ = hits.find(session, pool, random_keys(chance, WIDE, 2, hit_count))
    found = np.concatenate((found, np.zeros(count, native.FOUND)))
    results = []
    for disk, view in ((files.disk, pool.view), (files.posix, pool.view), (files.posix, None)):
        residency.arena.region[first:] = 0
        into = aligned_buffer((hit_count + count) * RECORD)
        wanted = misses_of(handles, starts, positions, record * RECORD, sums, expected)
        wrong = misses._bring(disk, residency, replace(pool, view=view), found, wanted, part, into)
        rows = into.reshape(-1, RECORD)
        good = positions[~wrong]
        assert (rows[good] == files.content[there[~wrong]]).all()
        assert (rows[positions[wrong & (starts >= 0)]] == 0).all()  # nothing wrong leaves a slot
        results.append((wrong, rows[:hit_count], rows[good]))
    assert results[0][0][damaged | (record >= FILE_RECORDS) | (handles == files.handles[1])].all()
    # A run that reaches past the end, or meets a closed file, fails as a whole; what each way calls wrong is read again.
    for other in results[1:]:
        assert (other[0] == results[0][0]).all()
        assert all((a == b).all() for a, b in zip(results[0][1:], other[1:], strict=True))


@given(seeds, st.sampled_from([-2, 1 << 40, 8 * MIB - RECORD + 512, 1 << 62]), st.sampled_from(["start", "position"]))
def test_an_item_outside_its_memory_is_an_error(files: Files, seed: int, wrong: int, what: str) -> None:
    engine, session, pool = in_ram(seed, 2)
    starts, positions = np.full(4, -1), np.arange(4)
    (starts if what == "start" and wrong > 0 else positions)[seed % 4] = wrong
    handles, sums = np.full(4, files.handles[0]), np.zeros((2, 4), np.uint64)
    wanted = misses_of(handles, starts, positions, np.arange(4) * RECORD, *sums)
    found, _ = hits.find(session, pool, np.zeros(0, KEY_DTYPE))
    with pytest.raises(AssertionError, match="outside"):
        misses._bring(files.disk, engine._residency, pool, found, wanted, slice(0, 4), aligned_buffer(4 * RECORD))


def test_a_ring_that_is_refused_fails_its_reads_and_not_the_engine(files: Files) -> None:
    engine, session, pool = in_ram(1, 2)
    found, _ = hits.find(session, pool, np.zeros(0, KEY_DTYPE))
    sums = np.array([xxhash.xxh3_64_intdigest(files.content[at].tobytes(), 0) for at in range(4)], np.uint64)
    columns = np.full(4, files.handles[0]), np.full(4, -1), np.arange(4), np.arange(4) * RECORD

    def wrong() -> list[bool]:
        into, wanted = aligned_buffer(4 * RECORD), misses_of(*columns, np.zeros(4, np.uint64), sums)
        wrong: list[bool] = misses._bring(
            files.disk, engine._residency, pool, found, wanted, slice(0, 4), into
        ).tolist()
        return wrong

    ring = files.disk._io._ring()  # type: ignore[attr-defined]
    ring.view.fd = -1
    assert wrong() == [True] * 4
    assert wrong() == [False] * 4


# --- what an append writes ---


@pytest.mark.parametrize("seed", range(4))
def test_extents_are_put_with_their_checksums(seed: int) -> None:
    geometry = Geometry(2, 2, 32, "float32", chunk_tokens=48)  # extents that do not fill their slots
    stored = []
    for in_c in (True, False):
        engine = Engine(Settings(ram=8 * MIB), None, background=False)
        session_id = engine.open("", geometry, create=True).session_id
        (pool,) = pools = engine._residency.pools
        pool.slots.units[:] = 255
        if not in_c:
            pools[0] = replace(pool, view=None)
        for first, count in ((0, 3), (3, 2)):
            data = np.random.default_rng(seed + first).integers(0, 256, count * geometry.chunk_bytes, np.uint8)
            engine.append(session_id, first, count, data, b"")
        rows = engine._residency.sessions[session_id].all_rows()
        slots = pool.table.slot[rows].reshape(-1)
        lines = [
            pool.slots.units.reshape(-1)[at : at + pool.slots.stride].tobytes() for at in pool.slots.offsets(slots)
        ]
        stored.append((lines, pool.table.checksums[rows].tolist()))
    assert stored[0] == stored[1]


@pytest.mark.parametrize("bad", [-1, 0, 1 << 10, 1 << 60])
def test_a_slot_that_cannot_be_is_not_written(bad: int) -> None:
    engine, _, pool = in_ram(0)
    assert pool.view is not None
    before = engine._residency.arena.region.copy()
    extents, none = np.ones((1, WIDE.extent_bytes), np.uint8), np.zeros((1, pool.slots.records), np.uint64)
    with pytest.raises(AssertionError, match="outside the arena"):
        native.put_extents(pool.view, np.array([bad]), extents, none)
    assert np.array_equal(engine._residency.arena.region, before)


# --- once more, watched ---


@pytest.mark.skipif(SANITIZED, reason="this is that run")
def test_under_the_sanitizers(tmp_path: Path) -> None:
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no gcc")
    copy = shutil.copytree(
        Path(str(hga_kvd.__file__)).parent, tmp_path / "hga_kvd", ignore=shutil.ignore_patterns("__pycache__")
    )
    flags = ["-std=gnu11", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-shared", "-fPIC"]
    build = [compiler, *flags, "-o", str(copy / "_native.abi3.so"), *map(str, copy.glob("csrc/*.c")), "-lm"]
    built = subprocess.run(build, capture_output=True, text=True, check=False)
    library = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    if built.returncode or not Path(library.stdout.strip()).is_absolute():
        pytest.skip(f"gcc has no sanitizers here: {built.stderr[-200:]}")
    # fmt: off
    environment = {
        **os.environ, "LD_PRELOAD": library.stdout.strip(), "HGA_KVD_TEST_SANITIZED": "1", "PYTHONMALLOC": "malloc",
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1", "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
    }
    # fmt: on
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:randomly", __file__]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    assert " passed" in ran.stdout
    assert "native code is" not in ran.stdout
