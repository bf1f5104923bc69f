"""The loss of a text through the real patch and a real daemon, beside the simulated one of the same tokens.

The prompt is prefilled exactly in blocks, then every token goes through the model alone: its K/V is appended, its groups are
fetched from the daemon, whose arena is smaller than the K/V. The simulation has the same rule and the same sizes of window
and bank; so losses agree but for the order of float32 sums, and the same numbers of groups are opened.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import hga_kvd_patch
import numpy as np
import torch
from hga_kvd.bench.daemon import daemon_on
from hga_kvd_client import SessionOptions
from hga_kvd_patch import CACHE
from simulate import Row, Simulation
from torch import Tensor

PROMPT_BLOCK_TOKENS = 1024


@torch.inference_mode()
def compare(model: Any, ids: Tensor, start: int, row: Row, options: SessionOptions, place: Path) -> dict[str, float]:
    """Mean losses of tokens start .. end of ids [tokens], and groups opened by both. place: a directory on a real disk."""
    simulation = Simulation(model, start, options.sink_chunks, options.recent_chunks)
    found: dict[str, float] = {"loss_dense": simulation.run(ids, None), "loss_simulated": simulation.run(ids, row)}
    found |= {"opened_simulated": simulation.opened, "routable_simulated": simulation.routable}
    model.set_attn_implementation("sdpa")
    directory = Path(tempfile.mkdtemp(prefix="daemon-", dir=place))
    try:
        with (
            daemon_on(directory, "48MiB") as daemon,
            hga_kvd_patch.patched(model, daemon.target, options=options) as state,
        ):
            cache = state.new_cache("quality")
            started = time.perf_counter()
            found["loss_daemon"] = _teacher_forced(model, ids, start, cache)
            found["seconds_daemon"] = time.perf_counter() - started
            stats = cache.sessions[0].stats
            found |= {"opened_daemon": stats.opened_groups, "routable_daemon": stats.routable_groups}
            found |= {
                "ram_bytes": stats.ram_bytes,
                "nvme_bytes": stats.nvme_bytes,
                "bank_hit_rate": stats.bank_hit_rate,
            }
    finally:
        shutil.rmtree(directory)
    return found


def _teacher_forced(model: Any, ids: Tensor, start: int, cache: Any) -> float:
    for first in range(0, start, PROMPT_BLOCK_TOKENS):
        block = ids[None, first : min(first + PROMPT_BLOCK_TOKENS, start)]
        out = model(block, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
    losses = []
    for at in range(start, len(ids)):
        losses.append(torch.nn.functional.cross_entropy(out.logits[:, -1], ids[None, at]).item())
        out = model(ids[None, at : at + 1], **{CACHE: cache}, use_cache=True)
    return float(np.mean(losses))
