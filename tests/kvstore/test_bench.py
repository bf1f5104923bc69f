"""`hga-kvd bench`: what it stores, the traces it replays, the numbers it makes of clocks, and the command end to end."""

import json
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hga_kvd.bench.content import Content, WrongBytes
from hga_kvd.bench.daemon import BenchFailed
from hga_kvd.bench.decode import merged_reads
from hga_kvd.bench.meter import Case, Sample, limit
from hga_kvd.bench.options import Options
from hga_kvd.bench.run import PROFILES, measure
from hga_kvd.bench.trace import TraceInvalid, bank_misses, read_trace, synthetic_trace
from hga_kvd_client.geometry import KEY_DTYPE, Geometry
from wire import command

GEOMETRY = Geometry(layers=3, kv_heads=2, head_dim=64, dtype="bfloat16")


def keys_of(*places):
    keys = np.zeros(len(places), KEY_DTYPE)
    for key, (layer, kv_head, group) in zip(keys, places, strict=True):
        key["layer"], key["kv_head"], key["group"] = layer, kv_head, group
    return keys


def packed(path, trace):
    np.savez_compressed(path, trace=np.packbits(trace, axis=-1), shape=trace.shape)
    return path


def test_appended_chunks_hold_the_records_of_their_places():
    content = Content(GEOMETRY, seed=7)
    out = np.empty(2 * GEOMETRY.chunk_bytes, np.uint8)
    content.fill_chunks(5, out)
    view = out.reshape(2, 3, 2, 4, GEOMETRY.record_bytes)
    keys = keys_of((0, 0, 20), (2, 1, 27), (1, 0, 25))
    assert np.array_equal(content.records(keys), view[[0, 1, 1], [0, 2, 1], [0, 1, 0], [0, 3, 1]])
    assert len({record.tobytes() for record in view.reshape(-1, GEOMETRY.record_bytes)}) == 2 * 3 * 2 * 4


@pytest.mark.parametrize("wrong", ["swapped", "one bit", "status"])
def test_wrong_bytes_are_found(wrong):
    content = Content(GEOMETRY)
    keys, chance = keys_of((0, 0, 1), (0, 1, 1)), np.random.default_rng(0)
    records, statuses = content.records(keys), None
    assert content.check(keys, records, statuses, chance, 32) == 2
    if wrong == "swapped":
        records = records[::-1]
    elif wrong == "one bit":
        records[1, -1] ^= 1
    else:
        statuses = np.array([0, 1], np.uint8)
    with pytest.raises(WrongBytes):
        content.check(keys, records, statuses, chance, 32)


def test_only_a_sample_is_compared_when_there_are_many():
    content, chance = Content(GEOMETRY), np.random.default_rng(0)
    keys = keys_of(*((0, 0, group) for group in range(50)))
    assert content.check(keys, content.records(keys), None, chance, 8) == 8


def test_a_trace_comes_back_from_its_file(tmp_path):
    trace = np.random.default_rng(0).random((2, 3, 5, 21)) < 0.3
    assert np.array_equal(read_trace(packed(tmp_path / "t.npz", trace)), trace)


NO_TRACES = ["text", "empty", "array", "no shape", "wrong shape", "half a size", "endless", "too many sizes", "pickled"]


@pytest.mark.parametrize("content", NO_TRACES)
def test_what_is_not_a_trace_is_refused(tmp_path, content):
    path = tmp_path / "t.npz"
    bits = np.zeros((2, 3, 5, 2), np.uint8)
    if content == "text":
        path.write_text("not an archive")
    elif content == "empty":
        path.touch()
    elif content == "array":
        with path.open("wb") as file:
            np.save(file, bits)
    elif content == "no shape":
        np.savez(path, trace=bits)
    elif content == "wrong shape":
        np.savez(path, trace=bits, shape=(2, 3, 5, 40))
    elif content in ("half a size", "endless"):
        np.savez(path, trace=bits, shape=(2.5 if content == "half a size" else np.inf, 3, 5, 16))
    elif content == "too many sizes":
        np.savez(path, trace=bits, shape=((2, 3, 5, 16),))
    else:
        np.savez(path, trace=np.array([object()]), shape=(2, 3, 5, 16))
    with pytest.raises(TraceInvalid):
        read_trace(path)


