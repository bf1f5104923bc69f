"""Where a daemon is looked for, and how a target may be written. Nothing is connected here."""

from __future__ import annotations

import os
from pathlib import Path

from hga_kvd_client import errors


def default_target() -> str:
    """HGA_KVD_TARGET, or else the unix socket where a daemon of this user listens by default."""
    target = os.environ.get("HGA_KVD_TARGET")
    if target:
        return target
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    base = Path(runtime) / "hga-kvd" if runtime else Path(f"/tmp/hga-kvd-{os.getuid()}")
    return f"unix:{base / 'kvd.sock'}"


def checked_target(target: str) -> str:
    """The target as gRPC takes it. Raises: InvalidRequest."""
    if target.startswith("/"):
        return f"unix:{target}"
    if target.startswith("unix:"):
        return "unix:" + target.removeprefix("unix:").removeprefix("//")
    host, colon, port = target.rpartition(":")
    if not (colon and host and port.isdigit()):
        raise errors.InvalidRequest(f"target is {target!r}; it must be unix:/path, /path or host:port")
    return target
