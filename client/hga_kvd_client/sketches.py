"""The sketches of a session and their basis, for all layers; how both become bytes that the daemon keeps.

A basis is settled once, from the first prompt tokens, and never changes afterwards: codes mean nothing without it. It
is stored as the summary of one chunk in parts of at most PART_BYTES, kinds `sketch-basis.v1`, `sketch-basis.v1.1`, ...:

    "SKB1", then four uint32: parts, layers, kv_heads, head_dim
    to_y, to_z [layers, kv_heads, head_dim, head_dim], centre [layers, kv_heads, head_dim], float32, little-endian

That keys are plain is one byte, of kind `sketch-basis.v1.plain`. Records of a chunk are stored as they are, [layers,
kv_heads, chunk_bytes], under a kind that names basis and sizes.
"""

from __future__ import annotations

import copy
import struct

import torch
from torch import Tensor

from hga_kvd_client.sketch import Basis, Moments, SketchSpec, encode
from hga_kvd_client.summaries import grown

BASIS_KIND = "sketch-basis.v1"
PLAIN_KIND = "sketch-basis.v1.plain"  # its own: a kind has one size
# The daemon's summary_bytes_max unless it was told otherwise.
PART_BYTES = 1 << 20
_HEADER = struct.Struct("<4s4I")
_MAGIC = b"SKB1"
# Fewer prompt tokens than this say too little about the queries: keys are plain (DESIGN section 6).
BASIS_TOKENS_MIN = 512


class BasisSearch:
    """Looks at the first `tokens_max` prompt tokens of every layer. Dropped once the basis is settled."""

    def __init__(self, layers: int, kv_heads: int, head_dim: int, tokens_max: int, device: torch.device) -> None:
        self._tokens_max = tokens_max
        self._moments = [Moments(kv_heads, head_dim, device) for _ in range(layers)]

    @property
    def tokens(self) -> int:
        """That all layers have seen."""
        return self._moments[-1].tokens

    @property
    def complete(self) -> bool:
        return self.tokens >= self._tokens_max

    def look(self, layer: int, q: Tensor, k: Tensor) -> None:
        """q: [kv_heads, ratio, tokens, head_dim]; k: [kv_heads, tokens, head_dim]: a block's own; after RoPE."""
        moments = self._moments[layer]
        more = self._tokens_max - moments.tokens
        if more > 0:
            moments.add(q[:, :, :more], k[:, :more])

    @property
    def enough(self) -> bool:
        return self.tokens >= min(BASIS_TOKENS_MIN, self._tokens_max)

    def result(self) -> Basis | None:
        """Of all layers, [layers, ...]; None if too few tokens were seen."""
        if not self.enough:
            return None
        layers = [Basis.of(moments) for moments in self._moments]
        return Basis(
            torch.stack([b.to_y for b in layers]),
            torch.stack([b.to_z for b in layers]),
            torch.stack([b.centre for b in layers]),
        )

    def resident_bytes(self) -> int:
        return sum(t.nbytes for m in self._moments for t in (m.q, m.k, m.k_sum))


