"""The main job, end to end: daemon on a temporary directory, a real model over a real long text, dense beside routed.

The daemon's arena is smaller than the K/V, so decode reads from the disk. Both columns see the same tokens: the prompt,
then `--decode` tokens teacher-forced one at a time (loss is over them), then `--generate` tokens of their own choice.
Everything that is written stays under build/.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import hga_kvd_patch
import numpy as np
import results
import smollm2
import torch
import typer
from hga_kvd.bench.daemon import daemon_on
from hga_kvd_client import SessionOptions
from hga_kvd_patch import CACHE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

BUILD = Path(__file__).resolve().parent.parent / "build"
console = Console()


@dataclass
class Run:
    """One column of the table."""

    loss: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    generate_s: float = 0.0
    text: str = ""
    opened: list[np.ndarray] = field(default_factory=list)  # a step: share of (layer, KV head) that opened each chunk


def measure(
    model: Any, tokenizer: Any, ids: torch.Tensor, split: tuple[int, int, int], cache: Any, bar: Progress
) -> Run:
    """Prefill, teacher-forced steps, generation. ids: [1, tokens]; split: prompt, decode and generate tokens."""
    prompt, decode, generate = split
    run = Run()
    name = "routed" if cache is not None else "dense"
    task = bar.add_task(f"{name}: reading the prompt", total=prompt)
    started = time.perf_counter()
    past = cache
    for first in range(0, prompt, 1024):
        end = min(first + 1024, prompt)
        out = model(ids[:, first:end], **{CACHE: past}, use_cache=True, logits_to_keep=1)
        past = out[CACHE]
        bar.update(task, completed=end)
    run.prefill_s = time.perf_counter() - started
    task = bar.add_task(f"{name}: next tokens, one by one", total=decode)
    losses = []
    started = time.perf_counter()
    for column in range(prompt, prompt + decode):
        losses.append(torch.nn.functional.cross_entropy(out.logits[:, -1], ids[:, column]).item())
        out = model(ids[:, column : column + 1], **{CACHE: past}, use_cache=True)
        if cache is not None:
            run.opened.append(opened_chunks(cache.sessions[0], model.config.num_hidden_layers))
        bar.advance(task)
    run.decode_s = time.perf_counter() - started
    run.loss = float(np.mean(losses))
    task = bar.add_task(f"{name}: generating", total=generate)
    token, chosen = out.logits[:, -1].argmax(-1, keepdim=True), []
    started = time.perf_counter()
    for _ in range(generate):
        chosen.append(int(token))
        token = model(token, **{CACHE: past}, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
        bar.advance(task)
    run.generate_s = time.perf_counter() - started
    run.text = tokenizer.decode(chosen)
    return run


def opened_chunks(session: Any, layers: int) -> np.ndarray:
    """[chunks]: share of the session's (layer, KV head, group of the chunk) that the last step opened."""
    opened = torch.stack([session.opened(layer) for layer in range(layers)]).float().mean((0, 1))
    per_chunk = session.geometry.groups_per_chunk
    return opened[: len(opened) // per_chunk * per_chunk].view(-1, per_chunk).mean(1).numpy()


def draw(run: Run, recent_chunks: int, sink_chunks: int, path: Path, title: str) -> None:
    """Decode step against chunk, coloured by how much of the chunk was opened."""
    import matplotlib  # noqa: PLC0415 (slow to import)

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    chunks = max(len(step) for step in run.opened)
    grid = np.zeros((chunks, len(run.opened)))
    for step, opened in enumerate(run.opened):
        grid[: len(opened), step] = opened
    figure, (axes, side) = pyplot.subplots(
        1, 2, width_ratios=(5, 1), figsize=(12, 6), sharey=True, layout="constrained"
    )
    top = float(np.quantile(grid[grid > 0], 0.98)) if (grid > 0).any() else 1.0
    image = axes.imshow(grid, origin="lower", aspect="auto", cmap="magma", vmin=0, vmax=top, interpolation="nearest")
    axes.axhline(sink_chunks - 0.5, color="w", linewidth=0.6)
    axes.text(2, sink_chunks / 2 - 0.5, "sinks: always attended", color="w", fontsize=7, va="center")
    ends = np.array([len(opened) for opened in run.opened]) - recent_chunks
    axes.step(range(len(ends)), ends - 0.5, color="w", linewidth=0.8)
    axes.text(
        2, ends[0] + recent_chunks / 2 - 0.5, "recent window: always attended", color="w", fontsize=7, va="center"
    )
    axes.set(xlabel="decode step", ylabel="chunk of 64 tokens", title=title)
    side.barh(range(chunks), grid.mean(1), height=1.0, color="#7b3f8c")
    side.set(xlabel="mean over steps")
    figure.colorbar(image, ax=axes, label="share of the chunk's groups opened, over layers and KV heads", pad=0.01)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def show(report: dict[str, Any], dense: Run, routed: Run) -> None:
    mib = 1 << 20
    table = Table(title="SmolLM2-135M-Instruct, float32, K/V in the daemon")
    table.add_column("")
    table.add_column("dense", justify="right")
    table.add_column("routed", justify="right")
    table.add_row("loss, nats a token", f"{report['loss_dense']:.4f}", f"{report['loss_routed']:.4f}")
    table.add_row("gap, nats", "", f"{report['gap_nats']:+.4f}")
    table.add_row("routable groups fetched", "100 %", f"{100 * report['fetched_fraction']:.1f} %")
    for name in ("bank", "ram", "nvme"):
        table.add_row(f"opened from {name}, MiB", "", f"{report[f'{name}_bytes'] / mib:,.0f}")
    table.add_row(
        "tokens a second, decode", f"{report['tokens_per_s_dense']:.1f}", f"{report['tokens_per_s_routed']:.1f}"
    )
    table.add_row("prefill, s", f"{dense.prefill_s:.1f}", f"{routed.prefill_s:.1f}")
    full, resident = report["full_kv_bytes"], report["resident_kv_bytes"]
    table.add_row(
        "K/V in the model process, MiB", f"{full / mib:,.0f}", f"{resident / mib:,.0f} ({resident / full:.0%})"
    )
    console.print(table)
    console.print("[bold]dense wrote:[/] ", repr(dense.text), highlight=False)
    console.print("[bold]routed wrote:[/]", repr(routed.text), highlight=False)


def main(
    text: Annotated[Path | None, typer.Option(help="a long text; default: argparse.py of the standard library")] = None,
    prompt: Annotated[int, typer.Option(help="tokens to read", min=1024)] = 6144,
    decode: Annotated[int, typer.Option(help="tokens to teacher-force", min=1)] = 512,
    generate: Annotated[int, typer.Option(help="tokens to generate", min=1)] = 64,
    ram: Annotated[str, typer.Option(help="arena of the daemon; smaller than the K/V, so that NVMe is read")] = "96MiB",
    bank: Annotated[int, typer.Option(help="bank groups a layer and KV head")] = 64,
    record: Annotated[bool, typer.Option(help="also add a line to bench/results/demo.jsonl")] = False,
) -> None:
    """Runs the demo; writes build/demo/report.json and build/demo/routing.png."""
    source = text or Path(sys.modules["argparse"].__file__ or "")
    out = BUILD / "demo"
    out.mkdir(parents=True, exist_ok=True)
    with console.status("getting SmolLM2-135M-Instruct (98 MB the first time) and loading it"):
        smollm2.ensure_model(BUILD / "model")
        model, tokenizer = smollm2.load(BUILD / "model")
    ids = tokenizer(source.read_text(errors="replace"), return_tensors="pt", verbose=False).input_ids
    if ids.shape[1] < prompt + decode:
        raise typer.BadParameter(f"{source} has {ids.shape[1]} tokens; {prompt + decode} are needed", param_hint="text")
    ids = ids[:, : prompt + decode]
    split = (prompt, decode, generate)
    options = SessionOptions(bank_groups=bank)
    columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    place = Path(tempfile.mkdtemp(prefix="run-", dir=out))
    try:
        with torch.inference_mode(), Progress(*columns, console=console) as bar:
            dense = measure(model, tokenizer, ids, split, None, bar)
            with (
                daemon_on(place, ram) as daemon,
                hga_kvd_patch.patched(model, daemon.target, options=options) as state,
            ):
                cache = state.new_cache("demo")
                routed = measure(model, tokenizer, ids, split, cache, bar)
                session = cache.sessions[0]
                stats, resident, full = session.stats, session.resident_bytes(), session.full_bytes()
    finally:
        shutil.rmtree(place)
    report = {
        "loss_dense": dense.loss,
        "loss_routed": routed.loss,
        "gap_nats": routed.loss - dense.loss,
        "fetched_fraction": stats.fetched_fraction,
        "bank_bytes": stats.bank_bytes,
        "ram_bytes": stats.ram_bytes,
        "nvme_bytes": stats.nvme_bytes,
        "tokens_per_s_dense": decode / dense.decode_s,
        "tokens_per_s_routed": decode / routed.decode_s,
        "resident_kv_bytes": resident,
        "full_kv_bytes": full,
        "prompt_tokens": prompt,
        "decode_tokens": decode,
        "generated_tokens": generate,
        "prefill_s_dense": dense.prefill_s,
        "prefill_s_routed": routed.prefill_s,
        "text": source.name,
        "ram": ram,
        "bank_groups": bank,
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(
        routed,
        options.recent_chunks,
        options.sink_chunks,
        out / "routing.png",
        f"what SmolLM2 opened in {source.name}: {100 * stats.fetched_fraction:.1f} % of the routable groups",
    )
    show(report, dense, routed)
    if record:
        results.append("demo", {"text": source.name, "ram": ram, "bank_groups": bank}, report, out)
    console.print(f"written: {out / 'report.json'}, {out / 'routing.png'}")


if __name__ == "__main__":
    typer.run(main)
