"""Palu: grouped whitened SVD of keys and values, ranks by Fisher information.

Whitening a projection ``W`` with its inputs and truncating its SVD minimises ``E|W h - L R h|²``; the
same minimum is reached by the principal components of the outputs ``x = W h``, which is what a
cache sees, so no weight is needed. Source: Palu (arXiv:2407.21118), G-LRD.
"""

import torch
from torch import Tensor

from lowrank_cache.artefact import integer
from lowrank_cache.basis import Basis
from lowrank_cache.calibration.api import Method
from lowrank_cache.calibration.fisher import unit_variance
from lowrank_cache.calibration.moments import Moments
from lowrank_cache.shapes import SIDES, Group, SideShape, head_rows


def head_groups(heads: int, size: int) -> list[tuple[int, ...]]:
    """Consecutive KV heads in groups of ``size``; the last group may be smaller."""
    return [tuple(range(start, min(start + size, heads))) for start in range(0, heads, size)]


def palu_bases(
    moments: Moments, groups: dict[str, list[Group]], frame_length: int, *, head_group_size: int
) -> list[Basis]:
    """One basis per group of ``head_group_size`` adjacent KV heads, keys and values alike."""
    bases = []
    for side in SIDES:
        for group in groups[side]:
            shape, statistics = moments.side(side, group), moments.of_group(side, group, frame_length)
            bases += principal_bases(side, group, shape, head_groups(shape.heads, head_group_size), statistics)
    return bases


def rank_weight(sensitivity: Tensor) -> float:
    """Share of a projection's numbers in the rank budget: the mean root of the Fisher information.

    Source: Palu, section 3.3. Differs: of the states rather than of the projection's weights, which a
    cache does not see. A projection's rank is split over its head groups by their widths.
    """
    return float(sensitivity.diagonal().sqrt().mean())


def principal_bases(
    side: str, group: Group, shape: SideShape, head_sets: list[tuple[int, ...]], statistics: tuple[Tensor, ...]
) -> list[Basis]:
    """Principal components of the states of each of ``head_sets``; ``statistics`` are those of ``Moments.of_group``."""
    second, mean, sensitivity = statistics
    weight, bases = rank_weight(sensitivity), []
    for heads in head_sets:
        rows = head_rows([shape] * len(group), heads)
        part, centre = second[rows][:, rows], mean[rows]
        _, components = torch.linalg.eigh(part)
        arrays = unit_variance(components, components.T, part, centre)
        bases.append(Basis(side, group, heads, **arrays, rank_weight=weight * len(rows)))
    return bases


def check_head_group_size(groups: dict[str, list[Group]], *, head_group_size: int) -> None:
    integer(head_group_size, "head_group_size", 1)


PALU = Method(palu_bases, {"head_group_size": 4}, check_head_group_size)
