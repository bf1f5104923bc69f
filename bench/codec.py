"""What zstd makes of real K/V: ratio and speed on SmolLM2-135M over Python source, beside the disk's read speed in this run.

K/V as the daemon stores it, [chunk][layer][kv_head][group][K,V][token][dim], in parts of 2 MiB as export packs them. The
question is ADR 0011's: may it sit where K/V is fetched, or where parked sessions lie?
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import results
import smollm2
import torch
import typer
import zstandard
from demo import BUILD
from hga_kvd.archive import PART_BYTES
from hga_kvd.codec import from_planes, to_planes
from hga_kvd_patch import CACHE
from rich.console import Console
from rich.table import Table

CHUNK_TOKENS, GROUP_TOKENS = 64, 16


def real_kv(directory: Path, tokens: int) -> np.ndarray:
    """float32 [chunk][layer][kv_head][group][K,V][token][dim] of a file of Python's standard library."""
    smollm2.ensure_model(directory)
    model, tokenizer = smollm2.load(directory)
    text = Path(argparse.__file__).read_text()
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :tokens]
    if ids.shape[1] < tokens:
        raise RuntimeError(f"the text has only {ids.shape[1]} tokens")
    past = None
    with torch.inference_mode():
        for first in range(0, tokens, 512):
            past = model(ids[:, first : first + 512], **{CACHE: past}, use_cache=True, logits_to_keep=1)[CACHE]
    # [layer][K,V][kv_head][token][dim]
    kv = np.stack([np.stack([layer.keys[0].numpy(), layer.values[0].numpy()]) for layer in past.layers])
    layers, two, heads, _, dim = kv.shape
    kv = kv.reshape(layers, two, heads, tokens // CHUNK_TOKENS, CHUNK_TOKENS // GROUP_TOKENS, GROUP_TOKENS, dim)
    return np.ascontiguousarray(kv.transpose(3, 0, 2, 4, 1, 5, 6))


def as_bfloat16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()


def across_tokens(values: np.ndarray) -> np.ndarray:
    """[dim][token] inside a record: numbers of one channel side by side."""
    return np.ascontiguousarray(values.swapaxes(-1, -2))


def timed(work: Callable[[bytes], bytes], parts: list[bytes], raw_bytes: int) -> tuple[list[bytes], float]:
    """Results, and GB/s of raw bytes on one thread."""
    started = time.perf_counter()
    done = [work(part) for part in parts]
    return done, raw_bytes / (time.perf_counter() - started) / 1e9


def measure(values: np.ndarray, level: int, planes: bool) -> dict[str, float]:
    raw, element = values.tobytes(), values.dtype.itemsize if planes else 1
    parts = [raw[at : at + PART_BYTES] for at in range(0, len(raw), PART_BYTES)]
    packer, unpacker = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()
    packed, pack_gbs = timed(lambda part: packer.compress(to_planes(part, element)), parts, len(raw))
    back, unpack_gbs = timed(lambda part: from_planes(unpacker.decompress(part), element), packed, len(raw))
    if back != parts:
        raise RuntimeError("other bytes came back")
    return {"ratio": len(raw) / sum(map(len, packed)), "pack_gbs": pack_gbs, "unpack_gbs": unpack_gbs}


def disk_gbs(directory: Path, size: int = 1 << 30, repeats: int = 3) -> float:
    """Sequential O_DIRECT reads of 4 MiB, one at a time: a floor of what the disk does. Median of `repeats`."""
    buffer = mmap.mmap(-1, 4 << 20)
    buffer.write(os.urandom(4 << 20))
    descriptor, name = tempfile.mkstemp(dir=directory)
    try:
        for _ in range(size // len(buffer)):
            os.write(descriptor, buffer)
        os.fsync(descriptor)
        direct = os.open(name, os.O_RDONLY | os.O_DIRECT)
        speeds = []
        for _ in range(repeats):
            started = time.perf_counter()
            for at in range(0, size, len(buffer)):
                if os.preadv(direct, [buffer], at) != len(buffer):
                    raise RuntimeError("a short read")
            speeds.append(size / (time.perf_counter() - started) / 1e9)
        os.close(direct)
        return statistics.median(speeds)
    finally:
        os.close(descriptor)
        Path(name).unlink()


def main(
    tokens: Annotated[int, typer.Option(help="of text; a multiple of 512")] = 2048,
    model: Annotated[Path, typer.Option(help="directory of the model")] = BUILD / "model",
) -> None:
    """Prints a table; appends to bench/results/codec.jsonl."""
    BUILD.mkdir(parents=True, exist_ok=True)
    kv = real_kv(model, tokens)
    disk = disk_gbs(BUILD)
    table = Table(title=f"K/V of SmolLM2-135M, {tokens} tokens; one core; the disk reads {disk:.2f} GB/s")
    for name in ("dtype", "order", "zstd level", "planes", "ratio", "packs, GB/s", "unpacks, GB/s"):
        table.add_column(name, justify="left" if name in ("dtype", "order") else "right")
    rows = []
    for dtype, values in (("bfloat16", as_bfloat16(kv)), ("float32", kv)):
        for order, laid in (("as stored", values), ("across tokens", across_tokens(values))):
            for level, planes in ((1, False), (1, True), (3, True), (9, True)):
                if order != "as stored" and not (planes and level < 9):
                    continue
                numbers = measure(laid, level, planes)
                rows.append({"dtype": dtype, "order": order, "level": level, "planes": planes, **numbers})
                shown = (f"{numbers[n]:.{d}f}" for n, d in (("ratio", 3), ("pack_gbs", 2), ("unpack_gbs", 2)))
                table.add_row(dtype, order, str(level), "yes" if planes else "no", *shown)
    Console().print(table)
    results.append(
        "codec", {"tokens": tokens, "model": "SmolLM2-135M", "text": "argparse.py"}, {"disk_gbs": disk, "rows": rows}
    )


if __name__ == "__main__":
    typer.run(main)
