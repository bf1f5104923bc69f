"""Geometry: what fixes the size and the meaning of K/V bytes, as the wire contract defines it. Pure values, no torch.

The daemon checks a geometry against its limits; here are only the sizes that follow from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from hga_kvd_proto.v1 import kvd_pb2

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}

# A fetch key on the wire: 8 bytes. `group` counts from the start of the session.
KEY_DTYPE = np.dtype([("group", "<u4"), ("kv_head", "<u2"), ("layer", "<u2")])
Keys = npt.NDArray[np.void]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Geometry:
    """Sessions share nothing unless all fields are equal. `rope`, `model_fingerprint`: compared, not parsed."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    chunk_tokens: int = 64
    group_tokens: int = 16
    rope: str = ""
    model_fingerprint: str = ""

    @property
    def groups_per_chunk(self) -> int:
        return self.chunk_tokens // self.group_tokens

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def record_bytes(self) -> int:
        """K and V of one group of one KV head."""
        return 2 * self.group_tokens * self.head_dim * self.dtype_bytes

    @property
    def extent_bytes(self) -> int:
        """One chunk, one layer."""
        return self.kv_heads * self.groups_per_chunk * self.record_bytes

    @property
    def chunk_bytes(self) -> int:
        """One chunk, all layers."""
        return self.layers * self.extent_bytes

    def to_proto(self) -> kvd_pb2.Geometry:
        return kvd_pb2.Geometry(
            layers=self.layers,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            chunk_tokens=self.chunk_tokens,
            group_tokens=self.group_tokens,
            rope=self.rope,
            model_fingerprint=self.model_fingerprint,
        )

    @classmethod
    def from_proto(cls, message: kvd_pb2.Geometry) -> Geometry:
        return cls(
            layers=message.layers,
            kv_heads=message.kv_heads,
            head_dim=message.head_dim,
            dtype=message.dtype,
            chunk_tokens=message.chunk_tokens,
            group_tokens=message.group_tokens,
            rope=message.rope,
            model_fingerprint=message.model_fingerprint,
        )
