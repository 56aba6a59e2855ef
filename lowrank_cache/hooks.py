"""One pre-forward hook per decoder, shared by all its caches and gone with the last of them.

The hook tells a ``LowRankCache`` what ``Cache.update`` never hears: positions, padding, and that a
forward begins. It holds no cache and no model; other caches pass through it untouched.
"""

import inspect
import threading
import warnings
import weakref
from functools import partial

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lowrank_cache.cache_argument import CACHE_ARGUMENTS

__all__ = ["hook_count", "watch"]


class _SharedHook:
    def __init__(self) -> None:
        self.users = 0
        self.handle: RemovableHandle | None = None


_HOOKS: "weakref.WeakKeyDictionary[nn.Module, _SharedHook]" = weakref.WeakKeyDictionary()
# Reentrant: the garbage collector may end a cache, and so call `_release`, at any point of the thread that holds it.
_LOCK = threading.RLock()


def watch(decoder: nn.Module, cache: object) -> None:
    """Let ``decoder`` announce its forwards to caches of its own for as long as ``cache`` lives."""
    with _LOCK:
        hook = _HOOKS.setdefault(decoder, _SharedHook())
        hook.users += 1
        if hook.handle is None:
            announce = partial(_announce, inspect.signature(decoder.forward))
            hook.handle = decoder.register_forward_pre_hook(announce, with_kwargs=True)
        _HOOKS[decoder] = hook  # again, if its last other user was collected meanwhile
    weakref.finalize(cache, _release, weakref.ref(decoder))


def hook_count(decoder: nn.Module) -> int:
    """How many caches currently watch ``decoder``."""
    return _HOOKS[decoder].users if decoder in _HOOKS else 0


def _release(decoder_ref: "weakref.ref[nn.Module]") -> None:
    with _LOCK:
        decoder = decoder_ref()
        if decoder is None or decoder not in _HOOKS:
            return
        hook = _HOOKS[decoder]
        hook.users -= 1
        if hook.users == 0 and hook.handle is not None:
            hook.handle.remove()
            hook.handle = None
            del _HOOKS[decoder]


@torch.compiler.disable(reason="positions are checked with Python control flow, outside of any graph")
def _announce(signature: inspect.Signature, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
    arguments = {**signature.bind_partial(*args).arguments, **kwargs}
    for name in CACHE_ARGUMENTS:
        begin = getattr(arguments.get(name), "begin_forward", None)
        if begin is not None:
            begin(decoder, arguments)
            return
    if type(arguments.get("cache")).__name__ == "PagedAttentionCache":  # transformers drops what it was given instead
        warnings.warn(
            "continuous batching keeps pages of its own: the LowRankCache that was made for this model is not used",
            stacklevel=2,
        )
