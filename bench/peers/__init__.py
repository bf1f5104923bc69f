"""Other stores, each behind the same four calls, so that all are asked for the same records in the same order.

`PEERS` names them without importing them: each needs a package of its own, and one that is not there is reported, not faked.
A peer is used as its authors would use it for this: batched calls where it has them, direct I/O where it has it, its own
cache off when the case is cold and on when it is hot. What it may not do is keep the records in this process.
"""

from __future__ import annotations

import importlib
from typing import NamedTuple

from peers.base import Peer


class Entry(NamedTuple):
    module: str
    install: str
    what: str


RAW, FS, NIXL = (
    "lmcache-rust-raw-block-io",
    "torch; pip install --no-deps lmcache",
    "torch; pip install --no-deps nixl-cu12",
)
PEERS: dict[str, Entry] = {
    "hga-kvd": Entry("hga_kvd_peer", "pip install hga-kvd", "daemon and client, transport auto"),
    "preadv": Entry("preadv", "", "one pread after the other"),
    "preadv pool": Entry("preadv_pool", "", "pread from 32 threads"),
    "LMCache raw block": Entry("lmcache_raw", f"pip install {RAW}", "its io_uring engine, batched_read"),
    "LMCache fs": Entry("lmcache_fs", f"pip install {FS}", "native client, 32 workers, a file a record"),
    "NIXL POSIX": Entry("nixl_posix", f"pip install {NIXL}", "its io_uring, prepared transfers"),
    "RocksDB": Entry("rocksdb", "pip install rocksdict", "multi-get; direct reads of blob files, or its block cache"),
    "LMDB": Entry("lmdb_peer", "pip install lmdb", "one read transaction a batch"),
    "sqlite": Entry("sqlite", "", "one SELECT a batch, pages of 64 KiB"),
    "Redis": Entry("redis_peer", "apt install redis-server; pip install redis", "MGET over a unix socket; RAM only"),
    "safetensors mmap": Entry("safetensors_mmap", "pip install safetensors", "one mapped file, copies out of it"),
}


class Missing(Exception):
    """The peer's package or program is not on this machine; the text says how to get it."""


def load(name: str) -> type[Peer]:
    """The class of a peer. Raises: Missing."""
    entry = PEERS[name]
    try:
        module = importlib.import_module(f"peers.{entry.module}")
        found: type[Peer] = module.PEER
        found.check()
    except ImportError as error:
        raise Missing(f"not installed ({entry.install or error})") from error
    return found
