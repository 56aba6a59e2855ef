"""Spend a byte budget: which latent channels are stored, and in how many bits, for every method.

Latents (of a layer group's keys, values or both) compete for one budget over the whole model. Methods whose channels
carry a predicted loss are served by ``spend``: each latent's channels are sorted by what losing them costs, so a choice
is four counts, how many channels get 16, 8, 4 and 2 bits; the rest get none. Methods that set ranks by projection
(Palu, xKV) share the budget by weight. Costs are bytes per token as they are really stored: padded to 16 bytes per
tier, and one float16 step per quantized tier. See docs/method.md, "Spending bits".
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise

import numpy as np

from lowrank_cache.basis import Basis
from lowrank_cache.kernels.packed import BIT_WIDTHS, ROW_BYTES, STEP_BYTES, tier_bytes
from lowrank_cache.shapes import BOTH, SIDES, Group, ModelShape

Ranks = int | Mapping[int, tuple[int, int]]
Tiers = tuple[tuple[int, int], ...]  # (bits, channels) of the tiers in use, most bits first, channels by importance

# Mean squared error of a unit-variance channel, by bits: kernels.packed.quantize on normal latents in
# tiers of 64 to 128 channels (tests/kernels/test_reference.py measures it). 16 bits are float16.
DISTORTION = {16: 1e-7, 8: 4e-5, 4: 0.0095, 2: 0.115, 0: 1.0}
_MAX_CHOICES = 300_000
_PROMPT_WEIGHTS = (1.0, 1.5)  # of key and value ranks of xKV, as in its paper


def tiers_loss(loss: np.ndarray, tiers: Tiers) -> float:
    """Predicted loss per token of storing these tiers of a latent and nothing else; ``loss`` as ``spend`` takes it."""
    counts = [channels for _, channels in tiers]
    factors = [DISTORTION[bits] for bits, _ in (*tiers, (0, 0))]
    return float(loss @ np.repeat(factors, [*counts, len(loss) - sum(counts)]))


@dataclass(frozen=True)
class GroupPlan:
    """What is stored of one latent, which consists of ``bases``.

    ``tiers`` are ``(bits, channels)``, most bits first; ``channels`` index the channels of ``bases`` laid end to end.
    """

    bases: tuple[Basis, ...]
    tiers: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's latents, padding and steps included, 16-bit tier at two bytes."""
        return sum(tier_bytes(bits, len(channels)) for bits, channels in self.tiers)

    @property
    def channels(self) -> list[int]:
        """The channels that are stored, in the order of the tiers."""
        return [channel for _, channels in self.tiers for channel in channels]

    def ranks(self) -> list[int]:
        """How many channels of each basis are stored: its first ones, whatever the method."""
        basis_of = np.repeat(np.arange(len(self.bases)), [basis.rank for basis in self.bases])
        return np.bincount(basis_of[self.channels], minlength=len(self.bases)).tolist()

    def predicted_loss(self) -> float:
        """Predicted loss per token, in nats, of storing these tiers and nothing else."""
        loss = _loss(self.bases)
        ordered = np.concatenate([loss[self.channels], np.delete(loss, self.channels)])
        return tiers_loss(ordered, tuple((bits, len(channels)) for bits, channels in self.tiers))


def full_bytes_per_token(shape: ModelShape) -> int:
    """Bytes of one token in all compressed layers of the full cache, at 16 bits a number."""
    return 2 * sum(layer.key.width + layer.value.width for layer in shape.layers)


def check_reachable(shape: ModelShape, compression_ratio: float, bits: int | None = None) -> None:
    """Raise ValueError if no bases of the model can reach the ratio: to be asked before they are calibrated."""
    full = full_bytes_per_token(shape)
    least = min(tier_bytes(width, 1) for width in (BIT_WIDTHS if bits is None else (bits,)))
    if full / compression_ratio < least:
        raise ValueError(_nothing_stored(compression_ratio, full, least))


def _nothing_stored(compression_ratio: float, full: int, least: int) -> str:
    return (
        f"compression_ratio {compression_ratio:g} leaves {full / compression_ratio:.1f} bytes per token, which stores "
        f"nothing; the largest reachable ratio is {math.floor(full / least * 100) / 100}"
    )


