"""Intervals of mean paired differences by the bootstrap, with a fixed seed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Interval", "paired_interval"]


@dataclass(frozen=True)
class Interval:
    """A mean and the ends of its interval; all three are equal where nothing differs."""

    mean: float
    low: float
    high: float


def paired_interval(
    differences: Sequence[Sequence[float]], *, level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> Interval:
    """The percentile interval of a mean over samples, of which ``differences`` to the baseline are given.

    Args:
        differences: One list for each stratum (task, length, ...), one number a sample. Samples are drawn again within
            their stratum, and the means of the strata are averaged.
        level: Share of the draws' means within the interval.
        draws: Of the bootstrap.

    Raises:
        ValueError: If there are no samples in a stratum, or no strata.

    Source: Efron (1979). With fewer than about ten samples a percentile interval is too short.
    """
    if not differences or not all(len(stratum) for stratum in differences):
        raise ValueError(f"differences must have samples in each stratum, got {[len(part) for part in differences]}")
    generator = np.random.default_rng(seed)
    means = np.zeros(draws)
    centre = 0.0
    for stratum in differences:
        values = np.asarray(stratum, dtype=np.float64)
        drawn = generator.integers(len(values), size=(draws, len(values)))
        means += values[drawn].mean(1) / len(differences)
        centre += float(values.mean()) / len(differences)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(centre, float(low), float(high))
