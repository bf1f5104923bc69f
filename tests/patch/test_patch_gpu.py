"""The patch on a GPU: the model's tensors, and so the sessions', are there. The client stands in for the daemon."""

from __future__ import annotations

import hga_kvd_patch
import pytest
import tiny
import torch
from dense_client import DenseClient
from hga_kvd_client import SessionOptions
from hga_kvd_patch import CACHE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", tiny.FOUR)
@torch.no_grad()
def test_dense_logits_and_generate(family, dtype):
    model = tiny.make(family).to("cuda", dtype)
    ids = tiny.text(300, batch=2).cuda()
    mask = torch.ones_like(ids)
    mask[1, :100] = 0
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    dense = model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)
    client = DenseClient()
    with hga_kvd_patch.patched(model, client, prefill_block=64):
        out = model(ids, attention_mask=mask)
        again = model.generate(ids, attention_mask=mask, max_new_tokens=10, do_sample=False)
    tolerance = 1e-3 if dtype == torch.float32 else 0.2
    difference = (out.logits - expected)[mask.bool()].abs()
    # Experts that are almost tied change sides in bf16, so there only most logits must agree.
    assert difference.float().quantile(0.9) <= tolerance
    assert [session.tokens for session in client.sessions] == [300, 200, 309, 209]
    if dtype == torch.float32:
        assert difference.max() <= tolerance
        assert torch.equal(again, dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("router", ["sketch", "hga"])
@torch.no_grad()
def test_generate_through_the_device_step_and_a_real_daemon(router, dtype, daemon):
    """With a budget for every group the step is dense attention, so greedy tokens are the unpatched model's."""
    model = tiny.make("llama").to("cuda", dtype)
    ids = tiny.text(700).cuda()
    options = SessionOptions(
        router=router, sketch_groups=48, sketch_basis_tokens=512, topk_chunks=16, topk_groups=40, sink_chunks=1,
        recent_chunks=2, flush_chunks=2, bank_groups=128,
    )  # fmt: skip
    dense = model.generate(ids, max_new_tokens=100, do_sample=False)
    expected = model(dense, use_cache=False).logits[:, 699:-1]
    with hga_kvd_patch.patched(model, daemon(nvme=False).target, options=options, prefill_block=256):
        cache = model(ids)[CACHE]
        ours = [model(dense[:, t : t + 1], **{CACHE: cache}).logits[:, 0] for t in range(700, 799)]
        (session,) = cache.sessions
        assert session._attending.on_device.step is not None
        assert session.stats.opened_groups == session.stats.routable_groups > 0
        again = model.generate(ids, max_new_tokens=100, do_sample=False)
    error = (torch.stack(ours, 1).float() - expected[:, 1:].float()).norm() / expected[:, 1:].float().norm()
    assert error < {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    if dtype == torch.float32:
        assert torch.equal(again, dense)
