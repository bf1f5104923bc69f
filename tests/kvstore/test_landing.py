"""Shared memory: the region's promises, and the socket that hands it over."""

import contextlib
import fcntl
import gc
import mmap
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hga_kvd import handover as handover_module
from hga_kvd import memory
from hga_kvd.errors import InvalidRequest, LimitExceeded
from hga_kvd.handover import STRANGERS_MAX, Handover
from hga_kvd.landing import Landing, NotAttached
from hypothesis import given, settings
from hypothesis import strategies as st

MIB = 1 << 20


@pytest.fixture
def landing():
    return Landing(region_bytes_max=8 * MIB, clients_max=2, regions_bytes_max=12 * MIB)


def mapped(path="hga-kvd-landing"):
    return Path("/proc/self/maps").read_text().count(path)


def test_a_region_is_whole_and_sealed(landing):
    region, descriptor = landing.create(3 * MIB)
    with open(descriptor, "rb+", buffering=0) as file:
        assert region.bytes == os.fstat(descriptor).st_size == 4 * MIB  # rounded up to 2 MiB
        assert 0 < region.client_id < 1 << 63
        if not region.huge_pages:
            assert os.fstat(descriptor).st_blocks * 512 == region.bytes  # allocated, not promised
        for size in (0, 2 * MIB, 6 * MIB):
            with pytest.raises(PermissionError):
                file.truncate(size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        with mmap.mmap(descriptor, 4 * MIB) as theirs, landing.borrow(region.client_id, 4096, 3) as ours:
            ours[:] = (1, 2, 3)
            assert theirs[4096:4099] == b"\1\2\3"


@pytest.mark.parametrize("can", [True, False])
def test_huge_pages_are_made_of_ordinary_memory_where_the_kernel_can(monkeypatch, can):
    if not can:
        monkeypatch.setattr(memory, "_MADV_COLLAPSE", 4096)  # as to a kernel before 6.1
    with open(os.memfd_create("collapsed"), "rb+", buffering=0) as file:
        file.truncate(4 * MIB)
        buffer, huge = memory.file_buffer(file.fileno(), 4 * MIB)
        assert not memory.address_of(buffer) % memory.HUGE_PAGE_BYTES
        assert os.fstat(file.fileno()).st_blocks * 512 == 4 * MIB  # allocated, not promised
        _, _, tail = Path("/proc/self/smaps").read_text().partition("memfd:collapsed")
        in_huge = next(int(line.split()[1]) for line in tail.splitlines() if line.startswith("ShmemPmdMapped:"))
        assert in_huge == (4096 if huge else 0)
        assert not huge or can
        buffer[3 * MIB] = 7
        assert os.pread(file.fileno(), 2, 3 * MIB) == b"\7\0"
    assert mapped("memfd:collapsed") == 1
    del buffer
    assert mapped("memfd:collapsed") == 0


@pytest.mark.parametrize(
    ("size", "error"), [(0, InvalidRequest), (8 * MIB + 1, LimitExceeded), (2**64 - 1, LimitExceeded)]
)
def test_impossible_sizes(landing, size, error):
    with pytest.raises(error, match="region"):
        landing.create(size)
    assert len(landing) == 0


def test_clients_are_limited(landing):
    made = [landing.create(1) for _ in range(2)]
    with pytest.raises(LimitExceeded, match="2 clients are attached"):
        landing.create(1)
    landing.release(made[0][0].client_id)
    made.append(landing.create(1))
    for _, descriptor in made:
        os.close(descriptor)


def test_the_regions_of_all_clients_together_are_limited(landing):
    first, descriptor = landing.create(8 * MIB)
    os.close(descriptor)
    with pytest.raises(LimitExceeded, match=f"{8 * MIB} of {12 * MIB} bytes"):
        landing.create(6 * MIB)
    _, descriptor = landing.create(4 * MIB)
    os.close(descriptor)
    landing.release(first.client_id)
    _, descriptor = landing.create(8 * MIB)
    os.close(descriptor)


@given(offset=st.integers(0, 2**64), size=st.integers(0, 2**64))
@settings(max_examples=200)
def test_only_ranges_inside_the_region_are_lent(offset, size):
    landing = Landing(8 * MIB, 1, 8 * MIB)
    region, descriptor = landing.create(2 * MIB)
    os.close(descriptor)
    inside = offset % 4096 == 0 and offset + size <= 2 * MIB
    with contextlib.ExitStack() as stack:
        if not inside:
            stack.enter_context(pytest.raises(InvalidRequest))
        assert stack.enter_context(landing.borrow(region.client_id, offset, size)).size == size


def test_an_unknown_client_has_no_range(landing):
    with pytest.raises(NotAttached, match="attach"), landing.borrow(7, 0, 1):
        pass


def test_memory_outlives_release_while_it_is_lent(landing):
    gc.collect()
    before = mapped()
    region, descriptor = landing.create(2 * MIB)
    os.close(descriptor)
    client_id = region.client_id
    del region
    with landing.borrow(client_id, 0, MIB) as view:
        landing.release(client_id)
        view[:] = 7
        assert mapped() == before + 1
        with pytest.raises(NotAttached), landing.borrow(client_id, 0, 1):
            pass
    assert view.sum() == 7 * MIB
    del view
    assert mapped() == before


def test_overlapping_ranges_take_turns(landing):
    region, descriptor = landing.create(2 * MIB)
    os.close(descriptor)
    order = []

    def second():
        with landing.borrow(region.client_id, 0, 8192):
            order.append("second")

    thread = threading.Thread(target=second)
    with landing.borrow(region.client_id, 4096, 4096):
        with landing.borrow(region.client_id, 8192, 4096):  # a neighbour does not wait
            order.append("neighbour")
        thread.start()
        time.sleep(0.05)
        order.append("first")
    thread.join(30)
    assert order == ["neighbour", "first", "second"]


def test_waiting_for_a_range_ends_with_the_client(landing):
    region, descriptor = landing.create(2 * MIB)
    os.close(descriptor)
    raised = []

    def second():
        try:
            with landing.borrow(region.client_id, 0, 8192):
                pass
        except NotAttached as error:
            raised.append(error)

    thread = threading.Thread(target=second)
    with landing.borrow(region.client_id, 0, 4096):
        thread.start()
        time.sleep(0.05)
        landing.release(region.client_id)
        thread.join(30)
    assert len(raised) == 1


class Served:
    """A handover whose thread runs; `gone` collects what it yields."""

    def __init__(self):
        self.directory = tempfile.TemporaryDirectory(prefix="kvd")
        self.path = Path(self.directory.name) / "k.shm"
        self.handover = Handover(self.path)
        self.gone = []
        self.thread = threading.Thread(target=lambda: [self.gone.append(c) for c in self.handover.serve()])
        self.thread.start()

    def connect(self):
        peer = socket.socket(socket.AF_UNIX)
        peer.settimeout(5)
        peer.connect(str(self.path))
        return peer

    def wait_gone(self, *client_ids):
        deadline = time.monotonic() + 5
        while sorted(self.gone) != sorted(client_ids) and time.monotonic() < deadline:
            time.sleep(0.005)
        assert sorted(self.gone) == sorted(client_ids)


@pytest.fixture
def served():
    served = Served()
    yield served
    served.handover.stop()
    served.thread.join(30)
    assert not served.thread.is_alive()
    assert not served.path.exists()
    served.directory.cleanup()


def offer(served, client_id, content=b"region"):
    descriptor = os.memfd_create("test")
    os.write(descriptor, content)
    return served.handover.offer(client_id, (descriptor,))


def closed(peer):
    try:
        return peer.recv(1) == b""
    except ConnectionResetError:
        return True


def test_the_descriptor_is_handed_over_once(served):
    token = offer(served, 5)
    with served.connect() as client:
        client.sendall(token)
        data, descriptors, _, _ = socket.recv_fds(client, 16, 4)
        assert (len(data), len(descriptors)) == (1, 1)
        with open(descriptors[0], "rb") as file:
            assert os.pread(file.fileno(), 16, 0) == b"region"
        with served.connect() as thief:
            thief.sendall(token)
            assert closed(thief)
        assert served.gone == []
    served.wait_gone(5)


def test_the_token_may_come_byte_by_byte(served):
    token = offer(served, 5)
    with served.connect() as client:
        for byte in token:
            client.sendall(bytes([byte]))
            time.sleep(0.001)
        _, descriptors, _, _ = socket.recv_fds(client, 16, 4)
        os.close(descriptors[0])
    served.wait_gone(5)


def test_the_socket_is_private(served):
    assert served.path.stat().st_mode & 0o777 == 0o600


def test_another_user_gets_nothing_even_with_a_token(served, monkeypatch):
    """Also where the socket's mode does not keep him out: as after a chmod by somebody."""
    token = offer(served, 5)
    if os.geteuid():  # who may not become another user is one to a daemon of another
        monkeypatch.setattr(handover_module.os, "geteuid", lambda: os.getuid() + 1)
        become = ""
    else:
        Path(served.directory.name).chmod(0o755)
        served.path.chmod(0o666)
        become = "os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)"
    script = f"""
import os, socket, sys
{become}
peer = socket.socket(socket.AF_UNIX)
peer.settimeout(30)
peer.connect({str(served.path)!r})
try:
    peer.sendall(bytes.fromhex({token.hex()!r}))
    answer = peer.recv(1)
except (BrokenPipeError, ConnectionResetError):
    answer = b""
print(answer)
"""
    heard = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert heard.stdout == "b''\n"
    monkeypatch.undo()
    with served.connect() as client:  # the token is still good, for who may have it
        client.sendall(token)
        _, descriptors, _, _ = socket.recv_fds(client, 16, 4)
        os.close(descriptors[0])
    served.wait_gone(5)


@given(st.binary(min_size=16, max_size=64))
@settings(max_examples=30)
def test_garbage_gets_nothing(garbage):
    served = Served()
    try:
        offer(served, 5)
        with served.connect() as peer:
            peer.sendall(garbage)
            assert closed(peer)
        assert served.gone == []
    finally:
        served.handover.stop()
        served.thread.join(30)
        served.directory.cleanup()


def test_words_after_the_token_end_the_client(served):
    token = offer(served, 5)
    with served.connect() as client:
        client.sendall(token + b"and more")
        _, descriptors, _, _ = socket.recv_fds(client, 16, 4)
        for descriptor in descriptors:
            os.close(descriptor)
        served.wait_gone(5)


def test_silent_peers_neither_block_nor_pile_up(served):
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(served.connect()) for _ in range(STRANGERS_MAX)]
        with served.connect() as one_more:
            assert closed(one_more)
        silent.pop().close()
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:  # the daemon sees the free place when it sees the end of that peer
            token = offer(served, 9)
            with served.connect() as client:
                client.sendall(token)
                try:
                    data, descriptors, _, _ = socket.recv_fds(client, 16, 4)
                except ConnectionResetError:
                    continue
                if data:
                    os.close(descriptors[0])
                    break
    served.wait_gone(9)