def plan_groups(
    groups: Sequence[tuple[Basis, ...]],
    shape: ModelShape,
    compression_ratio: float = 8.0,
    ranks: Ranks | None = None,
    bits: int | None = None,
    least_ratio: float = 1.0,
) -> list[GroupPlan]:
    """What is stored of each of ``groups``.

    Args:
        groups: The bases of a model by latent, channels sorted by predicted loss.
        shape: Of the model.
        compression_ratio, ranks: See ``LowRankCache``; the ratio is ignored if ``ranks`` are given.
        bits: One width for all kept channels; None lets the budget mix 16, 8, 4, 2 and 0 bits (16
            with ``ranks``, and for methods that set ranks by projection).
        least_ratio: The ratio for which the bases were truncated.

    Raises:
        ValueError: If an argument is out of range or the ratio cannot be reached.
        TypeError: If an argument has the wrong type.
    """
    _check(compression_ratio, ranks, bits, sorted({basis.layers[0] for bases in groups for basis in bases}))
    if ranks is not None:
        return [_uniform_plan(bases, [_rank_of(basis, ranks) for basis in bases], bits or 16) for bases in groups]
    if compression_ratio < least_ratio:
        raise ValueError(
            f"compression_ratio must be at least {least_ratio:g}, for which these projections were truncated, got "
            f"{compression_ratio:g}; load them at full rank"
        )
    full = full_bytes_per_token(shape)
    budget = full / compression_ratio
    if compression_ratio == 1:
        # Keep everything: the row padding of odd widths must not push a channel out.
        return [_uniform_plan(bases, [basis.rank for basis in bases], bits or 16) for bases in groups]
    if any(basis.rank_weight is not None for bases in groups for basis in bases):
        plans = _plan_by_weight(groups, budget, bits or 16)
    else:
        plans = _plan_by_loss(groups, budget, BIT_WIDTHS if bits is None else (bits,))
    if all(not plan.tiers for plan in plans):
        raise ValueError(_nothing_stored(compression_ratio, full, _least_bytes(groups, bits)))
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


def _check(compression_ratio: float, ranks: Ranks | None, bits: int | None, firsts: list[int]) -> None:
    """Raise unless each is in range; ``firsts`` are the groups' first layers, which a mapping ``ranks`` must name."""
    if bits is not None and (not isinstance(bits, int) or bits not in BIT_WIDTHS):
        raise ValueError(f"bits must be one of {BIT_WIDTHS} or None, got {bits!r}")
    if ranks is None:
        check_compression_ratio(compression_ratio)
    if ranks is None or (isinstance(ranks, int) and not isinstance(ranks, bool)):
        return
    if not isinstance(ranks, Mapping):
        raise TypeError(f"ranks must be an integer or a mapping {{layer: (key_rank, value_rank)}}, got {ranks!r}")
    if set(ranks) != set(firsts):
        raise ValueError(f"ranks must name the first layer of each layer group, {firsts}, got {list(ranks)}")
    for layer, pair in ranks.items():
        is_pair = isinstance(pair, tuple | list) and len(pair) == 2
        if not is_pair or any(not isinstance(rank, int) or isinstance(rank, bool) or rank < 0 for rank in pair):
            raise ValueError(
                f"ranks[{layer}] must be a pair (key_rank, value_rank) of integers of at least 0, got {pair!r}"
            )


def _within(rank: int, name: str, least: int, most: int) -> int:
    if not least <= rank <= most:
        raise ValueError(f"ranks of {name} must be {least} to {most}, got {rank!r}")
    return rank


def _rank_of(basis: Basis, ranks: Ranks) -> int:
    if isinstance(ranks, Mapping):
        pair = ranks[basis.layers[0]]
        rank = {"key": pair[0], "value": pair[1], BOTH: sum(pair)}[basis.side]
    else:
        rank = min(ranks, basis.rank)
    return _within(rank, basis.name, 0, basis.rank)


def _ranks_by_weight(
    weights: Sequence[float], caps: Sequence[int], fits: Callable[[list[int]], bool], *, whole: bool = False
) -> list[int]:
    """The largest ranks, at most ``caps``, that fit: ``weights`` times one factor (``whole`` or not), by bisection."""

    def ranks(factor: float) -> list[int]:
        return [min(cap, round(factor * weight)) for weight, cap in zip(weights, caps, strict=True)]

    low, high = 0.0, float(max(caps)) / min(weight for weight in weights if weight) + 1
    for _ in range(60):
        middle = (low + high) // 2 if whole else (low + high) / 2
        if fits(ranks(middle)):
            low = middle
        else:
            high = middle
    return ranks(low)


def _plan_by_weight(groups: Sequence[tuple[Basis, ...]], budget: float, bits: int) -> list[GroupPlan]:
    """Ranks in proportion to ``rank_weight``, capped at full rank, the excess shared again."""
    bases = [basis for group in groups for basis in group]

    def plans(kept: list[int]) -> list[GroupPlan]:
        rank = iter(kept)
        return [_uniform_plan(group, [next(rank) for _ in group], bits) for group in groups]

    def fits(kept: list[int]) -> bool:
        return sum(plan.bytes_per_token for plan in plans(kept)) <= budget

    return plans(_ranks_by_weight([basis.rank_weight or 0.0 for basis in bases], [b.rank for b in bases], fits))


