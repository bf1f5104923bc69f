"""`hga-kvd dump`: the manifest, the segments and the frames of a store, for people who look for what went wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hga_kvd.commands.store import store_at
from hga_kvd.commands.units import size
from hga_kvd.format import ChunkFrame, Frame, SummaryFrame
from hga_kvd.survey import survey


def dump(directory: Annotated[Path, typer.Argument(metavar="DIR", help="A store on which no daemon runs.")]) -> None:
    """Lists manifest, segments and frames of a store, as its tables tell; bodies are not read."""
    with store_at(directory) as disk:
        found = survey(disk, bodies=False)
    for fault in found.faults:
        print(fault)
    manifest = found.manifest
    if manifest is not None:
        print(f"manifest{' (the copy)' if found.from_copy else ''}: {'clean' if manifest.clean else 'not clean'}")
        print(
            f"  next session {manifest.next_session_id}, chunk {manifest.next_chunk_uid}, segment {manifest.next_segment_id}"
        )
        for s in manifest.sessions:
            g = s.geometry
            told = f"{s.chunk_count} chunks or more, epoch {s.epoch}"
            print(f"  session {s.session_id} {s.name!r}: {told}; {g.layers} x {g.kv_heads} x {g.head_dim} {g.dtype}")
    for segment in found.segments:
        state = segment.state or "not in the manifest"
        print(f"{segment.name}: {state}, {size(segment.size)}, used {size(segment.used_bytes)}")
        for line in (*segment.faults, *segment.notes):
            print(f"  {line}")
        for frame in segment.frames:
            print(f"  {_line(frame)}")


def _line(frame: Frame) -> str:
    h = frame.header
    at = f"{h.offset:>12} {h.frame_bytes:>10} #{h.sequence}"
    if isinstance(frame, SummaryFrame):
        chunks = f"{len(frame.uids)} chunks from uid {frame.uids[0]} on"
        return f"{at} summaries {frame.kind!r}, {frame.bytes_per_chunk} bytes each, of {chunks}"
    whose = f"session {h.session_id}, epoch {h.epoch}, chunks {h.first_chunk} to {h.first_chunk + h.chunk_count - 1}"
    if isinstance(frame, ChunkFrame):
        return f"{at} chunks of {whose}, uids from {frame.uids[0]} on"
    return f"{at} link of {whose}"
