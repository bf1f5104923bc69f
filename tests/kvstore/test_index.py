"""Index: rows are reused only after they were removed, arrays grow without losing anything."""

from __future__ import annotations

import numpy as np
from hga_kvd.geometry import Geometry
from hga_kvd.index import LOST_ROW, ChunkTable, Session, Summaries, grown
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
    table, held, uid = ChunkTable(GEOMETRY), {}, 0
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
            table.remove(np.array([*gone, LOST_ROW], np.int64))
            for row in gone:
                del held[row]
        assert table.in_use() == len(held)
        assert all(table.uid[row] == known for row, known in held.items())
        assert not table.slot[LOST_ROW].any()


def test_token_ids_are_all_or_nothing() -> None:
    table = ChunkTable(GEOMETRY)
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


def test_summaries_in_ram() -> None:
    summaries = Summaries(4)
    assert summaries.first_missing(0, 1) == 0
    assert summaries.put(1, b"aaaabbbb") == 8
    assert summaries.put(2, b"cccc") == 0
    assert summaries.first_missing(1, 2) is None
    assert summaries.first_missing(0, 3) == 0
    result = np.zeros(8, np.uint8)
    assert len(summaries.copy_from_ram(1, result)) == 0
    assert result.tobytes() == b"aaaacccc"


def test_an_extent_takes_less_than_200_bytes() -> None:
    """Qwen3-30B: 48 layers, 4 KV heads; record checksums included."""
    geometry = Geometry(48, 4, 128, "bfloat16")
    table = ChunkTable(geometry)
    table.add(1023)
    arrays = (table.uid, table.segment, table.offset, table.checksums, table.slot, table.tokens_known, table.token_ids)
    assert sum(a.nbytes for a in arrays) / (1024 * 48) < 150
