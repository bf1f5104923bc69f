"""Geometry: what fixes the size and the meaning of K/V bytes. Pure values; every size in the daemon follows from here.

A record is one (layer, kv_head, chunk, group): K then V, `[2, group_tokens, head_dim]`. An extent is all records of one
(chunk, layer), `[kv_head][group]`. A chunk on the wire is its extents in layer order.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields

import numpy as np
import numpy.typing as npt

from hga_kvd.errors import InvalidRequest

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}

# Widest models in use: 126 layers (Llama 405B), 128 KV heads; 4x head room, and keys pack a layer and a head in 16 bits.
LAYERS_MAX = 512
KV_HEADS_MAX = 512
HEAD_DIM_MAX = 1024
CHUNK_TOKENS_MAX = 1024
# One arena page; a 64-head x 128 x bf16 extent is exactly this.
EXTENT_BYTES_MAX = 2 << 20
TEXT_BYTES_MAX = 4096

# A fetch key on the wire and in memory: 8 bytes. `group` counts from the start of the session.
KEY_DTYPE = np.dtype([("group", "<u4"), ("kv_head", "<u2"), ("layer", "<u2")])
Keys = npt.NDArray[np.void]


@dataclass(frozen=True)
class Geometry:
    """Raises InvalidRequest on construction when a field is impossible or over its limit."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    chunk_tokens: int = 64
    group_tokens: int = 16
    rope: str = ""
    model_fingerprint: str = ""

    def __post_init__(self) -> None:
        for name, limit in (
            ("layers", LAYERS_MAX),
            ("kv_heads", KV_HEADS_MAX),
            ("head_dim", HEAD_DIM_MAX),
            ("chunk_tokens", CHUNK_TOKENS_MAX),
            ("group_tokens", CHUNK_TOKENS_MAX),
        ):
            value = getattr(self, name)
            if not 1 <= value <= limit:
                raise InvalidRequest(f"geometry.{name} is {value}; it must be 1 to {limit}")
        if self.dtype not in DTYPE_BYTES:
            raise InvalidRequest(f"geometry.dtype is {self.dtype!r}; it must be one of {', '.join(DTYPE_BYTES)}")
        if self.chunk_tokens % self.group_tokens:
            raise InvalidRequest(
                f"geometry.group_tokens {self.group_tokens} does not divide geometry.chunk_tokens {self.chunk_tokens}"
            )
        if self.extent_bytes > EXTENT_BYTES_MAX:
            raise InvalidRequest(
                f"geometry makes extents of {self.extent_bytes} bytes; at most {EXTENT_BYTES_MAX} are supported: "
                "use a narrower dtype or fewer tokens a chunk"
            )
        for name in ("rope", "model_fingerprint"):
            if len(getattr(self, name).encode()) > TEXT_BYTES_MAX:
                raise InvalidRequest(f"geometry.{name} is longer than {TEXT_BYTES_MAX} bytes; send a hash of it")

    @property
    def groups_per_chunk(self) -> int:
        return self.chunk_tokens // self.group_tokens

    @property
    def record_bytes(self) -> int:
        return 2 * self.group_tokens * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def records_per_extent(self) -> int:
        return self.kv_heads * self.groups_per_chunk

    @property
    def extent_bytes(self) -> int:
        return self.records_per_extent * self.record_bytes

    @property
    def chunk_bytes(self) -> int:
        return self.layers * self.extent_bytes

    def fingerprint(self) -> str:
        """sha256 over the canonical text of all fields."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def differences(self, other: Geometry) -> list[str]:
        """`field: mine != theirs` for each field that differs."""
        return [
            f"{f.name}: {getattr(self, f.name)!r} != {getattr(other, f.name)!r}"
            for f in fields(self)
            if getattr(self, f.name) != getattr(other, f.name)
        ]
