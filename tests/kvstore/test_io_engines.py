"""Every engine moves the same bytes as plain reads of the same file, or says why not; and lets go of what it took."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hga_kvd import io_engine, uring
from hga_kvd.io_engine import EngineUnavailable, IoEngine, transfer_all
from hga_kvd.liburing_engine import LiburingEngine
from hga_kvd.memory import address_of, aligned_buffer
from hga_kvd.posix_engine import PosixEngine
from hga_kvd.uring import UringEngine
from hypothesis import given, settings
from hypothesis import strategies as st

BLOCK = 4096
FILE_BLOCKS = 512
MAKERS: dict[str, Callable[[int], IoEngine]] = {
    "uring": UringEngine,
    "uring without flags": UringEngine,
    "liburing": LiburingEngine,
    "posix": PosixEngine,
}


@pytest.fixture(params=list(MAKERS))
def make_engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], IoEngine]]:
    """Makes engines of one kind, shut down at the end if the test did not."""
    if request.param == "uring without flags":
        monkeypatch.setattr(uring, "_FLAGS", (0,))
    made: list[IoEngine] = []

    def make(depth: int) -> IoEngine:
        try:
            made.append(MAKERS[request.param](depth))
        except EngineUnavailable as error:
            pytest.skip(f"{request.param}: {error}")
        return made[-1]

    yield make
    for engine in made:
        with contextlib.suppress(BaseException):
            engine.shutdown()


@pytest.fixture
def engine(make_engine: Callable[[int], IoEngine]) -> IoEngine:
    return make_engine(8)


@pytest.fixture
def uring_engine() -> Iterator[UringEngine]:
    try:
        engine = UringEngine(8)
    except EngineUnavailable as error:
        pytest.skip(f"uring: {error}")
    yield engine
    engine.shutdown()


class File:
    """A file of random blocks, open for direct transfers, and what is in it."""

    def __init__(self, path: Path, content: npt.NDArray[np.uint8]) -> None:
        path.write_bytes(content.tobytes())
        self.path, self.content = path, content
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        except OSError:
            pytest.skip("the temporary directory is on a file system without O_DIRECT")


@pytest.fixture
def file(tmp_path: Path) -> Iterator[File]:
    rng = np.random.default_rng(7)
    file = File(tmp_path / "data", rng.integers(0, 256, FILE_BLOCKS * BLOCK, np.uint8))
    yield file
    os.close(file.fd)


class Batch:
    """Columns of transfers of whole blocks, with a buffer that has room for all of them, one after the other."""

    def __init__(self, fd: int, first_blocks: npt.ArrayLike, block_counts: npt.ArrayLike) -> None:
        self.offsets = np.array(first_blocks, np.int64) * BLOCK
        self.lengths = np.array(block_counts, np.int64) * BLOCK
        self.fds = np.full(len(self.offsets), fd, np.int32)
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.buffer = aligned_buffer(max(1, int(self.lengths.sum())))
        self.addresses = self.starts.astype(np.uint64) + np.uint64(address_of(self.buffer))

    def run(self, engine: IoEngine, write: bool = False) -> list[int]:
        columns = (self.fds, self.offsets, self.addresses, self.lengths)
        return transfer_all(engine, *columns, write=write, alignment=512).tolist()

    def row(self, i: int) -> npt.NDArray[np.uint8]:
        return self.buffer[self.starts[i] : self.starts[i] + self.lengths[i]]

    def assert_read(self, file: File) -> None:
        for i, (offset, length) in enumerate(zip(self.offsets, self.lengths, strict=True)):
            assert np.array_equal(self.row(i), file.content[offset : offset + length]), f"row {i}"


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def random_batch(file: File, count: int, seed: int, blocks_max: int = 4) -> Batch:
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, blocks_max + 1, count)
    return Batch(file.fd, rng.integers(0, FILE_BLOCKS - blocks_max, count), counts)


# --- what all engines do alike ---

places = st.tuples(st.integers(0, FILE_BLOCKS - 1), st.integers(1, 8)).map(
    lambda p: (min(p[0], FILE_BLOCKS - p[1]), p[1])
)


@settings(max_examples=50)
@given(batch=st.lists(places, max_size=40))
def test_reads_what_is_in_the_file(engine: IoEngine, file: File, batch: list[tuple[int, int]]) -> None:
    reads = Batch(file.fd, [first for first, _ in batch], [count for _, count in batch])
    assert reads.run(engine) == [0] * len(batch)
    reads.assert_read(file)


@settings(max_examples=20)
@given(counts=st.lists(st.integers(1, 8), min_size=1, max_size=40), seed=st.integers(0, 99))
def test_writes_then_reads(engine: IoEngine, file: File, counts: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    firsts = np.cumsum(counts) - counts
    order = rng.permutation(len(counts))
    writes = Batch(file.fd, firsts[order], np.array(counts)[order])
    writes.buffer[:] = rng.integers(0, 256, len(writes.buffer), np.uint8)
    assert writes.run(engine, write=True) == [0] * len(counts)
    for i, (offset, length) in enumerate(zip(writes.offsets, writes.lengths, strict=True)):
        file.content[offset : offset + length] = writes.row(i)

    assert file.path.read_bytes() == file.content.tobytes()
    reads = random_batch(file, 20, seed)
    assert reads.run(engine) == [0] * 20
    reads.assert_read(file)


def test_batch_of_ten_thousand(engine: IoEngine, file: File) -> None:
    batch = random_batch(file, 10_000, seed=1, blocks_max=1)
    assert batch.run(engine) == [0] * 10_000
    batch.assert_read(file)


def test_depth_of_one(make_engine: Callable[[int], IoEngine], file: File) -> None:
    batch = random_batch(file, 20, seed=2)
    assert batch.run(make_engine(1)) == [0] * 20
    batch.assert_read(file)


def test_a_read_past_the_end_has_no_data_and_the_others_do(engine: IoEngine, file: File) -> None:
    batch = Batch(file.fd, [FILE_BLOCKS - 1, FILE_BLOCKS - 1, FILE_BLOCKS, FILE_BLOCKS + 50, 0], [1, 2, 1, 3, 2])
    assert batch.run(engine) == [0, -errno.ENODATA, -errno.ENODATA, -errno.ENODATA, 0]
    assert np.array_equal(batch.row(4), file.content[: 2 * BLOCK])


def test_a_file_that_ends_inside_a_block(engine: IoEngine, file: File) -> None:
    os.truncate(file.path, 3 * BLOCK + 100)
    batch = Batch(file.fd, [2, 2, 3], [1, 2, 1])
    assert batch.run(engine) == [0, -errno.ENODATA, -errno.ENODATA]


def test_a_bad_descriptor_fails_alone(engine: IoEngine, file: File) -> None:
    batch = random_batch(file, 20, seed=3)
    batch.fds[[0, 7, 19]] = [-1, 1_000_000, -1]
    expected = [0] * 20
    for row in (0, 7, 19):
        expected[row] = -errno.EBADF
    assert batch.run(engine) == expected


def test_memory_that_is_not_ours_fails_alone(engine: IoEngine, file: File) -> None:
    batch = random_batch(file, 5, seed=3)
    batch.addresses[2] = 4096
    assert batch.run(engine) == [0, 0, -errno.EFAULT, 0, 0]


def test_many_threads_at_once(engine: IoEngine, file: File) -> None:
    failures: list[object] = []

    def work(seed: int) -> None:
        try:
            for i in range(8):
                batch = random_batch(file, 1 + 40 * (i % 2), seed * 100 + i)
                assert batch.run(engine) == [0] * len(batch.fds)
                batch.assert_read(file)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_shutdown_waits_for_calls_and_leaves_nothing(make_engine: Callable[[int], IoEngine], file: File) -> None:
    descriptors_before, threads_before = descriptors(), threading.active_count()
    engine = make_engine(8)
    batches = [random_batch(file, 3000, seed) for seed in range(4)]
    statuses: list[list[int]] = []
    started = threading.Barrier(5)

    def work(batch: Batch) -> None:
        started.wait()
        statuses.append(batch.run(engine))

    threads = [threading.Thread(target=work, args=(batch,)) for batch in batches]
    for thread in threads:
        thread.start()
    started.wait()
    callers = engine._callers  # type: ignore[attr-defined]
    while callers.count < 4 and any(thread.is_alive() for thread in threads):
        time.sleep(0.0005)
    engine.shutdown()
    for thread in threads:
        thread.join()
    assert statuses == [[0] * 3000] * 4
    for batch in batches:
        batch.assert_read(file)
    with pytest.raises(AssertionError, match="after shutdown"):
        batches[0].run(engine)
    assert (descriptors(), threading.active_count()) == (descriptors_before, threads_before)


def test_engines_come_and_go_without_a_trace(make_engine: Callable[[int], IoEngine], file: File) -> None:
    make_engine(8).shutdown()
    before = descriptors(), threading.active_count()
    for seed in range(20):
        engine = make_engine(8)
        assert random_batch(file, 3, seed).run(engine) == [0] * 3
        engine.shutdown()
    assert (descriptors(), threading.active_count()) == before


@pytest.mark.parametrize("kind", ["uring", "posix"])
def test_a_small_batch_does_not_wait_for_a_huge_one(kind: str, file: File) -> None:
    try:
        engine = MAKERS[kind](8)
    except EngineUnavailable as error:
        pytest.skip(f"{kind}: {error}")
    huge = random_batch(file, 20_000, seed=1, blocks_max=2)
    done: list[list[int]] = []
    thread = threading.Thread(target=lambda: done.append(huge.run(engine)))
    thread.start()
    while engine._callers.count == 0 and thread.is_alive():  # type: ignore[attr-defined]
        time.sleep(0.001)
    for seed in range(5):
        assert random_batch(file, 4, seed).run(engine) == [0] * 4
    assert not done, "five calls of four reads took longer than one of 20,000"
    thread.join()
    assert done == [[0] * 20_000]
    engine.shutdown()


def test_a_signal_handler_may_run_at_any_time(engine: IoEngine, file: File) -> None:
    ticks: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda *_: ticks.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        batch = random_batch(file, 3000, seed=4)
        assert batch.run(engine) == [0] * 3000
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert ticks
    batch.assert_read(file)


def test_an_interrupt_comes_through_after_the_last_transfer_has_landed(engine: IoEngine, file: File) -> None:
    class Interrupt(BaseException):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupt

    batch = random_batch(file, 5000, seed=5)
    before = signal.signal(signal.SIGALRM, interrupt)
    gc.disable()  # what a handler raises inside a callback of the collector (hypothesis has one) is lost
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.002)
        with pytest.raises(Interrupt):
            batch.run(engine)
    finally:
        gc.enable()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    batch.buffer[:] = 0
    time.sleep(0.02)
    assert not batch.buffer.any(), "a transfer landed after the call was over"
    again = random_batch(file, 100, seed=6)
    assert again.run(engine) == [0] * 100
    again.assert_read(file)


# --- short transfers, for all engines in one place ---


class Stingy:
    """Passes a random part of each transfer on, in odd bytes, and now and then asks to come again."""

    name = "stingy"

    def __init__(self, engine: IoEngine, seed: int) -> None:
        self.engine = engine
        self.rng = np.random.default_rng(seed)

    def transfer(
        self,
        write: bool,
        fds: io_engine.I32,
        offsets: io_engine.I64,
        addresses: io_engine.U64,
        lengths: io_engine.I64,
    ) -> io_engine.I64:
        parts = np.maximum(512, self.rng.integers(0, lengths + 1) & -512)
        moved = self.engine.transfer(write, fds, offsets, addresses, parts)
        cut = np.where(moved > 512, moved - self.rng.integers(0, 500, len(moved)), moved)
        again = self.rng.random(len(moved)) < 0.2
        refusal = self.rng.choice([-errno.EAGAIN, -errno.EINTR, -errno.ECANCELED], len(moved))
        return np.where(again, refusal, np.where(moved < lengths, cut, moved))

    def shutdown(self) -> None:
        self.engine.shutdown()


@pytest.mark.parametrize("seed", range(5))
def test_short_transfers_are_finished(seed: int, engine: IoEngine, file: File) -> None:
    stingy = Stingy(engine, seed)
    writes = Batch(file.fd, np.arange(0, 64, 4), np.full(16, 4))
    writes.buffer[:] = np.random.default_rng(seed).integers(0, 256, len(writes.buffer), np.uint8)
    assert writes.run(stingy, write=True) == [0] * 16
    file.content[: 64 * BLOCK] = writes.buffer
    assert file.path.read_bytes() == file.content.tobytes()

    reads = random_batch(file, 50, seed, blocks_max=8)
    assert reads.run(stingy) == [0] * 50
    reads.assert_read(file)

    ends = Batch(file.fd, [FILE_BLOCKS - 1, FILE_BLOCKS], [3, 1])
    assert ends.run(stingy) == [-errno.ENODATA] * 2


class Answering(Stingy):
    """Says what it was told to say, whatever it is asked."""

    def __init__(self, answers: list[list[int]]) -> None:
        self.answers = answers

    def transfer(
        self,
        write: bool,
        fds: io_engine.I32,
        offsets: io_engine.I64,
        addresses: io_engine.U64,
        lengths: io_engine.I64,
    ) -> io_engine.I64:
        return np.array(self.answers.pop(0) if len(self.answers) > 1 else self.answers[0], np.int64)


def test_a_write_that_moves_nothing_is_an_error() -> None:
    assert Batch(0, [0, 1], [1, 1]).run(Answering([[0, BLOCK]]), write=True) == [-errno.EIO, 0]


def test_a_full_disk_fails_the_rest_of_a_short_write() -> None:
    answers = [[BLOCK, BLOCK], [-errno.ENOSPC]]
    assert Batch(0, [0, 4], [2, 1]).run(Answering(answers), write=True) == [-errno.ENOSPC, 0]


def test_coming_again_for_ever_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io_engine, "RETRY_PAUSE_S", 0.0)
    answers = [[BLOCK, -errno.EAGAIN], [-errno.EAGAIN]]
    assert Batch(0, [0, 1], [1, 1]).run(Answering(answers)) == [0, -errno.EAGAIN]


def test_transfers_over_the_limit_are_split(engine: IoEngine, file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io_engine, "TRANSFER_BYTES_MAX", 3 * BLOCK)
    batch = Batch(file.fd, [0, 1, 100], [100, 3, 7])
    assert batch.run(engine) == [0, 0, 0]
    batch.assert_read(file)


# --- io_uring's own ways to refuse ---


class Enter:
    """io_uring_enter with faults: by turns a refusal, a part of what was to be submitted, and the real thing."""

    def __init__(self, number: int) -> None:
        self.number, self.calls, self.real = number, 0, uring._enter

    def __call__(self, call: int, fd: int, submit: int, wait: int, flags: int, *rest: object) -> int:
        self.calls += 1
        if self.calls % 3 == 1:
            ctypes.set_errno(self.number)
            return -1
        if self.calls % 3 == 2 and submit > 1:
            return int(self.real(call, fd, submit // 2, 0, flags, *rest))
        return int(self.real(call, fd, submit, wait, flags, *rest))


@pytest.mark.parametrize("number", [errno.EINTR, errno.EAGAIN, errno.EBUSY])
def test_a_refusal_to_enter_is_tried_again(
    number: int, uring_engine: UringEngine, file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter = Enter(number)
    monkeypatch.setattr(uring, "_enter", enter)
    batch = random_batch(file, 200, seed=8)
    assert batch.run(uring_engine) == [0] * 200
    assert enter.calls > 10
    batch.assert_read(file)


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EBADFD])
def test_a_lasting_refusal_to_enter_fails_the_batch_and_not_the_engine(
    number: int, uring_engine: UringEngine, file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        ctypes.set_errno(number)
        return -1

    batch = random_batch(file, 20, seed=9)
    with monkeypatch.context() as patch:
        patch.setattr(uring, "_enter", refuse)
        patch.setattr(uring, "_BUSY_PAUSE_S", 0.0)
        patch.setattr(io_engine, "RETRY_ROUNDS_MAX", 2)
        assert batch.run(uring_engine) == [-number] * 20
    assert batch.run(uring_engine) == [0] * 20
    batch.assert_read(file)


@pytest.mark.parametrize("depth", [1, 3, 8, 64])
def test_never_more_in_flight_than_the_depth(depth: int, file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        engine = UringEngine(depth)
    except EngineUnavailable as error:
        pytest.skip(f"uring: {error}")
    seen: list[int] = []
    real = uring._enter

    def enter(call: int, fd: int, submit: int, *rest: object) -> int:
        seen.append(engine._ring().in_flight + submit)
        return int(real(call, fd, submit, *rest))

    monkeypatch.setattr(uring, "_enter", enter)
    batch = random_batch(file, 500, seed=10)
    assert batch.run(engine) == [0] * 500
    assert max(seen) == depth
    engine.shutdown()


@pytest.mark.parametrize(("count", "step"), [(1, 1), (100, 1), (100, 16), (100, 1000), (2500, 16)])
def test_a_stream_gives_reads_in_order_when_they_are_there(engine: IoEngine, file: File, count: int, step: int) -> None:
    batch = random_batch(file, count, seed=11)
    told: list[int] = []
    for moved in engine.stream(batch.fds, batch.offsets, batch.addresses, batch.lengths, step):
        at = sum(told)
        assert moved.tolist() == batch.lengths[at : at + len(moved)].tolist()
        assert np.array_equal(
            batch.row(at + len(moved) - 1), file.content[batch.offsets[at + len(moved) - 1] :][: moved[-1]]
        )
        told.append(len(moved))
    assert sum(told) == count
    assert all(
        n >= step or not end % uring._ENTRIES for n, end in zip(told[:-1], np.cumsum(told).tolist(), strict=False)
    )
    batch.assert_read(file)


def test_a_stream_that_is_closed_early_leaves_nothing_under_way(uring_engine: UringEngine, file: File) -> None:
    batch = random_batch(file, 100, seed=12)
    stream = uring_engine.stream(batch.fds, batch.offsets, batch.addresses, batch.lengths, 1)
    told = len(next(stream))
    ring = uring_engine._ring()
    assert ring.in_flight
    with pytest.raises(AssertionError, match="one call at a time"):
        batch.run(uring_engine)
    stream = uring_engine.stream(batch.fds, batch.offsets, batch.addresses, batch.lengths, 1)
    told = len(next(stream))
    ring = uring_engine._ring()
    stream.close()
    assert not ring.in_flight
    batch.buffer[batch.starts[told + 16] :] = 0
    time.sleep(0.05)
    assert not batch.buffer[batch.starts[told + 16] :].any()
    assert batch.run(uring_engine) == [0] * 100
    assert uring_engine._ring() is ring
    batch.assert_read(file)


def test_what_a_stream_has_told_stays_told_when_the_kernel_refuses(
    uring_engine: UringEngine, file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        ctypes.set_errno(errno.EBADF)
        return -1

    batch = random_batch(file, 100, seed=13)
    stream = uring_engine.stream(batch.fds, batch.offsets, batch.addresses, batch.lengths, 1)
    told = next(stream).tolist()
    with monkeypatch.context() as patch:
        patch.setattr(uring, "_enter", refuse)
        patch.setattr(uring.Ring, "_drain", lambda _: None)
        for moved in stream:
            told += moved.tolist()
    good = told.index(-errno.EBADF)
    assert told == batch.lengths[:good].tolist() + [-errno.EBADF] * (100 - good)
    assert batch.run(uring_engine) == [0] * 100


def test_a_thread_takes_its_ring_with_it(uring_engine: UringEngine, file: File) -> None:
    random_batch(file, 1, 0).run(uring_engine)
    before = descriptors()
    for seed in range(5):
        thread = threading.Thread(target=lambda seed=seed: random_batch(file, 3, seed).run(uring_engine))
        thread.start()
        thread.join()
    assert descriptors() == before


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EPERM, errno.ENOMEM, errno.EMFILE])
def test_a_refused_ring_says_why(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(uring, "_setup", refuse)
    with pytest.raises(EngineUnavailable, match="io_uring_setup: ") as caught:
        UringEngine(8)
    assert caught.value.errno == number
    assert os.strerror(number) in str(caught.value)


def test_an_unknown_machine_is_refused_and_its_ring_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors()
    monkeypatch.setattr(uring.platform, "machine", lambda: "riscv64")
    with pytest.raises(EngineUnavailable, match="riscv64"):
        UringEngine(8)
    assert descriptors() == before


def test_a_thread_that_gets_no_ring_reports_it(
    uring_engine: UringEngine, file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        ctypes.set_errno(errno.EMFILE)
        return -1

    monkeypatch.setattr(uring, "_setup", refuse)
    statuses: list[list[int]] = []
    thread = threading.Thread(target=lambda: statuses.append(random_batch(file, 3, 0).run(uring_engine)))
    thread.start()
    thread.join()
    assert statuses == [[-errno.EMFILE] * 3]


# A child that may not call io_uring_setup, as in Docker's default seccomp profile.
SECCOMP = """
import ctypes, struct, sys
AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
program = b"".join(struct.pack("<HBBI", *op) for op in [
    (0x20, 0, 0, 0),             # load the number of the call
    (0x15, 0, 1, 425),           # io_uring_setup?
    (0x06, 0, 0, 0x00050000 | 1),  # EPERM
    (0x06, 0, 0, 0x7FFF0000),    # allow
])
buffer = ctypes.create_string_buffer(program)
filter = ctypes.create_string_buffer(struct.pack("@HP", 4, ctypes.addressof(buffer)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, filter) == 0, ctypes.get_errno()
import pathlib, structlog
from hga_kvd.config import Settings
from hga_kvd.errors import StartRefused
from hga_kvd.filedisk import make_disk
directory = pathlib.Path(sys.argv[1])
log = structlog.wrap_logger(structlog.PrintLogger(), processors=[structlog.processors.JSONRenderer()])
for choice in ("auto", "posix", "uring", "liburing"):
    try:
        disk = make_disk(Settings(nvme=directory, io_engine=choice), log)
        print("got", choice, disk.engine)
        disk.shutdown()
    except StartRefused as error:
        print("refused", choice, error)
"""


def test_where_io_uring_is_forbidden_auto_takes_the_pool_and_says_why(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SECCOMP, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    if "tmpfs" in done.stdout + done.stderr:
        pytest.skip("the temporary directory is on tmpfs")
    assert done.returncode == 0, done.stderr
    assert "got auto posix" in done.stdout
    assert "seccomp" in done.stdout.split("got auto")[0]
    assert "got posix posix" in done.stdout
    assert "refused uring --io-engine uring is refused here" in done.stdout
    assert "refused liburing --io-engine liburing is refused here" in done.stdout


# --- memory ---


def test_buffers_are_aligned_zero_and_live_as_long_as_their_views() -> None:
    for size in (1, 4096, 5000, 3 << 20):
        for huge in (False, True):
            buffer = aligned_buffer(size, huge)
            assert buffer.shape == (size,)
            assert address_of(buffer) % ((2 << 20) if huge else 4096) == 0
            assert not buffer.any()
            view = buffer[size // 2 :].view()
            view[:] = 5
            del buffer
            assert (view == 5).all()


def test_a_buffer_is_unmapped_with_its_last_view() -> None:
    def mapped() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")

    before = mapped()
    view = aligned_buffer(1 << 30)[5:]
    assert mapped() - before >= 1 << 30
    del view
    assert mapped() - before < 1 << 30
