"""What a user does to a patched model without meaning harm: it works as without the patch, or is refused in a sentence."""

from __future__ import annotations

import copy

import hga_kvd_patch
import pytest
import tiny
import torch
from dense_client import DenseClient
from hga_kvd_patch import CACHE, CallRefused, ModelRefused, PatchError, TextMismatch

CLOSE = 1e-4


@pytest.fixture
def model():
    return tiny.make("llama")


def test_another_attention_while_patched(model, client):
    """It would see the block at hand and nothing before it."""
    ids = tiny.text(90)
    with hga_kvd_patch.patched(model, client, prefill_block=30):
        model.set_attn_implementation("eager")
        with pytest.raises(CallRefused, match="layer 0 did not attend through hga-kvd"):
            model(ids)
        model.set_attn_implementation("hga_kvd")
        model(ids)
    assert model.config._attn_implementation == "sdpa"


def test_only_the_last_layer_attends_otherwise(model, client):
    with hga_kvd_patch.patched(model, client):
        last = model.model.layers[-1].self_attn
        last.config = copy.copy(last.config)
        last.config._attn_implementation = "sdpa"
        with pytest.raises(CallRefused, match="layer 2 did not attend"):
            model(tiny.text(20))


def test_a_copy_of_a_patched_model(model, client):
    """It would run the original's weights."""
    with hga_kvd_patch.patched(model, client):
        for part in (model, model.model):
            with pytest.raises(PatchError, match="cannot be copied: unpatch it first"):
                copy.deepcopy(part)
    copy.deepcopy(model)


def test_gradient_checkpointing(model, client):
    new_name = hasattr(model, "activation_checkpointing_enable")
    (model.activation_checkpointing_enable if new_name else model.gradient_checkpointing_enable)()
    model.train()
    with pytest.raises(ModelRefused, match="gradient checkpointing in training mode"):
        hga_kvd_patch.patch(model, client)
    with hga_kvd_patch.patched(model.eval(), client):
        model(tiny.text(5))
        model.train()
        with pytest.raises(CallRefused, match="gradient checkpointing in training mode"):
            model(tiny.text(5))
        with torch.enable_grad():
            model(tiny.text(5), labels=tiny.text(5), use_cache=False).loss.backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_float64_and_wrappers_are_named(model, client):
    with pytest.raises(ModelRefused, match=r"its K is torch.float64; sessions hold float32"):
        hga_kvd_patch.patch(copy.deepcopy(model).double(), client)
    with pytest.raises(ModelRefused, match=r"patch what is inside \(_orig_mod"):
        hga_kvd_patch.patch(torch.compile(model), client)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_compiled_model_that_is_patched_inside(model, client):
    """Eager where the daemon is asked; what counts is that it is right."""
    ids = tiny.text(70)
    expected = model(ids).logits
    outer = torch.compile(model, backend="eager")
    with hga_kvd_patch.patched(model, client, prefill_block=32):
        cache = outer(ids[:, :69])[CACHE]
        assert (outer(ids[:, 69:], **{CACHE: cache}).logits - expected[:, 69:]).abs().max() <= CLOSE
    assert (outer(ids).logits - expected).abs().max() <= CLOSE


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_compiled_layers(model, client):
    ids = tiny.text(70)
    expected = model(ids).logits
    for layer in model.model.layers:
        layer.compile(backend="eager")
    with hga_kvd_patch.patched(model, client, prefill_block=32):
        cache = model(ids[:, :69])[CACHE]
        assert (model(ids[:, 69:], **{CACHE: cache}).logits - expected[:, 69:]).abs().max() <= CLOSE


def test_cache_position_is_what_it_was(model, client):
    ids = tiny.text(90)
    expected = model(ids).logits
    with hga_kvd_patch.patched(model, client, prefill_block=40):
        assert (model(ids, cache_position=torch.arange(90)).logits - expected).abs().max() <= CLOSE


def test_equal_rows_can_be_given_again_after_a_failure(model, client):
    ids = tiny.text(30).repeat(3, 1)
    expected = model(ids).logits
    with hga_kvd_patch.patched(model, client) as state:
        cache = state.new_cache()
        client.fail_at_block = 1
        with pytest.raises(ConnectionError):
            model(ids, **{CACHE: cache})
        assert (model(ids, **{CACHE: cache}).logits - expected).abs().max() <= CLOSE
    assert all(session.closed for session in client.sessions)


def test_a_refused_call_does_not_lend_its_session_to_another_text(model, client):
    ids, other = tiny.text(150), tiny.text(150, seed=9)
    with hga_kvd_patch.patched(model, client) as state:
        model(ids, **{CACHE: state.new_cache("doc")})[CACHE].close()
        cache = state.new_cache("doc")
        with pytest.raises(CallRefused, match="position_ids must count"):
            model(ids, position_ids=torch.zeros(1, 150).long(), **{CACHE: cache})
        with pytest.raises(TextMismatch, match="holds another text"):
            model(other, **{CACHE: cache})
        assert model(ids, **{CACHE: cache}).logits[:, -1].isfinite().all()


@pytest.mark.parametrize(
    ("hidden", "reason"),
    [((1, slice(35, 40)), "padding after tokens"), ((0, slice(0, 3)), r"shows \[37, 40\] tokens in the cache")],
)
def test_a_mask_that_hides_later_what_was_given(hidden, reason, model, client):
    mask = torch.ones(2, 50).long()
    mask[hidden] = 0
    with hga_kvd_patch.patched(model, client):
        cache = model(tiny.text(40, batch=2))[CACHE]
        with pytest.raises(CallRefused, match=reason):
            model(tiny.text(10, batch=2), attention_mask=mask, **{CACHE: cache})


def test_a_mask_of_rows_that_were_padded_and_cropped(model, client):
    """The mask goes on as a DynamicCache wants it, over columns of which some are gone."""
    ids, more = tiny.text(40, batch=2), tiny.text(9, seed=3, batch=2)
    mask = torch.ones(2, 40).long()
    mask[1, :25] = 0

    def run():
        cache = model(ids, attention_mask=mask)[CACHE]
        cache.crop(-10)
        longer = torch.cat((mask[:, :30], torch.ones(2, 9).long()), 1)
        return model(more, attention_mask=longer, **{CACHE: cache}).logits

    expected = run()
    with hga_kvd_patch.patched(model, client):
        assert (run() - expected).abs().max() <= CLOSE


def test_a_part_of_the_layers_as_assistant(client):
    model = tiny.make("llama", num_hidden_layers=4)
    with hga_kvd_patch.patched(model, client), pytest.raises(CallRefused, match="assistant_early_exit runs a part"):
        model.generate(tiny.text(20), max_new_tokens=4, assistant_early_exit=2)


def test_a_handle_that_is_no_longer_the_models(model):
    first, second = DenseClient(), DenseClient()
    with hga_kvd_patch.patched(model, first):
        hga_kvd_patch.unpatch(model)
        state = hga_kvd_patch.patch(model, second)
    model(tiny.text(5))
    assert (len(first.sessions), len(second.sessions)) == (0, 1)
    assert state.decoder.config._attn_implementation == "hga_kvd"
    hga_kvd_patch.unpatch(model)
    assert model.config._attn_implementation == "sdpa"
