"""The patch through the real daemon process: dense logits, routed decoding, restarts, going on by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import hga_kvd_patch
import pytest
import tiny
import torch
from hga_kvd_client import SessionOptions
from hga_kvd_client.errors import GeometryMismatch, SessionLost

PROMPT = 1450
STEPS = 64
# Banks smaller than what is routable, so that every step fetches.
ALL = SessionOptions(router="all", bank_groups=16)
# Of the 23 chunks, 13 are routable; 2 chunks and 4 groups of those are opened by each query head.
ROUTED = SessionOptions(router="hga", topk_chunks=2, topk_groups=4, bank_groups=16)
CLOSE = 1e-4


@pytest.fixture(autouse=True)
def _inference():
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


def greedy(model, ids, tokens, **arguments):
    return model.generate(ids, max_new_tokens=tokens, do_sample=False, **arguments)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_all_groups_give_dense_logits(family, daemon):
    model, ids = tiny.make(family), tiny.text(PROMPT + STEPS)
    expected = model(ids, use_cache=False).logits
    dense = greedy(model, ids[:, :PROMPT], 16)
    with hga_kvd_patch.patched(model, daemon().target, options=ALL, prefill_block=512):
        out = model(ids[:, :PROMPT])
        assert (out.logits - expected[:, :PROMPT]).abs().max() <= CLOSE
        cache = out.past_key_values
        for column in range(PROMPT, PROMPT + STEPS):
            step = model(ids[:, column : column + 1], past_key_values=cache).logits
            assert (step[:, 0] - expected[:, column]).abs().max() <= CLOSE
        session = cache.sessions[0]
        assert session.stats.opened_groups == session.stats.routable_groups > 0
        assert session.tokens == PROMPT + STEPS
        assert torch.equal(greedy(model, ids[:, :PROMPT], 16), dense)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_near_as_the_unpatched_model(dtype, daemon):
    """Both round in their own places, so neither is the other's reference: the float32 model is."""
    model, ids = tiny.make("qwen3"), tiny.text(PROMPT + 8)
    exact = model(ids, use_cache=False).logits[:, PROMPT - 1 :]
    model = model.to(dtype)
    unpatched = model(ids, use_cache=False).logits[:, PROMPT - 1 :].float()
    with hga_kvd_patch.patched(model, daemon().target, options=ALL) as state:
        assert state.geometry.dtype == str(dtype).removeprefix("torch.")
        out = model(ids[:, :PROMPT])
        ours = [out.logits[:, -1]]
        for column in range(PROMPT, PROMPT + 8):
            ours.append(model(ids[:, column : column + 1], past_key_values=out.past_key_values).logits[:, 0])
    error = (torch.stack(ours, 1).float() - exact).norm()
    assert error <= 1.2 * (unpatched - exact).norm()


def test_generate_with_left_padding_equals_unpatched(daemon):
    model = tiny.make("llama")
    ids = tiny.text(1000, batch=2)
    ids[1, :150] = 0
    mask = (ids != 0).long()
    expected = greedy(model, ids, 24, attention_mask=mask)
    with hga_kvd_patch.patched(model, daemon().target, options=ALL, prefill_block=300):
        assert torch.equal(greedy(model, ids, 24, attention_mask=mask), expected)


def test_routed_decoding_opens_a_part(daemon):
    model, ids = tiny.make("llama"), tiny.text(PROMPT + 20)
    with hga_kvd_patch.patched(model, daemon().target, options=ROUTED):
        cache = model(ids[:, :PROMPT]).past_key_values
        for column in range(PROMPT, PROMPT + 20):
            logits = model(ids[:, column : column + 1], past_key_values=cache).logits
            assert logits.isfinite().all()
        stats = cache.sessions[0].stats
    assert 0 < stats.opened_groups < 0.4 * stats.routable_groups
    assert stats.bank_bytes > 0


