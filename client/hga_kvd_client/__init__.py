"""The model's side of hga-kvd: the window, the bank and the router beside the model, K/V in the daemon.

    with hga_kvd_client.connect() as client:
        session = client.open("my-document", geometry, rope)
        session.append(layer, k, v)
        out = session.attend(layer, q, scale)

Everything that handles tensors needs torch, which the extra `client` brings. `hga_kvd_client.connection` and
`hga_kvd_client.errors` do without, so names are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hga_kvd_client.answers import SessionInfo
    from hga_kvd_client.client import Client, connect
    from hga_kvd_client.connection import Connection
    from hga_kvd_client.geometry import Geometry
    from hga_kvd_client.options import Rope, SessionOptions
    from hga_kvd_client.session import Session
    from hga_kvd_client.stats import SessionStats

_MODULES = {
    "Client": "client",
    "Connection": "connection",
    "Geometry": "geometry",
    "Rope": "options",
    "Session": "session",
    "SessionInfo": "answers",
    "SessionOptions": "options",
    "SessionStats": "stats",
    "connect": "client",
}
_NEED_TORCH = {"client", "session"}

__all__ = [
    "Client",
    "Connection",
    "Geometry",
    "Rope",
    "Session",
    "SessionInfo",
    "SessionOptions",
    "SessionStats",
    "connect",
]


def __getattr__(name: str) -> Any:
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if module in _NEED_TORCH:
        try:
            import_module("torch")
        except ImportError as error:
            raise ImportError(f'hga_kvd_client.{name} needs torch: pip install "hga-kvd[client]"') from error
    return getattr(import_module(f"{__name__}.{module}"), name)
