"""patch, unpatch, patched: a model whose generate() keeps its K/V in the daemon. The hub; it alone knows the order of
steps.

What always holds:
- Two things are put on the model's own objects, and taken off again by unpatch: the decoder's `forward`, and generate's
  `_prepare_cache_for_generation`; and the config names "hga_kvd" as its attention. No weight and no class is touched.
- A call with an HgaCache, or one that would have made a DynamicCache, goes to the daemon. Any other call is sdpa.

One call: find or make the cache; read padding and positions; let sequences that are the same be computed once; open the
sessions; if they hold tokens already, check that these are the ones the input begins with, and leave them out; run the
rest block by block. If stored K/V turns out to be damaged or lost, compute it again from the ids, and go on.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Literal

import torch
from hga_kvd_client import Client, Geometry, SessionOptions, connect
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from hga_kvd_patch.attention import NAME
from hga_kvd_patch.cache import HgaCache
from hga_kvd_patch.errors import (
    AlreadyPatched,
    CacheRefused,
    CallRefused,
    NotPatched,
    PatchError,
)
from hga_kvd_patch.examine import DTYPES, ModelFacts, checkpoints, examine
from hga_kvd_patch.feeding import Feeding
from hga_kvd_patch.fingerprint import model_fingerprint
from hga_kvd_patch.inputs import Input, blocks, merge, pick_rows, positions, read_input, same_rows
from hga_kvd_patch.naming import CACHE, take_cache
from hga_kvd_patch.sessions import Sessions

logger = logging.getLogger("hga_kvd_patch")

_MARK = "_hga_kvd_patched"
_PREPARE = "_prepare_cache_for_generation"
_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
    GenerationMode.ASSISTED_GENERATION,
)


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
        diverging: Literal["refuse", "truncate"],
        share_prefix: bool,
        tenant: str,
        ttl_s: int,
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
            model_fingerprint=model_fingerprint(
                facts.decoder.config.to_dict(), facts.decoder, revision, options.prefill_text()
            ),
        )
        self._device, self._owns_client = facts.device, owns_client
        self._prefill_block, self._resume_steps = prefill_block, resume_steps
        self._caches: weakref.WeakSet[HgaCache] = weakref.WeakSet()
        self._sessions = Sessions(
            client,
            self.geometry,
            self.rope,
            options,
            facts.device,
            facts.dtype,
            diverging=diverging,
            share_prefix=share_prefix,
            tenant=tenant,
            ttl_s=ttl_s,
        )
        self._undo: list[Callable[[], None]] = []

    # Caches.

    def new_cache(self, session: str | None = None) -> HgaCache:
        """An empty cache to call the model with. session: the name to keep it under, or take it up by; None: temporary.

        A name is held by one cache at a time: an older one of this name is closed when the new one opens it.
        """
        self._sessions.close_retired()
        cache = HgaCache(self, self.geometry.layers, session, self._sessions.retire)
        self._caches.add(cache)
        return cache

    def _open(self, cache: HgaCache, given: Input) -> None:
        for other in list(self._caches):
            if other is not cache and cache.name is not None and other.name == cache.name and not cache.sessions:
                other.close(f"session {cache.name!r} was taken up by a newer cache")
        self._sessions.close_retired()
        # The first column whose output the caller wants, at the latest: K/V of columns before it may be there already.
        wanted = min(given.columns, cache.prompt_columns or given.columns) - 1
        cache.open(
            len(given.starts),
            lambda row: self._sessions.open(cache.name, given.row_ids(row), max(0, wanted - given.starts[row])),
        )

    # What is put on the model.

    def _install(self) -> None:
        decoder, model = self.decoder, self.model
        self._forward = decoder.forward
        self._feeding = Feeding(self._forward, self._device, self.geometry.chunk_tokens, self._prefill_block)
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
        self._put(decoder, "__deepcopy__", _refuse_copy)

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
        self._sessions.close_retired()
        if self._owns_client:
            self.client.close()

    # generate().

    def _prepare_cache(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """In the place of GenerationMixin._prepare_cache_for_generation."""
        cache = model_kwargs.get(CACHE)
        makes = cache is None and generation_config.use_cache is not False
        if makes or isinstance(cache, HgaCache):
            if generation_mode not in _MODES:
                raise CallRefused(
                    f"generation mode {getattr(generation_mode, 'value', generation_mode)} is not supported: use "
                    "greedy search, sampling, beams, assisted decoding or prompt lookup, or unpatch the model"
                )
            if generation_config.cache_implementation not in (None, "dynamic"):
                raise CallRefused(
                    f"cache_implementation={generation_config.cache_implementation!r} asks for a cache in this "
                    "process; a patched model keeps K/V in the daemon: leave it out, or unpatch the model"
                )
            if generation_config.assistant_early_exit is not None:
                raise CallRefused(
                    "assistant_early_exit runs a part of the layers, and K/V are kept of all: leave it out"
                )
        if makes:
            cache = model_kwargs[CACHE] = self.new_cache(self.session)
        if isinstance(cache, HgaCache) and generation_mode == GenerationMode.ASSISTED_GENERATION:
            # The first call has candidates behind the prompt, and the logits of all of them are wanted.
            mask = model_kwargs.get("attention_mask")
            cache.prompt_columns = mask.shape[1] if isinstance(mask, Tensor) else 1
        if makes:
            return None
        assert self._prepare is not None
        return self._prepare(generation_config, model_kwargs, generation_mode, *args, **kwargs)

    # The decoder's forward.

    def _decoder_forward(self, *args: Any, **kwargs: Any) -> Any:
        arguments = dict(zip(self._names, args, strict=False)) | kwargs
        cache = take_cache(arguments)
        use_cache = arguments.get("use_cache")
        if cache is None and (self.decoder.config.use_cache if use_cache is None else use_cache):
            _refuse_gradients()
            cache = self.new_cache(self.session)
        if not isinstance(cache, HgaCache):
            return self._forward(*args, **kwargs)
        _refuse_gradients()
        if checkpoints(self.decoder):
            raise CallRefused("gradient checkpointing in training mode keeps no K and V: call model.eval()")
        if cache.owner is not self:
            raise CacheRefused("this HgaCache was made by another patched model, or by an earlier patch of this one")
        with self._sessions.call():
            return self._run(cache, arguments)

    def _run(self, cache: HgaCache, arguments: dict[str, Any]) -> Any:
        return_dict = arguments.pop("return_dict", None)
        if arguments.get("output_attentions") or self.decoder.config.output_attentions:
            raise CallRefused("attention weights do not exist as a matrix here: leave out output_attentions")
        given = read_input(arguments, cache.get_seq_length())
        if cache.name is not None and given.ids is None:
            raise CallRefused(f"session {cache.name!r} can only be taken up again by its token ids: give input_ids")
        before = cache.get_seq_length()
        try:
            merged = self._feed(cache, given, before == 0, arguments)
        except BaseException as error:
            if cache.get_seq_length() != before:
                cache.give_up(error)
            elif not before:
                cache.reset()  # its sessions were opened for this input, and the next one may be another
            raise
        merged[CACHE] = cache
        if not (self.decoder.config.return_dict if return_dict is None else return_dict):
            return merged.to_tuple()
        return merged

    def _feed(self, cache: HgaCache, given: Input, fresh: bool, arguments: dict[str, Any]) -> Any:
        """Opens the sessions, and runs what they lack through the layers. fresh: the cache has no columns yet."""
        position_ids = arguments.pop("position_ids", None)
        others = any(isinstance(value, Tensor) for value in arguments.values())
        repeated = same_rows(given) if fresh and not cache.sessions and not others else None
        if repeated:
            given = given.pick(repeated[0])
            if isinstance(position_ids, Tensor) and len(position_ids) == len(repeated[1]):
                position_ids = position_ids[repeated[0]]
        self._open(cache, given)
        stored = [session.tokens if fresh else 0 for session in cache.sessions]
        tokens_before = [0 if fresh else session.tokens for session in cache.sessions]
        places = positions(given, tokens_before, position_ids, self._device)
        fed_from = [start + held for start, held in zip(given.starts, stored, strict=True)]
        skipped = min(fed_from) if any(stored) else 0
        left = given.columns - skipped
        stepwise = any(stored) and not cache.sessions[0].created and left <= self._resume_steps
        spans = [
            (skipped + first, skipped + end) for first, end in blocks(left, 1 if stepwise else self._prefill_block)
        ]
        for row, session in enumerate(cache.sessions):
            # A prompt's token that comes alone would be a decode step.
            if stored[row] and session.created and any(end - fed_from[row] == 1 for _, end in spans):
                session.truncate(session.tokens - 1)
                fed_from[row] -= 1
        cache.skip(skipped)
        outputs: list[Any] = []
        for first, end in spans:
            starts = [min(max(column - first, 0), end - first) for column in fed_from]
            outputs.append(self._feeding.block(cache, given, starts, places, (first, end), arguments))
        merged = merge(outputs, skipped, [end if held else 0 for end, held in zip(fed_from, stored, strict=True)])
        if repeated:
            pick_rows(merged, repeated[1])
            cache.rearrange(repeated[1])
        return merged


def patch(
    model: PreTrainedModel,
    target: str | Client | None = None,
    *,
    session: str | None = None,
    options: SessionOptions | None = None,
    prefill_block: int = 1024,
    resume_steps: int = 64,
    revision: str | None = None,
    diverging: Literal["refuse", "truncate"] = "refuse",
    share_prefix: bool = False,
    tenant: str = "",
    ttl_s: int = 0,
    **connection_options: Any,
) -> Patched:
    """Makes the model keep its K/V in the daemon at target (as in hga_kvd_client.connect; a Client is used and not
    closed).

    session: every cache that the model makes takes up, or begins, the session of this name; None: temporary sessions.
    prefill_block: longest run of tokens that goes through the layers at once. resume_steps: when a session is taken up
    and at most this many tokens are left to feed, they are fed one by one, as decoding did; more are fed in blocks.
    revision: stands for the weights in the fingerprint of sessions, instead of samples of them.
    diverging: what becomes of a session whose tokens are not those that the input begins with: the call is refused, or
    the session is cut back to what both have. share_prefix: a new session begins with the longest prefix of the prompt
    that `tenant` has stored with this model, in any session, and only the rest is computed. ttl_s: the daemon deletes
    the sessions made here when they were not used for so long; 0: never.

    Raises: ModelRefused, AlreadyPatched, and what connect raises.
    """
    if _patched_of(model) is not None:
        raise AlreadyPatched(f"{type(model).__name__} is patched already: unpatch it first")
    if prefill_block < 2:
        raise PatchError(
            f"prefill_block is {prefill_block}; it must be at least 2, because one token alone is a decode step"
        )
    if diverging not in ("refuse", "truncate"):
        raise PatchError(f"diverging is {diverging!r}; it must be 'refuse' or 'truncate'")
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
            diverging=diverging,
            share_prefix=share_prefix,
            tenant=tenant,
            ttl_s=ttl_s,
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
        if _patched_of(model) is state:
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
    """own, with the name and the signature of original: transformers inspects both. What asks the daemon is not compiled."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    return call  # type: ignore[no-any-return]


def _refuse_copy(memo: object) -> None:
    """In the place of __deepcopy__: the copy would run the original's weights, by the original's sessions."""
    raise PatchError("a patched model cannot be copied: unpatch it first")


def _refuse_gradients() -> None:
    if torch.is_grad_enabled():
        raise CallRefused(
            "K/V in the daemon have no gradients: call the model under torch.no_grad() or torch.inference_mode(), or "
            "with use_cache=False"
        )
