"""Turn a compression ratio, ranks or uniform bits into the tiers of every store.

This is where a method's bases meet a byte budget: methods whose channels carry a predicted loss are
allocated by ``budget.spend``; methods with a rank weight per basis (Palu) by that weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowrank_cache.budget import ChannelCosts, TierCounts, spend, tier_bytes
from lowrank_cache.models import BOTH

if TYPE_CHECKING:  # projections imports this module to truncate itself
    from lowrank_cache.projections import Basis, Projections

__all__ = ["BIT_WIDTHS", "Ranks", "StorePlan", "check_compression_ratio", "full_bytes_per_token", "plan_stores"]

BIT_WIDTHS = (16, 8, 4, 2)
Ranks = int | Mapping[int, tuple[int, int]]


@dataclass(frozen=True)
class StorePlan:
    """What one store keeps: ``tiers`` of ``(bits, channels)``, most bits first.

    ``channels`` index the channels of the store's bases laid end to end.
    """

    tiers: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's latents, padding and steps included, 16-bit tier at two bytes."""
        return sum(tier_bytes(bits, len(channels)) for bits, channels in self.tiers)


def full_bytes_per_token(projections: Projections) -> int:
    """Bytes of one token in all compressed layers of the full cache, at 16 bits a number."""
    return 2 * sum(layer.key.width + layer.value.width for layer in projections.shape.layers)


def plan_stores(
    projections: Projections,
    compression_ratio: float = 8.0,
    ranks: Ranks | None = None,
    bits: int | None = None,
) -> list[StorePlan]:
    """One plan per entry of ``projections.stores()``.

    Args:
        projections: The bases, channels sorted by predicted loss.
        compression_ratio: Full bytes per token over latent bytes per token, at least 1. Ignored if
            ``ranks`` is given.
        ranks: Channels to keep: for every basis alike, or ``{layer: (key_rank, value_rank)}`` naming
            the first layer of each layer group; keys and values in one latent keep the sum of both.
        bits: One width for all kept channels; None lets the budget mix 16, 8, 4, 2 and 0 bits (16
            with ``ranks``, and for methods that set ranks by projection).

    Raises:
        ValueError: If an argument is out of range or the ratio cannot be reached.
    """
    if bits is not None and (not isinstance(bits, int) or bits not in BIT_WIDTHS):
        raise ValueError(f"bits must be one of {BIT_WIDTHS} or None, got {bits!r}")
    stores = projections.stores()
    if ranks is not None:
        _check_ranks(projections, ranks)
        chosen = [[_rank_of(basis, ranks) for basis in store] for store in stores]
        return [_uniform_plan(store, kept, bits or 16) for store, kept in zip(stores, chosen, strict=True)]
    check_compression_ratio(compression_ratio)
    if compression_ratio < projections.min_compression_ratio:
        raise ValueError(
            f"compression_ratio must be at least {projections.min_compression_ratio:g}, for which these projections "
            f"were truncated, got {compression_ratio:g}; load them at full rank"
        )
    budget = full_bytes_per_token(projections) / compression_ratio
    if compression_ratio == 1:
        # Keep everything: the row padding of odd widths must not push a channel out.
        return [_uniform_plan(store, [basis.rank for basis in store], bits or 16) for store in stores]
    if any(basis.rank_weight is not None for basis in projections.bases):
        plans = _plan_by_weight(stores, budget, bits or 16)
    else:
        levels = BIT_WIDTHS if bits is None else (bits,)
        counts = spend([_costs(store) for store in stores], budget, levels)
        plans = [_loss_plan(store, count) for store, count in zip(stores, counts, strict=True)]
    if all(not plan.tiers for plan in plans):
        reachable = full_bytes_per_token(projections) / _least_bytes(stores, bits)
        raise ValueError(
            f"compression_ratio {compression_ratio:g} leaves {budget:.1f} bytes per token, which stores nothing; "
            f"the largest reachable ratio is {math.floor(reachable * 100) / 100}"
        )
    return plans


def check_compression_ratio(compression_ratio: float) -> None:
    """Raise unless it is a number of at least 1; a fraction removed is recognised."""
    if not isinstance(compression_ratio, int | float) or isinstance(compression_ratio, bool):
        raise TypeError(f"compression_ratio must be a number, got {compression_ratio!r}")
    if not compression_ratio >= 1:
        hint = ""
        if 0 < compression_ratio < 1:
            hint = f"; if this is a fraction removed (kvpress's convention), pass {1 / (1 - compression_ratio):.3g}"
        raise ValueError(f"compression_ratio must be at least 1, got {compression_ratio}{hint}")


