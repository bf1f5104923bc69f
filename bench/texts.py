"""Texts for bench/quality.py: documents of token ids, as they are or joined so that the text drifts. Pure.

A text is (name, tokens [tokens] int64). All texts of one list have one length.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

Text = tuple[str, npt.NDArray[np.int64]]
DRIFTS = ("start", "turns", "long")
# Tokens of one turn of a chat.
TURN_TOKENS = 512


def documents(path: Path, count: int = 0, length: int = 0) -> list[Text]:
    """The first `count` documents of a file of arrays [documents, tokens], the arrays in turns; 0: all. Each cut to
    `length`; 0: whole."""
    with np.load(path) as file:
        arrays = {name: file[name].astype(np.int64) for name in file.files}
    most = max(map(len, arrays.values()))
    found = [(f"{name} {i}", array[i]) for i in range(most) for name, array in arrays.items() if i < len(array)]
    return [(name, tokens[: length or None]) for name, tokens in found][: count or None]


def drifting(texts: list[Text], how: str) -> list[Text]:
    """Texts whose first quarter, of which a basis is made, is of another kind than what comes then.

    start: a document behind another's first quarter. turns: after that quarter, turns of 512 tokens of two other
    documents. long: three documents, one after the other.
    """
    assert how in DRIFTS
    made = []
    for i, (name, first) in enumerate(texts):
        (second_name, second), (third_name, third) = (texts[(i + n) % len(texts)] for n in (1, 2))
        quarter = len(first) // 4
        if how == "start":
            made.append((f"{name}, then {second_name}", np.concatenate((first[:quarter], second[quarter:]))))
        elif how == "turns":
            turns = [
                (second, third)[turn % 2][start : start + TURN_TOKENS]
                for turn, start in enumerate(range(quarter, len(first), TURN_TOKENS))
            ]
            joined = np.concatenate((first[:quarter], *turns))
            made.append((f"{name}, then turns of {second_name} and {third_name}", joined))
        elif i % 3 == 0:
            made.append((f"{name}, {second_name}, {third_name}", np.concatenate((first, second, third))))
    return made
