"""Caches by specification, as the command line takes them: ``fisher:8,groups=1,frame=64``, ``xkv:8``, ``full``.

The name of a table's entry is its specification, so it says what was measured. ``BASELINES`` are transformers' own
caches as they are; docs/experiments/kivi.py adds to them.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from importlib.util import find_spec
from typing import Annotated, Any

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, QuantizedCache
from typer import Option

from lowrank_cache import LowRankCache, Projections
from lowrank_cache.calibration.api import METHODS, projections_from_moments
from lowrank_cache.calibration.moments import Moments
from lowrank_cache.kernels.packed import BIT_WIDTHS
from lowrank_cache.probe import model_shape
from lowrank_cache.prompt_svd import NEW_TOKENS

GRAMMAR = "METHOD:RATIO[,groups=G][,frame=L][,joint=0|1][,bits=B][,ranks=R], with xkv also [,new=encode|exact]"
XKV = "xkv"  # the one method that needs no calibration
_OPTIONS: dict[str, Callable[[str], Any]] = {
    "groups": lambda value: value if value == "auto" else int(value), "frame": int, "bits": int, "ranks": int,
    "joint": {"0": False, "1": True}.__getitem__, "new": {name: name for name in NEW_TOKENS}.__getitem__,
}  # fmt: skip


def _quanto(model: PreTrainedModel, residual_length: int, bits: int) -> Cache:
    if find_spec("optimum") is None or find_spec("optimum.quanto") is None:
        raise ImportError(f'quantized-{bits} needs optimum-quanto: pip install "lowrank-cache[quanto]"')
    return QuantizedCache("quanto", model.config, nbits=bits, residual_length=residual_length)


BASELINES: dict[str, Callable[[PreTrainedModel, int], Cache]] = {
    "full": lambda model, residual_length: DynamicCache(config=model.config),
    "quantized-fp8": lambda model, residual_length: QuantizedCache("fp8", model.config),
    "quantized-4": partial(_quanto, bits=4),
    "quantized-2": partial(_quanto, bits=2),
}


@dataclass(frozen=True)
class Configuration:
    """A compressed cache: how its bases are made, and the arguments of ``LowRankCache``."""

    method: str  # of calibration, or ``"xkv"``
    compression_ratio: float  # of the cache; ranks replace the ratio
    groups: int | str = "auto"  # ``layer_group_size``: ``"auto"`` (4 for xkv) or a number
    frame: int | None = None  # ``frame_length``; None for the method's default
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
        return f"{self.method},groups={self.groups},frame={self.frame or 'auto'},joint={joint}{refit}"

    def calibration(self) -> dict[str, Any]:
        """Arguments of ``projections_from_moments``."""
        return {
            "method": self.method,
            "joint": self.joint,
            "frame_length": self.frame,
            "layer_group_size": self.groups,
        }

    def options(self) -> dict[str, Any]:
        """Arguments of ``LowRankCache`` beside model, projections and sizes."""
        found: dict[str, Any] = {name: getattr(self, name) for name in ("compression_ratio", "bits", "ranks")}
        if self.method not in METHODS:
            size = 4 if self.groups == "auto" else self.groups
            found |= {"method": XKV, "layer_group_size": size, "new_tokens": self.new}
        return found


def parse(specification: str) -> Configuration | None:
    """A configuration, which is written as in ``GRAMMAR``, or None if ``specification`` names a baseline.

    A ValueError says what can be written if it cannot be read.
    """
    if specification in BASELINES:
        return None
    head, *options = specification.split(",")
    method, _, ratio = head.partition(":")
    try:
        if method not in (*METHODS, XKV):
            raise ValueError
        found = {name: _OPTIONS[name](value) for name, _, value in (option.partition("=") for option in options)}
        configuration = Configuration(method, float(ratio), **found)
        if configuration.new is not None and method in METHODS:
            raise ValueError
    except (ValueError, KeyError):
        raise ValueError(
            f"cache must be one of {list(BASELINES)} or {GRAMMAR}, with a method of {sorted((*METHODS, XKV))}, got "
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
        refit: Gives moments of the values in a stream that projections compress at a ratio, that of the ranks, for
            recalkv's value calibration; None leaves it out.
    """
    options = configuration.calibration()
    made = projections_from_moments(moments, **options)
    if refit is None or configuration.refit_ratio == 1:
        return made
    return projections_from_moments(moments, **options, refitted=refit(made, configuration.refit_ratio))


@dataclass(frozen=True)
class CacheSizes:
    """Settings of every LowRankCache of a measurement; the first is also that of other caches with a window."""

    residual_length: Annotated[int, Option(help="Recent tokens that a cache keeps exactly.")] = 128
    num_sink_tokens: int = 4
    block_size: Annotated[int, Option(help="Tokens that a cache encodes at once.")] = 64

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
    """The entry of one configuration: of ``BASELINES``, where there are neither projections nor a method.

    ``options`` and ``sizes`` (see ``CacheSizes``) are arguments of ``LowRankCache``. A ValueError, NotImplementedError
    or ImportError in making the cache is raised again with its name.
    """

    def make(attend: bool = True) -> Cache:
        if projections is None and "method" not in options:
            return BASELINES[name](model, sizes["residual_length"])
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
