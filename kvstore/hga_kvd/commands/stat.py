"""`hga-kvd stat`: the counters and sessions of a running daemon."""

from __future__ import annotations

import json
from typing import Any

from hga_kvd_proto.v1 import kvd_pb2
from rich.table import Table
from rich.text import Text

from hga_kvd.commands import units
from hga_kvd.commands.remote import CALL_TIMEOUT_S, AsJson, Target, all_sessions, daemon_at
from hga_kvd.commands.units import size
from hga_kvd.geometry import Geometry


def stat(target: Target = None, as_json: AsJson = False) -> None:
    """Shows the counters and sessions of a running daemon."""
    with daemon_at(target) as (address, stub):
        stats = stub.Stat(kvd_pb2.StatRequest(), timeout=CALL_TIMEOUT_S)
        sessions = all_sessions(stub)
    if as_json:
        print(json.dumps({**_plain(stats), "session_list": [_plain(session) for session in sessions]}, indent=2))
    else:
        _show(address, stats, sessions)


def _plain(message: Any) -> dict[str, Any]:
    """Fields under their names in the proto, numbers as numbers: protobuf's own JSON writes 64-bit ones as strings."""
    values = {}
    for field in message.DESCRIPTOR.fields:
        if field.is_repeated:  # of one session only; no part of the counters
            continue
        value = getattr(message, field.name)
        if field.message_type is None and not isinstance(value, bytes):
            values[field.name] = value
        elif field.message_type is not None and message.HasField(field.name):
            values[field.name] = _plain(value)
    return values


def _show(address: str, stats: kvd_pb2.StatResponse, sessions: list[kvd_pb2.SessionInfo]) -> None:
    console = units.console()
    up = int(stats.uptime_s)
    facts = Table(show_header=False, box=None, title=f"hga-kvd {stats.version} at {address}", title_justify="left")
    for name, value in (
        ("up", f"{up // 3600}:{up // 60 % 60:02}:{up % 60:02}"),
        ("I/O engine", stats.io_engine),
        ("native code", stats.native),
        (
            "RAM",
            f"{size(stats.ram_bytes_used)} of {size(stats.ram_bytes_max)}, {size(stats.ram_bytes_dirty)} to write",
        ),
        (
            "NVMe",
            f"{size(stats.nvme_bytes_used)} of {size(stats.nvme_bytes_max)}, {size(stats.written_bytes)} written",
        ),
        ("appended", f"{size(stats.appended_bytes)}, {stats.flushes} flushes"),
        (
            "fetched",
            f"{stats.fetches} calls; RAM {stats.fetched_ram_records} records, {size(stats.fetched_ram_bytes)}; "
            f"NVMe {stats.fetched_nvme_records} records, {size(stats.fetched_nvme_bytes)}",
        ),
        ("chunks", f"{stats.chunks} stored, {stats.shared_chunks} appended that were stored already"),
        (
            "evicted",
            f"{stats.evicted_extents} extents, {stats.evicted_sessions} sessions; {stats.expired_sessions} expired",
        ),
        ("damaged", f"{stats.damaged_records} records"),
        ("clients", f"{stats.attached_clients} with shared memory"),
    ):
        facts.add_row(name, value)
    console.print(facts)
    table = Table(title=f"{len(sessions)} sessions", title_justify="left")
    for heading in ("id", "name", "tokens", "durable", "K/V", "geometry", "damaged", "epoch", "tenant", "kept"):
        table.add_column(heading, justify="left" if heading in ("name", "geometry", "tenant", "kept") else "right")
    for session in sessions:
        g = session.geometry
        chunk_bytes = Geometry(g.layers, g.kv_heads, g.head_dim, g.dtype, g.chunk_tokens, g.group_tokens).chunk_bytes
        table.add_row(
            str(session.session_id),
            Text("(temporary)", style="dim") if session.temporary else Text(session.name),
            str(session.chunk_count * g.chunk_tokens),
            str(session.durable_chunk_count * g.chunk_tokens),
            size(session.chunk_count * chunk_bytes),
            f"{g.layers} x {g.kv_heads} x {g.head_dim} {g.dtype}",
            str(session.damaged_records),
            str(session.epoch),
            Text(session.tenant),
            ", ".join(
                word
                for word, is_so in (
                    ("pinned", session.pinned),
                    ("parked", session.parked),
                    (f"{session.ttl_s} s", session.ttl_s > 0),
                )
                if is_so
            ),
        )
    if sessions:
        console.print(table)
