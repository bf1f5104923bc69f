"""Turns: who moves bytes next. The order is tested as a pure queue, the waiting with threads."""

import threading
import time

import numpy as np
import pytest
from hga_kvd import errors, turns
from hga_kvd.config import MIB
from hga_kvd.messages import CLIENTS_OF_PEER, client_of
from hga_kvd.turns import FairQueue, Turns
from hga_kvd_client.connection import Connection
from hga_kvd_proto import CLIENT_KEY
from hga_kvd_proto.v1 import kvd_pb2
from test_service import CODE, Running
from wire import GEOMETRY, all_keys, append, open_session, payload_of, refused, wait_for

SMALL, LARGE = turns.SMALL_BYTES, turns.SMALL_BYTES + 1


def taken(queue, count):
    return [queue.take() for _ in range(count)]


def test_one_client_is_served_in_its_order():
    queue = FairQueue()
    for number in range(5):
        queue.put("t", 1, 100, number)
    assert taken(queue, 5) == [0, 1, 2, 3, 4]
    assert not queue.counts


def test_tenants_share_bytes_not_calls():
    """One asks for ten times as much in each call: it gets a tenth of the calls."""
    queue = FairQueue()
    for number in range(60):
        queue.put("bulk", 1, 1000, ("bulk", number))
        queue.put("steps", 1, 100, ("steps", number))
    names = [name for name, _ in taken(queue, 44)]
    assert names.count("steps") == 40
    assert names.count("bulk") == 4


def test_clients_of_one_tenant_do_not_add_up_against_another():
    queue = FairQueue()
    for number in range(30):
        for client in range(5):
            queue.put("many", client, 100, ("many", client))
        queue.put("one", 9, 100, ("one", number))
    served = taken(queue, 60)
    names = [name for name, _ in served]
    assert names.count("one") == 30
    of_many = [client for name, client in served if name == "many"]
    assert [of_many.count(client) for client in range(5)] == [6] * 5


def test_who_comes_after_a_while_has_no_credit_and_no_debt():
    queue = FairQueue()
    for number in range(100):
        queue.put("early", 1, 100, "early")
        assert queue.take() == "early", number
    for _ in range(10):
        queue.put("early", 1, 100, "early")
        queue.put("late", 1, 100, "late")
    names = taken(queue, 20)
    for end in range(2, 21):
        assert abs(names[:end].count("early") - names[:end].count("late")) <= 2


def test_one_that_always_asks_again_at_once_does_not_forget_what_it_had():
    """A client makes one call at a time: its flow is empty each time it was served."""
    queue = FairQueue()
    for number in range(40):
        queue.put("steps", 1, 100, ("steps", number))
    bulk = steps = 0
    queue.put("bulk", 1, 1000, ("bulk", 0))
    while steps < 40:
        name, _ = queue.take()
        if name == "bulk":
            bulk += 1
            queue.put("bulk", 1, 1000, ("bulk", bulk))
        else:
            steps += 1
    assert bulk in (4, 5)


@pytest.mark.parametrize("seed", range(5))
def test_any_two_that_wait_differ_by_no_more_than_two_calls(seed):
    """Whatever sizes and orders: while both have something waiting, bytes differ by the largest calls at most."""
    chance = np.random.default_rng(seed)
    queue, left = FairQueue(), {}
    for number in range(300):
        tenant, client, size = f"t{chance.integers(3)}", int(chance.integers(4)), int(chance.integers(1, 1000))
        queue.put(tenant, client, size, (tenant, client, size, number))
        left[tenant] = left.get(tenant, 0) + 1
    served = dict.fromkeys(left, 0)
    seen = set()
    while all(left.values()):
        tenant, _, size, number = queue.take()
        served[tenant] += size
        left[tenant] -= 1
        seen.add(number)
        assert max(served.values()) - min(served.values()) <= 2000
    rest = sum(left.values())
    assert len(seen | {queue.take()[3] for _ in range(rest)}) == 300


def test_what_was_removed_is_not_taken():
    queue = FairQueue()
    for number in range(3):
        queue.put("t", 1, 100, number)
    queue.put("u", 2, 100, "other")
    queue.remove("t", 1, 100, 1)
    queue.remove("u", 2, 100, "other")
    assert queue.counts == {"t": 2}
    assert taken(queue, 2) == [0, 2]
    assert not queue.counts


def test_flows_are_forgotten_when_they_are_many():
    queue = FairQueue()
    for number in range(5 * turns.IDLE_FLOWS_MAX):
        for _ in range(2):  # somebody always waits
            queue.put("steady", 0, 100, None)
        queue.put(f"t{number}", number, 100, number)
        assert number in taken(queue, 3)
    assert len(queue._tenants.flows) <= turns.IDLE_FLOWS_MAX + 2
    queue.rest()
    assert not queue._tenants.flows


