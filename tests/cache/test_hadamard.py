"""Uniform bits: latents are rotated so that one step serves all channels, and the rotation is in the bases."""

import pytest
import torch

from lowrank_cache import LowRankCache
from lowrank_cache.calibration import calibrate
from lowrank_cache.hadamard import channel_mixing, hadamard_blocks
from lowrank_cache.kernels.packed import dequantize, quantize
from tests.oracle.memory import base_tensors, held_bytes
from tests.oracle.models import SMALL_SIZES, random_tokens, tiny_model
from tests.oracle.states import latent_states, unrotated

RANKS = [1, 7, 16, 24, 48, 100, 176]


def decaying(rank: int) -> torch.Tensor:
    """Root mean squares like those of principal components: three orders of magnitude."""
    return torch.logspace(1, -2, rank)


@pytest.mark.parametrize("rank", RANKS)
def test_blocks_are_powers_of_two_and_of_sixteen_where_the_rank_is(rank):
    blocks = hadamard_blocks(rank)
    assert sum(blocks) == rank
    assert all(block & (block - 1) == 0 for block in blocks)
    if rank % 16 == 0:
        assert all(block % 16 == 0 for block in blocks)


@pytest.mark.parametrize("rank", RANKS)
def test_mixing_is_undone_and_keeps_lengths(rank):
    size, unit = decaying(rank), 0.37
    mix, unmix = channel_mixing(size, unit)
    torch.testing.assert_close(mix.double() @ unmix.double(), torch.eye(rank).double(), rtol=0, atol=1e-4)
    latents = torch.randn(50, rank)
    # A squared error of the rotated latents is that of the states, in the common unit.
    torch.testing.assert_close((latents @ mix).square().sum(1), (latents * size / unit).square().sum(1))


@pytest.mark.parametrize("rank", [48, 100, 176])
def test_mixed_channels_have_nearly_equal_size(rank):
    size = decaying(rank)
    mix, _ = channel_mixing(size, float(size.square().mean().sqrt()))
    mixed = mix.square().sum(0).sqrt()
    blocks = torch.tensor(hadamard_blocks(rank))
    within = torch.arange(rank) < blocks[blocks >= 16].sum()
    # Unmixed, the largest channel is a thousand times the smallest.
    assert float(mixed[within].max() / mixed[within].min()) < 2.0


@pytest.mark.parametrize("bits", [4, 2])
def test_rotation_lowers_the_error_of_channels_that_share_a_step(bits):
    size = decaying(128)
    states = torch.randn(500, 128) * size
    mix, unmix = channel_mixing(size, 1.0)
    errors = []
    for forth, back in ((torch.eye(128), torch.eye(128)), (mix / size[:, None], unmix * size)):
        latents = (states @ forth)[None]
        stored = dequantize(*quantize(latents, bits, torch.ones(128)), bits)
        errors.append(float((stored[0] @ back - states).square().mean()))
    assert errors[1] < 0.7 * errors[0]


def calibrated(method: str):
    batches = [random_tokens(4, 24, seed=seed) for seed in (1, 2)]
    return calibrate(tiny_model("qwen2"), batches, method=method, progress=False)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("method", ["recalkv", "palu"])
def test_uniform_bits_store_what_they_claim_and_read_back_near_the_truth(method, bits):
    model = tiny_model("qwen2")
    projections = calibrated(method)
    cache = LowRankCache(model, projections, compression_ratio=1, bits=bits, **SMALL_SIZES)
    tokens = random_tokens(2, 40, seed=3)
    model(tokens, past_key_values=cache)
    assert cache.stored_bytes() == held_bytes(cache)
    exact = LowRankCache(model, projections, compression_ratio=1, latent_dtype=None, **SMALL_SIZES)
    model(tokens, past_key_values=exact)
    # Step errors of unit-variance channels (budget.DISTORTION), with room for tiny tiers.
    allowed = {8: 1e-3, 4: 0.06, 2: 0.5}[bits]
    read, truth = (latent_states(model, each, 2) for each in (cache, exact))
    for group, bases in zip(cache.groups(), projections.groups(), strict=True):
        assert [width for width, _ in group.tiers] == [bits]
        (member,) = group.members
        errors = sizes = 0.0
        for basis in bases:
            assert basis.layers == (member[0],) and basis.side == member[1]
            ours, theirs = (_rows(model, states[member], basis) for states in (read, truth))
            latents = (theirs - basis.constant) @ basis.down_proj - basis.offset
            # `loss` is what a squared error in each channel costs.
            errors += float((((ours - theirs) @ basis.down_proj).square() * basis.loss).sum())
            sizes += float((latents.square() * basis.loss).sum())
        assert errors / sizes < allowed


def _rows(model, states, basis):
    """What a basis projects: ``[batch, heads, tokens, head_dim]`` → ``[batch, tokens, width]``, before rotation."""
    states = unrotated(model, states, SMALL_SIZES["num_sink_tokens"]) if basis.side == "key" else states
    return states[:, list(basis.heads)].transpose(1, 2).flatten(2)


def test_sixteen_bits_are_not_rotated():
    model, projections = tiny_model("llama"), calibrated_llama()
    plain, sixteen = (LowRankCache(model, projections, compression_ratio=2, bits=bits) for bits in (None, 16))
    ours, theirs = (base_tensors(each) for each in (plain, sixteen))
    assert len(ours) == len(theirs) > 0
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def calibrated_llama():
    return calibrate(tiny_model("llama"), [random_tokens(4, 24)], method="palu", progress=False)
