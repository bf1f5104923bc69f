"""hga-kvd for transformers: `patch(model)`, and generate() keeps its K/V in the daemon.

with hga_kvd_patch.patched(model, session="my-document"):
    model.generate(**inputs)
"""

try:
    import torch as _torch  # noqa: F401
    import transformers as _transformers  # noqa: F401
except ModuleNotFoundError as error:
    if error.name not in ("torch", "transformers"):
        raise
    raise ImportError('hga_kvd_patch needs torch and transformers: pip install "hga-kvd[patch]"') from error

from hga_kvd_patch.cache import HgaCache
from hga_kvd_patch.errors import (
    AlreadyPatched,
    CacheRefused,
    CacheUnusable,
    CallRefused,
    ModelRefused,
    NotPatched,
    PatchError,
    TextMismatch,
)
from hga_kvd_patch.naming import CACHE
from hga_kvd_patch.patch import Patched, patch, patched, unpatch

__all__ = [
    "CACHE",
    "AlreadyPatched",
    "CacheRefused",
    "CacheUnusable",
    "CallRefused",
    "HgaCache",
    "ModelRefused",
    "NotPatched",
    "PatchError",
    "Patched",
    "TextMismatch",
    "patch",
    "patched",
    "unpatch",
]
