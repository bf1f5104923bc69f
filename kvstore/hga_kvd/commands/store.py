"""What commands that read a store directory share: its lock, and how a refusal is told."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from hga_kvd.config import Settings
from hga_kvd.errors import StartRefused
from hga_kvd.filedisk import FileDisk, make_disk
from hga_kvd.format import segment_id_of
from hga_kvd.log import make_log
from hga_kvd.manifest import MANIFEST_COPY_NAME, MANIFEST_NAME


@contextmanager
def store_at(directory: Path) -> Iterator[FileDisk]:
    """The store's disk, locked. Refused (a daemon runs on it, it cannot be read): one line on stderr, exit code 2."""
    if not _may_hold_a_store(directory):
        print(f"hga-kvd: {directory} holds no store: there is neither a manifest nor a segment in it", file=sys.stderr)
        raise typer.Exit(2)
    try:
        disk = make_disk(Settings(nvme=directory), make_log("warning", sys.stderr))
    except StartRefused as error:
        print(f"hga-kvd: {str(error).replace('--nvme ', '')}", file=sys.stderr)
        raise typer.Exit(2) from None
    try:
        yield disk
    except OSError as error:
        print(f"hga-kvd: {directory}: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    finally:
        disk.shutdown()


def _may_hold_a_store(directory: Path) -> bool:
    """False for a directory of other things: not even a lock file is to be left there."""
    try:
        names = [path.name for path in directory.iterdir()]
    except OSError:  # why, is for make_disk to say
        return True
    return any(name in (MANIFEST_NAME, MANIFEST_COPY_NAME) or segment_id_of(name) is not None for name in names)
