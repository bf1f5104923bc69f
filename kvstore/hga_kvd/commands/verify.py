"""`hga-kvd verify`: is what is stored what was appended? Of a running daemon, or of a directory that no daemon has."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from hga_kvd_proto.v1 import kvd_pb2
from rich.console import Console
from rich.table import Table

from hga_kvd.commands import units
from hga_kvd.commands.remote import AsJson, Target, all_sessions, daemon_at
from hga_kvd.commands.store import store_at
from hga_kvd.commands.units import size
from hga_kvd.geometry import KEY_DTYPE, Keys
from hga_kvd.survey import repair, survey

# Reading a large session takes minutes.
VERIFY_TIMEOUT_S = 24 * 3600
PLACES_SHOWN_MAX = 20


def verify(
    directory: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="A store on which no daemon runs.")] = None,
    make_repair: Annotated[bool, typer.Option("--repair", help="Make DIR one that a daemon starts on again.")] = False,
    target: Target = None,
    as_json: AsJson = False,
) -> None:
    """Compares all that is stored with its checksums: in DIR, or (without it) by a running daemon. Exit code 1: damage."""
    if directory is None:
        if make_repair:
            print("hga-kvd: --repair needs DIR, and that no daemon runs on it", file=sys.stderr)
            raise typer.Exit(2)
        sessions = _of_daemon(target)
        report: dict[str, Any] = {"sound": not any(s["damaged"] for s in sessions), "sessions": sessions}
    else:
        report = _of_directory(directory, make_repair)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        show(report)
    raise typer.Exit(0 if report["sound"] else 1)


def _of_daemon(target: str | None) -> list[dict[str, Any]]:
    sessions = []
    with daemon_at(target) as (_, stub):
        for info in all_sessions(stub):
            request = kvd_pb2.VerifyRequest(session_id=info.session_id)
            answer = stub.Verify(request, timeout=VERIFY_TIMEOUT_S)
            keys = np.frombuffer(answer.damaged_keys, KEY_DTYPE)
            sessions.append(
                {
                    "session_id": info.session_id,
                    "name": info.name,
                    "tokens": info.chunk_count * info.geometry.chunk_tokens,
                    "records": answer.checked,
                    "damaged": answer.damaged,
                    "places": places(keys, info.geometry.group_tokens),
                }
            )
    return sessions


def _of_directory(directory: Path, make_repair: bool) -> dict[str, Any]:
    with store_at(directory) as disk:
        found = survey(disk)
        done: list[str] = []
        if make_repair:
            done = repair(disk, found)
            if done:
                found = survey(disk)
    faults = [*found.faults]
    if found.manifest is None and not found.new and not found.refused:
        faults.append("without a manifest or its copy the names and geometries of the sessions are not known")
    elif found.from_copy:
        faults.append("what follows is what the copy and the frames tell; --repair makes a new manifest of it")
    return {
        "sound": found.sound,
        "repaired": done,
        "faults": faults,
        "segments": [
            {
                "name": s.name,
                "state": s.state or "not in the manifest",
                "bytes": s.size,
                "used": s.used_bytes,
                "frames": len(s.frames),
                "faults": s.faults,
                "notes": s.notes,
            }
            for s in found.segments
        ],
        "sessions": [
            {
                "session_id": s.session_id,
                "name": s.name,
                "tokens": s.chunk_count * s.geometry.chunk_tokens,
                "records": s.record_count,
                "damaged": len(s.damaged) + len(s.bad_summaries),
                "places": places(s.damaged, s.geometry.group_tokens)
                + [f"summary {kind!r} of chunk {chunk}" for kind, chunk in s.bad_summaries],
            }
            for s in found.sessions
        ],
    }


def show(report: dict[str, Any]) -> None:
    for line in (*report.get("repaired", ()), *report.get("faults", ())):
        print(line)
    console = units.console()
    segments = report.get("segments", ())
    if segments:
        table = Table(title=f"{len(segments)} segments", title_justify="left")
        for heading in ("name", "state", "size", "used", "frames", "found"):
            left = heading in ("name", "state", "found")
            table.add_column(heading, justify="left" if left else "right", no_wrap=heading == "name")
        for s in segments:
            told = "damaged" if s["faults"] else "a note" if s["notes"] else "sound"
            table.add_row(s["name"], s["state"], size(s["bytes"]), size(s["used"]), str(s["frames"]), told)
        console.print(table)
        for s in segments:
            for line in (*s["faults"], *s["notes"]):
                print(f"{s['name']}: {line}")
    _show_sessions(console, report["sessions"])


def _show_sessions(console: Console, sessions: list[dict[str, Any]]) -> None:
    if sessions:
        table = Table(title=f"{len(sessions)} sessions", title_justify="left")
        for heading in ("id", "name", "tokens", "records", "damaged", "where"):
            table.add_column(heading, justify="left" if heading in ("name", "where") else "right")
        for session in sessions:
            more = len(session["places"]) - PLACES_SHOWN_MAX
            lines = session["places"][:PLACES_SHOWN_MAX] + ([f"and {more} places more"] if more > 0 else [])
            columns = (str(session[name]) for name in ("session_id", "name", "tokens", "records", "damaged"))
            table.add_row(*columns, "\n".join(lines) or "sound")
        console.print(table)
    damaged = sum(bool(session["damaged"]) for session in sessions)
    records = sum(session["records"] for session in sessions)
    print(f"{damaged} of {len(sessions)} sessions are damaged" if damaged else f"{len(sessions)} sessions are sound")
    print(f"{records} records compared")


def places(keys: Keys, group_tokens: int) -> list[str]:
    """`layers 0 to 3, tokens 64 to 127`: token ranges, each with the layers in which any KV head is damaged there."""
    layers_of: dict[int, set[int]] = {}
    for layer, group in zip(keys["layer"].tolist(), keys["group"].tolist(), strict=True):
        layers_of.setdefault(group, set()).add(layer)
    runs: list[tuple[int, int, tuple[int, ...]]] = []
    for group in sorted(layers_of):
        layers = tuple(sorted(layers_of[group]))
        if runs and runs[-1][1] == group and runs[-1][2] == layers:
            runs[-1] = (runs[-1][0], group + 1, layers)
        else:
            runs.append((group, group + 1, layers))
    return [
        f"{_layers(layers)}, tokens {first * group_tokens} to {end * group_tokens - 1}" for first, end, layers in runs
    ]


def _layers(layers: tuple[int, ...]) -> str:
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]} to {layers[-1]}"
    return "layers " + ", ".join(map(str, layers))
