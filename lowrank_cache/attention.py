"""``latent_attention``: let a model attend to a ``LowRankCache``'s latents without reconstructing keys and values.

The model is switched to an attention function that reads latents where a layer's cache offers them, and calls
the model's previous one everywhere else: other caches, prefills, sliding and linear layers, and layers whose
code stands between ``Cache.update`` and attention (MLA). Which layers those are is found by a probe of one token.
"""

import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lowrank_cache.kernels.api import IMPLEMENTATIONS
from lowrank_cache.latent_view import Attended, LatentView, attach_view, set_attended, view_of
from lowrank_cache.probe import SpyCache, decoder_of, model_shape, one_token_forward

__all__ = ["LatentAttention", "latent_attention"]

# By the previous implementation that serves all other layers. The names must not contain "flash", which
# transformers takes as a sign of unpadded inputs.
_NAMES = {"sdpa": "lowrank_latent", "eager": "lowrank_latent_over_eager"}
_MASKS = {"sdpa": sdpa_mask, "eager": eager_mask}


def latent_attention(model: PreTrainedModel, *, impl: str = "auto") -> "LatentAttention":
    """Switch ``model`` to attention over latents.

    Use it as a context manager, or keep the handle and call ``remove()``. It may be called again for the
    same model; the model is switched back when the last handle is removed.

    Args:
        model: A model that ``LowRankCache`` supports, in any weight format.
        impl: Who computes for the model's caches, attention included: ``"auto"``, ``"torch"``, ``"triton"`` or
            ``"reference"``, see ``kernels.api``.

    Raises:
        NotImplementedError: If the model's cache cannot be compressed, its attention does not go through
            transformers' attention interface, or no layer hands its cache's keys to it unchanged.
        ValueError: If ``impl`` is unknown or differs from that of a handle that is still in use.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {IMPLEMENTATIONS}, got {impl!r}")
    model_shape(model)  # raises for what cannot be compressed
    decoder = decoder_of(model)
    with _LOCK:
        switched = _SWITCHED.get(decoder)
        if switched is None:
            switched = _switch(model, decoder, impl)
        elif switched.impl != impl:
            raise ValueError(f"impl must be {switched.impl!r}, in which this model attends already, got {impl!r}")
        switched.users += 1
    return LatentAttention(decoder)


class LatentAttention(AbstractContextManager):
    """A model's switch to attention over latents, until ``remove``."""

    def __init__(self, decoder: PreTrainedModel):
        self._decoder: weakref.ref[PreTrainedModel] | None = weakref.ref(decoder)

    def remove(self) -> None:
        """Switch the model back to its own attention; calling it twice changes nothing."""
        with _LOCK:
            decoder = self._decoder() if self._decoder is not None else None
            self._decoder = None
            if decoder is None or decoder not in _SWITCHED:
                return
            switched = _SWITCHED[decoder]
            switched.users -= 1
            if switched.users == 0:
                _switch_back(decoder)

    def __exit__(self, *error: object) -> None:
        self.remove()


@dataclass
class _Switched:
    previous: str
    impl: str
    users: int = 0


_SWITCHED: "weakref.WeakKeyDictionary[PreTrainedModel, _Switched]" = weakref.WeakKeyDictionary()
_LOCK = threading.RLock()


def _switch(model: PreTrainedModel, decoder: PreTrainedModel, impl: str) -> _Switched:
    name = type(decoder).__name__
    if not decoder._can_set_attn_implementation():
        raise NotImplementedError(f"{name} does not attend through transformers' attention interface")
    previous = decoder.config._attn_implementation
    # Flash and flex attention want masks of other kinds; while latents are attended to, SDPA takes their place.
    others = "eager" if previous == "eager" else "sdpa"
    for key, function in _FUNCTIONS.items():
        # Both: where the mask's name is unknown, transformers makes no mask at all.
        AttentionInterface.register(_NAMES[key], function)
        AttentionMaskInterface.register(_NAMES[key], _MASKS[key])  # type: ignore[arg-type]  # a dict of functions
    decoder.set_attn_implementation(_NAMES[others])
    if decoder not in _DIRECT:  # the first time
        weakref.finalize(decoder, _model_died)  # perhaps while it was switched
    _SWITCHED[decoder] = _Switched(previous, impl)
    try:
        layers = _layers_that_attend_directly(model, decoder)
        if not layers:
            raise NotImplementedError(
                f"{name}: no layer hands the keys and values of its cache to attention unchanged; use the cache "
                "without latent_attention"
            )
    except BaseException:
        _switch_back(decoder)
        raise
    set_attended(decoder, Attended(layers, impl))
    return _SWITCHED[decoder]


