"""The byte format: golden bytes of version 1, round trips, and that no input does more than raise BadBytes."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

import numpy as np
import pytest
from hga_kvd import format as fmt
from hga_kvd.checksum import checksum, checksums, mix, place_codes, record_seeds, summary_seeds
from hga_kvd.config import Settings
from hga_kvd.engine import Engine
from hga_kvd.geometry import KEY_DTYPE, Geometry
from hga_kvd.manifest import Manifest, SegmentEntry, SessionEntry, decode_manifest, encode_manifest
from hga_kvd.testing.simdisk import SimDisk
from hypothesis import given
from hypothesis import strategies as st

GOLDEN = Path(__file__).parent / "golden"
GEOMETRY = Geometry(1, 1, 4, "float16", chunk_tokens=8, group_tokens=4)
SEGMENT_BYTES = 64 << 10
USED_BYTES = 7 * 4096  # segment header, chunk frame of two blocks, summary frame of two, a link frame and its copy


def golden_settings() -> Settings:
    return Settings(ram=2 << 20, segment_bytes=SEGMENT_BYTES)


def write_golden() -> SimDisk:
    disk = SimDisk()
    engine = Engine(golden_settings(), disk, background=False, clock=lambda: 0)
    session = engine.open("golden", GEOMETRY, create=True).session_id
    engine.append(session, 0, 1, np.arange(128, dtype=np.uint8), b"")
    engine.put_summaries(session, "k.v1", 0, 1, b"summary!")
    engine.flush(session)
    engine.flush(engine.fork(session, 0, 0, "fork").session_id)
    engine.shutdown()
    return disk


def test_golden_store_is_written_byte_for_byte() -> None:
    disk = write_golden()
    assert disk.names() == ["MANIFEST", "MANIFEST.copy", "segment-00000001.kvs"]
    assert disk.get("MANIFEST") == (GOLDEN / "MANIFEST").read_bytes()
    segment = disk.get("segment-00000001.kvs")
    assert segment[:USED_BYTES] == (GOLDEN / "segment-00000001.kvs").read_bytes()
    assert len(segment) == SEGMENT_BYTES
    assert not any(segment[USED_BYTES:])


def test_golden_store_is_read() -> None:
    disk = SimDisk()
    disk.put("MANIFEST", (GOLDEN / "MANIFEST").read_bytes())
    disk.put("segment-00000001.kvs", (GOLDEN / "segment-00000001.kvs").read_bytes().ljust(SEGMENT_BYTES, b"\0"))
    engine = Engine(golden_settings(), disk, background=False, clock=lambda: 0)
    session = engine.open("golden", None, create=False)
    assert (session.session_id, session.geometry, session.chunk_count) == (1, GEOMETRY, 1)
    keys = np.array([(1, 0, 0), (0, 0, 0)], KEY_DTYPE)
    records = np.zeros(128, np.uint8)
    assert engine.fetch(1, keys, records).statuses is None
    assert records.tolist() == [*range(64, 128), *range(64)]
    fork = engine.open("fork", None, create=False)
    assert (fork.session_id, fork.chunk_count, engine.stats().chunks) == (2, 1, 1)
    for session_id in (1, 2):
        assert engine.get_summaries(session_id, "k.v1", 0, 1, 100) == (1, b"summary!")


def test_document_shows_the_golden_bytes() -> None:
    """The worked example of docs/format.md is the golden store."""
    document = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    segment = (GOLDEN / "segment-00000001.kvs").read_bytes()
    manifest = (GOLDEN / "MANIFEST").read_bytes()
    shown = 0
    for line in document.splitlines():
        part, _, rest = line.strip().partition(" ")
        at, _, text = rest.partition(": ")
        if part in ("segment", "MANIFEST") and text:
            content = bytes.fromhex(text.split("  ")[0])
            source = segment if part == "segment" else manifest
            assert source[int(at) :][: len(content)] == content, line
            shown += len(content)
    assert shown > 200


def test_names() -> None:
    assert fmt.segment_name(7) == "segment-00000007.kvs"
    assert fmt.segment_name(123456789) == "segment-123456789.kvs"
    for segment_id in (1, 7, 99999999, 123456789):
        assert fmt.segment_id_of(fmt.segment_name(segment_id)) == segment_id
    for name in ("segment-1.kvs", "segment-000000001.kvs", "segment-00000001.kvs.bak", "SEGMENT-00000001.kvs", "x"):
        assert fmt.segment_id_of(name) is None


# --- checksums ---


def test_mix_is_splitmix64() -> None:
    # The first outputs of splitmix64 from state 0, as published with xoshiro.
    states = np.array([0, 0x9E3779B97F4A7C15], np.uint64)
    assert [hex(int(x)) for x in mix(states)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4"]


def test_seeds_name_the_place() -> None:
    seeds = record_seeds(np.arange(20)[:, None, None], np.arange(20)[:, None], np.arange(20))
    assert len(np.unique(seeds)) == 8000
    assert (mix(np.arange(20, dtype=np.uint64)[:, None, None] ^ place_codes(20, 20)) == seeds).all()
    assert len(np.unique([summary_seeds(c, k)[0] for k in "ab" for c in range(25)])) == 50
    data = bytes(range(100))
    one, two = checksums(memoryview(data), np.array([0, 0]), 50, seeds[0, 0, :2]).tolist()
    assert one != two
    assert one == checksum(data[:50], int(seeds[0, 0, 0]))


# --- frames ---


@st.composite
def chunk_frames(draw: st.DrawFn) -> tuple[fmt.FrameHeader, bytes, int]:
    count, layers, records = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    record_bytes, tokens = draw(st.integers(1, 5000)), draw(st.integers(1, 9))
    chance = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    table = fmt.encode_chunk_table(
        record_bytes,
        chance.integers(0, 1 << 60, count).astype(np.uint64),
        chance.integers(0, 1 << 60, (count, layers, records)).astype(np.uint64),
        chance.integers(0, 2, count).astype(bool),
        chance.integers(0, 1 << 30, (count, tokens)).astype(np.uint32),
    )
    body = count * layers * fmt.round_up(records * record_bytes)
    header = fmt.FrameHeader(fmt.CHUNKS, 3, 4096 * draw(st.integers(1, 9)), 5, 4096, 6, 7, count, len(table), body)
    return header, table, header.offset + header.frame_bytes


@st.composite
def summary_frames(draw: st.DrawFn) -> tuple[fmt.FrameHeader, bytes, int]:
    count, each = draw(st.integers(1, 9)), draw(st.integers(1, 9000))
    kind = draw(st.text(min_size=1, max_size=16))
    numbers = np.arange(2 * count, dtype=np.uint64)
    table = fmt.encode_summary_table(kind, each, numbers[:count], numbers[count:])
    header = fmt.FrameHeader(fmt.SUMMARIES, 3, 4096, 0, 4096, 6, 7, count, len(table), count * fmt.round_up(each))
    return header, table, header.offset + header.frame_bytes


@st.composite
def link_frames(draw: st.DrawFn) -> tuple[fmt.FrameHeader, bytes, int]:
    uids = np.array(draw(st.lists(st.integers(0, 1 << 62), max_size=9)), np.uint64)
    table = fmt.encode_link_table(uids)
    header = fmt.FrameHeader(fmt.LINK, 3, 4096, 0, 4096, 6, 7, len(uids), len(table), 0, epoch=draw(st.integers(0, 9)))
    return header, table, header.offset + header.frame_bytes


FRAMES = st.one_of(chunk_frames(), summary_frames(), link_frames())


def decode(head: bytes, header: fmt.FrameHeader, segment_bytes: int) -> fmt.Frame:
    found = fmt.decode_frame_header(head[:4096], header.segment_id, header.offset, segment_bytes)
    return fmt.decode_table(found, fmt.check_frame(found, head))


@given(FRAMES)
def test_frames_come_back(made: tuple[fmt.FrameHeader, bytes, int]) -> None:
    header, table, end = made
    head = fmt.encode_frame_head(header, table)
    assert len(head) == header.head_bytes
    frame = decode(head, header, end)
    assert frame.header == header
    if isinstance(frame, fmt.ChunkFrame):
        again = fmt.encode_chunk_table(
            frame.record_bytes, frame.uids, frame.checksums, frame.tokens_known, frame.token_ids
        )
    elif isinstance(frame, fmt.LinkFrame):
        again = fmt.encode_link_table(frame.uids)
    else:
        again = fmt.encode_summary_table(frame.kind, frame.bytes_per_chunk, frame.uids, frame.checksums)
    assert again == table


@given(FRAMES, st.data())
def test_any_changed_byte_of_a_frame_is_noticed(made: tuple[fmt.FrameHeader, bytes, int], data: st.DataObject) -> None:
    header, table, end = made
    head = bytearray(fmt.encode_frame_head(header, table))
    at = data.draw(st.integers(0, fmt.FRAME_HEAD_BYTES + len(table) - 1))
    head[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(fmt.BadBytes):
        decode(bytes(head), header, end)


@given(FRAMES, st.integers(0, 3))
def test_a_frame_at_a_wrong_place_is_refused(made: tuple[fmt.FrameHeader, bytes, int], which: int) -> None:
    header, table, end = made
    head = fmt.encode_frame_head(header, table)
    wrong = [
        dataclasses.replace(header, segment_id=4),
        dataclasses.replace(header, offset=header.offset + 4096),
        dataclasses.replace(header, segment_id=4, offset=0),
        header,
    ][which]
    with pytest.raises(fmt.BadBytes):
        decode(head, wrong, end + 4096 if wrong is not header else end - 1)


@given(st.integers(1, 3), st.integers(0, 1 << 32 - 1), st.binary(max_size=400))
def test_tables_with_lying_sizes_are_refused(kind: int, count: int, table: bytes) -> None:
    """A checksum that matches is no licence: a table made by a bug, or by hand, is still bounded by its own length."""
    header = fmt.FrameHeader(kind, 3, 4096, 0, 4096, 6, 7, count, len(table), 4096)
    try:
        frame = fmt.decode_table(header, table)
    except fmt.BadBytes:
        return
    assert frame.uids.nbytes <= len(table)


@given(st.binary(max_size=200))
def test_garbage_is_no_frame_header(block: bytes) -> None:
    with pytest.raises(fmt.BadBytes):
        fmt.decode_frame_header(block, 1, 4096, 1 << 20)


# --- segment header ---


def test_segment_header() -> None:
    block = fmt.encode_segment_header(9, 1 << 20)
    assert fmt.decode_segment_header(block) == (9, 1 << 20)
    for at in range(0, 4096, 7):
        with pytest.raises(fmt.BadBytes):
            fmt.decode_segment_header(block[:at] + bytes([block[at] ^ 1]) + block[at + 1 :])
    with pytest.raises(fmt.BadBytes):
        fmt.decode_segment_header(block[:100])
    newer = bytearray(block)
    newer[8:12] = struct.pack("<I", 2)
    newer[4088:] = struct.pack("<Q", checksum(bytes(newer[:4088])))
    with pytest.raises(fmt.NewerFormat):
        fmt.decode_segment_header(bytes(newer))


# --- manifest ---

GEOMETRIES = st.builds(
    Geometry,
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 64),
    st.sampled_from(["float32", "bfloat16"]),
    rope=st.text(max_size=8),
)
MANIFESTS = st.builds(
    Manifest,
    st.booleans(),
    st.integers(0, 1 << 62),
    st.integers(0, 1 << 62),
    st.integers(0, 1 << 62),
    st.lists(
        st.builds(
            SessionEntry,
            st.integers(1, 99),
            st.text(min_size=1, max_size=9),
            GEOMETRIES,
            st.just(7),
            st.integers(0, 99),
            st.text(max_size=9),
            st.integers(0, 99),
            st.booleans(),
            st.sampled_from([None, ((1, 7),), ((3, 2), (0, 1), (9, 4))]),
            st.integers(0, 1 << 40),
        ),
        max_size=4,
        unique_by=(lambda s: s.session_id, lambda s: s.name),
    ).map(tuple),
    st.lists(
        st.builds(
            SegmentEntry,
            st.integers(1, 99),
            st.sampled_from(["open", "sealed", "poisoned"]),
            st.integers(0, 1 << 40),
        ),
        max_size=4,
        unique_by=lambda s: s.segment_id,
    ).map(tuple),
)


@given(MANIFESTS)
def test_manifests_come_back(manifest: Manifest) -> None:
    assert decode_manifest(encode_manifest(manifest)) == manifest


@given(MANIFESTS, st.data())
def test_any_changed_byte_of_a_manifest_is_noticed(manifest: Manifest, data: st.DataObject) -> None:
    content = bytearray(encode_manifest(manifest))
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(fmt.BadBytes):
        decode_manifest(bytes(content))


def signed(text: bytes, version: int = 1) -> bytes:
    head = struct.pack("<8sII", b"HGAKVMAN", version, len(text))
    return head + struct.pack("<Q", checksum(head + text)) + text


@pytest.mark.parametrize(
    "change",
    [
        (b'"clean":true', b'"clean":1'),
        (b'"clean":true', b'"clean":null'),
        (b'"next_chunk_uid":2', b'"next_chunk_uid":-1'),
        (b'"next_chunk_uid":2', b'"next_chunk_uid":1e3'),
        (b'"next_chunk_uid":2', b'"next_chunk_uid":99999999999999999999999'),
        (b'"geometry":0,"id":1', b'"geometry":1,"id":1'),
        (b'"geometry":0,"id":1', b'"geometry":-1,"id":1'),
        (b'"layers":1', b'"layers":0'),
        (b'"layers":1', b'"layers":"1"'),
        (b'"layers":1', b'"rows":1'),
        (b'"name":"golden"', b'"name":7'),
        (b'"epoch":0,"geometry":0,"id":1,', b'"epoch":-1,"geometry":0,"id":1,'),
        (b'1,"links":null', b'1,"links":7'),
        (b'1,"links":null', b'1,"links":[[1]]'),
        (b'1,"links":null', b'1,"links":[[1,2]]'),
        (b'"golden","pinned":false', b'"golden","pinned":0'),
        (b'"golden","pinned":false,"tenant":""', b'"golden","pinned":false,"tenant":null'),
        (b'"state":"open"', b'"state":"ajar"'),
        (b'"segments":[', b'"segments":[{"id":1,"state":"open","used_bytes":0},'),
        (b'"sessions":[', b'"sessions":{'),
        (b'"sessions":', b'"session":'),
    ],
)
def test_a_manifest_with_a_wrong_field_is_refused(change: tuple[bytes, bytes]) -> None:
    text = (GOLDEN / "MANIFEST").read_bytes()[24:]
    assert decode_manifest(signed(text)).clean
    assert text.count(change[0]) == 1
    with pytest.raises(fmt.BadBytes):
        decode_manifest(signed(text.replace(*change)))


@given(st.one_of(st.binary(max_size=100), st.recursive(st.none(), st.lists).map(lambda x: repr(x).encode())))
def test_a_manifest_of_garbage_is_refused(text: bytes) -> None:
    for content in (text, signed(text), signed(b"[" * 100_000)):
        with pytest.raises(fmt.BadBytes):
            decode_manifest(content)


def test_a_newer_manifest_is_told_from_a_bad_one() -> None:
    with pytest.raises(fmt.NewerFormat, match="format version 2"):
        decode_manifest(signed(b"whatever comes then", version=2))


if __name__ == "__main__":  # python tests/kvstore/test_format.py: writes the golden files anew
    store = write_golden()
    (GOLDEN / "MANIFEST").write_bytes(store.get("MANIFEST"))
    (GOLDEN / "segment-00000001.kvs").write_bytes(store.get("segment-00000001.kvs")[:USED_BYTES])
