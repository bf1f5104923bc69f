"""FileDisk keeps the promises of disk.Disk on a real file system, and refuses directories that cannot."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hga_kvd import filedisk
from hga_kvd.config import Settings
from hga_kvd.errors import StartRefused
from hga_kvd.filedisk import FileDisk, make_disk
from hga_kvd.memory import address_of, aligned_buffer
from hypothesis import given, settings
from hypothesis import strategies as st

MIB = 1 << 20


class Log:
    """Keeps what was logged."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def info(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))

    warning = info


def start(directory: Path, io_engine: str = "auto", log: Log | None = None) -> FileDisk:
    return make_disk(Settings(nvme=directory, io_engine=io_engine), log or Log())  # type: ignore[arg-type]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """On a real disk, or the test is skipped: tmpfs is what make_disk refuses."""
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(tmp_path)], capture_output=True, text=True, check=True).stdout
    if kind.strip() in ("tmpfs", "ramfs"):
        pytest.skip(f"the temporary directory is on {kind.strip()}")
    return tmp_path


@pytest.fixture
def disk(directory: Path) -> Iterator[FileDisk]:
    disk = start(directory)
    yield disk
    disk.shutdown()


@pytest.fixture
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A real ext4 of 16 MiB on a loop device."""
    base = tmp_path_factory.mktemp("loop")
    image, mount = base / "image", base / "mount"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(16 * MIB)
    commands = (["mkfs.ext4", "-q", "-m", "0", str(image)], ["mount", "-o", "loop", str(image), str(mount)])
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip(f"{command[0]} is not installed")
        if done.returncode:
            pytest.skip(f"no loop-mounted ext4 here (root and /dev/loop needed): {done.stderr.strip()}")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def columns(
    handle: int, offsets: npt.ArrayLike, length: int, buffer: npt.NDArray[np.uint8]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
    """Transfers of `length` bytes, one after the other in the buffer."""
    places = np.array(offsets, np.int64)
    addresses = np.uint64(address_of(buffer)) + np.arange(len(places), dtype=np.uint64) * np.uint64(length)
    return np.full(len(places), handle, np.int32), places, addresses, np.full(len(places), length, np.int64)


def random_buffer(size: int) -> npt.NDArray[np.uint8]:
    buffer = aligned_buffer(size)
    buffer[:] = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    return buffer


# --- files and bytes ---


@pytest.mark.parametrize("io_engine", ["uring", "liburing", "posix"])
def test_what_was_written_is_read_back_also_after_a_restart(io_engine: str, directory: Path) -> None:
    try:
        disk = start(directory, io_engine)
    except StartRefused as error:
        pytest.skip(str(error))
    assert disk.engine == io_engine
    content, offsets = random_buffer(MIB), np.arange(0, MIB, 4096)[::-1]
    handle = disk.create("segment", MIB)
    assert disk.size(handle) == MIB
    assert not disk.write(*columns(handle, offsets, 4096, content)).any()
    disk.sync(handle)
    disk.sync_names()
    disk.shutdown()

    disk = start(directory, io_engine)
    assert disk.names() == ["segment"]
    handle = disk.open("segment")
    back = aligned_buffer(MIB)
    assert not disk.read(*columns(handle, offsets, 4096, back)).any()
    assert np.array_equal(back, content)
    disk.shutdown()


def test_reserved_and_unwritten_bytes_are_zero(disk: FileDisk) -> None:
    handle = disk.create("a", MIB)
    buffer = random_buffer(8192)
    assert not disk.read(*columns(handle, [0, MIB - 4096], 4096, buffer)).any()
    assert not buffer.any()


def test_several_files_in_one_batch(disk: FileDisk) -> None:
    handles = [disk.create(name, MIB) for name in "abc"]
    content = random_buffer(3 * 4096)
    write = columns(0, [0, 4096, 8192], 4096, content)
    assert not disk.write(np.array(handles, np.int32), *write[1:]).any()
    back = aligned_buffer(3 * 4096)
    read = columns(0, [0, 4096, 8192], 4096, back)
    assert not disk.read(np.array(handles, np.int32), *read[1:]).any()
    assert np.array_equal(back, content)


def test_an_empty_batch_is_done(disk: FileDisk) -> None:
    assert disk.read(*columns(1, [], 4096, aligned_buffer(1))).tolist() == []


def test_the_end_of_the_file_has_no_data(disk: FileDisk) -> None:
    handle = disk.create("a", 8192)
    buffer = aligned_buffer(4 * 8192)
    assert disk.read(*columns(handle, [0, 4096, 8192, 1 << 40], 8192, buffer)).tolist() == [0, *[-errno.ENODATA] * 3]


@pytest.mark.parametrize("column", [1, 2, 3])
def test_an_unaligned_transfer_is_our_bug(column: int, disk: FileDisk) -> None:
    handle = disk.create("a", MIB)
    transfer = columns(handle, [0, 4096], 4096, aligned_buffer(MIB))
    transfer[column][1] += type(transfer[column][1])(disk.alignment // 2)
    with pytest.raises(AssertionError, match=f"aligned to {disk.alignment} bytes"):
        disk.read(*transfer)


def test_a_transfer_of_no_bytes_is_our_bug(disk: FileDisk) -> None:
    handle = disk.create("a", MIB)
    with pytest.raises(AssertionError, match="no bytes"):
        disk.write(*columns(handle, [0], 0, aligned_buffer(1)))


def test_a_closed_handle_is_never_another_file(disk: FileDisk) -> None:
    closed = disk.create("a", 4096)
    disk.close(closed)
    handle = disk.create("b", 4096)
    handles = np.array([closed, handle, -7, 0, handle + 1, 1 << 30], np.int32)
    buffer = aligned_buffer(6 * 4096)
    expected = [-errno.EBADF, 0, *[-errno.EBADF] * 4]
    assert disk.read(handles, *columns(0, [0] * 6, 4096, buffer)[1:]).tolist() == expected
    for act in (disk.close, disk.sync, disk.size):
        with pytest.raises(OSError, match="not open"):
            act(closed)


def test_names_are_exact(disk: FileDisk, directory: Path) -> None:
    (directory / "lost+found").mkdir()
    (directory / "link").symlink_to("/etc/passwd")
    (directory / "notes.txt").write_text("somebody else's")
    disk.close(disk.create("b", 4096))
    disk.replace("a", b"content")
    assert disk.names() == ["a", "b", "notes.txt"]
    with pytest.raises(FileExistsError):
        disk.create("b", 4096)
    disk.remove("b")
    assert disk.names() == ["a", "notes.txt"]
    with pytest.raises(FileNotFoundError):
        disk.remove("b")
    for missing in (disk.open, disk.read_file):
        with pytest.raises(FileNotFoundError):
            missing("b")
    with pytest.raises(OSError, match="link"):
        disk.read_file("link")


@pytest.mark.parametrize("name", ["LOCK", ".hidden", "", "a/b", ".."])
def test_names_of_the_disk_itself_are_our_bug(name: str, disk: FileDisk) -> None:
    for act in (lambda: disk.create(name, 4096), lambda: disk.remove(name), lambda: disk.replace(name, b"")):
        with pytest.raises(AssertionError):
            act()


@settings(max_examples=20)
@given(contents=st.lists(st.binary(max_size=10_000), min_size=1, max_size=4))
def test_replace_gives_the_last_content(disk: FileDisk, contents: list[bytes]) -> None:
    for content in contents:
        disk.replace("manifest", content)
        assert disk.read_file("manifest") == content
    assert disk.names() == ["manifest"]


@pytest.mark.parametrize("step", ["fsync", "rename"])
def test_a_failed_replace_leaves_the_old_content_and_no_file(
    step: str, disk: FileDisk, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "no")

    disk.replace("manifest", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(filedisk.os, step, fail)
        with pytest.raises(OSError, match="no"):
            disk.replace("manifest", b"new")
    assert disk.read_file("manifest") == b"old"
    assert sorted(os.listdir(directory)) == ["LOCK", "manifest"]


def test_what_a_crash_left_of_a_replace_does_not_matter(disk: FileDisk, directory: Path) -> None:
    (directory / ".manifest.new").write_bytes(b"x" * 10_000)
    assert disk.names() == []
    disk.replace("manifest", b"short")
    assert disk.read_file("manifest") == b"short"
    assert sorted(os.listdir(directory)) == ["LOCK", "manifest"]


def test_a_disk_leaves_no_descriptor_behind(directory: Path) -> None:
    before = os.listdir("/proc/self/fd")
    disk = start(directory)
    disk.create("a", 4096)
    disk.close(disk.create("b", 4096))
    disk.shutdown()
    assert os.listdir("/proc/self/fd") == before
    assert sorted(os.listdir(directory)) == ["LOCK", "a", "b"]


# --- a full disk ---


def test_create_on_a_full_disk_leaves_no_file(small_disk: Path) -> None:
    disk = start(small_disk)
    free = disk.free_bytes()
    assert 4 * MIB < free < 16 * MIB
    with pytest.raises(OSError, match="No space left") as caught:
        disk.create("large", 64 * MIB)
    assert caught.value.errno == errno.ENOSPC
    assert disk.names() == []
    assert disk.free_bytes() == free
    disk.close(disk.create("fits", free // 2))
    assert disk.free_bytes() <= free - free // 2
    disk.shutdown()


def test_a_full_disk_starts_and_reads_when_it_was_used_before(small_disk: Path) -> None:
    disk = start(small_disk)
    content = random_buffer(4096)
    assert not disk.write(*columns(disk.create("kept", MIB), [0], 4096, content)).any()
    disk.shutdown()
    fill(small_disk)

    disk = start(small_disk)
    back = aligned_buffer(4096)
    assert not disk.read(*columns(disk.open("kept"), [0], 4096, back)).any()
    assert np.array_equal(back, content)
    with pytest.raises(OSError, match="No space left"):
        disk.create("new", MIB)
    with pytest.raises(OSError, match="No space left"):
        disk.replace("manifest", bytes(10_000))
    assert disk.names() == ["filler", "kept"]
    disk.shutdown()


def test_a_full_new_disk_is_refused(small_disk: Path) -> None:
    fill(small_disk)
    with pytest.raises(StartRefused, match="free space there"):
        start(small_disk)


def fill(directory: Path) -> None:
    block = bytes(MIB)
    with (directory / "filler").open("wb", buffering=0) as file:
        while block:
            try:
                file.write(block)
            except OSError:
                block = block[: len(block) // 2]


# --- directories that cannot serve ---


def test_a_missing_directory_is_refused(directory: Path) -> None:
    with pytest.raises(StartRefused, match="nowhere does not exist: create"):
        start(directory / "nowhere")


def test_a_file_is_refused(directory: Path) -> None:
    (directory / "file").touch()
    with pytest.raises(StartRefused, match="not a directory"):
        start(directory / "file")
    with pytest.raises(StartRefused, match="file/below"):
        start(directory / "file" / "below")


def test_tmpfs_is_refused() -> None:
    kind = subprocess.run(["stat", "-f", "-c", "%T", "/dev/shm"], capture_output=True, text=True, check=False).stdout
    if kind.strip() != "tmpfs":
        pytest.skip("/dev/shm is not tmpfs here")
    with tempfile.TemporaryDirectory(prefix="hga-kvd-test-", dir="/dev/shm") as place:
        with pytest.raises(StartRefused, match="is on tmpfs, which is memory"):
            start(Path(place))
        assert os.listdir(place) == []


def test_a_read_only_file_system_is_refused(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StartRefused, match="read-only file system: remount"):
        start(small_disk)


def test_a_directory_without_permission_is_refused(directory: Path) -> None:
    """Root may write anywhere, so the child stops being root, once it has its modules and stands in the directory."""
    directory.chmod(0o555)
    command = [sys.executable, "-c", OPEN, ".", "nobody"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=60, check=False)
    assert "cannot be written (Permission denied): give this user the right" in done.stdout, done.stderr
    assert os.listdir(directory) == []


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_without_direct_transfers_is_refused(
    number: int, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: str, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(number, os.strerror(number))
        return real(path, flags, *rest, **more)

    before = os.listdir("/proc/self/fd")
    with monkeypatch.context() as patch:
        patch.setattr(filedisk.os, "open", refuse)
        with pytest.raises(StartRefused, match="does not support O_DIRECT"):
            start(directory)
    assert os.listdir("/proc/self/fd") == before


def test_a_file_system_without_preallocation_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(filedisk, "_fallocate", refuse)
    with pytest.raises(StartRefused, match="cannot preallocate"):
        start(directory)


@pytest.mark.parametrize(("stated", "works"), [(0, False), (512, True), (4096, True), (8192, False)])
def test_alignment_is_what_the_file_system_states(
    stated: int, works: bool, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filedisk, "_stated_alignment", lambda fd: stated)
    if works:
        disk = start(directory)
        assert disk.alignment == stated
        disk.shutdown()
    else:
        with pytest.raises(StartRefused, match="does not support O_DIRECT"):
            start(directory)


def test_alignment_is_tried_where_the_file_system_does_not_state_it(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = start(directory)
    stated = disk.alignment
    disk.shutdown()
    monkeypatch.setattr(filedisk, "_stated_alignment", lambda fd: None)
    disk = start(directory)
    assert stated <= disk.alignment <= 4096
    handle = disk.create("a", MIB)
    buffer = aligned_buffer(disk.alignment)
    assert not disk.read(*columns(handle, [disk.alignment], disk.alignment, buffer)).any()
    disk.shutdown()


def test_the_engine_is_logged(directory: Path) -> None:
    log = Log()
    disk = start(directory, log=log)
    (event, fields) = log.events[-1]
    assert event == "disk"
    assert fields["engine"] == disk.engine
    assert fields["directory"] == str(directory)
    disk.shutdown()


# --- one daemon a directory ---

OPEN = """
import os, sys, pathlib, structlog
from hga_kvd.config import Settings
from hga_kvd.errors import StartRefused
from hga_kvd.filedisk import make_disk
log = structlog.wrap_logger(structlog.PrintLogger(sys.stderr))
if sys.argv[2:] == ["nobody"] and os.getuid() == 0:
    os.setuid(65534)