def _least_bytes(groups: Sequence[tuple[Basis, ...]], bits: int | None) -> int:
    """Bytes per token of the smallest plan that stores anything."""
    weights = [basis.rank_weight for bases in groups for basis in bases if basis.rank_weight is not None]
    if not weights:
        return min(tier_bytes(width, 1) for width in (BIT_WIDTHS if bits is None else (bits,)))
    # By weight, the heaviest bases get their first channel, all at once.
    heaviest = max(weights)
    counts = [len([basis for basis in bases if basis.rank_weight == heaviest]) for bases in groups]
    return sum(tier_bytes(bits or 16, count) for count in counts)


def _loss(bases: tuple[Basis, ...]) -> np.ndarray:
    return np.concatenate([basis.loss.double().numpy() for basis in bases])


def _plan_by_loss(groups: Sequence[tuple[Basis, ...]], budget: float, levels: tuple[int, ...]) -> list[GroupPlan]:
    """A channel that is not stored is read as its mean, so dropping it costs its variance alone."""
    losses = [_loss(bases) for bases in groups]
    orders = [np.argsort(-loss, kind="stable") for loss in losses]
    plans = []
    chosen = spend([loss[order] for loss, order in zip(losses, orders, strict=True)], budget, levels)
    for bases, order, tiers in zip(groups, orders, chosen, strict=True):
        channels = iter(order.tolist())
        plans.append(GroupPlan(bases, tuple((bits, tuple(islice(channels, count))) for bits, count in tiers)))
    return plans


def _uniform_plan(bases: tuple[Basis, ...], kept: list[int], bits: int) -> GroupPlan:
    starts = accumulate((basis.rank for basis in bases), initial=0)
    channels = tuple(start + channel for start, rank in zip(starts, kept, strict=False) for channel in range(rank))
    return GroupPlan(bases, ((bits, channels),) if channels else ())


def prompt_ranks(
    shape: ModelShape,
    groups: Sequence[Group],
    compression_ratio: float = 8.0,
    ranks: Ranks | None = None,
    bits: int | None = None,
) -> list[tuple[int, int]]:
    """Key and value rank of each layer group of xKV, whose bases come from prompts; a rank of 0 keeps a side exactly.

    Without ``ranks``, each group gets its own layers' share of the bytes per token: the largest key rank with a
    value rank of one and a half times it, both at most the group's width. Values that are rotated (MLA models hand
    over their rotary key as values) stay exact, as in the paper, and take their bytes from the latents.
    Raises what ``plan_groups`` does.
    """
    _check(compression_ratio, ranks, bits, [group[0] for group in groups])
    chosen = []
    for group in groups:
        full = [shape.layer(group[0]).side(side).width * len(group) for side in SIDES]
        exact = [side == "value" and shape.layer(group[0]).side(side).rope is not None for side in SIDES]
        caps = [0 if kept else width for kept, width in zip(exact, full, strict=True)]
        if ranks is not None:
            pair = ranks[group[0]] if isinstance(ranks, Mapping) else [min(ranks, cap) for cap in caps]
            for side, rank, cap in zip(SIDES, pair, caps, strict=True):
                note = "" if cap else " (MLA's rotary key, kept exactly)"
                _within(rank, f"{side} states of layers {group}{note}", min(1, cap), cap)
        elif compression_ratio == 1:
            pair = caps
        else:
            pair = _prompt_pair(group, full, caps, compression_ratio, bits or 16)
        chosen.append((pair[0], pair[1]))
    return chosen


def _prompt_pair(group: Group, full: list[int], caps: list[int], compression_ratio: float, bits: int) -> list[int]:
    exact = 2 * sum(width for width, cap in zip(full, caps, strict=True) if not cap)
    budget = 2 * sum(full) / compression_ratio - exact

    def cost(pair: Sequence[int]) -> int:
        return sum(tier_bytes(bits, rank) for rank in pair)

    pair = _ranks_by_weight(_PROMPT_WEIGHTS, caps, lambda pair: cost(pair) <= budget, whole=True)
    if not any(pair):
        least = exact + cost([min(rank, cap) for rank, cap in zip((1, 2), caps, strict=True)])
        raise ValueError(
            f"compression_ratio {compression_ratio:g} leaves nothing to store for layers {group}; the largest "
            f"reachable ratio is {int(2 * sum(full) / least * 100) / 100}"
        )
    return pair


