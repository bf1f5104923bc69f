"""RocksDB through rocksdict, no compression. Cold: values in blob files, direct reads; hot: all in its block cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rocksdict import BlockBasedOptions, Cache, DBCompressionType, Options, Rdict

from peers.base import Bytes, Numbers, Peer, Shape, State


class RocksDb(Peer):
    direct = True

    def __init__(self, place: Path, shape: Shape, state: State) -> None:
        super().__init__(place, shape, state)
        self._base = Rdict(str(place / "rocksdb"), self._options())

    def put(self, first: int, records: Bytes) -> None:
        for number, record in enumerate(records, first):
            self._base[number] = record.tobytes()

    def finish(self) -> None:
        self._base.flush()
        self._base.compact_range(None, None)
        self._base.close()
        self._base = Rdict(str(self.place / "rocksdb"), self._options())

    def read(self, numbers: Numbers, out: Bytes) -> Bytes:
        for record, content in zip(out, self._base[numbers.tolist()], strict=True):
            record[:] = np.frombuffer(content, np.uint8)
        return out

    def close(self) -> None:
        self._base.close()

    def _options(self) -> Options:
        options = Options(raw_mode=False)
        options.create_if_missing(True)
        options.set_compression_type(DBCompressionType.none())
        blocks = BlockBasedOptions()
        if self.state == "cold":
            options.set_use_direct_reads(True)
            options.set_enable_blob_files(True)
            options.set_min_blob_size(1024)
            options.set_blob_compression_type(DBCompressionType.none())
            blocks.set_block_cache(Cache(8 << 20))  # of keys; values in blob files are not in it
        else:
            blocks.set_block_cache(Cache(2 * self.shape.records * self.shape.record_bytes))
        options.set_block_based_table_factory(blocks)
        return options


PEER = RocksDb
