"""Attention over a ``LowRankCache``'s latents in place of a model's own, which reconstructs no keys or values.

A layer's attention is looked up by name in transformers' interface, or, if it is eager, in the modeling file. While a
cache that attends or a handle lives, wrappers stand in these places: where a layer's cache offers latents they read
them, and else they call what stood there. No model and no config is changed. Which layers hand their cache's keys to
attention as they are is found by a probe of one token; what is in force is looked up in each forward.
"""

import os
import sys
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache, wraps
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_cache.kernels.api import IMPLEMENTATIONS
from lowrank_cache.latent_view import CURE, LatentView, as_bool, attach_view, view_of
from lowrank_cache.probe import SpyCache, decoder_of, layer_devices, model_shape, one_token_forward

_OUTSIDE = "it does not attend through transformers' attention interface"
_INTERFACE, _EAGER = "ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"  # as modeling files call them


def latent_attention(model: PreTrainedModel, *, impl: str = "auto") -> "LatentAttention":
    """Choose who computes for the ``LowRankCache`` objects of ``model``, and insist that they attend to latents.

    Caches attend by themselves. Under a handle they also do so in place of attention functions that do not come
    with transformers, and ``impl`` holds. Use it as a context manager, or keep the handle, which ends with
    ``remove()`` or when it is lost. Calls for one model may be nested.

    Args:
        model: A model that ``LowRankCache`` supports, in any weight format.
        impl: ``"auto"``, ``"native"``, ``"torch"``, ``"triton"`` or ``"reference"``, see ``kernels.api``; for
            encoding and reconstructing too.

    Raises:
        NotImplementedError: If the model's cache cannot be compressed, its attention does not go through
            transformers' attention interface, or no layer hands its cache's keys to it unchanged.
        ValueError: If ``impl`` is unknown, cannot compute on the model's devices, or differs from that of a handle that
            is still in use.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {IMPLEMENTATIONS}, got {impl!r}")
    devices = {device.type for device in layer_devices(model).values()}
    if impl == "triton" and "cuda" not in devices and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"impl='triton' must be used for a model on a GPU, got one on {sorted(devices)}; leave impl out, or set "
            "TRITON_INTERPRET=1 before triton is imported, to try the kernels in the interpreter"
        )
    known, obstacle = _examine(model)
    if obstacle is not None:
        raise NotImplementedError(
            f"{type(decoder_of(model)).__name__}: {obstacle}; use the cache without latent_attention"
        )
    with _locked():
        if known.handles and known.impl != impl:
            raise ValueError(f"impl must be {known.impl!r}, in which this model attends already, got {impl!r}")
        known.handles, known.impl = known.handles + 1, impl
    return LatentAttention(known)


class LatentAttention(AbstractContextManager):
    """A handle on a model's attention over latents, until ``remove`` or until nobody holds it."""

    def __init__(self, known: "_Known"):
        self._end = join(self, known)

    def remove(self) -> None:
        """End what the handle asked for; calling it twice changes nothing."""
        self._end()

    def __exit__(self, *error: object) -> None:
        self.remove()


def make_attending(model: PreTrainedModel, cache: object) -> bool:
    """Let ``cache`` attend to latents if ``model`` can, for as long as it lives; if not, say why, once per model."""
    known, obstacle = _examine(model)
    if obstacle is None:
        join(cache)
    else:
        known.warn(decoder_of(model), obstacle)
    return obstacle is None


def impl_of(decoder: nn.Module) -> str:
    """Who computes for the caches of ``decoder``, see ``kernels.api``."""
    known = _KNOWN.get(decoder)
    return "auto" if known is None else known.impl


def attended_layers(decoder: nn.Module, arguments: Mapping[str, Any] | None = None) -> frozenset[int]:
    """The cache layers that attend to latents in a forward of ``decoder`` with these arguments, which begins now.

    Decided by what the model would run: whoever changes its attention, by whatever way, finds the cache following.
    Where nothing can be attended to, the reason is warned of once per model.
    """
    known, config = _KNOWN.get(decoder), cast(Any, decoder.config)
    name = config._attn_implementation
    layers = frozenset() if known is None else known.direct.get(name, next(iter(known.direct.values()), frozenset()))
    if known is None or not layers:
        return frozenset()
    places = known.places(name)
    obstacle = _obstacle_of_name(name) or _obstacle_of_forward(decoder, arguments or {})
    if not places:
        obstacle = _OUTSIDE
    elif not known.handles and not all(_is_their_own(file, mapping[key]) for file, mapping, key in places):
        obstacle = (
            f"{name!r} is not a function of transformers, and may compute something else than attention; "
            "latent_attention(model) attends to latents all the same"
        )
    if obstacle is not None:
        known.warn(decoder, obstacle)
        return frozenset()
    _install(places)
    return layers


