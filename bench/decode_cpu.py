"""One token on a CPU: the real model decodes from the daemon beside dense attention over a cache in its own memory.

Both see the same tokens in turns, so what else the machine does meets both alike. The arena is smaller than the K/V, as in
the demo. Numbers are medians over the steps at each context, in ms; `fetch` is what the routed step waits for the daemon.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import hga_kvd_patch
import results
import smollm2
import torch
import typer
from demo import BUILD
from hga_kvd.bench.daemon import daemon_on
from hga_kvd_client import SessionOptions
from hga_kvd_patch import CACHE
from transformers import DynamicCache

PROMPT_BLOCK_TOKENS = 1024
# Steps before the clock counts: the banks fill.
WARM_STEPS = 8


def at_context(model: Any, ids: torch.Tensor, first: int, steps: int, dense: Any, routed: Any) -> dict[str, float]:
    """Steps from token `first` on, which both caches have come to. ids: [1, tokens]."""
    session = routed.sessions[0]
    times: dict[str, list[float]] = {"dense_ms": [], "routed_ms": [], "fetch_ms": []}
    opened = routable = 0
    for step in range(WARM_STEPS + steps):
        token = ids[:, first + step : first + step + 1]
        taken = []
        fetched = session.stats.fetch_s
        if step == WARM_STEPS:
            opened, routable = session.stats.opened_groups, session.stats.routable_groups
        for cache in (dense, routed):
            started = time.perf_counter()
            model(token, **{CACHE: cache}, use_cache=True)
            taken.append(time.perf_counter() - started)
        if step >= WARM_STEPS:
            for name, seconds in zip(times, (*taken, session.stats.fetch_s - fetched), strict=True):
                times[name].append(1e3 * seconds)
    numbers = {name: statistics.median(values) for name, values in times.items()}
    share = (session.stats.opened_groups - opened) / (session.stats.routable_groups - routable)
    return numbers | {
        "routed_over_dense": numbers["routed_ms"] / numbers["dense_ms"],
        "fetched_fraction": share,
        "resident_share": session.resident_bytes() / session.full_bytes(),
    }


def main(
    contexts: Annotated[str, typer.Option(help="tokens before the steps that are measured, ascending")] = "4096,8192",
    steps: Annotated[int, typer.Option(help="measured at each context", min=1)] = 48,
    text: Annotated[Path | None, typer.Option(help="a long text; default: the demo's, twice")] = None,
    ram: Annotated[str, typer.Option(help="arena of the daemon")] = "96MiB",
    bank: Annotated[int, typer.Option(help="bank groups a layer and KV head")] = 64,
    record: Annotated[bool, typer.Option(help="add a line to bench/results/decode_cpu.jsonl")] = False,
) -> None:
    """Prints a JSON line: for each context what a token takes, dense and routed."""
    places = [int(context) for context in contexts.split(",")]
    smollm2.ensure_model(BUILD / "model")
    model, tokenizer = smollm2.load(BUILD / "model")
    source = text or Path(sys.modules["argparse"].__file__ or "")
    words = source.read_text(errors="replace") * (1 if text else 2)
    ids = tokenizer(words, return_tensors="pt", verbose=False).input_ids
    if ids.shape[1] < places[-1] + WARM_STEPS + steps:
        raise typer.BadParameter(f"{source} has only {ids.shape[1]} tokens", param_hint="text")
    out = BUILD / "decode_cpu"
    out.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="run-", dir=out))
    numbers: dict[str, dict[str, float]] = {}
    try:
        with (
            torch.inference_mode(),
            daemon_on(place, ram) as daemon,
            hga_kvd_patch.patched(model, daemon.target, options=SessionOptions(bank_groups=bank)) as state,
        ):
            dense, routed, done = DynamicCache(config=model.config), state.new_cache(), 0
            for context in places:
                for first in range(done, context, PROMPT_BLOCK_TOKENS):
                    block = ids[:, first : min(first + PROMPT_BLOCK_TOKENS, context)]
                    for cache in (dense, routed):
                        model(block, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
                numbers[str(context)] = at_context(model, ids, context, steps, dense, routed)
                done = context + WARM_STEPS + steps
    finally:
        shutil.rmtree(place)
    config = {"text": source.name, "steps": steps, "ram": ram, "bank_groups": bank, "threads": torch.get_num_threads()}
    print(json.dumps({"config": config, "numbers": numbers}))
    if record:
        results.append("decode_cpu", config | {"command": " ".join(sys.argv)}, numbers, out)


if __name__ == "__main__":
    typer.run(main)
