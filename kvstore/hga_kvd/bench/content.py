"""What the bench stores: bytes that tell for themselves where they belong, so that nothing is kept to compare with.

A record is one random block, the same for all, xored with a number made of its layer, KV head and group: a record from
another place, or one that is shifted, differs in nearly every byte.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hga_kvd_client.geometry import Bytes, Geometry, Keys

U64 = npt.NDArray[np.uint64]


class WrongBytes(Exception):
    """A record came back with other bytes than were stored. It must never happen."""


class Content:
    """The records of one session. geometry: record_bytes is a multiple of 8."""

    def __init__(self, geometry: Geometry, seed: int = 0) -> None:
        self.geometry = geometry
        chance = np.random.default_rng(seed)
        self._block: U64 = chance.integers(0, 1 << 64, geometry.record_bytes // 8, np.uint64)
        self._seed = chance.integers(0, 1 << 64, dtype=np.uint64)

    def records(self, keys: Keys) -> Bytes:
        """[keys, record_bytes]"""
        numbers = self._numbers(keys["layer"], keys["kv_head"], keys["group"])
        return (self._block ^ numbers[:, None]).view(np.uint8)

    def fill_chunks(self, first_chunk: int, out: Bytes) -> None:
        """Writes the payload of an append from first_chunk on into `out`, a multiple of chunk_bytes."""
        g = self.geometry
        chunks = out.view(np.uint64).reshape(-1, g.layers, g.kv_heads, g.groups_per_chunk, g.record_bytes // 8)
        layers, heads = np.arange(g.layers)[:, None, None], np.arange(g.kv_heads)[:, None]
        for chunk, destination in enumerate(chunks, first_chunk):
            groups = chunk * g.groups_per_chunk + np.arange(g.groups_per_chunk)
            np.bitwise_xor(self._block, self._numbers(layers, heads, groups)[..., None], out=destination)

    def check(self, keys: Keys, records: Bytes, statuses: Bytes | None, sample: np.random.Generator, most: int) -> int:
        """Compares at most `most` records, picked by `sample`; returns how many. Raises: WrongBytes."""
        if statuses is not None and statuses.any():
            raise WrongBytes(f"{int(np.count_nonzero(statuses))} of {len(keys)} records came back damaged or late")
        rows = np.arange(len(keys)) if len(keys) <= most else sample.choice(len(keys), most, replace=False)
        wrong = (self.records(keys[rows]) != records[rows]).any(1)
        if wrong.any():
            raise WrongBytes(f"record {keys[rows][wrong][0]} came back with other bytes than were stored")
        return len(rows)

    def _numbers(self, layer: npt.ArrayLike, kv_head: npt.ArrayLike, group: npt.ArrayLike) -> U64:
        """splitmix64 of the place."""
        place = (
            np.asarray(group, np.uint64)
            | np.asarray(kv_head, np.uint64) << np.uint64(32)
            | np.asarray(layer, np.uint64) << np.uint64(48)
        )
        number: U64 = place ^ self._seed
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            number = (number ^ number >> np.uint64(shift)) * np.uint64(factor)
        number ^= number >> np.uint64(31)
        return number
