"""K and V in 8 bits: float8 e4m3, each record's K and V scaled by a power of two that travels inside them. Pure.

The scale is a power of two because e4m3 has an exponent of its own: a finer one would gain nothing but at the edges of
its range. Its exponent, one byte, is in the lowest bits of the first eight values, bit i in value i; these round to the
nearest code whose lowest bit is right, so that every byte of a record is a value like any other, a record is as many
bytes as it has values, and no number has to be kept, found or lost beside it. Values are never NaN or infinite.

    values   0.35  -1.2  0.02 ...  largest 1.2: times 2^8 = 307, below 448; times 2^9 would be above
    stored   e4m3 of the values times 2^8, with BIAS + 8 = 136 = 0b10001000 in the lowest bits of the first eight
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
# e4m3 of more than this would be NaN: 464 is where 448, the largest, ends.
ROUNDS_TO_LARGEST = 464.0
LARGEST_CODE = 0x7E
# Exponents of scales, -127 to 127, in a byte.
BIAS = 128


def pack(values: Tensor) -> Tensor:
    """values: [..., n], n >= 8, finite, of one scale. Returns uint8 of the same shape."""
    values = values.float()
    largest = values.abs().amax(-1)
    # 464 = 0.90625 * 2^9.
    fraction, exponent = torch.frexp(largest)
    exponent = torch.where(fraction <= ROUNDS_TO_LARGEST / 512, 9, 8) - exponent
    exponent = torch.where(largest > 0, exponent, 127).clamp(-127, 127)
    # In two steps: 2^127 is the largest of float32, and the smallest values want more than that.
    half = exponent // 2
    scaled = torch.ldexp(torch.ldexp(values, half[..., None]), (exponent - half)[..., None])
    codes = scaled.clamp(-448.0, 448.0).to(E4M3).view(torch.uint8)
    bits = ((exponent + BIAS)[..., None] >> torch.arange(8, device=values.device)) & 1
    codes[..., :8] = _nearest(scaled[..., :8], codes[..., :8], bits.to(torch.uint8))
    return codes


def unpack(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of pack. codes: uint8 [..., n]. Exact but for the rounding to dtype."""
    return (widened(codes) * scale(codes)[..., None]).to(dtype)


def widened(codes: Tensor) -> Tensor:
    """e4m3 bits, uint8, as float32 of the same shape. Four times as fast on a CPU as torch's own cast."""
    # They fit into a float16, whose exponent is biased by 8 more, subnormal ones too.
    wide = codes.to(torch.int16)
    return (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).view(torch.float16).float() * 256.0


def scale(codes: Tensor) -> Tensor:
    """What stored values are multiplied by, float32 [...]; codes: uint8 [..., n], or their first eight."""
    places = torch.arange(8, device=codes.device)
    exponent = ((codes[..., :8] & 1).int() << places).sum(-1)
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), BIAS - exponent)


def _nearest(values: Tensor, codes: Tensor, bits: Tensor) -> Tensor:
    """The codes, or where their lowest bit is not the wanted one the nearer neighbour's. Codes are sign and magnitude."""
    sign, size = codes & 0x80, (codes & 0x7F).int()
    below = torch.where(size > 0, size - 1, 1)
    above = torch.where(size < LARGEST_CODE, size + 1, LARGEST_CODE - 1)
    apart = [(n.to(torch.uint8).view(E4M3).float() - values.abs()).abs() for n in (below, above)]
    moved = torch.where(apart[0] <= apart[1], below, above)
    return torch.where((codes & 1) == bits, size, moved).to(torch.uint8) | sign
