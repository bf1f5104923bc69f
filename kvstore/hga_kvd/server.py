"""The gRPC server around the service: addresses, threads, health, reflection.

Bound at construction, answering from `start` on; health says SERVING only between `start` and `stop`.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from hga_kvd_proto.v1 import kvd_pb2, kvd_pb2_grpc

from hga_kvd.config import KIB, Settings
from hga_kvd.errors import StartRefused
from hga_kvd.geometry import KEY_DTYPE
from hga_kvd.service import KvdService

NAME = kvd_pb2.DESCRIPTOR.services_by_name["Kvd"].full_name

# What a message may hold beside its payload: geometry texts, token ids of a short append.
MESSAGE_SLACK_BYTES = 64 * KIB
# Calls that wait for a thread, for each thread. More are refused by gRPC with RESOURCE_EXHAUSTED.
WAITING_CALLS_PER_THREAD = 64
# Calls of one connection that are not answered, or whose answer it has not read. More wait on its own side.
STREAMS_MAX = 64


class Server:
    def __init__(self, service: KvdService, settings: Settings) -> None:
        """Raises: StartRefused when an address cannot be bound."""
        # Fetch keys and the payload of one message must both pass.
        receive_bytes_max = max(settings.message_bytes_max, settings.fetch_keys_max * KEY_DTYPE.itemsize)
        self._threads = ThreadPoolExecutor(settings.rpc_threads, thread_name_prefix="rpc")
        self._grpc = grpc.server(
            self._threads,
            maximum_concurrent_rpcs=settings.rpc_threads * WAITING_CALLS_PER_THREAD,
            options=(
                ("grpc.max_receive_message_length", receive_bytes_max + MESSAGE_SLACK_BYTES),
                ("grpc.max_send_message_length", settings.message_bytes_max + MESSAGE_SLACK_BYTES),
                ("grpc.max_concurrent_streams", STREAMS_MAX),
                ("grpc.so_reuseport", 0),  # else a second daemon would silently share the port
                # A peer whose host is gone is noticed within 40 s.
                ("grpc.keepalive_time_ms", 30_000),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ),
        )
        self._health = health.HealthServicer()
        for name in ("", NAME):
            self._health.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
        kvd_pb2_grpc.add_KvdServicer_to_server(service, self._grpc)  # type: ignore[no-untyped-call]
        # Fetch makes its answer itself; this takes the place of what the line above registered for it.
        fetch = grpc.unary_unary_rpc_method_handler(service.Fetch, kvd_pb2.FetchRequest.FromString, None)
        self._grpc.add_registered_method_handlers(NAME, {"Fetch": fetch})  # type: ignore[attr-defined]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        reflection.enable_server_reflection((NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), self._grpc)
        self.targets = tuple(self._bind(target) for target in settings.listen)

    def _bind(self, target: str) -> str:
        try:
            port = self._grpc.add_insecure_port(target)
        except RuntimeError as error:
            raise StartRefused(
                f"cannot listen on {target}: the address is in use, or not of this host; give another --listen"
            ) from error
        if target.startswith("unix:"):
            os.chmod(target.removeprefix("unix:"), 0o600)
            return target
        return f"{target.rpartition(':')[0]}:{port}"

    def start(self) -> None:
        self._grpc.start()
        for name in ("", NAME):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    def stop(self, grace_s: float) -> None:
        """Takes no new calls, gives those in flight `grace_s`, then ends them. No call runs when this returns."""
        self._health.enter_graceful_shutdown()
        self._grpc.stop(grace_s).wait()
        self._threads.shutdown()
