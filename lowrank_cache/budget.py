"""Spend a byte budget on latent channels: which channels are stored, and in how many bits.

Stores (a layer group's keys, values or both) compete for one budget over the whole model. Each store's
channels are sorted by what losing them costs, so a choice is four counts: how many channels get 16,
8, 4 and 2 bits; the rest get none. Costs are bytes per token as they are really stored: rows padded
to 16 bytes per tier, and one float16 step per quantized tier. See docs/method.md, "Spending bits".
"""

from dataclasses import dataclass

import numpy as np

from lowrank_cache.kernels.packed import ROW_BYTES, padded_channels

__all__ = ["DISTORTION", "ChannelCosts", "TierCounts", "spend", "tier_bytes"]

# Mean squared error of a unit-variance channel, by bits: kernels.reference.quantize on normal latents in
# tiers of 64 to 128 channels (tests/kernels/test_reference.py measures it). 16 bits are float16.
DISTORTION = {16: 1e-7, 8: 4e-5, 4: 0.0095, 2: 0.115, 0: 1.0}
STEP_BYTES = 2  # one float16 step per token and quantized tier
_MAX_CHOICES = 300_000


@dataclass(frozen=True)
class TierCounts:
    """How many of a store's channels, in order of importance, get 16, 8, 4 and 2 bits."""

    bits16: int = 0
    bits8: int = 0
    bits4: int = 0
    bits2: int = 0

    def items(self) -> list[tuple[int, int]]:
        """``(bits, channels)`` of the tiers in use, most bits first."""
        tiers = [(16, self.bits16), (8, self.bits8), (4, self.bits4), (2, self.bits2)]
        return [(bits, channels) for bits, channels in tiers if channels]

    @property
    def channels(self) -> int:
        return self.bits16 + self.bits8 + self.bits4 + self.bits2

    @property
    def bytes_per_token(self) -> int:
        return sum(tier_bytes(bits, channels) for bits, channels in self.items())


@dataclass(frozen=True)
class ChannelCosts:
    """What a store's channels cost to lose, for one token, in order of importance.

    Attributes:
        variance: ``[channels]``, non-increasing: loss per unit of squared error, times variance.
        dropped: ``[channels]``: loss of not storing the channel at all.
    """

    variance: np.ndarray
    dropped: np.ndarray

    def loss(self, counts: TierCounts) -> float:
        """Predicted loss per token of storing these tiers."""
        loss, start = 0.0, 0
        for bits, channels in counts.items():
            loss += DISTORTION[bits] * float(self.variance[start : start + channels].sum())
            start += channels
        return loss + float(self.dropped[start:].sum())


def tier_bytes(bits: int, channels: int) -> int:
    """Bytes per token of a tier, padding and step included."""
    if channels == 0:
        return 0
    return padded_channels(bits, channels) * bits // 8 + (STEP_BYTES if bits < 16 else 0)


def spend(costs: list[ChannelCosts], budget: float, levels: tuple[int, ...] = (16, 8, 4, 2)) -> list[TierCounts]:
    """Choose tiers for every store so that the predicted loss is least within ``budget``.

    Each store offers the lower convex hull of (bytes, loss) over all its choices; the steps of all
    hulls are taken in order of loss saved per byte, so a step that pays little is looked past in
    favour of a longer one that pays. What is left at the end buys the best single choices that fit.

    Args:
        costs: One entry per store.
        budget: Bytes per token over all stores.
        levels: Bit widths that may be used.

    Returns:
        One ``TierCounts`` per store, at most ``budget`` bytes in sum.
    """
    fronts = [_front(cost, levels) for cost in costs]
    hulls = [_lower_hull(sizes, losses) for sizes, losses, _ in fronts]
    position = [0] * len(costs)  # index into the hull
    remaining = budget
    steps = []
    for store, ((sizes, losses, _), hull) in enumerate(zip(fronts, hulls, strict=True)):
        for step, (here, there) in enumerate(zip(hull[:-1], hull[1:], strict=True)):
            price = sizes[there] - sizes[here]
            steps.append(((losses[here] - losses[there]) / price, store, step, price))
    stopped = set()
    for _, store, step, price in sorted(steps, key=lambda entry: (-entry[0], entry[1], entry[2])):
        if store in stopped or price > remaining:
            stopped.add(store)  # later steps of this store build on the one that did not fit
            continue
        position[store] = step + 1
        remaining -= price
    chosen = [hull[at] for hull, at in zip(hulls, position, strict=True)]
    _spend_rest(fronts, chosen, remaining)
    return [choices[at] for (_, _, choices), at in zip(fronts, chosen, strict=True)]


