"""What the patch must not accept, and what it says. A model that is refused is left as it was."""

from __future__ import annotations

import subprocess
import sys

import hga_kvd_patch
import pytest
import tiny
import torch
from dense_client import DenseClient
from hga_kvd_client import SessionOptions
from hga_kvd_client.errors import Unavailable
from hga_kvd_patch import (
    CACHE,
    AlreadyPatched,
    CacheRefused,
    CacheUnusable,
    CallRefused,
    ModelRefused,
    NotPatched,
    PatchError,
)
from hga_kvd_patch.examine import examine
from hga_kvd_patch.fingerprint import model_fingerprint
from torch import nn
from transformers.models.llama import modeling_llama

_SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
_LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, "factor": 2.0}
_MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "head_dim": 8, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
}  # fmt: skip

MODELS = {
    "learned positions": (
        "OPT",
        {"hidden_size": 48, "num_hidden_layers": 2, "ffn_dim": 32, "vocab_size": 97},
        "no rotary_emb",
    ),
    "alibi": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 2, "vocab_size": 97}, "no rotary_emb"),
    "interleaved pairs, gptj": (
        "GPTJ",
        {"n_embd": 64, "n_layer": 2, "n_head": 2, "rotary_dim": 16, "vocab_size": 97},
        "no rotary_emb",
    ),
    "interleaved pairs, cohere": ("Cohere", _SMALL, "half-split pairs"),
    "interleaved pairs, glm": ("Glm", _SMALL, "half-split pairs"),
    "layers without rope": ("SmolLM3", _SMALL, "keys of layer 3 are not turned"),
    "sliding window": ("Mistral", _SMALL | {"sliding_window": 128}, "sliding window of 128 tokens"),
    "sliding layers": (
        "Qwen2",
        _SMALL | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
        "sliding-window or chunked layers",
    ),
    "soft caps and sliding": ("Gemma2", _SMALL, "sliding-window"),
    "soft caps": ("Gemma2", _SMALL | {"layer_types": ["full_attention"] * 4, "sliding_window": None}, "soft-capped"),
    "sinks": (
        "GptOss",
        _SMALL | {"layer_types": ["full_attention"] * 4, "sliding_window": None, "num_local_experts": 2},
        "sinks",
    ),
    "latent attention": ("DeepseekV3", _SMALL | _MLA, "multi-head latent attention"),
    "cross attention": ("Bart", {"d_model": 32, "vocab_size": 97}, "no rotary_emb"),
    "recurrent": (
        "Mamba",
        {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 97},
        "layers that are not attention",
    ),
    "hybrid": ("Qwen3Next", _SMALL | {"num_experts": 2}, "layers that are not attention"),
    "frequencies that change": (
        "Llama",
        _SMALL | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "RoPE is of type 'dynamic'",
    ),
    "frequencies that change, longrope": (
        "Phi3",
        _SMALL | {"rope_parameters": _LONG | {"long_factor": [2.0] * 8, "short_factor": [1.0] * 8}},
        "RoPE is of type 'longrope'",
    ),
    "repeated keys": (
        "JetMoe",
        _SMALL | {"kv_channels": 16, "num_local_experts": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2},
        "other K and V than it keeps",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", MODELS)
def test_models(case):
    name, arguments, reason = MODELS[case]
    model = tiny.make_any(name, **arguments)
    before = model.config._attn_implementation
    with pytest.raises(ModelRefused, match=reason):
        hga_kvd_patch.patch(model, DenseClient())
    assert model.config._attn_implementation == before
    with pytest.raises(NotPatched):
        hga_kvd_patch.unpatch(model)


def test_encoder_decoder():
    model = tiny.make_any("Llama", **_SMALL)
    model.config.is_encoder_decoder = True
    with pytest.raises(ModelRefused, match="cross attention"):
        examine(model)


def test_not_a_model_of_transformers():
    with pytest.raises(ModelRefused, match="Linear is not a transformers PreTrainedModel"):
        hga_kvd_patch.patch(nn.Linear(2, 2), DenseClient())


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_import_without_an_extra_names_it(missing):
    program = f"import sys; sys.modules[{missing!r}] = None; import hga_kvd_patch"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.stderr.endswith('hga_kvd_patch needs torch and transformers: pip install "hga-kvd[patch]"\n')


# Models whose config says nothing, so that only the probe can tell. Each takes a Llama and breaks one thing.


def _interleave(q, k, cos, sin, **_):
    def turned(x):
        c, s = cos[:, None, :, : x.shape[-1] // 2], sin[:, None, :, : x.shape[-1] // 2]
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack((even * c - odd * s, odd * c + even * s), -1).flatten(-2)

    return turned(q), turned(k)


def _unturned_keys(q, k, cos, sin, **_):
    return modeling_llama.rotate_half(q) * sin[:, None] + q * cos[:, None], k


def _faster(q, k, cos, sin, **_):
    return original_rotation(q, k, cos[..., :1], sin[..., :1])


original_rotation = modeling_llama.apply_rotary_pos_emb
original_eager = modeling_llama.eager_attention_forward


@pytest.mark.parametrize("rotation", [_interleave, _unturned_keys, _faster])
def test_probe_sees_another_rotation(rotation, monkeypatch):
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotation)
    with pytest.raises(ModelRefused, match="of layer 0"):
        examine(tiny.make("llama"))


def test_probe_sees_another_softmax(monkeypatch):
    def capped(module, query, *rest, scaling, **options):
        return original_eager(module, (query * scaling).tanh(), *rest, scaling=1.0, **options)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", capped)
    with pytest.raises(ModelRefused, match="not plain causal softmax attention"):
        examine(tiny.make("llama"))


@pytest.mark.parametrize("name", ["softcap", "sliding_window", "s_aux", "position_bias", "something_new"])
def test_probe_sees_what_is_passed_to_the_attention(name, monkeypatch):
    model = tiny.make("llama")
    for layer in model.model.layers:
        inner = layer.self_attn.forward
        monkeypatch.setattr(layer.self_attn, "forward", lambda *a, inner=inner, **k: inner(*a, **k, **{name: 8}))
    with pytest.raises(ModelRefused, match=f"attention with {name} is more than"):
        examine(model)


def test_probe_sees_layers_that_do_not_take_part(monkeypatch):
    model = tiny.make("llama")
    attention = model.model.layers[1].self_attn
    inner = attention.forward
    monkeypatch.setattr(attention, "forward", lambda *a, **k: inner(*a, **(k | {CACHE: None})))
    with pytest.raises(ModelRefused, match="without keeping K and V"):
        examine(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_probe_accepts_every_family_in_every_dtype(family, dtype):
    facts = examine(tiny.make(family).to(dtype))
    assert (facts.dtype, facts.kv_heads) == (dtype, 2)


def test_partial_rotary():
    model = tiny.make_any("GPTNeoX", **_SMALL | {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}})
    facts = examine(model)
    assert (facts.head_dim, facts.rope.rotary_dim) == (16, 8)
    ids = torch.arange(3, 90)[None]
    expected = model(ids).logits
    with hga_kvd_patch.patched(model, DenseClient(), prefill_block=20):
        assert (model(ids).logits - expected).abs().max() <= 1e-4


# patch and unpatch.


def test_patch_twice_and_unpatch_twice():
    model, client = tiny.make("llama"), DenseClient()
    hga_kvd_patch.patch(model, client)
    for again in (model, model.model):
        with pytest.raises(AlreadyPatched):
            hga_kvd_patch.patch(again, client)
    hga_kvd_patch.unpatch(model)
    with pytest.raises(NotPatched):
        hga_kvd_patch.unpatch(model)


def test_patch_without_a_daemon_leaves_the_model_alone(tmp_path):
    model = tiny.make("llama")
    with pytest.raises(Unavailable):
        hga_kvd_patch.patch(model, f"unix:{tmp_path}/nobody.sock", reconnect_s=0.1)
    with pytest.raises(NotPatched):
        hga_kvd_patch.unpatch(model)
    with pytest.raises(PatchError, match="prefill_block is 1"):
        hga_kvd_patch.patch(model, DenseClient(), prefill_block=1)
    with pytest.raises(PatchError, match="diverging is 'cut'"):
        hga_kvd_patch.patch(model, DenseClient(), diverging="cut")
    assert model.config._attn_implementation == "sdpa"


def test_a_cache_config_in_the_model():
    model = tiny.make("llama")
    model.generation_config.cache_implementation = "quantized"
    with pytest.raises(ModelRefused, match="quantised, static or offloaded cache"):
        examine(model)


# Calls.


@pytest.fixture
def model():
    made = tiny.make("llama")
    with hga_kvd_patch.patched(made, DenseClient()):
        yield made


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"cache_implementation": "quantized"}, "cache_implementation='quantized'"),
        ({"cache_implementation": "offloaded"}, "cache_implementation='offloaded'"),
        ({"penalty_alpha": 0.6, "top_k": 4, "custom_generate": lambda *_, **__: None}, "mode contrastive_search"),
    ],
)
def test_generation_modes(arguments, reason, model):
    with pytest.raises(CallRefused, match=reason):
        model.generate(tiny.text(20), max_new_tokens=3, **arguments)


