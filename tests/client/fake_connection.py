"""A Connection over a dict of extents in memory: what Session tests need of the daemon, and nothing more."""

from __future__ import annotations

import numpy as np
from hga_kvd_client import errors
from hga_kvd_client.answers import Fetched, Opened, SessionInfo


def _first_chunks(session, count):
    summaries = {key: value for key, value in session["summaries"].items() if key[1] < count}
    return {"chunks": session["chunks"][:count], "ids": session["ids"][:count], "summaries": summaries}


def _common_chunks(ids, token_ids):
    for chunk, known in enumerate(ids):
        width = len(known)
        if not known or token_ids[chunk * width : (chunk + 1) * width] != known:
            return
        yield True


class FakeDaemon:
    """Outlives connections. `restart(keep)` forgets temporary sessions, chunks from `keep(durable)` on, and summaries that
    no flush came after."""

    def __init__(self) -> None:
        self.sessions = {}
        self.next_id = 1
        self.starts = 1

    def restart(self, keep=lambda durable: durable):
        self.starts += 1
        for session_id, session in list(self.sessions.items()):
            count = keep(session["durable"])
            if not session["name"] or not count:
                del self.sessions[session_id]
                continue
            session["chunks"] = session["chunks"][:count]
            session["ids"] = session["ids"][:count]
            session["durable"] = min(session["durable"], count)
            kept = session.get("flushed", {})
            session["summaries"] = {k: v for k, v in kept.items() if k[1] < count}


