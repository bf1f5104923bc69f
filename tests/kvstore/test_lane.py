"""The fast lane over a real engine in this process: honest clients, dead ones, and ones that write what they like."""

import contextlib
import errno
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hga_kvd.engine import Engine
from hga_kvd.lanes import Lanes
from hga_kvd.leading import RESTS_MAX, Patience
from hga_kvd_client.connection import Connection
from hga_kvd_client.errors import DeadlineExceeded, Unavailable
from hga_kvd_client.lane import Lane, LaneClosed, best_end
from hga_kvd_proto import lane as layout
from hga_kvd_proto import native, rings
from hga_kvd_proto.v1 import kvd_pb2
from test_service import CODE, Running
from wire import (
    GEOMETRY,
    MIB,
    Client,
    LaneClient,
    all_keys,
    append,
    open_session,
    payload_of,
    records_of,
    refused,
    wait_for,
)

RECORD = GEOMETRY.record_bytes


@pytest.fixture
def kvd(either_way):
    running = Running()
    yield running
    running.close()


@pytest.fixture
def lane(kvd):
    client = LaneClient(kvd.stub, kvd.path)
    yield client
    client.close()


def lane_threads():
    return [thread for thread in threading.enumerate() if thread.name == "lane"]


def filled(kvd, chunks=3):
    session_id = open_session(kvd.stub).session_id
    payload = payload_of(chunks)
    append(kvd.stub, session_id, payload)
    return session_id, payload


def fetch(lane, session_id, keys, offset=0, **fields):
    fields = {"size": len(keys) * RECORD, **fields}
    lane.post(layout.FETCH, keys.tobytes(), session_id=session_id, offset=offset, **fields)


def test_many_fetches_go_round_the_ring(kvd, lane):
    session_id, payload = filled(kvd)
    chance = np.random.default_rng(0)
    for _ in range(3 * layout.SLOT_COUNT + 1):
        keys = chance.choice(all_keys(3), chance.integers(1, 40))
        fetch(lane, session_id, keys, 4096)
        assert lane.completion() == (0, b"", (0, len(keys), 0))
        got = lane.memory[4096 : 4096 + len(keys) * RECORD]
        assert got.tobytes() == records_of(payload, keys).tobytes()


def test_several_requests_under_way_are_answered_in_order(kvd, lane):
    session_id, payload = filled(kvd)
    keys = all_keys(3)
    for place in range(layout.SLOT_COUNT):
        fetch(lane, session_id, keys[place : place + 5], 8 * 4096 * place, ring=place == layout.SLOT_COUNT - 1)
    for place in range(layout.SLOT_COUNT):
        assert lane.completion(place)[0] == 0
        at = 8 * 4096 * place
        expected = records_of(payload, keys[place : place + 5]).tobytes()
        assert lane.memory[at : at + len(expected)].tobytes() == expected


def test_append_takes_the_payload_and_the_token_ids(kvd, lane):
    session_id = open_session(kvd.stub).session_id
    payload, ids = payload_of(2), np.arange(128, dtype="<u4").tobytes()
    lane.memory[MIB : MIB + payload.size] = payload
    place = {"session_id": session_id, "offset": MIB, "size": payload.size, "first_chunk": 0, "chunk_count": 2}
    lane.post(layout.APPEND, ids, **place)
    assert lane.completion() == (0, b"", (2, 0, 0))
    lane.post(layout.APPEND, ids, **place)
    assert lane.completion()[:2] == (CODE.FAILED_PRECONDITION, "AppendOutOfOrder")
    assert kvd.engine.info(session_id).token_ids == ids
    keys = all_keys(2)
    fetch(lane, session_id, keys)
    assert lane.completion()[0] == 0
    assert lane.memory[: len(keys) * RECORD].tobytes() == records_of(payload, keys).tobytes()