def test_training(model):
    with torch.enable_grad():
        with pytest.raises(CallRefused, match="no gradients"):
            model(tiny.text(5))
        with pytest.raises(CallRefused, match=r"torch.no_grad\(\)"):
            model.model(tiny.text(5), use_cache=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"attention_mask": torch.tensor([[1, 1, 1, 0]])}, "pad on the left"),
        ({"attention_mask": torch.tensor([[0, 1, 0, 1]])}, "pad on the left"),
        ({"attention_mask": torch.ones(1, 1, 4, 4, dtype=torch.bool)}, "only 2-D attention masks"),
        ({"attention_mask": torch.ones(1, 7)}, "must cover everything"),
        ({"position_ids": torch.tensor([[0, 1, 2, 4]])}, "position_ids must count"),
        ({"position_ids": torch.arange(4).expand(3, 1, 4)}, "position_ids must count"),
        ({"output_attentions": True}, "leave out output_attentions"),
        ({"inputs_embeds": torch.zeros(1, 4, 64)}, "exactly one of"),
    ],
)
def test_inputs(change, reason, model):
    with pytest.raises(CallRefused, match=reason):
        model.model(input_ids=tiny.text(4), **change)


def test_padding_after_tokens_were_given(model):
    cache = model(tiny.text(4))[CACHE]
    with pytest.raises(CallRefused, match="padding between tokens"):
        model(tiny.text(3), **{CACHE: cache}, attention_mask=torch.tensor([[1, 1, 1, 1, 0, 1, 1]]))
    with pytest.raises(CallRefused, match="holds 1 sequences, but the batch has 2"):
        model(tiny.text(3, batch=2), **{CACHE: cache})


