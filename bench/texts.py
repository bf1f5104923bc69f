"""Texts for bench/quality.py: documents of token ids, as they are or joined so that the text drifts. Pure.

A text is (name, tokens [tokens] int64). All texts of one list have one length.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

Text = tuple[str, npt.NDArray[np.int64]]
DRIFTS = ("start", "turns", "long")
# Tokens of one turn of a chat.
TURN_TOKENS = 512
# Two chunks: half of a text is whole chunks. And a text whose last tokens have more behind them than sinks and window.
TOKENS_MIN = 128
ROUTED_TOKENS = 768


class Refused(Exception):
    """Texts that no loss can be measured of, with a sentence."""


def documents(path: Path, count: int = 0, length: int = 0, vocabulary: int = 0) -> list[Text]:
    """The first `count` documents of a file of arrays [documents, tokens], the arrays in turns; 0: all. Each cut to
    `length`; 0: to the shortest; and to whole pairs of chunks, half of which is the prompt.

    A document alone may be [tokens]; numbers may have any type. vocabulary: ids are below it; 0: not checked.
    Raises: Refused.
    """
    arrays = {name: _ids(name, array, vocabulary) for name, array in _arrays(path).items()}
    most = max(map(len, arrays.values()))
    found = [(f"{name} {i}", array[i]) for i in range(most) for name, array in arrays.items() if i < len(array)]
    found = found[: count or None]
    shortest = min(len(tokens) for _, tokens in found)
    kept = min(shortest, length or shortest) // TOKENS_MIN * TOKENS_MIN
    if not kept:
        raise Refused(
            f"{path}: documents of {min(shortest, length or shortest)} tokens; at least {TOKENS_MIN} are needed, and from "
            f"{ROUTED_TOKENS} on anything is routed"
        )
    return [(name, tokens[:kept]) for name, tokens in found]


def _arrays(path: Path) -> dict[str, npt.NDArray[np.generic]]:
    try:
        found = np.load(path)
        if isinstance(found, np.ndarray):
            raise Refused(f"{path} is one array; save it by numpy.savez(path, name=array)")
        with found as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise Refused(
            f"{path} is not a file of arrays as numpy.savez writes it (rows of different lengths go into arrays of their "
            f"own): {error}"
        ) from error
    if not any(array.size for array in arrays.values()):
        raise Refused(f"{path} has no tokens")
    return {name: array for name, array in arrays.items() if array.size}


def _ids(name: str, array: npt.NDArray[np.generic], vocabulary: int) -> npt.NDArray[np.int64]:
    """[documents, tokens], whole numbers."""
    if array.ndim not in (1, 2) or array.dtype.kind not in "iufb":
        raise Refused(f"{name!r} is {array.dtype} {list(array.shape)}; token ids are numbers, [documents, tokens]")
    ids = np.atleast_2d(array)
    if ids.dtype.kind == "f" and not np.array_equal(ids, np.trunc(ids)):
        raise Refused(f"{name!r} has numbers that are not whole: these are no token ids")
    low, high = ids.min(), ids.max()
    if low < 0 or (vocabulary and high >= vocabulary):
        raise Refused(f"{name!r} has ids from {low} to {high}; the model's go from 0 to {vocabulary - 1} (no padding)")
    return ids.astype(np.int64)


def drifting(texts: list[Text], how: str) -> list[Text]:
    """Texts whose first quarter, of which a basis is made, is of another kind than what comes then.

    start: a document behind another's first quarter. turns: after that quarter, turns of 512 tokens of two other
    documents. long: three documents, one after the other.
    """
    if how not in DRIFTS:
        raise Refused(f"--drift {how}: it must be one of {', '.join(DRIFTS)}")
    needed = 2 if how == "start" else 3
    if len(texts) < needed:
        raise Refused(f"--drift {how} joins {needed} documents; there are {len(texts)}")
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