try:
    disk = make_disk(Settings(nvme=pathlib.Path(sys.argv[1])), log)
    print("open", flush=True)
    sys.stdin.readline()
    disk.shutdown()
except StartRefused as error:
    print("refused:", error, flush=True)
"""


@pytest.fixture
def other(directory: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts a second process that opens the directory; its first line says how that went."""
    children: list[subprocess.Popen[str]] = []

    def start_other() -> subprocess.Popen[str]:
        children.append(
            subprocess.Popen(
                [sys.executable, "-c", OPEN, str(directory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        )
        return children[-1]

    yield start_other
    for child in children:
        child.kill()
        child.communicate()


def said(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline()


def test_a_second_daemon_is_refused_with_the_pid_of_the_first(
    disk: FileDisk, directory: Path, other: Callable[[], subprocess.Popen[str]]
) -> None:
    answer = said(other())
    assert answer.startswith("refused:")
    assert f"pid {os.getpid()}:" in answer
    assert (directory / "LOCK").read_text().split() == [str(os.getpid())]
    with pytest.raises(StartRefused, match=f"in use by another hga-kvd, pid {os.getpid()}"):
        start(directory)


def test_a_lock_ends_with_its_process_however_that_ends(
    directory: Path, other: Callable[[], subprocess.Popen[str]]
) -> None:
    first = other()
    assert said(first) == "open\n"
    with pytest.raises(StartRefused, match=f"pid {first.pid}:"):
        start(directory)
    first.send_signal(signal.SIGKILL)
    first.wait()
    disk = start(directory)
    assert said(other()).startswith("refused:")
    disk.shutdown()
    assert said(other()) == "open\n"


def test_a_stale_lock_file_is_taken_over(directory: Path) -> None:
    for content in (b"", b"999999\n", b"garbage\xff" * 5000):
        (directory / "LOCK").write_bytes(content)
        start(directory).shutdown()


def test_a_lock_that_is_a_link_is_refused(directory: Path) -> None:
    (directory / "elsewhere").write_text("precious")
    (directory / "LOCK").symlink_to(directory / "elsewhere")
    with pytest.raises(StartRefused):
        start(directory)
    assert (directory / "elsewhere").read_text() == "precious"
