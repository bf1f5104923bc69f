"""Traces: which groups a model opened at each decode step, and what of that a bank in front leaves to be fetched.

A trace is bool [layers, kv_heads, steps, groups]. In a file (.npz) it is `trace`, the same with the groups packed eight to
a byte by numpy.packbits, and `shape`, the four sizes.
"""

from __future__ import annotations

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from hga_kvd_client.geometry import KEY_DTYPE, Keys

Trace = npt.NDArray[np.bool_]

# A step's fetches are simulated before they are made, and the whole trace is unpacked: this many bytes at most.
TRACE_BYTES_MAX = 4 << 30
# How much of a group's passing worth stays from step to step, and its weight beside the lasting one.
PASSING_KEPT, PASSING_WEIGHT = 0.8, 1.0


class TraceInvalid(Exception):
    """The file is not a trace; the text says what it lacks."""


def read_trace(path: Path) -> Trace:
    """Raises: TraceInvalid, OSError."""
    try:
        zipfile.ZipFile(path).close()  # numpy would take what is none for an array of its own, or for a pickle
        with np.load(path, allow_pickle=False) as file:
            packed, sizes = file["trace"], file["shape"]
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
        raise TraceInvalid(f"{path} is not a trace: {error}") from error
    if packed.dtype != np.uint8 or packed.ndim != 4:
        raise TraceInvalid(f"{path}: `trace` must be uint8 of 4 dimensions")
    if sizes.dtype.kind not in "iu" or sizes.shape != (4,) or sizes.min() < 1:
        raise TraceInvalid(f"{path}: `shape` must be four integers from 1 on")
    shape = tuple(sizes.tolist())
    if packed.shape != (*shape[:3], -(-shape[3] // 8)):
        raise TraceInvalid(f"{path}: `trace` has shape {packed.shape}, which is not {shape} with 8 groups to a byte")
    if math.prod(shape) > TRACE_BYTES_MAX:
        raise TraceInvalid(f"{path}: {shape} unpacked is over {TRACE_BYTES_MAX} bytes")
    return np.unpackbits(packed, axis=-1, count=shape[3]).astype(bool)


def synthetic_trace(
    layers: int = 16, kv_heads: int = 4, steps: int = 256, groups: int = 512, opened: int = 16, seed: int = 0
) -> Trace:
    """A stand-in for a model: each group has a lasting worth and a passing one, and the best of a layer are opened.

    opened: groups a KV head on average. The weights are chosen so that an LRU bank of 64 groups per KV head answers
    0.87 of them, as for SmolLM2-135M, and the KV heads of a layer share its budget unevenly, as there.
    """
    chance = np.random.default_rng(seed)
    shape = (layers, kv_heads, groups)
    lasting = chance.standard_normal(shape) + 0.5 * chance.standard_normal((layers, kv_heads, 1))
    passing = chance.standard_normal(shape)
    trace = np.zeros((layers, kv_heads, steps, groups), bool)
    keep, renew = np.sqrt(PASSING_KEPT), np.sqrt(1 - PASSING_KEPT)
    for step in range(steps):
        passing = keep * passing + renew * chance.standard_normal(shape)
        worth = (lasting + PASSING_WEIGHT * passing).reshape(layers, -1)
        best = np.argpartition(worth, -opened * kv_heads)[:, -opened * kv_heads :]
        of_step = np.zeros((layers, kv_heads * groups), bool)
        np.put_along_axis(of_step, best, True, axis=1)
        trace[:, :, step] = of_step.reshape(shape)
    return trace


@dataclass(frozen=True)
class Misses:
    """What the bank leaves. keys: of all fetches, in order; fetch f is keys[starts[f]:starts[f + 1]], step steps[f].

    A fetch is one layer of one step; layers without a miss make none. hit_rate: share of opened groups in the bank.
    """

    keys: Keys
    starts: npt.NDArray[np.int64]
    steps: npt.NDArray[np.int64]
    hit_rate: float

    @property
    def fetches(self) -> list[Keys]:
        return [self.keys[a:b] for a, b in zip(self.starts[:-1], self.starts[1:], strict=True)]


def bank_misses(trace: Trace, bank_groups: int, warm_up_steps: int) -> Misses:
    """Runs the trace past an LRU bank of bank_groups per KV head and layer; the first steps only fill it.

    As the client's bank does it: the groups opened last stay; of those opened in the same step, the ones that were in.
    """
    layers, kv_heads, steps, groups = trace.shape
    used_at = np.full((layers, kv_heads, groups), -1, np.int64)  # twice the step, and 1 if it was in the bank before
    resident = np.zeros((layers, kv_heads, groups), bool)
    parts: list[Keys] = []
    of_step: list[int] = []
    opened_count = miss_count = 0
    for step in range(steps):
        opened = trace[:, :, step]
        missed = opened & ~resident
        used_at[opened] = 2 * step + resident[opened]
        resident |= opened
        if bank_groups < groups:
            order = np.where(resident, used_at, -1)
            out = np.argpartition(order, groups - bank_groups, axis=-1)[..., : groups - bank_groups]
            np.put_along_axis(resident, out, False, axis=-1)
        if step < warm_up_steps:
            continue
        opened_count += int(np.count_nonzero(opened))
        miss_count += int(np.count_nonzero(missed))
        for layer in np.flatnonzero(missed.any((1, 2))):
            heads, found = missed[layer].nonzero()
            keys = np.empty(len(heads), KEY_DTYPE)
            keys["layer"], keys["kv_head"], keys["group"] = layer, heads, found
            parts.append(keys)
            of_step.append(step)
    return Misses(
        keys=np.concatenate(parts) if parts else np.empty(0, KEY_DTYPE),
        starts=np.cumsum([0, *map(len, parts)]),
        steps=np.array(of_step, np.int64),
        hit_rate=1 - miss_count / max(1, opened_count),
    )
