"""Starting again: torn ends, damage, leftovers, refusals, poisoned segments. On the simulated disk."""

from __future__ import annotations

import errno
import struct
from dataclasses import replace

import numpy as np
import pytest
from hga_kvd.checksum import checksum
from hga_kvd.config import Settings
from hga_kvd.engine import Engine
from hga_kvd.errors import StartRefused, StorageFull, WriteFailed
from hga_kvd.format import encode_segment_header
from hga_kvd.geometry import KEY_DTYPE, Geometry
from hga_kvd.manifest import decode_manifest, encode_manifest
from hga_kvd.recovery import Unread, walk_all
from hga_kvd.testing.oracle import records_of
from hga_kvd.testing.simdisk import SimDisk

MIB = 1 << 20
WIDE = Geometry(2, 2, 64, "float32")  # chunks of 128 KiB
FRAME = 4096 + WIDE.chunk_bytes  # of one chunk
SEGMENT = "segment-00000001.kvs"
CHUNKS = np.random.default_rng(3).integers(0, 256, (60, WIDE.chunk_bytes), dtype=np.uint8)


def make(disk: SimDisk, **options: object) -> Engine:
    return Engine(Settings(**{"ram": 8 * MIB, "segment_bytes": 2 * MIB, **options}), disk, background=False)


def filled(disk: SimDisk, chunk_count: int, name: str = "a") -> Engine:
    """One flush, one frame, a chunk."""
    engine = make(disk)
    session = engine.open(name, WIDE, create=True)
    for i in range(session.chunk_count, session.chunk_count + chunk_count):
        engine.append(session.session_id, i, 1, CHUNKS[i], b"")
        engine.flush(session.session_id)
    return engine


