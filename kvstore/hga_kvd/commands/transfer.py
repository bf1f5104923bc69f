"""`hga-kvd export` and `import`: a session of a running daemon as one file, and back.

Both stream: they hold one part (2 MiB) at a time. The file appears under its name when it is whole and synced, or not
at all; the session of a failed import is deleted again.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, BinaryIO, cast

import grpc
import numpy as np
import typer
from hga_kvd_proto.v1 import kvd_pb2, kvd_pb2_grpc

from hga_kvd.archive import (
    BATCH,
    END,
    KV,
    PART_BYTES,
    SUMMARIES,
    BadArchive,
    Head,
    Part,
    encode_head,
    encode_part,
    read_head,
    read_parts,
)
from hga_kvd.codec import CODECS, CodecName
from hga_kvd.commands.remote import CALL_TIMEOUT_S, Target, daemon_at
from hga_kvd.commands.units import size
from hga_kvd.geometry import DTYPE_BYTES, KEY_DTYPE, Geometry, Keys

# One Append of an import; small enough for any arena in use.
BATCH_BYTES = 16 << 20
SUMMARY_CHUNKS = 64  # asked for at once
# The daemon may have to write out before it takes a batch.
APPEND_TIMEOUT_S = 120


class Failed(Exception):
    """Ends the command with this line."""


def export(
    name: Annotated[str, typer.Argument(help="Name of the session.")],
    file: Annotated[Path, typer.Argument(help="The file to make.", dir_okay=False)],
    codec: Annotated[str, typer.Option(metavar="|".join(CODECS), help="How K/V is packed.")] = "zstd",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE if it exists.")] = False,
    target: Target = None,
) -> None:
    """Writes a session of a running daemon to one file: K/V, token ids and routing state."""
    started = time.monotonic()
    with daemon_at(target) as (_, stub), _told():
        chosen = next((known for known in CODECS if known == codec), None)
        if chosen is None:
            raise Failed(f"option --codec: {codec!r} is not one of {', '.join(CODECS)}")
        if file.exists() and not overwrite:
            raise Failed(f"{file} exists: choose another name, or give --overwrite")
        session = stub.Open(kvd_pb2.OpenRequest(name=name), timeout=CALL_TIMEOUT_S)
        with _whole_or_not_at_all(file) as out:
            packed_bytes = _write(stub, session, out, chosen)
    geometry = geometry_of(session.geometry)
    raw_bytes = session.chunk_count * geometry.chunk_bytes
    print(
        f"exported {name}: {session.chunk_count * geometry.chunk_tokens} tokens, {size(raw_bytes)} of K/V, in a file of "
        f"{size(packed_bytes)}, {time.monotonic() - started:.1f} s"
    )


def import_(
    file: Annotated[Path, typer.Argument(help="A file that `hga-kvd export` made.")],
    name: Annotated[str | None, typer.Option(help="Name of the new session; default: the one it had.")] = None,
    target: Target = None,
) -> None:
    """Makes a session of a running daemon out of an exported file."""
    started = time.monotonic()
    with daemon_at(target) as (_, stub), _told(), file.open("rb") as source:
        head = read_head(source)
        given = name or head.name
        if not given:  # a session without one is temporary, and nobody's
            raise Failed(f"{file} does not name its session: give it a --name")
        geometry = kvd_pb2.Geometry(**asdict(head.geometry))
        request = kvd_pb2.OpenRequest(name=given, geometry=geometry, create=True)
        session = stub.Open(request, timeout=CALL_TIMEOUT_S)
        if not session.created:
            raise Failed(f"a session named {given!r} exists: delete it first, or give another --name")
        try:
            _read(stub, session, source, head)
            durable = _flush(stub, session.session_id)
        except BaseException:
            with suppress(grpc.RpcError):
                stub.Delete(kvd_pb2.DeleteRequest(session_id=session.session_id), timeout=CALL_TIMEOUT_S)
            raise
    print(
        f"imported {given}: {head.chunk_count * head.geometry.chunk_tokens} tokens, "
        f"{size(head.chunk_count * head.geometry.chunk_bytes)} of K/V, {time.monotonic() - started:.1f} s, "
        f"{'durable' if durable else 'in RAM only: the daemon has no NVMe'}"
    )


@contextmanager
def _told() -> Iterator[None]:
    """What fails in here is one line on stderr and exit code 1."""
    try:
        yield
    except (Failed, BadArchive, OSError) as error:
        said = str(error)
        if isinstance(error, BadArchive):
            said = f"the file is damaged or not an archive: {error}"
        elif isinstance(error, OSError) and error.filename is not None:
            said = f"{error.filename}: {error.strerror}"
        print(f"hga-kvd: {said}", file=sys.stderr)
        raise typer.Exit(1) from None


@contextmanager
def _whole_or_not_at_all(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name once it is complete and durable. Raises OSError."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as out:
        try:
            yield cast(BinaryIO, out.file)
            out.flush()
            os.fsync(out.fileno())
            Path(out.name).replace(path)
        except BaseException:
            Path(out.name).unlink()
            raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def geometry_of(message: kvd_pb2.Geometry) -> Geometry:
    return Geometry(**{field: getattr(message, field) for field in Geometry.__dataclass_fields__})


# --- export ---


def _write(stub: kvd_pb2_grpc.KvdStub, session: kvd_pb2.OpenResponse, out: BinaryIO, codec: CodecName) -> int:
    """Returns the bytes of the file."""
    geometry = geometry_of(session.geometry)
    written = out.write(encode_head(Head(session.name, geometry, session.chunk_count)))
    for sequence, part in enumerate(_parts(stub, session, geometry)):
        written += out.write(encode_part(part, sequence, codec, DTYPE_BYTES[geometry.dtype]))
    return written


def _parts(stub: kvd_pb2_grpc.KvdStub, session: kvd_pb2.OpenResponse, geometry: Geometry) -> Iterator[Part]:
    count = max(1, BATCH_BYTES // geometry.chunk_bytes)
    tokens = _TokenIds(stub, session.session_id, 4 * geometry.chunk_tokens)
    for first in range(0, session.chunk_count, count):
        chunks = min(count, session.chunk_count - first)
        yield Part(BATCH, first, chunks, tokens.of(first, chunks))
        for payload in _payload(stub, session, geometry, first, chunks):
            yield Part(KV, first, chunks, payload)
    yield from _summaries(stub, session)
    yield Part(END, 0, session.chunk_count)


def _summaries(stub: kvd_pb2_grpc.KvdStub, session: kvd_pb2.OpenResponse) -> Iterator[Part]:
    """Routing state of all kinds, for the runs of chunks that have it."""
    request = kvd_pb2.StatRequest(session_id=session.session_id)
    for kind in stub.Stat(request, timeout=CALL_TIMEOUT_S).summary_kinds:
        has = np.unpackbits(np.frombuffer(kind.chunks, np.uint8), bitorder="little")[: session.chunk_count]
        edges = np.flatnonzero(np.diff(has, prepend=0, append=0))
        for start, end in edges.reshape(-1, 2).tolist():
            first = start
            while first < end:
                ask = kvd_pb2.GetSummariesRequest(
                    session_id=session.session_id, kind=kind.kind, first_chunk=first, epoch=session.epoch,
                    chunk_count=min(end - first, SUMMARY_CHUNKS),
                )  # fmt: skip
                answer = stub.GetSummaries(ask, timeout=APPEND_TIMEOUT_S)
                each = len(answer.payload) // answer.chunk_count
                step = max(1, PART_BYTES // each)
                for at in range(0, answer.chunk_count, step):
                    count = min(step, answer.chunk_count - at)
                    yield Part(SUMMARIES, first + at, count, answer.payload[at * each : (at + count) * each], kind.kind)
                first += answer.chunk_count


def _payload(
    stub: kvd_pb2_grpc.KvdStub, session: kvd_pb2.OpenResponse, geometry: Geometry, first: int, chunks: int
) -> Iterator[bytes]:
    """The K/V of these chunks as one append has it, in pieces of whole records."""
    keys = chunk_keys(geometry, first, chunks)
    step = min(PART_BYTES, session.message_bytes_max) // geometry.record_bytes
    step = max(1, min(step, session.fetch_keys_max))
    for at in range(0, len(keys), step):
        part = keys[at : at + step]
        answer = stub.Fetch(
            kvd_pb2.FetchRequest(session_id=session.session_id, keys=part.tobytes(), epoch=session.epoch),
            timeout=APPEND_TIMEOUT_S,
        )
        bad = np.flatnonzero(np.frombuffer(answer.statuses, np.uint8))
        if len(bad):
            key = part[bad[0]]
            token = int(key["group"]) * geometry.group_tokens
            raise Failed(
                f"session {session.name!r} is damaged at layer {key['layer']}, KV head {key['kv_head']}, tokens {token} "
                f"to {token + geometry.group_tokens - 1}: it cannot be exported whole; `hga-kvd verify` lists the damage"
            )
        yield answer.payload


def chunk_keys(geometry: Geometry, first: int, chunks: int) -> Keys:
    """All records of these chunks, [chunk][layer][kv_head][group]: the order of an append's payload."""
    groups = geometry.groups_per_chunk
    keys = np.empty((chunks, geometry.layers, geometry.kv_heads, groups), KEY_DTYPE)
    keys["layer"] = np.arange(geometry.layers)[:, None, None]
    keys["kv_head"] = np.arange(geometry.kv_heads)[:, None]
    keys["group"] = ((first + np.arange(chunks)) * groups)[:, None, None, None] + np.arange(groups)
    return keys.reshape(-1)


