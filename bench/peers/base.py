"""What every peer does. A peer is one store of numbered records of one size, for one state of the machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.int64]
State = Literal["cold", "hot"]
OUT_PAGES = "transparent huge pages"  # of the memory that peers read into


@dataclass(frozen=True)
class Shape:
    """record_bytes: a multiple of 4096. batch: records of one read call."""

    records: int
    record_bytes: int
    batch: int


class Peer:
    """cold: records come from the disk, either directly, or through a page cache that the runner empties before each
    read. hot: they come from memory, the page cache or the peer's own. states: those that the peer can be in."""

    states: ClassVar[tuple[State, ...]] = ("cold", "hot")
    direct: ClassVar[bool] = False  # cold reads go past the page cache by themselves

    def __init__(self, place: Path, shape: Shape, state: State) -> None:
        self.place = place
        self.shape = shape
        self.state = state

    def facts(self) -> dict[str, str]:
        """What a line of the results says of it, beside its name: where its records come to lie. `out` of `read` is what
        the runner says it is."""
        return {"pages": OUT_PAGES}

    @classmethod
    def check(cls) -> None:
        """Raises: ImportError if something beside the package is not there."""

    def put(self, first: int, records: Bytes) -> None:
        """Stores records [n, record_bytes] under the numbers from `first` on."""
        raise NotImplementedError

    def finish(self) -> None:
        """All records are put: brings them to the disk, and opens what reads need."""

    def read(self, numbers: Numbers, out: Bytes) -> Bytes:
        """The records, [numbers, record_bytes], one after another in memory: in `out` (4096-aligned), or where the peer
        put them itself."""
        raise NotImplementedError

    def forget(self) -> None:
        """Cold only, before the page cache is emptied: nothing of the records stays mapped or cached in this process."""

    def close(self) -> None:
        raise NotImplementedError