def test_ever_new_names_take_no_memory():
    queue = FairQueue()
    for number in range(10 * turns.IDLE_FLOWS_MAX):
        queue.put("t", number, 100, number)
        queue.put("t", number + 0.5, 100, number)
        taken(queue, 1 if number < 10 else 2)  # somebody always waits, and nobody comes twice
    assert len(queue._tenants.flows["t"].clients.flows) <= 2 * turns.IDLE_FLOWS_MAX + 20


def test_a_peer_has_so_many_shares_whatever_it_calls_itself():
    class Context:
        def __init__(self, name):
            self.name = name

        def peer(self):
            return "unix:"

        def invocation_metadata(self):
            return (("user-agent", "x"), (CLIENT_KEY, self.name))

    clients = {client_of(Context(f"client {number}")) for number in range(10_000)}
    assert len(clients) == CLIENTS_OF_PEER
    assert client_of(Context("a")) == client_of(Context("a"))


def in_thread(one, *arguments):
    """A thread inside a turn until the returned event is set; `inside` tells that it is there."""
    inside, leave = threading.Event(), threading.Event()

    def work():
        with one.turn(*arguments):
            inside.set()
            assert leave.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, inside, leave


def test_places_are_limited_and_small_calls_have_their_own():
    one = Turns(100)
    large = [in_thread(one, "t", number, LARGE) for number in range(turns.LARGE_AT_ONCE + 2)]
    admitted = large[: turns.LARGE_AT_ONCE]
    for _, inside, _ in admitted:
        assert inside.wait(30)
    wait_for(lambda: one.waiting() == {"small": 0, "large": 2})
    with one.turn("t", 1, SMALL):
        pass
    for thread, inside, leave in large:
        assert inside.wait(30)
        leave.set()
        thread.join(30)
    assert one.waiting() == {"small": 0, "large": 0}


def test_over_the_limit_a_call_is_refused_with_the_number():
    one = Turns(1)
    first = [in_thread(one, "t", number, LARGE) for number in range(turns.LARGE_AT_ONCE)]
    for _, inside, _ in first:
        assert inside.wait(30)
    waits = in_thread(one, "t", 7, LARGE)
    wait_for(lambda: one.waiting()["large"])
    with pytest.raises(errors.LimitExceeded, match="1 calls of this tenant wait"), one.turn("t", 8, LARGE):
        pass
    other = in_thread(one, "another tenant", 9, LARGE)
    for thread, inside, leave in (*first, waits, other):
        assert inside.wait(30)
        leave.set()
        thread.join(30)


def test_a_deadline_ends_the_wait_and_the_place_goes_to_another():
    one = Turns(100)
    first = [in_thread(one, "t", number, LARGE) for number in range(turns.LARGE_AT_ONCE)]
    for _, inside, _ in first:
        assert inside.wait(30)
    began = time.perf_counter()
    with one.turn("t", 8, LARGE, began + 0.02):
        assert time.perf_counter() - began >= 0.02  # the others still have their places
    waits = in_thread(one, "t", 9, LARGE)
    for thread, inside, leave in (*first, waits):
        assert inside.wait(30)
        leave.set()
        thread.join(30)
    for _ in range(2 * turns.LARGE_AT_ONCE):  # no place was lost or made
        with one.turn("t", 1, LARGE):
            pass
    assert one._places["large"]._free == turns.LARGE_AT_ONCE


def test_a_call_that_fails_leaves_its_place():
    one = Turns(100)
    for _ in range(2 * turns.LARGE_AT_ONCE):
        with pytest.raises(ZeroDivisionError), one.turn("t", 1, LARGE):
            raise ZeroDivisionError
    assert one._places["large"]._free == turns.LARGE_AT_ONCE


@pytest.fixture
def kvd():
    running = Running(waiting_calls_max=1, message_bytes_max=4 * MIB)
    yield running
    running.close()


def test_calls_take_their_turns_and_refusals_reach_the_client(kvd):
    session_id = open_session(kvd.stub).session_id
    keys = np.tile(all_keys(3), 8)
    append(kvd.stub, session_id, payload_of(3))
    request = kvd_pb2.FetchRequest(session_id=session_id, keys=keys.tobytes())
    size = len(kvd.stub.Fetch(request).payload)
    assert size > SMALL
    held = [in_thread(kvd.service.calls.turns, "", number, size) for number in range(turns.LARGE_AT_ONCE)]
    for _, inside, _ in held:
        assert inside.wait(30)
    late = kvd_pb2.FetchRequest(session_id=session_id, keys=keys.tobytes(), deadline_us=20_000)
    assert len(kvd.stub.Fetch(late).payload) == size  # RAM has it: the deadline ends the wait alone
    waits = kvd.stub.Fetch.future(request)
    wait_for(lambda: kvd.service.calls.turns.waiting()["large"])
    code, sentence, meaning = refused(kvd.tcp_stub.Fetch, request)
    assert (code, meaning) == (CODE.RESOURCE_EXHAUSTED, "LimitExceeded")
    assert sentence.startswith("1 calls of this tenant wait")
    small = kvd_pb2.FetchRequest(session_id=session_id, keys=keys[:4].tobytes())
    assert len(kvd.stub.Fetch(small).payload) == 4 * size // len(keys)
    for thread, _, leave in held:
        leave.set()
        thread.join(30)
    assert len(waits.result(10).payload) == size


