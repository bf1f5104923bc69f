"""HgaCache: the transformers Cache whose K/V live in the daemon, one client Session a sequence of the batch.

What always holds:
- `update` appends the new K/V and returns only them; attention over everything else happens in `Session.attend`. So the
  lengths that the cache reports count every column that went in, padding included, while the tensors of a layer are the
  block at hand.
- Padding stands on the left, is never appended, and its outputs are zeros that nobody may use.
- Columns go in by blocks, through all layers, and only the patched decoder begins one (`block`). If a block fails after
  anything was appended, the layers disagree: the cache is unusable from then on, the sessions in the daemon are not.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from hga_kvd_client import Session
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from hga_kvd_patch.errors import CacheRefused, CacheUnusable, CallRefused


class Block:
    """One block of columns on its way through the layers; a `Step` for the attention function.

    starts: for each sequence the first column that is not padding, `columns` if all of them are.
    """

    def __init__(self, sessions: Sequence[Session], starts: Sequence[int], columns: int) -> None:
        self._sessions = sessions
        self._starts = starts
        self._columns = columns
        self.layer = -1  # the last one appended
        self.touched = False

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """k, v: [batch, kv_heads, columns, head_dim]."""
        if k.shape[0] != len(self._sessions) or k.shape[2] != self._columns or layer != self.layer + 1:
            raise CallRefused(
                f"layer {layer} appends K of shape {tuple(k.shape)} after layer {self.layer}; expected layers in "
                f"order, {len(self._sessions)} sequences and {self._columns} tokens each"
            )
        for row, (session, start) in enumerate(zip(self._sessions, self._starts, strict=True)):
            if start < self._columns:
                session.append(layer, k[row, :, start:], v[row, :, start:])
                self.touched = True
        self.layer = layer

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        layer = getattr(module, "layer_idx", self.layer)
        assert layer == self.layer, f"attention of layer {layer} after K/V of layer {self.layer}"
        if len(self._sessions) == 1 and not self._starts[0]:
            return self._sessions[0].attend(layer, query[0], scaling).unsqueeze(0)
        out = torch.zeros_like(query)
        for row, (session, start) in enumerate(zip(self._sessions, self._starts, strict=True)):
            if start < self._columns:
                out[row, :, start:] = session.attend(layer, query[row, :, start:], scaling)
        return out


class Held:
    """What a cache and its layers share."""

    def __init__(self) -> None:
        self.sessions: list[Session] = []
        self.columns = 0
        self.block: Block | None = None
        self.unusable: str | None = None


class HgaLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's view of the sessions. Holds no tensors."""

    is_croppable = False
    is_sliding = False

    def __init__(self, held: Held, layer: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._held = held
        self._layer = layer

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """key_states, value_states: [batch, kv_heads, columns, head_dim] of the block at hand; returned as they are."""
        if self._held.block is None:
            raise CacheRefused("an HgaCache works only in calls of the patched model that made it")
        self._held.block.append(self._layer, key_states, value_states)
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self._held.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """What `update` returns: query_length keys, which begin where the cache ends."""
        return query_length, self._held.columns

    def get_max_length(self) -> int:
        return -1

    # What transformers 5.10 calls get_max_length; abstract there.
    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        raise CacheRefused("reset the whole HgaCache, not one layer of it")

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise CacheRefused(
                "an HgaCache cannot be cropped: the daemon does not take tokens back yet (assisted decoding needs that)"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise CacheRefused(
            "an HgaCache cannot be reordered: the daemon does not fork sessions yet (beam search needs that)"
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise CacheRefused("an HgaCache cannot be repeated: the daemon does not fork sessions yet")

    def batch_select_indices(self, indices: Tensor) -> None:
        raise CacheRefused("an HgaCache cannot drop sequences yet: finish the batch, or make a new cache")


class HgaCache(Cache):
    """Made by `Patched.new_cache`, or by the patched model itself. Sessions are opened by the first call.

    retire: gets the sessions when the cache is closed or collected; it must see to it that they are closed.
    """

    def __init__(self, owner: object, layers: int, name: str | None, retire: Callable[[list[Session]], None]) -> None:
        self._held = Held()
        super().__init__(layers=[HgaLayer(self._held, layer) for layer in range(layers)])
        self.owner = owner
        self.name = name
        self._retire = retire
        # The list object itself: what it holds when the cache dies is what must be closed.
        self._finalizer = weakref.finalize(self, retire, self._held.sessions)

    @property
    def sessions(self) -> tuple[Session, ...]:
        """One a sequence of the batch; empty before the first call."""
        return tuple(self._held.sessions)

    def open(self, batch: int, open_session: Callable[[], Session]) -> None:
        """Opens the sessions at the first call. Raises: CallRefused if the batch is not the one the cache is for."""
        if self._held.unusable:
            raise CacheUnusable(self._held.unusable)
        if not self._held.sessions:
            if self.name is not None and batch != 1:
                raise CallRefused(
                    f"session {self.name!r} holds one sequence, but the batch has {batch}: patch without a session "
                    "name, or run the sequences one by one, each with its own name"
                )
            for _ in range(batch):
                self._held.sessions.append(open_session())
        if len(self._held.sessions) != batch:
            raise CallRefused(f"this cache holds {len(self._held.sessions)} sequences, but the batch has {batch}")

    def skip(self, columns: int) -> None:
        """Counts columns whose K/V the session holds already."""
        self._held.columns += columns

    @contextmanager
    def block(self, starts: Sequence[int], columns: int) -> Iterator[Block]:
        """All layers of one block of columns happen inside this context."""
        assert self._held.block is None
        self._held.block = block = Block(self._held.sessions, starts, columns)
        try:
            yield block
            if block.layer != len(self.layers) - 1:
                raise CallRefused(f"only {block.layer + 1} of {len(self.layers)} layers appended their K/V")
        except BaseException as error:
            if block.touched:
                self.give_up(error)
            raise
        finally:
            self._held.block = None
        self._held.columns += columns

    def give_up(self, error: BaseException) -> None:
        """After a call that put in only a part of its columns: nobody can tell which, so the cache takes no more."""
        again = f"; a new cache can take up session {self.name!r}" if self.name is not None else ""
        self._held.unusable = f"a call on this cache failed halfway ({type(error).__name__}: {error}){again}"

    def close(self, why: str = "this HgaCache was closed") -> None:
        """Gives up the sessions: a named one stays in the daemon, a temporary one is gone. May be called twice."""
        sessions, self._held.sessions[:] = list(self._held.sessions), []
        self._held.unusable = self._held.unusable or why
        self._retire(sessions)

    def reset(self) -> None:
        """Empties the cache: temporary sessions are dropped; a named one stays, and the next call takes it up."""
        sessions, self._held.sessions[:] = list(self._held.sessions), []
        self._held.columns, self._held.unusable = 0, None
        self._retire(sessions)
