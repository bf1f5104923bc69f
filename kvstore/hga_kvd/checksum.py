"""Checksums that bind bytes to their place. Pure.

Every K/V record's XXH3 is seeded with (chunk uid, layer, record), so sound bytes of another record fail too. The
checksum is kept apart from what it checks (chunk table in RAM, frame table on disk). XXH3 reads 17 GB/s here; the loop
over 8 KiB records costs 9 us per 100 KB, 9 % of the time the same bytes take to come from disk.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import xxhash

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]

checksum = xxhash.xxh3_64_intdigest


def mix(values: U64) -> U64:
    """The splitmix64 finaliser, elementwise; arithmetic modulo 2**64."""
    x = values + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def record_seeds(uids: npt.ArrayLike, layers: npt.ArrayLike, records: npt.ArrayLike) -> U64:
    """Seeds of records; the arguments broadcast against one another."""
    layer = np.atleast_1d(np.asarray(layers)).astype(np.uint64)
    record = np.atleast_1d(np.asarray(records)).astype(np.uint64)
    uid = np.atleast_1d(np.asarray(uids)).astype(np.uint64)
    return mix(uid ^ mix((layer << np.uint64(32)) | record))


@lru_cache(maxsize=64)
def place_codes(layer_count: int, record_count: int) -> U64:
    """Half of `record_seeds`, done once: [layers, records], and mix(uid ^ place_codes(...)[layer, record]) is the seed."""
    return mix(
        (np.arange(layer_count, dtype=np.uint64)[:, None] << np.uint64(32)) | np.arange(record_count, dtype=np.uint64)
    )


def chunk_seeds(uids: U64, layer_count: int, record_count: int) -> U64:
    """Seeds of all records of these chunks: [chunks, layers, records]."""
    return record_seeds(uids[:, None, None], np.arange(layer_count)[:, None], np.arange(record_count))


def summary_seeds(uids: npt.ArrayLike, kind: str) -> U64:
    """Seeds of routing summaries of these chunks."""
    kind_hash = mix(np.array([checksum(kind.encode())], np.uint64))
    return mix(np.atleast_1d(np.asarray(uids)).astype(np.uint64) ^ kind_hash)


def checksums(memory: memoryview, starts: I64, length: int, seeds: U64) -> U64:
    """Checksum of `length` bytes at each start, each with its seed. memory: bytes, format "B"."""
    return np.array(
        [checksum(memory[at : at + length], seed) for at, seed in zip(starts.tolist(), seeds.tolist(), strict=True)],
        np.uint64,
    )