def basis_parts(basis: Basis | None) -> list[tuple[str, bytes]]:
    """(kind, bytes) of each part. basis: of all layers; None: plain keys."""
    if basis is None:
        return [(PLAIN_KIND, b"\1")]
    values = b"".join(t.cpu().contiguous().numpy().tobytes() for t in (basis.to_y, basis.to_z, basis.centre))
    count = -(-(_HEADER.size + len(values)) // PART_BYTES)
    data = _HEADER.pack(_MAGIC, count, *basis.centre.shape) + values
    parts = [data[at : at + PART_BYTES] for at in range(0, len(data), PART_BYTES)]
    return [(basis_kind(part), payload) for part, payload in enumerate(parts)]


def basis_kind(part: int) -> str:
    return f"{BASIS_KIND}.{part}" if part else BASIS_KIND


def part_count(first: bytes | bytearray) -> int:
    """How many parts the basis that begins with `first` has; 0: not a basis."""
    if len(first) < _HEADER.size:
        return 0
    magic, parts, *_ = _HEADER.unpack_from(first)
    return int(parts) if magic == _MAGIC else 0


def read_basis(data: bytearray, shape: tuple[int, int, int], device: torch.device) -> Basis:
    """The inverse of basis_parts; data: all parts, not changed after that. shape: layers, kv_heads, head_dim.

    Raises: ValueError for bytes that are not a basis of this shape.
    """
    if not part_count(data):
        raise ValueError(f"{len(data)} bytes that are not a basis")
    *found, dim = _HEADER.unpack_from(data)[2:]
    layers, kv_heads, head_dim = shape
    square = layers * kv_heads * head_dim * head_dim
    if (*found, dim) != shape or len(data) != _HEADER.size + 4 * (2 * square + square // head_dim):
        raise ValueError(f"a stored basis of {len(data)} bytes for {(*found, dim)}; the session has {shape}")
    values = torch.frombuffer(data, dtype=torch.float32, offset=_HEADER.size).to(device)
    to_y, to_z, centre = torch.split(values, [square, square, square // head_dim])
    return Basis(to_y.view(*shape, head_dim), to_z.view(*shape, head_dim), centre.view(shape))


class Sketches:
    """Records of all chunks, in a buffer that grows: uint8 [layers, kv_heads, capacity, chunk_bytes]; chunk c is at
    index c. `basis` has all layers; `plain` says that it is none."""

    # Chunks of head room at least: 4,096 tokens between growths; a sixteenth more once there are many.
    GROWTH_CHUNKS = 64

    def __init__(self, spec: SketchSpec, basis: Basis, plain: bool) -> None:
        self.spec, self.basis, self.plain = spec, basis, plain
        self.count = 0
        self.kind = basis.kind(spec)
        layers, kv_heads, _ = basis.centre.shape
        self.records = torch.empty(layers, kv_heads, 0, spec.chunk_bytes, dtype=torch.uint8, device=basis.centre.device)
        self._shared = False

    @property
    def bytes_per_chunk(self) -> int:
        """All layers."""
        return self.records.shape[0] * self.records.shape[1] * self.spec.chunk_bytes

    def layer_basis(self, layer: int) -> Basis:
        return Basis(self.basis.to_y[layer], self.basis.to_z[layer], self.basis.centre[layer])

    def make(self, keys: Tensor) -> Tensor:
        """keys: [chunks, layers, kv_heads, chunk_tokens, head_dim]. Returns what `put` takes."""
        return encode(self.spec, self.basis, keys)

    def put(self, first_chunk: int, packed: Tensor) -> None:
        """packed: uint8 [chunks, layers, kv_heads, chunk_bytes]."""
        end = first_chunk + packed.shape[0]
        assert first_chunk <= self.count, "sketches are put without a gap"
        if self._shared:
            self.records, self._shared = self.records.clone(), False
        capacity = self.records.shape[2]
        if end > capacity:
            more = max(end, capacity + max(self.GROWTH_CHUNKS, capacity // 16)) - capacity
            self.records = grown(self.records, more)
        self.records[:, :, first_chunk:end] = packed.permute(1, 2, 0, 3)
        self.count = max(self.count, end)

    def packed(self, first_chunk: int, end_chunk: int) -> Tensor:
        """What `put` was given for these chunks."""
        assert end_chunk <= self.count
        return self.records[:, :, first_chunk:end_chunk].permute(2, 0, 1, 3).contiguous()

    def truncate(self, count: int) -> None:
        """Forgets those of chunks from `count` on."""
        self.count = min(self.count, count)

    def fork(self) -> Sketches:
        """The same sketches for another session. Tensors are shared until one of the two puts more."""
        other = copy.copy(self)
        self._shared = other._shared = True
        return other

    def resident_bytes(self) -> int:
        basis = (self.basis.to_y, self.basis.to_z, self.basis.centre)
        return self.records.nbytes + (0 if self.plain else sum(t.nbytes for t in basis))
