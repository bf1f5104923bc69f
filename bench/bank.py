"""Which groups a bank should keep, and whether fetching ahead of the router would help: on recorded routes.

    python bench/bank.py ../shared/eval/routed_trace_sketch_8192.npz --record

A trace says what a model opened, [layers, kv_heads, steps, groups], packed as in shared/eval. Every KV head of every
layer has a bank of so many groups; what is missed enters, and what a policy thinks least of leaves, never a group of this
step. Shares are of all groups opened after 64 steps. `belady` knows the future: nothing does better.

Fetching ahead, beside an LRU bank: the share of misses that a guess made one layer or one step earlier would have had,
and how many guessed records come to one that was then opened. A guess is only worth its bytes if few are in vain.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import results

Mask = npt.NDArray[np.bool_]
Scores = npt.NDArray[np.float64]
WARM_STEPS = 64
HALF_LIVES = (4, 16, 64)  # steps


def load(path: Path) -> Mask:
    """[layers, kv_heads, steps, groups]."""
    with np.load(path) as file:
        return np.unpackbits(file["trace"], axis=-1).astype(bool).reshape(file["shape"])


class Policy:
    """scores of [banks, groups] after each step: the lowest leaves."""

    def __init__(self, opened: Mask) -> None:
        """opened: [steps, banks, groups]."""

    def scores(self, step: int, opened: Mask) -> Scores:
        raise NotImplementedError


class Lru(Policy):
    def __init__(self, opened: Mask) -> None:
        self._used: Scores = np.zeros(opened.shape[1:])

    def scores(self, step: int, opened: Mask) -> Scores:
        self._used[opened] = float(step + 1)
        return self._used


class Lrfu(Policy):
    """Every use counts, half as much after half_life steps: between frequency and recency."""

    half_life = 1

    def __init__(self, opened: Mask) -> None:
        self._worth: Scores = np.zeros(opened.shape[1:])

    def scores(self, step: int, opened: Mask) -> Scores:
        self._worth *= 0.5 ** (1 / self.half_life)
        self._worth += opened
        return self._worth


class Belady(Policy):
    def __init__(self, opened: Mask) -> None:
        steps = opened.shape[0]
        self._next = np.full((steps + 1, *opened.shape[1:]), 2 * steps, np.int32)
        for step in range(steps - 1, -1, -1):
            self._next[step] = np.where(opened[step], step, self._next[step + 1])

    def scores(self, step: int, opened: Mask) -> Scores:
        scores: Scores = -self._next[step + 1].astype(np.float64)
        return scores


def simulate(opened: Mask, slots: int, policy: Policy) -> tuple[float, Mask]:
    """Share of opened groups that the banks held, and what they held before each step. opened: [steps, banks, groups]."""
    held = np.zeros(opened.shape[1:], bool)
    before = np.zeros_like(opened)
    for step, now in enumerate(opened):
        before[step] = held
        held |= now
        scores = np.where(held, policy.scores(step, now), -np.inf)
        scores[now] = np.inf
        kept = np.argpartition(-scores, slots - 1, axis=1)[:, :slots]
        allowed = np.zeros_like(held)
        np.put_along_axis(allowed, kept, True, 1)
        held &= allowed | now
    late = slice(WARM_STEPS, None)
    return float((before[late] & opened[late]).sum() / opened[late].sum()), before


def ahead(trace: Mask, before: Mask) -> dict[str, dict[str, float]]:
    """before: what LRU banks held, in the shape of the trace."""
    missed = trace & ~before

    def judged(guessed: Mask) -> dict[str, float]:
        guessed = (guessed & ~before)[:, :, WARM_STEPS:]
        wanted = missed[:, :, WARM_STEPS:]
        used = int((guessed & wanted).sum())
        return {"misses_covered": used / int(wanted.sum()), "guessed_per_use": int(guessed.sum()) / max(1, used)}

    layer_before = np.zeros_like(trace)
    layer_before[1:] = missed[:-1].any(1, keepdims=True)
    same_head = np.zeros_like(trace)
    same_head[1:] = missed[:-1]
    step_before = np.zeros_like(trace)
    step_before[:, :, 1:] = trace[:, :, :-1]
    after = np.zeros_like(trace)
    after[..., 1:] = step_before[..., :-1]
    other_heads = step_before.any(1, keepdims=True) & np.ones_like(trace)
    return {
        "what any head of the layer before missed": judged(layer_before),
        "what the same head of the layer before missed": judged(same_head),
        "groups after those of the step before": judged(after),
        "what other heads opened a step before": judged(other_heads),
    }


def policies() -> dict[str, Callable[[Mask], Policy]]:
    found: dict[str, Callable[[Mask], Policy]] = {"lru": Lru, "belady": Belady}
    for half_life in HALF_LIVES:
        found[f"lrfu, half-life {half_life}"] = type("Lrfu", (Lrfu,), {"half_life": half_life})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--slots", default="32,64,128", help="groups of a bank, with commas")
    parser.add_argument("--record", action="store_true", help="append to bench/results/bank.jsonl")
    options = parser.parse_args()
    trace = load(options.trace)
    layers, kv_heads, steps, groups = trace.shape
    opened = np.ascontiguousarray(trace.reshape(layers * kv_heads, steps, groups).transpose(1, 0, 2))
    numbers: dict[str, dict[str, object]] = {"hits": {}, "ahead": {}}
    for slots in (int(s) for s in options.slots.split(",")):
        hits = {}
        for name, make in policies().items():
            hits[name], before = simulate(opened, slots, make(opened))
            if name == "lru":
                shaped = before.transpose(1, 0, 2).reshape(trace.shape)
                numbers["ahead"][str(slots)] = ahead(trace, shaped)
        numbers["hits"][str(slots)] = hits
        print(slots, json.dumps({n: round(h, 4) for n, h in hits.items()}))
        print("  ", json.dumps(numbers["ahead"][str(slots)]))
    if options.record:
        config = {"command": "python bench/bank.py " + " ".join(sys.argv[1:]), "trace": options.trace.name}
        results.append("bank", config, numbers)


if __name__ == "__main__":
    main()
