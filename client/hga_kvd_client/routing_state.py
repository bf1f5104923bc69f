"""What a session routes with: means or sketches of its closed chunks, and how a query uses them. No I/O.

What always holds:
- `store` has one entry a chunk, without a gap, from chunk 0 on; it may lag behind the session, and then the session
  brings it up from stored keys before it routes.
- A basis is settled once and kept: after enough prompt tokens, or when a step must route with what there is. From then
  on every chunk's sketch is made with it; a session that is taken up again gets it from the daemon.
- "auto" has sketches while they fit routing_bytes_max; beyond, the paper's means take their place, for good.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor

from hga_kvd_client import native
from hga_kvd_client.attention import window_scores
from hga_kvd_client.errors import InvalidRequest
from hga_kvd_client.geometry import Bytes, Geometry
from hga_kvd_client.options import Rope, SessionOptions
from hga_kvd_client.routing import route_all, route_hga, route_sketch
from hga_kvd_client.sketch import Basis, SketchSpec, log_mass, sizes
from hga_kvd_client.sketches import BasisSearch, Sketches
from hga_kvd_client.summaries import Summaries, Turns, grown, mixed_mean

# The paper's summaries: per chunk [layers, kv_heads, 1 + groups_per_chunk, head_dim] in the dtype of the K/V.
HGA_KIND = "hga.v1"
# The basis is stored with this chunk, or the last one there is: the end of the 2,048 tokens that it is usually made of.
BASIS_CHUNK = 31


class RoutingState:
    """Of one session. device, dtype: of K and V in this process."""

    def __init__(
        self, geometry: Geometry, rope: Rope, options: SessionOptions, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._geometry, self._options, self._device, self._dtype = geometry, options, device, dtype
        self._chunk_turns = Turns.of_block(rope, geometry.chunk_tokens, geometry.chunk_tokens, device)
        self._group_turns = Turns.of_block(rope, geometry.group_tokens, geometry.chunk_tokens, device)
        self._spec = _spec(geometry, options)
        self._search: BasisSearch | None = None
        self.store: Summaries | Sketches | None = None
        self.basis_chunk: int | None = None  # where the basis is stored
        self.basis_durable = False  # and whether it survives the daemon, with the sketches made when it was settled
        if options.router in ("sketch", "auto") and self._spec is not None:
            self._search = BasisSearch(
                geometry.layers, geometry.kv_heads, geometry.head_dim, options.sketch_basis_tokens, device
            )
        elif options.router != "all":
            self._use_means()

    # The basis.

    @property
    def searching(self) -> bool:
        """Whether the basis is still open, and prompt tokens should be shown."""
        return self._search is not None

    def look(self, layer: int, q: Tensor, k: Tensor) -> None:
        """q: [kv_heads, ratio, tokens, head_dim]; k: [kv_heads, tokens, head_dim]; of a block of the prompt."""
        if self._search is not None:
            self._search.look(layer, q, k)

    def settle(self, chunks: int, now: bool) -> None:
        """Decides what has to be decided for a session of `chunks` chunks; now: with the tokens that were seen."""
        if self._options.router == "auto" and self._sketch_bytes(chunks) > self._options.routing_bytes_max:
            if not isinstance(self.store, Summaries):
                self._use_means()
        elif self._search is not None and (self._search.complete or now):
            self.use_basis(self._search.result())

    @property
    def promising(self) -> bool:
        """Whether a basis could be made of the tokens seen so far: worth it before the session is left."""
        return self._search is not None and self._search.enough

    def use_basis(self, basis: Basis | None) -> None:
        """basis: of all layers; None: plain keys."""
        geometry = self._geometry
        assert self._spec is not None
        self._search = None
        if basis is not None:
            # Needed once a chunk, and 0.2 % of the K/V at 64 K tokens: not beside the model.
            basis = replace(basis, to_y=basis.to_y.cpu())
            self.store = Sketches(self._spec, basis, plain=False)
            return
        sizes = (geometry.head_dim, geometry.chunk_tokens, geometry.group_tokens)
        none = Basis.none(geometry.kv_heads, geometry.head_dim, self._device)
        shape = (geometry.layers, *none.to_y.shape)
        every = Basis(none.to_y.expand(shape), none.to_z.expand(shape), none.centre.expand(shape[:3]))
        self.store = Sketches(SketchSpec.plain(*sizes), every, plain=True)

    def _use_means(self) -> None:
        geometry = self._geometry
        self._search = None
        self.store = Summaries(
            geometry.layers, geometry.kv_heads, geometry.groups_per_chunk, geometry.head_dim, self._dtype, self._device
        )

    def _sketch_bytes(self, chunks: int) -> int:
        if self._spec is None:
            return 0
        if isinstance(self.store, Sketches):
            return chunks * self.store.bytes_per_chunk
        return chunks * self._geometry.layers * self._geometry.kv_heads * self._spec.chunk_bytes

    # Chunks.

    @property
    def count(self) -> int | None:
        """Chunks that the store has; None while there is no store."""
        return None if self.store is None else self.store.count

    @property
    def kind(self) -> str:
        """What entries of the store are called in the daemon."""
        assert self.store is not None
        return self.store.kind if isinstance(self.store, Sketches) else HGA_KIND

    @property
    def bytes_per_chunk(self) -> int:
        """Of an entry of the store."""
        assert self.store is not None
        return self.store.bytes_per_chunk

    def make(self, first_chunk: int, keys: Tensor) -> Tensor | None:
        """Entries of chunks for `put`; None if they are not the next ones: the session makes them later.

        keys: [chunks, layers, kv_heads, groups_per_chunk, group_tokens, head_dim].
        """
        if self.store is None or self.store.count != first_chunk:
            return None
        if isinstance(self.store, Sketches):
            return self.store.make(keys.flatten(3, 4))
        groups = mixed_mean(keys, self._group_turns)
        chunk = mixed_mean(keys.flatten(3, 4), self._chunk_turns)
        return torch.cat((chunk.unsqueeze(3), groups), 3).to(self._dtype)

    def put(self, first_chunk: int, entries: Tensor | None) -> None:
        """What `make` returned."""
        if entries is not None:
            assert self.store is not None
            self.store.put(first_chunk, entries)

    def packed(self, first_chunk: int, end_chunk: int) -> bytes:
        """Entries as the daemon keeps them, of `kind`."""
        assert self.store is not None
        return self.store.packed(first_chunk, end_chunk).cpu().view(torch.uint8).numpy().tobytes()

    def reserve(self, chunks: int) -> None:
        """Makes room for so many chunks at once: a resumed session would copy what it has again and again."""
        store = self.store
        if isinstance(store, Sketches) and chunks > store.records.shape[2]:
            store.records = grown(store.records, chunks - store.records.shape[2])

    def unpack(self, first_chunk: int, count: int, payload: Bytes) -> None:
        """The inverse of `packed`; payload is not kept."""
        assert self.store is not None
        geometry = self._geometry
        values = torch.from_numpy(payload)
        if isinstance(self.store, Sketches):
            shape: tuple[int, ...] = (geometry.layers, geometry.kv_heads, self.store.spec.chunk_bytes)
        else:
            shape = (geometry.layers, geometry.kv_heads, 1 + geometry.groups_per_chunk, geometry.head_dim)
            values = values.view(self._dtype)
        self.store.put(first_chunk, values.view(count, *shape).to(self._device))

    def truncate(self, chunks: int) -> None:
        """Forgets what it has of chunks from `chunks` on."""
        if self.store is not None:
            self.store.truncate(chunks)
        self.doubt_basis(chunks)

    def doubt_basis(self, chunks: int) -> None:
        """What is stored with chunks from `chunks` on may be gone: the session stores the basis again."""
        if self.basis_chunk is not None and (self.basis_chunk >= chunks or not self.basis_durable):
            self.basis_chunk, self.basis_durable = None, False

    @property
    def basis_at_risk(self) -> bool:
        """Whether a basis is stored that a crash of the daemon would take away."""
        return self.basis_chunk is not None and not self.basis_durable

    def fork(self) -> RoutingState:
        """The same for another session."""
        other = copy.copy(self)
        other.store = None if self.store is None else self.store.fork()
        other._search = copy.deepcopy(self._search)
        return other

    # Routing.

    @property
    def weighs_window(self) -> bool:
        """Whether `route` needs the log mass of the window."""
        return isinstance(self.store, Sketches)

    def route(self, layer: int, q: Tensor, scale: float, first: int, end: int, near: Tensor | None) -> Tensor:
        """What to open of the groups of chunks first .. end-1: a mask, as in routing.py.

        q: [kv_heads, ratio, head_dim] or [kv_heads, ratio, tokens, head_dim]; near: exact log mass of what is attended
        anyway, the same without head_dim, if `weighs_window`.
        """
        options, store = self._options, self.store
        if store is None:
            assert options.router == "all"
            mask = route_all(q.shape[0], (end - first) * self._geometry.groups_per_chunk, q.device)
            return mask if q.dim() == 3 else mask[:, None].expand(-1, q.shape[2], -1)
        assert store.count >= end, "the session brings the store up before it routes"
        if isinstance(store, Summaries):
            return route_hga(
                q,
                store.chunks[layer, :, first:end],
                store.groups[layer, :, first:end],
                options.topk_chunks,
                options.topk_groups,
                options.pooled,
            )
        assert near is not None
        z, offset = store.layer_basis(layer).project(q.flatten(1, -2) * scale)
        masses = log_mass(store.spec, z, offset, store.records[layer, :, first:end])
        budget = options.sketch_groups * q.shape[0]
        return route_sketch(masses.view(*q.shape[:-1], -1), near, budget, options.cover)

    def route_one(
        self, layer: int, q: Tensor, scale: float, first: int, end: int, window_k: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `route`, of one token, q [kv_heads, ratio, head_dim], and its window_scores. window_k: as of Window.layer."""
        options, store = self._options, self.store
        if (
            isinstance(store, Sketches)
            and options.cover == 1
            and store.spec.group_tokens == 16
            and native.serves(q, window_k)
        ):
            assert store.count >= end, "the session brings the store up before it routes"
            basis, records = store.layer_basis(layer), store.records[layer, :, first:end]
            budget = options.sketch_groups * q.shape[0]
            return native.route(sizes(store.spec), q, scale, window_k, basis.to_z, basis.centre, records, budget)
        near = window_scores(q, window_k, scale)
        return self.route(layer, q, scale, first, end, near.logsumexp(2)), near

    def opened_most(self, ratio: int) -> int:
        """Groups that a KV head of so many query heads can open in a step, as the device's step counts: a power of two,
        16 at least; 0 where that step does not serve what is chosen."""
        options, store = self._options, self.store
        if isinstance(store, Summaries) and not options.pooled:
            most = ratio * options.topk_groups
        elif isinstance(store, Sketches) and ratio <= 16:
            spec = store.spec
            most = options.sketch_groups * self._geometry.kv_heads
            if spec.group_tokens != 16 or spec.chunk_bytes % 4 or most > 128:
                return 0
        else:
            return 0
        return 1 << max(4, (most - 1).bit_length())

    def resident_bytes(self) -> int:
        return sum(part.resident_bytes() for part in (self._search, self.store) if part is not None)


def _spec(geometry: Geometry, options: SessionOptions) -> SketchSpec | None:
    """None: this geometry has no sketches. Raises: InvalidRequest if it must have."""
    sizes = (geometry.chunk_tokens, geometry.group_tokens)
    if geometry.group_tokens % 4 or geometry.head_dim < 4:
        if options.router == "sketch":
            raise InvalidRequest(
                f"sketches need groups of a multiple of 4 tokens and heads of at least 4 dims; the geometry has "
                f"{geometry.group_tokens} and {geometry.head_dim}: use router='hga'"
            )
        return None
    if options.sketch_dims is None:
        return SketchSpec.of_basis(geometry.head_dim, *sizes)
    if sum(options.sketch_dims) > geometry.head_dim:
        raise InvalidRequest(f"sketch_dims are {options.sketch_dims}; together at most head_dim {geometry.head_dim}")
    return SketchSpec(geometry.head_dim, *options.sketch_dims, *sizes)
