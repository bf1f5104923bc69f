"""Where the daemon listens: private socket directories, one daemon a socket, no stale files.

A socket path is ours while we hold the lock file beside it; only then is a left-over socket file removed, and only if
nobody answers on it. The lock file itself stays: removing it would let two daemons lock two files of one name.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from pathlib import Path

from hga_kvd.errors import StartRefused

HANDOVER_SUFFIX = ".shm"


def check_private(directory: Path) -> None:
    """Makes `directory` for this user alone, or checks that it is so. Raises StartRefused."""
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        status = directory.lstat()
    except OSError as error:
        raise StartRefused(f"cannot use the socket directory {directory}: {error.strerror}; give --listen") from error
    if not stat.S_ISDIR(status.st_mode):
        raise StartRefused(f"{directory} is not a directory; remove it, or give --listen")
    if status.st_uid != os.geteuid():
        raise StartRefused(f"the socket directory {directory} belongs to user {status.st_uid}; give --listen")
    if status.st_mode & 0o077:
        raise StartRefused(
            f"the socket directory {directory} is open to other users (mode {status.st_mode & 0o7777:04o}); "
            f"run chmod 700 {directory}, or give --listen"
        )


def claim_socket(path: Path) -> int:
    """Makes `path`, and the handover path beside it, free for us to bind. Returns the descriptor of the lock: keep it.

    Raises: StartRefused when another process listens there, or something that is not a socket is in the way.
    """
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        lock = os.open(path.with_name(path.name + ".lock"), flags, 0o600)
    except OSError as error:
        raise StartRefused(f"cannot listen on {path}: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(lock)
        raise StartRefused(
            f"another hga-kvd (pid {holder}) listens on {path}; stop it, or give another --listen"
        ) from None
    try:
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        for name in (path, handover_path(path)):
            _remove_stale(name)
    except OSError as error:
        os.close(lock)
        raise StartRefused(f"cannot listen on {path}: {error.strerror}") from error
    except StartRefused:
        os.close(lock)
        raise
    return lock


def handover_path(path: Path) -> Path:
    return path.with_name(path.name + HANDOVER_SUFFIX)


def _remove_stale(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise StartRefused(f"{path} exists and is not a socket; move it away, or give another --listen")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except TimeoutError:
            pass  # a full backlog: someone is there
    raise StartRefused(f"another process answers on {path}; stop it, or give another --listen")
