"""Routed decode simulated inside one forward of a whole text: every token from `start` on attends as if it came alone.

The rules are the client's own functions (sketch.py, routing.py, summaries.py), called with many tokens at once; what a
token may route to and what is in its window is exactly what a Session has when that token is decoded: chunk c is closed
once token 64 (c + 1) comes, the last `recent_chunks` closed chunks and everything after them are the window. Tokens
before `start` are a prompt that was prefilled exactly. Nothing is random.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from hga_kvd_client.float8 import pack, unpack
from hga_kvd_client.options import Rope
from hga_kvd_client.routing import causal_union, route_hga, route_sketch
from hga_kvd_client.sketch import Basis, Moments, SketchSpec, encode, log_mass
from hga_kvd_client.summaries import Turns, mixed_mean
from torch import Tensor
from transformers.modeling_utils import AttentionInterface

CHUNK, GROUP = 64, 16
PER_CHUNK = CHUNK // GROUP
NAME = "hga_kvd_simulated"
# Tokens routed and attended in one call on a GPU: enough to hide the launches, 150 MB of scores at 8 K.
ROUTED_TOKENS = 512


class Router(Protocol):
    """One layer of one text."""

    batched: bool  # whether tokens of several chunks can be routed in one call

    def masks(self, q: Tensor, first: int, end: int, exact: Tensor, window: Tensor, routable: Tensor) -> Tensor:
        """What each token opens of the groups of chunks first .. end-1: bool [kv_heads or heads, tokens, groups].

        q: [kv_heads, ratio, tokens, dim], scaled; exact: scores of these groups' tokens, [kv_heads, ratio, tokens,
        keys], for the oracle only; window: log mass of the window, [kv_heads, ratio, tokens]; routable: bool [tokens,
        groups], all if not batched.
        """
        ...


# A rule makes the router of a layer from q [kv_heads, ratio, tokens, dim] (not scaled), k [kv_heads, tokens, dim] as it is
# stored, and k as it was computed.
Rule = Callable[[Tensor, Tensor, Tensor], Router]


@dataclass(frozen=True)
class Row:
    """One line of the table. rule: None attends to the window alone. state: routing state over bf16 K/V bytes."""

    name: str
    rule: Rule | None
    state: float | None = None
    block_visibility: bool = False
    kv_float8: bool = False
    dense: bool = False


class Hga:
    """own: every query head attends only to what it chose itself; else a KV head's heads share."""

    batched = False

    def __init__(
        self, rope: Rope, topk_chunks: int, topk_groups: int, pooled: bool, own: bool, k: Tensor, scale: float
    ) -> None:
        kv_heads, tokens, dim = k.shape
        chunks = tokens // CHUNK
        whole = k[:, : chunks * CHUNK]
        self.chunks = mixed_mean(whole.view(kv_heads, chunks, CHUNK, dim), Turns.of_block(rope, CHUNK, CHUNK, k.device))
        turns = Turns.of_block(rope, GROUP, CHUNK, k.device)
        self.groups = mixed_mean(whole.view(kv_heads, chunks, PER_CHUNK, GROUP, dim), turns)
        self.knobs = (topk_chunks, topk_groups, pooled)
        self.scale, self.own = scale, own

    def masks(self, q: Tensor, first: int, end: int, exact: Tensor, window: Tensor, routable: Tensor) -> Tensor:
        q, chunks, groups = q / self.scale, self.chunks[:, first:end], self.groups[:, first:end]
        if self.own:
            ratio = q.shape[1]
            q = q.flatten(0, 1)[:, None]
            chunks, groups = chunks.repeat_interleave(ratio, 0), groups.repeat_interleave(ratio, 0)
        return route_hga(q, chunks, groups, *self.knobs)


class Sketched:
    batched = True

    def __init__(self, spec: SketchSpec, basis: Basis, k: Tensor, budget: int, cover: float) -> None:
        kv_heads, tokens, dim = k.shape
        chunks = tokens // CHUNK
        whole = k[:, : chunks * CHUNK].view(kv_heads, chunks, CHUNK, dim).transpose(0, 1)
        self.spec, self.basis, self.budget, self.cover = spec, basis, budget * kv_heads, cover
        self.records = encode(spec, basis, whole).transpose(0, 1).contiguous()

    def masks(self, q: Tensor, first: int, end: int, exact: Tensor, window: Tensor, routable: Tensor) -> Tensor:
        z, offset = self.basis.project(q.flatten(1, 2))
        mass = log_mass(self.spec, z, offset, self.records[:, first:end])
        mass = mass.view(*q.shape[:3], -1).masked_fill(~routable, -torch.inf)
        return route_sketch(mass, window, self.budget, self.cover)


