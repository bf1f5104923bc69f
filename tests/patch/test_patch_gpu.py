"""The patch on a GPU: the model's tensors, and so the sessions', are there. The client stands in for the daemon."""

from __future__ import annotations

import hga_kvd_patch
import pytest
import tiny
import torch
from dense_client import DenseClient

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
