"""codec.py: every byte string comes back, the planes are what the docstring shows, and bad input is one kind of error."""

import os

import pytest
import zstandard
from hga_kvd.codec import CODECS, BadCode, from_planes, pack, to_planes, unpack
from hypothesis import given
from hypothesis import strategies as st


@given(raw=st.binary(max_size=300), element_bytes=st.sampled_from([1, 2, 4]), codec=st.sampled_from(CODECS))
def test_what_was_packed_comes_back(raw, element_bytes, codec):
    assert from_planes(to_planes(raw, element_bytes), element_bytes) == raw
    assert unpack(codec, pack(codec, raw, element_bytes), len(raw), element_bytes) == raw


def test_the_planes():
    assert to_planes(b"aAbBcC", 2) == b"abcABC"
    assert to_planes(b"aAbBc", 2) == b"abABc"
    assert to_planes(b"0123abcdx", 4) == b"0a1b2c3dx"


def test_planes_are_what_makes_it_smaller():
    """Random mantissas under one exponent: zstd alone finds nothing, of planes it takes one half away."""
    raw = b"".join(bytes((m, 0x3F)) for m in os.urandom(1 << 14))
    assert len(pack("zstd", raw, 2)) < 0.55 * len(raw)
    assert len(pack("zstd", raw, 1)) > 0.6 * len(raw)


@given(packed=st.binary(max_size=200), raw_bytes=st.integers(0, 1 << 20))
def test_garbage_is_refused(packed, raw_bytes):
    with pytest.raises(BadCode):
        unpack("zstd", packed, raw_bytes, 2)


@pytest.mark.parametrize("wrong", [-1, 1])
def test_another_size_is_refused(wrong):
    for codec in CODECS:
        with pytest.raises(BadCode):
            unpack(codec, pack(codec, b"x" * 100, 2), 100 + wrong, 2)


def test_a_bomb_is_refused_by_what_it_says():
    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    assert len(bomb) < 10_000
    with pytest.raises(BadCode, match="does not say 100 bytes"):
        unpack("zstd", bomb, 100, 1)


def test_bytes_behind_the_frame_are_refused():
    with pytest.raises(BadCode):
        unpack("zstd", pack("zstd", b"x" * 100, 2) + b"y", 100, 2)