def _switch_back(decoder: PreTrainedModel) -> None:
    set_attended(decoder, Attended())
    decoder.set_attn_implementation(_SWITCHED.pop(decoder).previous)
    _unregister_if_unused()


def _unregister_if_unused() -> None:
    if not _SWITCHED:
        for name in _NAMES.values():
            AttentionInterface._global_mapping.pop(name, None)  # there is no public way back
            AttentionMaskInterface._global_mapping.pop(name, None)


def _model_died() -> None:
    # The garbage collector calls this at any point of any thread, so it must not wait; the lock holder unregisters when
    # it switches back.
    if _LOCK.acquire(blocking=False):
        try:
            _unregister_if_unused()
        finally:
            _LOCK.release()


class _Probe:
    """Rides on the keys of one layer and counts how often they reach attention with the values that belong to them."""

    def __init__(self, values: Tensor):
        self.values: Tensor = values
        self.arrivals = 0


_DIRECT: "weakref.WeakKeyDictionary[PreTrainedModel, frozenset[int]]" = weakref.WeakKeyDictionary()


def _layers_that_attend_directly(model: PreTrainedModel, decoder: PreTrainedModel) -> frozenset[int]:
    """Compressible layers between whose ``Cache.update`` and attention function nothing happens; probed once."""
    if decoder not in _DIRECT:
        shape, probes = model_shape(model), dict[int, _Probe]()

        def mark(layer_idx: int, given: tuple, returned: tuple) -> None:
            keys, values = returned
            probes[layer_idx] = _Probe(values)
            attach_view(keys, probes[layer_idx])

        if "dummy" not in shape.layer_types:  # layers that reuse others' keys (Gemma 3n)
            one_token_forward(model, SpyCache(model, mark))
        layers = [layer.layer_idx for layer in shape.layers]
        _DIRECT[decoder] = frozenset(layer for layer in layers if layer in probes and probes[layer].arrivals == 1)
    return _DIRECT[decoder]


def _attend_over_sdpa(module, query, key, value, attention_mask, **kwargs) -> tuple[Tensor, Tensor | None]:
    return _attend(ALL_ATTENTION_FUNCTIONS["sdpa"], module, query, key, value, attention_mask, **kwargs)


def _attend_over_eager(module, query, key, value, attention_mask, **kwargs) -> tuple[Tensor, Tensor | None]:
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return _attend(eager, module, query, key, value, attention_mask, **kwargs)


@torch.compiler.disable(reason="the number of cached tokens changes with every step")
def _attend(others: Callable, module, query, key, value, attention_mask, **kwargs) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function: latents where ``key`` carries a view, ``others`` elsewhere."""
    view = view_of(key)
    if isinstance(view, _Probe):
        view.arrivals += value is view.values
    if not isinstance(view, LatentView):
        return others(module, query, key, value, attention_mask, **kwargs)
    if kwargs.get("dropout"):
        raise NotImplementedError("attention over latents has no dropout; call model.eval()")
    scaling = kwargs.get("scaling")
    output = view.attend(
        query,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        mask=None if attention_mask is None else _as_bool(attention_mask),
        softcap=kwargs.get("softcap"),
        sink_logits=kwargs.get("s_aux"),
    )
    return output.to(query.dtype).transpose(1, 2).contiguous(), None


def _as_bool(mask: Tensor) -> Tensor:
    """A mask of 0 and very low numbers as True and False; others are biases, which are not supported."""
    if mask.dtype == torch.bool:
        return mask
    visible = mask == 0
    if not bool((visible | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
        raise NotImplementedError("attention_mask must be boolean or hold 0 and very low numbers only, got a bias")
    return visible


_FUNCTIONS: dict[str, Callable[..., Any]] = {"sdpa": _attend_over_sdpa, "eager": _attend_over_eager}