class FakeConnection:
    def __init__(self, daemon: FakeDaemon | None = None, append_bytes_max: int = 1 << 20, page_chunks: int = 3) -> None:
        self.daemon = daemon or FakeDaemon()
        self.generation = self.seen = self.daemon.starts
        self._append_bytes_max = append_bytes_max
        self._page_chunks = page_chunks
        self.landing = self.reader = None
        self.fetched_keys = []  # one array a fetch
        self.kept = []  # whether the caller keeps it, of each that was read ahead
        self.damaged = set()  # (layer, kv_head, group)
        self.fail_next = None  # raised by the next call

    def _check(self):
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error

    def _session(self, session_id, epoch=None):
        self._check()
        if session_id not in self.daemon.sessions:
            raise errors.SessionNotFound(f"no session {session_id}")
        session = self.daemon.sessions[session_id]
        if epoch is not None and epoch != session["epoch"]:
            raise errors.StaleEpoch(f"{epoch} is not {session['epoch']}")
        return session

    def notice_replacement(self):
        changed = self.daemon.starts != self.seen
        self.generation = self.seen = self.daemon.starts
        return changed

    def open(self, name, geometry, create=True, tenant="", token_ids=b"", ttl_s=0):
        self._check()
        for session_id, session in self.daemon.sessions.items():
            if name and session["name"] == name:
                return self._opened(session_id, created=False)
        if not create:
            raise errors.SessionNotFound(f"no session {name!r}")
        session_id = self.daemon.next_id
        self.daemon.next_id += 1
        start = {"chunks": [], "ids": [], "summaries": {}}
        for stored in self.daemon.sessions.values():
            if (stored["geometry"], stored["tenant"]) == (geometry, tenant):
                count = sum(_common_chunks(stored["ids"], token_ids))
                if count > len(start["chunks"]):
                    start = _first_chunks(stored, count)
        self.daemon.sessions[session_id] = {
            "name": name, "geometry": geometry, "durable": 0, "epoch": 0, "tenant": tenant, "ttl_s": ttl_s, **start,
        }  # fmt: skip
        return self._opened(session_id, created=True)

    def _opened(self, session_id, created):
        session = self.daemon.sessions[session_id]
        counts = len(session["chunks"]), session["durable"]
        return Opened(session_id, session["name"], session["geometry"], *counts, created, session["epoch"])

    def fork(self, session_id, chunk_count=0, name="", epoch=0):
        session = self._session(session_id, epoch)
        if any(name and other["name"] == name for other in self.daemon.sessions.values()):
            raise errors.InvalidRequest(f"there is a session {name!r}")
        forked = self.daemon.next_id
        self.daemon.next_id += 1
        start = _first_chunks(session, chunk_count or len(session["chunks"]))
        self.daemon.sessions[forked] = {**session, "name": name, "durable": 0, "epoch": 0, **start}
        return self._opened(forked, created=True)

    def truncate(self, session_id, chunk_count, epoch=0):
        session = self._session(session_id, epoch)
        if chunk_count > len(session["chunks"]):
            raise errors.KeyOutOfRange(f"{chunk_count} of {len(session['chunks'])} chunks")
        session.update(_first_chunks(session, chunk_count), epoch=epoch + 1)
        session["durable"] = min(session["durable"], chunk_count)
        return epoch + 1

    def append_bytes_max(self):
        return self._append_bytes_max

    def append_buffer(self, size):
        return np.full(size, 0xA5, np.uint8)

    def append(self, session_id, first_chunk, chunk_count, payload, token_ids=b"", epoch=0):
        session = self._session(session_id, epoch)
        if first_chunk != len(session["chunks"]):
            raise errors.AppendOutOfOrder(f"{first_chunk} is not {len(session['chunks'])}")
        geometry = session["geometry"]
        shape = (chunk_count, geometry.layers, geometry.kv_heads, geometry.groups_per_chunk, geometry.record_bytes)
        session["chunks"] += list(payload.reshape(shape).copy())
        width = geometry.chunk_tokens * 4
        session["ids"] += [token_ids[i * width : (i + 1) * width] for i in range(chunk_count)]
        return len(session["chunks"])

    def fetch(self, session_id, keys, epoch=0):
        session = self._session(session_id, epoch)
        geometry = session["geometry"]
        self.fetched_keys.append(keys.copy())
        records = np.empty((len(keys), geometry.record_bytes), np.uint8)
        statuses = np.zeros(len(keys), np.uint8)
        for i, (group, kv_head, layer) in enumerate(keys.tolist()):
            chunk, within = divmod(group, geometry.groups_per_chunk)
            if chunk >= len(session["chunks"]):
                raise errors.KeyOutOfRange(f"group {group}")
            records[i] = session["chunks"][chunk][layer, kv_head, within]
            statuses[i] = (layer, kv_head, group) in self.damaged
        return Fetched(records, statuses if statuses.any() else None, len(keys) - len(keys) // 3, len(keys) // 3)

    def flush(self, session_id):
        session = self._session(session_id)
        if not session["name"]:
            raise errors.NotDurable("temporary")
        session["durable"] = len(session["chunks"])
        session["flushed"] = dict(session["summaries"])
        return session["durable"]

    def put_summaries(self, session_id, kind, first_chunk, chunk_count, payload, epoch=0):
        session = self._session(session_id, epoch)
        assert first_chunk + chunk_count <= len(session["chunks"])
        width = len(payload) // chunk_count
        for i in range(chunk_count):
            session["summaries"][kind, first_chunk + i] = payload[i * width : (i + 1) * width]

    def get_summaries(self, session_id, kind, first_chunk, chunk_count, epoch=0):
        summaries = self._session(session_id, epoch)["summaries"]
        page = []
        for chunk in range(first_chunk, first_chunk + min(chunk_count, self._page_chunks)):
            if (kind, chunk) not in summaries:
                if page:
                    break
                raise errors.SummariesNotFound(f"no summaries of chunk {chunk}")
            page.append(summaries[kind, chunk])
        return len(page), b"".join(page)

    def summaries(self, session_id, wanted, item_bytes, epoch=0):
        for each in wanted:
            count, page = self.get_summaries(session_id, *each, epoch)
            yield count, np.frombuffer(bytearray(page), np.uint8)

    def records(self, session_id, wanted, item_bytes, epoch=0, once=True):
        for keys in wanted:
            self.kept.append(once)
            assert keys.size * self._session(session_id)["geometry"].record_bytes <= self.ahead_bytes_max(0, item_bytes)
            yield self.fetch(session_id, keys, epoch)

    def ahead_bytes_max(self, session_id, item_bytes):
        return max(item_bytes, 1 << 16)

    def info(self, session_id):
        session = self._session(session_id)
        ids = b"".join(session["ids"]) if all(session["ids"]) else b""
        return SessionInfo(
            session_id, session["name"], session["geometry"], len(session["chunks"]), session["durable"], 0,
            not session["name"], ids,
        )  # fmt: skip

    def close(self, session_id):
        if not self._session(session_id)["name"]:
            del self.daemon.sessions[session_id]

    def delete(self, session_id):
        self._session(session_id)
        del self.daemon.sessions[session_id]

    def disconnect(self):
        pass
