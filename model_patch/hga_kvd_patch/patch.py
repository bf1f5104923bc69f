"""patch, unpatch, patched: a model whose generate() keeps its K/V in the daemon. The hub; it alone knows the order of
steps.

What always holds:
- Two things are put on the model's own objects, and taken off again by unpatch: the decoder's `forward`, and generate's
  `_prepare_cache_for_generation`; and the config names "hga_kvd" as its attention. No weight and no class is touched.
- A call with an HgaCache, or one that would have made a DynamicCache, goes to the daemon. Any other call is sdpa.

One call: find or make the cache; read padding and positions; open the sessions; if they hold tokens already, check that
these are the ones the input begins with, and leave them out; run the rest block by block.
"""

from __future__ import annotations

import inspect
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from hga_kvd_client import Client, Geometry, Session, SessionOptions, connect
from hga_kvd_client.errors import KvdError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from hga_kvd_patch.attention import NAME, STEP
from hga_kvd_patch.cache import HgaCache
from hga_kvd_patch.errors import (
    AlreadyPatched,
    CacheRefused,
    CallRefused,
    NotPatched,
    PatchError,
    TextMismatch,
)
from hga_kvd_patch.examine import DTYPES, ModelFacts, examine
from hga_kvd_patch.fingerprint import model_fingerprint

logger = logging.getLogger("hga_kvd_patch")

_MARK = "_hga_kvd_patched"
_PREPARE = "_prepare_cache_for_generation"
_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
# Outputs of a decoder that a block gives for its own columns: [batch, columns, ...], or tuples of that.
_PER_COLUMN = ("last_hidden_state", "hidden_states")


@dataclass(frozen=True)
class _Input:
    """One call: ids [batch, columns] or embeds [batch, columns, dim].

    starts: the first column of each sequence that is a token and not padding, or the number of columns.
    """

    ids: Tensor | None
    embeds: Tensor | None
    starts: tuple[int, ...]

    @property
    def columns(self) -> int:
        given = self.embeds if self.ids is None else self.ids
        assert given is not None
        return given.shape[1]


