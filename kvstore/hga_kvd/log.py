"""The daemon's log: one event a line on a stream, for people on a terminal, as JSON otherwise.

Logging never fails a call: a line that cannot be written (a closed pipe, a full disk) is dropped. gRPC's own messages
come through the same door; a message that does not parse is the client's affair, one line without a traceback.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any, TextIO

import structlog
from structlog.typing import FilteringBoundLogger

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class _Lines:
    """Writes whole lines; a write is one call, so lines of several threads do not mix."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def msg(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(line + "\n")
            self._stream.flush()

    log = debug = info = warning = warn = error = critical = exception = msg


class _Bridge(logging.Handler):
    """Passes records of libraries that use `logging` on to our log."""

    def __init__(self, log: FilteringBoundLogger) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, Any] = {"source": record.name, "detail": record.getMessage()}
        if record.exc_info and record.exc_info[1] is not None:
            fields["error"] = repr(record.exc_info[1])
            if record.name != "grpc._common":  # deserialization of what a client sent
                fields["exc_info"] = record.exc_info
        self._log.log(record.levelno, "library", **fields)


def make_log(level: str, stream: TextIO) -> FilteringBoundLogger:
    """A thread-safe structured log of events of `level` and above. Takes over the root logger of `logging`."""
    terminal = stream.isatty()
    tail: list[Any] = (
        [structlog.dev.ConsoleRenderer(colors=True)]
        if terminal
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    )
    log: FilteringBoundLogger = structlog.wrap_logger(
        _Lines(stream),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S" if terminal else "iso", utc=not terminal),
            *tail,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        cache_logger_on_first_use=True,
    )
    logging.root.handlers[:] = [_Bridge(log)]
    return log


def silent_log() -> FilteringBoundLogger:
    log: FilteringBoundLogger = structlog.wrap_logger(
        structlog.ReturnLogger(), wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL)
    )
    return log
