"""The index out of a manifest and the frames of the log: docs/format.md, "Recovery", step 5. Pure: no I/O.

Two passes. The first replays, in the order of the log, which chunks each session has, by uid, and where each chunk and
summary was written last. The second gives rows to the chunks that a session has, and only to them: reference counts are
counted here and stored nowhere, and what nobody has is not in the index at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from hga_kvd import chains
from hga_kvd.format import LINK, ChunkFrame, Frame, FrameHeader, SummaryFrame
from hga_kvd.index import LOST_ROW, Places, Session, places_of
from hga_kvd.manifest import Manifest, SessionEntry
from hga_kvd.residency import Pool, Residency

LOST_UID = 0


@dataclass(eq=False)
class Rebuilt:
    live: Counter[int] = field(default_factory=Counter)  # by segment: chunks, summaries and links that count
    dead: list[Places] = field(default_factory=list)  # bodies of chunks and summaries that do not
    misfits: list[FrameHeader] = field(default_factory=list)  # sound frames whose sizes are not their session's


@dataclass(eq=False)
class _Links:
    """Which chunks a session has, as far as the log was read."""

    epoch: int = 0
    uids: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)  # of link frames that count

    def apply(self, header: FrameHeader, uids: list[int]) -> None:
        """A frame says that the session has these from header.first_chunk on."""
        first, is_link = header.first_chunk, header.kind == LINK
        if header.epoch < self.epoch:
            return
        if is_link and not first:
            self.epoch, self.uids, self.segments = header.epoch, uids, [header.segment_id]
            return
        if header.epoch > self.epoch:  # the link that begins this epoch is damaged: what came before is unknown
            self.epoch, self.uids, self.segments = header.epoch, [], []
        if is_link:
            self.segments.append(header.segment_id)
        self.uids += [LOST_UID] * (first - len(self.uids))
        self.uids[first : first + len(uids)] = uids

    def finish(self, entry: SessionEntry) -> None:
        """What the manifest knows and the log does not."""
        if entry.epoch > self.epoch:
            self.epoch, self.uids, self.segments = entry.epoch, [], []
            for first, count in entry.links or ():
                self.uids += range(first, first + count) if first != LOST_UID else [LOST_UID] * count
        if entry.epoch == self.epoch:
            self.uids += [LOST_UID] * (entry.chunk_count - len(self.uids))


def rebuild(manifest: Manifest, frames: Iterable[Frame], residency: Residency, now: float) -> Rebuilt:
    """Fills an empty residency with the sessions of the manifest. frames: in the order they were written."""
    links = {entry.session_id: _Links() for entry in manifest.sessions}
    chunk_at: dict[int, tuple[ChunkFrame, int]] = {}  # uid -> its last frame, and which of it
    summaries: list[SummaryFrame] = []
    chunk_frames: list[ChunkFrame] = []
    for frame in frames:
        header = frame.header
        residency.next_session_id = max(residency.next_session_id, header.session_id + 1)
        if isinstance(frame, SummaryFrame):
            summaries.append(frame)
            continue
        if isinstance(frame, ChunkFrame):
            chunk_frames.append(frame)
            residency.next_chunk_uid = max(residency.next_chunk_uid, int(frame.uids.max()) + 1)
            for i, uid in enumerate(frame.uids.tolist()):
                chunk_at[uid] = frame, i
        known = links.get(header.session_id)
        if known is not None:
            known.apply(header, frame.uids.tolist())
    rebuilt = Rebuilt()
    row_of: dict[Pool, dict[int, int]] = {}
    for entry in manifest.sessions:
        links[entry.session_id].finish(entry)
        pool = residency.pool_for(entry.geometry)
        rows = row_of.setdefault(pool, {})
        _add_chunks(pool, links[entry.session_id].uids, chunk_at, rows, rebuilt)
        session = _add_session(residency, pool, entry, links[entry.session_id], rows, rebuilt)
        # How long ago it was used before a crash is not known well: that counts as use.
        session.used_at = entry.used_s if manifest.clean else max(now, entry.used_s)
    for frame in summaries:
        for pool, rows in row_of.items():
            _add_summaries(pool, frame, rows)
    for pool in row_of:
        written = pool.table.summaries.segment
        rebuilt.live.update(written[written != 0].tolist())
    for frame in chunk_frames:
        rebuilt.dead.append(_dead_chunks(frame, chunk_at, row_of.values()))
    for frame in summaries:
        rebuilt.dead.append(_dead_summaries(frame, row_of))
    return rebuilt


def _dead_chunks(
    frame: ChunkFrame, chunk_at: dict[int, tuple[ChunkFrame, int]], row_of: Iterable[dict[int, int]]
) -> Places:
    header, size = frame.header, frame.chunk_stride
    return places_of(
        (header.segment_id, header.body_offset + i * size, size)
        for i, uid in enumerate(frame.uids.tolist())
        if chunk_at[uid][0] is not frame or chunk_at[uid][1] != i or not any(uid in rows for rows in row_of)
    )


def _dead_summaries(frame: SummaryFrame, row_of: dict[Pool, dict[int, int]]) -> Places:
    header, size = frame.header, frame.stride
    offsets = header.body_offset + np.arange(header.chunk_count) * size
    dead = np.ones(len(offsets), bool)
    for pool, rows in row_of.items():
        summaries = pool.table.summaries
        at = summaries.find(np.array([rows.get(uid, LOST_ROW) for uid in frame.uids.tolist()], np.int64), frame.kind)
        dead &= (summaries.segment[at] != header.segment_id) | (summaries.offset[at] != offsets)
    return places_of((header.segment_id, int(offset), size) for offset in offsets[dead])


def _add_chunks(
    pool: Pool, uids: list[int], chunk_at: dict[int, tuple[ChunkFrame, int]], rows: dict[int, int], rebuilt: Rebuilt
) -> None:
    """Rows for those of the chunks that have none yet. Their references are counted later."""
    of_frame: dict[int, tuple[ChunkFrame, list[int]]] = {}
    for uid in uids:
        if uid not in rows and uid in chunk_at:
            frame, i = chunk_at[uid]
            of_frame.setdefault(id(frame), (frame, []))[1].append(i)
    fitting = []
    for frame, chosen in of_frame.values():
        if _fits(frame, pool):
            fitting.append((frame, chosen))
        else:
            rebuilt.misfits.append(frame.header)
    table = pool.table
    added = table.add(sum(len(chosen) for _, chosen in fitting))  # at once: the columns get their size, and no more
    table.refs[added] = 0
    first = 0
    for frame, chosen in fitting:
        mine, at = added[first : first + len(chosen)], np.array(chosen, np.int64)
        first += len(chosen)
        table.uid[mine] = frame.uids[at]
        table.segment[mine] = frame.header.segment_id
        table.offset[mine] = frame.header.body_offset + at * frame.chunk_stride
        table.checksums[mine] = frame.checksums[at]
        table.tokens_known[mine] = frame.tokens_known[at]
        table.token_ids[mine] = frame.token_ids[at]
        rebuilt.live[frame.header.segment_id] += len(at)
        rows.update(zip(frame.uids[at].tolist(), mine.tolist(), strict=True))


def _fits(frame: ChunkFrame, pool: Pool) -> bool:
    geometry = pool.geometry
    shape = (geometry.layers, geometry.records_per_extent)
    sizes = (frame.checksums.shape[1:], frame.record_bytes, frame.token_ids.shape[1])
    return sizes == (shape, geometry.record_bytes, geometry.chunk_tokens)


def _add_session(
    residency: Residency, pool: Pool, entry: SessionEntry, links: _Links, rows: dict[int, int], rebuilt: Rebuilt
) -> Session:
    session = Session(entry.session_id, entry.name, pool.table, pool.number, tenant=entry.tenant)
    session.root = chains.root(entry.geometry, entry.tenant)
    session.ttl_s, session.pinned, session.state = entry.ttl_s, entry.pinned, "closed"
    mine = np.array([rows.get(uid, LOST_ROW) for uid in links.uids], np.int64)
    session.put_rows(0, mine)
    session.chunk_count = session.written_count = len(mine)
    session.epoch = links.epoch
    # An epoch that only the manifest tells of gets its link frame with the next append.
    session.logged_epoch = links.epoch if links.segments or not links.epoch else links.epoch - 1
    session.link_segments = links.segments
    rebuilt.live.update(links.segments)
    pool.table.hold(mine)
    pool.table.refs[LOST_ROW] = 0
    residency.add_session(session)
    _set_chains(session)
    return session


def _set_chains(session: Session) -> None:
    """Chain ids of its chunks, as far as their tokens are known from the first one on."""
    table, chain = session.table, session.root
    for row in session.all_rows().tolist():
        if row == LOST_ROW or not table.tokens_known[row]:
            break
        if not table.chained[row]:
            tokens = table.token_ids[row].astype("<u4").tobytes()
            table.set_chain(row, chains.chain_ids(chain, tokens, table.geometry.chunk_tokens)[0])
        chain = table.chain_of(row)


def _add_summaries(pool: Pool, frame: SummaryFrame, rows: dict[int, int]) -> None:
    found = np.array([rows.get(uid, LOST_ROW) for uid in frame.uids.tolist()], np.int64)
    kept = np.flatnonzero(found != LOST_ROW)
    if not len(kept):
        return
    summaries = pool.table.summaries
    at = summaries.add(found[kept], frame.kind, frame.bytes_per_chunk)
    summaries.segment[at] = frame.header.segment_id
    summaries.offset[at] = frame.header.body_offset + kept * frame.stride
    summaries.checksum[at] = frame.checksums[kept]
