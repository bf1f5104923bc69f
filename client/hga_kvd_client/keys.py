"""Which stored records a layer needs, as keys of the wire; and what damaged ones mean in tokens. Pure numpy."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from hga_kvd_client.errors import RecordsDamaged
from hga_kvd_client.geometry import KEY_DTYPE, Bytes, Geometry, Keys

I64 = npt.NDArray[np.int64]


def record_keys(layer: int, kv_heads: I64, groups: I64) -> Keys:
    """kv_heads, groups: [records]."""
    keys = np.empty(len(groups), KEY_DTYPE)
    keys["layer"], keys["kv_head"], keys["group"] = layer, kv_heads, groups
    return keys


def extent_keys(geometry: Geometry, layer: int, first_chunk: int, chunk_count: int, layer_count: int = 1) -> Keys:
    """All records of some chunks in some layers, [chunk][layer][kv_head][group]: storage order, and what lies together is
    read in one piece."""
    per_chunk, kv_heads = geometry.groups_per_chunk, geometry.kv_heads
    keys = np.empty((chunk_count, layer_count, kv_heads, per_chunk), KEY_DTYPE)
    keys["layer"] = np.arange(layer, layer + layer_count)[:, None, None]
    keys["kv_head"] = np.arange(kv_heads)[:, None]
    groups = np.arange(first_chunk * per_chunk, (first_chunk + chunk_count) * per_chunk)
    keys["group"] = groups.reshape(chunk_count, 1, 1, per_chunk)
    return keys.reshape(-1)


def check_statuses(statuses: Bytes | None, keys: Keys, group_tokens: int) -> None:
    """statuses: a byte a key, 0 is OK. Raises: RecordsDamaged, of the first layer that has damage."""
    if statuses is None or not statuses.any():
        return
    bad = keys[statuses != 0]
    bad = bad[bad["layer"] == bad["layer"][0]]
    raise RecordsDamaged(
        int(bad["layer"][0]),
        np.unique(bad["kv_head"]).tolist(),
        token_ranges(np.unique(bad["group"]).tolist(), group_tokens),
    )


def token_ranges(blocks: Iterable[int], block_tokens: int) -> list[tuple[int, int]]:
    """Ranges (first, end) of tokens that these blocks hold, neighbours joined. blocks: sorted."""
    ranges: list[tuple[int, int]] = []
    for block in blocks:
        first, end = block * block_tokens, (block + 1) * block_tokens
        if ranges and ranges[-1][1] == first:
            ranges[-1] = (ranges[-1][0], end)
        else:
            ranges.append((first, end))
    return ranges