class Oracle:
    batched = True

    def __init__(self, kv_heads: int, budget: int) -> None:
        self.budget = budget * kv_heads

    def masks(self, q: Tensor, first: int, end: int, exact: Tensor, window: Tensor, routable: Tensor) -> Tensor:
        mass = exact.view(*exact.shape[:3], -1, GROUP).logsumexp(4)
        return route_sketch(mass.masked_fill(~routable, -torch.inf), window, self.budget)


class Simulation:
    """Puts its attention into a model; `run` gives a text's loss under a row's rule, and what was opened.

    The prompt is run once a text and kept: its K/V and queries are the same under every rule, unless a rule routes the
    prompt too.
    """

    def __init__(self, model: Any, start: int, sink_chunks: int = 2, recent_chunks: int = 8) -> None:
        assert start % CHUNK == 0
        self.model, self.start = model, start
        self.sinks, self.recent = sink_chunks, recent_chunks
        self.opened = self.routable = 0
        self._row: Row | None = None
        self._ids: Tensor | None = None
        self._prompt: dict[int, tuple[Tensor, Tensor, Tensor]] = {}  # layer: q, k, v
        self._hidden = torch.empty(0)
        AttentionInterface.register(NAME, self._attention)
        model.set_attn_implementation(NAME)

    @torch.inference_mode()
    def run(self, ids: Tensor, row: Row | None) -> float:
        """Mean loss of tokens start .. end of ids [tokens]; row None: dense. Sets `opened` and `routable`."""
        everything = row is not None and row.block_visibility
        if not everything and ids is not self._ids:
            self._row, self._prompt = None, {}
            self._hidden = self._forward(ids, 0, self.start)
            self._ids = ids
        self._row = row
        self.opened = self.routable = 0
        if everything:
            kept, self._prompt = self._prompt, {}
            hidden = self._forward(ids, 0, len(ids))[self.start - 1 :]
            self._prompt = kept
        else:
            hidden = torch.cat((self._hidden[-1:], self._forward(ids, self.start, len(ids))))
        total = 0.0
        for first in range(0, len(hidden) - 1, 1024):
            end = min(first + 1024, len(hidden) - 1)
            logits = self.model.lm_head(hidden[first:end]).float()
            expected = ids[self.start + first : self.start + end]
            total += float(torch.nn.functional.cross_entropy(logits, expected, reduction="sum"))
        # Counted on the device: one wait a text.
        self.opened, self.routable = int(self.opened), int(self.routable)
        return total / (len(ids) - self.start)

    def _forward(self, ids: Tensor, first: int, end: int) -> Tensor:
        """Tokens first .. end-1; those before first are the prompt that was kept. Returns [tokens, hidden]."""
        positions = torch.arange(first, end, device=ids.device)[None]
        out: Tensor = self.model.base_model(
            input_ids=ids[None, first:end], position_ids=positions, use_cache=False
        ).last_hidden_state[0]
        return out

    def _attention(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        assert query.shape[0] == 1
        k, v = key[0], value[0]
        q = query[0].view(k.shape[0], -1, *query.shape[2:])
        row, layer, start = self._row, module.layer_idx, 0
        if layer in self._prompt:
            start = self.start
            q, k, v = (torch.cat(pair, -2) for pair in zip(self._prompt[layer], (q, k, v), strict=True))
        elif row is None and q.shape[2] == self.start:
            self._prompt[layer] = (q, k, v)
        if row is None:
            out = _dense(q, k, v, scaling, start)
        else:
            exact = (k, v)
            if row.kv_float8:
                k, v = float8(k), float8(v)
            router = row.rule(q, k, exact[0]) if row.rule else None
            batched = (router is None or router.batched) and k.device.type == "cuda"
            size, tokens = ROUTED_TOKENS if batched else CHUNK, k.shape[1]
            parts = [
                self._routed(q, k, v, exact, scaling, first, min(first + size, tokens), router)
                for first in range(start, tokens, size)
            ]
            out = torch.cat(parts, 2)
        return out.flatten(0, 1).transpose(0, 1)[None].contiguous(), None

    def _routed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        exact: tuple[Tensor, Tensor],
        scale: float,
        first: int,
        end: int,
        router: Router | None,
    ) -> Tensor:
        """Tokens first .. end-1, whole chunks. Returns [kv_heads, ratio, tokens, dim].

        Tokens of several chunks differ in what is routable: what is not has no mass, and is never opened.
        k, v: as closed chunks have them; exact: as the open chunk, each token's own, has them.
        """
        kv_heads, ratio, _, dim = q.shape
        tokens = end - first
        q = q[:, :, first:end] * scale
        scores = torch.bmm(q.flatten(1, 2), k[:, :end].transpose(1, 2)).view(kv_heads, ratio, tokens, end)
        at = torch.arange(first, end, device=q.device)
        assert self._row is not None
        if self._row.kv_float8:
            own_k, own_v = (t[:, None, first:end].unflatten(2, (-1, CHUNK)) for t in exact)
            _own_chunk(scores, first).copy_(q.unflatten(2, (-1, CHUNK)) @ own_k.transpose(3, 4))
        scores.masked_fill_(torch.arange(end, device=q.device) > at[:, None], -torch.inf)
        low, high = self.sinks, max(self.sinks, (end - 1) // CHUNK - self.recent)
        if high > low:
            far = scores[..., low * CHUNK : high * CHUNK]
            chunks = torch.arange(low, high, device=q.device) < (at // CHUNK - self.recent)[:, None]
            routable = chunks.repeat_interleave(PER_CHUNK, 1)  # [tokens, groups]
            leaves = chunks.repeat_interleave(CHUNK, 1)  # [tokens, keys]: not in the token's window
            near = torch.logaddexp(scores[..., : low * CHUNK].logsumexp(3), scores[..., high * CHUNK :].logsumexp(3))
            near = torch.logaddexp(near, far.masked_fill(leaves, -torch.inf).logsumexp(3))
            opened = torch.zeros(kv_heads, tokens, routable.shape[1], dtype=torch.bool, device=q.device)
            if self._row.dense:
                opened |= routable
            elif router is not None:
                opened = router.masks(q, low, high, far, near, routable) & routable
                if self._row.block_visibility:
                    opened = causal_union(opened)
            if first >= self.start:
                self.opened += opened.view(kv_heads, -1, *opened.shape[1:]).any(1).sum()
                self.routable += routable.sum() * kv_heads
            by_head = opened.view(kv_heads, -1, *opened.shape[1:])  # one mask for the KV head, or one a query head
            far.masked_fill_(~by_head.repeat_interleave(GROUP, 3) & leaves, -torch.inf)
        weights = scores.softmax(3)
        out = torch.bmm(weights.flatten(1, 2), v[:, :end]).view(kv_heads, ratio, tokens, dim)
        if self._row.kv_float8:
            own_v = own_v - v[:, None, first:end].unflatten(2, (-1, CHUNK))
            out += (_own_chunk(weights, first) @ own_v).flatten(2, 3)
        return out


def float8(values: Tensor) -> Tensor:
    """K or V as fp8 records give them back. values: [kv_heads, tokens, dim]; what is no whole group stays as it is."""
    kv_heads, tokens, dim = values.shape
    whole = tokens // GROUP * GROUP
    records = values[:, :whole].reshape(kv_heads, -1, GROUP * dim)
    back = unpack(pack(records), values.dtype).view(kv_heads, whole, dim)
    return torch.cat((back, values[:, whole:]), 1)


def sketch_rule(spec: SketchSpec, budget: int, basis_tokens: int, basis_first: int = 0, cover: float = 1.0) -> Rule:
    """basis_tokens: 0 for plain keys; else how many, from basis_first on, the basis is made of."""

    def rule(q: Tensor, k: Tensor, exact_k: Tensor) -> Router:
        if basis_tokens:
            moments = Moments(k.shape[0], k.shape[2], k.device)
            span = slice(basis_first, basis_first + basis_tokens)
            moments.add(q[:, :, span], exact_k[:, span])
            basis = Basis.of(moments)
        else:
            basis = Basis.none(k.shape[0], k.shape[2], k.device)
        return Sketched(spec, basis, k, budget, cover)

    return rule


def hga_rule(
    rope: Rope, topk_chunks: int, topk_groups: int, scale: float, pooled: bool = False, own: bool = False
) -> Rule:
    return lambda q, k, exact_k: Hga(rope, topk_chunks, topk_groups, pooled, own, k, scale)


def oracle_rule(budget: int) -> Rule:
    return lambda q, k, exact_k: Oracle(k.shape[0], budget)


def _own_chunk(scores: Tensor, first: int) -> Tensor:
    """What tokens have of the keys of their own chunk: a view [kv_heads, ratio, chunks, tokens, keys] of scores
    [kv_heads, ratio, tokens, keys], tokens from key `first` on."""
    sizes = (-1, CHUNK)
    return scores[..., first:].unflatten(3, sizes).unflatten(2, sizes).diagonal(0, 2, 4).movedim(4, 2)


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float, start: int) -> Tensor:
    """Causal attention of tokens start and on. Returns [kv_heads, ratio, tokens, dim]."""
    kv_heads, ratio, tokens, dim = q.shape
    k, v = (t[:, None].expand(kv_heads, ratio, tokens, dim) for t in (k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return out[:, :, start:]