def test_refusals_are_those_of_grpc(kvd, lane):
    """The same status, meaning and sentence for everything that both can be asked."""
    session_id, _ = filled(kvd, 1)
    keys = all_keys(1)
    beyond = keys[:1].copy()
    beyond["layer"] = 7
    cases = [
        (999, keys[:1].tobytes(), 0, RECORD),
        (session_id, keys[:1].tobytes()[:-1], 0, RECORD),
        (session_id, beyond.tobytes(), 0, RECORD),
        (session_id, keys[:1].tobytes(), 1, RECORD),
        (session_id, keys[:1].tobytes(), 2 * MIB, RECORD),
        (session_id, keys[:1].tobytes(), 2**64 - 4096, RECORD),
        (session_id, keys[:2].tobytes(), 0, RECORD),
    ]
    for session, packed, offset, size in cases:
        shared = lane.range(offset, size)
        expected = refused(kvd.stub.Fetch, kvd_pb2.FetchRequest(session_id=session, keys=packed, shared=shared))
        lane.post(layout.FETCH, packed, session_id=session, offset=offset, size=size)
        code, meaning, sentence = lane.completion()
        assert (code, sentence, meaning) == expected
    for first_chunk, count, size in ((0, 1, 0), (1, 0, 0), (1, 2**32 - 1, 0), (1, 1, 4096)):
        header = kvd_pb2.AppendHeader(
            session_id=session_id, first_chunk=first_chunk, chunk_count=count, shared=lane.range(0, size)
        )
        expected = refused(kvd.stub.Append, iter([kvd_pb2.AppendRequest(header=header)]))
        lane.post(layout.APPEND, session_id=session_id, size=size, first_chunk=first_chunk, chunk_count=count)
        code, meaning, sentence = lane.completion()
        assert (code, sentence, meaning) == expected
    assert not lane.memory.any()


def test_lies_in_a_header_are_refused_and_the_lane_goes_on(kvd, lane):
    session_id, payload = filled(kvd, 1)
    for lie in ({"sequence": 7}, {"body_bytes": layout.REQUEST_BODY_BYTES + 1}, {"body_bytes": 2**32 - 1}):
        lane.post(layout.FETCH, b"", session_id=session_id, **lie)
        assert lane.completion()[:2] == (CODE.INVALID_ARGUMENT, "InvalidRequest"), lie
    lane.post(99, b"", session_id=session_id)
    assert "verb 99" in lane.completion()[2]
    fetch(lane, session_id, all_keys(1))
    assert lane.completion()[0] == 0
    assert lane.memory[: payload.size].tobytes() == records_of(payload, all_keys(1)).tobytes()


@pytest.mark.parametrize(("count", "hook"), [(4, "fetch_few"), (36, "fetch")])
def test_a_request_is_read_once(kvd, lane, monkeypatch, count, hook):
    """What the client writes after the daemon has looked changes nothing: neither keys nor range."""
    session_id, payload = filled(kvd)
    keys = all_keys(3)[:count]
    honest = getattr(kvd.service.calls, hook)
    changed = []

    def treacherous(*arguments):
        at = layout.request_at(0)
        evil = all_keys(3)[40 : 40 + count].tobytes()
        lane.lane[at + layout.HEADER_BYTES :][: len(evil)] = evil
        layout.REQUEST.pack_into(lane.lane, at, 0, layout.FETCH, 8 * 4000, 99, 0, 1 << 40, 1 << 40, 0, 0, 0)
        changed.append(hook)
        return honest(*arguments)

    monkeypatch.setattr(kvd.service.calls, hook, treacherous)
    fetch(lane, session_id, keys)
    assert lane.completion() == (0, b"", (0, count, 0))
    assert changed == [hook]
    assert lane.memory[: count * RECORD].tobytes() == records_of(payload, keys).tobytes()
    assert not lane.memory[count * RECORD :].any()


@pytest.mark.parametrize("posted", [layout.SLOT_COUNT + 1, layout.CLOSED, 1 << 63])
def test_a_counter_that_cannot_be_ends_that_lane_only(kvd, lane, posted):
    session_id, payload = filled(kvd, 1)
    other = LaneClient(kvd.stub, kvd.path)
    lane.posted_word[0] = posted
    os.eventfd_write(lane.request_bell, 1)
    wait_for(lambda: lane.completed_word[0] == layout.CLOSED)
    for client in (other, None):
        if client is None:  # its region serves on, over gRPC
            shared = lane.range(0, payload.size)
            kvd.stub.Fetch(kvd_pb2.FetchRequest(session_id=session_id, keys=all_keys(1).tobytes(), shared=shared))
            client = lane  # noqa: PLW2901
        else:
            fetch(client, session_id, all_keys(1))
            assert client.completion()[0] == 0
        assert client.memory[: payload.size].tobytes() == records_of(payload, all_keys(1)).tobytes()
    other.close()