class _TokenIds:
    """Token ids of a session, a page of the daemon's answers at a time."""

    def __init__(self, stub: kvd_pb2_grpc.KvdStub, session_id: int, bytes_per_chunk: int) -> None:
        self._stub, self._session_id, self._size = stub, session_id, bytes_per_chunk
        self._first, self._page = 0, b""

    def of(self, first: int, chunks: int) -> bytes:
        """Empty if unknown. Asked for in ascending order."""
        ids = b""
        while len(ids) < chunks * self._size:
            at = first * self._size + len(ids) - self._first * self._size
            piece = self._page[at : at + chunks * self._size - len(ids)]
            if not piece:
                self._first += at // self._size
                request = kvd_pb2.StatRequest(session_id=self._session_id, first_chunk=self._first)
                self._page = self._stub.Stat(request, timeout=CALL_TIMEOUT_S).session.token_ids
                if not self._page:
                    return b""
                continue
            ids += piece
        return ids


# --- import ---


def _read(stub: kvd_pb2_grpc.KvdStub, session: kvd_pb2.OpenResponse, source: BinaryIO, head: Head) -> None:
    """Raises BadArchive, RpcError."""
    parts = read_parts(source, head)
    for part in parts:
        if part.kind == BATCH:
            _append(stub, session, head, part, parts)
        else:
            stub.PutSummaries(
                kvd_pb2.PutSummariesRequest(
                    session_id=session.session_id,
                    kind=part.summary_kind,
                    first_chunk=part.first_chunk,
                    chunk_count=part.chunk_count,
                    payload=part.payload,
                ),
                timeout=APPEND_TIMEOUT_S,
            )


