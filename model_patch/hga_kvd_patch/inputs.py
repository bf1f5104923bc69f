"""What one call of the decoder is given, and what it gives back. Pure: tensors in, tensors out; no cache, no session.

Columns are places in the batch's rectangle; tokens are the columns of a sequence that are not padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hga_kvd_patch.errors import CallRefused
from hga_kvd_patch.naming import CACHE

# Outputs of a decoder that a block gives for its own columns: [batch, columns, ...], or tuples of that.
_PER_COLUMN = ("last_hidden_state", "hidden_states")


@dataclass(frozen=True)
class Input:
    """One call: ids [batch, columns] or embeds [batch, columns, dim].

    starts: the first column of each sequence that is a token and not padding, or the number of columns. before: tokens of
    each that the mask shows in the columns before; None: all that there are.
    """

    ids: Tensor | None
    embeds: Tensor | None
    starts: tuple[int, ...]
    before: tuple[int, ...] | None = None

    @property
    def columns(self) -> int:
        given = self.embeds if self.ids is None else self.ids
        assert given is not None
        return given.shape[1]

    def row_ids(self, row: int) -> npt.NDArray[np.uint32] | None:
        """Ids of the tokens of one sequence, padding left out."""
        return None if self.ids is None else self.ids[row, self.starts[row] :].cpu().numpy().astype(np.uint32)

    def pick(self, rows: Sequence[int]) -> Input:
        """The same for these sequences."""
        chosen = list(rows)
        return Input(
            None if self.ids is None else self.ids[chosen],
            None if self.embeds is None else self.embeds[chosen],
            tuple(self.starts[row] for row in chosen),
            None if self.before is None else tuple(self.before[row] for row in chosen),
        )


def same_rows(given: Input) -> tuple[list[int], list[int]] | None:
    """Neighbouring sequences that are the same, as beams are at first: the rows to compute, and for each row which of
    those it is. None if all differ."""
    if given.ids is None or len(given.starts) == 1:
        return None
    starts = torch.tensor(given.starts, device=given.ids.device)[:, None]
    _, which = torch.unique_consecutive(torch.cat((starts, given.ids), 1), dim=0, return_inverse=True)
    inverse = which.tolist()
    first = [row for row, one in enumerate(inverse) if row == 0 or one != inverse[row - 1]]
    return (first, inverse) if len(first) < len(inverse) else None


def read_input(arguments: dict[str, Any], columns_before: int) -> Input:
    """Takes ids, embeds and mask out of the arguments. Raises: CallRefused for right padding or a 4-D mask."""
    ids, embeds = arguments.pop("input_ids", None), arguments.pop("inputs_embeds", None)
    if (ids is None) == (embeds is None):
        raise CallRefused("give exactly one of input_ids and inputs_embeds")
    batch, columns = (embeds if ids is None else ids).shape[:2]
    mask = arguments.pop("attention_mask", None)
    arguments.pop("cache_position", None)  # what older versions pass: columns, and those are counted here
    if mask is None:
        return Input(ids, embeds, (0,) * batch)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise CallRefused("only 2-D attention masks are supported: 1 for tokens, 0 for padding on the left")
    if mask.shape != (batch, columns_before + columns):
        raise CallRefused(
            f"attention_mask is {tuple(mask.shape)}; it must cover everything in the cache and the new tokens, "
            f"{(batch, columns_before + columns)}"
        )
    shown = mask.bool().cpu()
    before, new = shown[:, :columns_before], shown[:, columns_before:]
    if not bool(new[:, -1].all()) or any(bool((part[:, 1:] < part[:, :-1]).any()) for part in (before, new)):
        raise CallRefused("attention_mask has padding after tokens: pad on the left (tokenizer.padding_side = 'left')")
    return Input(ids, embeds, tuple((columns - new.sum(1)).tolist()), tuple(before.sum(1).tolist()))


def positions(given: Input, tokens_before: list[int], position_ids: Any, device: torch.device) -> Tensor:
    """Positions of all columns, [batch, columns]: each sequence counts its tokens from 0. Raises: CallRefused if the
    caller says otherwise, because keys in a session must be one unbroken run, all of which is seen."""
    if given.before is not None and list(given.before) != tokens_before:
        raise CallRefused(
            f"attention_mask shows {list(given.before)} tokens in the cache, which holds {tokens_before}: what was given "
            "once cannot be hidden later; crop the cache, or begin a new one"
        )
    if any(start and before for start, before in zip(given.starts, tokens_before, strict=True)):
        raise CallRefused("attention_mask has padding between tokens; only padding before the first token is supported")
    starts = torch.tensor(given.starts, device=device)[:, None]
    offset = torch.arange(given.columns, device=device)[None] - starts
    expected = (offset + torch.tensor(tokens_before, device=device)[:, None]).clamp(min=0)
    if position_ids is None:
        return expected
    if position_ids.ndim != 2 or bool(((position_ids.to(device) != expected) & (offset >= 0)).any()):
        raise CallRefused("position_ids must count the tokens of each sequence from 0 without gaps: leave them out")
    return expected


def blocks(columns: int, size: int) -> Iterator[tuple[int, int]]:
    """(first, end) of runs of `size` columns; never a single one at the end, unless size is 1 or there is only one: a
    token that comes alone is a decode step."""
    first = 0
    while first < columns:
        end = columns if size > 1 and columns - first <= size + 1 else first + size
        yield first, end
        first = end


def merge(outputs: list[Any], skipped: int, known: Sequence[int]) -> Any:
    """One output of all blocks, which begin after `skipped` columns.

    known: for each sequence the end of the columns whose K/V were in its session already: those are NaN.
    """
    merged = outputs[0]
    for name in list(merged):
        parts = [output[name] for output in outputs]
        if name in _PER_COLUMN and isinstance(parts[0], tuple):
            merged[name] = tuple(_join(list(layer), skipped, known) for layer in zip(*parts, strict=True))
        elif name in _PER_COLUMN:
            merged[name] = _join(parts, skipped, known)
        elif name != CACHE and (len(outputs) > 1 or skipped):
            raise CallRefused(f"{name} cannot be joined from blocks of tokens: leave out output_{name}")
    return merged


def pick_rows(output: Any, rows: Sequence[int]) -> None:
    """Makes sequence i of an output what sequence rows[i] is. Raises: CallRefused for an output it does not know."""
    chosen = list(rows)
    for name, value in list(output.items()):
        if name in _PER_COLUMN and isinstance(value, tuple):
            output[name] = tuple(layer[chosen] for layer in value)
        elif name in _PER_COLUMN:
            output[name] = value[chosen]
        elif name != CACHE:
            raise CallRefused(f"{name} cannot be given for sequences computed together: leave out output_{name}")


def _join(parts: list[Tensor], skipped: int, known: Sequence[int]) -> Tensor:
    """parts: [batch, columns, ...]."""
    if skipped:
        batch, _, *rest = parts[0].shape
        parts = [parts[0].new_empty((batch, skipped, *rest)), *parts]
    joined = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
    for row, end in enumerate(known):
        joined[row, :end] = float("nan")
    return joined
