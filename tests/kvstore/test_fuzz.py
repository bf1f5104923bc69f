"""Whatever the bytes are, on disk or on the wire: accepted, or the one right error; no crash, hang or unbounded memory.

Stores are mutated from a valid one, also with their checksums put right, so that what lies behind a checksum meets bad
bytes too. Messages are drawn from the descriptors of the service, so a new call is fuzzed without being named here.
"""

from __future__ import annotations

import contextlib
import random
import struct
from functools import cache
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from conftest import Daemons
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message_factory import GetMessageClass
from hga_kvd.checksum import checksum
from hga_kvd.config import Settings
from hga_kvd.engine import Engine
from hga_kvd.errors import KvdError, StartRefused
from hga_kvd.format import (
    BLOCK_BYTES,
    FRAME_HEAD_BYTES,
    BadBytes,
    check_frame,
    decode_frame_header,
    decode_segment_header,
    decode_table,
)
from hga_kvd.geometry import KEY_DTYPE
from hga_kvd.manifest import decode_manifest
from hga_kvd.testing.simdisk import SimDisk
from hga_kvd.testing.simulation import SMALL, TINY, frames_of
from hga_kvd.testing.trial import Trial
from hga_kvd_proto.v1 import kvd_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

KIB, MIB = 1 << 10, 1 << 20
SEGMENT = "segment-00000001.kvs"
SETTINGS = Settings(ram=2 * MIB, segment_bytes=256 * KIB, nvme_reserve=0)
FUZZ = settings(max_examples=150)

edits = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=8)
words = st.lists(
    st.tuples(st.integers(0, 40), st.sampled_from((0, 1, 2, 255, 1 << 31, (1 << 32) - 1, 1 << 62, (1 << 64) - 1))),
    min_size=1,
    max_size=3,
)


@cache
def store() -> tuple[bytes, bytes]:
    """(MANIFEST, a segment) of sessions that share chunks, are truncated, have summaries."""
    disk = SimDisk()
    trial = Trial(Engine(SETTINGS, disk, background=False), 3, (SMALL, TINY))
    while len(frames_of(1, disk.get(SEGMENT) if SEGMENT in disk.names() else b"")) < 8:
        trial.step()
    trial.run(5)
    disk = disk.kill()
    return disk.get("MANIFEST"), disk.get(SEGMENT)


def edited(content: bytes, changes: list[tuple[int, int]]) -> bytearray:
    changed = bytearray(content)
    for at, value in changes:
        changed[at % len(changed)] = value
    return changed


def sealed_manifest(content: bytes) -> bytes:
    """With its length and checksum right."""
    head = content[:12] + struct.pack("<I", len(content) - 24)
    return head + struct.pack("<Q", checksum(head + content[24:])) + content[24:]


def sealed_frames(content: bytearray) -> bytes:
    """With the checksum of every frame right."""
    for frame in frames_of(1, store()[1]):
        at = frame.header.offset
        table = bytes(
            content[at + FRAME_HEAD_BYTES : at + FRAME_HEAD_BYTES + struct.unpack_from("<I", content, at + 60)[0]]
        )
        content[at + 88 : at + 96] = struct.pack("<Q", checksum(bytes(content[at : at + 88]) + table))
    return bytes(content)


def start(manifest: bytes, segment: bytes) -> None:
    """A daemon on these files: refused, or it serves what it says it has, without any other error."""
    disk = SimDisk()
    disk.put("MANIFEST", manifest)
    disk.put(SEGMENT, segment)
    try:
        engine = Engine(SETTINGS, disk, background=False)
    except StartRefused:
        assert disk.get("MANIFEST") == manifest
        return
    for info in engine.list():
        try:
            engine.info(info.session_id)
            engine.get_summaries(info.session_id, "k.v1", 0, 1, MIB, info.epoch)
        except KvdError:
            pass
        keys = np.zeros(min(info.chunk_count, 40), KEY_DTYPE)
        keys["group"] = np.arange(len(keys)) * info.geometry.groups_per_chunk
        engine.fetch(info.session_id, keys, np.zeros(len(keys) * info.geometry.record_bytes, np.uint8), info.epoch)
        engine.delete(info.session_id)
    new = engine.open("new", SMALL, create=True)
    engine.append(new.session_id, 0, 1, np.zeros(SMALL.chunk_bytes, np.uint8), b"")
    assert engine.flush(new.session_id) == 1
    engine.shutdown()


