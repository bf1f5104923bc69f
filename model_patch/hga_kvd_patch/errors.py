"""What the patch refuses, one class a meaning. Errors of the daemon and the client pass through as they are.

Every instance carries one sentence: what was asked, why it cannot be, and what to do instead.
"""


class PatchError(Exception):
    """Base of all. The model and the daemon are as they were."""


class ModelRefused(PatchError):
    """This model cannot be patched: something in it is not plain causal attention over half-split RoPE keys."""


class AlreadyPatched(PatchError):
    """The model is patched already."""


class NotPatched(PatchError):
    """The model is not patched."""


class CallRefused(PatchError):
    """A call that K/V in the daemon cannot serve: training, beams, right padding, a custom mask, attention weights."""


class CacheRefused(PatchError):
    """An operation that an HgaCache does not have: crop, reorder, select, repeat; or a cache of another model."""


class CacheUnusable(PatchError):
    """The cache was closed, or a call on it failed halfway. A named session can be taken up by a new cache."""


class TextMismatch(PatchError):
    """The session holds K/V of other tokens than the input begins with, or of tokens that it does not know."""
