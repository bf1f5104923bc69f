"""HgaCache: the transformers Cache whose K/V live in the daemon, one client Session a sequence of the batch.

What always holds:
- `update` appends the new K/V and returns only them; attention over everything else happens in `Session.attend`. So the
  lengths that the cache reports count every column that went in, padding included, while the tensors of a layer are the
  block at hand.
- Padding stands on the left, is never appended, and its outputs are zeros that nobody may use.
- Columns go in by blocks, through all layers, and only the patched decoder begins one (`block`). A block that fails is
  taken back, so layers never disagree. A call that fails after its first block leaves the cache unusable: nobody
  could tell what is in it. The sessions in the daemon are not touched by that.
- Beams and candidates: `crop` takes columns back, `reorder_cache` and its like fork the sessions that are wanted twice
  and give up those that are not wanted.
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
        self.layer = self.attended = -1  # the last ones
        self.failed: int | None = None  # the row whose session refused

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """k, v: [batch, kv_heads, columns, head_dim]."""
        self.check_attended()
        if k.shape[0] != len(self._sessions) or k.shape[2] != self._columns or layer != self.layer + 1:
            raise CallRefused(
                f"layer {layer} appends K of shape {tuple(k.shape)} after layer {self.layer}; expected layers in "
                f"order, {len(self._sessions)} sequences and {self._columns} tokens each"
            )
        for row, session, start in self._rows():
            with self._blamed(row):
                session.append(layer, k[row, :, start:], v[row, :, start:])
        self.layer = layer

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        layer = getattr(module, "layer_idx", self.layer)
        assert layer == self.layer, f"attention of layer {layer} after K/V of layer {self.layer}"
        self.attended = layer
        if len(self._sessions) == 1 and not self._starts[0]:
            with self._blamed(0):
                return self._sessions[0].attend(layer, query[0], scaling).unsqueeze(0)
        out = torch.zeros_like(query)
        for row, session, start in self._rows():
            with self._blamed(row):
                out[row, :, start:] = session.attend(layer, query[row, :, start:], scaling)
        return out

    def check_attended(self) -> None:
        """Raises: CallRefused if the last layer's attention went another way, and so saw only this block."""
        if self.attended != self.layer:
            raise CallRefused(
                f"layer {self.layer} did not attend through hga-kvd: the attention implementation of a patched model was "
                "changed (set_attn_implementation); unpatch the model first"
            )

    def _rows(self) -> Iterator[tuple[int, Session, int]]:
        """Row, session and first column of the sequences that have tokens in this block."""
        for row, (session, start) in enumerate(zip(self._sessions, self._starts, strict=True)):
            if start < self._columns:
                yield row, session, start

    @contextmanager
    def _blamed(self, row: int) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.failed = row
            raise


class Held:
    """What a cache and its layers share."""

    def __init__(self) -> None:
        self.sessions: list[Session] = []
        self.columns = 0
        self.block: Block | None = None
        self.unusable: str | None = None


class HgaLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's view of the sessions. Holds no tensors."""

    is_croppable = True
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
        raise _whole("reset")

    def crop(self, tokens_to_remove: int) -> None:
        raise _whole("crop")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise _whole("reorder")

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise _whole("repeat")

    def batch_select_indices(self, indices: Tensor) -> None:
        raise _whole("select from")


def _whole(operation: str) -> CacheRefused:
    return CacheRefused(f"{operation} the whole HgaCache, not one layer of it: layers share their sessions")