def check(engine: Engine, chunk_count: int, damaged: tuple[int, ...] = (), name: str = "a") -> None:
    """Every record of every chunk: exact, or damaged where expected."""
    info = engine.open(name, None, create=False)
    assert info.chunk_count == chunk_count
    groups, heads, layers = np.meshgrid(np.arange(4 * chunk_count), np.arange(2), np.arange(2), indexing="ij")
    keys = np.zeros(groups.size, KEY_DTYPE)
    keys["group"], keys["kv_head"], keys["layer"] = groups.ravel(), heads.ravel(), layers.ravel()
    found = np.zeros((len(keys), WIDE.record_bytes), np.uint8)
    fetched = engine.fetch(info.session_id, keys, found.reshape(-1))
    bad = np.isin(keys["group"] // 4, damaged)
    statuses = np.zeros(len(keys)) if fetched.statuses is None else fetched.statuses
    assert (statuses == bad).all()
    assert (found == records_of(WIDE, CHUNKS[:chunk_count], keys))[~bad].all()


def test_a_new_store_and_a_clean_stop() -> None:
    disk = SimDisk()
    engine = filled(disk, 3)
    assert not decode_manifest(disk.get("MANIFEST")).clean
    engine.append(1, 3, 1, CHUNKS[3], b"")  # not flushed: the stop does it
    engine.shutdown()
    assert decode_manifest(disk.get("MANIFEST")).clean
    again = make(disk)
    check(again, 4)
    assert again.info(1).durable_chunk_count == 4
    again.append(1, 4, 1, CHUNKS[4], b"")
    again.flush(1)
    assert disk.names() == ["MANIFEST", "MANIFEST.copy", SEGMENT]  # the open segment is used further
    check(make(disk.crash()), 5)


def test_session_ids_are_never_used_twice() -> None:
    disk = SimDisk()
    engine = make(disk)
    seen = set()
    for _ in range(4):
        for name in ("", "x"):
            session = engine.open(name, WIDE, create=True)
            assert session.session_id not in seen
            seen.add(session.session_id)
        engine.delete(session.session_id)
        disk = disk.crash()
        engine = make(disk)


def test_what_was_not_flushed_may_be_missing() -> None:
    disk = SimDisk()
    engine = filled(disk, 3)
    engine.append(1, 3, 1, CHUNKS[3], b"")
    check(make(disk.crash()), 3)


@pytest.mark.parametrize("seed", range(8))
def test_a_torn_end_is_cut_and_written_over(seed: int) -> None:
    disk = SimDisk()
    engine = filled(disk, 2)
    for i in range(2, 6):
        engine.append(1, i, 1, CHUNKS[i], b"")
    disk.fail("sync", 1)
    disk.fail("create", 1)
    with pytest.raises(WriteFailed):
        engine.flush(1)
    check(engine, 6)  # still served from RAM
    disk = disk.crash(seed)
    again = make(disk)
    count = again.info(1).chunk_count
    assert 2 <= count <= 6
    check(again, count)
    # Other content for the chunks that were cut: none of the old may come back.
    CHUNKS[30:36] = np.random.default_rng(seed).integers(0, 256, (6, WIDE.chunk_bytes), dtype=np.uint8)
    kept = CHUNKS[:10].copy()
    try:
        for i in range(count, count + 2):
            CHUNKS[i] = CHUNKS[30 + i - count]
            again.append(1, i, 1, CHUNKS[i], b"")
            again.flush(1)
        check(again, count + 2)
        check(make(disk.crash()), count + 2)
    finally:
        CHUNKS[:10] = kept


def test_a_frame_behind_a_torn_one_is_never_found_again() -> None:
    disk = SimDisk()
    engine = filled(disk, 1)
    engine.append(1, 1, 1, CHUNKS[1], b"")
    engine.flush(1)
    engine.append(1, 2, 1, CHUNKS[2], b"")
    engine.flush(1)
    # As if the last two had been one unsynced write of which the second half survived: nothing vouches for them.
    for offset, sequence in ((4096 + FRAME, 1), (4096 + 2 * FRAME, 2)):
        head = bytearray(disk.get(SEGMENT)[offset : offset + 4096])
        assert struct.unpack_from("<Q", head, 24)[0] == sequence
        head[32:40] = struct.pack("<Q", 4096 + FRAME)
        table = struct.unpack_from("<I", head, 60)[0]
        head[88:96] = struct.pack("<Q", checksum(bytes(head[:88] + head[96 : 96 + table])))
        content = bytearray(disk.get(SEGMENT))
        content[offset : offset + 4096] = head
        disk.put(SEGMENT, bytes(content))
    disk.flip(SEGMENT, 4096 + FRAME + 4096 + 5)
    disk = disk.kill()
    check(make(disk), 1)
    assert not any(disk.get(SEGMENT)[4096 + 2 * FRAME :][:4096])
    check(make(disk.kill()), 1)


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("at", [0, 30, 92, 100])
def test_a_damaged_frame_in_the_middle(clean: bool, at: int) -> None:
    disk = SimDisk()
    engine = filled(disk, 5)
    if clean:
        engine.shutdown()
    disk.flip(SEGMENT, 4096 + 2 * FRAME + at)
    disk = disk.crash()
    again = make(disk)
    check(again, 5, damaged=(2,))
    assert again.info(1).damaged_records == 16
    assert again.stats().damaged_records == 16
    again.append(1, 5, 1, CHUNKS[5], b"")
    again.flush(1)
    check(make(disk.crash()), 6, damaged=(2,))


def test_a_damaged_last_frame_is_known_after_a_clean_stop() -> None:
    disk = SimDisk()
    filled(disk, 3).shutdown()
    disk.flip(SEGMENT, 4096 + 2 * FRAME)
    again = make(disk.crash())
    check(again, 3, damaged=(2,))


def test_a_flipped_bit_in_a_body_is_one_damaged_record() -> None:
    disk = SimDisk()
    filled(disk, 3).shutdown()
    disk.flip(SEGMENT, 4096 + FRAME + 4096 + 65536 + 9 * 8192 - 8192 * 4 + 17, bit=3)  # chunk 1, layer 1, record 5
    engine = make(disk)
    keys = np.array([(4, 0, 1), (5, 1, 1), (5, 1, 1), (6, 1, 1), (7, 0, 0)], KEY_DTYPE)
    for _ in range(2):
        found = np.zeros((5, 8192), np.uint8)
        fetched = engine.fetch(1, keys, found.reshape(-1))
        assert fetched.statuses is not None
        assert fetched.statuses.tolist() == [0, 1, 1, 0, 0]
        assert (found == records_of(WIDE, CHUNKS[:3], keys))[[0, 3, 4]].all()
    assert engine.stats().damaged_records == engine.info(1).damaged_records == 1
    assert fetched.ram_records == 3


def test_segments_are_walked_together_as_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In no more submissions than the longest of them needs."""
    disk = SimDisk()
    engine = filled(disk, 60)
    names = [name for name in disk.names() if name.startswith("segment-")]
    manifest = decode_manifest(disk.get("MANIFEST"))
    engine.shutdown()
    disk = disk.kill()
    disk.flip(names[1], 4096 + FRAME + 100)  # the table of its second frame
    disk.flip(names[2], 8)  # its header
    disk.spoil(names[3], 8)  # the head of its first frame
    unread = [
        Unread(disk.open(name), entry.segment_id, entry.used_bytes, entry.state == "open")
        for name, entry in zip(names, manifest.segments, strict=True)
    ]
    submissions: list[int] = []
    read = disk.read
    monkeypatch.setattr(disk, "read", lambda *columns: (submissions.append(len(columns[0])), read(*columns))[1])
    alone, needed = [], []
    for segment in unread:
        submissions.clear()
        alone += walk_all(disk, [segment])
        needed.append(len(submissions))
    submissions.clear()
    together = walk_all(disk, unread)
    assert submissions[0] == 4
    assert len(submissions) == max(needed) < sum(needed)
    assert together[2] is alone[2] is None
    for one, other in zip(together, alone, strict=True):
        if one and other:
            assert [frame.header for frame in one.frames] == [frame.header for frame in other.frames]
            assert replace(one, frames=[]) == replace(other, frames=[])
    assert [bool(walk and walk.damage) for walk in together] == [False, True, False, True]


def test_a_passing_read_error_is_tried_again() -> None:
    disk = SimDisk()
    filled(disk, 3).shutdown()
    engine = make(disk)
    disk.fail("read", 1)
    disk.fail("read", 2)
    check(engine, 3)
    assert engine.stats().damaged_records == 0


def test_a_damaged_summary_is_said_to_be_damaged() -> None:
    disk = SimDisk()
    engine = filled(disk, 1)
    engine.put_summaries(1, "k", 0, 1, b"x" * 100)
    engine.shutdown()
    disk.flip(SEGMENT, 4096 + FRAME + 4096 + 99)
    with pytest.raises(Exception, match="damaged: compute it again"):
        make(disk).get_summaries(1, "k", 0, 1, 100)


@pytest.mark.parametrize("blocks", [(0,), (1,), (0, 1)])
def test_a_link_is_lost_with_both_of_its_copies(blocks: tuple[int, ...]) -> None:
    disk = SimDisk()
    engine = filled(disk, 3)
    fork = engine.fork(1, 0, 2, "fork").session_id
    engine.flush(fork)
    engine.append(fork, 2, 1, CHUNKS[2], b"")
    engine.shutdown()
    disk = disk.kill()
    content = disk.get(SEGMENT)
    at = 4096 + 3 * FRAME  # behind the chunks
    assert content[at : at + 6] == content[at + 4096 : at + 4102] == b"KVFR\3\0"
    for block in blocks:
        disk.flip(SEGMENT, at + 4096 * block + 100)  # in its table
    engine = make(disk)
    check(engine, 3, (0, 1) if len(blocks) == 2 else (), name="fork")
    check(engine, 3)
    engine.delete(fork)  # the copies are counted as what they are
    engine.delete(1)
    assert engine.stats().nvme_bytes_used <= 2 * MIB
    assert engine.stats().chunks == 0


def test_a_lost_segment_is_damage_not_silence() -> None:
    disk = SimDisk()
    engine = filled(disk, 35)  # three segments
    engine.shutdown()
    names = [name for name in disk.names() if name.startswith("segment")]
    assert len(names) == 3
    disk.remove(names[1])
    disk.sync_names()
    again = make(disk.crash())
    assert again.info(1).chunk_count == 35
    lost = again.info(1).damaged_records // 16
    assert lost == 15
    check(again, 35, damaged=tuple(range(15, 30)))


def test_a_segment_with_a_bad_header_is_kept() -> None:
    disk = SimDisk()
    filled(disk, 3).shutdown()
    disk.flip(SEGMENT, 20)
    engine = make(disk)
    check(engine, 3, damaged=(0, 1, 2))
    engine.append(1, 3, 1, CHUNKS[3], b"")
    engine.flush(1)
    engine.shutdown()
    assert SEGMENT in disk.names()
    check(make(disk), 4, damaged=(0, 1, 2))


# --- refusals and leftovers ---


def test_refused_directories_are_left_as_they_are() -> None:
    disk = SimDisk()
    filled(disk, 1).shutdown()
    good = disk.get("MANIFEST")
    newer = good[:8] + struct.pack("<I", 2) + good[12:]
    for content, sentence in ((newer, "newer hga-kvd"), (good[:-1], "cannot be read"), (b"", "cannot be read")):
        disk.put("MANIFEST", content)
        before = {name: disk.get(name) for name in disk.names()}
        with pytest.raises(StartRefused, match=sentence):
            make(disk)
        assert {name: disk.get(name) for name in disk.names()} == before
    disk.remove("MANIFEST")
    with pytest.raises(StartRefused, match="no MANIFEST"):
        make(disk)
    assert SEGMENT in disk.names()


def test_a_device_that_cannot_be_written_is_refused() -> None:
    disk = SimDisk()
    disk.fail("replace", 1)
    with pytest.raises(StartRefused, match="check the device"):
        make(disk)


def test_leftovers() -> None:
    disk = SimDisk()
    filled(disk, 1).shutdown()
    disk.put("segment-00000002.kvs", encode_segment_header(2, MIB).ljust(MIB, b"\0"))  # named nowhere: ours
    disk.put("segment-00000003.kvs", bytes(MIB))  # never written
    disk.put("segment-00000004.kvs", encode_segment_header(9, MIB))  # another segment's header
    disk.put("segment-00000005.kvs", b"my thesis" * 1000)
    disk.put("segment-00000006.kvs", b"")
    disk.put("notes.txt", b"segment")
    disk.put("segment-7.kvs", bytes(MIB))
    engine = make(disk)
    left = ["segment-00000004.kvs", "segment-00000005.kvs", "segment-00000006.kvs", "segment-7.kvs"]
    assert disk.names() == ["MANIFEST", "MANIFEST.copy", "notes.txt", SEGMENT, *left]
    for i in range(1, 40):
        engine.append(1, i, 1, CHUNKS[i], b"")
    engine.flush(1)  # new segments do not collide with any of them
    check(make(disk.crash()), 40)


# --- a device that fails while it runs ---


@pytest.mark.parametrize("operation", ["write", "sync"])
def test_a_failed_write_poisons_its_segment_and_is_tried_again(operation: str) -> None:
    disk = SimDisk()
    engine = filled(disk, 3)
    engine.append(1, 3, 1, CHUNKS[3], b"")
    disk.fail(operation, 1)
    assert engine.flush(1) == 4
    segments = decode_manifest(disk.get("MANIFEST")).segments
    assert [(s.segment_id, s.state) for s in segments] == [(1, "poisoned"), (2, "open")]
    assert segments[0].used_bytes == 4096 + 3 * FRAME
    check(make(disk.crash()), 4)


def test_a_chunk_in_two_segments_counts_where_it_is_newer() -> None:
    disk = SimDisk()
    engine = filled(disk, 3)
    engine.append(1, 3, 1, CHUNKS[3], b"")
    disk.fail("sync", 1)
    engine.flush(1)
    engine.shutdown()
    # As if the manifest had not learned that the sync of the first segment failed.
    manifest = decode_manifest(disk.get("MANIFEST"))
    first = replace(manifest.segments[0], used_bytes=4096 + 4 * FRAME)
    disk.put("MANIFEST", encode_manifest(replace(manifest, segments=(first, *manifest.segments[1:]))))
    engine = make(disk)
    check(engine, 4)
    assert engine._writeout is not None
    assert [segment.live for segment in engine._writeout.segments.segments.values()] == [3, 1]


def test_failing_twice_is_said_and_the_data_stays() -> None:
    disk = SimDisk()
    engine = filled(disk, 2)
    engine.append(1, 2, 1, CHUNKS[2], b"")
    disk.fail("write", 1)
    disk.fail("write", 4)  # the second segment's data: after two columns of the first try and its header
    with pytest.raises(WriteFailed, match="not durable"):
        engine.flush(1)
    assert engine.info(1).durable_chunk_count == 2
    check(engine, 3)
    assert engine.flush(1) == 3
    check(make(disk.crash()), 3)


def test_a_full_disk_refuses_appends_and_keeps_reading() -> None:
    disk = SimDisk()
    engine = make(disk, ram=2 * MIB, nvme_max=4 * MIB)
    session = engine.open("a", WIDE, create=True).session_id
    count = 0
    with pytest.raises(StorageFull, match="NVMe is full"):  # noqa: PT012
        while True:
            engine.append(session, count, 1, CHUNKS[count], b"")
            count += 1
    assert 40 <= count < 50  # 30 on disk, the rest in RAM
    assert engine.stats().nvme_bytes_used <= 4 * MIB
    check(engine, count)
    with pytest.raises(StorageFull):
        engine.flush(session)
    other = engine.open("b", WIDE, create=True).session_id
    with pytest.raises(StorageFull):
        engine.append(other, 0, 16, CHUNKS[:16].reshape(-1), b"")
    engine.delete(session)
    engine.append(other, 0, 16, CHUNKS[:16].reshape(-1), b"")
    engine.flush(other)
    check(engine, 16, name="b")
    check(make(disk.crash()), 16, name="b")


def test_a_file_system_without_space() -> None:
    disk = SimDisk(3 * MIB)
    engine = make(disk, nvme_reserve=0)
    session = engine.open("a", WIDE, create=True).session_id
    for i in range(30):
        engine.append(session, i, 1, CHUNKS[i], b"")
    with pytest.raises(StorageFull):
        engine.flush(session)
    check(engine, 30)
    disk.bytes_max = 30 * MIB
    assert engine.flush(session) == 30


def test_space_of_deleted_sessions_is_used_again() -> None:
    disk = SimDisk()
    engine = make(disk, ram=2 * MIB, nvme_max=8 * MIB)
    for life in range(12):
        session = engine.open(f"s{life}", WIDE, create=True).session_id
        for i in range(30):
            engine.append(session, i, 1, CHUNKS[i], b"")
        engine.flush(session)
        check(engine, 30, name=f"s{life}")
        engine.delete(session)
    assert engine.stats().nvme_bytes_used == 0
    assert disk.names() == ["MANIFEST", "MANIFEST.copy"]
    assert disk.crash().names() == ["MANIFEST", "MANIFEST.copy"]


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_a_manifest_that_cannot_be_written(error: int) -> None:
    disk = SimDisk()
    engine = make(disk)
    session = engine.open("a", WIDE, create=True).session_id
    engine.append(session, 0, 1, CHUNKS[0], b"")
    disk.fail("replace", 1, error)
    disk.fail("replace", 2, error)
    with pytest.raises((WriteFailed, StorageFull)):
        engine.flush(session)
    assert engine.info(session).durable_chunk_count == 0
    assert engine.flush(session) == 1
    check(make(disk.crash()), 1)
    disk.fail("replace", 1, error)
    with pytest.raises(WriteFailed, match="may come back"):
        engine.delete(session)


@pytest.mark.parametrize("left", [0, 512])
def test_a_segment_cut_to_less_than_its_header_is_lost_and_the_others_are_not(left: int) -> None:
    disk = SimDisk()
    filled(disk, 20).shutdown()
    disk.put(SEGMENT, disk.get(SEGMENT)[:left])
    again = make(disk)
    info = again.open("a", None, create=False)
    assert info.chunk_count == 20
    lost = again.info(1).damaged_records // (WIDE.layers * WIDE.records_per_extent)
    assert lost == (2 * MIB - 4096) // FRAME
    check(again, 20, tuple(range(lost)))


@pytest.mark.parametrize("bad", [range(1, 2048), (34,), (34, 41, 100, 1500)], ids=["all", "one", "some"])
def test_a_device_that_cannot_be_read_is_not_asked_for_every_block(bad: range | tuple[int, ...]) -> None:
    disk = SimDisk()
    engine = make(disk, segment_bytes=8 * MIB)
    session = engine.open("a", WIDE, create=True).session_id
    for i in range(48):
        engine.append(session, i, 1, CHUNKS[i], b"")
        engine.flush(session)
    engine.shutdown()
    read, asked = disk.read, []

    def failing(handles, offsets, addresses, lengths):
        asked.append(len(handles))
        first, last = offsets // 4096, (offsets + lengths - 1) // 4096
        hit = np.array([any(low <= block <= high for block in bad) for low, high in zip(first, last, strict=True)])
        return np.where(hit, -errno.EIO, read(handles, offsets, addresses, lengths)).astype(np.int32)

    disk = disk.kill()
    read, disk.read = disk.read, failing
    again = make(disk, segment_bytes=8 * MIB)
    assert again.open("a", None, create=False).chunk_count == 48
    lost = again.info(session).damaged_records // (WIDE.layers * WIDE.records_per_extent)
    if len(bad) > 100:
        assert lost == 48
        assert sum(asked) < 1000  # 2,047 blocks, each tried six times
    else:
        heads = {1 + (FRAME // 4096) * frame for frame in range(48)}
        assert lost == len(heads & set(bad))
