"""What this process holds of a session beside its banks, and what its parts share. Each of these knows nothing of the
others; session.py, stored.py and attending.py use them together."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch

from hga_kvd_client.geometry import Geometry
from hga_kvd_client.options import Rope, SessionOptions
from hga_kvd_client.routing_state import RoutingState
from hga_kvd_client.stats import SessionStats
from hga_kvd_client.token_ids import TokenIds
from hga_kvd_client.window import Window


@dataclass(frozen=True)
class Held:
    """device, dtype: of K and V here."""

    geometry: Geometry
    options: SessionOptions
    device: torch.device
    dtype: torch.dtype
    window: Window
    routing: RoutingState
    ids: TokenIds
    stats: SessionStats

    @classmethod
    def nothing_yet(
        cls, geometry: Geometry, rope: Rope, options: SessionOptions, device: torch.device, dtype: torch.dtype
    ) -> Held:
        window = Window(
            geometry.layers,
            geometry.kv_heads,
            geometry.head_dim,
            geometry.chunk_tokens,
            options.sink_chunks,
            options.recent_chunks,
            dtype,
            device,
        )
        routing = RoutingState(geometry, rope, options, device, dtype)
        return cls(geometry, options, device, dtype, window, routing, TokenIds(), SessionStats())

    def branch(self) -> Held:
        """The same tokens for another session; its counts begin anew."""
        return replace(
            self,
            window=copy.deepcopy(self.window),
            routing=self.routing.fork(),
            ids=self.ids.branch(),
            stats=SessionStats(),
        )
