"""The one place where tolerances are defined, derived from float64 and not from what the code happens to give.

The truth is the same model in float64 with transformers' own ``DynamicCache`` (its norms and rotary
tables stay float32 inside transformers, for truth and candidates alike). A float32 run with a
full-rank cache may miss the truth by ``REFERENCE_FACTOR`` times as much as the float32 run with
``DynamicCache`` does, plus a rounding band: what the truth's logits move by when every cached number
carries the noise that two float32 products with the bases must cost. See ``rounding_band``.
"""

from functools import cache

import torch
from torch import Tensor
from transformers import DynamicCache

from lowrank_cache import Projections
from tests.oracle.models import full_rank_projections, random_tokens, tiny_model

__all__ = [
    "FLOAT32_ROUNDING",
    "REFERENCE_FACTOR",
    "assert_equal_up_to_rotation_rounding",
    "assert_within_reference_error",
    "noise_gain",
    "rounding_band",
]

# Maxima over a few thousand logits of two independent rounding errors of equal size differ by less than this.
REFERENCE_FACTOR = 2.0
FLOAT32_ROUNDING = 2.0**-24
# Root mean square of what rounding to float16 does: uniform in half a unit, over a mantissa anywhere in [1, 2).
FLOAT16_ROUNDING = 2.0**-11 * (1 / 3) ** 0.5 * 0.5**0.5


def assert_within_reference_error(actual: Tensor, reference: Tensor, truth: Tensor, band: float = 0.0) -> None:
    """Fail unless ``actual`` is as near to ``truth`` as ``reference`` is, see the module.

    Args:
        actual: Logits of the cache under test, any shape.
        reference: Logits of ``DynamicCache`` in the same dtype and shape.
        truth: Logits of ``DynamicCache`` in float64, same shape.
        band: From ``rounding_band``; 0 where nothing but the reference's own rounding is allowed.
    """
    assert actual.shape == reference.shape == truth.shape
    assert bool(torch.isfinite(actual).all()), "logits must be finite"
    error = float((actual.double() - truth.double()).abs().max())
    reference_error = float((reference.double() - truth.double()).abs().max())
    allowed = REFERENCE_FACTOR * reference_error + band
    assert error <= allowed, (
        f"logits are {error:.3g} from the float64 truth, allowed {allowed:.3g} "
        f"({REFERENCE_FACTOR:g} x {reference_error:.3g} of DynamicCache + {band:.3g} rounding band)"
    )


def noise_gain(projections: Projections) -> float:
    """Root mean square error of ``(x @ down) @ up`` in units of float32 rounding, for ``x`` of unit size.

    Each product of a term and a coefficient is rounded independently, so squared errors add up:
    ``x² @ down² @ up²`` per number. The largest over all bases.
    """
    gains = []
    for basis in projections.bases:
        squared = (basis.down_proj.double().square() @ basis.up_proj.double().square()).sum(0)
        gains.append(float(squared.mean().sqrt()))
    return max(gains)


class _NoisyCache(DynamicCache):
    """Stores every state with relative Gaussian noise of a given size."""

    def __init__(self, config, size: float):
        super().__init__(config=config)
        self.size = size
        self.generator = torch.Generator().manual_seed(7)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        noisy = [
            states
            + self.size
            * states.square().mean().sqrt()
            * torch.randn(states.shape, dtype=states.dtype, generator=self.generator)
            for states in (key_states, value_states)
        ]
        return super().update(*noisy, layer_idx, *args, **kwargs)


@cache
def rounding_band(
    family: str,
    frame_length: int = 1,
    layer_group_size: int | tuple[int, int] = 1,
    joint: bool | None = None,
    method: str = "fisher",
    rounding: float = FLOAT32_ROUNDING,
) -> float:
    """How far rounding in a family's full-rank bases, of float32 unless told, may move its logits.

    The float64 model runs twice over 22 tokens, once with noise of ``noise_gain`` roundings in every
    cached number; the band is ``REFERENCE_FACTOR`` times the largest change of a logit.
    """
    gain = noise_gain(full_rank_projections(family, frame_length, layer_group_size, joint, method))
    tokens = random_tokens(2, 22, seed=5)
    logits = []
    for size in (0.0, gain * rounding):
        model = tiny_model(family, torch.float64)
        logits.append(model(tokens, past_key_values=_NoisyCache(model.config, size)).logits)
    return REFERENCE_FACTOR * float((logits[1] - logits[0]).abs().max())


def assert_equal_up_to_rotation_rounding(actual: Tensor, expected: Tensor) -> None:
    """Fail unless numbers agree that only a float32 rotation and its inverse separate.

    Rotary tables and products are rounded a dozen times, each by half a unit in the last place of the largest
    number at most.
    """
    assert actual.shape == expected.shape
    allowed = 12 * FLOAT32_ROUNDING * 2**0.5 * float(expected.abs().max())
    error = float((actual - expected).abs().max())
    assert error <= allowed, f"numbers differ by {error:.3g}, a rotation and its inverse explain {allowed:.3g}"
