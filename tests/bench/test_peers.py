"""The peers' interface, on those that need nothing installed; and that one that lies is found out."""

import against_peers
import numpy as np
import peers
import pytest
from hga_kvd.bench.content import WrongBytes
from peers import PEERS, Missing, load
from peers.base import Shape
from rich.progress import Progress

SHAPE = Shape(records=64, record_bytes=32768, batch=8)


@pytest.mark.parametrize("state", ["cold", "hot"])
@pytest.mark.parametrize("name", ["preadv", "preadv pool", "sqlite"])
def test_a_peer_returns_what_was_put(disk_path, name, state):
    records = against_peers.Records(SHAPE)
    peer = load(name)(disk_path, SHAPE, state)
    against_peers.fill(peer, records)
    out = against_peers.aligned_buffer(SHAPE.batch * SHAPE.record_bytes).reshape(SHAPE.batch, -1)
    for numbers in (np.arange(8), np.array([63, 0, 17, 5, 62, 1, 33, 40])):
        assert np.array_equal(peer.read(numbers, out), records.of(numbers))
    peer.forget()
    numbers = np.arange(56, 64)
    assert np.array_equal(peer.read(numbers, out), records.of(numbers))
    peer.close()


def test_all_are_measured_in_turns_hot(disk_path):
    classes, facts = {name: load(name) for name in ("preadv", "sqlite")}, {}
    with Progress(disable=True) as progress:
        speeds = against_peers.measure(classes, disk_path, SHAPE, "hot", 2, 3, progress, facts)
    assert {name: len(values) for name, values in speeds.items()} == {"preadv": 3, "sqlite": 3}
    assert all(value > 0 for values in speeds.values() for value in values)
    assert list(disk_path.iterdir()) == []
    assert facts == {name: {"pages": "transparent huge pages"} for name in classes}


def test_a_peer_that_returns_other_bytes_ends_the_run(disk_path):
    class Liar(load("preadv")):
        def read(self, numbers, out):
            return super().read(numbers[::-1].copy(), out)

    with Progress(disable=True) as progress, pytest.raises(WrongBytes, match="Liar"):
        against_peers.measure({"liar": Liar}, disk_path, SHAPE, "hot", 1, 1, progress, {})


def test_what_is_not_installed_is_said_so(monkeypatch):
    monkeypatch.setitem(PEERS, "absent", peers.Entry("no_such_module", "pip install absent", ""))
    with pytest.raises(Missing, match=r"not installed \(pip install absent\)"):
        load("absent")
