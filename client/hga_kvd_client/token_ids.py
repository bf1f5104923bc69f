"""Ids of a session's tokens, as the wire has them: uint32, little-endian. Known for every token, or for none of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hga_kvd_client.errors import InvalidRequest


def token_id_bytes(token_ids: Tensor | npt.NDArray[np.integer]) -> bytes:
    """token_ids: [tokens]."""
    ids = token_ids.cpu().numpy() if isinstance(token_ids, torch.Tensor) else token_ids
    return ids.reshape(-1).astype("<u4").tobytes()


class TokenIds:
    """Of one session, the block at hand included. A block that comes without ids makes them unknown for good."""

    def __init__(self, known: bytes | None = b"") -> None:
        self._known: bytearray | None = None if known is None else bytearray(known)
        self._noted = b""

    def note(self, token_ids: Tensor | npt.NDArray[np.integer]) -> None:
        """Of the next block."""
        self._noted = token_id_bytes(token_ids)

    def check(self, tokens: int) -> None:
        """Raises: InvalidRequest if ids were noted, but not for so many tokens."""
        if self._noted and len(self._noted) != 4 * tokens:
            raise InvalidRequest(f"{len(self._noted) // 4} token ids were noted for a block of {tokens} tokens")

    def begin_block(self) -> None:
        """Takes what was noted for it."""
        if self._known is not None:
            if self._noted:
                self._known += self._noted
            else:
                self._known = None
        self._noted = b""

    def cut(self, tokens: int) -> None:
        """Forgets what was noted, and the ids of tokens from `tokens` on."""
        self._noted = b""
        if self._known is not None:
            del self._known[4 * tokens :]

    def span(self, first: int, end: int) -> bytes:
        """Of tokens first .. end-1; empty if unknown."""
        return b"" if self._known is None else bytes(self._known[4 * first : 4 * end])

    def of_first(self, tokens: int) -> npt.NDArray[np.uint32] | None:
        """[tokens]; None if unknown."""
        if self._known is None:
            return None
        return np.frombuffer(bytes(self._known[: 4 * tokens]), dtype="<u4").astype(np.uint32)

    def restore(self, known: bytes, tokens: int) -> None:
        """What the daemon has of a session of `tokens`: empty if some were never told."""
        self._known = bytearray(known) if len(known) == 4 * tokens else None

    def branch(self) -> TokenIds:
        """The same for another session."""
        return TokenIds(None if self._known is None else bytes(self._known))
