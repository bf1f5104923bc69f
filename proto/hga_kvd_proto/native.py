"""Native code: finds the C library beside a package, and this package's own.

A library is used whole or not at all: where it was not built, is of another version than the Python beside it, or
HGA_KVD_NATIVE=off, its twin in Python does the same work. That variable is the one that is read here and not in a
`__main__`: client and daemon both obey it, and it is the way around a compiler's bug.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import NamedTuple

VERSION = 2  # as in native.c


class Native(NamedTuple):
    """free: calls that let go of the interpreter's lock. held: calls too short for that."""

    free: ctypes.CDLL
    held: ctypes.PyDLL


def load(directory: Path, version: int) -> tuple[Native | None, str]:
    """The library in a package's directory and "on"; or None, and "off: " with the reason."""
    if os.environ.get("HGA_KVD_NATIVE", "").lower() in ("off", "0", "no", "false"):
        return None, "off: HGA_KVD_NATIVE says so"
    path = directory / "_native.abi3.so"
    if not path.exists():
        return None, "off: not built: `make native` in a checkout, or install again where there is a C compiler"
    try:
        native = Native(ctypes.CDLL(str(path), use_errno=True), ctypes.PyDLL(str(path)))
        built = native.held.hga_kvd_version()
    except (OSError, AttributeError) as error:
        return None, f"off: cannot be loaded: {error}"
    if built != version:
        return None, f"off: built from version {built}, this is {version}: `make native`, or install again"
    return native, "on"


LIBRARY, STATE = load(Path(__file__).parent, VERSION)
