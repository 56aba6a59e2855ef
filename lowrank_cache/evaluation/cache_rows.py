"""One row of a table: a named cache that can be made again and again, compressed or a baseline."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

from transformers import Cache, PreTrainedModel

from lowrank_cache import LowRankCache, Projections, latent_attention
from lowrank_cache.budget import tier_bytes
from lowrank_cache.evaluation.baselines import BASELINES, make_baseline
from lowrank_cache.evaluation.remembered import RememberingCache
from lowrank_cache.prompt_svd import PromptStore

__all__ = ["CacheRow", "CacheSizes", "cache_row"]


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
class CacheRow:
    """A cache by name.

    Attributes:
        name: Of the configuration.
        make: A fresh cache, as users get it.
        make_remembering: A fresh cache with the same contents that reads faster and takes more memory, see
            ``remembered``; for baselines the same as ``make``.
        latent_ratio: Full bytes per token at 16 bits over latent bytes per token; None for baselines.
        projection_bytes: Of the truncated bases.
    """

    name: str
    make: Callable[[], Cache]
    make_remembering: Callable[[], Cache]
    latent_ratio: float | None
    projection_bytes: int

    def maker(self, attend: bool) -> Callable[[], Cache]:
        """How measurements make the cache: one that attends to latents reads nothing that it could remember."""
        return self.make if attend else self.make_remembering

    def attention(self, model: PreTrainedModel, attend: bool) -> AbstractContextManager:
        """What to measure in: ``latent_attention`` if asked of a cache that holds latents."""
        return latent_attention(model) if attend and self.latent_ratio is not None else nullcontext()


def cache_row(
    name: str, projections: Projections | None, options: dict[str, Any], model: PreTrainedModel, sizes: dict[str, Any]
) -> CacheRow:
    """The row of one configuration; fails here, before anything is measured, if its cache cannot be made.

    Args:
        name: One of ``BASELINES``, where there are neither projections nor a method.
        options: Of ``LowRankCache``, ``sizes`` apart.
        sizes: ``residual_length``, of baselines too, ``num_sink_tokens`` and ``block_size``.

    Raises:
        ValueError: If the arguments make no cache.
        ImportError: If the baseline's package is not installed.
    """
    if projections is None and "method" not in options:
        if name not in BASELINES:
            raise ValueError(f"configuration {name!r} has no projections and is no baseline of {BASELINES}")
        make_baseline(name, model, sizes["residual_length"])

        def make() -> Cache:
            return make_baseline(name, model, sizes["residual_length"])

        return CacheRow(name, make, make, None, 0)
    cache = LowRankCache(model, projections, **sizes, **options)
    return CacheRow(
        name,
        lambda: LowRankCache(model, projections, **sizes, **options),
        lambda: RememberingCache(model, projections, **sizes, **options),
        _latent_ratio(cache),
        cache.projection_bytes(),
    )


def _latent_ratio(cache: LowRankCache) -> float:
    """Full bytes per token at 16 bits over latent bytes per token; what xkv keeps exactly counts as it is."""
    full = latents = 0
    for store in cache._stores:
        width = 2 * sum(shape.width for shape in store.coder.shapes)
        full += width
        exact = isinstance(store, PromptStore) and store.coder.rank == 0
        latents += width if exact else sum(tier_bytes(bits, channels) for bits, channels in store.coder.tiers)
    return full / latents