@pytest.mark.parametrize("bank", [3, 8, 200])
def test_the_bank_leaves_what_an_lru_of_each_head_would(bank):
    """One group a step and head at most: more would be used at the same time, and an LRU does not say which goes first."""
    layers, heads, steps, groups = 2, 3, 120, 20
    chance = np.random.default_rng(3)
    trace = np.zeros((layers, heads, steps, groups), bool)
    for layer, head, step in np.argwhere(chance.random((layers, heads, steps)) < 0.8):
        trace[layer, head, step, int(groups * chance.random() ** 2)] = True
    misses = bank_misses(trace, bank, warm_up_steps=10)
    expected, opened = [], 0
    held = {(layer, head): OrderedDict() for layer in range(layers) for head in range(heads)}
    for step in range(steps):
        for layer in range(layers):
            for head in range(heads):
                lru = held[layer, head]
                for group in np.flatnonzero(trace[layer, head, step]).tolist():
                    opened += step >= 10
                    if group not in lru and step >= 10:
                        expected.append((step, layer, head, group))
                    lru.pop(group, None)
                    lru[group] = True
                    if len(lru) > bank:
                        lru.popitem(last=False)
    found = [
        (step, *(int(key[name]) for name in ("layer", "kv_head", "group")))
        for step, keys in zip(misses.steps.tolist(), misses.fetches, strict=True)
        for key in keys
    ]
    assert found == expected
    assert misses.hit_rate == pytest.approx(1 - len(found) / opened)
    assert all(len(np.unique(keys["layer"])) == 1 for keys in misses.fetches)


def test_a_step_may_open_more_than_the_bank_holds():
    trace = np.zeros((1, 1, 3, 10), bool)
    trace[:, :, :, :3] = True
    misses = bank_misses(trace, 2, warm_up_steps=0)
    assert [len(keys) for keys in misses.fetches] == [3, 1, 1]


def test_the_made_up_trace_is_like_a_models():
    trace = synthetic_trace(layers=4, steps=160)
    assert trace.sum() == 4 * 160 * 4 * 16
    assert 0.80 < bank_misses(trace, 64, 64).hit_rate < 0.93
    assert bank_misses(trace, 512, 64).hit_rate > bank_misses(trace, 64, 64).hit_rate


def test_neighbours_are_one_read():
    g = GEOMETRY  # 4 groups a chunk, 2 KV heads, 3 layers
    offsets, lengths = merged_reads(g, keys_of((1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 0, 3), (1, 0, 4)))
    extent, record = 8 * g.record_bytes, g.record_bytes
    assert offsets.tolist() == [extent, extent + 3 * record, 4 * extent]
    assert lengths.tolist() == [2 * record, 2 * record, record]  # groups 3 of head 0 and 0 of head 1 are neighbours


def sample(seconds, size=1000, disk=0, client=0.0, daemon=0.0, reference=None):
    return Sample(np.array(seconds), size, disk, client, daemon, reference)


