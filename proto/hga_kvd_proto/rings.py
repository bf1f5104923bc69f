"""The structures of native.c and its calls, as ctypes sees them. What each field is stands there.

A structure holds addresses: whoever makes one keeps the memory mapped and the descriptors open as long as it is used.
"""

from __future__ import annotations

import ctypes

from hga_kvd_proto import native

MOVED, TIME_IS_UP, ALARMED, INTERRUPTED = range(4)
LOOK_AGAIN = -1

LIBRARY = native.LIBRARY


class EndWords(ctypes.Structure):
    _fields_ = (
        ("posted", ctypes.c_void_p),
        ("completed", ctypes.c_void_p),
        ("awake", ctypes.c_void_p),
        ("other_awake", ctypes.c_void_p),
        ("other_bell", ctypes.c_int32),
        ("bell", ctypes.c_int32),
        ("alarm", ctypes.c_int32),
        ("quick", ctypes.c_int32),
        ("unread", ctypes.c_int32),
        ("unused", ctypes.c_int32),
        ("spin_ns", ctypes.c_int64),
    )


class LaneWords(ctypes.Structure):
    _fields_ = (
        ("posted", ctypes.c_void_p),
        ("awake", ctypes.c_void_p),
        ("served", ctypes.c_uint64),
        ("busy", ctypes.c_uint64),
    )


class LeaderWords(ctypes.Structure):
    _fields_ = (
        ("lanes", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("roused", ctypes.c_void_p),
        ("heard", ctypes.c_uint64),
        ("since_ns", ctypes.c_int64),
        ("waited_ns", ctypes.c_int64),
        ("spin_ns", ctypes.c_int64),
        ("crowded_ns", ctypes.c_int64),
        ("epoll", ctypes.c_int32),
        ("looks", ctypes.c_int32),
        ("crowded", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )


if LIBRARY is not None:
    for _library in LIBRARY:
        _library.hga_kvd_exchange.argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64)
        _library.hga_kvd_wait.argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int64)
        _library.hga_kvd_lead.argtypes = (ctypes.c_void_p,)
        _library.hga_kvd_publish.argtypes = (ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_int32)
        for _name in ("exchange", "wait", "lead"):
            getattr(_library, f"hga_kvd_{_name}").restype = ctypes.c_int64
        _library.hga_kvd_publish.restype = None
