"""The patch with a client that attends to everything in this process: what comes out must be the unpatched model's."""

from __future__ import annotations

import copy
import gc

import hga_kvd_patch
import pytest
import tiny
import torch
from hga_kvd_patch import CACHE, CacheRefused, CacheUnusable, CallRefused, HgaCache, TextMismatch
from hga_kvd_patch.inputs import blocks
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, StaticCache

# fp32, two orders of summing.
CLOSE = 1e-4


def greedy(model, ids: Tensor, tokens: int = 12, **arguments):
    return model.generate(ids, max_new_tokens=tokens, do_sample=False, **arguments)


def padded(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """ids and mask [batch, longest], padded on the left."""
    longest = max(lengths)
    ids, mask = torch.zeros(len(lengths), longest, dtype=torch.long), torch.zeros(len(lengths), longest).long()
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = tiny.text(length, seed + row)[0]
        mask[row, longest - length :] = 1
    return ids, mask


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_prefill_and_decode_give_dense_logits(family, client):
    model, ids = tiny.make(family), tiny.text(330)
    expected = model(ids).logits
    with hga_kvd_patch.patched(model, client, prefill_block=64):
        out = model(ids[:, :300])
        assert isinstance(out[CACHE], HgaCache)
        logits = [out.logits]
        for column in range(300, 330):
            logits.append(model(ids[:, column : column + 1], **{CACHE: out[CACHE]}).logits)
        assert out[CACHE].get_seq_length() == 330
    assert client.sessions[0].blocks == [64, 64, 64, 64, 44, *[1] * 30]
    assert (torch.cat(logits, 1) - expected).abs().max() <= CLOSE


@pytest.mark.parametrize("family", tiny.FOUR)
def test_generate_with_left_padding_equals_unpatched(family, client):
    model = tiny.make(family)
    ids, mask = padded([150, 70, 1])
    expected = greedy(model, ids, attention_mask=mask)
    with hga_kvd_patch.patched(model, client, prefill_block=50):
        assert torch.equal(greedy(model, ids, attention_mask=mask), expected)
    assert [session.tokens for session in client.sessions] == [161, 81, 12]
    assert all(session.closed for session in client.sessions)


def test_padding_in_plain_forward(client):
    model = tiny.make("llama")
    ids, mask = padded([90, 30])
    expected = model(ids, attention_mask=mask).logits
    with hga_kvd_patch.patched(model, client, prefill_block=16):
        out = model(ids, attention_mask=mask)
    assert (out.logits - expected)[mask.bool()].abs().max() <= CLOSE


def test_sampling_several_sequences_of_one_prompt(client):
    model, ids = tiny.make("qwen3"), tiny.text(40)
    arguments = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 8}
    torch.manual_seed(1)
    expected = model.generate(ids, **arguments)
    with hga_kvd_patch.patched(model, client):
        torch.manual_seed(1)
        assert torch.equal(model.generate(ids, **arguments), expected)


def test_second_generate_feeds_only_the_new_tokens(client):
    model, ids = tiny.make("llama"), tiny.text(100)
    more = tiny.text(20, seed=5)
    with hga_kvd_patch.patched(model, client, session="talk"):
        first = greedy(model, ids, return_dict_in_generate=True)
        cache = first[CACHE]
        assert cache.get_seq_length() == 111
        second_ids = torch.cat((first.sequences, more), 1)
        second = greedy(model, second_ids, **{CACHE: cache})
        assert client.sessions[0].blocks == [100, *[1] * 11, 21, *[1] * 11]
    assert torch.equal(second, greedy(model, second_ids))


def test_hidden_states_and_embeddings(client):
    model, ids = tiny.make("qwen2"), tiny.text(70)
    embeds = model.get_input_embeddings()(ids)
    expected = model(inputs_embeds=embeds, output_hidden_states=True)
    with hga_kvd_patch.patched(model, client, prefill_block=32):
        out = model(inputs_embeds=embeds, output_hidden_states=True)
        as_tuple = model(ids, return_dict=False)
        assert torch.equal(greedy(model, None, inputs_embeds=embeds), expected_ids := greedy(model, ids)[:, 70:])
    assert torch.equal(expected_ids, greedy(model, ids)[:, 70:])
    assert len(out.hidden_states) == len(expected.hidden_states)
    for ours, theirs in zip(out.hidden_states, expected.hidden_states, strict=True):
        assert (ours - theirs).abs().max() <= CLOSE
    assert isinstance(as_tuple, tuple)
    assert (as_tuple[0] - expected.logits).abs().max() <= CLOSE


