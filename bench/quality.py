"""What routing costs in nats: SmolLM2-135M over real documents, dense beside each rule, teacher-forced.

Every row is a rule with its budget; loss is over the second half of each document, where every token is routed on its
own, through the client's own functions (simulate.py). Prints the table of DESIGN section 6, draws gap against fetched
fraction, and can sweep the sketch's bits, dims and basis length, let the text drift, or decode through a real daemon.
It has run on a CPU with short documents only: a row of one document of 8,192 tokens takes 3 minutes there.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import results
import smollm2
import torch
import typer
from hga_kvd_client.options import Rope
from hga_kvd_client.sketch import SketchSpec
from rich.console import Console
from rich.table import Table
from simulate import CHUNK, Row, Simulation, hga_rule, oracle_rule, sketch_rule

BUILD = Path(__file__).resolve().parent.parent / "build"
console = Console()

BUDGETS = (4, 8, 16, 32)
BASIS_TOKENS = 2048
# (dims at 4 bits, dims at 2 bits) of 64, around DESIGN's 5.3 %.
SWEEP_DIMS = (
    (8, 8), (8, 16), (12, 8), (12, 12), (16, 0), (16, 8), (12, 24), (16, 16), (20, 8), (24, 0), (8, 32), (16, 24),
    (24, 16), (32, 32),
)  # fmt: skip
SWEEP_BASIS = (512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Spec:
    """A row as text, so that it can be sent to another process: kind, then its numbers.

    window; dense; hga CHUNKS GROUPS; own CHUNKS GROUPS (hga, each query head sees only its own groups); pooled CHUNKS
    GROUPS; oracle BUDGET; plain BUDGET (2-bit keys, mean and step per
    group); plain-chunk BUDGET; sketch DIMS4 DIMS2 BUDGET BASIS_TOKENS BASIS_FIRST COVER.
    """

    kind: str
    numbers: tuple[float, ...] = ()
    block_visibility: bool = False  # routed prefill of the whole text, the paper's way
    kv_float8: bool = False

    def label(self) -> str:
        n = self.numbers
        text = {
            "window": lambda: "window only",
            "dense": lambda: "dense",
            "hga": lambda: f"hga, {n[0]:.0f} chunks, {n[1]:.0f} groups per query head",
            "own": lambda: f"hga, {n[0]:.0f} chunks, {n[1]:.0f} groups, each query head its own",
            "pooled": lambda: f"hga pooled per KV head, {n[0]:.0f} chunks, {n[1]:.0f} groups",
            "oracle": lambda: f"oracle, layer budget {n[0]:.0f}",
            "plain": lambda: f"2-bit keys per group, layer budget {n[0]:.0f}",
            "plain-chunk": lambda: f"2-bit keys per chunk, layer budget {n[0]:.0f}",
            "sketch": lambda: f"sketch {n[0]:.0f} x 4 + {n[1]:.0f} x 2 bits, layer budget {n[2]:.0f}",
        }[self.kind]()
        if self.kind == "sketch":
            text += f", basis of {n[3]:.0f}" if n[3] != BASIS_TOKENS else ""
            text += f" from {n[4]:.0f} on" if n[4] else ""
            text += f", cover {n[5]:g}" if n[5] < 1 else ""
        return text + (", prefill too" if self.block_visibility else "") + (", K/V in fp8" if self.kv_float8 else "")


def sketch(dims4: int, dims2: int, budget: int, basis: int = BASIS_TOKENS, first: int = 0, cover: float = 1.0) -> Spec:
    return Spec("sketch", (dims4, dims2, budget, basis, first, cover))


def default_rows(budgets: tuple[int, ...], head_dim: int) -> list[Spec]:
    spec = SketchSpec.of_basis(head_dim)
    return [
        Spec("window"),
        Spec("pooled", (1, 1)),
        Spec("own", (20, 16)),
        Spec("own", (16, 32)),
        Spec("hga", (20, 16)),
        Spec("hga", (16, 32)),
        Spec("pooled", (20, 16)),
        *(Spec("plain", (budget,)) for budget in budgets),
        Spec("plain-chunk", (16,)),
        *(sketch(spec.dims4, spec.dims2, budget) for budget in budgets),
        *(Spec("oracle", (budget,)) for budget in budgets),
    ]


def row_of(spec: Spec, model: Any) -> Row | None:
    """What the simulation runs; None: dense."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scale, n = head_dim**-0.5, spec.numbers
    inv_freq = model.base_model.rotary_emb.inv_freq.float().cpu()
    rope = Rope(tuple(inv_freq.tolist()), 2 * len(inv_freq))
    kv_bytes = CHUNK * 2 * head_dim * 2
    sketched, rule, state = None, None, 0.0
    if spec.kind == "dense" and not spec.kv_float8:
        return None
    if spec.kind in ("hga", "own", "pooled"):
        rule = hga_rule(rope, int(n[0]), int(n[1]), scale, pooled=spec.kind == "pooled", own=spec.kind == "own")
        state = 5 * head_dim * 2 / kv_bytes  # one vector a chunk, one a group, bf16
    elif spec.kind == "oracle":
        rule = oracle_rule(int(n[0]))
    elif spec.kind not in ("window", "dense"):
        if spec.kind == "sketch":
            sketched = SketchSpec(head_dim, int(n[0]), int(n[1]))
            budget, basis_tokens, basis_first, cover = int(n[2]), int(n[3]), int(n[4]), n[5]
        else:
            sketched = SketchSpec.plain(head_dim) if spec.kind == "plain" else SketchSpec(head_dim, 0, head_dim)
            budget, basis_tokens, basis_first, cover = int(n[0]), 0, 0, 1.0
        rule = sketch_rule(sketched, budget, basis_tokens, basis_first, cover)
        state = sketched.chunk_bytes / kv_bytes
    return Row(spec.label(), rule, state, spec.block_visibility, spec.kv_float8, spec.kind == "dense")


