"""What opening, forking and truncating do to the index. No I/O; called with the residency's lock held.

Copy on write costs nothing here: a chunk never changes, so a fork is a list of rows and one reference more for each.
"""

from __future__ import annotations

import numpy as np

from hga_kvd import chains
from hga_kvd.answers import SessionInfo
from hga_kvd.config import Settings
from hga_kvd.errors import GeometryMismatch, InvalidRequest, KeyOutOfRange, LimitExceeded
from hga_kvd.geometry import Geometry
from hga_kvd.index import I64, LOST_ROW, ChunkTable, Places, Session
from hga_kvd.manifest import SESSIONS_TEXT_BYTES_MAX, session_bytes_max
from hga_kvd.residency import Residency

NAME_BYTES_MAX = 256
TENANT_BYTES_MAX = 256


def check_names(name: str, tenant: str = "") -> None:
    """Raises: InvalidRequest."""
    for what, text, limit in (("session name", name, NAME_BYTES_MAX), ("tenant", tenant, TENANT_BYTES_MAX)):
        if len(text.encode()) > limit:
            raise InvalidRequest(f"a {what} of {len(text.encode())} bytes; at most {limit} are allowed")


def check_same(session: Session, geometry: Geometry | None, tenant: str) -> None:
    """Raises: GeometryMismatch, InvalidRequest if this is not the session that the caller means."""
    differences = session.table.geometry.differences(geometry) if geometry else []
    if differences:
        raise GeometryMismatch(
            f"session {session.name!r} exists with another geometry ({'; '.join(differences)}): open it with its "
            "own, or delete it first"
        )
    if session.tenant != tenant:
        raise InvalidRequest(f"session {session.name!r} is another tenant's: choose another name")


def info(session: Session, durable: bool, created: bool, token_ids: bytes) -> SessionInfo:
    return SessionInfo(
        session.session_id,
        session.name,
        session.table.geometry,
        session.chunk_count,
        session.written_count if durable else 0,
        session.damaged_records,
        session.temporary,
        token_ids,
        created,
        session.epoch,
        session.tenant,
        session.ttl_s,
        session.pinned,
        session.state == "parked",
    )


def make(
    residency: Residency, settings: Settings, name: str, geometry: Geometry, owner: int, tenant: str, ttl_s: int
) -> Session:
    """A new, empty session. Raises: LimitExceeded."""
    if len(residency.sessions) >= settings.sessions_max:
        raise LimitExceeded(f"there are {settings.sessions_max} sessions already; delete some")
    if name and residency.told_bytes + session_bytes_max(name, tenant) > SESSIONS_TEXT_BYTES_MAX:
        raise LimitExceeded(
            f"the names of {len(residency.by_name)} sessions fill the manifest, which may have "
            f"{SESSIONS_TEXT_BYTES_MAX} bytes of them; delete some, or choose shorter names"
        )
    if not residency.may_know(geometry, settings.geometries_max):
        raise LimitExceeded(
            f"sessions of {len(residency.pools)} geometries were opened since the daemon started, and another one is more "
            f"than it keeps books for (at most {settings.geometries_max}, fewer of small extents); restart it, which "
            "forgets those that no session has"
        )
    if not residency.chunks_max(geometry):
        raise LimitExceeded(
            f"one chunk of this geometry takes {geometry.chunk_bytes} bytes in {geometry.layers} extents, more "
            f"than the RAM arena of {len(residency.arena.region)} bytes holds; start the daemon with more --ram"
        )
    pool = residency.pool_for(geometry)
    root = chains.root(geometry, tenant)
    session = Session(
        residency.next_session_id, name, pool.table, pool.number, owner, tenant=tenant, root=root, ttl_s=ttl_s
    )
    residency.next_session_id += 1
    residency.add_session(session)
    return session


def longest_prefix(table: ChunkTable, ids: list[bytes]) -> I64:
    """Rows of stored chunks with these chain ids, up to the first that is not stored."""
    rows: list[int] = []
    for chain in ids:
        row = table.find_chain(chain)
        if row == LOST_ROW:
            break
        rows.append(row)
    return np.array(rows, np.int64)


def first_rows(session: Session, chunk_count: int) -> I64:
    """Raises: KeyOutOfRange."""
    if chunk_count > session.chunk_count:
        raise KeyOutOfRange(
            f"session {session.session_id} has {session.chunk_count} chunks and cannot be forked at {chunk_count}"
        )
    return session.rows[:chunk_count].copy()


def share(session: Session, rows: I64) -> None:
    """Gives a session chunks that others have, after its own."""
    session.table.hold(rows)
    session.put_rows(session.chunk_count, rows)
    session.chunk_count += len(rows)


def cut(residency: Residency, session: Session, chunk_count: int) -> Places:
    """Drops the chunks from chunk_count on and starts a new epoch. Returns what they alone had on disk."""
    if chunk_count > session.chunk_count:
        raise KeyOutOfRange(
            f"session {session.session_id} has {session.chunk_count} chunks and cannot be truncated to {chunk_count}"
        )
    gone = session.rows[chunk_count : session.chunk_count].copy()
    session.chunk_count = chunk_count
    session.written_count = min(session.written_count, chunk_count)
    session.epoch += 1
    group_count = chunk_count * session.table.geometry.groups_per_chunk
    session.damaged = {key for key in session.damaged if key[0] < group_count}
    return residency.release(session, gone)
