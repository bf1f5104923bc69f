"""The command `hga-kvd`: runs the daemon, or asks one how it is.

Only this file owns process state: signals, the umask, the interpreter's switch interval, what is printed. SIGTERM and
SIGINT drain: no new calls, those in flight finish within grace_s, everything is flushed, exit 0. A second signal exits
at once with 1. A start that is refused says why in one line on stderr and exits 2.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Annotated, Any

# gRPC's C core prints lines of its own, in its own format; it reads this when it is loaded.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
import typer
from hga_kvd_proto.v1 import kvd_pb2, kvd_pb2_grpc
from rich.console import Console
from rich.table import Table
from rich.text import Text
from structlog.typing import FilteringBoundLogger

from hga_kvd import __version__, config, listen
from hga_kvd.engine import Engine
from hga_kvd.errors import KvdError, StartRefused
from hga_kvd.filedisk import make_disk
from hga_kvd.geometry import Geometry
from hga_kvd.handover import Handover
from hga_kvd.landing import Landing
from hga_kvd.log import make_log
from hga_kvd.metrics import Metrics
from hga_kvd.server import Server
from hga_kvd.service import KvdService

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def main() -> None:
    app(prog_name="hga-kvd")


@app.callback(invoke_without_command=True)
def daemon(
    context: typer.Context,
    nvme: Annotated[str | None, typer.Option(metavar="DIR", help="Keep K/V here; without it, in RAM only.")] = None,
    ram: Annotated[str | None, typer.Option(metavar="SIZE", help="RAM arena, for example 4GiB.")] = None,
    nvme_max: Annotated[str | None, typer.Option(metavar="SIZE", help="Most bytes to take in DIR.")] = None,
    listen_on: Annotated[
        list[str] | None,
        typer.Option("--listen", metavar="ADDRESS", help="unix:PATH, /PATH or HOST:PORT; may be given several times."),
    ] = None,
    io_engine: Annotated[str | None, typer.Option(metavar="auto|uring|liburing|posix", help="How to read DIR.")] = None,
    log_level: Annotated[str | None, typer.Option(metavar="debug|info|warning|error", help="What to log.")] = None,
    metrics: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Serve Prometheus metrics here.")] = None,
    config_file: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", envvar="HGA_KVD_CONFIG", help="TOML file of settings.")
    ] = None,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Owns the K/V of language models in RAM and on NVMe, and serves the parts a decode step asks for."""
    if version:
        print(f"hga-kvd {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is not None:
        return
    given = {
        "nvme": nvme,
        "ram": ram,
        "nvme_max": nvme_max,
        "listen": tuple(listen_on) if listen_on else None,
        "io_engine": io_engine,
        "log_level": log_level,
        "metrics": metrics,
    }
    stop = _stop_at_signals()
    try:
        settings = config.load({name: value for name, value in given.items() if value is not None}, config_file)
        code = _run(settings, make_log(settings.log_level, sys.stderr), stop)
    except StartRefused as error:
        print(f"hga-kvd: {error}", file=sys.stderr)
        code = 2
    raise typer.Exit(code)


def _stop_at_signals() -> SimpleQueue[int]:
    """Gets the first signal. (A handler may always put into a SimpleQueue; the lock of an Event may be taken.)"""
    stop: SimpleQueue[int] = SimpleQueue()
    signals = 0

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal signals
        signals += 1
        if signals > 1:
            os._exit(1)
        stop.put(number)

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    return stop


def _wait(stop: SimpleQueue[int]) -> int:
    """The first signal. Looks up now and then: one that another thread catches, or that comes just before the wait
    begins, runs its handler only when this thread runs again."""
    while True:
        try:
            return stop.get(timeout=0.2)
        except Empty:
            continue


def _run(settings: config.Settings, log: FilteringBoundLogger, stop: SimpleQueue[int]) -> int:
    """Serves until `stop` gets something; returns the exit code. Raises: StartRefused."""
    # The I/O thread and the calls' threads hand the interpreter to each other; 5 ms would be a disk's whole batch.
    sys.setswitchinterval(0.0002)
    os.umask(0o077)
    with ExitStack() as stack:
        handover = _claim(settings, stack)
        disk = make_disk(settings, log) if settings.nvme is not None else None
        try:
            engine = Engine(settings, disk, log)
        except BaseException:
            if disk is not None:
                disk.shutdown()
            raise
        failed = False
        try:
            _serve(settings, engine, handover, log, stop)
        finally:
            try:
                engine.shutdown()
            except (KvdError, OSError) as error:
                log.error("not everything was flushed", error=str(error))  # noqa: TRY400
                failed = True
    log.info("stopped")
    return 1 if failed else 0


def _claim(settings: config.Settings, stack: ExitStack) -> Handover | None:
    """The sockets' paths, before anything else is touched. Raises: StartRefused."""
    path = settings.socket_path
    if path is None:
        return None
    if f"unix:{path}" == config.default_listen():
        listen.check_private(path.parent)
    stack.callback(os.close, listen.claim_socket(path))
    try:
        handover = Handover(listen.handover_path(path))
    except OSError as error:
        raise StartRefused(f"cannot listen on {listen.handover_path(path)}: {error.strerror}") from error
    stack.callback(handover.close)
    return handover


def _serve(
    settings: config.Settings,
    engine: Engine,
    handover: Handover | None,
    log: FilteringBoundLogger,
    stop: SimpleQueue[int],
) -> None:
    landing = Landing(settings.region_bytes_max, settings.clients_max)
    metrics = Metrics(engine.stats, lambda: len(landing))
    service = KvdService(
        engine=engine,
        landing=landing,
        handover=handover,
        settings=settings,
        log=log,
        observe_fetch=metrics.fetch_seconds.observe if settings.metrics else None,
    )
    with ExitStack() as stack:  # ends in reverse: first the calls, last the metrics
        if settings.metrics:
            stack.callback(metrics.serve(settings.metrics))
        if handover is not None:
            watcher = threading.Thread(target=service.watch_clients, args=(handover,), name="handover")
            watcher.start()
            stack.callback(watcher.join)
            stack.callback(handover.stop)
        server = Server(service, settings)
        stack.callback(server.stop, settings.grace_s)
        # What the start made stays: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        server.start()
        stats = engine.stats()
        log.info(
            "ready",
            targets=list(server.targets),
            ram_bytes=stats.ram_bytes_max,
            nvme=str(settings.nvme) if settings.nvme else None,
            nvme_bytes=stats.nvme_bytes_max,
            io_engine=stats.io_engine,
            sessions=stats.sessions,
            metrics=settings.metrics,
            pid=os.getpid(),
        )
        for target in server.targets:
            if not target.startswith(("unix:", "127.", "localhost:", "[::1]:")):
                log.warning("anyone who reaches this address may read and delete K/V: there is no login", target=target)
        number = _wait(stop)
        log.info("draining", signal=signal.Signals(number).name, grace_s=settings.grace_s)


@app.command()
def stat(
    target: Annotated[
        str | None, typer.Option(metavar="ADDRESS", envvar="HGA_KVD_TARGET", help="Which daemon; default: this user's.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Shows the counters and sessions of a running daemon."""
    try:
        address = config.parse_target(target) if target else config.default_listen()
    except ValueError as error:
        print(f"hga-kvd: option --target: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    options = (("grpc.max_receive_message_length", -1),)
    with grpc.insecure_channel(address, options=options) as channel:
        stub = kvd_pb2_grpc.KvdStub(channel)  # type: ignore[no-untyped-call]
        try:
            stats = stub.Stat(kvd_pb2.StatRequest(), timeout=10)
            sessions: list[kvd_pb2.SessionInfo] = []
            more = True
            while more:
                after = sessions[-1].session_id if sessions else 0
                page = stub.List(kvd_pb2.ListRequest(after_session_id=after), timeout=10)
                sessions += page.sessions
                more = page.more
        except grpc.RpcError as error:
            print(f"hga-kvd: no answer from {address}: {error.details()}", file=sys.stderr)
            raise typer.Exit(1) from None
    if as_json:
        print(json.dumps({**_plain(stats), "session_list": [_plain(session) for session in sessions]}, indent=2))
    else:
        _show(address, stats, sessions)


def _plain(message: Any) -> dict[str, Any]:
    """Fields under their names in the proto, numbers as numbers: protobuf's own JSON writes 64-bit ones as strings."""
    values = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is None and not isinstance(value, bytes):
            values[field.name] = value
        elif field.message_type is not None and message.HasField(field.name):
            values[field.name] = _plain(value)
    return values


def _show(address: str, stats: kvd_pb2.StatResponse, sessions: list[kvd_pb2.SessionInfo]) -> None:
    console = Console()
    up = int(stats.uptime_s)
    facts = Table(show_header=False, box=None, title=f"hga-kvd {stats.version} at {address}", title_justify="left")
    for name, value in (
        ("up", f"{up // 3600}:{up // 60 % 60:02}:{up % 60:02}"),
        ("I/O engine", stats.io_engine),
        (
            "RAM",
            f"{_size(stats.ram_bytes_used)} of {_size(stats.ram_bytes_max)}, {_size(stats.ram_bytes_dirty)} to write",
        ),
        (
            "NVMe",
            f"{_size(stats.nvme_bytes_used)} of {_size(stats.nvme_bytes_max)}, {_size(stats.written_bytes)} written",
        ),
        ("appended", f"{_size(stats.appended_bytes)}, {stats.flushes} flushes"),
        (
            "fetched",
            f"{stats.fetches} calls; RAM {stats.fetched_ram_records} records, {_size(stats.fetched_ram_bytes)}; "
            f"NVMe {stats.fetched_nvme_records} records, {_size(stats.fetched_nvme_bytes)}",
        ),
        ("evicted", f"{stats.evicted_extents} extents"),
        ("damaged", f"{stats.damaged_records} records"),
        ("clients", f"{stats.attached_clients} with shared memory"),
    ):
        facts.add_row(name, value)
    console.print(facts)
    table = Table(title=f"{len(sessions)} sessions", title_justify="left")
    for heading in ("id", "name", "tokens", "durable", "K/V", "geometry", "damaged"):
        table.add_column(heading, justify="left" if heading in ("name", "geometry") else "right")
    for session in sessions:
        g = session.geometry
        chunk_bytes = Geometry(g.layers, g.kv_heads, g.head_dim, g.dtype, g.chunk_tokens, g.group_tokens).chunk_bytes
        table.add_row(
            str(session.session_id),
            Text("(temporary)", style="dim") if session.temporary else Text(session.name),
            str(session.chunk_count * g.chunk_tokens),
            str(session.durable_chunk_count * g.chunk_tokens),
            _size(session.chunk_count * chunk_bytes),
            f"{g.layers} x {g.kv_heads} x {g.head_dim} {g.dtype}",
            str(session.damaged_records),
        )
    if sessions:
        console.print(table)


def _size(count: int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024  # type: ignore[assignment]
    return f"{count:.4g} TiB"


if __name__ == "__main__":
    main()
