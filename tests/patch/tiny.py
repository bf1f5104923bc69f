"""Tiny random models of every family that the tests know. fp32, grouped queries, a few layers."""

from __future__ import annotations

from typing import Any

import torch
import transformers

VOCABULARY = 211

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    # Sharp enough that a wrong key shows: at 1,500 tokens one lost chunk moves the logits of each of the last 64 tokens
    # by 0.26 at least. And no sharper: the unpatched fp32 model is 1e-5 from float64 here, 5e-4 at 0.3.
    "initializer_range": 0.15,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "decoder_sparse_step": 1}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama3-rope": (
        "Llama",
        {
            "head_dim": 64,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 1024,
            },
        },
    ),
    "yarn-rope": (
        "Llama",
        {
            "head_dim": 64,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 2048,
            },
        },
    ),
    # Half of the dims of a head are rotated, and there is a bias everywhere.
    "phi": (
        "Phi",
        {"hidden_size": 128, "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"num_hidden_layers": 2, "head_dim": 64}),
    "qwen3-moe": ("Qwen3Moe", _MOE),
}
FOUR = ("llama", "qwen2", "qwen3", "qwen3-moe")


def make(family: str, seed: int = 0, **changes: Any) -> transformers.PreTrainedModel:
    name, own = FAMILIES.get(family, (family, {}))
    return make_any(name, seed, **(_COMMON | own | changes))


def make_any(name: str, seed: int = 0, **arguments: Any) -> transformers.PreTrainedModel:
    """A model of transformers' classes {name}Config and {name}ForCausalLM."""
    config = getattr(transformers, f"{name}Config")(**arguments)
    torch.manual_seed(seed)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def text(tokens: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    """Random ids, [batch, tokens], none of them special."""
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))