def test_a_counter_that_goes_back_ends_the_lane(kvd, lane):
    session_id, _ = filled(kvd, 1)
    fetch(lane, session_id, all_keys(1))
    lane.completion()
    lane.posted_word[0] = 0
    os.eventfd_write(lane.request_bell, 1)
    wait_for(lambda: lane.completed_word[0] == layout.CLOSED)


@pytest.mark.parametrize("seed", range(3))
def test_noise_in_the_lane_harms_nobody_else(kvd, lane, seed):
    """A client that writes random bytes over its whole lane, over and over, and rings."""
    session_id, payload = filled(kvd)
    other = LaneClient(kvd.stub, kvd.path)
    chance = np.random.default_rng(seed)
    noise = np.frombuffer(lane.lane, np.uint8)
    keys = all_keys(3)
    for turn in range(30):
        noise[4096:] = chance.integers(0, 256, noise.size - 4096, np.uint8)
        if turn % 3:  # headers that come further: a true sequence, verbs that exist, small numbers
            for place in range(turn, turn + 4):
                numbers = chance.integers(0, 5000, 9)
                numbers[0] = chance.integers(1, 4)
                layout.REQUEST.pack_into(lane.lane, layout.request_at(place), place, *numbers.tolist())
        lane.posted_word[0] = min(turn + 1, lane.completed_word[0] + layout.SLOT_COUNT)
        os.eventfd_write(lane.request_bell, 1)
        fetch(other, session_id, keys)
        assert other.completion()[0] == 0
        assert other.memory[: payload.size].tobytes() == records_of(payload, keys).tobytes()
    assert kvd.engine.info(session_id).chunk_count == 3
    assert '"fault"' not in kvd.stream.text
    other.close()


@pytest.mark.parametrize("harm", ["never reads", "shuts", "closes"])
def test_a_bell_that_cannot_be_rung_holds_nobody(kvd, harm):
    """One thread answers both: it must neither block on the bell of one, nor end by it."""
    session_id, _ = filled(kvd, 1)
    mallory, honest = LaneClient(kvd.stub, kvd.path), LaneClient(kvd.stub, kvd.path)
    bell = socket.socket(fileno=os.dup(mallory.completion_bell))
    bell.setblocking(True)
    os.set_blocking(mallory.request_bell, True)
    if harm == "shuts":
        bell.shutdown(socket.SHUT_RDWR)
    if harm == "closes":
        bell.close()
        os.close(mallory.completion_bell)
    for _ in range(600):  # a socket holds about 270 rings
        fetch(mallory, session_id, all_keys(1)[:1])
        assert mallory.completion()[0] == 0
    fetch(honest, session_id, all_keys(1)[:1])
    assert honest.completion()[0] == 0
    mallory.socket.close()  # and keeps the bells
    bell.close()
    honest.close()
    wait_for(lambda: not lane_threads())


def test_a_slow_call_holds_nobody(kvd, monkeypatch):
    """While one client's call takes its time the others are answered, small and large; then its next one is."""
    session_id, _ = filled(kvd, 1)
    slow, others = LaneClient(kvd.stub, kvd.path), [LaneClient(kvd.stub, kvd.path) for _ in range(3)]
    begun, go_on = threading.Event(), threading.Event()
    prefetch = Engine.prefetch

    def waits(self, *arguments):
        begun.set()
        assert go_on.wait(30)
        return prefetch(self, *arguments)

    monkeypatch.setattr(Engine, "prefetch", waits)
    slow.post(layout.PREFETCH, all_keys(1).tobytes(), session_id=session_id)
    fetch(slow, session_id, all_keys(1)[:1])  # waits its turn
    assert begun.wait(30)
    for count in (1, 20):
        for other in others:
            fetch(other, session_id, all_keys(1)[:count])
            assert other.completion()[0] == 0
    assert slow.completed_word[0] == 0
    go_on.set()
    assert slow.completion()[0] == 0
    for client in (slow, *others):
        client.close()
    wait_for(lambda: not lane_threads())


