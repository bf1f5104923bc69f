"""The routing state of a session and the daemon's copy of it: brought up from stored keys, stored, restored.

The order is always: settle the basis, make what is missing with it, store the basis. A basis that the daemon has is
never replaced by another one.
"""

from __future__ import annotations

import logging

import torch

from hga_kvd_client import errors
from hga_kvd_client.routing_state import BASIS_CHUNK, RoutingState
from hga_kvd_client.sketches import BASIS_KIND, PLAIN_KIND, Sketches, basis_kind, basis_parts, part_count, read_basis
from hga_kvd_client.stored import StoredSession

logger = logging.getLogger("hga_kvd_client")


def bring_up(routing: RoutingState, stored: StoredSession, tile_chunks: int, settle: bool) -> None:
    """Settles the basis if it is time, or now if `settle`, and makes what the routing state lacks from stored keys."""
    routing.settle(stored.chunks, now=settle)
    count = routing.count
    while count is not None and count < stored.chunks:
        _make(routing, stored, count, min(count + tile_chunks, stored.chunks))
        count = routing.count
    if stored.chunks and isinstance(routing.store, Sketches) and routing.basis_chunk is None:
        _put_basis(routing, stored, routing.store)


def restore(routing: RoutingState, stored: StoredSession, device: torch.device, tile_chunks: int) -> None:
    """Of a session that is taken up: what the daemon keeps, and what it lost made again from stored keys."""
    routing.settle(stored.chunks, now=False)
    if routing.searching:
        _restore_basis(routing, stored, device)
    count = routing.count
    routing.reserve(stored.chunks)
    while count is not None and count < stored.chunks:
        pages = stored.summaries(routing.kind, count, stored.chunks - count, routing.bytes_per_chunk)
        for chunks, payload in pages:
            routing.unpack(count, chunks, payload)
            count += chunks
        if count < stored.chunks:
            logger.warning("summaries of chunks from %d on are computed again from stored keys (slow)", count)
            _make(routing, stored, count, min(count + tile_chunks, stored.chunks))
        count = routing.count


def _make(routing: RoutingState, stored: StoredSession, first: int, end: int) -> None:
    """Of chunks first .. end-1 from stored keys, all of which are held at once."""
    geometry = stored.geometry
    layers = []
    for layer in range(geometry.layers):
        k = torch.cat([k for _, k, _, _ in stored.tiles(layer, first, end)], 1)
        apart = k.view(geometry.kv_heads, end - first, geometry.groups_per_chunk, geometry.group_tokens, -1)
        layers.append(apart.transpose(0, 1))
    routing.put(first, routing.make(first, torch.stack(layers, 1)))
    stored.put_routing(first, end)


def _put_basis(routing: RoutingState, stored: StoredSession, sketches: Sketches) -> None:
    chunk = min(BASIS_CHUNK, stored.chunks - 1)
    try:
        for kind, payload in basis_parts(None if sketches.plain else sketches.basis):
            stored.put_summary(kind, chunk, payload)
    except errors.LimitExceeded as error:
        # It is in memory here; a later resume makes another one, of the tokens that come then.
        logger.warning("the basis of the sketches is not stored: %s", error)
    routing.basis_chunk = chunk


def _restore_basis(routing: RoutingState, stored: StoredSession, device: torch.device) -> None:
    """Takes the stored basis, if there is one; else it is still to be found."""
    geometry = stored.geometry
    for chunk in range(min(BASIS_CHUNK, stored.chunks - 1), -1, -1):
        first = stored.summary(BASIS_KIND, chunk)
        basis = None
        if first is not None:
            data, kinds = bytearray(first), [basis_kind(n) for n in range(1, part_count(first))]
            for part in stored.summary_parts(kinds, chunk, len(first)):
                data += part.data
            shape = (geometry.layers, geometry.kv_heads, geometry.head_dim)
            try:
                basis = read_basis(data, shape, device)
            except ValueError as error:
                logger.warning("the stored basis of session %r cannot be used: %s", stored.name, error)
                continue
        elif stored.summary(PLAIN_KIND, chunk) is None:
            continue
        routing.use_basis(basis)
        routing.basis_chunk = chunk
        return
    logger.warning("session %r has no basis in the daemon: one is made of the prompt tokens that come now", stored.name)
