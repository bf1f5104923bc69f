"""Summaries: each chunk's are its own, whatever kinds there are; rows are used again only after their chunk is gone."""

from __future__ import annotations

import numpy as np
from hga_kvd.summaries import NO_SEGMENT, SummaryTable
from hypothesis import given
from hypothesis import strategies as st


def test_newest_bytes_count() -> None:
    table, chunks = SummaryTable(), np.array([5, 2])
    table.put(chunks, "k", b"aaaabbbb")
    assert (table.ram_bytes, table.has_unsaved(np.array([2, 3, 5, 900])).tolist()) == (8, [True, False, True, False])
    row = int(table.find(chunks, "k")[0])
    old = table.in_ram[row]
    table.put(chunks[:1], "k", b"cccc")
    assert table.ram_bytes == 8
    assert not table.saved(row, old, 1, 4096, 7)  # it was put again while the old bytes were written
    assert table.saved(row, table.in_ram[row], 1, 8192, 7)
    assert (table.ram_bytes, table.unsaved_rows(chunks)) == (4, table.find(chunks[1:], "k").tolist())
    assert (table.segment[row], table.offset[row], table.checksum[row]) == (1, 8192, 7)


@given(
    st.lists(
        st.tuples(st.sampled_from(["put", "remove"]), st.integers(1, 12), st.sampled_from(["a", "b", "c"])), max_size=60
    )
)
def test_against_a_dictionary(steps: list[tuple[str, int, str]]) -> None:
    table, held = SummaryTable(), dict[tuple[int, str], bytes]()
    for i, (what, chunk, kind) in enumerate(steps):
        if what == "put":
            held[chunk, kind] = i.to_bytes(4, "little")
            table.put(np.array([chunk]), kind, held[chunk, kind])
        else:
            table.remove(np.array([chunk]))
            held = {key: value for key, value in held.items() if key[0] != chunk}
        assert table.ram_bytes == 4 * len(held)
        for chunk_row in range(14):
            mine = [key for key in held if key[0] == chunk_row]
            assert table.kind_count(np.array([chunk_row])) == len(mine)
            assert len(table.unsaved_rows(np.array([chunk_row]))) == len(mine)
            for other in "abc":
                row = int(table.find(np.array([chunk_row]), other)[0])
                assert table.in_ram.get(row) == held.get((chunk_row, other))
                assert not row or (table.kind_of(row), table.segment[row]) == (other, NO_SEGMENT)