def test_a_fault_of_ours_ends_the_lanes_and_not_their_threads(kvd, monkeypatch):
    """Clients hear that their lane is closed; the next one gets a lane that works."""
    session_id, _ = filled(kvd, 1)
    clients = [LaneClient(kvd.stub, kvd.path) for _ in range(2)]
    with monkeypatch.context() as broken:
        broken.setattr("hga_kvd.lane.Lane.take", lambda self: 1 / 0)
        fetch(clients[0], session_id, all_keys(1)[:1])
        wait_for(lambda: all(client.completed_word[0] == layout.CLOSED for client in clients))
    assert '"fault"' in kvd.stream.text
    clients.append(LaneClient(kvd.stub, kvd.path))
    fetch(clients[2], session_id, all_keys(1)[:1])
    assert clients[2].completion()[0] == 0
    for client in clients:
        client.close()
    wait_for(lambda: not lane_threads())


def test_a_range_on_loan_is_waited_for(kvd, lane):
    """Also by a fetch that RAM could answer at once."""
    session_id, payload = filled(kvd, 1)
    keys = all_keys(1)[:2]
    with kvd.landing.borrow(lane.client_id, 0, 4096):
        fetch(lane, session_id, keys)
        time.sleep(0.02)
        assert lane.completed_word[0] == 0
        assert not lane.memory.any()
    assert lane.completion()[0] == 0
    assert lane.memory[: 2 * RECORD].tobytes() == records_of(payload, keys).tobytes()


def test_a_lane_is_one_client_even_if_it_posts_without_a_pause(kvd):
    """Requests of several clients are answered in turns: one that always has eight posted is not first."""
    session_id, _ = filled(kvd, 1)
    order, posted = [], threading.Event()
    clients = [LaneClient(kvd.stub, kvd.path) for _ in range(2)]
    names = {client.client_id: number for number, client in enumerate(clients)}
    fetch_few = kvd.service.calls.fetch_few

    def notes(session, keys, place, epoch):
        assert posted.wait(30)
        order.append(names[place.client_id])
        return fetch_few(session, keys, place, epoch)

    kvd.service.calls.fetch_few = notes
    for _ in range(layout.SLOT_COUNT):
        fetch(clients[0], session_id, all_keys(1)[:1])
    for _ in range(3):
        fetch(clients[1], session_id, all_keys(1)[:1])
    posted.set()
    for client in clients:
        client.completion()
    assert order[:6] in ([0, 1, 0, 1, 0, 1], [0, 0, 1, 0, 1, 0])
    for client in clients:
        client.close()


def test_every_answer_rings_a_client_that_may_sleep(kvd, lane):
    """Who sleeps hears of every completion by its bell alone, after the counter moved; also of the lane's end."""
    session_id, _ = filled(kvd)
    with socket.socket(fileno=os.dup(lane.completion_bell)) as bell:
        bell.settimeout(30)
        for count in (1, 40, 2, 60):  # the leader answers the small ones, another thread the large
            fetch(lane, session_id, all_keys(3)[:count])
            assert bell.recv(2) == b"\0"
            assert lane.completed_word[0] == lane.posted
        if rings.LIBRARY is not None:  # in C who says that it is awake is left alone
            awake = lane.lane[layout.awake_at(layout.COMPLETIONS_POSTED) :][:8].cast("Q")
            awake[0] = 1
            fetch(lane, session_id, all_keys(3)[:1])
            assert lane.completion()[0] == 0
            awake[0] = 0
        kvd.service.lanes.end(lane.client_id)
        assert bell.recv(2) == b"\0"
        assert lane.completed_word[0] == layout.CLOSED


def test_a_stolen_ring_is_made_up_by_the_next(kvd, lane):
    session_id, _ = filled(kvd, 1)
    fetch(lane, session_id, all_keys(1))
    lane.completion()
    time.sleep(0.05)  # the daemon sleeps
    fetch(lane, session_id, all_keys(1)[:1], ring=False)
    time.sleep(0.05)
    os.eventfd_read(lane.request_bell)
    fetch(lane, session_id, all_keys(1)[:2])
    assert lane.completion(1)[0] == lane.completion(2)[0] == 0


