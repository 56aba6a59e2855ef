"""Arithmetic that does not follow ambient state: who calls it may be inside ``torch.autocast``."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")
_KINDS = ("cpu", "cuda", "xpu", "mps")


def without_autocast(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """``function`` with autocast off: it would round float32 products to 8 or 11 bits, and some operations fail."""

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        active = [kind for kind in _KINDS if torch.is_autocast_enabled(kind)]
        if not active:
            return function(*args, **kwargs)
        with ExitStack() as disabled:
            for kind in active:
                disabled.enter_context(torch.autocast(kind, enabled=False))
            return function(*args, **kwargs)

    return call
