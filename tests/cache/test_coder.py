"""Truncated bases as caches hold them: in half precision, where float32 stays, and who shares them."""

import copy
import dataclasses
import gc
import json

import pytest
import torch

from lowrank_cache import LowRankCache
from lowrank_cache.budget import GroupPlan
from lowrank_cache.coder import CalibratedCoder
from lowrank_cache.probe import model_shape
from tests.cache.test_saved_cache import resign
from tests.oracle.inside import encode_and_reconstruct, narrowed_matrices, older_fingerprint, round_rotations_otherwise
from tests.oracle.memory import base_tensors, held_bytes, reachable_tensors, storages
from tests.oracle.models import SMALL_SIZES, full_rank_projections, random_tokens, tiny_model
from tests.oracle.tolerance import FLOAT16_ROUNDING, rounding_band


def matrices(model, cache: LowRankCache) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Projection matrices that a cache reads with, and the rest of its bases: means ``[heads, head_dim]``, weights."""
    sides = [layer.side(side) for layer in model_shape(model).layers for side in ("key", "value")]
    means = {(side.heads, side.head_dim) for side in sides}
    found = [], []
    for tensor in base_tensors(cache):
        found[tensor.dim() < 2 or tuple(tensor.shape) in means].append(tensor)
    assert all(found)
    return found


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
    model = tiny_model("llama")
    cache = LowRankCache(model, full_rank_projections("llama", joint=joint), **options)
    projecting, others = matrices(model, cache)
    assert {matrix.dtype for matrix in projecting} == {dtype}
    assert {tensor.dtype for tensor in others} == {torch.float32}
    assert cache.projection_bytes() == sum(tensor.nbytes for tensor in projecting + others)


def test_half_precision_halves_the_matrices():
    model, projections = tiny_model("llama"), full_rank_projections("llama")
    half, whole = (
        LowRankCache(model, projections, compression_ratio=3, latent_dtype=dtype) for dtype in (torch.float16, None)
    )
    assert whole.projection_bytes() - half.projection_bytes() == sum(m.numel() * 2 for m in matrices(model, half)[0])


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
        assert {matrix.dtype for matrix in matrices(model, cache)[0]} == {dtype or torch.float32}
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
    basis = projections.bases[0]
    plan = GroupPlan((scaled(basis, factor),), projections.plan(1)[0].tiers)
    members = projections.shape.members(basis.side, basis.layers)
    down_proj, up_projs = narrowed_matrices(plan, members, torch.float16)
    assert down_proj.dtype == down and {up_proj.dtype for up_proj in up_projs} == {up}
    states = [torch.randn(2, shape.heads, 5, shape.head_dim) for _, _, shape in members]
    read = encode_and_reconstruct(plan, members, torch.float16, states)
    for reconstructed, expected in zip(read, states, strict=True):
        torch.testing.assert_close(reconstructed, expected, rtol=0, atol=0.05 if down == torch.float16 else 1e-3)


def test_deepcopy_shares_bases_and_owns_tokens():
    model, projections = tiny_model("llama"), full_rank_projections("llama")
    cache = LowRankCache(model, projections, compression_ratio=2.0, **SMALL_SIZES)
    model.generate(random_tokens(1, 20), max_new_tokens=12, do_sample=False, past_key_values=cache)
    copied = copy.deepcopy(cache)
    assert storages(base_tensors(cache)) == storages(base_tensors(copied)) != set()
    pointers = [storages(reachable_tensors(each)) for each in (cache, copied)]
    assert pointers[0] and not pointers[0] & pointers[1]
    assert copied.stored_bytes() == cache.stored_bytes() == held_bytes(copied)


def test_caches_of_equal_settings_share_their_truncated_bases():
    model, projections = tiny_model("llama"), full_rank_projections("llama")
    first, second, other = (
        LowRankCache(model, projections, compression_ratio=ratio, **SMALL_SIZES) for ratio in (2.0, 2.0, 12.0)
    )
    one, same, others = (storages(base_tensors(each)) for each in (first, second, other))
    assert one == same and one and not one & others
    assert other.projection_bytes() < first.projection_bytes() <= projections.nbytes


def test_a_cache_built_again_reuses_its_bases():
    model, projections = tiny_model("llama"), full_rank_projections("llama")
    one, other = (LowRankCache(model, projections, compression_ratio=4) for _ in range(2))
    assert storages(base_tensors(one)) == storages(base_tensors(other)) != set()
    apart = LowRankCache(model, projections, compression_ratio=5)
    assert not storages(base_tensors(apart)) & storages(base_tensors(one))


def test_bases_of_settings_that_no_cache_has_any_more_are_let_go():
    model, projections = tiny_model("llama"), copy.copy(full_rank_projections("llama"))

    def held():
        gc.collect()
        return sum(isinstance(each, CalibratedCoder) for each in gc.get_objects())

    before, kept = held(), LowRankCache(model, projections, compression_ratio=2)
    one = held() - before
    for ratio in range(3, 12):
        LowRankCache(model, projections, compression_ratio=ratio)
    assert held() - before <= 2 * one  # those in use, and those asked for last
    assert base_tensors(LowRankCache(model, projections, compression_ratio=2)) == base_tensors(kept)
    del kept, projections
    assert held() == before


@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": None}])
def test_the_last_bit_of_products_with_a_rotation_is_not_what_bases_are_known_by(options, monkeypatch, tmp_path):
    """It differs from processor to processor; what was saved with other rounding, or by an older version, loads."""
    model, projections = tiny_model("llama"), full_rank_projections("llama", method="palu")
    cache = LowRankCache(model, projections, compression_ratio=3, **options, **SMALL_SIZES)
    model(random_tokens(1, 30), past_key_values=cache)
    cache.save_pretrained(tmp_path)
    round_rotations_otherwise(monkeypatch)
    loaded = LowRankCache.from_pretrained(tmp_path, model, copy.copy(projections))
    monkeypatch.undo()
    for one, two in zip(cache, loaded, strict=True):
        # The last bit of matrices in half precision may differ, too.
        assert torch.allclose(one[0], two[0], atol=0.01) and torch.allclose(one[1], two[1], atol=0.01)
    facts = json.loads((tmp_path / "lowrank_cache.json").read_text())
    facts["projections_fingerprint"] = older_fingerprint(cache)
    resign(tmp_path, facts)
    assert LowRankCache.from_pretrained(tmp_path, model, projections).get_seq_length() == 30