@pytest.mark.parametrize("native", ["auto", "off"])
def test_a_hostile_process_reaches_only_its_own_memory(daemon, native):
    """hostile.py beside an honest client of a real daemon: what that one gets, has and stored is never touched, and all
    that the other one was given is reclaimed."""
    running = daemon(environment={"HGA_KVD_NATIVE": native})
    stub = running.stub()
    sessions = [open_session(stub, name).session_id for name in ("honest", "hostile")]
    payload = payload_of(8)
    for session_id in sessions:
        append(stub, session_id, payload)
        stub.Flush(kvd_pb2.FlushRequest(session_id=session_id))

    def descriptors():
        """How many of each kind that clients have; threads have rings of their own."""
        kinds = Counter()
        for path in Path(f"/proc/{running.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                name = os.readlink(path)
                kinds.update(kind for kind in ("socket", "eventfd", "eventpoll", "memfd") if kind in name)
        return kinds

    honest = LaneClient(stub, running.socket)
    honest.memory[MIB:] = 7
    chance, keys, fetches, before = np.random.default_rng(0), all_keys(8), 0, descriptors()
    command = [sys.executable, Path(__file__).with_name("hostile.py"), running.socket, sessions[1], 0, 1]
    with subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, text=True) as hostile:
        while hostile.poll() is None:
            some = chance.choice(keys, chance.choice([2, 8, 64]))
            fetch(honest, sessions[0], some)
            assert honest.completion() == (0, b"", (0, len(some), 0))
            assert honest.memory[: len(some) * RECORD].tobytes() == records_of(payload, some).tobytes()
            fetches += 1
        assert int(hostile.stdout.read()) > 5
    assert hostile.returncode == 0
    assert fetches > 20
    assert (honest.memory[MIB:] == 7).all()
    wait_for(lambda: descriptors() <= before)
    assert not running.events("fault")
    stub.Park(kvd_pb2.ParkRequest(session_id=sessions[0]))
    fetch(honest, sessions[0], keys)  # as it lies on disk
    assert honest.completion() == (0, b"", (0, 0, len(keys)))
    assert honest.memory[: payload.size].tobytes() == records_of(payload, keys).tobytes()
    honest.close()


def test_everything_of_a_dead_client_is_reclaimed(kvd):
    def opened():
        return len(os.listdir("/proc/self/fd"))

    session_id, _ = filled(kvd, 1)
    LaneClient(kvd.stub, kvd.path).close()
    wait_for(lambda: not lane_threads())
    before = opened()
    for _ in range(20):
        client = LaneClient(kvd.stub, kvd.path)
        fetch(client, session_id, all_keys(1))
        client.completion()
        client.close()
    wait_for(lambda: not lane_threads() and len(kvd.landing) == 0 and len(kvd.service.lanes) == 0)
    del client
    wait_for(lambda: opened() <= before + 2)  # the last lane's memory goes when the next one comes


def test_a_client_that_dies_in_mid_call(kvd, monkeypatch):
    session_id, payload = filled(kvd, 1)
    halfway, go_on = threading.Event(), threading.Event()
    engine_fetch = Engine.fetch

    def slow(self, *arguments):
        halfway.set()
        assert go_on.wait(30)
        return engine_fetch(self, *arguments)

    monkeypatch.setattr(Engine, "fetch", slow)
    monkeypatch.setattr(Engine, "fetch_few", lambda *_: 0)
    client = LaneClient(kvd.stub, kvd.path)
    fetch(client, session_id, all_keys(1))
    assert halfway.wait(30)
    client.close()
    wait_for(lambda: len(kvd.landing) == 0)
    assert lane_threads()  # it still writes there, into memory that it keeps alive
    go_on.set()
    wait_for(lambda: not lane_threads())
    assert client.memory[: payload.size].tobytes() == records_of(payload, all_keys(1)).tobytes()


def test_lanes_are_limited_and_need_the_right_machine(kvd, monkeypatch):
    lanes = Lanes(kvd.service.calls, 1, kvd.service.log)
    descriptors = lanes.open(1)
    assert len(descriptors) == 3
    assert lanes.open(2) == ()
    lanes.end(1)
    wait_for(lambda: not lane_threads())
    assert len(lanes.open(2)) == 3
    lanes.shutdown(5)
    assert lanes.open(3) == ()
    monkeypatch.setattr(layout.platform, "machine", lambda: "aarch64")
    answer = kvd.stub.Attach(kvd_pb2.AttachRequest(region_bytes=MIB, lane=True))
    assert answer.lane_version == 0


