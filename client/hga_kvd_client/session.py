"""Session: one token sequence's K/V as a model sees it. The hub of the client; it alone knows the order of steps.

What always holds:
- Every token is in exactly one of three places for attention: the sinks, the tail (both in the window), or the daemon.
  Closed chunks are in the daemon as soon as the next block begins, also while they are still in the window.
- Layers are appended in order 0 .. L-1 for each block of tokens; `tokens` counts those that all layers have.
- Attention is exact over what it opens. A single token sees the window and the groups its router chose; a block of
  several tokens sees everything, or, if prefill is routed, what its tokens chose. Nothing damaged is ever attended.
- What this process holds is bounded by the window, the bank, the block at hand and the routing state, about 5 % of the
  K/V; the rest lives in the daemon.

Order of one block: append(0) closes the full chunks of the blocks before it (routing state, append, flush if it is
time), brings the routing state up if it lags, then takes the block; attend(0); append(1); attend(1); ...
The steps of one attention are in attending.py, the calls to the daemon and what they survive in stored.py.

Going back (`truncate`) and branching (`fork`) happen between blocks. Tokens that are not in closed chunks are taken back
here; closed chunks are taken back in the daemon, and then the window gets back what it would hold without them.
"""

from __future__ import annotations

import logging
from types import TracebackType

import numpy as np
import numpy.typing as npt
from torch import Tensor

from hga_kvd_client import errors, stored_routing
from hga_kvd_client.answers import Opened
from hga_kvd_client.attending import Attending
from hga_kvd_client.connection import Connection
from hga_kvd_client.held import Held
from hga_kvd_client.stored import StoredSession

logger = logging.getLogger("hga_kvd_client")


