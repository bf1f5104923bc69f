"""Settings: what is accepted, which source wins, and that every refusal is one line that names the option."""

import re
from pathlib import Path

import pytest
from hga_kvd import config
from hga_kvd.config import GIB, Settings, load, parse_size, parse_target
from hga_kvd.errors import StartRefused
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name in Settings.model_fields:
        monkeypatch.delenv(f"HGA_KVD_{name.upper()}", raising=False)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4KiB", 4096),
        ("1.5g", 3 * GIB // 2),
        ("512MB", 512 * 10**6),
        (" 2 TiB ", 2 << 40),
        (7, 7),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@given(st.one_of(st.text(), st.floats(), st.integers(), st.booleans()))
def test_any_size_is_a_number_or_a_value_error(value):
    try:
        size = parse_size(value)
    except ValueError:
        return
    assert size >= 0


@given(st.integers(0, 2**40), st.sampled_from([("", 1), ("KiB", 1 << 10), ("MB", 10**6), ("GiB", 1 << 30)]))
def test_whole_sizes_are_exact(number, unit):
    assert parse_size(f"{number}{unit[0]}") == number * unit[1]


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("unix:/run/k.sock", "unix:/run/k.sock"),
        ("/run/k.sock", "unix:/run/k.sock"),
        ("unix:///run/k.sock", "unix:/run/k.sock"),
        ("127.0.0.1:50051", "127.0.0.1:50051"),
        ("[::1]:0", "[::1]:0"),
    ],
)
def test_targets(text, target):
    assert parse_target(text) == target


@pytest.mark.parametrize(
    "text",
    ["", "unix:", "unix:/", "/run/", "localhost", ":50051", "host:port", "host:70000", "::1:50051", "/" + "x" * 110],
)
def test_impossible_targets(text):
    with pytest.raises(ValueError):
        parse_target(text)


def test_the_stronger_source_wins(monkeypatch, tmp_path):
    file = tmp_path / "kvd.toml"
    file.write_text('ram = "3MiB"\nnvme_max = "30MiB"\nlog_level = "error"\nlisten = ["/a/b", "localhost:1"]\n')
    monkeypatch.setenv("HGA_KVD_RAM", "2MiB")
    monkeypatch.setenv("HGA_KVD_NVME_MAX", "20MiB")
    settings = load({"ram": "1MiB"}, file)
    assert (settings.ram, settings.nvme_max, settings.log_level) == (1 << 20, 20 << 20, "error")
    assert settings.listen == ("unix:/a/b", "localhost:1")
    assert settings.socket_path == Path("/a/b")
    assert load({}).log_level == "info"


def test_addresses_in_the_environment_are_separated_by_commas(monkeypatch):
    monkeypatch.setenv("HGA_KVD_LISTEN", "/run/k.sock, 127.0.0.1:1,[::1]:2")
    assert load({}).listen == ("unix:/run/k.sock", "127.0.0.1:1", "[::1]:2")


def test_the_default_is_a_socket_in_a_directory_of_the_user(monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert load({}).listen == ("unix:/run/user/7/hga-kvd/kvd.sock",)
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert re.fullmatch(r"unix:/tmp/hga-kvd-\d+/kvd.sock", config.default_listen())


@pytest.mark.parametrize(
    ("given_values", "said"),
    [
        ({"ram": "lots"}, "option --ram: 'lots' is not a size"),
        ({"ram": "9" * 20 + "TiB"}, "option --ram: "),
        ({"nvme_max": "-1"}, "option --nvme-max: '-1' is not a size"),
        ({"io_engine": "fast"}, "option --io-engine: "),
        ({"listen": ("localhost",)}, "option --listen: 'localhost' is not an address"),
        ({"listen": ("/a", "/b")}, "option --listen: there may be only one unix socket"),
        ({"metrics": "9000"}, "option --metrics: '9000' is not an address"),
    ],
)
def test_a_bad_option_is_one_line_that_names_it(given_values, said):
    with pytest.raises(StartRefused) as refused:
        load(given_values)
    assert str(refused.value).startswith(said)
    assert "\n" not in str(refused.value)


def test_a_bad_value_names_its_source(monkeypatch, tmp_path):
    file = tmp_path / "kvd.toml"
    file.write_text("rpc_threads = 0\n")
    with pytest.raises(StartRefused, match=rf"rpc_threads in {file}: .*greater than 0.*\(it is 0\)"):
        load({}, file)
    file.write_text("rpc_treads = 1\n")
    with pytest.raises(StartRefused, match=r"rpc_treads in .*: there is no such setting"):
        load({}, file)
    monkeypatch.setenv("HGA_KVD_RPC_THREADS", "many")
    with pytest.raises(StartRefused, match=r"environment variable HGA_KVD_RPC_THREADS: .*'many'"):
        load({})


@pytest.mark.parametrize("content", [b"ram = ", b"\xff\xfe", b"[ram]\nx = 1\n", b"ram = [1]\n"])
def test_a_bad_file_is_one_line(tmp_path, content):
    file = tmp_path / "kvd.toml"
    file.write_bytes(content)
    with pytest.raises(StartRefused) as refused:
        load({}, file)
    assert str(file) in str(refused.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(StartRefused, match=r"cannot read the settings file .*absent\.toml: No such file"):
        load({}, tmp_path / "absent.toml")


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Settings().ram = 1


def test_the_document_lists_every_setting():
    text = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    listed = set(re.findall(r"^\| `([a-z_]+)` \|", text, re.MULTILINE))
    assert listed == set(Settings.model_fields)