def measure(job: tuple[list[Spec], list[tuple[str, np.ndarray]], str, Path]) -> list[dict[str, Any]]:
    """One line a (row, document): losses and groups. Runs in a process of its own when there are several jobs."""
    specs, documents, device, directory = job
    torch.set_grad_enabled(False)
    torch.backends.cuda.matmul.allow_tf32 = False
    model, _ = smollm2.load(directory)
    model.to(device)
    lines = []
    for name, tokens in documents:
        ids = torch.from_numpy(tokens.astype(np.int64)).to(device)
        simulation = Simulation(model, len(ids) // 2)
        dense = simulation.run(ids, None)
        for spec in specs:
            started = time.perf_counter()
            loss = simulation.run(ids, row_of(spec, model))
            lines.append(
                {
                    "row": spec.label(),
                    "document": name,
                    "loss": loss,
                    "loss_dense": dense,
                    "opened": simulation.opened,
                    "routable": simulation.routable,
                    "seconds": time.perf_counter() - started,
                }
            )
            print(f"{name}: {spec.label()}: {loss - dense:+.4f}", flush=True)
    return lines


def summary(specs: list[Spec], lines: list[dict[str, Any]], model: Any) -> list[dict[str, Any]]:
    """The table: mean over documents, each of the same length."""
    table = []
    for spec in specs:
        mine = [line for line in lines if line["row"] == spec.label()]
        gaps = [line["loss"] - line["loss_dense"] for line in mine]
        row = row_of(spec, model)
        table.append(
            {
                "row": spec.label(),
                "spec": asdict(spec),
                "state": row.state if row else 0.0,
                "fetched": sum(line["opened"] for line in mine) / max(1, sum(line["routable"] for line in mine)),
                "gap_nats": float(np.mean(gaps)),
                "gap_standard_error": float(np.std(gaps, ddof=1) / len(gaps) ** 0.5) if len(gaps) > 1 else 0.0,
                "documents": len(mine),
            }
        )
    return table


def show(table: list[dict[str, Any]], title: str) -> None:
    view = Table(title=title)
    for name in ("rule", "state", "fetched", "gap, nats", "+-"):
        view.add_column(name, justify="left" if name == "rule" else "right")
    for line in table:
        view.add_row(
            line["row"],
            f"{line['state']:.1%}",
            f"{line['fetched']:.1%}",
            f"{line['gap_nats']:+.4f}",
            f"{line['gap_standard_error']:.4f}",
        )
    console.print(view)


def draw(table: list[dict[str, Any]], path: Path, across: str, title: str) -> None:
    """Gap against `across`: "fetched" or "state"; one line a kind of rule."""
    import matplotlib  # noqa: PLC0415 (slow to import)

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for kind in dict.fromkeys(line["spec"]["kind"] for line in table):
        points = sorted((line[across], line["gap_nats"]) for line in table if line["spec"]["kind"] == kind)
        joined = "-o" if across == "fetched" and len(points) > 1 and kind not in ("hga", "pooled") else "o"
        axes.plot([100 * x for x, _ in points], [y for _, y in points], joined, label=kind, markersize=5)
    axes.axhline(0, color="0.6", linewidth=0.8)
    name = {"fetched": "routable groups fetched, %", "state": "routing state, % of bf16 K/V"}[across]
    axes.set(xlabel=name, ylabel="loss gap to dense, nats", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def read_documents(path: Path, names: int, length: int, drift: bool) -> list[tuple[str, np.ndarray]]:
    """(name, tokens) of the first `names` documents, 0: all, each cut to `length`, 0: whole.

    drift: instead of each document, one that begins with another's first quarter: the basis is made of that alone.
    """
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    documents = [
        (f"{name} {i}", tokens) for i in range(max(map(len, arrays.values()))) for name, array in arrays.items()
        for tokens in array[i : i + 1]
    ]  # fmt: skip
    if drift:
        others = documents[1:] + documents[:1]
        documents = [
            (f"{theirs} then {mine}", np.concatenate((other[: len(tokens) // 4], tokens[len(tokens) // 4 :])))
            for (mine, tokens), (theirs, other) in zip(documents, others, strict=True)
        ]
    documents = [(name, tokens[: length or None]) for name, tokens in documents]
    return documents[: names or None]


def run(
    specs: list[Spec], documents: list[tuple[str, np.ndarray]], device: str, jobs: int, model: Path
) -> list[dict[str, Any]]:
    parts = [(specs, documents[i::jobs], device, model) for i in range(min(jobs, len(documents)))]
    if len(parts) == 1:
        return measure(parts[0])
    with multiprocessing.get_context("spawn").Pool(len(parts)) as pool:
        return [line for lines in pool.map(measure, parts) for line in lines]


def main(
    tokens: Annotated[Path, typer.Option(help="arrays [documents, tokens] of token ids, as in the dev file")],
    budgets: Annotated[str, typer.Option(help="groups per KV head of a layer's budget")] = "4,8,16,32",
    documents: Annotated[int, typer.Option(help="how many documents; 0: all", min=0)] = 0,
    length: Annotated[int, typer.Option(help="tokens of each; 0: all", min=0)] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    jobs: Annotated[int, typer.Option(help="processes; a GPU is kept busy by several", min=1)] = 1,
    sweep: Annotated[bool, typer.Option(help="sketches of many sizes instead of the table")] = False,
    drift: Annotated[bool, typer.Option(help="the first quarter of each text is another document's")] = False,
    extra: Annotated[bool, typer.Option(help="cover, routed prefill and fp8 K/V instead of the table")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="where the numbers go")] = None,
    model: Annotated[Path, typer.Option(help="directory of the weights")] = BUILD / "model",
) -> None:
    """Prints the table; writes build/quality/*.png and bench/results/quality.jsonl."""
    out = BUILD / "quality"
    out.mkdir(parents=True, exist_ok=True)
    smollm2.ensure_model(model)
    sizes = tuple(int(budget) for budget in budgets.split(","))
    loaded, _ = smollm2.load(model)
    head_dim = loaded.config.hidden_size // loaded.config.num_attention_heads
    spec = SketchSpec.of_basis(head_dim)
    texts = read_documents(tokens, documents, length, drift)
    first = len(texts[0][1]) // 4
    if sweep:
        rows = [sketch(four, two, 16) for four, two in SWEEP_DIMS]
        rows += [sketch(spec.dims4, spec.dims2, 16, n) for n in SWEEP_BASIS if n != BASIS_TOKENS]
    elif drift:
        rows = [sketch(spec.dims4, spec.dims2, size, first, start) for size in sizes for start in (0, first)]
        rows += [Spec("plain", (size,)) for size in sizes] + [Spec("oracle", (size,)) for size in sizes]
    elif extra:
        rows = [sketch(spec.dims4, spec.dims2, 32, cover=cover) for cover in (0.8, 0.9, 0.95, 0.97, 0.98, 0.99)]
        rows += [Spec("hga", (20, 16), block_visibility=True)]
        rows += [Spec("sketch", sketch(spec.dims4, spec.dims2, 16).numbers, block_visibility=True)]
        rows += [Spec("dense", kv_float8=True)]
        rows += [Spec("sketch", sketch(spec.dims4, spec.dims2, 16).numbers, kv_float8=True)]
    else:
        rows = default_rows(sizes, head_dim)
    started = time.perf_counter()
    lines = run(rows, texts, device, jobs, model)
    table = summary(rows, lines, loaded)
    what = "sweep" if sweep else "drift" if drift else "extra" if extra else "table"
    title = f"SmolLM2-135M, {len(texts)} documents of {len(texts[0][1])} tokens, loss over the second half"
    show(table, title)
    draw(table, out / f"{what}.png", "state" if sweep else "fetched", title)
    config = {
        "what": what, "tokens": tokens.name, "documents": len(texts), "length": len(texts[0][1]), "budgets": sizes,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device, "jobs": jobs,
    }  # fmt: skip
    report = {"table": table, "lines": lines, "seconds": time.perf_counter() - started}
    if json_path is not None:
        json_path.write_text(json.dumps(config | report, indent=1) + "\n")
    results.append("quality", config, {"table": table, "seconds": report["seconds"]})
    console.print(f"written: {out / f'{what}.png'}, bench/results/quality.jsonl")


if __name__ == "__main__":
    typer.run(main)
