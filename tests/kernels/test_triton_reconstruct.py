"""Reconstruction in Triton against the reference in float64."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton", reason="the kernels under test need triton")

from lowrank_cache.kernels import reference
from lowrank_cache.kernels.triton_reconstruct import reconstruct
from tests.oracle.latent_sides import (
    FLOAT16_ROUNDING,
    FLOAT32_ROUNDING,
    make_rope,
    make_side,
    make_tiers,
    on_device,
    per_batch,
    with_noise,
)

RECONSTRUCT_CASES = {
    "frames of 1": dict(frame=1, layout="half", rotary=32),
    "frames of 16": dict(frame=16, layout="half", rotary=16),
    "interleaved": dict(frame=5, layout="interleaved", rotary=24),
    "values": dict(frame=None, layout="half", rotary=32),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", RECONSTRUCT_CASES)
def test_reconstructs_as_the_reference_does(name, dtype):
    given = RECONSTRUCT_CASES[name]
    tokens = 70 if dtype == torch.float32 else 20
    rope = None if given["frame"] is None else make_rope(2, tokens, given["rotary"], given["frame"], given["layout"])
    tiers = make_tiers({16: 3, 8: 21, 4: 40, 2: 150}, 2, tokens, room=3)
    side = make_side(tiers, 2, 48, rope, dtype=torch.float32 if dtype == torch.float32 else torch.float16)
    states = reconstruct(on_device(side), dtype).cpu()
    truth = reference.reconstruct(side, torch.float64)
    assert states.dtype == dtype and states.shape == truth.shape
    # Sums of as many roundings as there are channels in float32; a rounding of latents and one of states otherwise.
    size = FLOAT32_ROUNDING * 214**0.5 if dtype == torch.float32 else FLOAT16_ROUNDING
    moved = [reference.reconstruct(with_noise(side, size), torch.float64) - truth for _ in range(4)]
    rounding = 0 if dtype == torch.float32 else torch.finfo(dtype).eps * float(truth.abs().max())
    error = float((states.double() - truth).abs().max())
    assert error <= 3 * max(float(move.abs().max()) for move in moved) + rounding


def test_reconstructs_nothing_from_nothing():
    tiers = make_tiers({4: 40}, 2, 5)
    empty = tuple(dataclasses.replace(tier, codes=tier.codes[:, :0], steps=tier.steps[:, :0]) for tier in tiers)
    assert reconstruct(on_device(make_side(empty, 2, 32))).shape == (2, 2, 0, 32)


def test_rejects_what_it_cannot_read():
    side = make_side(make_tiers({4: 40}, 2, 5), 2, 32)
    with pytest.raises(ValueError, match="up_proj and constant of side must be .* the same for all batch elements"):
        reconstruct(per_batch(side))
    with pytest.raises(ValueError, match="up_proj of side must have 40 rows like its tiers, got 39"):
        reconstruct(dataclasses.replace(side, up_proj=side.up_proj[1:]))
    with pytest.raises(ValueError, match="head_dim of side must be a multiple of 16 up to 256, got 272"):
        reconstruct(make_side(side.tiers, 1, 272))
