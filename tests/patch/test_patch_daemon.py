"""The patch through the real daemon process: dense logits, routed decoding, restarts, going on by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import hga_kvd_patch
import numpy as np
import pytest
import tiny
import torch
from hga_kvd_client import SessionOptions
from hga_kvd_client.errors import GeometryMismatch, RecordsDamaged, SessionLost
from hga_kvd_client.keys import record_keys
from hga_kvd_patch import CACHE
from hga_kvd_patch.inputs import Input

PROMPT = 1450
STEPS = 64
# Banks smaller than what is routable, so that every step fetches.
ALL = SessionOptions(router="all", bank_groups=16)
# Of the 23 chunks, 13 are routable; 2 chunks and 4 groups of those are opened by each query head.
ROUTED = SessionOptions(router="hga", topk_chunks=2, topk_groups=4, bank_groups=16)
CLOSE = 1e-4


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
        cache = out[CACHE]
        for column in range(PROMPT, PROMPT + STEPS):
            step = model(ids[:, column : column + 1], **{CACHE: cache}).logits
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
            ours.append(model(ids[:, column : column + 1], **{CACHE: out[CACHE]}).logits[:, 0])
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
        cache = model(ids[:, :PROMPT])[CACHE]
        for column in range(PROMPT, PROMPT + 20):
            logits = model(ids[:, column : column + 1], **{CACHE: cache}).logits
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
        broken = greedy(model, ids, STEPS, **{CACHE: cache}, streamer=Replace())
        assert cache.sessions[0].stats.recoveries == 1
    assert torch.equal(broken, unbroken)


def test_a_temporary_session_is_lost_with_the_daemon_and_computed_again(daemon, caplog):
    model, ids = tiny.make("llama"), tiny.text(PROMPT + 3)
    embeds = model.get_input_embeddings()(ids)
    expected = model(ids, use_cache=False).logits
    here = daemon()
    with hga_kvd_patch.patched(model, here.target, options=ALL) as state:
        cache = model(ids[:, :PROMPT])[CACHE]
        blind = state.new_cache()
        model(inputs_embeds=embeds[:, :PROMPT], **{CACHE: blind})
        here.stop()
        here.start()
        for column in range(PROMPT, PROMPT + 3):
            step = model(ids[:, column : column + 1], **{CACHE: cache}).logits
            assert (step[:, 0] - expected[:, column]).abs().max() <= CLOSE
        assert f"lost tokens 0 to {PROMPT - 1}" in caplog.text
        with pytest.raises(SessionLost):
            model(inputs_embeds=embeds[:, PROMPT:], **{CACHE: blind})


@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 5}], ids=["beams", "prompt lookup"])
def test_beams_and_candidates_through_the_daemon(mode, daemon):
    """40 tokens, so that chunks are closed by beams that part and by candidates that are taken back."""
    model, ids = tiny.make("llama"), tiny.text(61).repeat(1, 14)[:, :830]
    options = SessionOptions(router="all", bank_groups=8, sink_chunks=1, recent_chunks=2, flush_chunks=2)
    expected = greedy(model, ids, 40, **mode)
    here = daemon()
    with hga_kvd_patch.patched(model, here.target, options=options, prefill_block=256) as state:
        assert torch.equal(greedy(model, ids, 40, **mode), expected)
        assert state.client.stat().sessions == 0


# Sharing.


def test_a_stored_prefix_is_not_computed_again_and_hardly_read(daemon):
    model, ids = tiny.make("qwen3"), tiny.text(PROMPT)
    other = torch.cat((ids[:, :1400], tiny.text(80, seed=7)), 1)
    expected, options = greedy(model, other, 8), SessionOptions(sink_chunks=1, recent_chunks=2, flush_chunks=2)
    all_groups = SessionOptions(router="all", sink_chunks=1, recent_chunks=2, flush_chunks=2)
    here = daemon()
    with hga_kvd_patch.patched(model, here.target, options=options, session="first"):
        model(ids)
    here.stop()
    here.start()
    with hga_kvd_patch.patched(model, here.target, options=all_groups, share_prefix=True) as state:
        before = state.client.stat()
        cache = state.new_cache()
        state._open(cache, Input(other, None, (0,)))
        after = state.client.stat()
        session = cache.sessions[0]
        assert session.tokens == 1344  # 21 chunks are common
        # One sink and two recent chunks; summaries are five vectors a chunk where K and V are 128.
        read = after.fetched_ram_bytes + after.fetched_nvme_bytes - before.fetched_ram_bytes - before.fetched_nvme_bytes
        assert read == 3 * session.geometry.chunk_bytes
        cache.reset()
        found = greedy(model, other, 8, **{CACHE: cache}, return_dict_in_generate=True)
        assert torch.equal(found.sequences, expected)
        assert cache.sessions[0].stats.prefill_tokens == other.shape[1] - 1344
        assert state.client.stat().chunks - after.chunks <= 2


def test_what_is_not_shared(daemon):
    """Another checkpoint of one config, another tenant, another RoPE, another dtype: nothing of theirs is found."""
    ids, target = tiny.text(300), daemon().target
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}

    def found(model, **arguments):
        with hga_kvd_patch.patched(model, target, share_prefix=True, **arguments) as state:
            before = state.client.stat().chunks
            cache = model(ids)[CACHE]
            cache.sessions[0].flush() if cache.name else cache.sessions[0]._close_full_chunks()
            return ids.shape[1] - cache.sessions[0].stats.prefill_tokens, state.client.stat().chunks - before

    assert found(tiny.make("llama"), session="first") == (0, 4)
    assert found(tiny.make("llama")) == (256, 0)
    for model in (tiny.make("llama", seed=1), tiny.make("llama", **rope), tiny.make("llama").bfloat16()):
        assert found(model) == (0, 4)
    assert found(tiny.make("llama"), tenant="other") == (0, 4)


def test_rows_of_a_batch_begin_with_what_each_finds(daemon):
    model, target = tiny.make("llama"), daemon().target
    rows = [tiny.text(1000), tiny.text(700, seed=1), tiny.text(90, seed=2)]
    ids = torch.zeros(3, 1000, dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, 1000 - tokens.shape[1] :] = tokens
    mask = (ids != 0).long()
    expected = greedy(model, ids, 10, attention_mask=mask)
    with hga_kvd_patch.patched(model, target, options=ALL) as state:
        for name, tokens in (("a", rows[0][:, :650]), ("b", rows[1])):
            model(tokens, **{CACHE: state.new_cache(name)})
    with hga_kvd_patch.patched(model, target, options=ALL, share_prefix=True, prefill_block=100) as state:
        cache = state.new_cache()
        assert torch.equal(greedy(model, ids, 10, attention_mask=mask, **{CACHE: cache}), expected)
        fed = [session.stats.prefill_tokens for session in cache.sessions]
        assert fed == [1000 - 640, 700 - 640, 90]


# Damage.


def damage(here, places) -> None:
    """Flips a bit of stored records in the daemon's segments, while it is stopped. places: (session, layer, group)."""
    records = []
    for session, layer, group in places:
        fetched = session._stored.fetch(record_keys(layer, np.array([0]), np.array([group]))).records
        records.append(bytes(fetched.reshape(-1)))
    here.stop()
    for record in records:
        found = 0
        for path in here.nvme.glob("*.kvs"):
            content = path.read_bytes()
            at = content.find(record)
            if at >= 0:
                found += 1
                with path.open("r+b") as file:
                    file.seek(at + 100)
                    file.write(bytes([content[at + 100] ^ 4]))
        assert found == 1
    here.start()


