"""One session as the daemon has it: chunks go in from the window, records come out.

What always holds:
- Every call is made in the session's present epoch. If the daemon was replaced, the session is found again first, or
  made again: chunks that were not durable are appended once more from the window. If it cannot be, SessionLost.
- `chunks` are closed and in the daemon; `durable_chunks` of them survive power loss.
- Nothing damaged leaves here.
- If K and V are stored in 8 bits, a chunk is rounded when it is appended, in the window too: whoever reads it, and whoever
  takes the session up, sees the same values from then on.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from hga_kvd_client import errors
from hga_kvd_client.answers import Fetched, Opened
from hga_kvd_client.connection import Connection
from hga_kvd_client.float8 import pack, unpack
from hga_kvd_client.geometry import Bytes, Keys
from hga_kvd_client.held import Held
from hga_kvd_client.keys import check_statuses, extent_keys, token_ranges
from hga_kvd_client.registered import Carrier

logger = logging.getLogger("hga_kvd_client")
Answer = TypeVar("Answer")
Asked = TypeVar("Asked")

# Replacements of the daemon that one call survives before it gives up.
RECOVERIES_MAX = 3
# On a GPU a tile is so many times as large: after each, attention of the whole block is merged.
GPU_TILES = 4


class StoredSession:
    """Made by Session. What is appended comes from the window that it holds."""

    def __init__(self, connection: Connection, opened: Opened, held: Held, tenant: str, ttl_s: int) -> None:
        self.name, self.geometry = opened.name, held.geometry
        self.tenant, self.ttl_s = tenant, ttl_s
        self.tokens = 0  # that all layers have, open chunk included; counted by Session
        self.chunks = opened.chunk_count
        self.durable_chunks = opened.durable_chunk_count
        self.flushes = bool(opened.name)  # whether it can be durable at all
        self.epoch = opened.epoch
        self.connection = connection
        self._session_id = opened.session_id
        self._generation = connection.generation
        self._held = held
        # Whether an append was begun that nobody heard the end of: if the daemon took it, its chunks are taken back first.
        self._in_doubt = False
        self.rounds = held.geometry.dtype == "float8_e4m3fn"  # to 8 bits, as options.kv_dtype says
        self._carrier = Carrier(held.device) if held.device.type == "cuda" else None

    # Chunks in.

    def append_to(self, end: int) -> None:
        """Appends the chunks up to `end` from the window, with their routing state, in parts that the daemon takes."""
        geometry = self.geometry
        part = max(1, self.connection.append_bytes_max() // geometry.chunk_bytes)
        while self.chunks < end:
            first, until = self.chunks, min(self.chunks + part, end)
            if self._in_doubt:
                self.give_up(first)
            self._in_doubt = True
            try:
                self.call(lambda first=first, until=until: self._append(first, until))  # type: ignore[misc]
            except (errors.LimitExceeded, errors.StorageFull) as error:
                self._in_doubt = False
                if until - first == 1 or isinstance(error, errors.StorageFull):
                    raise
                part = (until - first) // 2  # the daemon's arena may be smaller than our region
                continue
            except (errors.AppendOutOfOrder, errors.StaleEpoch):
                self._in_doubt = False  # somebody else's chunks are there: they stay
                raise
            self.chunks, self._in_doubt = until, False
            self.put_routing(first, until)
            self._held.stats.appended_chunks += until - first

    def put_routing(self, first: int, end: int) -> None:
        """What the routing state has of chunks first .. end-1."""
        self.call(lambda: self._put_routing(first, end))

    def put_summary(self, kind: str, chunk: int, payload: bytes) -> None:
        """One entry of one chunk. Raises: LimitExceeded."""
        self.call(lambda: self.connection.put_summaries(self._session_id, kind, chunk, 1, payload, epoch=self.epoch))

    def flush(self) -> None:
        """Returns when all chunks survive power loss. Raises: NotDurable, WriteFailed."""
        self.durable_chunks = self.call(self._flush_everything)
        self._held.routing.basis_durable = self._held.routing.basis_chunk is not None
        self._held.stats.flushes += 1

    def flush_if_possible(self) -> None:
        try:
            self.flush()
        except errors.NotDurable as error:
            self.flushes = False
            logger.warning("session %r will not survive a restart of the daemon: %s", self.name, error)

    # Chunks out.

    def fetch(self, keys: Keys, recovers: bool = True) -> Fetched:
        """recovers: a session that a new daemon does not know is found or made again first; else that is an error, and
        the only call made is the fetch. Raises: RecordsDamaged."""
        started = time.perf_counter()
        if recovers:
            answer = self.call(lambda: self.connection.fetch(self._session_id, keys, epoch=self.epoch))
        elif self._generation == self.connection.generation:
            answer = self.connection.fetch(self._session_id, keys, epoch=self.epoch)
        else:
            raise errors.SessionNotFound("the daemon was replaced")
        self._held.stats.fetch_s += time.perf_counter() - started
        self._held.stats.fetches += 1
        check_statuses(answer.statuses, keys, self.geometry.group_tokens)
        return answer

    def tiles(self, layer: int, first: int, end: int) -> Iterator[tuple[int, Tensor, Tensor, Fetched]]:
        """K and V of chunks first .. end-1 in tiles: (first chunk, k, v [kv_heads, tile_tokens, head_dim], the fetch).

        Whole extents are read, in storage order. A tile is a copy. The next ones are on their way meanwhile: no other call
        may be made in between.
        """
        geometry, stats, item_bytes = self.geometry, self._held.stats, self.geometry.extent_bytes
        most = self.connection.ahead_bytes_max(self._session_id, item_bytes) // item_bytes
        tile = self._held.options.prefill_tile_chunks * (GPU_TILES if self._carrier else 1)
        parts = range(first, end, max(1, min(tile, most)))
        wanted = [extent_keys(geometry, layer, start, min(parts.step, end - start)) for start in parts]
        records = partial(self.connection.records, once=False)  # the next block reads them again
        with contextlib.closing(self._ahead(records, wanted, item_bytes)) as answers:
            for start, keys in zip(parts, wanted, strict=True):
                started = time.perf_counter()
                answer = next(answers)
                stats.fetch_s += time.perf_counter() - started
                stats.fetches += 1
                check_statuses(answer.statuses, keys, geometry.group_tokens)
                k, v = self._apart(answer, 1, min(parts.step, end - start))[0].flatten(2, 4)
                yield start, k, v, answer

    def all_layers(self, first: int, end: int) -> Iterator[tuple[int, int, Tensor]]:
        """Chunks first .. end-1, whole ones or some layers of one at a time: (first layer, first token, K and V [layers,
        K and V, kv_heads, chunks, groups, group_tokens, head_dim]), gone with the next ones.

        The next ones are on their way meanwhile: no other call may be made in between. Raises: RecordsDamaged.
        """
        geometry, item_bytes = self.geometry, self.geometry.extent_bytes
        extents = max(1, self.connection.ahead_bytes_max(self._session_id, item_bytes) // item_bytes)
        layers, chunks = min(extents, geometry.layers), max(1, extents // geometry.layers)
        parts = [
            (layer, min(layers, geometry.layers - layer), chunk, min(chunks, end - chunk))
            for chunk in range(first, end, chunks)
            for layer in range(0, geometry.layers, layers)
        ]
        wanted = [extent_keys(geometry, layer, chunk, count, layers) for layer, layers, chunk, count in parts]
        with contextlib.closing(self._ahead(self.connection.records, wanted, item_bytes)) as answers:
            for (layer, layers, chunk, count), keys, answer in zip(parts, wanted, answers, strict=True):
                check_statuses(answer.statuses, keys, geometry.group_tokens)
                yield layer, chunk * geometry.chunk_tokens, self._apart(answer, layers, count)

    def _apart(self, answer: Fetched, layers: int, chunks: int) -> Tensor:
        """Whole extents: [layers, K and V, kv_heads, chunks, groups, group_tokens, head_dim]. As as_tensor."""
        geometry = self.geometry
        shape = (chunks, layers, geometry.kv_heads, geometry.groups_per_chunk, 2, geometry.group_tokens)
        # To the device as they are, and put in order there.
        return self.as_tensor(answer.records, (*shape, geometry.head_dim)).permute(1, 4, 2, 0, 3, 5, 6)

    def as_tensor(self, records: Bytes, shape: tuple[int, ...]) -> Tensor:
        """K and V of fetched bytes on the session's device, shape: [..., group_tokens, head_dim]. On a CPU a view of them,
        gone with the next fetch."""
        codes, carrier = torch.from_numpy(records.reshape(-1)), self._carrier
        codes = codes.to(self._held.device) if carrier is None else carrier.carried(codes, self.connection.landing)
        if self.rounds:
            return unpack(codes.view(*shape[:-2], -1), self._held.dtype).view(shape)
        return codes.view(self._held.dtype).view(shape)

    def summary(self, kind: str, chunk: int) -> bytes | None:
        """The stored summary of one chunk, if it has one."""
        try:
            return self.call(lambda: self.connection.get_summaries(self._session_id, kind, chunk, 1, self.epoch))[1]
        except errors.SummariesNotFound:
            return None

    def summaries(self, kind: str, first: int, count: int, chunk_bytes: int) -> Iterator[tuple[int, Bytes]]:
        """Stored summaries of these chunks, chunk_bytes each, up to one that has none: how many and their bytes. As
        all_layers."""
        end = first + count
        with contextlib.suppress(errors.SummariesNotFound):
            while first < end:
                step = max(1, self.connection.ahead_bytes_max(self._session_id, chunk_bytes) // chunk_bytes)
                wanted = [(kind, at, min(step, end - at)) for at in range(first, end, step)]
                with contextlib.closing(self._ahead(self.connection.summaries, wanted, chunk_bytes)) as answers:
                    for (_, _, asked), (found, page) in zip(wanted, answers, strict=True):
                        yield found, page
                        first += found
                        if found < asked:
                            break

    def summary_parts(self, kinds: list[str], chunk: int, part_bytes: int) -> Iterator[Bytes]:
        """The summary of one chunk of each kind, of at most part_bytes, up to one that it has not. As all_layers."""
        wanted = [(kind, chunk, 1) for kind in kinds]
        pages = contextlib.closing(self._ahead(self.connection.summaries, wanted, part_bytes))
        with contextlib.suppress(errors.SummariesNotFound), pages as answers:
            for _, page in answers:
                yield page

    def _ahead(
        self,
        read: Callable[[int, list[Asked], int, int], Generator[Answer, None, None]],
        wanted: list[Asked],
        item_bytes: int,
    ) -> Generator[Answer, None, None]:
        """One answer for each, read ahead by this method of the connection. After a daemon that was replaced, the rest."""
        answers: Generator[Answer, None, None] | None = None
        told = 0

        def next_answer() -> Answer:
            nonlocal answers
            if answers is None:
                answers = read(self._session_id, wanted[told:], item_bytes, self.epoch)
            try:
                return next(answers)
            except errors.KvdError:
                answers = None
                raise

        try:
            while told < len(wanted):
                answer = self.call(next_answer)
                told += 1
                yield answer
        finally:
            if answers is not None:
                answers.close()

    def token_ids(self) -> bytes:
        """Of all chunks, as in TokenIds; empty if some were never told."""
        return self.call(lambda: self.connection.info(self._session_id)).token_ids

    # The whole of it.

    def fork(self, name: str) -> Opened:
        """Another session of the same chunks."""
        return self.call(lambda: self.connection.fork(self._session_id, self.chunks, name, self.epoch))

    def cut(self, chunks: int, tail: int, needed: int) -> list[tuple[int, int, Tensor]]:
        """Takes back the chunks from `chunks` on, and starts an epoch. Nothing is changed if this raises.

        Returns, as all_layers, what the window lacks of chunks tail .. needed-1, which it will hold: needed is one more
        than chunks if a chunk is opened again. Copies.
        """
        generation = self._generation
        try:
            if generation != self.connection.generation:
                self._recover(needed)
            end = min(needed, self._held.window.tail_first // self.geometry.chunk_tokens)
            missing = [(layer, first, tiles.clone()) for layer, first, tiles in self.all_layers(tail, end)]
            self.give_up(chunks)
        except errors.KvdError:
            self._generation = generation
            raise
        return missing

    def give_up(self, chunks: int) -> None:
        """Takes back the chunks from `chunks` on, whatever they hold."""
        self.call(lambda: self._truncate(chunks))
        self.chunks = chunks
        self.durable_chunks = min(self.durable_chunks, chunks)

    def close(self) -> None:
        self.call(lambda: self.connection.close(self._session_id))

    def delete(self) -> None:
        self.call(lambda: self.connection.delete(self._session_id))

    # A daemon that was replaced.

    def call(self, call: Callable[[], Answer]) -> Answer:
        """Makes a call; if the daemon was replaced, finds or makes the session there first. Raises: SessionLost."""
        for _ in range(RECOVERIES_MAX):
            if self._generation != self.connection.generation:
                self._recover()
            try:
                return call()
            except (errors.SessionNotFound, errors.KeyOutOfRange, errors.AppendOutOfOrder):
                # What a daemon says that forgot something; or our own caller's mistake.
                if self._generation == self.connection.generation and not self.connection.notice_replacement():
                    raise
        raise errors.Unavailable(f"the daemon was replaced {RECOVERIES_MAX} times during one call: look at its log")

    def _recover(self, needed: int | None = None) -> None:
        """needed: chunks that must be there again, if not all: the others are about to be taken back."""
        # Kept only at the end: if this is cut short, or the daemon is replaced again, the next call comes back here.
        generation = self.connection.generation
        chunk_tokens = self.geometry.chunk_tokens
        end = self.chunks if needed is None else needed
        if not self.name and (end or needed is None):
            raise errors.SessionLost("", [(0, self.tokens)])
        opened = self.connection.open(self.name, self.geometry, tenant=self.tenant, ttl_s=self.ttl_s)
        if opened.epoch != self.epoch and not opened.created and needed is None:
            raise errors.StaleEpoch(
                f"session {self.name!r} is at epoch {opened.epoch}, not {self.epoch}: somebody else took tokens back; "
                "open it again"
            )
        self._session_id, self.epoch = opened.session_id, opened.epoch
        # Chunks may be durable whose summaries are not: no flush of ours returned since they were put.
        unsure = self.durable_chunks
        self.durable_chunks = opened.durable_chunk_count
        lost = [
            chunk
            for chunk in range(opened.chunk_count, end)
            if not self._held.window.holds(chunk * chunk_tokens, (chunk + 1) * chunk_tokens)
        ]
        if lost:
            raise errors.SessionLost(self.name, token_ranges(lost, chunk_tokens))
        logger.warning(
            "session %r found again with %d of %d chunks; the others are appended again",
            self.name,
            opened.chunk_count,
            self.chunks,
        )
        for chunk in range(opened.chunk_count, end):
            self._append(chunk, chunk + 1)
        unsure = min(unsure, opened.chunk_count)
        if unsure < end:
            self._put_routing(unsure, end)
        self._held.routing.doubt_basis(unsure)
        self._held.stats.recoveries += 1
        self._generation = generation

    # One call, as it is made again.

    def _append(self, first: int, end: int) -> None:
        """Builds the payload of chunks first .. end-1 from the window, and appends it."""
        started = time.perf_counter()
        geometry, held = self.geometry, self._held
        payload = self.connection.append_buffer((end - first) * geometry.chunk_bytes)
        shape = (
            end - first,
            geometry.layers,
            geometry.kv_heads,
            geometry.groups_per_chunk,
            2,
            geometry.group_tokens,
            geometry.head_dim,
        )
        landing = torch.from_numpy(payload)
        if self._carrier is not None:
            self._carrier.reach(self.connection.landing)
        # On the CPU extents are built where the daemon reads them; on a GPU beside the model, and then copied once.
        in_place = held.device.type == "cpu" and not self.rounds
        extents = (
            landing.view(held.dtype).view(shape)
            if in_place
            else torch.empty(shape, dtype=held.dtype, device=held.device)
        )
        span = (first * geometry.chunk_tokens, end * geometry.chunk_tokens)
        tokens = held.window.span(*span)
        # [layers, K and V, kv_heads, chunks, groups, group_tokens, head_dim]
        blocks = (end - first, geometry.groups_per_chunk, geometry.group_tokens)
        apart = tokens.view(*tokens.shape[:3], *blocks, geometry.head_dim).permute(3, 0, 2, 4, 1, 5, 6)
        extents.copy_(apart)
        if self.rounds:
            codes = pack(extents.flatten(5))
            landing.copy_(codes.view(-1))
            extents = unpack(codes, held.dtype).view(shape)
        elif not in_place:
            landing.view(held.dtype).view(shape).copy_(extents)
        entries = held.routing.make(first, extents[:, :, :, :, 0])
        ids = held.ids.span(*span)
        self.connection.append(self._session_id, first, end - first, payload, ids, epoch=self.epoch)
        if self.rounds:
            apart.copy_(extents)
        held.routing.put(first, entries)
        held.stats.append_s += time.perf_counter() - started

    def _put_routing(self, first: int, end: int) -> None:
        end = min(end, self._held.routing.count or 0)
        if end <= first:
            return
        payload = self._held.routing.packed(first, end)
        try:
            self.connection.put_summaries(
                self._session_id, self._held.routing.kind, first, end - first, payload, epoch=self.epoch
            )
        except errors.LimitExceeded as error:
            # They are in memory here; only a later resume has to compute them again.
            logger.warning("summaries of chunks %d to %d are not stored: %s", first, end - 1, error)

    def _flush_everything(self) -> int:
        durable = self.connection.flush(self._session_id)
        if durable < self.chunks:
            # A daemon replaced between two calls may have forgotten chunks that no call has missed yet.
            raise errors.SessionNotFound(f"the daemon holds {durable} of the {self.chunks} chunks appended to it")
        return durable

    def _truncate(self, chunks: int) -> None:
        try:
            self.epoch = self.connection.truncate(self._session_id, chunks, self.epoch)
        except errors.WriteFailed as error:
            # It is done, and a flush will say again what is wrong with the device.
            self.epoch += 1
            logger.warning("chunks from %d on may come back when the daemon is restarted: %s", chunks, error)
