"""What commands that talk to a running daemon share: which one, and how a refusal is told."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import grpc
import typer
from hga_kvd_proto.v1 import kvd_pb2, kvd_pb2_grpc

from hga_kvd import config

Target = Annotated[
    str | None, typer.Option(metavar="ADDRESS", envvar="HGA_KVD_TARGET", help="Which daemon; default: this user's.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

CALL_TIMEOUT_S = 10


@contextmanager
def daemon_at(target: str | None) -> Iterator[tuple[str, kvd_pb2_grpc.KvdStub]]:
    """(address, stub). A call that fails in here ends the command: one line on stderr, exit code 1."""
    try:
        address = config.parse_target(target) if target else config.default_listen()
    except ValueError as error:
        print(f"hga-kvd: option --target: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    options = (("grpc.max_receive_message_length", -1),)
    with grpc.insecure_channel(address, options=options) as channel:
        try:
            yield address, kvd_pb2_grpc.KvdStub(channel)  # type: ignore[no-untyped-call]
        except grpc.RpcError as error:
            unreachable = error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
            said = (
                f"no answer from {address}: start a daemon with `hga-kvd --listen {address}`, or name another with "
                f"--target ({error.details()})"
                if unreachable
                else error.details()
            )
            print(f"hga-kvd: {said}", file=sys.stderr)
            raise typer.Exit(1) from None


def all_sessions(stub: kvd_pb2_grpc.KvdStub) -> list[kvd_pb2.SessionInfo]:
    sessions: list[kvd_pb2.SessionInfo] = []
    more = True
    while more:
        after = sessions[-1].session_id if sessions else 0
        page = stub.List(kvd_pb2.ListRequest(after_session_id=after), timeout=CALL_TIMEOUT_S)
        sessions += page.sessions
        more = page.more
    return sessions