def test_without_threads_or_descriptors_a_client_gets_no_lane(kvd, monkeypatch):
    def no_more(*_):
        raise OSError(errno.EMFILE, "too many open files")

    def no_thread(*_):
        raise RuntimeError("can't start new thread")

    session_id, payload = filled(kvd, 1)
    for what, harm in (("hga_kvd.lane.os.memfd_create", no_more), ("hga_kvd.lane.os.dup", no_more)):
        with monkeypatch.context() as patch:
            patch.setattr(what, harm)
            assert kvd.service.lanes.open(1) == ()
        wait_for(lambda: not lane_threads())
    with monkeypatch.context() as patch:
        patch.setattr("hga_kvd.lanes.threading.Thread.start", no_thread)
        assert kvd.service.lanes.open(1) == ()
    assert not kvd.service.lanes._threads
    client = LaneClient(kvd.stub, kvd.path)
    fetch(client, session_id, all_keys(1))
    assert client.completion()[0] == 0
    assert client.memory[: payload.size].tobytes() == records_of(payload, all_keys(1)).tobytes()
    client.close()


def test_a_client_that_asks_for_no_lane_gets_one_descriptor(kvd):
    Client(kvd.stub, kvd.path).socket.close()
    assert len(kvd.service.lanes) == 0


@pytest.fixture
def raw(kvd):
    """A client's Lane on a lane whose other end is this test."""
    lanes = Lanes(kvd.service.calls, 1, kvd.service.log)
    memory, *bells = lanes.open(5)
    lanes.shutdown(5)
    words = memoryview(layout_map(memory))
    words[layout.COMPLETIONS_POSTED :][:8].cast("Q")[0] = 0
    alarm = os.eventfd(0)
    yield Lane([memory, *bells], alarm), words, alarm
    os.close(alarm)


def layout_map(descriptor):
    return mmap.mmap(descriptor, layout.LANE_BYTES)


def test_a_call_that_was_given_up_is_passed_over(raw):
    lane, words, _ = raw
    completed = words[layout.COMPLETIONS_POSTED :][:8].cast("Q")
    with pytest.raises(DeadlineExceeded):
        lane.call(0.05, layout.FETCH, b"", 1)
    for sequence in (0, 1):
        layout.COMPLETION.pack_into(words, layout.completion_at(sequence), sequence, 0, 0, 10 + sequence, 0, 0)
    completed[0] = 1

    def answer_late():
        time.sleep(0.05)
        completed[0] = 2

    thread = threading.Thread(target=answer_late)
    thread.start()
    assert lane.call(5, layout.FETCH, b"", 1).chunk_count == 11
    thread.join()
    lane.close()


def test_a_full_ring_a_closed_lane_and_a_dead_daemon(raw):
    lane, words, alarm = raw
    for _ in range(layout.SLOT_COUNT + 1):  # the last one finds no slot, and overwrites none
        with pytest.raises(DeadlineExceeded):
            lane.call(0.01, layout.FETCH, b"", 1)
    assert words[layout.REQUESTS_POSTED :][:8].cast("Q")[0] == layout.SLOT_COUNT
    os.eventfd_write(alarm, 1)
    with pytest.raises(Unavailable):
        lane.call(5, layout.FETCH, b"", 1)
    words[layout.COMPLETIONS_POSTED :][:8].cast("Q")[0] = layout.CLOSED
    with pytest.raises(LaneClosed):
        lane.call(5, layout.FETCH, b"", 1)
    lane.close()


def looks_of(patience, waits, crowded):
    """Which of so many waits look; each ends soon, and on a crowded core as soon as it looked."""
    found = []
    for _ in range(waits):
        looks = patience.looks()
        found.append(looks)
        if looks and crowded:
            patience.crowded()
        patience.ended(20e-6, looks and not crowded)
    return found


