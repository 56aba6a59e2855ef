"""ReCalKV: keys in groups of similar heads, values over all heads with offline calibration.

Keys: head-wise similarity-aware reordering (HSR) puts KV heads whose states are alike into one
group; each group has a whitened SVD. A ``Basis`` names its heads, so the order is part of the bases
and nothing is permuted at run time. Values: one SVD over all heads of a layer; offline value calibration
(OVC) fits it to the values of the stream that is already compressed. Ranks of keys and values
share one budget by Fisher information. Source: ReCalKV (arXiv:2505.24357). Mathematics and what differs
from its released code: docs/method.md, "ReCalKV".
"""

from itertools import combinations

import torch
from torch import Tensor

from lowrank_cache.basis import Basis
from lowrank_cache.calibration.api import Method
from lowrank_cache.calibration.moments import Moments
from lowrank_cache.calibration.palu import check_head_group_size, head_groups, principal_bases
from lowrank_cache.shapes import Group


def recalkv_bases(
    moments: Moments,
    groups: dict[str, list[Group]],
    frame_length: int,
    *,
    head_group_size: int,
    reorder: bool,
    refitted: Moments | None = None,
) -> list[Basis]:
    """One basis per group of similar key heads, and one per layer for values. See ``calibrate`` for the options.

    ``refitted`` are moments of the values that the compressed stream produces (OVC); None: those of ``moments``.
    """
    bases = []
    for group in groups["key"]:
        shape, statistics = moments.side("key", group), moments.of_group("key", group, frame_length)
        if reorder:
            head_sets = group_similar_heads(head_similarity(*statistics[:2], shape.heads), head_group_size)
        else:
            head_sets = head_groups(shape.heads, head_group_size)
        bases += principal_bases("key", group, shape, head_sets, statistics)
    for group in groups["value"]:
        shape, sensitivity = moments.side("value", group), moments.of_group("value", group, frame_length)[2]
        second, mean, _ = (refitted or moments).of_group("value", group, frame_length)
        all_heads = [tuple(range(shape.heads))]
        bases += principal_bases("value", group, shape, all_heads, (second, mean, sensitivity))
    return bases


def head_similarity(second: Tensor, mean: Tensor, heads: int) -> Tensor:
    """Linear centred kernel alignment of every pair of heads, ``[heads, heads]``, in [0, 1].

    For centred states ``A_i`` ``[tokens, head_dim]`` of head ``i`` it is ``|A_iᵀ A_j|² / (|A_iᵀ A_i| |A_jᵀ
    A_j|)`` in Frobenius norms: blocks of the covariance suffice, tokens × tokens kernels are never formed.
    ``second`` ``[width, width]`` and ``mean`` are the moments of all heads' states.
    """
    covariance = second - torch.outer(mean, mean)
    head_dim = len(mean) // heads
    norms = covariance.view(heads, head_dim, heads, head_dim).square().sum((1, 3)).sqrt()
    own = norms.diagonal().clamp(min=1e-300)
    return norms.square() / torch.outer(own, own)


def group_similar_heads(similarity: Tensor, size: int) -> list[tuple[int, ...]]:
    """Greedy groups of ``size`` heads; the last one opened takes what is left over if it does not divide.

    Pairs are taken by falling similarity. A pair of free heads opens the next group; a free head whose
    partner has a group joins it if there is room. Heads left at the end fill groups with room.

    Returns:
        Every head once; heads ascend within a group, groups by their first head.
    """
    count = len(similarity)
    rooms = [len(group) for group in head_groups(count, size)]
    groups: list[list[int]] = [[] for _ in rooms]
    of_head: dict[int, int] = {}
    opened = 0

    def join(head: int, index: int) -> None:
        if len(groups[index]) < rooms[index]:
            groups[index].append(head)
            of_head[head] = index

    for _, first, second in sorted((-float(similarity[i, j]), i, j) for i, j in combinations(range(count), 2)):
        free = [head for head in (first, second) if head not in of_head]
        if len(free) == 2 and opened < len(rooms) and rooms[opened] >= 2:
            join(first, opened)
            join(second, opened)
            opened += 1
        elif len(free) == 1:
            join(free[0], of_head[second if free[0] == first else first])
    for head in range(count):
        if head not in of_head:
            join(head, next(index for index, group in enumerate(groups) if len(group) < rooms[index]))
    return sorted(tuple(sorted(group)) for group in groups)


def _check(groups: dict[str, list[Group]], *, head_group_size: int, reorder: bool) -> None:
    check_head_group_size(groups, head_group_size=head_group_size)
    longest = max((group for of_side in groups.values() for group in of_side), key=len)
    if len(longest) > 1:
        raise ValueError(f"layer_group_size must be 1 or 'auto' for method 'recalkv', got the group {longest}")


RECALKV = Method(recalkv_bases, {"head_group_size": 4, "reorder": True}, _check, refit="calibrate_values")
