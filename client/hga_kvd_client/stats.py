"""Counts of one session since it was opened. Written by Session, read by anybody."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class SessionStats:
    # Decode: steps of one token through all layers. Groups are counted per layer and KV head.
    decode_steps: int = 0
    routable_groups: int = 0
    opened_groups: int = 0
    # Bytes of opened groups, by where they were.
    bank_bytes: int = 0
    ram_bytes: int = 0
    nvme_bytes: int = 0
    fetches: int = 0
    fetch_s: float = 0.0
    # Exact prefill: tokens of blocks longer than one, and the stored K/V streamed for them.
    prefill_tokens: int = 0
    prefill_ram_bytes: int = 0
    prefill_nvme_bytes: int = 0
    # Storage.
    appended_chunks: int = 0
    append_s: float = 0.0
    flushes: int = 0
    recoveries: int = 0  # daemon replaced, session found or made again

    @property
    def fetched_fraction(self) -> float:
        """Opened over routable groups; 0 before anything was routable."""
        return self.opened_groups / self.routable_groups if self.routable_groups else 0.0

    @property
    def bank_hit_rate(self) -> float:
        """Share of the opened bytes that the bank had; 0 before anything was opened."""
        opened_bytes = self.bank_bytes + self.ram_bytes + self.nvme_bytes
        return self.bank_bytes / opened_bytes if opened_bytes else 0.0
