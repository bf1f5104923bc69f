"""What routing costs in nats: SmolLM2-135M over real documents, dense beside each rule, teacher-forced.

Every row is a rule with its budget; loss is over the second half of each document, where every token is routed on its
own, through the client's own functions (simulate.py). Prints the table of DESIGN section 6, draws gap against fetched
fraction, and can sweep the sketch's bits, dims and basis length, or let the text drift (texts.py).

Losses are written to a file of lines as they come; what is in that file already is not run again. So a run that was cut
short goes on where it was, and the table of a run elsewhere is made from its lines.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import results
import smollm2
import texts
import torch
import typer
from hga_kvd_client.options import Rope
from rich.console import Console
from rich.table import Table
from rows import BASIS_TOKENS, Spec, drift_rows, extra_rows, row_of, sketch, sweep_rows, table_rows
from simulate import Simulation
from torch import Tensor, multiprocessing

BUILD = Path(__file__).resolve().parent.parent / "build"
console = Console()

# A text of this many tokens is what the model was trained for; RoPE is stretched for longer ones.
TRAINED_TOKENS = 8192


def stretch(model: Any, inv_freq: Tensor, tokens: int) -> Rope:
    """Gives the model its RoPE, inv_freq as it was trained with; the base is raised for texts longer than that (NTK)."""
    pairs = len(inv_freq)
    if tokens > TRAINED_TOKENS:
        place = torch.arange(pairs, device=inv_freq.device) / max(1, pairs - 1)
        inv_freq = inv_freq * (tokens / TRAINED_TOKENS) ** -place
    model.base_model.rotary_emb.inv_freq = inv_freq
    return Rope(tuple(inv_freq.float().cpu().tolist()), 2 * pairs)


@dataclass(frozen=True)
class Study:
    """Rows over texts. path: its file of lines; the first line is a head, the others are losses."""

    name: str
    specs: list[Spec]
    texts: list[texts.Text]
    path: Path

    def begin(self, config: dict[str, Any]) -> None:
        """Writes the head, if there is none. Raises: SystemExit if the file is of other texts."""
        config = {"what": self.name, "texts": len(self.texts), "length": len(self.texts[0][1]), **config}
        if not self.path.exists():
            self.path.write_text(json.dumps({"config": config, "made": results.stamp()}) + "\n")
        found = self.read()[0]["config"]
        for name in ("what", "texts", "length", "tokens"):
            if found[name] != config[name]:
                raise SystemExit(f"{self.path} has losses of {found}: give another --lines")

    def read(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The head and the losses."""
        head, *lines = [json.loads(line) for line in self.path.read_text().splitlines()]
        return head, lines

    def lacking(self) -> list[tuple[texts.Text, list[Spec]]]:
        """Texts that lack losses, and the rows that they lack."""
        done = {(line["row"], line["text"]) for line in self.read()[1]}
        found = [(text, [spec for spec in self.specs if (spec.label(), text[0]) not in done]) for text in self.texts]
        return [(text, specs) for text, specs in found if specs]


# What is to be done: (study, (text, its rows)).
Work = Iterable[tuple[str, tuple[texts.Text, list[Spec]]]]


