"""Beams, candidates and texts that part: what generate() does with a cache that forks and takes tokens back.

With a client that attends to everything in this process, token by token the unpatched model's; then through the daemon.
"""

from __future__ import annotations

import hga_kvd_patch
import pytest
import tiny
import torch
from hga_kvd_client import SessionOptions
from hga_kvd_patch import CACHE, TextMismatch

CLOSE = 1e-4
# Banks and windows smaller than the text, so that beams and candidates reach what is in the daemon.
ALL = SessionOptions(router="all", bank_groups=8, sink_chunks=1, recent_chunks=2, flush_chunks=2)

# Greedy modes, compared token by token.
MODES = {
    "beams": {"num_beams": 4},
    "beams, all returned": {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0},
    "several returned": {"do_sample": True, "num_return_sequences": 3},
    "sampled beams": {"do_sample": True, "num_beams": 2},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "prompt lookup, sampled": {"prompt_lookup_num_tokens": 4, "do_sample": True},
}


def repetitive(tokens: int, batch: int = 1) -> torch.Tensor:
    """A text in which candidates can be looked up."""
    return tiny.text(29, batch=batch).repeat(1, tokens // 29 + 1)[:, :tokens]


def generate(model, ids, tokens=30, **arguments):
    torch.manual_seed(3)
    return model.generate(ids, **({"do_sample": False} | arguments), max_new_tokens=tokens)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_generate_equals_unpatched(family, mode, client):
    model, ids = tiny.make(family), repetitive(150)
    expected = generate(model, ids, **MODES[mode])
    with hga_kvd_patch.patched(model, client, prefill_block=64):
        assert torch.equal(generate(model, ids, **MODES[mode]), expected)
    # The prompt was computed once, for whatever number of sequences.
    assert sum(sum(block for block in session.blocks if block > 10) for session in client.sessions) <= 160
    assert all(session.closed for session in client.sessions)


def test_beams_of_a_batch_with_padding(client):
    model, ids = tiny.make("qwen2"), tiny.text(90, batch=2)
    ids[1, :31] = 0
    arguments = {"attention_mask": (ids != 0).long(), "num_beams": 3, "num_return_sequences": 2}
    expected = generate(model, ids, **arguments)
    with hga_kvd_patch.patched(model, client, prefill_block=40):
        assert torch.equal(generate(model, ids, **arguments), expected)


@pytest.mark.parametrize("who", ["model", "assistant", "both"])
def test_assisted_decoding(who, client):
    model, assistant, ids = tiny.make("llama"), tiny.make("llama", num_hidden_layers=1), tiny.text(70)
    expected = generate(model, ids)
    patched = {"model": [model], "assistant": [assistant], "both": [model, assistant]}[who]
    for one in patched:
        hga_kvd_patch.patch(one, client)
    assert torch.equal(generate(model, ids, assistant_model=assistant), expected)
    for one in patched:
        hga_kvd_patch.unpatch(one)


def test_cache_operations_equal_dynamic_cache(client):
    model, ids = tiny.make("llama"), tiny.text(80, batch=3)

    steps = (
        ("crop", -7, 3),
        ("batch_repeat_interleave", 2, 6),
        ("reorder_cache", torch.tensor([5, 5, 0, 2, 2, 1]), 6),
        ("batch_select_indices", torch.tensor([True, False, True, True, False, False]), 3),
        ("batch_select_indices", torch.tensor([2, 0]), 2),
        ("crop", 0, 2),
        ("crop", -60, 2),
        ("reorder_cache", torch.tensor([0, 1]), 2),
    )

    def run():
        cache = model(ids)[CACHE]
        logits = []
        for seed, (operation, argument, batch) in enumerate(steps):
            getattr(cache, operation)(argument)
            logits.append(model(tiny.text(5, seed, batch), **{CACHE: cache}).logits)
        assert cache.get_seq_length() == 80 - 7 - 60 + 8 * 5
        return logits

    expected = run()
    with hga_kvd_patch.patched(model, client):
        ours = run()
    for mine, theirs in zip(ours, expected, strict=True):
        assert (mine - theirs).abs().max() <= CLOSE


def test_a_name_keeps_the_prompt_that_its_beams_share(client):
    model, ids = tiny.make("llama"), tiny.text(130)
    expected = generate(model, ids, num_beams=3)
    with hga_kvd_patch.patched(model, client, session="doc"):
        assert torch.equal(generate(model, ids, num_beams=3), expected)
        assert torch.equal(generate(model, ids, num_beams=3), expected)
    assert client.stored["doc"].ids.tolist() == ids[0, :128].tolist()
    taken_up = [session for session in client.sessions if session.name]
    assert [session.blocks for session in taken_up] == [[130], [1, 1]]


def test_a_text_that_parts_is_cut_back_if_asked(client, caplog):
    model, ids = tiny.make("llama"), tiny.text(200)
    with hga_kvd_patch.patched(model, client, session="doc", diverging="truncate"):
        model(ids)
        other = torch.cat((ids[:, :100], tiny.text(60, seed=8)), 1)
        assert torch.equal(generate(model, other, 5), generate_unpatched(other))
        assert client.sessions[1].blocks[0] == 1  # 60 tokens are left to feed: fewer than resume_steps
        assert "cut back from 192 tokens to the 100 of the input" in caplog.text
        assert torch.equal(generate(model, ids[:, :90], 5), generate_unpatched(ids[:, :90]))
        assert "cut back from 128 tokens to the 90" in caplog.text
        assert torch.equal(generate(model, tiny.text(70, seed=9), 5), generate_unpatched(tiny.text(70, seed=9)))
        assert "cut back from 64 tokens to the 0" in caplog.text


def generate_unpatched(ids, tokens=5):
    return generate(tiny.make("llama"), ids, tokens)


def test_the_same_text_again_needs_no_leave(client):
    model, ids = tiny.make("llama"), tiny.text(128)
    with hga_kvd_patch.patched(model, client, session="doc"):
        first = generate(model, ids, 1)
        assert torch.equal(generate(model, ids, 1), first)
        assert client.sessions[1].blocks == [1]


def test_candidates_behind_a_stored_prompt(client):
    """Candidates that the session holds already are computed again: their logits are wanted."""
    model, ids = tiny.make("llama"), repetitive(250)
    expected = generate(model, ids[:, :190], 40)
    with hga_kvd_patch.patched(model, client, session="doc", diverging="truncate"):
        model(ids)
        assert torch.equal(generate(model, ids[:, :190], 40, prompt_lookup_num_tokens=6), expected)
    with hga_kvd_patch.patched(model, client, session="doc"), pytest.raises(TextMismatch):
        generate(model, ids[:, :70], 40, prompt_lookup_num_tokens=6)
