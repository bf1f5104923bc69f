"""What bench/quality.py makes of texts and losses, without a model: texts that drift, what is left to run, the table."""

import json

import numpy as np
import pytest
import quality
import texts
from rows import Spec, sketch


def some(count, length=64):
    return [(f"d{i}", np.arange(length) + 1000 * i) for i in range(count)]


def test_drifting_texts_begin_with_another_document(monkeypatch):
    monkeypatch.setattr(texts, "TURN_TOKENS", 8)
    start = texts.drifting(some(3), "start")
    assert [name for name, _ in start] == ["d0, then d1", "d1, then d2", "d2, then d0"]
    assert start[2][1].tolist() == [*range(2000, 2016), *range(16, 64)]
    turns = texts.drifting(some(3), "turns")[0][1].tolist()
    assert turns[:16] == list(range(16))
    assert turns[16:40] == [*range(1016, 1024), *range(2024, 2032), *range(1032, 1040)]
    long = texts.drifting(some(6), "long")
    assert [(name, len(tokens)) for name, tokens in long] == [("d0, d1, d2", 192), ("d3, d4, d5", 192)]


def line(spec, text, loss, opened=1):
    return {
        "row": spec.label(),
        "text": text,
        "loss": loss,
        "loss_dense": 1.0,
        "opened": opened,
        "routable": 10,
        "seconds": 1,
    }


def test_what_was_run_is_not_run_again(tmp_path):
    specs = [Spec("window"), sketch(16, 16, 8)]
    study = quality.Study("table", specs, some(2), tmp_path / "table.jsonl")
    study.begin({"tokens": "f"})
    assert [(text[0], found) for text, found in study.lacking()] == [("d0", specs), ("d1", specs)]
    with study.path.open("a") as file:
        for spec, text in ((specs[0], "d0"), (specs[1], "d0"), (specs[1], "d1")):
            file.write(json.dumps(line(spec, text, 1.5)) + "\n")
    assert [(text[0], found) for text, found in study.lacking()] == [("d1", specs[:1])]
    study.begin({"tokens": "f"})
    assert len(study.read()[1]) == 3
    with pytest.raises(SystemExit, match="another --lines"):
        study.begin({"tokens": "another file"})


def test_rows_of_fewer_texts_are_left_out_of_the_table():
    specs = [Spec("window"), sketch(16, 16, 8), Spec("oracle", (8,))]
    lines = [line(specs[0], "d0", 1.2), line(specs[0], "d1", 1.4, 3), line(specs[1], "d0", 1.0)]
    (row,) = quality.summary(specs, lines, 64)
    assert (row["row"], row["texts"], row["fetched"]) == ("window only", 2, 0.2)
    assert row["gap_nats"] == pytest.approx(0.3)
    assert row["gap_standard_error"] == pytest.approx(0.1)
