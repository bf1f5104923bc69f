"""What a user of a session chooses, and what it must know of the model's RoPE. Frozen values, checked when made."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

from hga_kvd_client.errors import InvalidRequest
from hga_kvd_client.geometry import Geometry


@dataclass(frozen=True)
class SessionOptions:
    """Raises InvalidRequest when a number cannot work."""

    # DESIGN section 6. "sketch": a few bits of every key, one budget of groups a layer. "hga": the paper's rule. "auto":
    # sketch while it fits routing_bytes_max, else hga. "all": every stored group is opened; dense attention, for tests.
    router: Literal["auto", "sketch", "hga", "all"] = "auto"
    # hga, the published setting: 20 chunks, then 16 groups, for each query head; pooled: for each KV head.
    topk_chunks: int = 20
    topk_groups: int = 16
    pooled: bool = False
    # sketch: groups opened per KV head, on average over a layer; earlier once this share of attention is covered.
    sketch_groups: int = 16
    cover: float = 1.0
    # Coordinates kept in 4 and in 2 bits; None: a quarter of head_dim each.
    sketch_dims: tuple[int, int] | None = None
    # Prompt tokens that the basis is made of.
    sketch_basis_tokens: int = 2048
    # What sketches may take beside the model: 5.3 % of bf16 K/V, so 400 K tokens of 48 layers of 4 KV heads of 128.
    routing_bytes_max: int = 2 << 30
    # Always attended.
    sink_chunks: int = 2
    recent_chunks: int = 8
    # Per layer and KV head. On real traces 128 answer 96 to 98 % of opened groups, 64 answer 90 to 95 %.
    bank_groups: int = 128
    # "exact": a block of tokens sees everything before it. "routed": each token only what it, or an earlier one of the
    # same 64, would open alone.
    prefill: Literal["exact", "routed"] = "exact"
    # How K and V are stored. "model": as the model has them. "fp8": 8 bits a value and a scale a record (float8.py), half
    # the bytes of bf16 on the wire, in RAM and on disk. Rounded when a chunk closes; a GPU's step is not built for it.
    kv_dtype: Literal["model", "fp8"] = "model"
    # Chunks of stored K/V that exact prefill attends at once, of one layer; on a GPU four times as many.
    prefill_tile_chunks: int = 16
    # A named session is flushed when this many chunks are not yet durable. What a crash of the daemon can take away
    # must still be in the window, so at most recent_chunks.
    flush_chunks: int = 4

    def __post_init__(self) -> None:
        for name, choices in (
            ("router", ("auto", "sketch", "hga", "all")),
            ("prefill", ("exact", "routed")),
            ("kv_dtype", ("model", "fp8")),
        ):
            if getattr(self, name) not in choices:
                raise InvalidRequest(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "sink_chunks" else 1
            if field.type == "int" and (not isinstance(value, int) or value < least):
                raise InvalidRequest(f"{field.name} is {value!r}; it must be a whole number from {least} on")
        if not 0 < self.cover <= 1:
            raise InvalidRequest(f"cover is {self.cover!r}; it must be a share of attention, above 0 and at most 1")
        if self.sketch_dims is not None:
            four, two = self.sketch_dims
            if min(four, two) < 0 or not four + two:
                raise InvalidRequest(
                    f"sketch_dims are {self.sketch_dims}; they must be two counts, one of them above 0"
                )
        if self.flush_chunks > self.recent_chunks:
            raise InvalidRequest(
                f"flush_chunks is {self.flush_chunks}, more than recent_chunks {self.recent_chunks}: chunks that are "
                "not yet durable must still be in the window"
            )

    def stored(self, geometry: Geometry) -> Geometry:
        """The geometry of what the daemon keeps, from the model's: what is rounded is never shared with what is not."""
        if self.kv_dtype == "model":
            return geometry
        fingerprint = f"{geometry.model_fingerprint} {geometry.dtype} in fp8 by 2^n"
        return replace(geometry, dtype="float8_e4m3fn", model_fingerprint=fingerprint)

    def prefill_text(self) -> str:
        """Canonical, for the model's fingerprint: what changes the K/V of a prompt."""
        if self.prefill == "exact":
            return "exact"
        knobs = {
            "hga": f":{self.topk_chunks}:{self.topk_groups}" + (":pooled" if self.pooled else ""),
            "all": "",
        }.get(self.router, f":{self.sketch_groups}:{self.cover:g}:{self.sketch_dims}:{self.sketch_basis_tokens}")
        return f"routed:{self.router}{knobs}:{self.sink_chunks}:{self.recent_chunks}"


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
