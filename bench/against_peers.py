"""hga-kvd beside other stores: the same records, the same random batches, the same state of the machine, in one run.

    make peers                       # a venv of their own in build/peers-venv, then this; or, with what is installed:
    python bench/against_peers.py

All stores of a state are filled first, then read in turns, so that what disturbs the machine disturbs all alike. Cold: each
store reads past the page cache where it can, and before every batch of one that cannot, the page cache is emptied
(through /proc/sys/vm/drop_caches, which takes root). Hot: every record was read once before. Every record is compared.
One line a peer goes to bench/results/peers.jsonl. A peer that is not installed is named as such.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import numpy as np
import results
import typer
from hga_kvd.bench.content import Content, WrongBytes
from hga_kvd.config import parse_size
from hga_kvd.memory import aligned_buffer
from hga_kvd_client.geometry import KEY_DTYPE, Geometry
from peers import PEERS, Missing, load
from peers.base import Bytes, Numbers, Peer, Shape, State
from raw_io import fio_speed
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

PUT_BYTES = 8 << 20
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
FIO_DEPTH = 64  # of hga-kvd's default
FIO = (
    "fio --name=job --filename='{file}' --size={total} --bs={size} --rw=randread --direct=1 --ioengine=io_uring "
    "--iodepth={depth} --norandommap --randrepeat=0 --time_based --runtime=500ms --output-format=json"
)
console = Console()


class Records:
    """What record number n holds."""

    def __init__(self, shape: Shape) -> None:
        head_dim = shape.record_bytes // 64  # K and V of 16 tokens in 2 bytes: a record of one group, for Content
        self._content = Content(Geometry(1, 1, head_dim, "bfloat16"))
        assert self._content.geometry.record_bytes == shape.record_bytes

    def of(self, numbers: Numbers) -> Bytes:
        keys = np.zeros(len(numbers), KEY_DTYPE)
        keys["group"] = numbers
        return self._content.records(keys)


def main(
    directory: Annotated[Path, typer.Option(help="On the disk to measure.")] = results.ROOT / "build" / "bench",
    record_size: Annotated[str, typer.Option(help="Bytes of one record.")] = "32KiB",
    cold_size: Annotated[str, typer.Option(help="Bytes each store holds when cold.")] = "1GiB",
    hot_size: Annotated[str, typer.Option(help="Bytes each store holds when hot.")] = "256MiB",
    batch: Annotated[int, typer.Option(help="Records of one read.", min=1)] = 128,
    batches: Annotated[int, typer.Option(help="Of one sample.", min=1)] = 8,
    repeats: Annotated[int, typer.Option(help="Samples of each peer, in turns.", min=1)] = 5,
    only: Annotated[str, typer.Option(help="Comma-separated names; default: all.")] = "",
    record_results: Annotated[bool, typer.Option("--record", help="Append to bench/results/peers.jsonl.")] = False,
) -> None:
    """Prints GB/s of each peer, cold and hot: medians and spreads."""
    directory.mkdir(parents=True, exist_ok=True)
    names = [name.strip() for name in only.split(",")] if only else list(PEERS)
    found: dict[str, type[Peer]] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            found[name] = load(name)
        except Missing as error:
            missing[name] = str(error)
    speeds: dict[State, dict[str, list[float]]] = {}
    facts: dict[str, dict[str, str]] = {"fio": {"pages": "huge pages of a tmpfs"}}
    bar = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*bar, console=Console(stderr=True), transient=True) as progress:
        for state, size in (("cold", cold_size), ("hot", hot_size)):
            shape = Shape(parse_size(size) // parse_size(record_size), parse_size(record_size), batch)
            classes = {name: kind for name, kind in found.items() if state in kind.states}
            speeds[state] = measure(classes, directory, shape, state, batches, repeats, progress, facts)
    show(speeds, found, missing, f"{batch} random records of {record_size}, GB/s")
    if record_results:
        run = datetime.now(UTC).isoformat(timespec="seconds")
        fixed = {"run": run, "record_bytes": parse_size(record_size), "batch": batch, "batches": batches}
        sizes = {"cold_bytes": parse_size(cold_size), "hot_bytes": parse_size(hot_size)}
        for name in [*found, "fio"]:
            by_state = {f"{state}_gbs": of_state[name] for state, of_state in speeds.items() if name in of_state}
            if by_state:
                results.append("peers", {"peer": name, **facts[name], **fixed, **sizes}, by_state, directory)


def measure(
    classes: dict[str, type[Peer]],
    directory: Path,
    shape: Shape,
    state: State,
    batches: int,
    repeats: int,
    progress: Progress,
    facts: dict[str, dict[str, str]],
) -> dict[str, list[float]]:
    """GB/s of each sample, by peer. facts: gets what each peer says of itself."""
    # Huge pages for all, as hga-kvd's arena has them: a disk reads faster into them.
    records, out = Records(shape), aligned_buffer(shape.batch * shape.record_bytes, huge=True)
    task = progress.add_task("", total=None)
    with ExitStack() as stack:
        place = Path(tempfile.mkdtemp(dir=directory))
        stack.callback(shutil.rmtree, place)
        peers: dict[str, Peer] = {}
        for name, kind in classes.items():
            progress.update(task, description=f"{state}: storing in {name}")
            own = place / name.replace(" ", "-")
            own.mkdir()
            peers[name] = kind(own, shape, state)
            stack.callback(peers[name].close)
            fill(peers[name], records)
            facts[name] = peers[name].facts()
        os.sync()  # what is not written yet cannot be dropped from the page cache
        speeds: dict[str, list[float]] = {name: [] for name in peers}
        chance = np.random.default_rng(1)
        memory = out.reshape(shape.batch, shape.record_bytes)
        if state == "hot":
            for name, peer in peers.items():
                progress.update(task, description=f"hot: reading all of {name} once")
                for first in range(0, shape.records - shape.batch + 1, shape.batch):
                    peer.read(np.arange(first, first + shape.batch), memory)
        fio_file = place / "preadv" / "records.bin"
        for repeat in range(repeats):
            numbers = [chance.choice(shape.records, shape.batch, replace=False) for _ in range(batches)]
            order = list(peers.items())
            for name, peer in order[repeat % len(order) :] + order[: repeat % len(order)]:
                progress.update(task, description=f"{state}: {name}, sample {repeat + 1} of {repeats}")
                speeds[name].append(sample(peer, numbers, memory, records))
            if state == "cold" and fio_file.exists():
                job = FIO.format(file=fio_file, total=fio_file.stat().st_size, size=shape.record_bytes, depth=FIO_DEPTH)
                speed = fio_speed(job, FIO_DEPTH * shape.record_bytes, "huge")
                if speed is not None:
                    speeds.setdefault("fio", []).append(speed)
    progress.remove_task(task)
    return speeds


def fill(peer: Peer, records: Records) -> None:
    shape = peer.shape
    part = max(1, PUT_BYTES // shape.record_bytes)
    for first in range(0, shape.records, part):
        peer.put(first, records.of(np.arange(first, min(first + part, shape.records))))
    peer.finish()


def sample(peer: Peer, batches: list[Numbers], out: Bytes, records: Records) -> float:
    """GB/s over the batches; only `read` is in the time. Raises: WrongBytes."""
    taken = 0.0
    for numbers in batches:
        if peer.state == "cold":
            peer.forget()
            if not peer.direct:
                drop_page_cache()
        out[:] = 0
        start = time.perf_counter()
        read = peer.read(numbers, out)
        taken += time.perf_counter() - start
        if not np.array_equal(read, records.of(numbers)):
            raise WrongBytes(f"{type(peer).__name__} returned other bytes than were stored")
    return len(batches) * peer.shape.batch * peer.shape.record_bytes / taken / 1e9


def drop_page_cache() -> None:
    """Raises: SystemExit without the right to."""
    try:
        DROP_CACHES.write_text("1")
    except OSError as error:
        raise SystemExit(
            f"{DROP_CACHES} cannot be written ({error.strerror}): cold reads are measured as root"
        ) from error


def show(
    speeds: dict[State, dict[str, list[float]]], found: dict[str, type[Peer]], missing: dict[str, str], title: str
) -> None:
    table = Table(title=title)
    table.add_column("")
    for state in speeds:
        table.add_column(state, justify="right")
        table.add_column("spread", justify="right")
    table.add_column("how")
    cold = speeds["cold"]
    for name in sorted([*found, *(["fio"] if "fio" in cold else [])], key=lambda n: -max(cold.get(n, [0]))):
        cells = []
        for of_state in speeds.values():
            values = of_state.get(name)
            cells += (
                [f"{statistics.median(values):.2f}", f"{min(values):.2f}-{max(values):.2f}"] if values else ["", ""]
            )
        table.add_row(name, *cells, PEERS[name].what if name in PEERS else "random reads of this size, 64 in flight")
    console.print(table)
    for name, reason in missing.items():
        console.print(f"{name}: {reason}")


if __name__ == "__main__":
    typer.run(main)
