"""The wire as tests see it: a small geometry, payloads with an oracle, and the least client, straight on the stubs."""

import mmap
import os
import socket

import grpc
import numpy as np
import pytest
from hga_kvd.geometry import KEY_DTYPE, Geometry
from hga_kvd.service import ERROR_KEY
from hga_kvd_proto.v1 import kvd_pb2

MIB = 1 << 20
GEOMETRY = Geometry(layers=2, kv_heads=2, head_dim=16, dtype="bfloat16", rope="10000", model_fingerprint="m")
MESSAGE = kvd_pb2.Geometry(
    layers=2, kv_heads=2, head_dim=16, dtype="bfloat16", chunk_tokens=64, group_tokens=16, rope="10000",
    model_fingerprint="m",
)  # fmt: skip


def payload_of(chunks, seed=0, geometry=GEOMETRY):
    return np.random.default_rng(seed).integers(0, 256, chunks * geometry.chunk_bytes, np.uint8)


def records_of(payload, keys, geometry=GEOMETRY):
    """The oracle: records as they lie in the payload."""
    parts = payload.reshape(-1, geometry.layers, geometry.kv_heads, geometry.groups_per_chunk, geometry.record_bytes)
    chunk, group = np.divmod(keys["group"], geometry.groups_per_chunk)
    return parts[chunk, keys["layer"], keys["kv_head"], group]


def all_keys(chunks, geometry=GEOMETRY):
    shape = (geometry.layers, geometry.kv_heads, chunks * geometry.groups_per_chunk)
    layer, head, group = (axis.ravel() for axis in np.indices(shape))
    keys = np.empty(layer.size, KEY_DTYPE)
    keys["layer"], keys["kv_head"], keys["group"] = layer, head, group
    return keys


def open_session(stub, name="s", client_id=0):
    return stub.Open(kvd_pb2.OpenRequest(name=name, geometry=MESSAGE, create=True, client_id=client_id))


def parts(session_id, payload, first=0, chunks=1, *, part_bytes=1000, token_ids=b""):
    yield kvd_pb2.AppendRequest(
        header=kvd_pb2.AppendHeader(session_id=session_id, first_chunk=first, chunk_count=chunks, token_ids=token_ids)
    )
    data = payload.tobytes()
    for start in range(0, len(data), part_bytes):
        yield kvd_pb2.AppendRequest(payload=data[start : start + part_bytes])


def append(stub, session_id, payload, first=0, **options):
    chunks = options.pop("chunks", payload.size // GEOMETRY.chunk_bytes)
    return stub.Append(parts(session_id, payload, first, chunks, **options), timeout=20).chunk_count


def refused(call, *arguments, **options):
    """(status, sentence, name of the meaning) of a call that must be refused."""
    with pytest.raises(grpc.RpcError) as raised:
        call(*arguments, **options)
    error = raised.value
    meaning = dict(error.trailing_metadata() or ()).get(ERROR_KEY)
    assert error.details()
    return error.code(), error.details(), meaning


class Client:
    """A minimal shared-memory client."""

    def __init__(self, stub, path, region_bytes=2 * MIB):
        answer = stub.Attach(kvd_pb2.AttachRequest(region_bytes=region_bytes))
        self.client_id = answer.client_id
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(5)
        self.socket.connect(str(path.parent / answer.handover_socket))
        self.socket.sendall(answer.token)
        _, (descriptor,), _, _ = socket.recv_fds(self.socket, 1, 1)
        self.memory = np.frombuffer(mmap.mmap(descriptor, answer.region_bytes), np.uint8)
        os.close(descriptor)

    def range(self, offset, size):
        return kvd_pb2.SharedRange(client_id=self.client_id, offset=offset, bytes=size)
