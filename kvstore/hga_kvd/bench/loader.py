"""The bulk load of profile `mixed`, a process of its own: `python -m hga_kvd.bench.loader TARGET append|read TENANT`.

append: sessions of 128 MiB, one after another, each flushed and deleted. read: whole extents of one such session, layer
after layer, over and over. It prints `begun` when the load is on, and goes on until its standard input ends.
"""

from __future__ import annotations

import sys
import threading

from hga_kvd_client.connection import Connection
from hga_kvd_client.keys import extent_keys

from hga_kvd.bench.burst import burst_geometry
from hga_kvd.bench.session import Stopwatch, empty_session, filled_session

LOAD_BYTES = 128 << 20
READ_CHUNKS = 8  # of one layer in a fetch: 1 MiB


def main(target: str, load: str, tenant: str) -> None:
    ended = threading.Event()

    def wait_for_the_end() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    connection = Connection(target, reconnect_s=2.0)
    geometry, _ = burst_geometry(8192)
    chunks = LOAD_BYTES // geometry.chunk_bytes
    if load == "append":
        print("begun", flush=True)
        while not ended.is_set():
            with empty_session(connection, geometry, "load", tenant=tenant) as session:
                for first in range(0, chunks, READ_CHUNKS):
                    if ended.is_set():
                        break
                    payload = connection.append_buffer(READ_CHUNKS * geometry.chunk_bytes)
                    session.content.fill_chunks(first, payload)
                    connection.append(session.session_id, first, READ_CHUNKS, payload)
                connection.flush(session.session_id)
    else:
        with filled_session(connection, geometry, chunks, "load", tenant=tenant) as session:
            print("begun", flush=True)
            watch, number = Stopwatch(None), 0
            while not ended.is_set():
                first = number * READ_CHUNKS % chunks
                session.fetch(watch, extent_keys(geometry, number % geometry.layers, first, READ_CHUNKS))
                number += 1
    connection.disconnect()


if __name__ == "__main__":
    main(*sys.argv[1:])
