"""The tables in the READMEs are what `make tables` makes of the committed results, and the generator says what they hold."""

import json

import pytest
import results
import tables


def test_the_committed_tables_are_the_generated_ones():
    for name in tables.FILES:
        text = (results.ROOT / name).read_text()
        assert tables.filled(text, results.ROOT) == text, f"{name}: run `make tables`"
        assert {found[1] for found in tables.MARK.findall(text)} <= set(tables.TABLES)


def test_every_table_is_shown_somewhere():
    shown = {found[1] for name in tables.FILES for found in tables.MARK.findall((results.ROOT / name).read_text())}
    assert shown == set(tables.TABLES)


def line(run, peer, cold, hot):
    config = {"peer": peer, "run": run, "record_bytes": 32768, "batch": 128}
    numbers = {"hot_gbs": hot, **({"cold_gbs": cold} if cold else {})}
    machine = {"cpu": "C", "cores": 2, "memory_gib": 4, "disk": "D", "kernel": "6.1-x", "python": "3"}
    return {"date": f"{run}T00", "commit": "abc", "machine": machine, "config": config, "numbers": numbers}


def test_the_newest_run_is_shown_fastest_first(tmp_path):
    place = tmp_path / "bench" / "results"
    place.mkdir(parents=True)
    made = [line("2026-01-01", "old", [9.0], [9.0]), line("2026-01-02", "slow", [0.1, 0.2, 0.9], [1.0]),
            line("2026-01-02", "ram", None, [3.0]), line("2026-01-02", "fast", [1.0, 2.0, 3.0], [4.0])]  # fmt: skip
    (place / "peers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in made))
    text = "before\n<!-- table peers -->\nold\n<!-- end -->\nafter\n"
    filled = tables.filled(text, tmp_path)
    rows = [row for row in filled.splitlines() if row.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| fast", "| slow", "| ram"]
    assert rows[3] == "| slow | 0.20 (0.10 to 0.90) | 1.00 (1.00 to 1.00) |"
    assert rows[4].startswith("| ram | - |")
    assert "2026-01-02, commit abc, C, 2 cores" in filled
    assert filled.startswith("before\n")
    assert filled.endswith("<!-- end -->\nafter\n")
    assert tables.filled(filled, tmp_path) == filled


def test_an_unknown_table_is_an_error(tmp_path):
    with pytest.raises(KeyError):
        tables.filled("<!-- table nonsense -->\n<!-- end -->", tmp_path)


def test_check_names_the_file(tmp_path, capsys):
    (tmp_path / "bench").mkdir()
    (tmp_path / "README.md").write_text("<!-- table storage -->\nstale\n<!-- end -->\n")
    (tmp_path / "bench" / "README.md").write_text("nothing\n")
    assert tables.main(check=True, root=tmp_path) == 1
    assert "README.md: is not what" in capsys.readouterr().out
    assert tables.main(check=False, root=tmp_path) == 0
    assert tables.main(check=True, root=tmp_path) == 0
