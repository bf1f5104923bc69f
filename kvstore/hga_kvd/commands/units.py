"""How commands write sizes and tables for people."""

from __future__ import annotations

import os
import sys

from rich.console import Console

# Where there is no terminal: a table of sessions fits.
COLUMNS = 140


def console() -> Console:
    """For standard output, as wide as the terminal."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else COLUMNS)


def size(count: int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024  # type: ignore[assignment]
    return f"{count:.4g} TiB"
