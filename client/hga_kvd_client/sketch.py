"""Sketches: a few bits of every key, in the coordinates that matter to the queries. Pure tensor maths; nothing here
knows sessions, files or transports. DESIGN section 6.

A *basis* per KV head maps keys and queries so that z . y = q . k (up to rounding of float32), and so that the leading
coordinates of y carry almost all of it: y = U^T A (k - mean), z = U^T A^-1 q, with A = S_q^(1/2) from the second
moment of the queries and U the eigenvectors of the covariance of A k, largest first. Coordinates are scaled to unit
variance, z inversely. The mean key adds one number per query, `z . centre`, which is kept apart.

A *record* is the sketch of one chunk of one KV head, `SketchSpec.chunk_bytes` bytes:

    codes   [groups_per_chunk] x ( [dims4][group_tokens / 2], then [dims2][group_tokens / 4] )
    mean    [blocks][head_dim]  float8 e4m3
    step    [blocks][dims4 + dims2]  float8 e4m3

Coordinates 0 .. dims4-1 have 4 bits, the next dims2 have 2, the others none. The 16 tokens of a group are adjacent: in
a coordinate's 4-bit row token t is in byte t mod 8, its bits from 4 (t div 8) on; in a 2-bit row in byte t mod 4, its
bits from 2 (t div 4) on (group_tokens = 16). A block is what shares mean and step: the chunk (blocks = 1), or, in the
fallback of *plain* 2-bit keys without a basis, each group. The value of code c is mean + step (c - 2^(bits-1) + 1/2);
of a coordinate without bits, the mean.
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hga_kvd_client import native
from hga_kvd_client.float8 import widened

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0
# Relative to the mean eigenvalue of S_q: what queries never use still gets a place at the end.
RIDGE = 1e-4
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class SketchSpec:
    """What fixes the bytes of a record. blocks: 1, or groups_per_chunk; see the module."""

    head_dim: int
    dims4: int
    dims2: int
    chunk_tokens: int = 64
    group_tokens: int = 16
    blocks: int = 1

    def __post_init__(self) -> None:
        assert 0 < self.kept <= self.head_dim
        assert self.dims4 >= 0
        assert self.dims2 >= 0
        assert self.group_tokens % 4 == 0, "four codes of 2 bits share a byte"
        assert self.chunk_tokens % self.group_tokens == 0
        assert self.blocks in (1, self.groups_per_chunk)

    @classmethod
    def of_basis(cls, head_dim: int, chunk_tokens: int = 64, group_tokens: int = 16) -> SketchSpec:
        """The default: the first quarter of the coordinates in 4 bits, the second in 2, per chunk."""
        return cls(head_dim, head_dim // 4, head_dim // 4, chunk_tokens, group_tokens)

    @classmethod
    def plain(cls, head_dim: int, chunk_tokens: int = 64, group_tokens: int = 16) -> SketchSpec:
        """The fallback without a basis: all dims of the key in 2 bits, mean and step per group."""
        return cls(head_dim, 0, head_dim, chunk_tokens, group_tokens, chunk_tokens // group_tokens)

    @property
    def kept(self) -> int:
        return self.dims4 + self.dims2

    @property
    def groups_per_chunk(self) -> int:
        return self.chunk_tokens // self.group_tokens

    @property
    def group_bytes(self) -> int:
        """Codes of one group."""
        return self.group_tokens * (2 * self.dims4 + self.dims2) // 4

    @property
    def mean_offset(self) -> int:
        return self.groups_per_chunk * self.group_bytes

    @property
    def step_offset(self) -> int:
        return self.mean_offset + self.blocks * self.head_dim

    @property
    def chunk_bytes(self) -> int:
        return self.step_offset + self.blocks * self.kept

    @property
    def planes(self) -> tuple[tuple[int, int, int], ...]:
        """(bits, first coordinate, end) of what has codes."""
        return tuple(p for p in ((4, 0, self.dims4), (2, self.dims4, self.kept)) if p[2] > p[1])

    def text(self) -> str:
        """Canonical; part of what names the kind of stored sketches."""
        return (
            f"{self.head_dim} dims: {self.dims4} x 4 bits, {self.dims2} x 2 bits, {self.blocks} blocks, "
            f"{self.chunk_tokens}/{self.group_tokens} tokens"
        )


class Moments:
    """Sums of q q^T, k k^T and k over the tokens seen, per KV head: all that a basis needs. float64.

    q, k: [kv_heads, head_dim, head_dim]; k_sum: [kv_heads, head_dim].
    """

    def __init__(self, kv_heads: int, head_dim: int, device: torch.device) -> None:
        self.queries = self.tokens = 0
        self.q = torch.zeros(kv_heads, head_dim, head_dim, dtype=torch.float64, device=device)
        self.k = torch.zeros_like(self.q)
        self.k_sum = torch.zeros(kv_heads, head_dim, dtype=torch.float64, device=device)

    def add(self, q: Tensor, k: Tensor) -> None:
        """q: [kv_heads, ratio, tokens, head_dim]; k: [kv_heads, tokens, head_dim]; after RoPE."""
        q, k = q.flatten(1, 2).double(), k.double()
        self.queries += q.shape[1]
        self.tokens += k.shape[1]
        self.q += q.transpose(1, 2) @ q
        self.k += k.transpose(1, 2) @ k
        self.k_sum += k.sum(1)


@dataclass(frozen=True)
class Basis:
    """float32. to_y, to_z: [..., kv_heads, head_dim, head_dim]; centre: [..., kv_heads, head_dim].

    y = to_y k - centre, z = to_z q, and z . (y + centre) = q . k. to_y is used once a chunk, and may stay in the
    host's memory.
    """

    to_y: Tensor
    to_z: Tensor
    centre: Tensor

    @classmethod
    def of(cls, moments: Moments) -> Basis:
        """Of one layer. Decomposed on the CPU in float64, so that it does not depend on the device."""
        device = moments.q.device
        s_q = moments.q.cpu() / max(1, moments.queries)
        s_k, mean = (moment.cpu() / max(1, moments.tokens) for moment in (moments.k, moments.k_sum))
        eye = torch.eye(s_q.shape[-1], dtype=torch.float64)
        mean_eigenvalue = s_q.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        s_q = s_q + torch.where(mean_eigenvalue > 0, RIDGE * mean_eigenvalue, 1.0) * eye
        values, vectors = torch.linalg.eigh(s_q)
        root = values.clamp_min(1e-300).sqrt()
        a = vectors * root[:, None] @ vectors.transpose(1, 2)
        a_inverse = vectors / root[:, None] @ vectors.transpose(1, 2)

        covariance = s_k - mean[:, :, None] * mean[:, None]
        values, u = torch.linalg.eigh(a @ covariance @ a)
        values, u_t = values.flip(1), u.flip(2).transpose(1, 2)
        # Unit variance, so that mean and step fit in 8 bits for any model; a coordinate that hardly varies stays small.
        spread = values.clamp_min(0).sqrt()
        largest = spread[:, :1]
        spread = torch.where(largest > 0, torch.maximum(spread, 1e-4 * largest), 1.0)
        to_y = u_t @ a / spread[:, :, None]
        to_z = u_t @ a_inverse * spread[:, :, None]
        centre = (to_y @ mean[:, :, None]).squeeze(2)
        return cls(*(t.float().to(device) for t in (to_y, to_z, centre)))

    @classmethod
    def none(cls, kv_heads: int, head_dim: int, device: torch.device) -> Basis:
        """Of plain keys: coordinates are the key's own dims."""
        eye = torch.eye(head_dim, device=device).expand(kv_heads, head_dim, head_dim)
        return cls(eye, eye, torch.zeros(kv_heads, head_dim, device=device))

    def project(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Queries as sketches want them: z [kv_heads, queries, head_dim] and z . centre [kv_heads, queries].

        q: [kv_heads, queries, head_dim], scaled already (1 / sqrt(head_dim)). One layer's basis. float32.
        """
        z = torch.bmm(q.float(), self.to_z.transpose(1, 2))
        return z, (z * self.centre[:, None]).sum(2)

    def kind(self, spec: SketchSpec) -> str:
        """What sketches made with it are stored as: `sketch.v1:` and 8 hex digits of basis and spec."""
        digest = hashlib.sha256(spec.text().encode())
        for tensor in (self.to_y, self.to_z, self.centre):
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
        return f"sketch.v1:{digest.hexdigest()[:8]}"


def encode(spec: SketchSpec, basis: Basis, keys: Tensor) -> Tensor:
    """Records of whole chunks. keys: [..., kv_heads, chunk_tokens, head_dim], after RoPE; leading dims as in the basis,
    or more. Returns uint8 [..., kv_heads, chunk_bytes]."""
    y = keys.float() @ basis.to_y.to(keys.device).transpose(-1, -2) - basis.centre[..., None, :]
    lead = y.shape[:-2]
    blocks = y.view(*lead, spec.blocks, spec.chunk_tokens // spec.blocks, spec.head_dim)
    mean = _float8(blocks.mean(-2))
    # Codes are relative to the mean and the step as they are stored, so rounding those costs range, not accuracy.
    apart = blocks - mean.float()[..., None, :]
    largest = apart[..., : spec.kept].abs().amax(-2)
    groups, step = [], []
    for bits, first, end in spec.planes:
        plane_step = _float8(largest[..., first:end] / (2 ** (bits - 1) - 0.5))
        codes = apart[..., first:end] / plane_step.float().clamp_min(2.0**-10)[..., None, :]
        codes = (codes.floor() + 2 ** (bits - 1)).clamp(0, 2**bits - 1).to(torch.uint8)
        codes = codes.view(*lead, spec.groups_per_chunk, spec.group_tokens, end - first).transpose(-1, -2)
        groups.append(_pack(codes, bits).flatten(-2))
        step.append(plane_step)
    parts = (torch.cat(groups, -1).flatten(-2), mean.flatten(-2), torch.cat(step, -1).flatten(-2))
    return torch.cat([part.view(torch.uint8) for part in parts], -1)


def log_mass(spec: SketchSpec, z: Tensor, offset: Tensor, records: Tensor) -> Tensor:
    """Log of the attention mass of every group for every query, as the sketch sees it: logsumexp over its tokens of
    z . y + offset. In C where that is built and serves.

    z, offset: as Basis.project returned them, [kv_heads, queries, head_dim] and [kv_heads, queries]; records: uint8
    [kv_heads, chunks, chunk_bytes]. Returns [kv_heads, queries, chunks * groups_per_chunk], float32.
    """
    served = records.device.type == "cpu" and spec.group_tokens == 16 and spec.head_dim <= native.DIMS_MAX
    if native.LIBRARY is None or not served:
        return log_mass_twin(spec, z, offset, records)
    return native.log_mass(sizes(spec), z, offset, records)


@functools.cache
def sizes(spec: SketchSpec) -> native.Spec:
    """As C knows them."""
    return native.Spec(
        spec.head_dim, spec.dims4, spec.dims2, spec.groups_per_chunk, spec.blocks, native.FLOAT8.data_ptr()
    )


def log_mass_twin(spec: SketchSpec, z: Tensor, offset: Tensor, records: Tensor) -> Tensor:
    """As log_mass, in PyTorch on any device; of C and of the GPU's kernel.

    Keys are not decoded: codes times their steps meet z, and what all tokens of a block share is added once. No tensor is
    larger than the scores or the codes as float32.
    """
    kv_heads, chunks, _ = records.shape
    blocks, groups = chunks * spec.blocks, chunks * spec.groups_per_chunk
    small = widened(records[..., spec.mean_offset :])
    mean = small[..., : spec.blocks * spec.head_dim].reshape(kv_heads, blocks, spec.head_dim)
    step = small[..., spec.blocks * spec.head_dim :].reshape(kv_heads, blocks, spec.kept).transpose(1, 2).contiguous()
    shared = torch.bmm(z, mean.transpose(1, 2))
    for bits, first, end in spec.planes:
        shared -= (2 ** (bits - 1) - 0.5) * torch.bmm(z[..., first:end], step[:, first:end])
    codes = _unpack(spec, records).float()
    codes.view(kv_heads, spec.kept, blocks, -1).mul_(step[..., None])
    scores = torch.bmm(z[..., : spec.kept], codes.flatten(2)).view(kv_heads, z.shape[1], groups, spec.group_tokens)
    masses = scores.logsumexp(3).view(kv_heads, z.shape[1], blocks, -1) + shared[..., None]
    return masses.flatten(2) + offset[..., None]


def _float8(values: Tensor) -> Tensor:
    """Saturates: torch turns what is too large into NaN."""
    return values.clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """codes: uint8 [..., n]. Returns uint8 [..., n * bits / 8]: byte j holds codes j, j + n * bits / 8, ... from low
    bits to high."""
    fields = codes.reshape(*codes.shape[:-1], 8 // bits, -1)
    packed = fields[..., 0, :].clone()
    for field in range(1, 8 // bits):
        packed |= fields[..., field, :] << (bits * field)
    return packed


def _unpack(spec: SketchSpec, records: Tensor) -> Tensor:
    """Codes, uint8 [kv_heads, kept, groups, group_tokens]. Words are taken apart whole, not byte by byte."""
    kv_heads, chunks, _ = records.shape
    by_group = records[..., : spec.mean_offset].view(kv_heads, chunks, spec.groups_per_chunk, spec.group_bytes)
    shape = (kv_heads, spec.kept, chunks * spec.groups_per_chunk, spec.group_tokens)
    codes = torch.empty(shape, dtype=torch.uint8, device=records.device)
    offset_bytes = 0
    for bits, first, end in spec.planes:
        row_bytes = spec.group_tokens * bits // 8
        plane_bytes = (end - first) * row_bytes
        packed = _in_rows(by_group[..., offset_bytes : offset_bytes + plane_bytes], row_bytes)
        mask = int.from_bytes(bytes([2**bits - 1]) * packed.itemsize, "little")
        for field in range(8 // bits):
            row = codes[:, first:end, :, field * row_bytes : (field + 1) * row_bytes].view(packed.dtype)
            torch.bitwise_and(packed >> (bits * field) if field else packed, mask, out=row)
        offset_bytes += plane_bytes
    return codes


def _in_rows(packed: Tensor, row_bytes: int) -> Tensor:
    """Rows of all groups, coordinate by coordinate: [kv_heads, chunks, groups_per_chunk, dims * row_bytes] to [kv_heads,
    dims, groups, words].

    A word is the longest whole number that rows are made of: to put these in order takes a tenth of the time of bytes.
    """
    size = math.gcd(row_bytes, 8)
    if packed.storage_offset() % size or any(stride % size for stride in packed.stride()[:-1]):
        packed = packed.clone(memory_format=torch.contiguous_format)
    words = packed.view(_WORDS[size]).view(*packed.shape[:3], -1, row_bytes // size).permute(0, 3, 1, 2, 4)
    rows = torch.empty(words.shape, dtype=words.dtype, device=words.device)
    return rows.copy_(words).flatten(2, 3)
