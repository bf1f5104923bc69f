"""archive.py: what was written is read, anything else is refused; the golden file pins the bytes of docs/archive.md."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from hga_kvd.archive import (
    BATCH,
    END,
    KV,
    PART_BYTES_MAX,
    SUMMARIES,
    BadArchive,
    Head,
    Part,
    encode_head,
    encode_part,
    read_head,
    read_parts,
)
from hga_kvd.geometry import Geometry
from hypothesis import given
from hypothesis import strategies as st

GOLDEN = Path(__file__).parent / "golden" / "session.kvx"
GEOMETRY = Geometry(1, 1, 4, "float16", chunk_tokens=8, group_tokens=4, rope="r", model_fingerprint="f")
HEAD = Head("golden", GEOMETRY, 3)
KV_BYTES = bytes(np.repeat(np.arange(96, dtype=np.uint8), 4))  # 3 chunks of 128 bytes
IDS = np.arange(16, dtype="<u4").tobytes()
PARTS = [
    Part(BATCH, 0, 2, IDS),
    Part(KV, 0, 2, KV_BYTES[:64]),
    Part(KV, 0, 2, KV_BYTES[64:256]),
    Part(BATCH, 2, 1),
    Part(KV, 2, 1, KV_BYTES[256:]),
    Part(SUMMARIES, 0, 3, b"summary!" * 3, "k.v1"),
    Part(SUMMARIES, 2, 1, b"basis", "b.v1"),
    Part(END, 0, 3),
]


def archive(parts=PARTS, head=HEAD, codec="zstd"):
    return encode_head(head) + b"".join(encode_part(part, i, codec, 2) for i, part in enumerate(parts))


def read(content):
    source = io.BytesIO(content)
    head = read_head(source)
    return head, list(read_parts(source, head))


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_what_was_written_is_read(codec):
    assert read(archive(codec=codec)) == (HEAD, PARTS[:-1])


def test_an_empty_session():
    head = Head("", GEOMETRY, 0)
    assert read(archive([Part(END, 0, 0)], head)) == (head, [])


def test_the_golden_file():
    """Raw, as bytes of zstd may differ from version to version."""
    assert GOLDEN.read_bytes() == archive(codec="raw")
    assert read(GOLDEN.read_bytes()) == (HEAD, PARTS[:-1])


def test_zstd_is_used_only_where_it_is_smaller():
    noise = np.random.default_rng(0).integers(0, 256, 4096, np.uint8).tobytes()
    assert len(encode_part(Part(KV, 0, 1, noise), 0, "zstd", 2)) == len(encode_part(Part(KV, 0, 1, noise), 0, "raw", 2))
    assert len(encode_part(Part(KV, 0, 1, bytes(4096)), 0, "zstd", 2)) < 200


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_every_cut_is_refused(codec):
    whole = archive(codec=codec)
    for end in range(len(whole)):
        with pytest.raises(BadArchive):
            read(whole[:end])
    with pytest.raises(BadArchive, match="behind its last part"):
        read(whole + b"\0")


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_every_changed_byte_is_refused(codec):
    whole = archive(codec=codec)
    for at in range(len(whole)):
        changed = bytearray(whole)
        changed[at] ^= 1 << at % 8
        with pytest.raises(BadArchive):
            read(bytes(changed))


# fmt: off
WRONG_ORDERS = [
    PARTS[1:],  # K/V without a batch
    [PARTS[0], PARTS[1], PARTS[3]],  # a batch before the last one has all of its K/V
    [PARTS[0], PARTS[1], PARTS[2], PARTS[2]],  # more K/V than the batch has
    [PARTS[0], PARTS[1], Part(KV, 0, 1, KV_BYTES[64:256])],  # K/V of another batch
    [PARTS[3]],  # not from the first chunk on
    [*PARTS[:3], Part(BATCH, 2, 2)],  # past the session's end
    [Part(BATCH, 0, 0)],
    [Part(BATCH, 0, 2, IDS[:-4])],  # token ids of fewer tokens
    [*PARTS[:3], PARTS[5]],  # summaries before all K/V
    [*PARTS[:5], Part(SUMMARIES, 1, 3, b"x" * 3, "k")],  # of chunks that there are not
    [*PARTS[:5], Part(SUMMARIES, 0, 3, b"x" * 4, "k")],  # not the same for each chunk
    [*PARTS[:5], Part(SUMMARIES, 0, 3, b"", "k")],
    [*PARTS[:5], Part(9, 0, 3)],  # a kind that there is not
    [*PARTS[:5], Part(END, 0, 2)],
    [*PARTS[:5], Part(END, 0, 3, b"x")],
    [*PARTS[:3], Part(END, 0, 3)],  # the end before all K/V
]
# fmt: on


@pytest.mark.parametrize("parts", WRONG_ORDERS)
def test_parts_in_another_order_are_refused(parts):
    with pytest.raises(BadArchive):
        read(archive(parts))


def test_another_head_or_version_is_refused():
    good = archive()
    for changed, said in (
        (b"PK" + good[2:], "starts with"),
        (good[:8] + b"\2" + good[9:], "version 2"),
        (b"", "0 bytes"),
    ):
        with pytest.raises(BadArchive, match=said):
            read(changed)


def test_a_name_that_no_message_can_carry_is_refused():
    with pytest.raises(BadArchive, match="surrogates"):
        read(archive([Part(END, 0, 0)], Head("\ud800", GEOMETRY, 0)))


def test_a_length_is_bounded_before_it_is_believed():
    class Source(io.BytesIO):
        def read(self, length=-1):
            assert 0 <= length <= PART_BYTES_MAX + 100
            return super().read(length)

    part = encode_part(PARTS[0], 0, "raw", 2)
    for at in (28, 32, 36):
        huge = part[:at] + b"\xff\xff\xff\x7f" + part[at + 4 :]
        with pytest.raises(BadArchive):
            list(read_parts(Source(huge), HEAD))


@given(content=st.binary(max_size=400), keep=st.integers(0, 300))
def test_garbage_is_refused(content, keep):
    with pytest.raises(BadArchive):
        read(archive()[:keep] + content)


if __name__ == "__main__":  # python tests/kvstore/test_archive.py: writes the golden file anew
    sys.exit(GOLDEN.write_bytes(archive(codec="raw")) == 0)