def test_the_numbers_of_a_case():
    case = Case("burst", "x", "fetch", "fio", [
        sample([1.0, 3.0], size=8_000_000_000, disk=4_000_000_000, client=1.0, daemon=3.0, reference=1.0),
        sample([1.0, 1.0], size=8_000_000_000, disk=8_000_000_000, client=1.0, daemon=1.0, reference=1.6),
    ])  # fmt: skip
    assert case.over(lambda s: s.gb_per_s) == [2.0, 4.0]
    assert case.over(lambda s: s.of_reference) == [0.25, 0.8]
    assert case.latency_s(0.5) == 1.0
    assert case.latency_s(1.0) == 3.0
    assert case.cpu_s_per_gb() == pytest.approx((4 / 8 + 2 / 8) / 2)
    shares = case.shares(memory_gb_per_s=4.0)
    assert shares["disk"] == pytest.approx((0.25 + 0.8) / 2)
    assert shares["memory"] == pytest.approx((0.5 + 1.0) / 2)
    assert shares["daemon"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert json.loads(json.dumps(case.as_dict(4.0)))["latency_us"]["p50"] == 1e6


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ({"disk": 0.9, "memory": 0.1, "daemon": 0.5, "client": 0.4}, "disk"),
        ({"memory": 0.6, "daemon": 0.9, "client": 0.1}, "memory"),
        ({"disk": 0.2, "memory": 0.1, "daemon": 0.4, "client": 0.2}, "one core"),
        ({"disk": 0.2, "memory": 0.1, "daemon": 0.1, "client": 0.1}, "waiting"),
        ({"memory": 0.1, "client": 0.1}, "waiting"),
    ],
)
def test_what_limits(shares, expected):
    assert limit(shares) == expected


def run(*arguments, **keywords):
    command = [sys.executable, "-m", "hga_kvd", "bench", *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=240, **keywords)


def tiny(tmp_path):
    trace = packed(tmp_path / "tiny.npz", synthetic_trace(layers=4, kv_heads=4, steps=24, groups=256, opened=4))
    return ("--trace", trace, "--bank", 8, "--head-dim", 64, "--size", "16MiB", "--reads", "8KiB,32KiB",
            "--depths", "4", "--repeats", 1, "--seconds", 0.02)  # fmt: skip


def test_the_command_end_to_end(disk_path, tmp_path):
    place = disk_path / "place"
    place.mkdir()
    done = run("--nvme", place, *tiny(tmp_path), "--json", tmp_path / "out.json", "--plots", tmp_path / "plots")
    assert done.returncode == 0, done.stderr
    assert "one step, all layers" in done.stdout
    assert list(place.iterdir()) == []
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["transport"] == "lane"
    assert document["landing"] in ("huge pages", "4 KiB pages")
    by_case = {case["case"]: case for case in document["cases"]}
    assert {"one step, all layers", "4 x 32 KiB, disk", "4 x 8 KiB, RAM"} <= set(by_case)
    step = by_case["one step, all layers"]
    assert step["parameters"]["trace"] == "tiny.npz"
    assert step["calls"] == step["parameters"]["steps"] <= 18
    assert step["latency_us"]["p99"] >= step["latency_us"]["p50"] > 0
    assert step["reference"] == "the same reads alone"
    assert len(step["of_reference"]) == 1
    assert by_case["4 x 8 KiB, RAM"]["disk_share"] == [0]
    assert all(case["cpu_s_per_gb"] > 0 for case in document["cases"])
    assert by_case["append and flush"]["gb_per_s"][0] > 0
    assert len(by_case["summaries, sinks, recent chunks"]["parameters"]["resume_s"]) == 1
    assert by_case["summaries, sinks, recent chunks"]["disk_share"][0] > 0.9
    mixed = [case for case in document["cases"] if case["profile"] == "mixed"]
    for alone, *loaded in (mixed[:5], mixed[5:]):
        assert alone["parameters"]["p99_over_alone"] == 1
        assert [case["calls"] for case in loaded] == [alone["calls"]] * 4
    assert {path.name for path in (tmp_path / "plots").iterdir()} >= {"latency.png", "burst_disk.png"}