@pytest.mark.parametrize(
    ("chunks", "shared"),
    [([10], False), ([10, 4], True), ([0], False), ([21], True)],
    ids=["far, alone", "two, shared", "sink, alone", "recent, shared"],
)
def test_damage_is_computed_again_and_the_call_goes_on(chunks, shared, daemon, caplog):
    """shared: a second session holds the same damaged chunks."""
    model, ids = tiny.make("llama"), tiny.text(PROMPT + 24)
    options = SessionOptions(router="all", bank_groups=8, recent_chunks=4)
    expected = model(ids, use_cache=False).logits
    here = daemon()
    with hga_kvd_patch.patched(model, here.target, options=options, share_prefix=shared) as state:
        cache = model(ids[:, :PROMPT], **{CACHE: state.new_cache("doc")})[CACHE]
        session = cache.sessions[0]
        session.flush()
        if shared:
            model(ids[:, :PROMPT], **{CACHE: state.new_cache("other")})[CACHE].close()
        # The last named first: it is met when the first was got over.
        damage(here, [(session, 2 - number, chunk * 4 + 1) for number, chunk in enumerate(chunks)])
        for column in range(PROMPT, PROMPT + 12):
            step = model(ids[:, column : column + 1], **{CACHE: cache}).logits
            assert (step[:, 0] - expected[:, column]).abs().max() <= CLOSE
        in_window = chunks[0] in (0, 21)
        assert ("is damaged" in caplog.text) != in_window  # what is in the window is never read
        session.flush()
    with hga_kvd_patch.patched(model, here.target, options=options, session="doc"):
        out = model(ids).logits[:, -2:]
        assert (out - expected[:, -2:]).abs().max() <= CLOSE
        assert "is damaged" in caplog.text
    with hga_kvd_patch.patched(model, here.target, options=options, session="doc"):
        caplog.clear()
        out = model(ids).logits[:, -2:]
        assert (out - expected[:, -2:]).abs().max() <= CLOSE
        assert "is damaged" not in caplog.text


