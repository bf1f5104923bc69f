"""The hot path in C (native.c), called with arrays. Each function here has a twin, which its caller uses where `LIBRARY` is
None; STATE says why it is."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import numpy.typing as npt
from hga_kvd_proto.native import load

from hga_kvd.memory import address_of

U8 = npt.NDArray[np.uint8]
I64 = npt.NDArray[np.int64]

VERSION = 1  # as in native.c

# Fewer bytes are copied in less time than another thread needs to take the interpreter's lock and give it back.
HELD_BYTES_MAX = 256 << 10

LIBRARY, STATE = load(Path(__file__).parent, VERSION)

_address, _number = ctypes.c_void_p, ctypes.c_int64
_ARGUMENTS = {
    "gather": (_address, _number, _address, _number, _number, _address, _number),
}
for _library in LIBRARY or ():
    for _name, _types in _ARGUMENTS.items():
        _function = getattr(_library, f"hga_kvd_{_name}")
        _function.restype, _function.argtypes = _number, _types


def gather(source: U8, starts: I64, size: int, destination: U8) -> None:
    """Copies `size` bytes from each of `starts` in `source`, one behind the other, into `destination`."""
    assert LIBRARY is not None
    call = (LIBRARY.held if len(starts) * size <= HELD_BYTES_MAX else LIBRARY.free).hga_kvd_gather
    done = call(
        address_of(source),
        len(source),
        address_of(starts),
        len(starts),
        size,
        address_of(destination),
        len(destination),
    )
    assert done == len(starts), f"record {done} of {len(starts)} lies outside the arena or the destination"
