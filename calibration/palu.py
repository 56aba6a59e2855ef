"""Palu: grouped whitened SVD of keys and values, ranks by Fisher information.

Whitening a projection ``W`` with its inputs and truncating its SVD minimises ``E|W h - L R h|²``; the
same minimum is reached by the principal components of the outputs ``x = W h``, which is what a
cache sees, so no weight is needed. Source: Palu (arXiv:2407.21118), G-LRD.
"""

import torch

from lowrank_cache.calibration.fisher import unit_variance
from lowrank_cache.calibration.moments import Group, Moments
from lowrank_cache.projections import Basis

__all__ = ["head_groups", "palu_bases"]


def head_groups(heads: int, size: int) -> list[tuple[int, ...]]:
    """Consecutive KV heads in groups of ``size``; the last group may be smaller."""
    return [tuple(range(start, min(start + size, heads))) for start in range(0, heads, size)]


def palu_bases(
    moments: Moments, groups: dict[str, list[Group]], frame_length: int, head_group_size: int = 4
) -> list[Basis]:
    """One basis per head group, keys and values alike.

    Rank weights follow Palu's: proportional to the mean root of the Fisher information, here of the
    states rather than of the projection weights, which a cache does not see.
    """
    bases = []
    for side in ("key", "value"):
        for group in groups[side]:
            second, mean, sensitivity = moments.of_group(side, group, frame_length)
            shape = moments.side(side, group)
            for heads in head_groups(shape.heads, head_group_size):
                rows = [
                    (member * shape.heads + head) * shape.head_dim + number
                    for member in range(len(group))
                    for head in heads
                    for number in range(shape.head_dim)
                ]
                block = second[rows][:, rows]
                _, components = torch.linalg.eigh(block)
                arrays = unit_variance(components, components.T, block, mean[rows])
                weight = float(sensitivity.diagonal()[rows].sqrt().mean()) * len(rows)
                bases.append(Basis(side, group, heads, **arrays, rank_weight=weight))
    return bases