def _spend_rest(fronts: list, chosen: list[int], remaining: float) -> None:
    while True:
        best = (0.0, -1, -1)
        for store, (sizes, losses, _) in enumerate(fronts):
            here = chosen[store]
            fits = np.flatnonzero((sizes <= sizes[here] + remaining) & (losses < losses[here]))
            if len(fits):
                there = fits[np.argmin(losses[fits])]
                gain = float(losses[here] - losses[there])
                if gain > best[0]:
                    best = (gain, store, int(there))
        if best[1] < 0:
            return
        _, store, there = best
        remaining -= fronts[store][0][there] - fronts[store][0][chosen[store]]
        chosen[store] = there


def _front(cost: ChannelCosts, levels: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, list[TierCounts]]:
    """Choices of one store that no cheaper choice beats: sizes (ascending), losses, counts."""
    channels = len(cost.variance)
    granules = {bits: ROW_BYTES * 8 // bits for bits in (16, 8, 4, 2)}
    stride = {bits: 1 for bits in granules}

    def options(bits: int) -> np.ndarray:
        if bits not in levels:
            return np.zeros(1, dtype=np.int64)
        return np.minimum(
            np.arange(0, channels + granules[bits] * stride[bits], granules[bits] * stride[bits]), channels
        )

    while np.prod([float(len(options(bits))) for bits in granules]) > _MAX_CHOICES:
        finest = max((bits for bits in granules if bits in levels), key=lambda bits: len(options(bits)))
        stride[finest] *= 2
    grid = np.stack(np.meshgrid(*(options(bits) for bits in granules), indexing="ij"), -1).reshape(-1, 4)
    edges = np.minimum(grid.cumsum(1), channels)
    counts = np.diff(edges, axis=1, prepend=0)
    variance = np.concatenate([[0.0], np.cumsum(cost.variance)])
    dropped = np.concatenate([[0.0], np.cumsum(cost.dropped)])
    losses = dropped[-1] - dropped[edges[:, -1]]
    sizes = np.zeros(len(counts), dtype=np.int64)
    start = np.zeros(len(counts), dtype=np.int64)
    for column, bits in enumerate(granules):
        end = edges[:, column]
        losses = losses + DISTORTION[bits] * (variance[end] - variance[start])
        used = counts[:, column]
        padded = -(-used // granules[bits]) * granules[bits]
        sizes += padded * bits // 8 + np.where((used > 0) & (bits < 16), STEP_BYTES, 0)
        start = end
    order = np.lexsort((losses, sizes))
    sizes, losses, counts = sizes[order], losses[order], counts[order]
    best_before = np.minimum.accumulate(np.concatenate([[np.inf], losses[:-1]]))
    keep = losses < best_before
    keep[0] = True
    choices = [TierCounts(*map(int, row)) for row in counts[keep]]
    return sizes[keep], losses[keep], choices


def _lower_hull(sizes: np.ndarray, losses: np.ndarray) -> list[int]:
    """Indices of the lower convex hull of points sorted by size, starting at the first."""
    hull: list[int] = []
    for point in range(len(sizes)):
        while len(hull) >= 2:
            first, second = hull[-2], hull[-1]
            slope = (losses[second] - losses[first]) / (sizes[second] - sizes[first])
            if losses[point] <= losses[first] + slope * (sizes[point] - sizes[first]):
                hull.pop()
            else:
                break
        hull.append(point)
    return hull