def decoded(segment: bytes) -> None:
    """Every block as a frame."""
    for offset in range(BLOCK_BYTES, len(segment), BLOCK_BYTES):
        try:
            header = decode_frame_header(segment[offset : offset + BLOCK_BYTES], 1, offset, len(segment))
            decode_table(header, check_frame(header, segment[offset : offset + header.head_bytes]))
        except BadBytes:
            continue


@FUZZ
@given(st.binary(max_size=600))
def test_random_bytes(content: bytes) -> None:
    for decode in (decode_manifest, decode_segment_header):
        try:
            decode(content)
        except BadBytes:
            continue
    decoded(bytes(BLOCK_BYTES) + content)


@FUZZ
@given(edits, st.booleans(), st.integers(0, 1 << 12))
def test_an_edited_manifest(changes: list[tuple[int, int]], sealed: bool, cut: int) -> None:
    content = bytes(edited(store()[0], changes))
    content = content[: len(content) - cut] if cut < 64 else content
    content = sealed_manifest(content) if sealed and len(content) > 24 else content
    with contextlib.suppress(BadBytes):
        decode_manifest(content)
    start(content, store()[1])


@FUZZ
@given(st.data())
def test_a_manifest_with_other_numbers(data: st.DataObject) -> None:
    """Valid JSON, valid checksum, absurd values."""
    content = store()[0]
    text = content[24:].decode()
    numbers = [i for i in range(1, len(text)) if text[i].isdigit() and text[i - 1] in ":[,"]
    at = data.draw(st.sampled_from(numbers))
    value = data.draw(
        st.sampled_from(("0", "1", "-1", "4294967295", "1e400", "9223372036854775807", "null", '"x"', "[]"))
    )
    end = next(i for i in range(at, len(text)) if not text[i].isdigit())
    start(sealed_manifest(content[:24] + (text[:at] + value + text[end:]).encode()), store()[1])


@FUZZ
@given(edits, st.booleans())
def test_an_edited_segment(changes: list[tuple[int, int]], sealed: bool) -> None:
    content = edited(store()[1], changes)
    segment = sealed_frames(content) if sealed else bytes(content)
    decoded(segment)
    start(store()[0], segment)


@FUZZ
@given(st.integers(0, 7), words)
def test_frames_with_other_numbers(which: int, changes: list[tuple[int, int]]) -> None:
    """One frame whose header or table says something absurd, under a right checksum."""
    content = bytearray(store()[1])
    at = frames_of(1, store()[1])[which].header.offset
    for word, value in changes:
        content[at + 4 * word : at + 4 * word + 8] = struct.pack("<Q", value)
    content[at : at + 4] = b"KVFR"
    segment = sealed_frames(content)
    decoded(segment)
    start(store()[0], segment)


# --- the wire ---

_SERVICE = kvd_pb2.DESCRIPTOR.services_by_name["Kvd"]
_NUMBERS = (0, 1, 2, 3, 16, 63, 64, 4096, (1 << 31) - 1, (1 << 32) - 1, 1 << 63, (1 << 64) - 1)
_ANSWERS = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.OUT_OF_RANGE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.UNIMPLEMENTED,
}
MESSAGES = 80
RESIDENT_BYTES_MAX = (64 + 200) * MIB


def drawn(chance: random.Random, descriptor: Any, sessions: list[int], depth: int = 0) -> Any:
    """A message whose fields are absent, ordinary or absurd."""
    message = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if chance.random() < 0.25:
            continue
        values = [
            _value(chance, field, sessions, depth) for _ in range(chance.choice((1, 3)) if field.is_repeated else 1)
        ]
        if field.is_repeated:
            getattr(message, field.name).extend(values)
        elif field.type == FieldDescriptor.TYPE_MESSAGE:
            getattr(message, field.name).CopyFrom(values[0])
        else:
            setattr(message, field.name, values[0])
    return message