@pytest.mark.parametrize("options", [ALL, ROUTED], ids=["all", "routed"])
@pytest.mark.parametrize("how", ["stop", "kill"])
def test_the_daemon_is_replaced_in_the_middle_of_generating(how, options, daemon):
    model, ids = tiny.make("qwen3"), tiny.text(PROMPT)
    with hga_kvd_patch.patched(model, daemon().target, options=options, session="unbroken"):
        unbroken = greedy(model, ids, STEPS)
    here = daemon()

    class Replace:
        """A streamer that replaces the daemon when 30 tokens are out."""

        calls = 0

        def put(self, value):
            self.calls += 1
            if self.calls == 31:
                if how == "kill":
                    cache.sessions[0].flush()
                getattr(here, how)()
                here.start()

        def end(self):
            pass

    with hga_kvd_patch.patched(model, here.target, options=options) as state:
        cache = state.new_cache("talk")
        broken = greedy(model, ids, STEPS, past_key_values=cache, streamer=Replace())
        assert cache.sessions[0].stats.recoveries == 1
    assert torch.equal(broken, unbroken)


def test_a_temporary_session_is_lost_with_the_daemon(daemon):
    model, ids = tiny.make("llama"), tiny.text(PROMPT)
    here = daemon()
    with hga_kvd_patch.patched(model, here.target, options=ALL):
        cache = model(ids).past_key_values
        here.stop()
        here.start()
        with pytest.raises(SessionLost):
            model(ids[:, :1], past_key_values=cache)


CONTINUE = """
import json, sys
import torch, hga_kvd_patch, tiny
from hga_kvd_client import SessionOptions
target, family, tokens, options, ids = json.loads(sys.stdin.read())
torch.set_num_threads(1)
model = tiny.make(family)
with hga_kvd_patch.patched(model, target, session="doc", options=SessionOptions(**options)) as state:
    cache = state.new_cache("doc")
    out = model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False, past_key_values=cache)
    appended = cache.sessions[0].stats.appended_chunks
print(json.dumps([out[0].tolist(), appended]))
"""


def in_a_new_process(target: str, family: str, tokens: int, options: dict[str, object], ids: list[int]):
    here = str(Path(__file__).parent)
    program = f"import sys; sys.path.insert(0, {here!r})\n{CONTINUE}"
    ran = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps([target, family, tokens, options, ids]),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.parametrize(("family", "router", "how"), [("qwen3-moe", "all", "stop"), ("llama", "hga", "kill")])
def test_a_new_process_goes_on_by_name(family, router, how, daemon):
    """Routed too: the tail that is fed again was decoded in the unbroken run, and is decoded now."""
    options = {"router": router, "topk_chunks": 2, "topk_groups": 4}
    prompt = tiny.text(1408)  # 22 whole chunks, so that every token of the tail was decoded
    here = daemon()
    with hga_kvd_patch.patched(tiny.make(family), here.target, options=SessionOptions(**options)) as state:
        unbroken = greedy(state.model, prompt, 72)
        cache = state.new_cache("doc")
        half = greedy(state.model, prompt, 40, past_key_values=cache)
        cache.sessions[0].flush()
        getattr(here, how)()
        here.start()
    whole, appended = in_a_new_process(here.target, family, 32, options, half[0].tolist())
    # 1,447 tokens had K/V; 1,408 of them were found, and the 23rd chunk was closed by the second process.
    assert appended == 1
    assert whole == unbroken[0].tolist()


def test_another_model_cannot_take_up_the_session(daemon):
    ids = tiny.text(200)
    target = daemon().target
    with hga_kvd_patch.patched(tiny.make("llama", seed=1), target, session="doc") as state:
        state.model(ids)
    for model in (tiny.make("llama", seed=2), tiny.make("llama", seed=1, rms_norm_eps=1e-3)):
        with hga_kvd_patch.patched(model, target, session="doc"), pytest.raises(GeometryMismatch):
            model(ids)
    with hga_kvd_patch.patched(tiny.make("llama", seed=1), target, session="doc") as state:
        longer = torch.cat((ids, ids), 1)
        logits = state.model(longer).logits
    assert (logits[:, 192:] - tiny.make("llama", seed=1)(longer).logits[:, 192:]).abs().max() <= CLOSE
