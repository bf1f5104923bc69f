"""A daemon of the contract in this process, with faults on order: what a real one rarely does."""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
from hga_kvd_client.geometry import KEY_DTYPE, Geometry
from hga_kvd_proto.v1 import kvd_pb2, kvd_pb2_grpc


class ScriptedDaemon(kvd_pb2_grpc.KvdServicer):
    """sessions survive `restart`; regions do not. `faults`: per call, a list of what to do at the next ones."""

    def __init__(self, directory, message_bytes_max: int = 1 << 20, fetch_keys_max: int = 1000) -> None:
        self.path = directory / "d.sock"
        self.target = f"unix:{self.path}"
        self.message_bytes_max, self.fetch_keys_max = message_bytes_max, fetch_keys_max
        self.sessions = {}  # id -> [geometry, list of chunks, name]
        self.faults = {}  # call -> list of functions of the context; each runs once, before the call
        self.late_faults = {}  # call -> the same, after it has been done
        self.calls = []  # (call, shared?)
        self._under_way, self._over = 0, threading.Condition()
        self.start()

    def start(self) -> None:
        self.regions, self.tokens, self.open_sockets = {}, {}, []
        self.instance = secrets.randbits(64)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(self.path) + ".shm")
        self.listener.listen()
        self.thread = threading.Thread(target=self._hand_over, daemon=True)
        self.thread.start()
        self.threads = ThreadPoolExecutor(8)
        self.server = grpc.server(self.threads, options=[("grpc.max_receive_message_length", -1)])
        kvd_pb2_grpc.add_KvdServicer_to_server(self, self.server)
        self.server.add_insecure_port(self.target)
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()

    def stop(self) -> None:
        self.server.stop(0).wait()
        self.threads.shutdown()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join()
        for each in self.open_sockets:
            each.close()
        for path in (self.path, self.path.with_name(self.path.name + ".shm")):
            path.unlink(missing_ok=True)

    def restart(self) -> None:
        self.stop()
        self.start()

    def _hand_over(self) -> None:
        while True:
            try:
                peer, _ = self.listener.accept()
            except OSError:
                return
            self.open_sockets.append(peer)
            token = peer.recv(16)
            descriptor = self.tokens.pop(token, None)
            if descriptor is None:
                peer.close()
                continue
            socket.send_fds(peer, [b"\0"], [descriptor])
            os.close(descriptor)

    @contextlib.contextmanager
    def _scripted(self, call, context, shared=False):
        self.calls.append((call, shared))
        with self._over:
            self._under_way += 1
        try:
            if self.faults.get(call):
                self.faults[call].pop(0)(context)
            yield
            if self.late_faults.get(call):
                self.late_faults[call].pop(0)(context)
        finally:
            with self._over:
                self._under_way -= 1
                self._over.notify_all()

    def rest(self) -> None:
        """Returns when no call is under way, also none that its client gave up."""
        with self._over:
            assert self._over.wait_for(lambda: not self._under_way, 60)

    def Stat(self, request, context):  # noqa: N802
        with self._scripted("Stat", context):
            answer = kvd_pb2.StatResponse(version="test", instance=self.instance)
            if request.session_id:
                geometry, chunks, name = self.sessions[request.session_id]
                answer.session.CopyFrom(
                    kvd_pb2.SessionInfo(
                        session_id=request.session_id, name=name, geometry=geometry, chunk_count=len(chunks)
                    )
                )
            return answer

    def Attach(self, request, context):  # noqa: N802
        with self._scripted("Attach", context):
            descriptor = os.memfd_create("test")
            os.ftruncate(descriptor, request.region_bytes)
            client_id, token = secrets.randbits(60), secrets.token_bytes(16)
            self.regions[client_id] = np.frombuffer(mmap.mmap(descriptor, request.region_bytes), np.uint8)
            self.tokens[token] = descriptor
            return kvd_pb2.AttachResponse(
                client_id=client_id,
                region_bytes=request.region_bytes,
                handover_socket=self.path.name + ".shm",
                token=token,
            )

    def Open(self, request, context):  # noqa: N802
        with self._scripted("Open", context):
            session_id = next((i for i, s in self.sessions.items() if s[2] == request.name), len(self.sessions) + 1)
            geometry, chunks, name = self.sessions.setdefault(session_id, [request.geometry, [], request.name])
            return kvd_pb2.OpenResponse(
                session_id=session_id,
                name=name,
                geometry=geometry,
                chunk_count=len(chunks),
                message_bytes_max=self.message_bytes_max,
                fetch_keys_max=self.fetch_keys_max,
            )

    def Append(self, requests, context):  # noqa: N802
        header = next(requests).header
        shared = header.HasField("shared")
        with self._scripted("Append", context, shared):
            geometry, chunks, _ = self.sessions[header.session_id]
            chunk_bytes = Geometry.from_proto(geometry).chunk_bytes
            if shared:
                assert header.shared.offset % 4096 == 0
                region = self._region(header.shared, context)
                payload = region[header.shared.offset : header.shared.offset + header.shared.bytes].tobytes()
            else:
                parts = [request.payload for request in requests]
                assert all(len(part) <= self.message_bytes_max for part in parts)
                payload = b"".join(parts)
            assert len(payload) == header.chunk_count * chunk_bytes
            if header.first_chunk != len(chunks):
                context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"chunk {header.first_chunk} is not {len(chunks)}")
            chunks += [payload[i : i + chunk_bytes] for i in range(0, len(payload), chunk_bytes)]
        return kvd_pb2.AppendResponse(chunk_count=len(chunks))

    def Fetch(self, request, context):  # noqa: N802
        shared = request.HasField("shared")
        with self._scripted("Fetch", context, shared):
            geometry, chunks, _ = self.sessions[request.session_id]
            geometry = Geometry.from_proto(geometry)
            keys = np.frombuffer(request.keys, KEY_DTYPE)
            assert len(keys) <= self.fetch_keys_max
            records = b""
            for group, head, layer in keys.tolist():
                chunk, within = divmod(group, geometry.groups_per_chunk)
                if chunk >= len(chunks):
                    context.abort(grpc.StatusCode.OUT_OF_RANGE, f"group {group}")
                place = (layer * geometry.kv_heads + head) * geometry.groups_per_chunk + within
                records += chunks[chunk][place * geometry.record_bytes : (place + 1) * geometry.record_bytes]
            if not shared:
                assert len(records) <= self.message_bytes_max
                return kvd_pb2.FetchResponse(payload=records, ram_records=len(keys))
            region = self._region(request.shared, context)
            region[request.shared.offset : request.shared.offset + len(records)] = np.frombuffer(records, np.uint8)
            return kvd_pb2.FetchResponse(nvme_records=len(keys))

    def _region(self, shared, context):
        if shared.client_id not in self.regions:
            context.set_trailing_metadata((("hga-kvd-error", "NotAttached"),))
            context.abort(grpc.StatusCode.UNAVAILABLE, "not attached")
        return self.regions[shared.client_id]


def waits_for(event):
    def wait(context):
        assert event.wait(60)

    return wait


def unavailable(context):
    context.abort(grpc.StatusCode.UNAVAILABLE, "the device answered EIO")