def test_damage_without_token_ids_is_an_error_that_names_it(daemon):
    model, ids = tiny.make("llama"), tiny.text(PROMPT)
    embeds = model.get_input_embeddings()(ids)
    here = daemon()
    with hga_kvd_patch.patched(model, here.target, options=ALL) as state:
        held = state.client.open("held", state.geometry, state.rope, ALL)
        cache = state.new_cache()
        cache.open(1, lambda row: held)
        model(inputs_embeds=embeds, **{CACHE: cache})
        held.flush()
        damage(here, [(held, 1, 30)])
        with pytest.raises(RecordsDamaged, match="layer 1, KV heads 0, tokens 480 to 495") as caught:
            model(inputs_embeds=embeds[:, :1], **{CACHE: cache})
        assert (caught.value.layer, caught.value.token_ranges) == (1, ((480, 496),))


CONTINUE = """
import json, sys
import torch, hga_kvd_patch, tiny
from hga_kvd_client import SessionOptions
target, family, tokens, options, ids = json.loads(sys.stdin.read())
torch.set_num_threads(1)
model = tiny.make(family)
with hga_kvd_patch.patched(model, target, session="doc", options=SessionOptions(**options)) as state:
    cache = state.new_cache("doc")
    out = model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False, **{hga_kvd_patch.CACHE: cache})
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
        timeout=240,
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
        half = greedy(state.model, prompt, 40, **{CACHE: cache})
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


@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads", "rotary"),
    [(80, 4, 4, 1.0), (96, 16, 1, 1.0), (256, 4, 2, 1.0), (128, 6, 2, 0.25)],
)
@pytest.mark.parametrize("router", ["sketch", "hga"])
def test_odd_heads_with_a_budget_for_every_group(head_dim, heads, kv_heads, rotary, router, daemon):
    """Query heads of a KV head from 1 to 16, heads that are no power of two, a quarter of a head rotated."""
    rope = {"rope_theta": 10000.0, "partial_rotary_factor": rotary}
    sizes = {
        "head_dim": head_dim,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": 2,
    }
    model = tiny.make("llama" if rotary == 1 else "phi", **sizes, **({} if rotary == 1 else {"rope_parameters": rope}))
    ids = tiny.text(620)
    expected = model(ids, use_cache=False).logits[0, 600:]
    options = SessionOptions(
        router=router, sketch_groups=64, sketch_basis_tokens=512, topk_chunks=16, topk_groups=64, sink_chunks=1,
        recent_chunks=2, flush_chunks=2, bank_groups=8,
    )  # fmt: skip
    with hga_kvd_patch.patched(model, daemon(nvme=False).target, options=options, prefill_block=256):
        cache = model(ids[:, :600])[CACHE]
        ours = [model(ids[:, column : column + 1], **{CACHE: cache}).logits[0] for column in range(600, 620)]
        (session,) = cache.sessions
    assert session.geometry.head_dim == head_dim
    assert session.stats.opened_groups == session.stats.routable_groups > 0
    assert (torch.cat(ours) - expected).abs().max() <= CLOSE


class Cut(Exception):
    pass


def test_a_call_that_fails_between_layers_and_the_same_cache_afterwards(daemon):
    """A decode step is taken back whole; a cache that generate() was cut on goes on where it stood."""
    model, ids = tiny.make("llama"), tiny.text(PROMPT + 12)
    with hga_kvd_patch.patched(model, daemon().target, options=ROUTED, prefill_block=512) as state:
        one, two = state.new_cache(), state.new_cache()
        for cache in (one, two):
            model(ids[:, :PROMPT], **{CACHE: cache})

        def cut(*_):
            raise Cut

        for column in range(PROMPT, PROMPT + 12):
            if column % 3 == 0:
                layer = model.base_model.layers[1 + column % 2]
                with layer.self_attn.o_proj.register_forward_hook(cut), pytest.raises(Cut):
                    greedy(model, ids[:, : column + 1], 4, **{CACHE: two})
                assert two.sessions[0].tokens == column
            step = [model(ids[:, column : column + 1], **{CACHE: cache}).logits for cache in (one, two)]
            assert (step[0] - step[1]).abs().max() <= CLOSE