class Patched:
    """A patched model's side of things. Made by patch().

    geometry, rope, options: what its sessions are opened with. One thread at a time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        facts: ModelFacts,
        client: Client,
        *,
        owns_client: bool,
        session: str | None,
        options: SessionOptions,
        prefill_block: int,
        resume_steps: int,
        revision: str | None,
    ) -> None:
        self.model, self.decoder = model, facts.decoder
        self.client, self.session = client, session
        self.options, self.rope = options, facts.rope
        self.geometry = Geometry(
            layers=facts.layers,
            kv_heads=facts.kv_heads,
            head_dim=facts.head_dim,
            dtype=DTYPES[facts.dtype],
            rope=facts.rope.text(),
            model_fingerprint=model_fingerprint(facts.decoder.config.to_dict(), facts.decoder, revision),
        )
        self._dtype, self._device = facts.dtype, facts.device
        self._owns_client = owns_client
        self._prefill_block, self._resume_steps = prefill_block, resume_steps
        self._caches: weakref.WeakSet[HgaCache] = weakref.WeakSet()
        self._retired: list[Session] = []
        self._busy = False
        self._thread = threading.get_ident()
        self._undo: list[Callable[[], None]] = []

    # Caches.

    def new_cache(self, session: str | None = None) -> HgaCache:
        """An empty cache for `past_key_values=`. session: the name to keep it under, or take it up by; None: temporary.

        A name is held by one cache at a time: an older one of this name is closed when the new one opens it.
        """
        self._close_retired()
        cache = HgaCache(self, self.geometry.layers, session, self._retire)
        self._caches.add(cache)
        return cache

    def _open(self, cache: HgaCache, batch: int) -> None:
        for other in list(self._caches):
            if other is not cache and cache.name is not None and other.name == cache.name and not cache.sessions:
                other.close(f"session {cache.name!r} was taken up by a newer cache")
        self._close_retired()
        cache.open(
            batch,
            lambda: self.client.open(cache.name, self.geometry, self.rope, self.options, self._device, self._dtype),
        )

    def _retire(self, sessions: list[Session]) -> None:
        """Takes sessions that no cache has any more. Closing one talks to the daemon, so not in the middle of a call:
        the garbage collector may come from anywhere."""
        self._retired.extend(sessions)
        if not self._busy and threading.get_ident() == self._thread:
            self._close_retired()

    def _close_retired(self) -> None:
        while self._retired:
            session = self._retired.pop()
            try:
                session.close()
            except KvdError as error:
                logger.warning("session %r was not closed properly: %s", session.name, error)

    # What is put on the model.

    def _install(self) -> None:
        decoder, model = self.decoder, self.model
        self._forward = decoder.forward
        self._names = _parameters(self._forward)
        self._prepare = getattr(model, _PREPARE, None)  # only models that generate have it
        expected = ["generation_config", "model_kwargs", "generation_mode"]
        if self._prepare is not None and _parameters(self._prepare)[:3] != expected:
            raise PatchError(f"this version of transformers prepares caches differently: {_parameters(self._prepare)}")
        attention = decoder.config._attn_implementation
        decoder.config._attn_implementation = NAME
        self._undo.append(lambda: setattr(decoder.config, "_attn_implementation", attention))
        self._put(decoder, "forward", _like(self._forward, self._decoder_forward))
        if self._prepare is not None:
            self._put(model, _PREPARE, _like(self._prepare, self._prepare_cache))
        self._put(decoder, _MARK, self)

    def _put(self, module: PreTrainedModel, name: str, value: Any) -> None:
        """On the instance only, past nn.Module's own bookkeeping."""
        had, before = name in module.__dict__, module.__dict__.get(name)
        module.__dict__[name] = value
        self._undo.append(
            lambda: module.__dict__.__setitem__(name, before) if had else module.__dict__.__delitem__(name)
        )

    def _remove(self) -> None:
        for undo in reversed(self._undo):
            undo()
        for cache in list(self._caches):
            cache.close("the model is no longer patched")
        self._close_retired()
        if self._owns_client:
            self.client.close()

    # generate().

    def _prepare_cache(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """In the place of GenerationMixin._prepare_cache_for_generation."""
        cache = model_kwargs.get("past_key_values")
        makes = cache is None and generation_config.use_cache is not False
        if makes or isinstance(cache, HgaCache):
            if generation_mode not in _MODES or getattr(generation_config, "is_assistant", False):
                raise CallRefused(
                    f"generation mode {getattr(generation_mode, 'value', generation_mode)} forks or takes back "
                    "tokens, which the daemon does not do yet: use greedy search or sampling, or unpatch the model"
                )
            if generation_config.cache_implementation not in (None, "dynamic"):
                raise CallRefused(
                    f"cache_implementation={generation_config.cache_implementation!r} asks for a cache in this "
                    "process; a patched model keeps K/V in the daemon: leave it out, or unpatch the model"
                )
        if makes:
            model_kwargs["past_key_values"] = self.new_cache(self.session)
            return None
        assert self._prepare is not None
        return self._prepare(generation_config, model_kwargs, generation_mode, *args, **kwargs)

    # The decoder's forward.

    def _decoder_forward(self, *args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(self._names, args, strict=False)) | kwargs
        cache = arguments.get("past_key_values")
        use_cache = arguments.get("use_cache")
        if cache is None and (self.decoder.config.use_cache if use_cache is None else use_cache):
            _refuse_gradients()
            cache = self.new_cache(self.session)
        if not isinstance(cache, HgaCache):
            return self._forward(*args, **kwargs)
        _refuse_gradients()
        if cache.owner is not self:
            raise CacheRefused("this HgaCache was made by another patched model, or by an earlier patch of this one")
        self._busy, self._thread = True, threading.get_ident()
        try:
            return self._run(cache, arguments)
        finally:
            self._busy = False

    def _run(self, cache: HgaCache, arguments: dict[str, Any]) -> Any:
        return_dict = arguments.pop("return_dict", None)
        if arguments.get("output_attentions") or self.decoder.config.output_attentions:
            raise CallRefused("attention weights do not exist as a matrix here: leave out output_attentions")
        given = _read_input(arguments, cache.get_seq_length())
        if cache.name is not None and given.ids is None:
            raise CallRefused(f"session {cache.name!r} can only be taken up again by its token ids: give input_ids")
        self._open(cache, len(given.starts))
        fresh = cache.get_seq_length() == 0
        tokens_before = [0 if fresh else session.tokens for session in cache.sessions]
        positions = _positions(given, tokens_before, arguments.pop("position_ids", None), self._device)
        stored = cache.sessions[0].tokens if fresh else 0
        skipped = 0
        if stored:
            _check_text(cache, given, stored)
            skipped = given.starts[0] + stored
            cache.skip(skipped)
        left = given.columns - skipped
        size = 1 if stored and left <= self._resume_steps else self._prefill_block
        outputs: list[Any] = []
        try:
            for first, end in _blocks(left, size):
                outputs.append(self._run_block(cache, given, positions, (skipped + first, skipped + end), arguments))
        except BaseException as error:
            if outputs or skipped:
                cache.give_up(error)
            raise
        merged = _merge(outputs, skipped)
        merged["past_key_values"] = cache
        if not (self.decoder.config.return_dict if return_dict is None else return_dict):
            return merged.to_tuple()
        return merged

    def _run_block(
        self, cache: HgaCache, given: _Input, positions: Tensor, span: tuple[int, int], arguments: dict[str, Any]
    ) -> Any:
        """span: first and end of the columns of this block."""
        first, end = span
        starts = [min(max(start - first, 0), end - first) for start in given.starts]
        own: dict[str, Any] = {
            "attention_mask": None,  # causality and padding are the block's
            "position_ids": positions[:, first:end],
            "past_key_values": cache,
            "use_cache": True,
            "return_dict": True,
        }
        if given.ids is not None:
            own["input_ids"] = given.ids[:, first:end]
            for row, (session, start) in enumerate(zip(cache.sessions, starts, strict=True)):
                if start < end - first:
                    session.note_tokens(given.ids[row, first + start : end])
        else:
            assert given.embeds is not None
            own["inputs_embeds"] = given.embeds[:, first:end]
        with cache.block(starts, end - first) as block:
            return self._forward(**(arguments | own), **{STEP: block})


def patch(
    model: PreTrainedModel,
    target: str | Client | None = None,
    *,
    session: str | None = None,
    options: SessionOptions | None = None,
    prefill_block: int = 1024,
    resume_steps: int = 64,
    revision: str | None = None,
    **connection_options: Any,
) -> Patched:
    """Makes the model keep its K/V in the daemon at target (as in hga_kvd_client.connect; a Client is used and not
    closed).

    session: every cache that the model makes takes up, or begins, the session of this name; None: temporary sessions.
    prefill_block: longest run of tokens that goes through the layers at once. resume_steps: when a session is taken up
    and at most this many tokens are left to feed, they are fed one by one, as decoding did; more are fed in blocks.
    revision: stands for the weights in the fingerprint of sessions, instead of samples of them.

    Raises: ModelRefused, AlreadyPatched, and what connect raises.
    """
    if _patched_of(model) is not None:
        raise AlreadyPatched(f"{type(model).__name__} is patched already: unpatch it first")
    if prefill_block < 2:
        raise PatchError(
            f"prefill_block is {prefill_block}; it must be at least 2, because one token alone is a decode step"
        )
    facts = examine(model)
    client = target if target is not None and not isinstance(target, str) else connect(target, **connection_options)
    try:
        state = Patched(
            model,
            facts,
            client,
            owns_client=client is not target,
            session=session,
            options=options or SessionOptions(),
            prefill_block=prefill_block,
            resume_steps=resume_steps,
            revision=revision,
        )
        state._install()
    except BaseException:
        if client is not target:
            client.close()
        raise
    return state


def unpatch(model: PreTrainedModel) -> None:
    """Takes everything off again and closes the caches that are left. Raises: NotPatched."""
    patched = _patched_of(model)
    if patched is None:
        raise NotPatched(f"{type(model).__name__} is not patched")
    patched._remove()


@contextmanager
def patched(model: PreTrainedModel, target: str | Client | None = None, **arguments: Any) -> Iterator[Patched]:
    """patch and unpatch around a block; arguments as in patch."""
    state = patch(model, target, **arguments)
    try:
        yield state
    finally:
        state._remove()


def _patched_of(model: PreTrainedModel) -> Patched | None:
    decoder = getattr(model, "base_model", model)
    found: Patched | None = decoder.__dict__.get(_MARK)
    return found


def _parameters(function: Callable[..., Any]) -> list[str]:
    """Names of its parameters, without **kwargs."""
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]


