"""Bases in half precision: which they are, what that costs, and where float32 stays."""

import dataclasses

import pytest
import torch

from lowrank_cache import LowRankCache
from lowrank_cache.allocation import plan_stores
from lowrank_cache.latents import Coder
from tests.oracle.models import SMALL_SIZES, full_rank_projections, random_tokens, tiny_model
from tests.oracle.tolerance import FLOAT16_ROUNDING, rounding_band


def matrices(coders: list[Coder]) -> list[torch.Tensor]:
    return [matrix for coder in coders for block in coder.blocks for matrix in (block.down_proj, *block.up_projs)]


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize(
    "options, dtype",
    [
        ({}, torch.float16),
        ({"latent_dtype": torch.float16}, torch.float16),
        ({"latent_dtype": torch.bfloat16}, torch.bfloat16),
        ({"latent_dtype": torch.float32}, torch.float32),
        ({"latent_dtype": torch.float64}, torch.float32),
        ({"latent_dtype": None}, torch.float32),
    ],
    ids=str,
)
def test_bases_are_held_in_the_dtype_of_latents(options, dtype, joint):
    cache = LowRankCache(tiny_model("llama"), full_rank_projections("llama", joint=joint), **options)
    assert {matrix.dtype for matrix in matrices(cache._coders)} == {dtype}
    held = [tensor for coder in cache._coders for tensor in (coder.weight, *coder.constants)]
    assert {tensor.dtype for tensor in held} == {torch.float32}
    assert cache.projection_bytes() == sum(coder.nbytes for coder in cache._coders)


def test_half_precision_halves_the_matrices():
    model, projections = tiny_model("llama"), full_rank_projections("llama")
    half, whole = (
        LowRankCache(model, projections, compression_ratio=3, latent_dtype=dtype) for dtype in (torch.float16, None)
    )
    assert whole.projection_bytes() - half.projection_bytes() == sum(m.numel() * 2 for m in matrices(half._coders))


@pytest.mark.parametrize("layer_group_size, joint", [(1, True), (3, True), (1, False)])
@pytest.mark.parametrize("frame_length", [1, 4])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "deepseek-v3"])
def test_half_precision_bases_move_logits_by_their_rounding(family, frame_length, layer_group_size, joint):
    options = (frame_length, layer_group_size, joint)
    model, tokens, logits = tiny_model(family), random_tokens(2, 22, seed=2), []
    for dtype in (torch.float16, None):
        cache = LowRankCache(
            model, full_rank_projections(family, *options), compression_ratio=1, latent_dtype=dtype, **SMALL_SIZES
        )
        assert {matrix.dtype for matrix in matrices(cache._coders)} == {dtype or torch.float32}
        logits.append(torch.cat([model(part, past_key_values=cache).logits for part in tokens.split(2, dim=1)], dim=1))
    # Down-projections, up-projections and latents are each rounded once, and errors of products add up squared.
    band = 3**0.5 * rounding_band(family, *options, rounding=FLOAT16_ROUNDING)
    error = float((logits[0] - logits[1]).abs().max())
    assert 0 < error <= band < 0.2 * float(logits[1].std()), (error, band)


def scaled(basis, factor):
    """The same projection with latents of another unit, ``1 / factor`` of theirs."""
    return dataclasses.replace(
        basis, down_proj=basis.down_proj * factor, up_proj=basis.up_proj / factor, offset=basis.offset * factor
    )


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("factor, down, up", [(1e6, torch.float32, torch.float32), (2.0, torch.float16, torch.float16)])
def test_float32_stays_where_half_precision_would_overflow_or_underflow(factor, down, up, joint):
    projections = full_rank_projections("llama", joint=joint)
    plan = plan_stores(projections, 1)[0]
    basis = projections.bases[0]
    members = projections.shape.members(basis.side, basis.layers)
    coder = Coder((scaled(basis, factor),), plan, members, torch.float16)
    (block,) = coder.blocks
    assert block.down_proj.dtype == down and {up_proj.dtype for up_proj in block.up_projs} == {up}
    states = [torch.randn(2, shape.heads, 5, shape.head_dim) for shape in coder.shapes]
    latents = coder.encode(states)
    for member, expected in enumerate(states):
        reconstructed = coder.decode(latents, member)
        torch.testing.assert_close(reconstructed, expected, rtol=0, atol=0.05 if down == torch.float16 else 1e-3)
