"""How K/V bytes are packed for a file that leaves the store: as they are, or as zstd of byte planes. Pure.

Never in the fetch path: zstd gives 1.45x on real K/V in bf16, 1.19x in fp32, and unpacks slower than a disk reads
(ADR 0011). The gain is in the exponent bytes, which repeat; so bytes of equal significance are laid side by side before
zstd sees them:

    bf16, little-endian: m0 e0 m1 e1 m2 e2 ...  ->  m0 m1 m2 ... e0 e1 e2 ...
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import zstandard

CodecName = Literal["raw", "zstd"]
CODECS: tuple[CodecName, ...] = get_args(CodecName)  # a codec's number on disk is its position here

# Level 3 is 2.6 times slower on K/V and packs it worse, 1.40x instead of 1.45x (bench/codec.py).
ZSTD_LEVEL = 1


class BadCode(Exception):
    """Bytes that the codec did not make."""


def pack(codec: CodecName, raw: bytes, element_bytes: int) -> bytes:
    """element_bytes: of one number of the K/V's dtype; 1 for bytes of no structure. May be larger than `raw`."""
    if codec == "raw":
        return raw
    return zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(to_planes(raw, element_bytes))


def unpack(codec: CodecName, packed: bytes, raw_bytes: int, element_bytes: int) -> bytes:
    """Exactly raw_bytes bytes, and no more memory than they take, whatever `packed` is. Raises BadCode."""
    raw = packed if codec == "raw" else _unzstd(packed, raw_bytes)
    if len(raw) != raw_bytes:
        raise BadCode(f"{len(raw)} bytes where {raw_bytes} were packed")
    return raw if codec == "raw" else from_planes(raw, element_bytes)


def _unzstd(packed: bytes, raw_bytes: int) -> bytes:
    try:
        if zstandard.frame_content_size(packed) != raw_bytes:
            raise BadCode(f"a zstd frame that does not say {raw_bytes} bytes")
        return zstandard.ZstdDecompressor().decompress(packed, max_output_size=raw_bytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise BadCode(f"not a zstd frame ({error})") from None


def to_planes(raw: bytes, element_bytes: int) -> bytes:
    """Byte 0 of all elements, then byte 1 of all, and so on; what is left of a last element stays at the end."""
    elements, rest = _elements(raw, element_bytes)
    if element_bytes == 1 or not len(elements):
        return raw
    planes = np.empty((element_bytes, len(elements)), np.uint8)
    for i in range(element_bytes):  # a loop over planes: numpy's own transposition of narrow arrays is 10 times slower
        planes[i] = elements[:, i]
    return planes.tobytes() + rest


def from_planes(planes: bytes, element_bytes: int) -> bytes:
    """What to_planes was given."""
    elements, rest = _elements(planes, element_bytes)
    if element_bytes == 1 or not len(elements):
        return planes
    source = elements.reshape(element_bytes, -1)
    raw = np.empty((len(elements), element_bytes), np.uint8)
    for i in range(element_bytes):
        raw[:, i] = source[i]
    return raw.tobytes() + rest


def _elements(data: bytes, element_bytes: int) -> tuple[npt.NDArray[np.uint8], bytes]:
    whole = len(data) // element_bytes * element_bytes
    return np.frombuffer(data, np.uint8, whole).reshape(-1, element_bytes), data[whole:]