def _least_bytes(stores: list[tuple[Basis, ...]], bits: int | None) -> int:
    """Bytes per token of the smallest plan that stores anything."""
    weights = [basis.rank_weight for store in stores for basis in store if basis.rank_weight is not None]
    if not weights:
        return min(tier_bytes(width, 1) for width in (BIT_WIDTHS if bits is None else (bits,)))
    # By weight, the heaviest bases get their first channel, all at once.
    heaviest = max(weights)
    counts = [len([basis for basis in store if basis.rank_weight == heaviest]) for store in stores]
    return sum(tier_bytes(bits or 16, count) for count in counts)


def predicted_loss(store: tuple[Basis, ...], plan: StorePlan) -> float:
    """Predicted loss per token, in nats, of storing ``plan``'s tiers and nothing else."""
    ordered = _sorted_channels(store)
    loss = torch.cat([basis.loss for basis in store]).double()
    by_bits = {bits: len(channels) for bits, channels in plan.tiers}
    kept = [channel for _, channels in plan.tiers for channel in channels]
    rest = sorted(set(ordered.tolist()) - set(kept), key=lambda channel: -float(loss[channel]))
    variance = loss[torch.tensor(kept + rest, dtype=torch.long)].numpy()
    return ChannelCosts(variance, variance).loss(
        TierCounts(by_bits.get(16, 0), by_bits.get(8, 0), by_bits.get(4, 0), by_bits.get(2, 0))
    )


def _sorted_channels(store: tuple[Basis, ...]) -> Tensor:
    return torch.cat([basis.loss for basis in store]).argsort(descending=True, stable=True)


def _costs(store: tuple[Basis, ...]) -> ChannelCosts:
    # A channel that is not stored is read as its mean, so dropping it costs its variance alone.
    loss = torch.cat([basis.loss for basis in store])[_sorted_channels(store)].double().numpy()
    return ChannelCosts(variance=loss, dropped=loss)


def _loss_plan(store: tuple[Basis, ...], counts: TierCounts) -> StorePlan:
    channels = _sorted_channels(store).tolist()
    tiers, start = [], 0
    for bits, count in counts.items():
        tiers.append((bits, tuple(channels[start : start + count])))
        start += count
    return StorePlan(tuple(tiers))


def _uniform_plan(store: tuple[Basis, ...], kept: list[int], bits: int) -> StorePlan:
    channels: list[int] = []
    start = 0
    for basis, rank in zip(store, kept, strict=True):
        channels.extend(range(start, start + rank))
        start += basis.rank
    return StorePlan(((bits, tuple(channels)),) if channels else ())


def _plan_by_weight(stores: list[tuple[Basis, ...]], budget: float, bits: int) -> list[StorePlan]:
    """Ranks in proportion to ``rank_weight``, capped at full rank, the excess shared again."""
    bases = [basis for store in stores for basis in store]
    caps = [basis.rank for basis in bases]
    # What a basis' share buys, by bisection on the common factor, with padded rows and steps counted.
    weights = [basis.rank_weight or 0.0 for basis in bases]
    low, high = 0.0, float(max(caps)) / min(weight for weight in weights if weight) + 1

    def plans(factor: float) -> list[StorePlan]:
        kept = iter([min(cap, round(factor * weight)) for weight, cap in zip(weights, caps, strict=True)])
        return [_uniform_plan(store, [next(kept) for _ in store], bits) for store in stores]

    for _ in range(60):
        middle = (low + high) / 2
        if sum(plan.bytes_per_token for plan in plans(middle)) <= budget:
            low = middle
        else:
            high = middle
    return plans(low)


def _check_ranks(projections: Projections, ranks: Ranks) -> None:
    if isinstance(ranks, int) and not isinstance(ranks, bool):
        return
    if not isinstance(ranks, Mapping):
        raise TypeError(f"ranks must be an integer or a mapping {{layer: (key_rank, value_rank)}}, got {ranks!r}")
    expected = sorted({basis.layers[0] for basis in projections.bases})
    if set(ranks) != set(expected):
        raise ValueError(f"ranks must name the first layer of each layer group, {expected}, got {list(ranks)}")
    for layer, pair in ranks.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(f"ranks[{layer}] must be a pair (key_rank, value_rank), got {pair!r}")
        if any(not isinstance(rank, int) or isinstance(rank, bool) or rank < 0 for rank in pair):
            raise ValueError(f"ranks[{layer}] must be a pair of integers of at least 0, got {pair!r}")


def _rank_of(basis: Basis, ranks: Ranks) -> int:
    if isinstance(ranks, Mapping):
        pair = ranks[basis.layers[0]]
        rank = {"key": pair[0], "value": pair[1], BOTH: sum(pair)}[basis.side]
    else:
        rank = min(ranks, basis.rank)
    if not isinstance(rank, int) or not 0 <= rank <= basis.rank:
        raise ValueError(f"ranks: {basis.name} allows ranks 0 to {basis.rank}, got {rank!r}")
    return rank
