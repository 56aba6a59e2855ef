"""One pre-forward hook per decoder, shared by all its caches and gone with the last of them.

The hook tells a ``LowRankCache`` what ``Cache.update`` never hears: positions, padding, and that a
forward begins. It holds no cache and no model; other caches pass through it untouched.
"""

import inspect
import weakref
from functools import partial

import torch
from torch import nn

__all__ = ["hook_count", "watch"]


class _SharedHook:
    def __init__(self, decoder: nn.Module):
        self.users = 0
        signature = inspect.signature(decoder.forward)
        self.handle = decoder.register_forward_pre_hook(partial(_announce, signature), with_kwargs=True)


_HOOKS: "weakref.WeakKeyDictionary[nn.Module, _SharedHook]" = weakref.WeakKeyDictionary()


def watch(decoder: nn.Module, cache: object) -> None:
    """Let ``decoder`` announce its forwards to caches of its own for as long as ``cache`` lives."""
    if decoder not in _HOOKS:
        _HOOKS[decoder] = _SharedHook(decoder)
    _HOOKS[decoder].users += 1
    weakref.finalize(cache, _release, weakref.ref(decoder))


def hook_count(decoder: nn.Module) -> int:
    """How many caches currently watch ``decoder``."""
    return _HOOKS[decoder].users if decoder in _HOOKS else 0


def _release(decoder_ref: weakref.ref) -> None:
    decoder = decoder_ref()
    if decoder is None or decoder not in _HOOKS:
        return
    hook = _HOOKS[decoder]
    hook.users -= 1
    if hook.users == 0:
        hook.handle.remove()
        del _HOOKS[decoder]


@torch.compiler.disable(reason="positions are checked with Python control flow, outside of any graph")
def _announce(signature: inspect.Signature, decoder: nn.Module, args: tuple, kwargs: dict) -> None:
    arguments = {**signature.bind_partial(*args).arguments, **kwargs}
    begin = getattr(arguments.get("past_key_values"), "begin_forward", None)
    if begin is not None:
        begin(decoder, arguments)