def test_a_fetch_in_parts_is_the_same_as_in_one(kvd, monkeypatch):
    monkeypatch.setattr("hga_kvd.calls.PART_BYTES", 20_000)
    session_id = open_session(kvd.stub).session_id
    append(kvd.stub, session_id, payload_of(3))
    keys = np.random.default_rng(0).permutation(all_keys(3))
    request = kvd_pb2.FetchRequest(session_id=session_id, keys=keys.tobytes())
    parts = []
    fetch = kvd.engine.fetch

    def notes(session, part, *arguments):
        parts.append(len(part))
        return fetch(session, part, *arguments)

    monkeypatch.setattr(kvd.engine, "fetch", notes)
    in_parts = kvd.stub.Fetch(request)
    assert len(parts) > 2
    assert sum(parts) == len(keys)
    monkeypatch.setattr("hga_kvd.calls.PART_BYTES", 1 << 30)
    assert kvd.stub.Fetch(request) == in_parts
    assert parts[-1] == len(keys)
    assert in_parts.ram_records == len(keys)


def test_a_large_fetch_is_in_small_parts_beside_small_fetches_of_another(kvd, monkeypatch):
    monkeypatch.setattr("hga_kvd.calls.PART_BESIDE_SMALL_BYTES", 20_000)
    monkeypatch.setattr("hga_kvd.calls.BESIDE_SMALL_S", 60)
    session_id = open_session(kvd.stub).session_id
    append(kvd.stub, session_id, payload_of(3))
    keys = np.tile(np.random.default_rng(0).permutation(all_keys(3)), 8)
    large = kvd_pb2.FetchRequest(session_id=session_id, keys=keys.tobytes())
    small = kvd_pb2.FetchRequest(session_id=session_id, keys=keys[:4].tobytes())
    sizes, fetch = [], kvd.engine.fetch

    def notes(session, part, *arguments):
        sizes.append(len(part))
        return fetch(session, part, *arguments)

    monkeypatch.setattr(kvd.engine, "fetch", notes)
    alone = kvd.stub.Fetch(large)
    kvd.stub.Fetch(small)  # its own small fetches are no reason
    assert kvd.stub.Fetch(large) == alone
    assert sizes == [len(keys), 4, len(keys)]
    kvd.tcp_stub.Fetch(small)
    sizes.clear()
    assert kvd.stub.Fetch(large) == alone
    assert sum(sizes) == len(keys)
    assert max(sizes) == 20_000 // GEOMETRY.record_bytes


def test_clients_of_one_socket_have_a_share_each():
    """One of them asks for three things before the other asks for one, which is then second."""
    running = Running(message_bytes_max=4 * MIB)
    try:
        keys = np.tile(all_keys(3), 8)
        sessions = [open_session(running.stub, name).session_id for name in ("a", "b")]
        for session_id in sessions:
            append(running.stub, session_id, payload_of(3))
        one, other = (kvd_pb2.FetchRequest(session_id=session_id, keys=keys.tobytes()) for session_id in sessions)
        size, served = len(running.stub.Fetch(one).payload), []
        fetch, waiting = running.engine.fetch, running.service.calls.turns.waiting

        def notes(session_id, *arguments):
            served.append("ab"[sessions.index(session_id)])
            return fetch(session_id, *arguments)

        running.engine.fetch = notes
        held = [in_thread(running.service.calls.turns, "", number, size) for number in range(turns.LARGE_AT_ONCE)]
        for _, inside, _ in held:
            assert inside.wait(5)
        calls = []
        for count, (request, name) in enumerate([(one, "x" * 80)] * 3 + [(other, "y")]):
            calls.append(running.stub.Fetch.future(request, metadata=((CLIENT_KEY, name),)))
            while waiting()["large"] != count + 1:
                time.sleep(0.001)
        held[0][2].set()  # one place, so one after another
        for call in calls:
            assert len(call.result(10).payload) == size
        for _, _, leave in held[1:]:
            leave.set()
        assert served == ["a", "b", "a", "a"]
    finally:
        running.close()


def test_connections_say_who_they_are(monkeypatch):
    running = Running()
    try:
        session_id = open_session(running.stub).session_id
        append(running.stub, session_id, payload_of(1))
        turn, clients = running.service.calls.turns.turn, []

        def notes(tenant, client, *arguments):
            clients.append(client)
            return turn(tenant, client, *arguments)

        running.service.calls.turns.turn = notes
        names = iter(["one", "other"])
        monkeypatch.setattr("hga_kvd_client.link.secrets.token_hex", lambda _: next(names))
        connections = [Connection(f"unix:{running.path}", transport="bytes") for _ in range(2)]
        for connection in connections * 2:
            connection.fetch(connection.open("s", None, create=False).session_id, all_keys(1))
        for connection in connections:
            connection.disconnect()
        assert len(clients) == 4
        assert clients[:2] == clients[2:]
        assert clients[0] != clients[1]
    finally:
        running.close()
