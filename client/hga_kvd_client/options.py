"""What a user of a session chooses, and what it must know of the model's RoPE. Frozen values, checked when made."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from hga_kvd_client.errors import InvalidRequest


@dataclass(frozen=True)
class SessionOptions:
    """Raises InvalidRequest when a number cannot work."""

    # "hga": the paper's rule (DESIGN section 6). "all": every stored group is opened; dense attention, for tests.
    router: Literal["hga", "all"] = "hga"
    # The published setting: 20 chunks, then 16 groups, for each query head; 2 sink and 8 recent chunks always attended.
    topk_chunks: int = 20
    topk_groups: int = 16
    sink_chunks: int = 2
    recent_chunks: int = 8
    # Per layer and KV head. On real traces 128 answer 96 to 98 % of opened groups, 64 answer 90 to 95 %.
    bank_groups: int = 128
    # Chunks of stored K/V that exact prefill holds at once, of one layer.
    prefill_tile_chunks: int = 16
    # A named session is flushed when this many chunks are not yet durable. What a crash of the daemon can take away
    # must still be in the window, so at most recent_chunks.
    flush_chunks: int = 4

    def __post_init__(self) -> None:
        if self.router not in ("hga", "all"):
            raise InvalidRequest(f"router is {self.router!r}; it must be 'hga' or 'all'")
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "sink_chunks" else 1
            if field.name != "router" and (not isinstance(value, int) or value < least):
                raise InvalidRequest(f"{field.name} is {value!r}; it must be a whole number from {least} on")
        if self.flush_chunks > self.recent_chunks:
            raise InvalidRequest(
                f"flush_chunks is {self.flush_chunks}, more than recent_chunks {self.recent_chunks}: chunks that are "
                "not yet durable must still be in the window"
            )


@dataclass(frozen=True)
class Rope:
    """RoPE of a model: pair i is the dims (i, i + rotary_dim/2), as in Llama; dims from rotary_dim on are not rotated.

    inv_freq: angle per token of each pair, [rotary_dim / 2], after any scaling (YaRN, NTK, llama3).
    """

    inv_freq: tuple[float, ...]
    rotary_dim: int

    def __post_init__(self) -> None:
        if self.rotary_dim != 2 * len(self.inv_freq):
            raise InvalidRequest(
                f"rotary_dim is {self.rotary_dim}, but inv_freq has {len(self.inv_freq)} values: one a pair is needed"
            )

    def text(self) -> str:
        """Canonical text for Geometry.rope. Six digits: two devices may differ in the last bits."""
        return f"half-split {self.rotary_dim}: " + " ".join(f"{f:.6g}" for f in self.inv_freq)
