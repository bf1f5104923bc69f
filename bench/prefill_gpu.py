"""Exact prefill on a GPU: a prompt in blocks through a session whose K/V goes to a real daemon, beside torch's attention.

    python bench/prefill_gpu.py --record          # an NVIDIA GPU; heads of Qwen3-30B-A3B, 64 K tokens, 2 of its layers

Of the last block, per layer: the time of append and attend, with the stored K/V streamed through from the daemon's RAM,
the part of it that waits for the daemon, and what scaled_dot_product_attention takes for the same queries over K/V that
lies on the GPU. K/V is random; the model's own work is not in it.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import results
import torch
import torch.nn.functional as F
from hga_kvd_client import Geometry, Rope, SessionOptions, connect

KV_HEADS, RATIO, DIM, LAYERS = 4, 8, 128, 2
GIB = 1 << 30


def seconds(start: float) -> float:
    torch.cuda.synchronize()
    return time.perf_counter() - start


def dense_s(tokens: int, block: int) -> float:
    """Of one layer's last block."""
    k, v = torch.randn(2, 1, KV_HEADS, tokens, DIM, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(1, KV_HEADS * RATIO, block, DIM, device="cuda", dtype=torch.bfloat16)
    near, far = slice(tokens - block, None), slice(None, tokens - block)
    took = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        F.scaled_dot_product_attention(q, k[:, :, far], v[:, :, far], enable_gqa=True)
        F.scaled_dot_product_attention(q, k[:, :, near], v[:, :, near], is_causal=True, enable_gqa=True)
        took.append(seconds(start))
    return sorted(took)[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--block", type=int, default=4096)
    parser.add_argument("--record", action="store_true", help="append to bench/results/prefill_gpu.jsonl")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "bench/prefill_gpu.py needs an NVIDIA GPU\n")
    geometry = Geometry(LAYERS, KV_HEADS, DIM, "bfloat16", model_fingerprint="bench")
    rope = Rope(tuple(1e6 ** (-i / (DIM / 2)) for i in range(DIM // 2)), DIM)
    with tempfile.TemporaryDirectory(prefix="kvd") as directory:
        socket = Path(directory) / "k.sock"
        command = ["-m", "hga_kvd", "--listen", str(socket), "--ram", str(2 * GIB), "--log-level", "warning"]
        daemon = subprocess.Popen([sys.executable, *command])
        try:
            with connect(f"unix:{socket}", reconnect_s=60.0) as client:
                session = client.open(None, geometry, rope, SessionOptions(router="hga"), device="cuda")
                for first in range(0, options.tokens, options.block):
                    q = torch.randn(KV_HEADS * RATIO, options.block, DIM, device="cuda", dtype=torch.bfloat16)
                    k, v = torch.randn(2, KV_HEADS, options.block, DIM, device="cuda", dtype=torch.bfloat16)
                    torch.cuda.synchronize()
                    fetched, start = session.stats.fetch_s, time.perf_counter()
                    for layer in range(LAYERS):
                        session.append(layer, k, v)
                        session.attend(layer, q, DIM**-0.5)
                    ours, fetch = seconds(start) / LAYERS, (session.stats.fetch_s - fetched) / LAYERS
                    print(
                        f"{first + options.block} tokens: {ours * 1e3:.1f} ms a layer, fetch {fetch * 1e3:.1f}",
                        flush=True,
                    )
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(60)
    numbers = {
        "tokens": options.tokens, "block": options.block, "block_ms": ours * 1e3, "fetch_ms": fetch * 1e3,
        "sdpa_ms": dense_s(options.tokens, options.block) * 1e3,
    }  # fmt: skip
    print(json.dumps(numbers))
    if options.record:
        config = {
            "command": "python bench/prefill_gpu.py " + " ".join(sys.argv[1:]), "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
        }  # fmt: skip
        results.append("prefill_gpu", config, numbers)


if __name__ == "__main__":
    main()
