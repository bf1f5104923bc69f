"""The sessions behind a patched model's caches: opened by name or by what a prompt begins with, and closed.

What always holds:
- A session that is handed out holds the first tokens of the input it was opened for, and no others; where that cannot be
  told, or tokens would have to go that nobody allowed to go, the call is refused.
- Sessions that no cache has any more are closed between calls, by the thread that makes the calls.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from hga_kvd_client import Client, Geometry, Rope, Session, SessionOptions
from hga_kvd_client.errors import KvdError, RecordsDamaged

from hga_kvd_patch.errors import TextMismatch

logger = logging.getLogger("hga_kvd_patch")


@dataclass
class Sessions:
    """Of one patched model. The fields are what they are opened with; see `patch`."""

    client: Client
    geometry: Geometry
    rope: Rope
    options: SessionOptions
    device: torch.device
    dtype: torch.dtype
    diverging: Literal["refuse", "truncate"]
    share_prefix: bool
    tenant: str
    ttl_s: int
    _retired: list[Session] = field(default_factory=list)
    _busy: bool = False
    _thread: int = field(default_factory=threading.get_ident)

    def open(self, name: str | None, ids: npt.NDArray[np.uint32] | None, most: int) -> Session:
        """A session that holds at most the first `most` tokens of ids, and no others."""
        arguments: dict[str, Any] = {"tenant": self.tenant, "ttl_s": self.ttl_s}
        if self.share_prefix and ids is not None:
            # One less, because a prompt's last token alone would be a decode step.
            arguments["token_ids"] = ids[: max(0, most - 1)]

        def opened(**more: Any) -> Session:
            return self.client.open(
                name, self.geometry, self.rope, self.options, self.device, self.dtype, **arguments, **more
            )

        try:
            session = opened()
        except RecordsDamaged:
            # Cut back only a session that can be computed again: a new one, or one whose text we were given.
            if ids is None:
                raise
            if name is not None:
                stored = self.client.token_ids(name, self.tenant)
                if len(stored) and not np.array_equal(stored[: len(ids)], ids[: len(stored)]):
                    raise
            session = opened(salvage=True)
        try:
            if session.tokens and not session.created:
                self._reconcile(session, ids, most)
        except BaseException:
            session.close()
            raise
        return session

    def _reconcile(self, session: Session, ids: npt.NDArray[np.uint32] | None, most: int) -> None:
        """Makes sure that a session that was taken up holds the first tokens of ids, at most `most`.

        Raises: TextMismatch if tokens that are not in ids would have to go, and nobody allowed that.
        """
        known, stored = session.known_ids(), session.tokens
        if known is None or len(known) != stored:
            raise TextMismatch(
                f"session {session.name!r} holds {stored} tokens but not their ids, so it cannot be told whether they "
                "are the ones of the input: use another name, or delete the session"
            )
        assert ids is not None
        shared = min(stored, len(ids))
        different = (known[:shared] != ids[:shared]).nonzero()[0]
        same = int(different[0]) if len(different) else shared
        if same < stored and self.diverging == "refuse":
            other = (
                f"holds another text: token {same} is {int(known[same])} there and {int(ids[same])} in the input"
                if same < shared
                else f"holds {stored} tokens and the input has {len(ids)}"
            )
            raise TextMismatch(
                f"session {session.name!r} {other}; use another name, delete the session, or patch with "
                "diverging='truncate' to cut it back to what both have"
            )
        if same < stored:
            logger.warning("session %r is cut back from %d tokens to the %d of the input", session.name, stored, same)
        session.truncate(min(same, most))

    def retire(self, sessions: list[Session]) -> None:
        """Takes sessions that no cache has any more. Closing one talks to the daemon, so not in the middle of a call:
        the garbage collector may come from anywhere."""
        self._retired.extend(sessions)
        if not self._busy and threading.get_ident() == self._thread:
            self.close_retired()

    def close_retired(self) -> None:
        while self._retired:
            session = self._retired.pop()
            try:
                session.close()
            except KvdError as error:
                logger.warning("session %r was not closed properly: %s", session.name, error)

    @contextmanager
    def call(self) -> Iterator[None]:
        """A call of the model happens in here."""
        self._busy, self._thread = True, threading.get_ident()
        try:
            yield
        finally:
            self._busy = False
