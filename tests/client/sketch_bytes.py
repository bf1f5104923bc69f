"""What the bytes of a sketch mean, in loops over tokens and coordinates."""

from __future__ import annotations

import torch
from hga_kvd_client.sketch import FLOAT8, SketchSpec


def reference_decode(spec: SketchSpec, record: torch.Tensor) -> torch.Tensor:
    """record: uint8 [chunk_bytes], read byte by byte as the module's docstring says."""
    data = record.tolist()
    as_float = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(FLOAT8).float().tolist()
    mean_at = spec.groups_per_chunk * spec.group_tokens * (spec.dims4 * 4 + spec.dims2 * 2) // 8
    step_at = mean_at + spec.blocks * spec.head_dim
    assert len(data) == step_at + spec.blocks * (spec.dims4 + spec.dims2)
    y = [[0.0] * spec.head_dim for _ in range(spec.chunk_tokens)]
    for token in range(spec.chunk_tokens):
        block = token * spec.blocks // spec.chunk_tokens
        group, t = divmod(token, spec.group_tokens)
        codes_at = group * spec.group_tokens * (spec.dims4 * 4 + spec.dims2 * 2) // 8
        for dim in range(spec.head_dim):
            value = as_float[data[mean_at + block * spec.head_dim + dim]]
            if dim < spec.dims4 + spec.dims2:
                step = as_float[data[step_at + block * (spec.dims4 + spec.dims2) + dim]]
                if dim < spec.dims4:
                    row = spec.group_tokens // 2
                    byte, shift, bits = codes_at + dim * row + t % row, 4 * (t // row), 4
                else:
                    row = spec.group_tokens // 4
                    start = codes_at + spec.dims4 * spec.group_tokens // 2
                    byte, shift, bits = start + (dim - spec.dims4) * row + t % row, 2 * (t // row), 2
                value += step * ((data[byte] >> shift) % 2**bits - 2 ** (bits - 1) + 0.5)
            y[token][dim] = value
    return torch.tensor(y)