def test_other_caches_and_no_cache_are_sdpa(client):
    model, ids = tiny.make("llama"), tiny.text(60)
    padded_ids, mask = padded([30, 20])
    arguments = ({"use_cache": False}, {CACHE: DynamicCache()})
    expected = [model(ids, **copy.deepcopy(one)).logits for one in arguments]
    expected_padded = model(padded_ids, attention_mask=mask, use_cache=False).logits
    static = StaticCache(config=model.config, max_cache_len=100)
    expected_static = greedy(model, ids, **{CACHE: StaticCache(config=model.config, max_cache_len=100)})
    with hga_kvd_patch.patched(model, client):
        for one, logits in zip(arguments, expected, strict=True):
            assert torch.equal(model(ids, **copy.deepcopy(one)).logits, logits)
        assert torch.equal(model(padded_ids, attention_mask=mask, use_cache=False).logits, expected_padded)
        assert torch.equal(greedy(model, ids, **{CACHE: static}), expected_static)
        cache = DynamicCache()
        for part in (ids[:, :40], ids[:, 40:]):
            last = model(part, **{CACHE: cache}).logits
        assert torch.equal(last[:, -1].argmax(-1), expected[0][:, -1].argmax(-1))
        with torch.enable_grad():
            model(ids, labels=ids, use_cache=False).loss.backward()
        assert greedy(model, ids, num_beams=2, use_cache=False).shape == (1, 72)
    assert not client.sessions


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_decoder_takes_its_cache_by_either_name(name, client):
    model, ids = tiny.make("llama"), tiny.text(30)
    with hga_kvd_patch.patched(model, client) as state:
        cache = state.new_cache()
        first = model.base_model(ids[:, :20], **{name: cache})
        assert first[CACHE] is cache
        model.base_model(ids[:, 20:], **{name: cache})
        assert cache.get_seq_length() == 30
    assert len(client.sessions) == 1


def test_two_patched_models_at_once(client):
    models = [tiny.make("llama", seed=1), tiny.make("qwen3", seed=2)]
    ids = tiny.text(80)
    expected = [model(ids).logits for model in models]
    with hga_kvd_patch.patched(models[0], client), hga_kvd_patch.patched(models[1], client):
        outs = [model(ids[:, :79]) for model in models]
        for model, out, logits in zip(models, outs, expected, strict=True):
            last = model(ids[:, 79:], **{CACHE: out[CACHE]}).logits
            assert (last - logits[:, 79:]).abs().max() <= CLOSE
        with pytest.raises(CacheRefused, match="another patched model"):
            models[0](ids, **{CACHE: outs[1][CACHE]})


@pytest.mark.parametrize("family", tiny.FOUR)
def test_unpatch_restores_everything(family, client):
    model, ids = tiny.make(family), tiny.text(20)

    def state():
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
        attributes = [(name, set(module.__dict__)) for name, module in model.named_modules()]
        weights = {name: tensor.clone() for name, tensor in model.state_dict(keep_vars=True).items()}
        own = (model.config._attn_implementation, model.config.to_dict(), model.generation_config.to_dict())
        return hooks, attributes, own, weights

    model(ids)
    before, weights = state()[:3], state()[3]
    logits = model(ids).logits
    hga_kvd_patch.patch(model, client)
    assert model.config._attn_implementation == "hga_kvd"
    model(ids)
    hga_kvd_patch.unpatch(model)
    assert state()[:3] == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert model.model.forward.__func__ is type(model.model).forward
    assert model._prepare_cache_for_generation.__func__ is type(model)._prepare_cache_for_generation
    assert torch.equal(model(ids).logits, logits)
    assert isinstance(model(ids)[CACHE], DynamicCache)


def test_unpatch_keeps_a_forward_that_was_there(client):
    model = tiny.make("llama")
    original = model.model.forward

    def mine(*args, **kwargs):
        return original(*args, **kwargs)

    model.model.forward = mine
    with hga_kvd_patch.patched(model, client):
        model(tiny.text(5))
    assert model.model.forward is mine


def test_base_model_without_generate(client):
    model, ids = tiny.make("llama").model, tiny.text(30)
    expected = model(ids).last_hidden_state
    with hga_kvd_patch.patched(model, client, prefill_block=7):
        assert (model(ids).last_hidden_state - expected).abs().max() <= CLOSE


def test_sessions_are_closed_with_their_cache(client):
    model = tiny.make("llama")
    with hga_kvd_patch.patched(model, client) as state:
        cache = state.new_cache()
        model(tiny.text(10), **{CACHE: cache})
        assert not client.sessions[0].closed
        del cache
        gc.collect()
        assert client.sessions[0].closed
        kept = model(tiny.text(10))[CACHE]
        kept.reset()
        assert client.sessions[1].closed
        assert kept.get_seq_length() == 0
        model(tiny.text(12), **{CACHE: kept})
        assert kept.sessions[0].tokens == 12
    assert client.sessions[2].closed
    with pytest.raises(CacheRefused):
        kept.layers[0].update(torch.zeros(1), torch.zeros(1))


# Taking up a session by name.


