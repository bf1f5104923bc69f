"""Index: rows are reused only after they were removed, arrays grow without losing anything."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hga_kvd.geometry import Geometry
from hga_kvd.growing import grown
from hga_kvd.index import LOST_ROW, ChunkTable, Session
from hypothesis import given
from hypothesis import strategies as st

GEOMETRY = Geometry(2, 1, 4, "float16", chunk_tokens=8, group_tokens=4)


@given(st.integers(0, 40), st.integers(0, 1000))
def test_grown_keeps_what_there_was(rows: int, wanted: int) -> None:
    array = np.arange(rows * 3, dtype=np.int64).reshape(rows, 3)
    bigger = grown(array, wanted)
    assert len(bigger) >= wanted
    assert (bigger[:rows] == array).all()
    assert not bigger[rows:].any()


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 20)), max_size=60))
def test_rows(steps: list[tuple[bool, int]]) -> None:
    table, held, uid = ChunkTable(GEOMETRY, 8192), {}, 0
    for add, count in steps:
        if add:
            rows = table.add(count)
            assert LOST_ROW not in rows
            assert not set(rows.tolist()) & set(held)
            assert not table.slot[rows].any()
            assert not table.segment[rows].any()
            for row in rows.tolist():
                uid += 1
                table.uid[row], held[row] = uid, uid
                table.slot[row] = uid
        else:
            gone = list(held)[:count]
            table.remove(table.release(np.array([*gone, LOST_ROW], np.int64)))
            for row in gone:
                del held[row]
        assert table.in_use() == len(held)
        assert all(table.uid[row] == known for row, known in held.items())
        assert not table.slot[LOST_ROW].any()


def test_token_ids_are_all_or_nothing() -> None:
    table = ChunkTable(GEOMETRY, 8192)
    session = Session(1, "s", table)
    assert session.token_ids() == b""
    rows = table.add(2)
    session.put_rows(0, rows)
    session.chunk_count = 2
    table.token_ids[rows] = np.arange(16).reshape(2, 8)
    table.tokens_known[rows[0]] = True
    assert session.token_ids() == b""
    table.tokens_known[rows[1]] = True
    assert session.token_ids() == np.arange(16, dtype="<u4").tobytes()
    session.put_rows(2, np.array([LOST_ROW]))
    session.chunk_count = 3
    assert session.token_ids() == b""


@pytest.mark.parametrize("count", [1000, 1300])
def test_an_extent_takes_less_than_200_bytes(count: int) -> None:
    """Qwen3-30B: 48 layers, 4 KV heads; all-in: record checksums, chain ids, two summaries a chunk, the session."""
    geometry = Geometry(48, 4, 128, "bfloat16")
    tracemalloc.start()
    table = ChunkTable(geometry, geometry.chunk_bytes)
    session = Session(1, "s", table)
    for first in range(0, count, 2):  # as appends make them
        rows = table.add(2)
        session.put_rows(first, rows)
        for row in rows.tolist():
            table.set_chain(row, row.to_bytes(32, "little"))
        for kind in ("hga.v1", "sketch.v1:00000000"):
            table.summaries.add(rows, kind, 1 << 18)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken / (count * geometry.layers) < 200


def test_rows_are_shared_and_die_with_their_last_reference() -> None:
    table = ChunkTable(GEOMETRY, 8192)
    rows = table.add(3)
    table.hold(rows[:2])
    assert table.release(rows).tolist() == [rows[2]]
    assert table.release(np.array([LOST_ROW, rows[0], LOST_ROW])).tolist() == [rows[0]]
    assert table.release(rows[1:2]).tolist() == [rows[1]]
    assert table.refs[LOST_ROW] == 0


@given(st.lists(st.tuples(st.sampled_from("sr"), st.integers(0, 9), st.integers(0, 3)), max_size=60))
def test_chains_answer_with_a_row_that_has_them(steps: list[tuple[str, int, int]]) -> None:
    table, held = ChunkTable(GEOMETRY, 8192), dict[int, int]()
    rows = table.add(10).tolist()
    for what, i, number in steps:
        if what == "s" and rows[i] not in held:
            table.set_chain(rows[i], bytes([number]) * 32)
            held[rows[i]] = number
        elif what == "r":
            table.forget_chains(np.array([rows[i]]))
            held.pop(rows[i], None)
        for wanted in range(4):
            found = table.find_chain(bytes([wanted]) * 32)
            having = [row for row, other in held.items() if other == wanted]
            assert found in having if having else found == LOST_ROW


def test_places_are_whole_blocks_of_what_is_on_disk() -> None:
    table = ChunkTable(GEOMETRY, 8192)
    rows = table.add(2)
    table.segment[rows[0]], table.offset[rows[0]] = 3, 4096
    summaries = table.summaries
    summaries.put(rows, "k", b"a" * 10000)
    at = summaries.find(rows, "k")
    assert summaries.saved(int(at[1]), summaries.in_ram[int(at[1])], 4, 12288, 99)
    places = table.places(rows)
    assert places.segment.tolist() == [3, 4]
    assert places.offset.tolist() == [4096, 12288]
    assert places.bytes.tolist() == [8192, 8192]
