"""What a call's cache is called among its arguments and in its output: `past_key_values` up to transformers 5.23, `cache`
since. The only place that knows both; whoever calls may use either.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

_NAMES = ("cache", "past_key_values")
_OUTPUTS = {field.name for field in fields(BaseModelOutputWithPast)}

CACHE = next(name for name in _NAMES if name in _OUTPUTS)


def take_cache(arguments: dict[str, Any]) -> Any:
    """Takes the cache out of a call's arguments; None if there is none."""
    given = [arguments.pop(name, None) for name in _NAMES]
    return next((cache for cache in given if cache is not None), None)
