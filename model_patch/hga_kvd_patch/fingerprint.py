"""Which model K/V came from: a text that is equal only if config, weights and the way of prefilling are.

K/V of layer n depend on all weights before it, so samples of every parameter of the decoder go in, not only of the K
and V projections: an adapter on an MLP changes K/V too. A fine-tune that leaves 256 evenly spaced values of each
parameter as they were is not noticed; a revision given by the user takes the place of the samples.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import nn

# 256 values of each of the 1,000 parameters of a 48-layer model: one small copy from the device.
SAMPLES = 256

# What a config says that leaves K/V as they are. Everything else counts, also what we do not know: a session refused
# for no reason is better than wrong K/V.
_NO_EFFECT = {
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "is_encoder_decoder",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "router_aux_loss_coef",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def model_fingerprint(
    config: dict[str, Any], decoder: nn.Module, revision: str | None = None, prefill: str = "exact"
) -> str:
    """The text for Geometry.model_fingerprint; readable enough that a mismatch says which part differs."""
    weights = f"revision:{revision}" if revision else f"weights:{_weights_hash(decoder)}"
    return f"v1 prefill:{prefill} config:{_config_hash(config)} {weights}"


def _config_hash(config: dict[str, Any]) -> str:
    fields = {name: value for name, value in config.items() if name not in _NO_EFFECT}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:16]


@torch.no_grad()
def _weights_hash(decoder: nn.Module) -> str:
    names = []
    samples: dict[torch.dtype, list[torch.Tensor]] = {}
    for name, parameter in decoder.named_parameters():
        names.append(f"{name} {tuple(parameter.shape)} {parameter.dtype}")
        values = parameter.numel()
        # Integer arithmetic: float indices differ between devices.
        index = torch.arange(min(SAMPLES, values), device=parameter.device) * values // min(SAMPLES, values)
        samples.setdefault(parameter.dtype, []).append(parameter.detach().reshape(-1)[index])
    total = hashlib.sha256("\n".join(names).encode())
    for dtype in sorted(samples, key=str):
        values_of_dtype = torch.cat([s.cpu() for s in samples[dtype]]).contiguous()
        total.update(values_of_dtype.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:32]