def _like(original: Callable[..., Any], own: Callable[..., Any]) -> Callable[..., Any]:
    """own, with the name and the signature of original: transformers inspects both."""

    @wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    return call


def _refuse_gradients() -> None:
    if torch.is_grad_enabled():
        raise CallRefused(
            "K/V in the daemon have no gradients: call the model under torch.no_grad() or torch.inference_mode(), or "
            "with use_cache=False"
        )


def _read_input(arguments: dict[str, Any], columns_before: int) -> _Input:
    """Takes ids, embeds and mask out of the arguments. Raises: CallRefused for right padding or a 4-D mask."""
    ids, embeds = arguments.pop("input_ids", None), arguments.pop("inputs_embeds", None)
    if (ids is None) == (embeds is None):
        raise CallRefused("give exactly one of input_ids and inputs_embeds")
    batch, columns = (embeds if ids is None else ids).shape[:2]
    mask = arguments.pop("attention_mask", None)
    if mask is None:
        return _Input(ids, embeds, (0,) * batch)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise CallRefused("only 2-D attention masks are supported: 1 for tokens, 0 for padding on the left")
    if mask.shape != (batch, columns_before + columns):
        raise CallRefused(
            f"attention_mask is {tuple(mask.shape)}; it must cover everything in the cache and the new tokens, "
            f"{(batch, columns_before + columns)}"
        )
    new = mask[:, columns_before:].bool().cpu()
    if not bool(new[:, -1].all()) or bool((new[:, 1:] < new[:, :-1]).any()):
        raise CallRefused("attention_mask has padding after tokens: pad on the left (tokenizer.padding_side = 'left')")
    return _Input(ids, embeds, tuple((columns - new.sum(1)).tolist()))