def _obstacle_of_forward(decoder: nn.Module, arguments: Mapping[str, Any]) -> str | None:
    wanted = arguments.get("output_attentions")
    if getattr(decoder.config, "output_attentions", False) if wanted is None else wanted:
        return "attention over latents makes no weights for output_attentions"
    if torch.is_grad_enabled():
        given = (arguments.get("inputs_embeds"), *decoder.parameters())
        if any(tensor is not None and tensor.requires_grad for tensor in given):
            return "attention over latents has no gradients; use torch.no_grad()"
    return None


def _obstacle_of_name(name: str | None) -> str | None:
    if name == "flex_attention" or (name or "").startswith("paged|"):
        return f"attention {name!r} works on masks or pages of its own"
    return None


class _Place(NamedTuple):
    """Where a modeling file of this name looks up its attention: ``mapping[key]``."""

    file: str
    mapping: dict[str, Any]
    key: str


def _is_their_own(file: str, function: Any) -> bool:
    """Whether transformers or the modeling file brought ``function``; a wrapper of ours counts as what it wraps."""
    home = getattr(getattr(function, "func", function), "__module__", None) or ""
    return home.partition(".")[0] == "transformers" or home == file


class _Known:
    """What is known of a decoder, and whether handles ask something of it. Holds no module."""

    def __init__(self, decoder: PreTrainedModel):
        classes = {base for module in decoder.modules() for base in type(module).__mro__}
        names = {base.__module__ for base in classes} - {PreTrainedModel.__module__}
        files = [vars(sys.modules[name]) for name in sorted(names) if name in sys.modules]
        self.files = [file for file in files if _INTERFACE in file]
        # By name of an attention, the layers between whose `Cache.update` and attention function nothing happens.
        self.direct: dict[str | None, frozenset[int]] = {}
        self.handles, self.impl = 0, "auto"
        self._warned = False

    def places(self, name: str | None) -> list[_Place]:
        """Where attention of this name is looked up."""
        places = {}
        for file in self.files:
            mappings = file[_INTERFACE]._local_mapping, file[_INTERFACE]._global_mapping
            mapping, key = next(((each, name or "") for each in mappings if name in each), (file, _EAGER))
            if key in mapping:
                places[id(mapping), key] = _Place(file["__name__"], mapping, key)
        return list(places.values())

    def warn(self, decoder: nn.Module, obstacle: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"LowRankCache reconstructs keys and values of {type(decoder).__name__}, which is slow: {obstacle}. "
                "LowRankCache(..., attend='reconstruct') does so without a warning",
                stacklevel=4,
            )


_KNOWN: "weakref.WeakKeyDictionary[nn.Module, _Known]" = weakref.WeakKeyDictionary()


def _examine(model: PreTrainedModel) -> tuple[_Known, str | None]:
    """What is known of ``model``, and why no layer of it can attend to latents; None if one can."""
    model_shape(model)  # raises for what cannot be compressed
    decoder = decoder_of(model)
    known = _KNOWN.get(decoder) or _KNOWN.setdefault(decoder, _Known(decoder))
    name = decoder.config._attn_implementation
    if not known.files:
        return known, _OUTSIDE
    if name not in known.direct:
        if (obstacle := _obstacle_of_name(name)) is not None:
            return known, obstacle
        user = _enter()
        try:
            _install(known.places(name))
            known.direct[name] = _layers_that_attend_directly(model)
        finally:
            _leave(user)
    if not known.direct[name]:
        return known, "no layer hands the keys and values of its cache to attention unchanged"
    return known, None


class _Probe:
    """Rides on the keys of one layer and counts how often they reach attention with the values that belong to them."""

    def __init__(self, values: Tensor):
        self.values: Tensor = values
        self.arrivals = 0


def _layers_that_attend_directly(model: PreTrainedModel) -> frozenset[int]:
    """Compressible layers between whose ``Cache.update`` and attention function nothing happens."""
    shape, probes = model_shape(model), dict[int, _Probe]()

    def mark(layer_idx: int, given: tuple, returned: tuple) -> None:
        keys, values = returned
        probes[layer_idx] = _Probe(values)
        attach_view(keys, probes[layer_idx])

    if "dummy" not in shape.layer_types:  # layers that reuse others' keys (Gemma 3n)
        one_token_forward(model, SpyCache(model, mark))
    layers = [layer.layer_idx for layer in shape.layers]
    return frozenset(layer for layer in layers if layer in probes and probes[layer].arrivals == 1)


