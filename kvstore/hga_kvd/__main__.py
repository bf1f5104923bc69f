"""The command `hga-kvd`: runs the daemon; what else it can do stands in `commands/`.

Only this file owns process state: signals, the umask, the interpreter's switch interval, what is printed. SIGTERM and
SIGINT drain: no new calls, those in flight finish within grace_s, everything is flushed, exit 0. A second signal exits
at once with 1. A start that is refused says why in one line on stderr and exits 2.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from contextlib import ExitStack
from io import FileIO, TextIOWrapper
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Annotated, TextIO

# gRPC's C core prints lines of its own, in its own format; it reads this when it is loaded.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import typer
from structlog.typing import FilteringBoundLogger

from hga_kvd import __version__, config, listen
from hga_kvd.commands import COMMANDS
from hga_kvd.engine import Engine
from hga_kvd.errors import KvdError, StartRefused
from hga_kvd.filedisk import make_disk
from hga_kvd.handover import Handover
from hga_kvd.landing import Landing
from hga_kvd.log import make_log
from hga_kvd.metrics import Metrics
from hga_kvd.server import Server
from hga_kvd.service import KvdService

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
for name, command in COMMANDS.items():
    app.command(name)(command)


def main() -> None:
    app(prog_name="hga-kvd")


@app.callback(invoke_without_command=True)
def daemon(
    context: typer.Context,
    nvme: Annotated[str | None, typer.Option(metavar="DIR", help="Keep K/V here; without it, in RAM only.")] = None,
    ram: Annotated[str | None, typer.Option(metavar="SIZE", help="RAM arena, for example 4GiB.")] = None,
    nvme_max: Annotated[str | None, typer.Option(metavar="SIZE", help="Most bytes to take in DIR.")] = None,
    evict: Annotated[
        str | None, typer.Option(metavar="none|lru", help="Delete idle sessions when space is short.")
    ] = None,
    listen_on: Annotated[
        list[str] | None,
        typer.Option("--listen", metavar="ADDRESS", help="unix:PATH, /PATH or HOST:PORT; may be given several times."),
    ] = None,
    io_engine: Annotated[str | None, typer.Option(metavar="auto|uring|liburing|posix", help="How to read DIR.")] = None,
    scrub_rate: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Bytes a second to verify in the background; 0: none.")
    ] = None,
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
        "evict": evict,
        "listen": tuple(listen_on) if listen_on else None,
        "io_engine": io_engine,
        "scrub_rate": scrub_rate,
        "log_level": log_level,
        "metrics": metrics,
    }
    stop = _stop_at_signals()
    try:
        settings = config.load({name: value for name, value in given.items() if value is not None}, config_file)
        log = make_log(settings.log_level, _unbuffered_stderr())
        for name in config.unknown_variables():
            log.warning("no such setting: docs/configuration.md lists all", variable=name)
        code = _run(settings, log, stop)
    except StartRefused as error:
        print(f"hga-kvd: {error}", file=sys.stderr)
        code = 2
    raise typer.Exit(code)


def _unbuffered_stderr() -> TextIO:
    """A line that a closed pipe did not take is gone. In the buffer of sys.stderr it would come up again when the
    interpreter ends, and make the exit code 120."""
    return TextIOWrapper(FileIO(sys.stderr.fileno(), "w", closefd=False), errors="backslashreplace", write_through=True)


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
    landing = Landing(settings.region_bytes_max, settings.clients_max, settings.regions_bytes_max)
    metrics = Metrics(engine.stats, lambda: len(landing))
    service = KvdService(
        engine=engine,
        landing=landing,
        handover=handover,
        settings=settings,
        log=log,
        observe_fetch=metrics.fetch_seconds.observe if settings.metrics else None,
        observe_wait=metrics.observe_wait if settings.metrics else None,
    )
    metrics.watch_turns(service.calls.turns.waiting)
    with ExitStack() as stack:  # ends in reverse: first the calls, last the metrics
        scraped = None
        if settings.metrics:
            scraped, end = metrics.serve(settings.metrics)
            stack.callback(end)
        if handover is not None:
            watcher = threading.Thread(target=service.watch_clients, args=(handover,), name="handover")
            watcher.start()
            stack.callback(watcher.join)
            stack.callback(handover.stop)
        server = Server(service, settings)
        stack.callback(server.stop, settings.grace_s)
        stack.callback(service.lanes.shutdown, settings.grace_s)
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
            native=stats.native,
            sessions=stats.sessions,
            metrics=scraped,
            pid=os.getpid(),
        )
        for target in server.targets:
            if not target.startswith(("unix:", "127.", "localhost:", "[::1]:")):
                log.warning("anyone who reaches this address may read and delete K/V: there is no login", target=target)
        number = _wait(stop)
        log.info("draining", signal=signal.Signals(number).name, grace_s=settings.grace_s)


if __name__ == "__main__":
    main()