def _positions(given: _Input, tokens_before: list[int], position_ids: Any, device: torch.device) -> Tensor:
    """Positions of all columns, [batch, columns]: each sequence counts its tokens from 0. Raises: CallRefused if the
    caller says otherwise, because keys in a session must be one unbroken run."""
    if any(start and before for start, before in zip(given.starts, tokens_before, strict=True)):
        raise CallRefused("attention_mask has padding between tokens; only padding before the first token is supported")
    starts = torch.tensor(given.starts, device=device)[:, None]
    offset = torch.arange(given.columns, device=device)[None] - starts
    positions = (offset + torch.tensor(tokens_before, device=device)[:, None]).clamp(min=0)
    if position_ids is None:
        return positions
    if position_ids.ndim != 2 or bool(((position_ids.to(device) != positions) & (offset >= 0)).any()):
        raise CallRefused("position_ids must count the tokens of each sequence from 0 without gaps: leave them out")
    return positions


def _check_text(cache: HgaCache, given: _Input, stored: int) -> None:
    """Raises: TextMismatch unless the input begins with the tokens of the session, and goes on after them."""
    assert given.ids is not None
    known = torch.from_numpy(cache.sessions[0].token_ids().astype("int64"))
    if len(known) != stored:
        cache.close()
        raise TextMismatch(
            f"session {cache.name!r} holds {stored} tokens but not their ids, so it cannot be told whether they are "
            "the ones of the input: use another name, or delete the session"
        )
    ids = given.ids[0, given.starts[0] :].cpu()
    shared = min(stored, len(ids))
    different = (known[:shared] != ids[:shared]).nonzero()
    if len(different):
        at = int(different[0])
        cache.close()
        raise TextMismatch(
            f"session {cache.name!r} holds another text: token {at} is {int(known[at])} there and {int(ids[at])} in "
            "the input; use another name, or delete the session"
        )
    if len(ids) <= stored:
        cache.close()
        raise TextMismatch(
            f"session {cache.name!r} holds {stored} tokens and the input has {len(ids)}: at least one new token is "
            "needed, and "
            "the daemon does not take tokens back yet; give a longer input, use another name, or delete the session"
        )


def _blocks(columns: int, size: int) -> Iterator[tuple[int, int]]:
    """(first, end) of runs of `size` columns; never a single one at the end, unless size is 1 or there is only one: a
    token that comes alone is a decode step."""
    first = 0
    while first < columns:
        end = columns if size > 1 and columns - first <= size + 1 else first + size
        yield first, end
        first = end


def _merge(outputs: list[Any], skipped: int) -> Any:
    """One output of all blocks. Columns whose K/V were in the session already were not computed: they are NaN."""
    merged = outputs[0]
    for name in list(merged):
        parts = [output[name] for output in outputs]
        if name in _PER_COLUMN and isinstance(parts[0], tuple):
            merged[name] = tuple(_join(list(layer), skipped) for layer in zip(*parts, strict=True))
        elif name in _PER_COLUMN:
            merged[name] = _join(parts, skipped)
        elif name != "past_key_values" and (len(outputs) > 1 or skipped):
            raise CallRefused(f"{name} cannot be joined from blocks of tokens: leave out output_{name}")
    return merged


def _join(parts: list[Tensor], skipped: int) -> Tensor:
    """parts: [batch, columns, ...]."""
    if skipped:
        batch, _, *rest = parts[0].shape
        parts = [parts[0].new_full((batch, skipped, *rest), float("nan")), *parts]
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]
