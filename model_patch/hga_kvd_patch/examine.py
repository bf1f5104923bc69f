"""Decides whether a model can be patched, and reads from it what a session must know. Changes nothing in the model.

Two steps, because accepting a model wrongly is worse than refusing one. First the config, for the features that have a
name, so that the refusal can name them. Then a probe, which trusts no name: a few tokens go through the model's own
decoder and the attention function sees what really arrives. The probe accepts only if

- every layer, in order, appends K and V and attends once, through the attention interface, with one shape of head;
- keys and queries of one token at several positions are half-split rotations of each other by the frequencies of
  rotary_emb. A lone token attends only to itself, so its key before RoPE is the same at every position, in every layer:
  any other pairing, learned positions, ALiBi, or a layer without RoPE shows;
- the model's own eager attention gives what plain causal softmax attention gives: sinks, soft caps and biases show.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from hga_kvd_client import Rope
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from hga_kvd_patch.attention import NAME, STEP, register
from hga_kvd_patch.cache import Block, Held, HgaLayer
from hga_kvd_patch.errors import ModelRefused, PatchError
from hga_kvd_patch.naming import CACHE

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}

# RoPE whose frequencies never change with the length. "dynamic" and "longrope" do, so stored keys would not fit later
# ones.
_STATIC_ROPE = ("default", "linear", "llama3", "yarn")
# Neighbours, a distance that turns fast pairs often, and one that turns slow pairs.
_PROBE_POSITIONS = (0, 1, 7, 1000)
_PROBE_TOKENS = 8
# Relative to the largest value. Another pairing or another softmax is off by a tenth and more.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class ModelFacts:
    decoder: PreTrainedModel
    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    rope: Rope


@torch.no_grad()
def examine(model: PreTrainedModel) -> ModelFacts:
    """Raises: ModelRefused with the reason."""
    _refuse_by_config(model)
    decoder = _decoder(model)
    rope = _rope(decoder)
    parameter = next(decoder.parameters())
    layers = int(decoder.config.num_hidden_layers)
    before = decoder.config._attn_implementation
    register()
    decoder.config._attn_implementation = NAME
    try:
        rotated = _run_probe(decoder, layers, len(_PROBE_POSITIONS), torch.tensor(_PROBE_POSITIONS)[:, None])
        k = rotated.seen[0].k
        if k.dtype not in DTYPES:
            raise ModelRefused(
                f"{type(decoder).__name__} cannot be patched: its K is {k.dtype}; sessions hold {', '.join(DTYPES.values())}"
            )
        _check_rotation(rotated, rope)
        _check_attention(_run_probe(decoder, layers, 1, torch.arange(_PROBE_TOKENS)[None]))
    finally:
        decoder.config._attn_implementation = before
    return ModelFacts(decoder, layers, k.shape[1], k.shape[3], k.dtype, parameter.device, rope)


# By name.


def _refuse_by_config(model: PreTrainedModel) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ModelRefused(
            f"{type(model).__name__} is not a transformers PreTrainedModel: if it wraps one, patch what is inside "
            "(_orig_mod of torch.compile, get_base_model() of peft)"
        )
    config = model.config

    def has(name: str) -> Any:
        return getattr(config, name, None)

    kinds = {str(kind) for kind in has("layer_types") or ()} - {"full_attention"}
    reasons = (
        (
            config.is_encoder_decoder or has("add_cross_attention"),
            "it has cross attention: only decoders are supported",
        ),
        (
            config.sub_configs,
            f"it has parts of their own ({', '.join(config.sub_configs)}); only plain text decoders are supported",
        ),
        (has("kv_lora_rank"), "it has multi-head latent attention (kv_lora_rank), which keeps no K and V per head"),
        (
            kinds & {"sliding_attention", "chunked_attention"} or has("attention_chunk_size"),
            "it has sliding-window or chunked layers, which forget; only layers of full attention are supported",
        ),
        (
            kinds or model._is_stateful,
            f"it has layers that are not attention ({', '.join(sorted(kinds)) or 'recurrent'})",
        ),
        (
            has("sliding_window") is not None and has("use_sliding_window") is not False,
            f"its attention has a sliding window of {has('sliding_window')} tokens; only full attention is supported",
        ),
        (has("attn_logit_softcapping"), "its attention logits are soft-capped, which paged attention here does not do"),
        (has("alibi"), "its positions are ALiBi biases; only RoPE is supported"),
        (has("is_causal") is False, "its attention is not causal"),
        (
            checkpoints(model),
            "gradient checkpointing in training mode keeps no K and V: call model.eval()",
        ),
        (
            len(set(getattr(model, "hf_device_map", {}).values())) > 1,
            "it is spread over several devices, and a session lives on one",
        ),
        (any(p.is_meta for p in model.parameters()), "some of its weights are not loaded (meta device)"),
        (
            any(hasattr(module, "sinks") for module in model.modules()),
            "its attention has sinks (a learned extra logit a head), which attention here does not have",
        ),
        (
            getattr(getattr(model, "generation_config", None), "cache_implementation", None) not in (None, "dynamic"),
            "its generation_config asks for a quantised, static or offloaded cache: unset cache_implementation",
        ),
    )
    for found, reason in reasons:
        if found:
            raise ModelRefused(f"{type(model).__name__} cannot be patched: {reason}")


def checkpoints(model: nn.Module) -> bool:
    """Whether its layers run twice in training, and so without a cache."""
    return model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _decoder(model: PreTrainedModel) -> PreTrainedModel:
    decoder = model.base_model
    rotary = getattr(decoder, "rotary_emb", None)
    if not isinstance(decoder, PreTrainedModel) or not isinstance(getattr(rotary, "inv_freq", None), Tensor):
        raise ModelRefused(
            f"{type(model).__name__} cannot be patched: its decoder has no rotary_emb with inv_freq; only models with "
            "RoPE in one place for all layers are supported"
        )
    return decoder


def _rope(decoder: PreTrainedModel) -> Rope:
    rotary: Any = decoder.rotary_emb
    kind = getattr(rotary, "rope_type", None)
    if kind not in _STATIC_ROPE:
        raise ModelRefused(
            f"{type(decoder).__name__} cannot be patched: its RoPE is of type {kind!r}; keys that are stored need "
            f"frequencies that do not change with the length ({', '.join(_STATIC_ROPE)})"
        )
    inv_freq = rotary.inv_freq.detach().float().cpu()
    if inv_freq.ndim != 1:
        raise ModelRefused(f"{type(decoder).__name__} cannot be patched: inv_freq has shape {tuple(inv_freq.shape)}")
    return Rope(tuple(inv_freq.tolist()), 2 * inv_freq.shape[0])


# By probing.


@dataclass
class _Seen:
    """One attention call: q [batch, heads, tokens, head_dim], k and v [batch, kv_heads, tokens, head_dim]."""

    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    scaling: float


class _Probe(Block):
    """A block that keeps nothing but what it saw, and attends to itself."""

    def __init__(self) -> None:
        super().__init__((), (), 0)
        self.seen: list[_Seen] = []
        self._kept: tuple[Tensor, Tensor] | None = None

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        if layer != self.layer + 1 or len(self.seen) != layer:
            raise ModelRefused(
                f"layer {layer} keeps K and V after layer {self.layer}, {len(self.seen)} of which attended"
            )
        self.layer, self._kept = layer, (k, v)

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        if len(self.seen) != self.layer or getattr(module, "layer_idx", None) != self.layer:
            raise ModelRefused(f"{type(module).__name__} attends out of order, or without keeping K and V")
        if self._kept is None or not (torch.equal(key, self._kept[0]) and torch.equal(value, self._kept[1])):
            raise ModelRefused(f"{type(module).__name__} attends to other K and V than it keeps")
        if key.shape != value.shape or query.shape[1] % key.shape[1] or query.shape[3] != key.shape[3]:
            raise ModelRefused(f"heads differ: q {tuple(query.shape)}, k {tuple(key.shape)}, v {tuple(value.shape)}")
        if self.seen and key.shape != self.seen[0].k.shape:
            raise ModelRefused(
                f"layers differ: K is {tuple(key.shape)} here and {tuple(self.seen[0].k.shape)} in layer 0"
            )
        self.seen.append(_Seen(module, query, key, value, scaling))
        return _causal_attention(query, key, value, scaling).to(query.dtype)


def _run_probe(decoder: PreTrainedModel, layers: int, batch: int, position_ids: Tensor) -> _Probe:
    """position_ids: [batch, tokens]. Runs that many different tokens; the rows of the batch are equal."""
    probe, held = _Probe(), Held()
    held.block = probe
    device = next(decoder.parameters()).device
    tokens = position_ids.shape[1]
    # Spread over the vocabulary, and not at its ends, where the special tokens are.
    ids = (torch.arange(1, tokens + 1) * decoder.config.vocab_size // (tokens + 2)).expand(batch, tokens)
    try:
        decoder(
            input_ids=ids.to(device),
            position_ids=position_ids.to(device),
            use_cache=True,
            **{CACHE: Cache(layers=[HgaLayer(held, layer) for layer in range(layers)]), STEP: probe},
        )
    except PatchError as error:
        raise ModelRefused(f"{type(decoder).__name__} cannot be patched: {error}") from None
    except Exception as error:
        raise ModelRefused(
            f"{type(decoder).__name__} cannot be patched: a probe of {tokens} tokens failed: {error}"
        ) from error
    if len(probe.seen) != layers:
        raise ModelRefused(
            f"{type(decoder).__name__} cannot be patched: {len(probe.seen)} of {layers} layers go through "
            "transformers' attention interface"
        )
    return probe


def _check_rotation(probe: _Probe, rope: Rope) -> None:
    """The rows of the batch are one token at _PROBE_POSITIONS, the first of which is 0."""
    half = len(rope.inv_freq)
    if 2 * half > probe.seen[0].k.shape[3]:
        raise ModelRefused(f"rotary_emb has {half} frequencies, but heads have {probe.seen[0].k.shape[3]} dims")
    angle = torch.tensor(_PROBE_POSITIONS, dtype=torch.float32)[:, None] * torch.tensor(rope.inv_freq)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    for layer, seen in enumerate(probe.seen):
        for name, tensor in (("keys", seen.k), ("queries", seen.q)):
            actual = tensor[:, :, 0].float().cpu()
            first, second, rest = torch.split(actual[:1], [half, half, actual.shape[2] - 2 * half], 2)
            turned = (
                first * cos - second * sin,
                second * cos + first * sin,
                rest.expand(len(_PROBE_POSITIONS), -1, -1),
            )
            tolerance = _TOLERANCE.get(tensor.dtype, 0.0) * float(actual.abs().max())
            if float((torch.cat(turned, 2) - actual).abs().max()) > tolerance:
                raise ModelRefused(
                    f"{type(seen.module).__name__} cannot be patched: {name} of layer {layer} are not turned by RoPE "
                    "in "
                    f"half-split pairs (i, i + {half}); interleaved pairs, layers without RoPE and other position "
                    "codes are not supported"
                )
            if float((actual - actual[:1]).abs().max()) <= tolerance:
                raise ModelRefused(
                    f"{type(seen.module).__name__} cannot be patched: {name} of layer {layer} do not turn"
                )


def _check_attention(probe: _Probe) -> None:
    for layer, seen in enumerate(probe.seen):
        eager = getattr(sys.modules[type(seen.module).__module__], "eager_attention_forward", None)
        if eager is None:
            raise ModelRefused(
                f"{type(seen.module).__name__} cannot be patched: it has no eager attention to compare with"
            )
        tokens = seen.q.shape[2]
        mask = torch.full((tokens, tokens), torch.finfo(seen.q.dtype).min, device=seen.q.device, dtype=seen.q.dtype)
        theirs, _ = eager(
            seen.module, seen.q, seen.k, seen.v, mask.triu(1)[None, None], scaling=seen.scaling, dropout=0.0
        )
        ours = _causal_attention(seen.q, seen.k, seen.v, seen.scaling).transpose(1, 2)
        if float((theirs.float() - ours).abs().max()) > _TOLERANCE.get(seen.q.dtype, 0.0) * float(ours.abs().max()):
            raise ModelRefused(
                f"{type(seen.module).__name__} cannot be patched: its attention in layer {layer} is not plain causal "
                "softmax attention (sinks, soft caps and biases are not supported)"
            )


def _causal_attention(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """Shapes as in _Seen. Returns [batch, heads, tokens, head_dim], float32."""
    ratio, tokens = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.float().repeat_interleave(ratio, 1), v.float().repeat_interleave(ratio, 1)
    scores = q.float() @ k.transpose(2, 3) * scaling
    hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v
