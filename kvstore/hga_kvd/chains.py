"""Chain ids: what a chunk is a copy of. Pure.

A chunk's id is sha256 over its predecessor's id and its own token ids; the first chunk's predecessor is the root: the
geometry's fingerprint (all that changes K/V bytes) and the tenant. Equal ids therefore mean: same model, same tenant,
same tokens from the start of the sequence on. Ids are never stored: recovery computes them from token ids, 1 us each.
"""

from __future__ import annotations

import hashlib

from hga_kvd.geometry import Geometry


def root(geometry: Geometry, tenant: str) -> bytes:
    """32 bytes; what the ids of a tenant's chunks start from."""
    salt = hashlib.sha256(tenant.encode()).digest()
    return hashlib.sha256(b"hga-kvd chain v1" + bytes.fromhex(geometry.fingerprint()) + salt).digest()


def chain_ids(parent: bytes, token_ids: bytes, chunk_tokens: int) -> list[bytes]:
    """Ids of the whole chunks in `token_ids` (uint32), which follow `parent`; a rest that fills no chunk has none."""
    ids = []
    size = 4 * chunk_tokens
    for at in range(0, len(token_ids) - size + 1, size):
        parent = hashlib.sha256(parent + token_ids[at : at + size]).digest()
        ids.append(parent)
    return ids
