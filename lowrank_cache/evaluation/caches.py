"""Caches by specification, as the command line takes them: ``fisher:8,groups=1,frame=64``, ``xkv:8``, ``kivi-2``.

The name of a table's entry is its specification, so it says what was measured. transformers' own caches are used as
they are. KIVI (arXiv:2402.02750) has no maintained cache for transformers 5: its arithmetic is simulated, and the bytes
that it would store are counted by its formula, not from tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, QuantizedCache
from transformers.cache_utils import DynamicLayer

from lowrank_cache import LowRankCache, Projections
from lowrank_cache.calibration.api import METHODS, projections_from_moments
from lowrank_cache.calibration.moments import Moments
from lowrank_cache.kernels.packed import BIT_WIDTHS
from lowrank_cache.probe import model_shape
from lowrank_cache.prompt_svd import NEW_TOKENS

__all__ = [
    "BASELINES", "GRAMMAR", "CacheEntry", "CacheSizes", "Configuration", "SimulatedKiviCache", "cache_entry",
    "make_baseline", "make_bases", "parse", "tensor_bytes",
]  # fmt: skip

BASELINES = ("full", "quantized-fp8", "quantized-4", "quantized-2", "kivi-4", "kivi-2")
GRAMMAR = "METHOD:RATIO[,groups=G][,frame=L][,joint=0|1][,bits=B][,ranks=R], with xkv also [,new=encode|exact]"
XKV = "xkv"  # the one method that needs no calibration


@dataclass(frozen=True)
class Configuration:
    """A compressed cache: how its bases are made, and the arguments of ``LowRankCache``."""

    method: str  # of calibration, or ``"xkv"``
    compression_ratio: float  # of the cache; ranks replace the ratio
    groups: int | str = "auto"  # ``layer_group_size``: ``"auto"`` (4 for xkv) or a number
    frame: int = 1  # ``frame_length``
    joint: bool | None = None  # whether keys and values share a latent; None for the method's default
    bits: int | None = None
    ranks: int | None = None
    new: str | None = None  # xkv's ``new_tokens``

    @property
    def refit_ratio(self) -> float:
        """Ratio of the ranks at which values are fitted to the compressed stream; 1 where they are not."""
        method = METHODS.get(self.method)
        if method is None or method.refit is None or self.ranks is not None:
            return 1.0
        return max(1.0, self.compression_ratio * (self.bits or 16) / 16)

    @property
    def bases_name(self) -> str:
        """Equal for configurations with equal bases; part of a path."""
        joint = {None: "auto", True: "1", False: "0"}[self.joint]
        refit = f",refit={self.refit_ratio:g}" if self.refit_ratio > 1 else ""
        return f"{self.method},groups={self.groups},frame={self.frame},joint={joint}{refit}"

    def options(self) -> dict[str, Any]:
        """Arguments of ``LowRankCache`` beside model, projections and sizes."""
        found: dict[str, Any] = {name: getattr(self, name) for name in ("compression_ratio", "bits", "ranks")}
        if self.method not in METHODS:
            size = 4 if self.groups == "auto" else self.groups
            found |= {"method": XKV, "layer_group_size": size, "new_tokens": self.new}
        return found


def parse(specification: str) -> Configuration | None:
    """A configuration, which is written as in ``GRAMMAR``, or None if ``specification`` names a baseline.

    Raises:
        ValueError: If it cannot be read, or asks for what no model has.
    """
    if specification in BASELINES:
        return None
    head, *options = specification.split(",")
    method, _, ratio = head.partition(":")
    try:
        if method not in (*METHODS, XKV):
            raise ValueError
        found: dict[str, Any] = {}
        for name, _, value in (option.partition("=") for option in options):
            if name == "new" and method not in METHODS and value in NEW_TOKENS:
                found[name] = value
            elif name in ("groups", "frame", "bits", "ranks"):
                found[name] = value if value == "auto" else int(value)
            elif name == "joint":
                found[name] = bool(int(value))
            else:
                raise ValueError
        configuration = Configuration(method, float(ratio), **found)
    except ValueError:
        raise ValueError(
            f"cache must be one of {BASELINES} or {GRAMMAR}, with a method of {sorted((*METHODS, XKV))}, got "
            f"{specification!r}"
        ) from None
    if not configuration.compression_ratio >= 1:
        raise ValueError(f"cache must have a ratio of at least 1, got {specification!r}")
    if configuration.bits not in (None, *BIT_WIDTHS):
        raise ValueError(f"cache must have bits of {BIT_WIDTHS}, got {specification!r}")
    return configuration


def make_bases(
    configuration: Configuration, moments: Moments, refit: Callable[[Projections, float], Moments] | None = None
) -> Projections:
    """The projections of a calibrated configuration.

    Args:
        moments: Statistics.
        refit: Moments of the values in a stream that projections compress at a ratio, that of the ranks, for recalkv's
            value calibration; None leaves it out.
    """
    arguments: dict = {"method": configuration.method, "joint": configuration.joint}
    arguments |= {"frame_length": configuration.frame, "layer_group_size": configuration.groups}
    projections = projections_from_moments(moments, **arguments)
    if refit is None or configuration.refit_ratio == 1:
        return projections
    refitted = refit(projections, configuration.refit_ratio)
    return projections_from_moments(moments, **arguments, refitted=refitted)


@dataclass(frozen=True)
class CacheSizes:
    """Settings of every LowRankCache of a measurement; the first is also that of other caches with a window."""

    residual_length: int = 128
    num_sink_tokens: int = 4
    block_size: int = 64

    def sizes(self) -> dict[str, int]:
        """Arguments of ``LowRankCache``."""
        return {field.name: getattr(self, field.name) for field in fields(CacheSizes)}


@dataclass(frozen=True)
class CacheEntry:
    """A cache by name, which can be made again and again."""

    name: str  # the specification
    make: Callable[..., Cache]  # a fresh cache; with False one that reconstructs keys and values
    latent_ratio: float | None  # full bytes per token at 16 bits over latent bytes per token; None for baselines
    projection_bytes: int  # of the truncated bases


def cache_entry(
    name: str, projections: Projections | None, options: dict[str, Any], model: PreTrainedModel, sizes: dict[str, Any]
) -> CacheEntry:
    """The entry of one configuration.

    Args:
        name: One of ``BASELINES``, where there are neither projections nor a method.
        options: Of ``LowRankCache``, ``sizes`` apart.
        sizes: See ``CacheSizes``.

    Raises:
        ValueError, NotImplementedError, ImportError: If its cache cannot be made, with its name.
    """

    def make(attend: bool = True) -> Cache:
        if projections is None and "method" not in options:
            return make_baseline(name, model, sizes["residual_length"])
        return LowRankCache(model, projections, attend="auto" if attend else "reconstruct", **sizes, **options)

    try:
        cache = make()
    except (ValueError, NotImplementedError, ImportError) as error:
        raise type(error)(f"cache {name!r} cannot be made: {error}") from error
    if not isinstance(cache, LowRankCache):
        return CacheEntry(name, make, None, 0)
    # Full bytes per token at 16 bits over latent bytes; of xkv, a group without channels is kept as it is.
    shape, full, stored = model_shape(model), 0, cache.latent_bytes_per_token()
    for group in cache.groups():
        width = sum(shape.layer(layer).side(side).width for layer, side in group.members)
        full += 2 * width
        stored += 2 * width if "method" in options and not group.tiers else 0
    return CacheEntry(name, make, full / stored, cache.projection_bytes())


def make_baseline(name: str, model: PreTrainedModel, residual_length: int) -> Cache:
    """A fresh cache by its name in ``BASELINES``.

    Raises:
        ValueError: If the name is unknown.
        ImportError: If the baseline's package is not installed.
    """
    kind, _, bits = name.partition("-")
    if name not in BASELINES:
        raise ValueError(f"cache must be one of {BASELINES}, got {name!r}")
    if kind == "full":
        return DynamicCache(config=model.config)
    if kind == "kivi":
        return SimulatedKiviCache(model, int(bits), residual_length)
    if bits == "fp8":
        return QuantizedCache("fp8", model.config)
    if find_spec("optimum") is None or find_spec("optimum.quanto") is None:
        raise ImportError(f'{name} needs optimum-quanto: pip install "lowrank-cache[quanto]"')
    return QuantizedCache("quanto", model.config, nbits=int(bits), residual_length=residual_length)


def tensor_bytes(cache: Cache) -> int:
    """Bytes of all tensors reachable from a cache, quantized tensor subclasses by their parts."""
    if hasattr(cache, "stored_bytes"):
        return cache.stored_bytes()
    tensors: dict[int, Tensor] = {}  # by identity, for layers may share them
    waiting: list = [vars(layer) for layer in cache.layers]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Tensor) and hasattr(part, "__tensor_flatten__"):
            waiting += [getattr(part, name) for name in part.__tensor_flatten__()[0]]
        elif isinstance(part, Tensor):
            tensors[id(part)] = part
        elif isinstance(part, dict | list | tuple):
            waiting += part.values() if isinstance(part, dict) else part
    return sum(tensor.nbytes for tensor in tensors.values())


class _KiviLayer(DynamicLayer):
    """Quantizes the oldest ``GROUP`` tokens of its window whenever they are complete."""

    GROUP = 32

    def __init__(self, bits: int, residual_length: int):
        super().__init__()
        self.bits, self.residual_length = bits, residual_length
        self.quantized = 0

    def update(self, key_states, value_states, *args, **kwargs):
        keys, values = super().update(key_states, value_states)
        while keys.shape[2] - self.quantized >= self.residual_length + self.GROUP:
            block = slice(self.quantized, self.quantized + self.GROUP)
            # Out of place: what this update returns must stay exact.
            self.keys, self.values = self.keys.clone(), self.values.clone()
            self.keys[:, :, block] = _asymmetric(keys[:, :, block], self.bits, axis=2)
            by_group = values[:, :, block].unflatten(3, (-1, self.GROUP))
            self.values[:, :, block] = _asymmetric(by_group, self.bits, axis=4).flatten(3)
            self.quantized += self.GROUP
        return keys, values


def _asymmetric(states: Tensor, bits: int, axis: int) -> Tensor:
    """``states`` after quantizing to ``2**bits`` levels between their least and largest along ``axis``."""
    wide = states.float()
    low, high = wide.amin(axis, keepdim=True), wide.amax(axis, keepdim=True)
    low = low.to(torch.float16).float()
    step = ((high - low) / (2**bits - 1)).to(torch.float16).float().clamp(min=1e-8)
    return (((wide - low) / step).round().clamp_(0, 2**bits - 1) * step + low).to(states.dtype)


class SimulatedKiviCache(Cache):
    """KIVI: keys by channel over 32 tokens, values by token over 32 channels, a window of recent tokens.

    Args:
        model: Must have full-attention layers and a head_dim divisible by 32.
        bits: 2 or 4.
        residual_length: Most recent tokens kept exactly.
    """

    def __init__(self, model: PreTrainedModel, bits: int, residual_length: int):
        self.kivi_layers = [_KiviLayer(bits, residual_length) for _ in range(model.config.num_hidden_layers)]
        super().__init__(layers=list(self.kivi_layers))

    def stored_bytes(self) -> int:
        """What KIVI would store: codes, float16 steps and offsets by 32, the window in the model's dtype."""
        total = 0.0
        for layer in self.kivi_layers:
            for states in (layer.keys, layer.values):
                if states is not None:
                    coded = layer.quantized * (layer.bits / 8 + 4 / layer.GROUP)
                    exact = (states.shape[2] - layer.quantized) * states.element_size()
                    total += states[:, :, 0].numel() * (coded + exact)
        return round(total)