def _append(
    stub: kvd_pb2_grpc.KvdStub, session: kvd_pb2.OpenResponse, head: Head, batch: Part, parts: Iterator[Part]
) -> None:
    failures: list[BaseException] = []

    def messages() -> Iterator[kvd_pb2.AppendRequest]:
        header = kvd_pb2.AppendHeader(
            session_id=session.session_id,
            first_chunk=batch.first_chunk,
            chunk_count=batch.chunk_count,
            token_ids=batch.payload,
        )
        yield kvd_pb2.AppendRequest(header=header)
        left = batch.chunk_count * head.geometry.chunk_bytes
        while left:
            try:
                payload = next(parts).payload
            except BaseException as error:  # gRPC would say only that there was one
                failures.append(error)
                raise
            left -= len(payload)
            for at in range(0, len(payload), session.message_bytes_max):
                yield kvd_pb2.AppendRequest(payload=payload[at : at + session.message_bytes_max])

    try:
        stub.Append(messages(), timeout=APPEND_TIMEOUT_S)
    except grpc.RpcError:
        if failures:
            raise failures[0] from None
        raise


def _flush(stub: kvd_pb2_grpc.KvdStub, session_id: int) -> bool:
    """False: the daemon has nothing to make it durable on."""
    try:
        stub.Flush(kvd_pb2.FlushRequest(session_id=session_id), timeout=APPEND_TIMEOUT_S)
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.FAILED_PRECONDITION:
            return False
        raise
    return True