def test_a_trace_that_asks_for_one_fetch(disk_path, tmp_path):
    """Of which nothing comes from disk, and which is less than one a sample."""
    trace = np.zeros((1, 1, 8, 9), bool)
    trace[:, :, 4, 3] = True
    options = ("--trace", packed(tmp_path / "t.npz", trace), *tiny(tmp_path)[2:], "--nvme", disk_path, "--repeats", 2)
    done = run("decode", "mixed", *options, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    assert [case["calls"] for case in json.loads((tmp_path / "out.json").read_text())["cases"]] == [1] * 12


def test_a_trace_that_asks_for_nothing(monkeypatch, tmp_path, capsys):
    """Said in a line; other profiles are measured."""
    options = Options(trace=np.zeros((2, 1, 8, 8), bool), trace_name="t.npz")
    with pytest.raises(BenchFailed, match=r"decode: a bank of 64 groups .* t\.npz .*; mixed: a bank"):
        measure(None, ["decode", "mixed"], options, tmp_path, None, None)
    one = Case("prefill", "x", "append", "", [sample([1.0])])
    monkeypatch.setitem(PROFILES, "prefill", lambda *_: iter([one]))
    daemon = SimpleNamespace(connect=lambda: SimpleNamespace(transport="", huge_pages=0, disconnect=lambda: None))
    document = measure(daemon, ["decode", "prefill"], options, tmp_path, None, None)
    assert [case["case"] for case in document["cases"]] == ["x"]
    assert "decode: a bank of 64 groups" in capsys.readouterr().out


def test_an_end_from_outside_leaves_nothing(disk_path, tmp_path):
    """SIGTERM in the middle: the daemon has ended and the directory is gone when the command has."""
    place = disk_path / "place"
    place.mkdir()
    command = [sys.executable, "-m", "hga_kvd", "bench", "burst", "--nvme", str(place), *map(str, tiny(tmp_path))]
    running = subprocess.Popen([*command, "--seconds", "20"], stderr=subprocess.DEVNULL)
    deadline, daemons = time.monotonic() + 30, []
    while not daemons and running.poll() is None and time.monotonic() < deadline:
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        daemons = [int(pid) for pid in children if b"--listen" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        time.sleep(0.02)
    assert daemons
    running.send_signal(signal.SIGTERM)
    assert running.wait(30) == 128 + signal.SIGTERM
    assert not Path(f"/proc/{daemons[0]}").exists()
    assert list(place.iterdir()) == []


def test_a_running_daemon_is_measured_and_left_as_it_was(daemon, tmp_path):
    running = daemon()
    done = run("burst", "--target", running.target, *tiny(tmp_path), "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    cases = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert [case["reference"] for case in cases] == ["", "", "a memcpy", "a memcpy"]
    assert all(case["shares"]["daemon"] > 0 for case in cases)
    listed = json.loads(
        subprocess.run(
            [sys.executable, "-m", "hga_kvd", "stat", "--target", running.target, "--json"],
            check=True, capture_output=True, text=True, timeout=60,
        ).stdout
    )  # fmt: skip
    assert listed["session_list"] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nonsense",), "there is no profile 'nonsense'; there are decode"),
        (("--arena", "0%"), "--arena"),
        (("--arena", "much"), "--arena"),
        (("--depths", "1,x"), "--depths"),
        (("--trace", "/nowhere.npz"), "/nowhere.npz"),
        (("--size", "many"), "'many' is not a size"),
        (("--size", "1MiB"), "give at least 16MiB"),
        (("--reads", "3KiB"), "a read of 3072 bytes"),
        (("--depths", "1,99999"), "99999 reads of 32 KiB"),
        (("--json", "/nowhere/out.json"), "/nowhere/out.json: No such file"),
        (("--plots", "/proc/plots"), "/proc/plots: No such file"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments, said):
    done = command("bench", *arguments)
    assert done.exit_code == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_no_daemon_is_one_line_too(tmp_path):
    done = run("burst", "--target", f"unix:{tmp_path}/none.sock")
    assert done.returncode == 1
    assert len([line for line in done.stderr.splitlines() if "hga-kvd:" in line]) == 1


def test_the_bench_needs_no_torch_and_the_daemon_no_client():
    for code in (
        "import hga_kvd.bench.run, sys; sys.exit('torch' in sys.modules)",
        "import hga_kvd.__main__, sys; sys.exit('hga_kvd_client' in sys.modules or 'torch' in sys.modules)",
    ):
        assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
