"""hga-kvd itself: a daemon of its own, the client's Connection, the transport that `auto` picks.

A record is so many neighbouring groups of 8 KiB of one KV head. The arena holds a thirty-second of the records when cold,
all of them when hot. Every record from disk is checked against its checksum.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
from hga_kvd.bench.daemon import temporary_daemon
from hga_kvd_client.geometry import KEY_DTYPE, Geometry

from peers.base import OUT_PAGES, Bytes, Numbers, Peer, Shape, State

GROUP_BYTES, LAYERS, KV_HEADS = 8192, 4, 4


class HgaKvd(Peer):
    direct = True

    def __init__(self, place: Path, shape: Shape, state: State) -> None:
        super().__init__(place, shape, state)
        self._groups = max(1, shape.record_bytes // GROUP_BYTES)
        head_dim = 64 if shape.record_bytes < GROUP_BYTES else 128
        self._geometry = Geometry(LAYERS, KV_HEADS, head_dim, "bfloat16", model_fingerprint="bench")
        assert self._groups * self._geometry.record_bytes == shape.record_bytes
        total = shape.records * shape.record_bytes
        self._stack = contextlib.ExitStack()
        daemon = self._stack.enter_context(temporary_daemon(place))
        daemon.restart(max(16 << 20, total // 32) if state == "cold" else 2 * total + (32 << 20))
        self._connection = daemon.connect()
        self._stack.callback(self._connection.disconnect)
        self._session = self._connection.open("bench", self._geometry).session_id

    def facts(self) -> dict[str, str]:
        landing = "huge pages" if self._connection.huge_pages else "4 KiB pages"
        return {"pages": f"{OUT_PAGES}, copied to a landing of {landing}", "transport": self._connection.transport}

    def put(self, first: int, records: Bytes) -> None:
        """A record's number is its place in storage order, [chunk][layer][kv_head][run of groups]."""
        chunk, rest = divmod(first * self.shape.record_bytes, self._geometry.chunk_bytes)
        count, more = divmod(records.nbytes, self._geometry.chunk_bytes)
        assert rest == more == 0, "whole chunks only"
        self._connection.append(self._session, chunk, count, records.reshape(-1))

    def finish(self) -> None:
        self._connection.flush(self._session)

    def read(self, numbers: Numbers, out: Bytes) -> Bytes:
        g = self._geometry
        runs = g.groups_per_chunk // self._groups
        rest, run = np.divmod(numbers, runs)
        rest, head = np.divmod(rest, KV_HEADS)
        chunk, layer = np.divmod(rest, LAYERS)
        keys = np.empty((len(numbers), self._groups), KEY_DTYPE)
        keys["group"] = (chunk * g.groups_per_chunk + run * self._groups)[:, None] + np.arange(self._groups)
        keys["layer"], keys["kv_head"] = layer[:, None], head[:, None]
        fetched = self._connection.fetch(self._session, keys.reshape(-1))
        if fetched.statuses is not None:
            raise OSError("damaged records")
        return fetched.records.reshape(len(numbers), -1)

    def close(self) -> None:
        self._stack.close()


PEER = HgaKvd