def measure(work: Work, device: str, config: Any, weights: dict[str, Tensor], emit: Callable[[str, Any], None]) -> None:
    """Emits (study, line) for every (row, text)."""
    torch.set_grad_enabled(False)
    torch.backends.cuda.matmul.allow_tf32 = False
    model = smollm2.of_weights(config, weights).to(device)
    inv_freq = model.base_model.rotary_emb.inv_freq
    for study, ((name, tokens), specs) in work:
        rope = stretch(model, inv_freq, len(tokens))
        ids = torch.from_numpy(tokens).to(device)
        simulation = Simulation(model, len(ids) // 2)
        dense = simulation.run(ids, None)
        for spec in specs:
            started = time.perf_counter()
            loss = simulation.run(ids, row_of(spec, head_dim_of(config), rope, len(ids) // 2))
            line = {
                "row": spec.label(),
                "text": name,
                "loss": loss,
                "loss_dense": dense,
                "opened": simulation.opened,
                "routable": simulation.routable,
                "seconds": round(time.perf_counter() - started, 3),
            }
            emit(study, line)


def in_a_process(work: Any, device: str, config: Any, weights: dict[str, Tensor], lines: Any) -> None:
    """`measure` from the queue `work`, up to None, into the queue `lines`, then None."""
    torch.set_num_threads(1)
    try:
        measure(iter(work.get, None), device, config, weights, lambda *line: lines.put(line))
    finally:
        lines.put(None)


def budgets_of(text: str) -> tuple[int, ...]:
    """Raises: typer.BadParameter."""
    try:
        found = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        found = (0,)
    if min(found) < 1:
        raise typer.BadParameter(f"--budgets {text!r}: whole numbers from 1 on, with commas between them")
    return found


def head_dim_of(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def run(studies: list[Study], device: str, jobs: int, directory: Path) -> None:
    """Adds to the studies' files what they lack."""
    paths = {study.name: study.path for study in studies}
    lacking = [(study.name, one) for study in studies for one in study.lacking()]
    lacking.sort(key=lambda work: -len(work[1][0][1]))  # the longest texts first: none is left to the end alone
    if not lacking:
        return
    config = smollm2.config(directory)
    weights = smollm2.weights(directory, config)

    def keep(study: str, line: dict[str, Any]) -> None:
        with paths[study].open("a") as file:
            file.write(json.dumps(line) + "\n")
        gap = line["loss"] - line["loss_dense"]
        print(f"{study}: {line['text']}: {line['row']}: {gap:+.4f} ({line['seconds']:.1f} s)", flush=True)

    if jobs == 1:
        measure(lacking, device, config, weights, keep)
        return
    context = multiprocessing.get_context("spawn")  # torch's: weights are shared, not copied
    lines, work = context.Queue(), context.Queue()
    shared = (work, device, config, weights, lines)
    workers = [context.Process(target=in_a_process, args=shared) for _ in range(min(jobs, len(lacking)))]
    for worker in workers:
        worker.start()
    for one in (*lacking, *[None] * len(workers)):
        work.put(one)
    left = len(workers)
    while left:
        line = lines.get()
        if line is None:
            left -= 1
        else:
            keep(*line)
    for worker in workers:
        worker.join()
        if worker.exitcode:
            raise SystemExit(f"a process ended with {worker.exitcode}; what was measured is kept")


def summary(specs: list[Spec], lines: list[dict[str, Any]], head_dim: int, prompt: int) -> list[dict[str, Any]]:
    """The table: means over the texts, which have one length. Rows that were run on fewer texts than others are left out:
    texts differ more than rows do."""
    rope = Rope((1.0,) * (head_dim // 2), head_dim)
    of_row = {spec.label(): [line for line in lines if line["row"] == spec.label()] for spec in specs}
    most = max(map(len, of_row.values()))
    table = []
    for spec in specs:
        mine = of_row[spec.label()]
        if len(mine) < most or not mine:
            continue
        gaps = torch.tensor([line["loss"] - line["loss_dense"] for line in mine], dtype=torch.float64)
        row = row_of(spec, head_dim, rope, prompt)
        table.append(
            {
                "row": spec.label(),
                "spec": asdict(spec),
                "state": row.state if row else 0.0,
                "fetched": sum(line["opened"] for line in mine) / max(1, sum(line["routable"] for line in mine)),
                "gap_nats": float(gaps.mean()),
                "gap_standard_error": float(gaps.std() / len(gaps) ** 0.5) if len(gaps) > 1 else 0.0,
                "texts": len(mine),
                "seconds": sum(line["seconds"] for line in mine),
            }
        )
    return table


def show(table: list[dict[str, Any]], title: str) -> None:
    view = Table(title=title)
    for name in ("rule", "state", "fetched", "gap, nats", "+-", "texts"):
        view.add_column(name, justify="left" if name == "rule" else "right")
    for line in table:
        view.add_row(
            line["row"],
            f"{line['state']:.1%}",
            f"{line['fetched']:.1%}",
            f"{line['gap_nats']:+.4f}",
            f"{line['gap_standard_error']:.4f}",
            str(line["texts"]),
        )
    console.print(view)


def draw(table: list[dict[str, Any]], path: Path, across: str, title: str) -> None:
    """Gap against `across`: "fetched" or "state"; one line a kind of rule."""
    import matplotlib  # noqa: PLC0415 (slow to import)

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for kind in dict.fromkeys(line["spec"]["kind"] for line in table):
        points = sorted((100 * line[across], line["gap_nats"]) for line in table if line["spec"]["kind"] == kind)
        joined = "-o" if across == "fetched" and len(points) > 1 else "o"
        axes.plot(*zip(*points, strict=True), joined, label=kind, markersize=5)
    axes.axhline(0, color="0.6", linewidth=0.8)
    name = {"fetched": "routable groups fetched, %", "state": "routing state, % of bf16 K/V"}[across]
    axes.set(xlabel=name, ylabel="loss gap to dense, nats", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def through_daemon(
    text: texts.Text, count: int, device: str, directory: Path, out: Path, record: bool
) -> dict[str, Any]:
    """The default rule over `count` tokens behind the first half of a text: simulated, and by patch and daemon."""
    import through_daemon as real  # noqa: PLC0415 (needs what a client needs)
    from hga_kvd_client import SessionOptions  # noqa: PLC0415

    name, tokens = text
    start = len(tokens) // 2
    model = smollm2.load(directory)[0].to(device)
    head_dim = head_dim_of(model.config)
    options = SessionOptions(router="sketch", sketch_basis_tokens=min(BASIS_TOKENS, start // 2))
    spec = sketch(head_dim // 4, head_dim // 4, options.sketch_groups, options.sketch_basis_tokens)
    row = row_of(spec, head_dim, stretch(model, model.base_model.rotary_emb.inv_freq, len(tokens)), start)
    assert row is not None
    config = {"what": "daemon", "text": name, "prompt": start, "tokens": count, "row": spec.label(), "device": device}
    numbers = real.compare(model, torch.from_numpy(tokens[: start + count]).to(device), start, row, options, out)
    console.print(config | numbers)
    if record:
        results.append("quality", config | {"command": " ".join(sys.argv)}, numbers)
    return config | numbers


def main(
    tokens: Annotated[Path, typer.Option(help="arrays [documents, tokens] of token ids, as in the dev file")],
    budgets: Annotated[str, typer.Option(help="groups per KV head of a layer's budget, in the table")] = "4,8,16,32",
    documents: Annotated[int, typer.Option(help="how many documents; 0: all", min=0)] = 0,
    length: Annotated[int, typer.Option(help="tokens of each; 0: all", min=0)] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    jobs: Annotated[int, typer.Option(help="processes; a GPU is kept busy by several", min=1)] = 1,
    table: Annotated[bool, typer.Option(help="the table; also if nothing else is asked for")] = False,
    sweep: Annotated[bool, typer.Option(help="sketches of many sizes")] = False,
    extra: Annotated[bool, typer.Option(help="cover, routed prefill and fp8 K/V")] = False,
    drift: Annotated[list[str] | None, typer.Option(help="texts that change: start, turns, long")] = None,
    daemon: Annotated[int, typer.Option(help="tokens of the first text, decoded by a real daemon too", min=0)] = 0,
    only: Annotated[str, typer.Option(help="rows whose `study: label` has this regular expression")] = "",
    lines: Annotated[Path | None, typer.Option(help="directory of the losses; build/quality if not told")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="where the numbers go")] = None,
    model: Annotated[Path, typer.Option(help="directory of the weights")] = BUILD / "model",
    measure_lacking: Annotated[bool, typer.Option("--measure/--no-measure", help="only show what there is")] = True,
    record: Annotated[bool, typer.Option(help="add the tables to bench/results/quality.jsonl")] = False,
    plot: Annotated[bool, typer.Option(help="draw build/quality/*.png")] = True,
) -> None:
    """Prints the tables, and draws them."""
    smollm2.ensure_model(model)
    out = BUILD / "quality"
    place = lines or out
    for directory in (out, place):
        directory.mkdir(parents=True, exist_ok=True)
    config = smollm2.config(model)
    head_dim = head_dim_of(config)
    numbers = budgets_of(budgets)
    try:
        found = texts.documents(tokens, documents, length, config.vocab_size)
        changes = {how: texts.drifting(found, how) for how in drift or ()}
    except texts.Refused as refused:
        raise typer.BadParameter(str(refused)) from refused
    asked: list[tuple[str, list[Spec], list[texts.Text]]] = []
    if table or not (sweep or extra or drift or daemon):
        asked.append(("table", table_rows(numbers, head_dim), found))
    if sweep:
        asked.append(("sweep", sweep_rows(head_dim), found))
    for how, changing in changes.items():
        asked.append((f"drift-{how}", drift_rows(head_dim, len(changing[0][1]) // 2), changing))
    if extra:
        asked.append(("extra", extra_rows(head_dim), found))
    studies = []
    for name, specs, several in asked:
        chosen = [spec for spec in specs if re.search(only, f"{name}: {spec.label()}")]
        if chosen:
            studies.append(Study(name, chosen, several, place / f"{name}.jsonl"))
    for study in studies:
        name = torch.cuda.get_device_name() if device.startswith("cuda") else device
        study.begin({"tokens": tokens.name, "device": name, "jobs": jobs, "only": only, "command": " ".join(sys.argv)})
    if measure_lacking:
        run(studies, device, jobs, model)
    measured: dict[str, Any] = {}
    for study in studies:
        head, losses = study.read()
        config = head["config"]
        rows = summary(study.specs, losses, head_dim, config["length"] // 2)
        title = (
            f"SmolLM2-135M, {config['texts']} texts of {config['length']} tokens ({study.name}), loss over half of it"
        )
        show(rows, title)
        if plot:
            draw(rows, out / f"{study.name}.png", "state" if study.name == "sweep" else "fetched", title)
        if record:
            results.append("quality", config, {"table": rows}, made=head["made"])
        measured[study.name] = {**head, "table": rows, "lines": losses}
    if daemon:
        measured["daemon"] = through_daemon(found[0], daemon, device, model, out, record)
    if json_path is not None:
        json_path.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
