"""Arrays that grow as rows are added. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Scalar = TypeVar("Scalar", bound=np.generic)


def grown(array: npt.NDArray[Scalar], length: int) -> npt.NDArray[Scalar]:
    """`array` with at least `length` rows, new ones zero; its columns stay together in memory if they are.

    A quarter more each time: the index may have at most 200 bytes an extent, what is kept free included.
    """
    if length <= len(array):
        return array
    shape = max(8, length, len(array) * 5 // 4), *array.shape[1:]
    bigger = np.zeros(shape, array.dtype, order="C" if array.flags.c_contiguous else "F")
    bigger[: len(array)] = array
    return bigger


def grow(table: object, names: Iterable[str], length: int) -> None:
    """Gives these arrays of `table` at least `length` rows."""
    for name in names:
        setattr(table, name, grown(getattr(table, name), length))
