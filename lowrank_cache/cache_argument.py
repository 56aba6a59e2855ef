"""What a model calls the argument that takes a cache: ``cache`` since transformers 5.24, ``past_key_values`` before."""

import inspect
from typing import Any

__all__ = ["CACHE_ARGUMENTS", "cache_argument"]

CACHE_ARGUMENTS = ("cache", "past_key_values")


def cache_argument(model: Any, cache: object) -> dict[str, Any]:
    """``cache`` as a keyword argument of a model's ``forward`` and ``generate``, by its name there."""
    name, old_name = CACHE_ARGUMENTS
    return {name if name in inspect.signature(model.forward).parameters else old_name: cache}