def test_tokens_and_patience_run_out(monkeypatch):
    monkeypatch.setattr(handover_module, "TOKEN_LIFE_S", 0.1)
    served = Served()
    try:
        with served.connect() as silent:
            token = offer(served, 5)
            served.wait_gone(5)  # never came for its region
            assert closed(silent)
        with served.connect() as late:
            late.sendall(token)
            assert closed(late)
    finally:
        served.handover.stop()
        served.thread.join(30)
        served.directory.cleanup()


def test_descriptors_do_not_leak(served):
    def opened():
        return len(os.listdir("/proc/self/fd"))

    with served.connect() as first:
        first.sendall(b"x" * 16)
        assert closed(first)  # so the thread has all it needs
    before = opened()
    for client_id in range(1, 21):
        token = offer(served, client_id)
        with served.connect() as client:
            client.sendall(token)
            _, descriptors, _, _ = socket.recv_fds(client, 16, 4)
            os.close(descriptors[0])
    served.wait_gone(*range(1, 21))
    assert opened() == before


def test_memory_of_a_whole_life(landing, served):
    """Create, offer, hand over, write on one side, read on the other, die, release."""
    region, descriptor = landing.create(2 * MIB)
    token = served.handover.offer(region.client_id, (descriptor,))
    with served.connect() as client:
        client.sendall(token)
        _, descriptors, _, _ = socket.recv_fds(client, 1, 1)
        theirs = np.frombuffer(mmap.mmap(descriptors[0], region.bytes), np.uint8)
        os.close(descriptors[0])
        with landing.borrow(region.client_id, 0, region.bytes) as ours:
            ours[:] = np.arange(region.bytes, dtype=np.uint64).astype(np.uint8)
            np.testing.assert_array_equal(theirs, ours)
    served.wait_gone(region.client_id)