def _value(chance: random.Random, field: Any, sessions: list[int], depth: int) -> Any:
    if field.type == FieldDescriptor.TYPE_MESSAGE:
        if field.message_type.name == "Geometry" and chance.random() < 0.5:
            return kvd_pb2.Geometry(layers=1, kv_heads=1, head_dim=8, dtype="float16", chunk_tokens=16, group_tokens=8)
        return drawn(chance, field.message_type, sessions, depth + 1)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return chance.randbytes(chance.choice((0, 1, 7, 8, 64, 512, 5000)))
    if field.type == FieldDescriptor.TYPE_STRING:
        return chance.choice(("", "a", "b", "k.v1", "float16", "x" * 300, "\0", "é" * 90, "../../etc"))
    if field.type == FieldDescriptor.TYPE_BOOL:
        return chance.random() < 0.5
    if field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
        return chance.choice((0.0, -1.0, float("nan"), float("inf")))
    if field.name == "session_id" and sessions and chance.random() < 0.6:
        return chance.choice(sessions)
    small = field.type in (FieldDescriptor.TYPE_UINT32, FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_ENUM)
    limit = (1 << 31) - 1 if field.type in (FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_ENUM) else (1 << 64) - 1
    numbers = [n for n in _NUMBERS if n <= (min(limit, (1 << 32) - 1) if small else limit)]
    if field.type in (FieldDescriptor.TYPE_INT64, FieldDescriptor.TYPE_SINT64):
        numbers = [n for n in numbers if n < 1 << 63]
    return chance.choice(numbers)


def _encoded(chance: random.Random, descriptor: Any, sessions: list[int], raw: bool) -> bytes:
    encoded: bytes = drawn(chance, descriptor, sessions).SerializeToString()
    return chance.randbytes(chance.randint(1, 60)) if raw else encoded


def _answer(call: Any, request: Any) -> Any:
    try:
        call(request, timeout=20)
    except grpc.RpcError as error:
        return error.code() if error.details() else None
    return grpc.StatusCode.OK


@pytest.fixture(scope="module")
def target(module_daemon: Daemons) -> Any:
    return module_daemon("--nvme-max", "64MiB", environment={"HGA_KVD_SEGMENT_BYTES": "1MiB"})


@pytest.mark.parametrize("method", [m.name for m in _SERVICE.methods])
def test_every_message(target: Any, method: str) -> None:
    chance = random.Random(f"fuzz {method}")
    descriptor = _SERVICE.methods_by_name[method]
    path = f"/{_SERVICE.full_name}/{method}"
    answers: set[Any] = set()
    with grpc.insecure_channel(target.target) as channel:
        opened = channel.unary_unary(
            f"/{_SERVICE.full_name}/Open", response_deserializer=kvd_pb2.OpenResponse.FromString
        )
        geometry = kvd_pb2.Geometry(layers=1, kv_heads=1, head_dim=8, dtype="float16", chunk_tokens=16, group_tokens=8)
        request = kvd_pb2.OpenRequest(name="a", geometry=geometry, create=True)
        sessions = [opened(request.SerializeToString(), timeout=20).session_id]
        unary, stream = channel.unary_unary(path), channel.stream_unary(path)
        for _ in range(MESSAGES):
            raw = chance.random() < 0.15
            count = chance.randint(0, 3) if descriptor.client_streaming else 1
            messages = [_encoded(chance, descriptor.input_type, sessions, raw) for _ in range(count)]
            answer = _answer(stream, iter(messages)) if descriptor.client_streaming else _answer(unary, messages[0])
            allowed = _ANSWERS | ({grpc.StatusCode.INTERNAL} if raw else set())
            assert answer in allowed, f"{method} {messages}: {answer}"
            answers.add(answer)
        stat = channel.unary_unary(f"/{_SERVICE.full_name}/Stat")
        assert stat(b"", timeout=20)
    assert answers & _ANSWERS
    assert "Traceback" not in target.log()
    resident = next(
        line for line in Path(f"/proc/{target.pid}/status").read_text().splitlines() if line.startswith("VmRSS")
    )
    assert int(resident.split()[1]) << 10 < RESIDENT_BYTES_MAX
