"""One decode step on a GPU, K/V in a real daemon's RAM: routing, synchronisation, fetch, copy, attention, total.

    python bench/decode_gpu.py --record                 # an NVIDIA GPU; geometry of Qwen3-30B-A3B, 16 K to 256 K tokens
    python bench/decode_gpu.py --smoke                  # CPU, twins, tiny: that this still runs

Beside it in the same run: dense attention over K/V that lies on the GPU, the faster of torch's and our own kernel, and
the naive path, which gathers the same groups from pageable memory and copies them. All are sums over the layers of one
token, batch 1, medians over steps; the model's own work is not in them.

K/V is synthetic: normal with a spectrum that falls by 20 from the first to the last dim. Queries are a random walk,
q' = rho q + sqrt(1 - rho^2) noise, with the rho for which the bank answers the share of opened groups that --hits asks
for: what a bank holds is decided by routing alone, never set by hand.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import results
import torch
import torch.nn.functional as F
from hga_kvd_client.connection import Connection
from hga_kvd_client.decode_step import PART_KEYS, DecodeStep, SketchState
from hga_kvd_client.geometry import Geometry
from hga_kvd_client.kernels import CONTROL_SIZE, WINDOW_TOKENS, attention
from hga_kvd_client.sketch import Basis, Moments, SketchSpec, encode
from torch import Tensor

SINK_CHUNKS, RECENT_CHUNKS, BANK_GROUPS, GROUPS_PER_HEAD = 2, 8, 128, 16
MIB = 1 << 20
PHASES = ("total", "launch", "sync", "fetch")


class Sequence:
    """A session of `chunks` chunks in the daemon, and on the device what a client keeps of it."""

    def __init__(
        self, connection: Connection, geometry: Geometry, ratio: int, chunks: int, device: torch.device
    ) -> None:
        self.connection, self.geometry, self.ratio, self.chunks, self.device = (
            connection,
            geometry,
            ratio,
            chunks,
            device,
        )
        layers, kv_heads, dim = geometry.layers, geometry.kv_heads, geometry.head_dim
        self.dtype = getattr(torch, geometry.dtype)
        self.spec = SketchSpec.of_basis(dim)
        self.spectrum = torch.logspace(0.65, -0.65, dim, device=device)
        self.session_id = connection.open("", geometry).session_id
        of_layers = [self._basis() for _ in range(layers)]
        stacked = Basis(*(torch.stack([getattr(b, name) for b in of_layers]) for name in ("to_y", "to_z", "centre")))
        self.to_z, self.centre = stacked.to_z, stacked.centre
        self.records = torch.empty(layers, kv_heads, chunks, self.spec.chunk_bytes, dtype=torch.uint8, device=device)
        part = max(1, connection.append_bytes_max() // geometry.chunk_bytes)
        shape = (layers, kv_heads, geometry.groups_per_chunk, 2, geometry.group_tokens, dim)
        for first in range(0, chunks, part):
            count = min(part, chunks - first)
            extents = torch.randn(count, *shape, device=device, dtype=torch.float32)
            extents[..., 0, :, :] *= self.spectrum
            extents = extents.to(self.dtype)
            keys = extents[:, :, :, :, 0].flatten(3, 4)
            self.records[:, :, first : first + count] = encode(self.spec, stacked, keys).permute(1, 2, 0, 3)
            payload = connection.append_buffer(count * geometry.chunk_bytes)
            torch.from_numpy(payload).view(self.dtype).view(extents.shape).copy_(extents)
            connection.append(self.session_id, first, count, payload)
        self.window_tokens = (SINK_CHUNKS + RECENT_CHUNKS) * geometry.chunk_tokens + geometry.chunk_tokens // 2
        capacity = (SINK_CHUNKS + RECENT_CHUNKS + 1) * geometry.chunk_tokens
        self.window = torch.randn(layers, 2, kv_heads, capacity, dim, device=device).to(self.dtype)
        budget = GROUPS_PER_HEAD * kv_heads
        self.states = [
            SketchState(self.spec, z, centre, records, budget)
            for z, centre, records in zip(self.to_z, self.centre, self.records, strict=True)
        ]
        self.step = DecodeStep(geometry, ratio, BANK_GROUPS, budget, capacity, self.dtype, device)
        self.step.register(connection.landing)
        self.scale = dim**-0.5
        self.groups = (chunks - SINK_CHUNKS - RECENT_CHUNKS) * geometry.groups_per_chunk
        self.q = torch.randn(layers, kv_heads, ratio, dim, device=device)
        self.k, self.v = (torch.randn(layers, kv_heads, 1, dim, device=device).to(self.dtype) for _ in range(2))

    def _basis(self) -> Basis:
        kv_heads, dim = self.geometry.kv_heads, self.geometry.head_dim
        moments = Moments(kv_heads, dim, self.device)
        keys = torch.randn(kv_heads, 2048, dim, device=self.device) * self.spectrum
        moments.add(torch.randn(kv_heads, self.ratio, 2048, dim, device=self.device), keys)
        return Basis.of(moments)

    def state_bytes(self) -> dict[str, int]:
        """On the device, for one session: what grows with the context, and what does not."""
        return {
            "sketches": self.records.nbytes,
            "basis": self.to_z.nbytes + self.centre.nbytes,  # a session keeps to_y in the host's memory
            "window": self.window.nbytes,
            "bank": self.step.records.nbytes,
            "step": self.step.resident_bytes() - self.step.records.nbytes,
        }

    def full_bytes(self) -> int:
        return self.chunks * self.geometry.chunk_bytes

    def drift(self, rho: float) -> Tensor:
        self.q = rho * self.q + (1 - rho * rho) ** 0.5 * torch.randn_like(self.q)
        return self.q.to(self.dtype)

    def token(self, q: Tensor) -> dict[str, float]:
        """One token through all layers. Host times of its phases in s, misses and opened groups."""
        step, connection, clock = self.step, self.connection, time.perf_counter
        per_chunk = self.geometry.groups_per_chunk
        launch = wait = fetch = 0.0
        misses = opened = 0
        begun = clock()
        step.begin(0, self.window, self.states, self.scale, self.window_tokens, SINK_CHUNKS * per_chunk, self.groups)
        for layer in range(self.geometry.layers):
            t0 = clock()
            step.start(layer, q[layer], self.k[layer], self.v[layer])
            t1 = clock()
            keys = step.misses(layer)
            t2 = clock()
            launch, wait = launch + t1 - t0, wait + t2 - t1
            if len(keys):
                answer = connection.fetch(self.session_id, keys)
                if answer.statuses is not None and answer.statuses.any():
                    step.abandon(layer)
                    raise RuntimeError("a record came back damaged or late")
                step.land(layer, answer.records)
                fetch += clock() - t2
            self.out = step.result()
            misses, opened = misses + len(keys), opened + step.opened_count(layer)
        t0 = clock()
        synchronize(self.device)
        done = clock()
        return {
            "total": done - begun, "launch": launch, "sync": wait + done - t0, "fetch": fetch, "misses": misses,
            "opened": opened,
        }  # fmt: skip

    def calibrated(self, hit_rate: float) -> float:
        """The rho of the random walk for which the bank answers this share of what is opened."""
        low, high = 1e-6, 1.0  # 1 - rho
        for _ in range(9):
            middle = (low * high) ** 0.5
            found = [self.token(self.drift(1 - middle)) for _ in range(14)][8:]
            rate = 1 - sum(f["misses"] for f in found) / sum(f["opened"] for f in found)
            low, high = (middle, high) if rate > hit_rate else (low, middle)
        return 1 - (low * high) ** 0.5

    def device_times(self) -> dict[str, float]:
        """GPU time in s of the parts of a token, each alone for all layers in one graph. Attention and copy are of the
        groups that the last layer of the last token opened, and of its misses. Ends what the bank holds."""
        step, layers = self.step, range(self.geometry.layers)
        step._side = None  # one after the other here
        held, late = slice(step._near, step._early), slice(step._early, None)

        def route(layer: int) -> None:
            state, window = self.states[layer], self.window[layer]
            step._calls.take(
                step._mail[layer], step._control, step._q, *window, step._chosen, self.scale, state.to_z, step._z
            )
            step._choose_by_sketch(state)
            tables, lists, capacity = step._tables[layer], step._lists, step._mass.shape[1]
            step._calls.place(
                step._chosen, step._control, layer, state.budget, capacity, tables, lists, step._mail[layer]
            )

        def attend(layer: int) -> None:
            calls, lists, near = step._calls, step._lists, step._near
            k, v = self.window[layer]
            out, lse = step._out[:near], step._lse[:near]
            calls.window_parts(step._q, k, v, step._control, self.scale, PART_KEYS, out, lse)
            step._attend(layer, lists.held, lists.held_counts, held)
            step._attend(layer, lists.late, lists.late_counts, late)
            calls.merge(step._out, step._lse, step._result, step._lse_of_all)

        def copy(layer: int) -> None:
            landing = step._staging if step._landing is None else step._landing.words
            tables, records = step._tables[layer], step.records[layer]
            step._calls.land(landing, step._staging, step._mail[-1], step._control, step._lists, tables, records)

        synchronize(self.device)
        copied = int(step._lists.late_counts.sum())
        parts = (("attention", attend), ("copy", copy), ("routing", route))
        times = {name: graph_s([partial(work, layer) for layer in layers], self.device) for name, work in parts}
        return times | {"copied_records": copied}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def graph_s(calls: list[Callable[[], Any]], device: torch.device, repeats: int = 15) -> float:
    """Seconds of all calls in one CUDA graph, the median of repeats; on a CPU, as they are."""
    for call in calls:
        call()
    synchronize(device)
    replay: Callable[[], Any] = lambda: [call() for call in calls]  # noqa: E731
    if device.type == "cuda":
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.cuda.stream(stream):
            graph.capture_begin()
            for call in calls:
                call()
            graph.capture_end()
        replay = graph.replay
    took = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        replay()
        synchronize(device)
        took.append(time.perf_counter() - start)
    return statistics.median(took)


def dense_s(geometry: Geometry, ratio: int, tokens: int, device: torch.device) -> dict[str, float]:
    """Dense attention of one token over K/V on the device, all layers, each with its own: torch's, and our kernel."""
    layers, kv_heads, dim = geometry.layers, geometry.kv_heads, geometry.head_dim
    dtype = getattr(torch, geometry.dtype)
    kv = torch.empty(layers, 2, 1, kv_heads, tokens, dim, dtype=dtype, device=device)
    for layer in kv:
        layer.normal_()
    q = torch.randn(kv_heads, ratio, dim, device=device).to(dtype)
    flat = q.view(1, kv_heads * ratio, 1, dim)
    found = {
        "sdpa": graph_s(
            [lambda k=k, v=v: F.scaled_dot_product_attention(flat, k, v, enable_gqa=True) for k, v in kv], device
        )
    }
    if device.type == "cuda":
        control = torch.zeros(CONTROL_SIZE, dtype=torch.int64)
        control[WINDOW_TOKENS] = tokens
        control = control.to(device)
        keys = max(512, tokens // 256)
        parts = -(-tokens // keys)
        out = torch.empty(parts, kv_heads * ratio, dim, device=device)
        lse = torch.empty(parts, kv_heads * ratio, device=device)

        def ours(k: Tensor, v: Tensor) -> None:
            attention.window_parts(q, k[0], v[0], control, dim**-0.5, keys, out, lse)
            attention.merge(out, lse, out[0], lse[0])

        found["kernel"] = graph_s([lambda k=k, v=v: ours(k, v) for k, v in kv], device)
    return found


def naive_s(geometry: Geometry, ratio: int, chunks: int, device: torch.device, layers: int = 6) -> float:
    """The groups of a step from pageable host memory, as index_select and a copy, and SDPA; a token's sum, scaled up from
    a few layers that share one host tensor."""
    kv_heads, dim, group = geometry.kv_heads, geometry.head_dim, geometry.group_tokens
    dtype = getattr(torch, geometry.dtype)
    held = torch.empty(kv_heads * chunks * geometry.groups_per_chunk, 2 * group * dim, dtype=dtype).normal_()
    q = torch.randn(1, kv_heads * ratio, 1, dim, device=device).to(dtype)
    took = []
    for _ in range(5 * layers):
        chosen = torch.randint(0, held.shape[0], (kv_heads * GROUPS_PER_HEAD,))
        synchronize(device)
        start = time.perf_counter()
        opened = held.index_select(0, chosen).to(device).view(1, kv_heads, GROUPS_PER_HEAD, 2, group, dim)
        k, v = opened.permute(3, 0, 1, 2, 4, 5).flatten(3, 4)
        F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        synchronize(device)
        took.append(time.perf_counter() - start)
    return statistics.median(took) * geometry.layers


def measure(sequence: Sequence, rho: float, steps: int) -> dict[str, float]:
    """Medians over steps, in ms, at one rho; the bank is warm."""
    for _ in range(30 if sequence.device.type == "cuda" else 1):
        sequence.token(sequence.drift(rho))
    found = []
    for _ in range(steps):
        q = sequence.drift(rho)
        synchronize(sequence.device)
        found.append(sequence.token(q))
    numbers = {n: statistics.median(f[n] for f in found) * 1e3 for n in PHASES}
    opened = sum(f["opened"] for f in found)
    numbers |= {
        "total_p90": float(np.quantile([f["total"] for f in found], 0.9)) * 1e3,
        "bank_hit_rate": 1 - sum(f["misses"] for f in found) / opened,
        "opened_per_layer": opened / len(found) / sequence.geometry.layers,
        "rho": rho,
    }
    return numbers


def run_context(connection: Connection, geometry: Geometry, ratio: int, tokens: int, hits: list[float], steps: int,
                device: torch.device) -> list[dict[str, Any]]:  # fmt: skip
    began = time.perf_counter()
    sequence = Sequence(connection, geometry, ratio, tokens // geometry.chunk_tokens, device)
    filled = time.perf_counter() - began
    rows = [measure(sequence, sequence.calibrated(hit), steps) for hit in hits]
    device_times = sequence.device_times()
    copied = device_times.pop("copied_records")
    device_ms = {f"{n}_gpu": s * 1e3 for n, s in device_times.items()} | {"copied_records": copied}
    state, full = sequence.state_bytes(), sequence.full_bytes()
    connection.close(sequence.session_id)
    del sequence
    if device.type == "cuda":
        torch.cuda.empty_cache()
    dense = {f"dense_{n}": s * 1e3 for n, s in dense_s(geometry, ratio, tokens, device).items()}
    naive = naive_s(geometry, ratio, tokens // geometry.chunk_tokens, device) * 1e3
    if device.type == "cuda":
        torch.cuda.empty_cache()
    shared = {
        **device_ms, **dense, "naive": naive, "fill_s": filled, "transport": connection.transport,
        "state_bytes": state, "kv_bytes": full, "resident_fraction": sum(state.values()) / full,
    }  # fmt: skip
    return [{"tokens": tokens, **row, **shared} for row in rows]


def table(rows: list[dict[str, Any]]) -> str:
    head = "tokens   hit   total  dense  naive | launch   sync  fetch | routing   copy (records)  attention | memory of K/V"
    lines = [
        "ms, one token, all layers; launch to fetch: the host's time; routing to attention: GPU time, each alone",
        head,
    ]
    for r in rows:
        dense = min(v for n, v in r.items() if n.startswith("dense_"))
        lines.append(
            f"{r['tokens']:7d} {r['bank_hit_rate']:5.3f} {r['total']:7.2f} {dense:6.2f} {r['naive']:6.1f} | "
            f"{r['launch']:6.2f} {r['sync']:6.2f} {r['fetch']:6.2f} | {r['routing_gpu']:7.2f} "
            f"{r['copy_gpu']:6.2f} {r['copied_records']:9d} {r['attention_gpu']:10.2f} | {r['resident_fraction']:.2%}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", default="16384,65536,262144", help="tokens, with commas")
    parser.add_argument("--hits", default="0.95,0.70", help="bank hit rates, with commas")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--transport", default="auto", choices=("auto", "shared", "bytes"))
    parser.add_argument("--smoke", action="store_true", help="on the CPU, tiny")
    parser.add_argument("--record", action="store_true", help="append to bench/results/decode_gpu.jsonl")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    options = parser.parse_args()
    if options.smoke:
        device, ratio, contexts, hits, steps = torch.device("cpu"), 2, [16384], [0.7], 3
        geometry = Geometry(2, 2, 32, "float32", model_fingerprint="bench")
    else:
        if not torch.cuda.is_available():
            parser.exit(1, "bench/decode_gpu.py needs an NVIDIA GPU; --smoke runs it on the CPU, tiny\n")
        device, ratio = torch.device("cuda"), 8
        contexts, hits = [int(t) for t in options.contexts.split(",")], [float(h) for h in options.hits.split(",")]
        steps = options.steps
        geometry = Geometry(48, 4, 128, "bfloat16", model_fingerprint="bench, geometry of Qwen3-30B-A3B")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # cut short: what was measured is kept
    torch.manual_seed(0)
    ram = max(contexts) // geometry.chunk_tokens * geometry.chunk_bytes * 5 // 4 + 64 * MIB
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="kvd") as directory:
        socket = Path(directory) / "k.sock"
        command = ["-m", "hga_kvd", "--listen", str(socket), "--ram", str(ram), "--log-level", "warning"]
        daemon = subprocess.Popen([sys.executable, *command])
        try:
            connection = Connection(f"unix:{socket}", options.transport, reconnect_s=120.0)
            for tokens in contexts:
                rows += run_context(connection, geometry, ratio, tokens, hits, steps, device)
                print(json.dumps(rows[-len(hits) :]), flush=True)
            connection.disconnect()
        finally:
            keep(options, rows, geometry)
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(120)


def keep(options: argparse.Namespace, rows: list[dict[str, Any]], geometry: Geometry) -> None:
    """What was measured so far, where it was asked for."""
    if not rows:
        return
    print(table(rows), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    if options.record:
        gpu = "none" if options.smoke else torch.cuda.get_device_name()
        command_line = "python bench/decode_gpu.py " + " ".join(sys.argv[1:])
        config = {"command": command_line, "gpu": gpu, "torch": torch.__version__, "layers": geometry.layers}
        results.append("decode_gpu", config, {"rows": rows})


if __name__ == "__main__":
    main()