def test_on_a_crowded_core_the_leader_looks_ever_more_rarely():
    patience = Patience()
    assert looks_of(patience, 4, crowded=False) == [False, True, True, True]
    assert looks_of(patience, 12, crowded=True) == [n in (0, 2, 5, 10) for n in range(12)]
    assert sum(looks_of(patience, 1000, crowded=True)) <= 5 + 1000 // RESTS_MAX
    free = looks_of(patience, RESTS_MAX + 20, crowded=False)
    assert all(free[free.index(True) :])  # as soon as it finds the core free
    assert sum(free) >= 20
    assert looks_of(patience, 3, crowded=True) == [True, False, True]


def test_after_a_slow_wait_the_leader_sleeps_at_once():
    patience = Patience()
    patience.ended(20e-6, False)
    assert patience.looks()
    patience.ended(1.0, False)
    assert not patience.looks()


@pytest.mark.parametrize(("daemon", "client"), [("native", "twin"), ("twin", "native")])
def test_c_on_one_side_only(monkeypatch, daemon, client):
    """Each wait of either side is heard, whichever says that it is awake; with pauses after which both sleep."""
    library = rings.LIBRARY
    if library is None:
        pytest.skip(f"native code is {native.STATE}")
    monkeypatch.setattr(rings, "LIBRARY", library if daemon == "native" else None)
    kvd = Running()
    monkeypatch.setattr(rings, "LIBRARY", library if client == "native" else None)
    connection = Connection(f"unix:{kvd.path}")
    assert connection.transport == "lane"
    _, payload = filled(kvd)
    session_id = connection.open("s", None, create=False).session_id
    keys = all_keys(3)
    for number in range(400):
        some = keys[number % 40 :][: 2 + 30 * (number % 2)]
        assert connection.fetch(session_id, some).records.tobytes() == records_of(payload, some).tobytes()
        if number % 50 == 0:
            time.sleep(0.003)
    connection.disconnect()
    kvd.close()


@pytest.fixture
def ends(either_way):
    """Both ends of a pair of counters, and the alarm of the first."""
    memory, alarm = mmap.mmap(-1, layout.LANE_BYTES), os.eventfd(0)
    bells = os.eventfd(0), os.eventfd(0)
    here = best_end()(memory, layout.REQUESTS_POSTED, layout.COMPLETIONS_POSTED, *bells, alarm)
    there = best_end()(memory, layout.COMPLETIONS_POSTED, layout.REQUESTS_POSTED, *reversed(bells), alarm)
    yield here, there, alarm
    here.close()
    there.close()
    for descriptor in (*bells, alarm):
        os.close(descriptor)


def test_a_slow_wait_does_not_spin_again(ends):
    here, there, _ = ends
    there._moved[0] = 1
    assert here.wait(0, 5) == 1  # at once: the next wait looks first
    late = threading.Timer(0.1, there.exchange, (2, 0, 0.0))
    late.start()
    assert here.wait(1, 5) == 2
    before = time.thread_time()
    assert here.wait(2, 0.2) == 2
    assert time.thread_time() - before < 0.05
    assert not here.alarmed
    late.join()


def test_two_ends_pass_a_count_to_and_fro(ends):
    """Quickly, and with pauses after which both sleep: no ring is missed."""
    here, there, _ = ends
    rounds = 3000

    def echo():
        for number in range(rounds):
            assert there.wait(number, 5) == number + 1
            if number % 500 == 250:
                time.sleep(0.005)
            there._moved[0] = number + 1
            os.eventfd_write(there._rings_bell, 1)

    thread = threading.Thread(target=echo)
    thread.start()
    for number in range(rounds):
        assert here.exchange(number + 1, number, 5) == number + 1
        if number % 500 == 0:
            time.sleep(0.005)
    thread.join(5)
    assert not thread.is_alive()


def test_an_alarm_ends_a_wait_and_a_signal_does_not(ends):
    here, _, alarm = ends
    heard = []
    before = signal.signal(signal.SIGALRM, lambda *_: heard.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
        started = time.perf_counter()
        assert here.wait(0, 0.2) == 0
        assert time.perf_counter() - started >= 0.2
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(heard) > 2
    assert not here.alarmed
    os.eventfd_write(alarm, 1)
    assert here.exchange(1, 0, 5) == 0
    assert here.alarmed