def test_dropout():
    made = tiny.make("llama", attention_dropout=0.1).train()
    with pytest.raises(ModelRefused, match=r"dropout is 0.1: call model.eval\(\)"):
        examine(made)


def test_cache_operations(model):
    cache = model(tiny.text(4))[CACHE]
    layer = cache.layers[0]
    for operation, argument in (
        (layer.crop, -1),
        (layer.reorder_cache, torch.tensor([0])),
        (layer.batch_repeat_interleave, 2),
        (layer.batch_select_indices, torch.tensor([0])),
    ):
        with pytest.raises(CacheRefused, match="the whole HgaCache"):
            operation(argument)
    with pytest.raises(CacheRefused, match="only in calls of the patched model"):
        tiny.make("llama")(tiny.text(3), **{CACHE: cache})
    assert cache.is_croppable
    assert not cache.is_compileable
    cache.close()
    for operation, argument in ((cache.crop, -1), (cache.reorder_cache, torch.tensor([0]))):
        with pytest.raises(CacheUnusable, match="was closed"):
            operation(argument)


# The fingerprint.


def test_fingerprint():
    config, model = {"hidden_size": 4}, tiny.make("llama")
    base = model_fingerprint(config, model.model)
    assert base == model_fingerprint(config | {"use_cache": False, "_name_or_path": "x"}, model.model)
    assert base != model_fingerprint(config | {"rms_norm_eps": 1e-4}, model.model)
    assert base != model_fingerprint(config, model.model, prefill=SessionOptions(prefill="routed").prefill_text())
    assert model_fingerprint(config, model.model, "r1") == model_fingerprint(config, tiny.make("llama", 1).model, "r1")
    for name in ("k_proj", "v_proj"):
        for layer in range(3):
            with torch.no_grad():
                weight = getattr(model.model.layers[layer].self_attn, name).weight
                weight.mul_(1.01)
                assert model_fingerprint(config, model.model) != base
                weight.div_(1.01)
    assert len(base.encode()) < 200