class HgaCache(Cache):
    """Made by `Patched.new_cache`, or by the patched model itself. Sessions are opened by the first call.

    retire: gets the sessions when the cache is closed or collected; it must see to it that they are closed.
    """

    def __init__(self, owner: object, layers: int, name: str | None, retire: Callable[[list[Session]], None]) -> None:
        self._held = Held()
        super().__init__(layers=[HgaLayer(self._held, layer) for layer in range(layers)])
        self.owner = owner
        self.name = name
        self.prompt_columns: int | None = None  # generate's prompt, if candidates may follow it in the first call
        self._retire = retire
        # The list object itself: what it holds when the cache dies is what must be closed.
        self._finalizer = weakref.finalize(self, retire, self._held.sessions)

    @property
    def sessions(self) -> tuple[Session, ...]:
        """One a sequence of the batch; empty before the first call."""
        return tuple(self._held.sessions)

    def open(self, batch: int, open_session: Callable[[int], Session]) -> None:
        """Opens the sessions at the first call. Raises: CallRefused if the batch is not the one the cache is for."""
        self._check_usable()
        if not self._held.sessions:
            if self.name is not None and batch != 1:
                raise CallRefused(
                    f"session {self.name!r} holds one sequence, but the batch has {batch}: patch without a session "
                    "name, or run the sequences one by one, each with its own name"
                )
            try:
                for row in range(batch):
                    self._held.sessions.append(open_session(row))
            except BaseException:
                self.reset()
                raise
        if len(self._held.sessions) != batch:
            raise CallRefused(f"this cache holds {len(self._held.sessions)} sequences, but the batch has {batch}")

    def skip(self, columns: int) -> None:
        """Counts columns whose K/V the session holds already."""
        self._held.columns += columns

    @contextmanager
    def block(self, starts: Sequence[int], columns: int, row: int | None = None) -> Iterator[Block]:
        """All layers of one block of columns happen inside this context.

        row: only this sequence gets tokens, in the place of others that it has lost; no column is counted.
        """
        assert self._held.block is None
        sessions = self._held.sessions if row is None else [self._held.sessions[row]]
        before = [session.tokens for session in sessions]
        self._held.block = block = Block(sessions, starts, columns)
        try:
            yield block
            block.check_attended()
            if block.layer != len(self.layers) - 1:
                raise CallRefused(f"only {block.layer + 1} of {len(self.layers)} layers appended their K/V")
        except BaseException:
            # Chunks are closed before a block is taken, so its tokens are all in the open ones: no call to the daemon.
            for session, tokens in zip(sessions, before, strict=True):
                session.truncate(tokens)
            raise
        finally:
            self._held.block = None
        if row is None:
            self._held.columns += columns

    def give_up(self, error: BaseException) -> None:
        """After a call that put in only a part of its columns: nobody can tell which, so the cache takes no more."""
        again = f"; a new cache can take up session {self.name!r}" if self.name is not None else ""
        self._held.unusable = f"a call on this cache failed halfway ({type(error).__name__}: {error}){again}"

    # What generate does with candidates and beams.

    def crop(self, tokens_to_remove: int) -> None:
        """tokens_to_remove: minus the number of columns to take back; or, as once in transformers, how many to keep."""
        self._check_usable()
        columns = self._held.columns
        fewer = min(-tokens_to_remove, columns) if tokens_to_remove <= 0 else max(columns - tokens_to_remove, 0)
        with self._all_or_unusable():
            for session in self._held.sessions if fewer else ():
                session.truncate(max(0, session.tokens - fewer))
        self._held.columns -= fewer

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.rearrange(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        self.rearrange((indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices).tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.rearrange([row for row in range(len(self._held.sessions)) for _ in range(repeats)])

    def rearrange(self, rows: Sequence[int]) -> None:
        """Sequence i becomes what sequence rows[i] was; forks those that are wanted again, gives up those that are not.

        A name stays with what it holds: if there are several sequences from now on, all of them are temporary.
        """
        self._check_usable()
        sessions = self._held.sessions
        if not sessions or list(rows) == list(range(len(sessions))):
            return
        kept: list[Session] = []
        try:
            for row in rows:
                once_more = sessions[row] in kept or self.name is not None
                kept.append(sessions[row].fork() if once_more else sessions[row])
        except BaseException:
            self._retire([session for session in kept if session not in sessions])
            raise
        given_up = [session for session in sessions if session not in kept]
        sessions[:] = kept
        self.name = None
        self._retire(given_up)

    def _check_usable(self) -> None:
        if self._held.unusable:
            raise CacheUnusable(self._held.unusable)

    @contextmanager
    def _all_or_unusable(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.give_up(error)
            raise

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
