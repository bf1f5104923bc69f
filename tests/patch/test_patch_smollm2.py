"""The real SmolLM2-135M through the real daemon. Runs where its weights are (`make model`), else says why not."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hga_kvd_patch
import pytest
import torch
from hga_kvd_client import SessionOptions
from hga_kvd_patch import CACHE

ROOT = Path(__file__).parents[2]
WEIGHTS = Path(os.environ.get("HGA_KVD_MODEL_DIR", ROOT / "build" / "model"))
TEXT = ROOT / "kvstore" / "hga_kvd" / "format.py"
PROMPT, STEPS = 1130, 32  # chunk 17 is closed and stored on the way

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(not list(WEIGHTS.glob("*.gguf")), reason=f"no *.gguf in {WEIGHTS}: make model"),
]


@pytest.fixture(scope="module")
def smollm2():
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        import smollm2 as loader  # noqa: PLC0415 (bench is no package)

        torch.set_num_threads(1)
        yield loader.load(WEIGHTS)
    finally:
        sys.path.remove(str(ROOT / "bench"))


def test_dense_routed_and_by_name(smollm2, daemon):
    model, tokenizer = smollm2
    # Any long text will do; this file grows and shrinks with the project, so it is repeated.
    ids = tokenizer(TEXT.read_text() * 4, return_tensors="pt").input_ids[:, : PROMPT + STEPS]
    target = daemon().target
    losses = {}
    with torch.inference_mode():
        expected = model(ids, use_cache=False).logits[0]
        for router in ("all", "hga"):
            options = SessionOptions(router=router, topk_chunks=4, topk_groups=4, bank_groups=16)
            with hga_kvd_patch.patched(model, target, options=options, prefill_block=500) as state:
                cache = state.new_cache(router)
                prefill = model(ids[:, :PROMPT], **{CACHE: cache}).logits[0]
                logits = [prefill[-1:]]
                for column in range(PROMPT, PROMPT + STEPS):
                    logits.append(model(ids[:, column : column + 1], **{CACHE: cache}).logits[0])
                stats = cache.sessions[0].stats
                share = stats.opened_groups / stats.routable_groups
            ours = torch.cat(logits)
            losses[router] = torch.nn.functional.cross_entropy(ours[:-1], ids[0, PROMPT:]).item()
            if router == "all":
                assert share == 1
                # These logits reach 45, and eager and sdpa of transformers are 0.9e-4 from each other.
                assert (prefill - expected[:PROMPT]).abs().max() <= 1e-4
                assert (ours - expected[PROMPT - 1 :]).abs().max() <= 1e-4
            else:
                assert 0 < share < 0.6
        dense = torch.nn.functional.cross_entropy(expected[PROMPT - 1 : -1], ids[0, PROMPT:]).item()
        assert abs(losses["all"] - dense) <= 1e-4
        assert abs(losses["hga"] - dense) <= 0.5
        unbroken = model.generate(ids, max_new_tokens=8, do_sample=False)
        with hga_kvd_patch.patched(model, target, session="all", options=SessionOptions(router="all")):
            assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), unbroken)
