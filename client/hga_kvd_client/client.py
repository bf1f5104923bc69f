"""Client: a connection and the sessions opened through it."""

from __future__ import annotations

import builtins
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hga_kvd_client import errors
from hga_kvd_client.answers import SessionInfo
from hga_kvd_client.connection import Connection
from hga_kvd_client.geometry import Geometry
from hga_kvd_client.held import Held
from hga_kvd_client.options import Rope, SessionOptions
from hga_kvd_client.session import Session
from hga_kvd_client.token_ids import token_id_bytes

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Client:
    """One caller at a time. Use as a context manager, or call close()."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(
        self,
        name: str | None,
        geometry: Geometry,
        rope: Rope,
        options: SessionOptions | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        create: bool = True,
        tenant: str = "",
        token_ids: Tensor | npt.NDArray[np.integer] | None = None,
        ttl_s: int = 0,
        salvage: bool = False,
    ) -> Session:
        """Opens the session of this name, or makes it; None: a temporary one. A session with chunks is resumed.

        geometry.rope may be left empty; it is then rope.text(). dtype: of K and V; must be geometry.dtype, which is
        what None means; options.kv_dtype may store them otherwise, and session.geometry says how.
        token_ids: what a new session will hold: it begins with the longest prefix of them that the tenant has stored
        under this geometry, in any session; session.tokens says how long. Only routing state and window are read.
        tenant: sessions share stored K/V only within one. ttl_s: a new session is deleted when it was not used for so
        long; 0: never. salvage: a session whose window is damaged is cut back to before the damage.
        Raises: SessionNotFound (create=False), GeometryMismatch, InvalidRequest, LimitExceeded, RecordsDamaged.
        """
        if geometry.dtype not in DTYPES or dtype not in (None, DTYPES[geometry.dtype]):
            raise errors.InvalidRequest(
                f"geometry.dtype is {geometry.dtype!r} and dtype {dtype}; both must be one of {', '.join(DTYPES)}"
            )
        if rope.rotary_dim > geometry.head_dim:
            raise errors.InvalidRequest(f"rotary_dim is {rope.rotary_dim}, more than head_dim {geometry.head_dim}")
        options = options or SessionOptions()
        opened = self.connection.open(
            name or "",
            options.stored(replace(geometry, rope=geometry.rope or rope.text())),
            create=create,
            tenant=tenant,
            token_ids=b"" if token_ids is None else token_id_bytes(token_ids),
            ttl_s=ttl_s,
        )
        model_side = (rope, options, torch.device(device), DTYPES[geometry.dtype])
        session = Session(self.connection, opened, Held.nothing_yet(opened.geometry, *model_side), tenant, ttl_s)
        if opened.chunk_count:
            try:
                session.resume(salvage)
            except errors.KvdError:
                if not session.name:
                    session.close()
                raise
        return session

    def token_ids(self, name: str, tenant: str = "") -> npt.NDArray[np.uint32]:
        """Ids of a stored session's tokens, [tokens], or empty if some were never told. Raises: SessionNotFound."""
        session_id = self.connection.open(name, None, create=False, tenant=tenant).session_id
        return np.frombuffer(self.connection.info(session_id).token_ids, dtype="<u4").astype(np.uint32)

    def list(self) -> builtins.list[SessionInfo]:
        return self.connection.list()

    def stat(self) -> Any:
        """Counters and sizes of the daemon: the StatResponse of the proto."""
        return self.connection.stat()

    def delete(self, name: str, tenant: str = "") -> None:
        """Removes a session by name. Raises: SessionNotFound."""
        self.connection.delete(self.connection.open(name, None, create=False, tenant=tenant).session_id)

    def close(self) -> None:
        """Ends the connection; temporary sessions are gone, named ones stay. May be called twice."""
        self.connection.disconnect()


def connect(target: str | None = None, **connection_options: Any) -> Client:
    """A client of the daemon at target: unix:/path, /path, host:port; None: default_target().

    connection_options: transport "auto" | "bytes", region_bytes, deadline_s, reconnect_s, as in Connection.
    Raises: Unavailable when no daemon answers for reconnect_s.
    """
    return Client(Connection(target, **connection_options))