def spend(losses: Sequence[np.ndarray], budget: float, levels: tuple[int, ...] = BIT_WIDTHS) -> list[Tiers]:
    """Choose tiers for every latent so that the predicted loss is least within ``budget``.

    Each latent offers the lower convex hull of (bytes, loss) over all its choices; the steps of all
    hulls are taken in order of loss saved per byte, so a step that pays little is looked past in
    favour of a longer one that pays. What is left at the end buys the best single choices that fit.

    Args:
        losses: By latent ``[channels]``, non-increasing: predicted loss per token of not storing each channel, which
            quantizing it costs times ``DISTORTION``.
        budget: Bytes per token over all latents.
        levels: Bit widths that may be used.

    Returns:
        Tiers by latent, at most ``budget`` bytes in sum.
    """
    fronts = [_front(loss, levels) for loss in losses]
    hulls = [_lower_hull(sizes, least) for sizes, least, _ in fronts]
    chosen = [hull[0] for hull in hulls]
    remaining = budget
    steps = []
    for latent, ((sizes, least, _), hull) in enumerate(zip(fronts, hulls, strict=True)):
        for here, there in pairwise(hull):
            price = sizes[there] - sizes[here]
            steps.append(((least[there] - least[here]) / price, latent, there, price))
    stopped = set()
    for _, latent, there, price in sorted(steps):
        if latent in stopped or price > remaining:
            stopped.add(latent)  # later steps of this latent build on the one that did not fit
            continue
        chosen[latent], remaining = there, remaining - price
    _spend_rest(fronts, chosen, remaining)
    return [choices[at] for (_, _, choices), at in zip(fronts, chosen, strict=True)]


def _spend_rest(fronts: list, chosen: list[int], remaining: float) -> None:
    """While a choice fits that loses less, take the one that gains most."""
    while True:
        gains = []
        for latent, ((sizes, losses, _), here) in enumerate(zip(fronts, chosen, strict=True)):
            fits = np.flatnonzero((sizes <= sizes[here] + remaining) & (losses < losses[here]))
            if len(fits):
                there = int(fits[np.argmin(losses[fits])])
                gains.append((losses[here] - losses[there], -latent, there, sizes[there] - sizes[here]))
        if not gains:
            return
        _, latent, there, price = max(gains)
        chosen[-latent], remaining = there, remaining - price


def _front(loss: np.ndarray, levels: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, list[Tiers]]:
    """Choices of one latent that no cheaper choice beats: sizes (ascending), losses, tiers."""
    channels = len(loss)
    granules = {bits: ROW_BYTES * 8 // bits for bits in BIT_WIDTHS if bits in levels}
    strides = dict(granules)

    def options(bits: int) -> np.ndarray:
        return np.minimum(np.arange(0, channels + strides[bits], strides[bits]), channels)

    while math.prod(len(options(bits)) for bits in granules) > _MAX_CHOICES:
        strides[max(granules, key=lambda bits: len(options(bits)))] *= 2
    grid = np.stack(np.meshgrid(*map(options, granules), indexing="ij"), -1).reshape(-1, len(granules))
    ends = np.minimum(grid.cumsum(1), channels)
    counts = np.diff(ends, axis=1, prepend=0)
    summed = np.concatenate([[0.0], np.cumsum(loss)])
    held = np.diff(summed[ends], axis=1, prepend=0.0)  # loss of what each tier takes
    losses, sizes = summed[-1] - summed[ends[:, -1]], np.zeros(len(counts), dtype=np.int64)
    for column, bits in enumerate(granules):
        losses = losses + DISTORTION[bits] * held[:, column]
        rows = -(-counts[:, column] // granules[bits])
        sizes += rows * ROW_BYTES + np.where((rows > 0) & (bits < 16), STEP_BYTES, 0)
    order = np.lexsort((losses, sizes))
    sizes, losses, counts = sizes[order], losses[order], counts[order]
    best_before = np.minimum.accumulate(np.concatenate([[np.inf], losses[:-1]]))
    keep = losses < best_before
    choices = [
        tuple((bits, int(count)) for bits, count in zip(granules, choice, strict=True) if count)
        for choice in counts[keep]
    ]
    return sizes[keep], losses[keep], choices


def _lower_hull(sizes: np.ndarray, losses: np.ndarray) -> list[int]:
    """Indices of the lower convex hull of points sorted by size, starting at the first."""
    hull: list[int] = []
    for point in range(len(sizes)):
        while len(hull) >= 2:
            first, second = hull[-2], hull[-1]
            slope = (losses[second] - losses[first]) / (sizes[second] - sizes[first])
            if losses[point] > losses[first] + slope * (sizes[point] - sizes[first]):
                break
            hull.pop()
        hull.append(point)
    return hull
