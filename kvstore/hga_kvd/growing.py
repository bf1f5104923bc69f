"""Arrays that grow as rows are added. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Scalar = TypeVar("Scalar", bound=np.generic)


def grown(array: npt.NDArray[Scalar], length: int) -> npt.NDArray[Scalar]:
    """`array` with at least `length` rows, doubled as often as needed, new ones zero."""
    if length <= len(array):
        return array
    rows = max(8, len(array))
    while rows < length:
        rows *= 2
    bigger = np.zeros((rows, *array.shape[1:]), array.dtype)
    bigger[: len(array)] = array
    return bigger


def grow(table: object, names: Iterable[str], length: int) -> None:
    """Gives these arrays of `table` at least `length` rows."""
    for name in names:
        setattr(table, name, grown(getattr(table, name), length))
