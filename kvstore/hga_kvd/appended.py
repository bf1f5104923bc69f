"""An append on its way: the new chunks, and what the call holds until the session has it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hga_kvd.index import LOST_ROW
from hga_kvd.residency import Pool

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]


@dataclass(eq=False)
class Appended:
    """payload: u8 [chunks, chunk_bytes]. Where `same` is set the chunk is stored already, in `rows`, which the call holds.

    slots, uids, checksums: of the other chunks, in their order.
    """

    pool: Pool
    payload: npt.NDArray[np.uint8]
    token_ids: bytes
    ids: list[bytes] = field(default_factory=list)  # chain ids; none when the tokens are not known from the start on
    rows: I64 = field(init=False)
    same: npt.NDArray[np.bool_] = field(init=False)
    slots: I64 = field(default_factory=lambda: np.zeros(0, np.int64))
    uids: U64 = field(default_factory=lambda: np.zeros(0, np.uint64))
    checksums: U64 = field(default_factory=lambda: np.zeros(0, np.uint64))

    def __post_init__(self) -> None:
        self.rows = np.full(len(self.payload), LOST_ROW, np.int64)
        self.same = np.zeros(len(self.payload), bool)