class _User:
    """A cache that attends, a handle, or a probe."""

    def __init__(self, known: _Known | None):
        self.known = known  # of a handle


_USERS: set[_User] = set()
_GONE: "deque[_User]" = deque()
_WRAPPED: dict[tuple[int, str], tuple[_Place, Callable, Callable]] = {}  # by place, what stood there and what stands
# Held for a few lines of ours only, never while a model runs.
_LOCK = threading.Lock()


@contextmanager
def _locked() -> Iterator[None]:
    try:
        with _LOCK:
            yield
    finally:
        _sweep()


def _enter(known: _Known | None = None) -> _User:
    user = _User(known)
    with _locked():
        _USERS.add(user)
    return user


def join(owner: object, known: _Known | None = None) -> Callable[[], object]:
    """Keep wrappers while ``owner`` lives, or until what is returned is called."""
    end = weakref.finalize(owner, _leave, _enter(known))
    end.atexit = False
    return end


def _leave(user: _User) -> None:
    _GONE.append(user)
    _sweep()


def _sweep() -> None:
    """Let go of users that are gone; with the last of them go the wrappers.

    The garbage collector calls this at any point of any thread, so it must not wait: who holds the lock sweeps after.
    """
    while _GONE and _LOCK.acquire(blocking=False):
        try:
            while _GONE:
                user = _GONE.popleft()
                _USERS.discard(user)
                if user.known is not None:
                    user.known.handles -= 1
                    user.known.impl = user.known.impl if user.known.handles else "auto"
            if not _USERS:
                for place, original, wrapper in _WRAPPED.values():
                    if place.mapping.get(place.key) is wrapper:  # else others took the place, and may call ours
                        place.mapping[place.key] = original
                _WRAPPED.clear()
        finally:
            _LOCK.release()


def _install(places: Sequence[_Place]) -> None:
    """See to it that our wrappers stand in these places, whoever has been there since."""
    for place in places:
        if not _stands(place):
            with _locked():
                if _USERS and not _stands(place):
                    original = place.mapping[place.key]
                    wrapper = _wrapper(original)
                    _WRAPPED[id(place.mapping), place.key] = place, original, wrapper
                    place.mapping[place.key] = wrapper


def _stands(place: _Place) -> bool:
    held = _WRAPPED.get((id(place.mapping), place.key))
    return held is not None and place.mapping.get(place.key) is held[2]


@lru_cache(maxsize=64)  # the same again for every user: compiled code is tied to the function that it met
def _wrapper(original: Callable) -> Callable:
    @wraps(original)
    def attention(module, query, key, value, *args, **kwargs):
        if view_of(key) is None:  # compiled code goes on here
            return original(module, query, key, value, *args, **kwargs)
        return _attend(original, module, query, key, value, *args, **kwargs)

    return attention


def _unreadable(mask: object, query: Tensor, options: Mapping[str, Any]) -> bool:
    """Whether a layer adds something to the scores of one token that attention over latents does not."""
    try:
        if mask is not None:
            as_bool(mask, query.shape[2], query.shape[2])
    except NotImplementedError:
        return True
    return options.get("position_bias") is not None


@torch.compiler.disable(reason="the number of cached tokens changes with every step")
def _attend(original: Callable, module, query, key, value, attention_mask=None, **kwargs) -> tuple[Tensor, Any]:
    """transformers' attention function where something rides on ``key``."""
    view = view_of(key)
    if not isinstance(view, LatentView):
        if isinstance(view, _Probe):
            view.arrivals += value is view.values and not _unreadable(attention_mask, query, kwargs)
            attach_view(key, None)  # so that another wrapper of ours, further down, does not count it again
        output = original(module, query, key, value, attention_mask, **kwargs)
        attach_view(key, view)
        return output
    if kwargs.get("dropout"):
        raise NotImplementedError(f"attention over latents has no dropout; call model.eval(), or {CURE}")
    if kwargs.get("position_bias") is not None:
        raise NotImplementedError(f"attention over latents takes no position_bias; {CURE}")
    scaling = kwargs.get("scaling")
    output = view.attend(
        query,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        mask=None if attention_mask is None else as_bool(attention_mask, query.shape[2], view.slots),
        softcap=kwargs.get("softcap"),
        sink_logits=kwargs.get("s_aux"),
    )
    return output.to(query.dtype).transpose(1, 2).contiguous(), None
