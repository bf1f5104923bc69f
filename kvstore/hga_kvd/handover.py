"""Handover: gives each client the descriptors of its region and lane, and notices when the client is gone.

One thread runs `serve`. It never waits for one peer: every socket is non-blocking, the number of peers is bounded, and
a peer that has not said its token in time is dropped. Only the daemon's own user and root get an answer (SO_PEERCRED).
A token opens one region once, for ten seconds. Whatever else a peer sends ends its connection and nothing more.

The descriptors given to `offer` belong to the handover, which closes them.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import selectors
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

TOKEN_BYTES = 16
TOKEN_LIFE_S = 10.0
# Peers that connected and have not shown a token yet. An honest client is in this state for microseconds.
STRANGERS_MAX = 64


@dataclass(eq=False)
class _Offer:
    client_id: int
    descriptors: tuple[int, ...]
    expires: float

    def close(self) -> None:
        for descriptor in self.descriptors:
            os.close(descriptor)


@dataclass(eq=False)
class _Peer:
    connection: socket.socket
    expires: float
    token: bytearray = field(default_factory=bytearray)
    client_id: int = 0  # 0: a stranger


class Handover:
    """Listens from construction on; `serve` must run for anything to be answered."""

    def __init__(self, path: Path) -> None:
        """Binds a socket at `path`, which must be free, that only this user can open. Raises OSError."""
        self.path = path
        self._lock = threading.Lock()
        self._offers: dict[bytes, _Offer] = {}
        self._peers: set[_Peer] = set()
        self._stopping = False
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.bind(str(path))
            path.chmod(0o600)  # nobody can connect before listen()
            self._listener.listen(STRANGERS_MAX)
            self._listener.setblocking(False)
        except BaseException:
            self._listener.close()
            raise
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def offer(self, client_id: int, descriptors: tuple[int, ...]) -> bytes:
        """A token: the first peer that shows it gets the descriptors, and stands for the client from then on."""
        token = secrets.token_bytes(TOKEN_BYTES)
        with self._lock:
            self._offers[token] = _Offer(client_id, descriptors, time.monotonic() + TOKEN_LIFE_S)
            self._rouse()
        return token

    def serve(self) -> Iterator[int]:
        """Answers peers until `stop`; yields the id of each client that is gone, or never came for its region."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._wake, selectors.EVENT_READ)
            try:
                while not self._stopping:
                    for key, _ in selector.select(self._patience()):
                        if key.fileobj is self._listener:
                            self._accept(selector)
                        elif key.fileobj == self._wake:
                            os.eventfd_read(self._wake)
                        elif not self._hear(key.data):
                            yield from self._drop(key.data, selector)
                    yield from self._expire(selector)
            finally:
                self.close()

    def stop(self) -> None:
        """Ends `serve`. Safe from any thread."""
        with self._lock:
            self._stopping = True
            self._rouse()

    def _rouse(self) -> None:
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    def _patience(self) -> float | None:
        """Seconds until something may expire; None: nothing can."""
        with self._lock:
            times = [offer.expires for offer in self._offers.values()]
        times += [peer.expires for peer in self._peers if not peer.client_id]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _accept(self, selector: selectors.BaseSelector) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError:
            time.sleep(0.05)  # out of descriptors: the peer waits in the backlog until some are free
            return
        _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        strangers = sum(not peer.client_id for peer in self._peers)
        if uid not in (os.geteuid(), 0) or strangers >= STRANGERS_MAX:
            connection.close()
            return
        connection.setblocking(False)
        peer = _Peer(connection, time.monotonic() + TOKEN_LIFE_S)
        self._peers.add(peer)
        selector.register(connection, selectors.EVENT_READ, peer)

    def _hear(self, peer: _Peer) -> bool:
        """Takes what a peer sent. False: it is gone, or said what it must not."""
        try:
            data = peer.connection.recv(TOKEN_BYTES - len(peer.token) or 1)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if not data or peer.client_id:
            return False
        peer.token += data
        return len(peer.token) < TOKEN_BYTES or self._hand_over(peer)

    def _hand_over(self, peer: _Peer) -> bool:
        shown = bytes(peer.token)
        with self._lock:
            found = None
            for token in self._offers:  # compares with every token, each in constant time
                if hmac.compare_digest(token, shown):
                    found = token
            if found is None or self._offers[found].expires < time.monotonic():
                return False
            offer = self._offers.pop(found)
        peer.client_id = offer.client_id
        try:
            socket.send_fds(peer.connection, [b"\0"], offer.descriptors)
        except OSError:
            return False
        finally:
            offer.close()
        return True

    def _drop(self, peer: _Peer, selector: selectors.BaseSelector) -> Iterator[int]:
        selector.unregister(peer.connection)
        peer.connection.close()
        self._peers.discard(peer)
        if peer.client_id:
            yield peer.client_id

    def _expire(self, selector: selectors.BaseSelector) -> Iterator[int]:
        now = time.monotonic()
        for peer in [peer for peer in self._peers if not peer.client_id and peer.expires <= now]:
            yield from self._drop(peer, selector)
        with self._lock:
            stale = [self._offers.pop(token) for token, offer in list(self._offers.items()) if offer.expires <= now]
        for offer in stale:
            offer.close()
            yield offer.client_id

    def close(self) -> None:
        """Frees the path and all descriptors. `serve` does it at its end."""
        for peer in self._peers:
            peer.connection.close()
        with self._lock:
            for offer in self._offers.values():
                offer.close()
            self._offers.clear()
            if self._wake >= 0:
                os.close(self._wake)
                self._wake = -1
        self._listener.close()
        with contextlib.suppress(OSError):
            self.path.unlink()
