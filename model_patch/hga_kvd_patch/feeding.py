"""Blocks of columns on their way through the decoder, and what is computed again because its K/V were damaged or lost."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hga_kvd_client.errors import KvdError, RecordsDamaged, SessionLost
from torch import Tensor

from hga_kvd_patch.attention import STEP
from hga_kvd_patch.cache import Block, HgaCache
from hga_kvd_patch.inputs import Input, blocks
from hga_kvd_patch.naming import CACHE

logger = logging.getLogger("hga_kvd_patch")

# Places of damage that one block gets over before the error is the caller's.
_RECOMPUTES_MAX = 16


@dataclass(frozen=True)
class Feeding:
    """forward: the decoder's own. block_columns: longest block that is computed again at once."""

    forward: Callable[..., Any]
    device: torch.device
    chunk_tokens: int
    block_columns: int

    def block(
        self,
        cache: HgaCache,
        given: Input,
        starts: list[int],
        places: Tensor,
        span: tuple[int, int],
        arguments: dict[str, Any],
    ) -> Any:
        """starts: for each sequence its first token in the block; span: first and end of the columns of the block."""
        first, end = span
        own: dict[str, Any] = arguments | {"position_ids": places[:, first:end]}
        if given.ids is not None:
            own["input_ids"] = given.ids[:, first:end]
        else:
            assert given.embeds is not None
            own["inputs_embeds"] = given.embeds[:, first:end]
        tokens = [session.tokens for session in cache.sessions]
        for _ in range(_RECOMPUTES_MAX):
            if given.ids is not None:
                for row, (session, start) in enumerate(zip(cache.sessions, starts, strict=True)):
                    if start < end - first:
                        session.note_tokens(given.ids[row, first + start : end])
            block = None
            try:
                with cache.block(starts, end - first) as block:
                    return self._call(cache, block, own)
            except (RecordsDamaged, SessionLost) as error:
                if block is None or block.failed is None:
                    raise
                self._compute_again(cache, block.failed, tokens[block.failed], error)
        raise KvdError(f"stored K/V was damaged {_RECOMPUTES_MAX} times during one call: look at the daemon's device")

    def _call(self, cache: HgaCache, block: Block, arguments: dict[str, Any]) -> Any:
        """The decoder's own forward, for one block."""
        own = {
            "attention_mask": None,  # causality and padding are the block's
            CACHE: cache,
            "use_cache": True,
            "return_dict": True,
        }
        return self.forward(**(arguments | own), **{STEP: block})

    def _compute_again(self, cache: HgaCache, row: int, tokens: int, error: RecordsDamaged | SessionLost) -> None:
        """Cuts a sequence's session back to before what is damaged or lost, and feeds its tokens again, up to `tokens`.

        Raises: the error itself if the ids are not known, or if it cannot be got over.
        """
        session = cache.sessions[row]
        ids = session.known_ids()
        if ids is None:
            raise error
        logger.warning("K/V of tokens from %d on is computed again: %s", _first(error), error)
        for _ in range(_RECOMPUTES_MAX):
            try:
                # Whole chunks: what else is damaged in this one would only be met later.
                session.truncate(_first(error) // self.chunk_tokens * self.chunk_tokens)
                for first, end in list(blocks(tokens - session.tokens, self.block_columns)):
                    self._feed(cache, row, ids, session.tokens, session.tokens + end - first)
            except (RecordsDamaged, SessionLost) as again:
                error = again
            else:
                return
        raise error

    def _feed(self, cache: HgaCache, row: int, ids: npt.NDArray[np.uint32], first: int, end: int) -> None:
        """Runs tokens first .. end-1 of one sequence, for the sake of their K/V alone."""
        cache.sessions[row].note_tokens(ids[first:end])
        tokens = torch.from_numpy(ids[first:end].astype(np.int64))[None].to(self.device)
        places = torch.arange(first, end, device=self.device)[None]
        with cache.block([0], end - first, row) as block:
            self._call(cache, block, {"input_ids": tokens, "position_ids": places})


def _first(error: RecordsDamaged | SessionLost) -> int:
    """The first token that is damaged or lost."""
    return min(first for first, _ in error.token_ranges)