class Session:
    """Made by Client.open. One caller at a time; sessions of one client take turns."""

    def __init__(self, connection: Connection, opened: Opened, held: Held, tenant: str = "", ttl_s: int = 0) -> None:
        self.name = opened.name
        self.geometry = held.geometry
        self.options = held.options
        self.created = opened.created  # by this opening
        self.tenant, self.ttl_s = tenant, ttl_s
        self.stats = held.stats
        self._held = held
        self._ids, self._window, self._routing = held.ids, held.window, held.routing
        self._stored = StoredSession(connection, opened, held, tenant, ttl_s)
        self._attending = Attending(held, self._stored)
        self._next_layer = 0  # 0: between blocks
        self._block = 0  # tokens of the block at hand, or of the last one
        self._closed = False

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()

    @property
    def tokens(self) -> int:
        """That all layers have."""
        return self._stored.tokens

    # The model's side.

    def note_tokens(self, token_ids: Tensor | npt.NDArray[np.integer]) -> None:
        """Ids of the next block's tokens, [tokens]; stored with its chunks. Leaving them out once is for good."""
        self._ids.note(token_ids)

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """K and V of a block's tokens in one layer: [kv_heads, tokens, head_dim], k after RoPE; copied: a single token's on
        a GPU when the layer is attended, so they must stay what they are until then.

        Raises: InvalidRequest for a layer out of order or another shape; with layer 0 all that storing chunks can
        raise, and then the block was not taken.
        """
        tokens = self._checked_block(layer, k, v)
        if layer == 0:
            far = self.tokens // self.geometry.chunk_tokens - self.options.recent_chunks > self.options.sink_chunks
            self._close_full_chunks(settle=far and (tokens == 1 or self.options.prefill == "routed"))
            self._begin_block(tokens)
        if tokens == 1 and self._attending.on_device.may_take:
            self._window.hold(layer, self.tokens, k.contiguous(), v.contiguous())
        else:
            self._window.write(layer, self.tokens, k, v)
        self._next_layer = layer + 1
        if self._next_layer == self.geometry.layers:
            self._next_layer = 0
            self._stored.tokens += tokens

    def attend(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """Attention of the tokens just appended to this layer.

        q: [heads, tokens, head_dim] after RoPE, heads a multiple of kv_heads. Returns the same shape and dtype.
        One token is routed; more are exact and causal, or routed if options.prefill says so.
        Raises: RecordsDamaged, SessionLost, InvalidRequest.
        """
        heads, tokens, dim = q.shape
        kv_heads = self.geometry.kv_heads
        if (self._next_layer or self.geometry.layers) - 1 != layer:
            raise errors.InvalidRequest(f"attend to layer {layer} must follow append to layer {layer}")
        if heads % kv_heads or dim != self.geometry.head_dim:
            raise errors.InvalidRequest(
                f"q is {tuple(q.shape)}; it must be [a multiple of {kv_heads}, tokens, {self.geometry.head_dim}]"
            )
        q_grouped = q.reshape(kv_heads, heads // kv_heads, tokens, dim)
        if tokens != self._block:
            raise errors.InvalidRequest(f"q has {tokens} tokens in a block of {self._block}")
        seen = self.tokens + (tokens if self._next_layer else 0)
        if tokens == 1:
            out = self._attending.one(layer, q_grouped[:, :, 0], scale, seen)
            return out.reshape(heads, tokens, dim).to(q.dtype)
        if self._routing.searching:
            self._routing.look(layer, q_grouped, self._window.layer(layer, seen)[0][:, -tokens:])
        if self.options.prefill == "exact":
            out = self._attending.exact_block(layer, q_grouped, scale, seen)
        else:
            out = self._attending.routed_block(layer, q_grouped, scale, seen)
        return out.reshape(heads, tokens, dim).to(q.dtype)

    def drop_block(self) -> None:
        """Forgets a block that some layers have and others have not, after a model that failed in between."""
        self._next_layer = self._block = 0  # nothing can be attended before the next append
        self._ids.cut(self.tokens)

    def opened(self, layer: int) -> Tensor:
        """What the last routed step opened in this layer: bool [kv_heads, groups], groups of all closed chunks."""
        return self._attending.opened(layer)

    # Going back, and branching.

    def truncate(self, tokens: int) -> None:
        """Takes back all tokens from `tokens` on, and the block at hand: the session is as if they had never come.

        Closed chunks that go leave the daemon, durably if the session is named. Raises: InvalidRequest;
        RecordsDamaged if K/V that must come back into the window is damaged, and nothing was changed; SessionLost.
        """
        if not 0 <= tokens <= self.tokens:
            raise errors.InvalidRequest(f"cannot go back to token {tokens} in a session of {self.tokens}")
        self._check_open()
        self.drop_block()
        if tokens < self._stored.chunks * self.geometry.chunk_tokens:
            self._roll_back(tokens)
        self._stored.tokens = tokens
        self._ids.cut(tokens)

    def fork(self, name: str | None = None) -> Session:
        """A second session of the same tokens, which goes its own way from here; name as in Client.open.

        Closed chunks are shared in the daemon; window, bank and open chunk are copied. Raises: InvalidRequest in the
        middle of a block or if the name is taken, and what append can raise.
        """
        self._check_open()
        if self._next_layer:
            raise errors.InvalidRequest(
                f"fork in the middle of a block: {self._next_layer} of {self.geometry.layers} layers have it"
            )
        self._close_full_chunks()
        opened = self._stored.fork(name or "")
        self._window.reserve(self.tokens, 0)
        other = Session(self._stored.connection, opened, self._held.branch(), self.tenant, self.ttl_s)
        other._stored.tokens = self.tokens
        other._attending.go_on_from(self._attending)
        return other

    # Storage.

    def flush(self) -> None:
        """Closes the full chunks and returns when everything closed survives power loss.

        Raises: NotDurable (temporary session, or a daemon without NVMe), WriteFailed, and what append raises.
        """
        # Whoever takes the session up from here must route as this one goes on: with the basis of the same tokens.
        self._close_full_chunks(settle=self._routing.promising)
        if not self.name:
            raise errors.NotDurable("a temporary session is never durable: open it by a name")
        self._stored.flush()

    def close(self) -> None:
        """Ends the session here. A named one is flushed and stays in the daemon; a temporary one is gone.

        May be called twice.
        """
        if self._closed:
            return
        if self.name:
            self._close_full_chunks(settle=self._routing.promising)
            if self._stored.flushes and self._stored.durable_chunks < self._stored.chunks:
                self._stored.flush_if_possible()
        self._stored.close()
        self._closed = True

    def delete(self) -> None:
        """Removes the session from the daemon, for every client."""
        self._stored.delete()
        self._closed = True

    def known_ids(self) -> npt.NDArray[np.uint32] | None:
        """Ids of all tokens, the open chunk's included: [tokens]; None if some were never told."""
        return self._ids.of_first(self.tokens)

    def token_ids(self) -> npt.NDArray[np.uint32]:
        """Ids of the tokens in closed chunks, from the daemon: [tokens], or empty if some were never told."""
        return np.frombuffer(self._stored.token_ids(), dtype="<u4").astype(np.uint32)

    def resume(self, salvage: bool = False) -> int:
        """Takes up a session that the daemon has chunks of: routing state, sinks and recent chunks come back.

        Called by Client.open. Returns the tokens restored, a multiple of chunk_tokens; those after them, less than a
        chunk, must be run through the model again. salvage: chunks from a damaged one on are given up.
        """
        assert self.tokens == 0
        assert self._block == 0
        while True:
            try:
                return self._resume()
            except errors.RecordsDamaged as error:
                if not salvage:
                    raise
                logger.warning("session %r is cut back to before the damage: %s", self.name, error)
                chunks = min(first for first, _ in error.token_ranges) // self.geometry.chunk_tokens
                self._stored.chunks = chunks  # whatever happens now, those after them are not asked for again
                self._stored.give_up(chunks)
                self._routing.truncate(chunks)

    def _resume(self) -> int:
        options, stored, chunk_tokens = self.options, self._stored, self.geometry.chunk_tokens
        stored_routing.restore(self._routing, stored, self._held.device, options.prefill_tile_chunks)
        sinks = min(options.sink_chunks, stored.chunks)
        tail = max(options.sink_chunks, stored.chunks - options.recent_chunks)
        tokens = stored.chunks * chunk_tokens
        self._window.start_at(tail * chunk_tokens)
        self._window.reserve(tokens, 0)
        for part in ((0, sinks), (tail, stored.chunks)):
            for layer, first, tiles in stored.all_layers(*part):
                self._window.write_tiles(layer, first, tiles, tokens)
        stored.tokens = tokens
        self._ids.restore(stored.token_ids(), self.tokens)
        return self.tokens

    # Sizes.

    def resident_bytes(self) -> int:
        """Bytes of K/V and of what stands for it in this process now: window, block at hand, bank, routing state."""
        return self._window.resident_bytes() + self._routing.resident_bytes() + self._attending.resident_bytes()

    def full_bytes(self) -> int:
        """What a dense cache of these tokens takes."""
        geometry = self.geometry
        return self.tokens * geometry.layers * 2 * geometry.kv_heads * geometry.head_dim * self._held.dtype.itemsize

    # A block.

    def _check_open(self) -> None:
        if self._closed:
            raise errors.InvalidRequest("the session is closed: open it again")

    def _checked_block(self, layer: int, k: Tensor, v: Tensor) -> int:
        geometry = self.geometry
        self._check_open()
        if layer != self._next_layer:
            raise errors.InvalidRequest(
                f"append to layer {layer}, but layer {self._next_layer} is next in this block; drop_block() forgets it"
            )
        tokens = k.shape[1] if k.dim() == 3 else 0
        if not tokens or k.shape != v.shape or k.shape[0] != geometry.kv_heads or k.shape[2] != geometry.head_dim:
            raise errors.InvalidRequest(
                f"k is {tuple(k.shape)} and v {tuple(v.shape)}; both must be [{geometry.kv_heads}, tokens, "
                f"{geometry.head_dim}] with at least one token"
            )
        if k.dtype != self._held.dtype or v.dtype != self._held.dtype:
            raise errors.InvalidRequest(f"k is {k.dtype} and v {v.dtype}; the session stores {self._held.dtype}")
        if layer and tokens != self._block:
            raise errors.InvalidRequest(f"layer {layer} has {tokens} tokens in a block of {self._block}")
        if not layer:
            self._ids.check(tokens)
        return tokens

    def _begin_block(self, tokens: int) -> None:
        self._window.reserve(self.tokens, tokens)
        self._block = tokens
        self._ids.begin_block()
        if tokens == 1:
            self._attending.step += 1
            self.stats.decode_steps += 1
        else:
            self.stats.prefill_tokens += tokens

    # Closing chunks, and opening them again.

    def _close_full_chunks(self, settle: bool = False) -> None:
        """Appends every full chunk to the daemon, brings up the routing state, flushes if it is time, lets chunks older
        than the recent ones go. settle: the basis of the sketches is decided now."""
        options, stored, chunk_tokens = self.options, self._stored, self.geometry.chunk_tokens
        stored.append_to(self.tokens // chunk_tokens)
        stored_routing.bring_up(self._routing, stored, options.prefill_tile_chunks, settle)
        # A basis is durable before anything is decoded with it: another one would open other groups.
        if stored.flushes and (
            self._routing.basis_at_risk or stored.chunks - stored.durable_chunks >= options.flush_chunks
        ):
            stored.flush_if_possible()
        longest = self.tokens + (self._block if self._next_layer else 0)
        self._window.drop((stored.chunks - options.recent_chunks) * chunk_tokens, longest)

    def _roll_back(self, tokens: int) -> None:
        """Cuts the daemon's session to the whole chunks of `tokens`, and makes the window what it is for so many."""
        chunk_tokens = self.geometry.chunk_tokens
        chunks, needed = tokens // chunk_tokens, -(-tokens // chunk_tokens)
        tail = max(self.options.sink_chunks, chunks - self.options.recent_chunks)
        # What had left the window, the kept tokens of a chunk that opens again included.
        missing = self._stored.cut(chunks, tail, needed)
        self._window.rewind(tail * chunk_tokens, tokens)
        for layer, first, tiles in missing:
            self._window.write_tiles(layer, first, tiles, tokens)
        self._routing.truncate(chunks)
        self._attending.forget(chunks)
