"""The default coder's bases: principal components of the states, weighted by the loss' sensitivity.

With ``W = F^½``: ``W C W = U Λ Uᵀ``, down-projection ``W U``, up-projection ``Uᵀ W⁻¹``. ``Λ_i`` predicts
the loss of dropping channel ``i``, comparable over layers and sides, so one budget serves the whole
model. Mathematics: docs/method.md, "The fisher basis".
"""

import torch
from torch import Tensor

from lowrank_cache.basis import Basis
from lowrank_cache.calibration.api import Method, auto_group_size
from lowrank_cache.calibration.moments import Moments
from lowrank_cache.shapes import Group

# Relative floors. Directions without measured gradient still get a small weight, so that the basis is
# complete; channels that never varied in calibration still get a scale, so that no latent explodes.
SENSITIVITY_FLOOR = 1e-5
VARIANCE_FLOOR = 1e-8


def fisher_bases(moments: Moments, groups: dict[str, list[Group]], frame_length: int) -> list[Basis]:
    """One basis per layer group, over all heads of its layers; of keys and values jointly under ``"both"``."""
    bases = []
    for side, side_groups in groups.items():
        for group in side_groups:
            second, mean, sensitivity = moments.of_group(side, group, frame_length)
            heads = tuple(range(moments.side(side, group).heads))
            arrays = weighted_basis(second, mean, sensitivity)
            bases.append(Basis(side, group, heads, **arrays, rank_weight=None))
    return bases


def weighted_basis(second: Tensor, mean: Tensor, sensitivity: Tensor) -> dict[str, Tensor]:
    """Tensors of a sensitivity-weighted ``Basis``, by attribute.

    float32, of full rank, channels of unit variance, sorted by loss; from what ``Moments.of_group`` returns.
    """
    values, vectors = torch.linalg.eigh(sensitivity)
    values = values.clamp(min=SENSITIVITY_FLOOR * max(float(values[-1]), 1e-30)).sqrt()
    weight = vectors * values @ vectors.T
    inverse = vectors / values @ vectors.T
    _, components = torch.linalg.eigh(weight @ second @ weight)
    down, up = weight @ components, components.T @ inverse
    return unit_variance(down, up, second, mean)


def unit_variance(down: Tensor, up: Tensor, second: Tensor, mean: Tensor) -> dict[str, Tensor]:
    """Scale latents to unit variance and sort channels by what their error costs.

    ``down`` and ``up`` are such that a squared latent error costs 1 before scaling.
    """
    offset = mean @ down
    variance = ((second @ down) * down).sum(0) - offset.square()
    variance = variance.clamp(min=VARIANCE_FLOOR * max(float(variance.max()), 1e-30))
    order = variance.argsort(descending=True)
    scale = variance.sqrt()[order]
    down, up, offset = down[:, order] / scale, up[order] * scale[:, None], offset[order] / scale
    return {
        "down_proj": down.float(),
        "up_proj": up.float(),
        "offset": offset.float(),
        "loss": scale.square().float(),
        "constant": mean.new_zeros(len(mean), dtype=torch.float32),
    }


# Absorbing a query costs head_dim / frame_length of what reading the codes costs (docs/method.md, "Integer attention on
# CPUs"): as much for heads of 64. Longer frames lose more at 8x, shorter ones gain nothing there.
FISHER = Method(fisher_bases, joint=True, frame_length=64, group_size=auto_group_size)
