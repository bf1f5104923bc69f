"""`hga-kvd bench`: how fast this box stores and fetches K/V.

What measures is in hga_kvd.bench, which brings the client library; it is imported when the command runs, so that the
daemon does not carry it.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from hga_kvd import config

PROFILES_HELP = "decode, burst, prefill, resume, mixed; default: all of them."
SIZE_MIN, SIZE_UNIT = 16 << 20, 1 << 20  # what a fetch of the default depths is a part of; a chunk of the burst


def bench(
    profiles: Annotated[list[str] | None, typer.Argument(metavar="[PROFILE]...", help=PROFILES_HELP)] = None,
    target: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Measure this running daemon, not a temporary one.")
    ] = None,
    nvme: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="On the disk to measure; default: here. With --target: the daemon's disk."),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE.npz", help="Recorded decode steps; default: made-up ones.")
    ] = None,
    head_dim: Annotated[int, typer.Option(min=64, max=1024, help="Of the model that the trace stands for.")] = 128,
    bank: Annotated[int, typer.Option(min=1, help="Groups per KV head in the bank before the trace.")] = 64,
    arena: Annotated[str, typer.Option(metavar="PERCENT", help="RAM of the temporary daemon, over the K/V.")] = "10%",
    size: Annotated[str, typer.Option(metavar="SIZE", help="K/V that burst and prefill store.")] = "1GiB",
    reads: Annotated[str, typer.Option(metavar="SIZES", help="Of one read of the burst.")] = "4KiB,8KiB,32KiB",
    depths: Annotated[str, typer.Option(metavar="COUNTS", help="Reads in one fetch of the burst.")] = "1,8,32,128",
    repeats: Annotated[int, typer.Option(min=1, help="Samples of each case; medians of them are shown.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.01, help="Of each sample of the burst.")] = 0.5,
    steps: Annotated[int, typer.Option(min=1, help="Of the trace, after a warm-up.")] = 1024,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: see that it works, in seconds.")] = False,
    as_json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all numbers here.")] = None,
    plots: Annotated[Path | None, typer.Option(metavar="DIR", help="Draw plots here (needs matplotlib).")] = None,
) -> None:
    """Measures fetch and append on this box, beside the disk and the memory alone, and says what limits them."""
    # The client library and what goes with it, which the daemon does without.
    from hga_kvd.bench.burst import check  # noqa: PLC0415
    from hga_kvd.bench.content import WrongBytes  # noqa: PLC0415
    from hga_kvd.bench.daemon import BenchFailed, running_daemon, temporary_daemon  # noqa: PLC0415
    from hga_kvd.bench.options import Options  # noqa: PLC0415
    from hga_kvd.bench.run import PROFILES, measure  # noqa: PLC0415
    from hga_kvd.bench.trace import TraceInvalid, read_trace, synthetic_trace  # noqa: PLC0415

    try:
        names = _known(profiles or list(PROFILES), list(PROFILES))
        options = Options(
            trace=read_trace(trace) if trace else synthetic_trace(),
            trace_name=trace.name if trace else "synthetic",
            size=_size(size),
            reads=tuple(config.parse_size(text) for text in reads.split(",")),
            depths=_counts(depths),
            repeats=repeats,
            seconds=seconds,
            arena=_share(arena),
            head_dim=head_dim,
            bank_groups=bank,
            steps_max=steps,
        )
        options = options.quick() if quick else options
        if "burst" in names:
            check(options)
        address = config.parse_target(target) if target else None
        _make_places(as_json, plots)
    except (ValueError, OSError, TraceInvalid, BenchFailed) as error:
        said = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else error
        print(f"hga-kvd: {said}", file=sys.stderr)
        raise typer.Exit(2) from None
    directory = nvme or Path.cwd()
    logging.getLogger("hga_kvd_client").setLevel(logging.ERROR)  # daemons of ours are restarted: no news
    try:
        with running_daemon(address, nvme) if address else temporary_daemon(directory) as daemon:
            measure(daemon, names, options, directory, as_json, plots)
    except (BenchFailed, WrongBytes) as error:
        print(f"hga-kvd: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


def _known(names: list[str], profiles: list[str]) -> list[str]:
    for name in names:
        if name not in profiles:
            raise ValueError(f"there is no profile {name!r}; there are {', '.join(profiles)}")
    return names


def _make_places(as_json: Path | None, plots: Path | None) -> None:
    """What cannot be written is better known before minutes of measuring. Raises: OSError."""
    if as_json is not None:
        as_json.open("a").close()
    if plots is not None:
        plots.mkdir(parents=True, exist_ok=True)


def _size(text: str) -> int:
    size = config.parse_size(text)
    if size < SIZE_MIN:
        raise ValueError(f"option --size: {text!r} is too little to measure; give at least {SIZE_MIN >> 20}MiB")
    return size - size % SIZE_UNIT


def _counts(text: str) -> tuple[int, ...]:
    counts = text.split(",")
    if not all(count.strip().isdecimal() and int(count) for count in counts):
        raise ValueError(f"option --depths: {text!r} is not a list of counts; write 1,8,32")
    return tuple(map(int, counts))


def _share(text: str) -> float:
    """`10%` or `0.1`."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise ValueError(f"option --arena: {text!r} is not a share; write a percentage from 1% to 100%")
    return value
