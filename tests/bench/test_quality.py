"""What bench/quality.py makes of texts and losses, without a model: texts that drift, what is left to run, the table."""

import json

import numpy as np
import pytest
import quality
import texts
import typer
from hga_kvd_client.options import Rope
from hypothesis import given
from hypothesis import strategies as st
from rows import Spec, row_of, sketch


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
    (row,) = quality.summary(specs, lines, 64, 4096)
    assert (row["row"], row["texts"], row["fetched"]) == ("window only", 2, 0.2)
    assert row["gap_nats"] == pytest.approx(0.3)
    assert row["gap_standard_error"] == pytest.approx(0.1)


DTYPES = ("uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64", "bool", ">i4")


@given(
    shapes=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 400)), min_size=1, max_size=3),
    one=st.booleans(), dtype=st.sampled_from(DTYPES), length=st.integers(0, 500), count=st.integers(0, 4),
)  # fmt: skip
def test_documents_of_any_shape_and_type_are_taken_or_refused_in_a_sentence(
    tmp_path_factory, shapes, one, dtype, length, count
):
    arrays = {f"a{i}": np.ones(shape[-1:] if one else shape, dtype) for i, shape in enumerate(shapes)}
    path = tmp_path_factory.mktemp("texts") / "t.npz"
    np.savez(path, **arrays)
    wanted = [(len(np.atleast_2d(a)), a.shape[-1]) for a in arrays.values() if a.size]
    try:
        found = texts.documents(path, count, length)
    except texts.Refused:
        used = [tokens for rows, tokens in wanted if rows][: count or None]
        assert not used or min(*used, length or 500) < 128
        return
    rows = sum(rows for rows, _ in wanted)
    assert len(found) == min(rows, count or rows)
    kept = {len(tokens) for _, tokens in found}
    assert len(kept) == 1
    assert kept.pop() % 128 == 0
    assert all(tokens.dtype == np.int64 and (tokens == 1).all() for _, tokens in found)


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.full((1, 200), -1), "no padding"),
        (np.full((1, 200), 49152), "from 0 to 49151"),
        (np.full((1, 200), 0.5), "not whole"),
        (np.full((1, 200), np.nan), "not whole"),
        (np.zeros((1, 2, 200), np.int64), "documents, tokens"),
        (np.array(["a" * 200]), "documents, tokens"),
        (np.array([[1] * 200, [1]], dtype=object), "arrays of their own"),
        (np.zeros((0, 200)), "has no tokens"),
        (np.zeros((1, 127)), "at least 128"),
    ],
)
def test_what_is_no_text_is_refused_in_a_sentence(tmp_path, array, sentence):
    path = tmp_path / "t.npz"
    np.savez(path, a=array)
    with pytest.raises(texts.Refused, match=sentence):
        texts.documents(path, vocabulary=49152)


def test_files_budgets_and_drifts_that_cannot_be(tmp_path):
    for name, content in (("a.npz", b"PK no"), ("b.npz", b""), ("c.npz", b"text")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(texts.Refused, match="as numpy"):
            texts.documents(tmp_path / name)
    np.save(tmp_path / "d.npy", np.ones((2, 200), np.int64))
    with pytest.raises(texts.Refused, match="one array"):
        texts.documents(tmp_path / "d.npy")
    for budgets in ("", "8,", "0", "x", "-4", "1.5"):
        with pytest.raises(typer.BadParameter, match="whole numbers"):
            quality.budgets_of(budgets)
    assert quality.budgets_of("8, 16,8") == (8, 16)
    for how, needed in (("start", 2), ("turns", 3), ("long", 3)):
        assert texts.drifting(some(needed), how)
        with pytest.raises(texts.Refused, match=f"joins {needed}"):
            texts.drifting(some(needed - 1), how)
    with pytest.raises(texts.Refused, match="one of"):
        texts.drifting(some(3), "sideways")


def test_a_basis_is_made_of_prompt_tokens_only():
    """Of fewer than 512 a session makes none: keys are plain, and the state is as large as theirs."""
    rope = Rope((1.0,) * 32, 64)
    states = [row_of(sketch(16, 16, 8), 64, rope, prompt).state for prompt in (4096, 512, 448)]
    assert states[0] == states[1] == pytest.approx(0.0527, abs=1e-4)
    assert states[2] == row_of(Spec("plain", (8,)), 64, rope, 448).state
    assert row_of(sketch(16, 16, 8, basis=256), 64, rope, 4096).state == states[0]