def test_continue_by_name(client):
    model, ids = tiny.make("qwen3"), tiny.text(200)
    unbroken = greedy(model, ids, 40)
    with hga_kvd_patch.patched(model, client, session="doc"):
        first = greedy(model, ids, 20)
    assert torch.equal(first, unbroken[:, :220])
    model = tiny.make("qwen3")
    with hga_kvd_patch.patched(model, client, session="doc"):
        assert torch.equal(greedy(model, first, 20), unbroken)
        # 219 tokens had K/V, 192 of them in closed chunks; the rest is less than resume_steps.
        assert client.sessions[1].blocks == [1] * 28 + [1] * 19
        # And once more in the same process, with more new tokens than resume_steps.
        longer = torch.cat((unbroken, tiny.text(100, seed=3)), 1)
        again = greedy(model, longer, 5)
        assert client.sessions[2].blocks[0] == 340 - 192
    assert torch.equal(again, greedy(model, longer, 5))


def test_continue_by_name_in_plain_forward(client):
    model, ids = tiny.make("llama"), tiny.text(260)
    expected = model(ids).logits
    with hga_kvd_patch.patched(model, client, prefill_block=50) as state:
        model(ids[:, :190], **{CACHE: state.new_cache("x")})[CACHE].close()
        mask = torch.cat((torch.zeros(1, 3), torch.ones(1, 260)), 1).long()
        cache = state.new_cache("x")
        out = model(torch.cat((torch.zeros(1, 3).long(), ids), 1), attention_mask=mask, **{CACHE: cache})
    assert out.logits[:, : 3 + 128].isnan().all()
    assert (out.logits[:, 3 + 128 :] - expected[:, 128:]).abs().max() <= CLOSE
    assert cache.get_seq_length() == 263


def test_another_text_under_the_name_is_refused(client):
    model, ids = tiny.make("llama"), tiny.text(140)
    with hga_kvd_patch.patched(model, client, session="doc"):
        greedy(model, ids, 2)
        other = ids.clone()
        other[0, 77] = 3 + (other[0, 77] + 1) % 100
        with pytest.raises(TextMismatch, match=rf"token 77 is {int(ids[0, 77])} there and {int(other[0, 77])}"):
            greedy(model, other, 2)
        with pytest.raises(TextMismatch, match="holds 128 tokens and the input has 127"):
            greedy(model, ids[:, :127], 2)
        client.stored["doc"].ids = None
        with pytest.raises(TextMismatch, match="not their ids"):
            greedy(model, ids, 2)


def test_a_name_is_for_one_sequence_of_ids(client):
    model = tiny.make("llama")
    with hga_kvd_patch.patched(model, client, session="doc"):
        with pytest.raises(CallRefused, match="holds one sequence, but the batch has 2"):
            model(tiny.text(10, batch=2))
        with pytest.raises(CallRefused, match="give input_ids"):
            model(inputs_embeds=torch.zeros(1, 3, 64))


def test_the_newest_cache_has_the_name(client):
    model, ids = tiny.make("llama"), tiny.text(70)
    with hga_kvd_patch.patched(model, client, session="doc"):
        old = model(ids)[CACHE]
        new = model(torch.cat((ids, ids), 1))[CACHE]
        assert new.sessions[0].tokens == 140
        with pytest.raises(CacheUnusable, match="taken up by a newer cache"):
            model(ids, **{CACHE: old})


# Calls that fail.


@pytest.mark.parametrize("block", [1, 2, 3])
def test_a_failed_call_leaves_a_cache_that_is_right_or_refuses(block, client):
    model, ids = tiny.make("llama"), tiny.text(100)
    expected = model(ids).logits
    with hga_kvd_patch.patched(model, client, prefill_block=40) as state:
        cache = state.new_cache()
        client.fail_at_block = block
        with pytest.raises(ConnectionError):
            model(ids, **{CACHE: cache})
        if block == 1:
            assert (model(ids, **{CACHE: cache}).logits - expected).abs().max() <= CLOSE
        else:
            with pytest.raises(CacheUnusable, match="failed halfway"):
                model(ids, **{CACHE: cache})
        # A decode step that was not taken can be repeated.
        cache = model(ids[:, :99])[CACHE]
        client.fail_at_block = 1
        with pytest.raises(ConnectionError):
            model(ids[:, 99:], **{CACHE: cache})
        last = model(ids[:, 99:], **{CACHE: cache}).logits
        assert (last - expected[:, 99:]).abs().max() <= CLOSE


def test_a_batch_that_fails_in_its_second_sequence(client):
    model, ids = tiny.make("llama"), tiny.text(9, batch=2)
    expected = model(ids).logits
    with hga_kvd_patch.patched(model, client) as state:
        cache = state.new_cache()
        client.fail_at_block = 2
        with pytest.raises(ConnectionError):
            model(ids, **{CACHE: cache})
        assert (model(ids, **{CACHE: cache}).logits - expected).abs().max() <= CLOSE


@given(st.integers(1, 4000), st.integers(1, 300))
def test_blocks_cover_all_columns_and_none_is_a_lone_token(columns, size):
    spans = list(blocks(columns, size))
    assert [first for first, _ in spans] == [0, *[end for _, end in spans[:-1]]]
    assert spans[-1][1] == columns
    lengths = [end - first for first, end in spans]
    if size == 1:
        assert set(lengths) == {1}
    else:
        assert max(lengths) <= size + 1
        assert columns == 1 or min(lengths) > 1
