"""The two functions that transformers looks up under the name "hga_kvd".

A call belongs to the daemon if, and only if, a `Step` travels with it: the patched decoder passes one as the keyword
`hga_kvd_step`, which flows through the model's **kwargs down to the attention function. So nothing here is global,
several patched models run side by side, and a call without a step (another Cache, or none) is sdpa, mask included.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from hga_kvd_patch.errors import CallRefused

NAME = "hga_kvd"
STEP = "hga_kvd_step"

# What models pass to an attention function without changing what it must compute.
_HARMLESS = {
    "position_ids",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "is_causal",
}


class Step(Protocol):
    """One block of tokens on its way through the layers."""

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """query: [batch, heads, tokens, head_dim]; key, value: [batch, kv_heads, tokens, head_dim], as `update`
        returned them. Returns [batch, heads, tokens, head_dim]."""
        ...


def hga_kvd_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    hga_kvd_step: Step | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An AttentionInterface function. Returns [batch, tokens, heads, head_dim] and no weights.

    Raises: CallRefused for anything that would change the attention and that this function does not know.
    """
    if hga_kvd_step is None:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out, None
    changes = [name for name, value in kwargs.items() if value is not None and name not in _HARMLESS]
    if changes:
        raise CallRefused(f"attention with {', '.join(sorted(changes))} is more than causal softmax attention")
    if kwargs.get("is_causal") is False:
        raise CallRefused("attention is not causal here; K/V in the daemon are for causal decoders")
    if kwargs.get("output_attentions"):
        raise CallRefused("attention weights do not exist as a matrix here: leave out output_attentions")
    if dropout:
        raise CallRefused(f"attention dropout is {dropout}: call model.eval()")
    if attention_mask is not None:
        raise CallRefused(
            "the model made an attention mask of its own; only causal masks and left padding are supported"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return hga_kvd_step.attend(module, query, key, value, scale).transpose(1, 2).contiguous(), None


def register() -> None:
    """Makes the name known to transformers, once and for good; without a patched model nothing asks for it.

    The mask is sdpa's: calls without a step need exactly that, and calls with one pass no mask down.
    """
    AttentionInterface.register(NAME, hga_kvd_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
