"""The fast lane's memory, as both ends see it: a request ring and a completion ring of one client, and the wait between.

docs/fastlane.md is the contract. What is always true:
- Each word and each slot has one writer. A side publishes by writing its slot, then its counter, then ringing its
  doorbell; it reads what the other published only after it has seen that counter move.
- That is enough on x86-64 (total store order: stores stay in order, loads stay in order) with plain loads and stores of
  aligned 8-byte words, which is what `memoryview.cast("Q")` does. Elsewhere it is not: there is no lane there.
- The doorbell is rung unless the other side says that it is awake. That needs a fence between a store and a load, which
  even x86-64 reorders and Python cannot ask for: only native.c says so. The twins in Python are rung always.
- No ring of the daemon's can block, whatever the client does to the descriptors: one thread answers many clients. Hence
  the completion bell is a socket, written with MSG_DONTWAIT; one that is full has rung.
"""

from __future__ import annotations

import platform
import struct

VERSION = 2

FETCH, APPEND, PREFETCH = 1, 2, 3

# sequence, verb, body_bytes, session_id, epoch, offset, bytes, first_chunk, chunk_count, deadline_us
REQUEST = struct.Struct("<QIIQQQQQII")
# sequence, code, body_bytes, chunk_count, ram_records, nvme_records
COMPLETION = struct.Struct("<QIIQII")

# The completion counter of a lane whose thread has ended: nothing that was posted there is under way any more.
CLOSED = (1 << 64) - 1
# Requests a client may have under way.
SLOT_COUNT = 8
HEADER_BYTES = 64
# Keys of a fetch, or token ids of an append. 8,184 keys of 8 KiB are all that the default landing takes, twice.
REQUEST_BODY_BYTES = (64 << 10) - HEADER_BYTES
# A status for each of those keys, or the name and the sentence of a refusal.
COMPLETION_BODY_BYTES = (12 << 10) - HEADER_BYTES
FETCH_KEYS_MAX = REQUEST_BODY_BYTES // 8

_REQUEST_BYTES = HEADER_BYTES + REQUEST_BODY_BYTES
_COMPLETION_BYTES = HEADER_BYTES + COMPLETION_BODY_BYTES
# The counters have a cache line and more each: the two sides do not fight for one.
REQUESTS_POSTED, COMPLETIONS_POSTED = 0, 128
# Of a counter's own: whether who waits for it looks at it now, and need not be rung.
_AWAKE_AFTER = 256
_REQUESTS_AT = 4096
_COMPLETIONS_AT = _REQUESTS_AT + SLOT_COUNT * _REQUEST_BYTES
LANE_BYTES = _COMPLETIONS_AT + SLOT_COUNT * _COMPLETION_BYTES

# How long a wait looks at the counter before it blocks. A fetch of a few records from RAM takes 20 to 30 us; a thread
# that sleeps is woken in 10 to 50 us on the machines we saw. A decode step asks again after some 150 us, one layer later:
# on an H100 box with 16 cores, 48 fetches took 2.1 ms with 400 us, 2.5 with 100 (ADR 0022).
SPIN_S = 400e-6

assert COMPLETION_BODY_BYTES >= FETCH_KEYS_MAX
assert max(REQUEST.size, COMPLETION.size) <= HEADER_BYTES


def supported() -> bool:
    """Whether the memory order of this machine is the one that the lane needs."""
    return platform.machine() == "x86_64"


def awake_at(counter: int) -> int:
    """Where the side that waits for this counter says 1 while it is awake. Whoever says nothing is rung always."""
    return counter + _AWAKE_AFTER


def request_at(sequence: int) -> int:
    """Where the slot of this request lies. Sequences start at 0."""
    return _REQUESTS_AT + sequence % SLOT_COUNT * _REQUEST_BYTES


def completion_at(sequence: int) -> int:
    return _COMPLETIONS_AT + sequence % SLOT_COUNT * _COMPLETION_BYTES
