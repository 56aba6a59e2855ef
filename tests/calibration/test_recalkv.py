"""ReCalKV: heads are grouped by similarity, orders of heads cost nothing, values are fitted in a second pass."""

import itertools

import pytest
import torch
from torch import Tensor

from lowrank_cache import LowRankCache
from lowrank_cache.calibration import calibrate
from lowrank_cache.calibration.api import projections_from_moments
from lowrank_cache.calibration.recalkv import group_similar_heads, head_similarity
from lowrank_cache.kernels.rope import angle_tables, rotate
from lowrank_cache.shapes import SIDES
from tests.cache.test_generation import MODES, compare
from tests.calibration.test_collect import moments_of, states_read
from tests.oracle.models import SMALL_SIZES, full_rank_projections, random_tokens, tiny_model
from tests.oracle.tolerance import rounding_band

FAMILY = "qwen2-six-heads"


def batches() -> list[Tensor]:
    return [random_tokens(4, 32, seed=seed) for seed in (1, 2, 3)]


class TestSimilarity:
    def test_is_linear_cka_of_centred_kernels(self):
        heads, head_dim, tokens = 5, 6, 40
        states = torch.randn(tokens, heads * head_dim, dtype=torch.float64) + 3.0  # a bias must not count
        states[:, :head_dim] += states[:, head_dim : 2 * head_dim]
        second, mean = states.T @ states / tokens, states.mean(0)
        centring = torch.eye(tokens).double() - 1 / tokens
        kernels = [centring @ part @ part.T @ centring for part in states.split(head_dim, dim=1)]
        expected = torch.tensor(
            [[float((one * other).sum() / (one.norm() * other.norm())) for other in kernels] for one in kernels],
            dtype=torch.float64,
        )
        actual = head_similarity(second, mean, heads)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("count, size", [(8, 4), (6, 4), (5, 4), (3, 4), (9, 2), (1, 4), (7, 1), (32, 4)])
    def test_groups_hold_every_head_once_and_one_may_be_smaller(self, count, size):
        noise = torch.rand(count, count, dtype=torch.float64)
        groups = group_similar_heads(noise + noise.T, size)
        assert sorted(itertools.chain(*groups)) == list(range(count))
        sizes = sorted(map(len, groups), reverse=True)
        assert sizes == [size] * (count // size) + ([count % size] if count % size else [])

    def test_planted_groups_are_found(self):
        planted = [(0, 3, 5, 6), (1, 2, 4, 7)]
        similarity = torch.full((8, 8), 0.1, dtype=torch.float64)
        for group in planted:
            for one, other in itertools.permutations(group, 2):
                similarity[one, other] = 0.5 + 0.01 * (one + other)
        assert group_similar_heads(similarity, 4) == planted


def planted_model():
    """Keys of heads 0, 2, 4 and 5 are nearly those of one head, the others differ: adjacent groups cut across."""
    model = tiny_model(FAMILY)
    for layer in model.model.layers:
        heads = layer.self_attn.k_proj.weight.view(6, 16, -1)
        for head in (2, 4, 5):
            heads[head] = torch.linalg.qr(torch.randn(16, 16))[0] @ heads[0] + 0.05 * heads[head]
        layer.self_attn.k_proj.bias += 5 * torch.randn_like(layer.self_attn.k_proj.bias)
    return model


def keys_read(model, cache, tokens) -> Tensor:
    """What the next token's attention reads as keys, pre-RoPE: ``[layers, batch, tokens, heads, head_dim]``."""
    keys = torch.stack([keys for keys, _ in states_read(model, cache, tokens)])
    cos, sin = angle_tables(torch.arange(tokens.shape[1]), model.model.rotary_emb.inv_freq)
    return rotate(keys, cos, sin, "half", inverse=True).transpose(2, 3)


class TestReordering:
    def test_similar_heads_share_a_basis_and_adjacent_ones_without_it(self):
        moments = moments_of(planted_model(), batches())
        groups = {}
        for reorder in (True, False):
            made = projections_from_moments(moments, method="recalkv", reorder=reorder)
            groups[reorder] = [basis.heads for basis in made.bases if basis.side == "key" and basis.layers == (1,)]
        assert groups == {True: [(0, 2, 4, 5), (1, 3)], False: [(0, 1, 2, 3), (4, 5)]}
        values = [basis for basis in made.bases if basis.side == "value"]
        assert [basis.heads for basis in values] == [tuple(range(6))] * 3

    def test_reordered_keys_lose_less_at_the_same_rank(self):
        model = planted_model()
        moments, tokens = moments_of(model, batches()), random_tokens(2, 60, seed=9)
        errors = {}
        for reorder in (True, False):
            made = projections_from_moments(moments, method="recalkv", reorder=reorder)
            options = {"latent_dtype": None, "attend": "reconstruct", **SMALL_SIZES}
            cache = LowRankCache(model, made, ranks=16, **options)
            exact = LowRankCache(model, made, compression_ratio=1, **options)
            read = [keys_read(model, each, tokens) for each in (cache, exact)]
            errors[reorder] = float((read[0] - read[1]).square().mean())
        assert errors[True] < 0.8 * errors[False]

    @pytest.mark.parametrize("mode", ["greedy", "beam_search", "prompt_lookup", "left_padded"])
    def test_full_rank_with_biased_keys_in_another_order_equals_dynamic_cache(self, mode):
        made = full_rank_projections(FAMILY, method="recalkv")
        assert any(list(basis.heads) != sorted(range(6))[: len(basis.heads)] for basis in made.bases)
        band = rounding_band(FAMILY, method="recalkv")
        assert mode in MODES
        compare(
            FAMILY,
            mode,
            lambda model: LowRankCache(model, made, compression_ratio=1, latent_dtype=None, **SMALL_SIZES),
            band,
        )

    def test_channels_that_are_not_stored_are_read_as_the_bias_of_their_own_head(self):
        model, tokens = planted_model(), random_tokens(2, 60, seed=9)
        moments = moments_of(model, batches())
        made = projections_from_moments(moments, method="recalkv")
        ranks = {layer: (1, 1) for layer in range(3)}
        options = {"latent_dtype": None, "attend": "reconstruct", **SMALL_SIZES}
        cache = LowRankCache(model, made, ranks=ranks, **options)
        exact = LowRankCache(model, made, compression_ratio=1, **options)
        latent = slice(2, 50)  # neither sinks nor window
        read, states = (keys_read(model, each, tokens)[:, :, latent] for each in (cache, exact))
        for basis in (basis for basis in made.bases if basis.side == "key"):
            (layer,), heads, kept = basis.layers, list(basis.heads), basis.truncate(1)
            rows = states[layer][:, :, heads].flatten(2)
            expected = rows @ kept.down_proj @ kept.up_proj + kept.constant
            torch.testing.assert_close(read[layer][:, :, heads].flatten(2), expected, rtol=1e-3, atol=1e-3)
            mean = moments.total["key", (layer,)].view(6, 16)[heads].flatten() / moments.tokens
            torch.testing.assert_close(basis.truncate(0).constant.double(), mean, rtol=1e-3, atol=1e-3)


class TestValueCalibration:
    def test_calibrate_refits_unless_told_not_to(self):
        model = tiny_model(FAMILY)
        with_it, without = (
            calibrate(model, batches(), method="recalkv", calibrate_values=flag, progress=False)
            for flag in (True, False)
        )
        assert with_it.provenance["calibrate_values"] and not without.provenance["calibrate_values"]
        for one, other in zip(with_it.bases, without.bases, strict=True):
            changed = one.side == "value" and one.layers != (0,)
            assert torch.allclose(one.down_proj, other.down_proj, atol=1e-4) != changed
            assert one.rank_weight == other.rank_weight


def test_keys_and_values_share_one_budget_by_fisher_information():
    moments = moments_of(tiny_model(FAMILY), batches())
    for layer in range(3):
        moments.sensitivity["value", layer] *= 9  # three times the root
    made = projections_from_moments(moments, method="recalkv")
    weights = {side: {b.layers[0]: 0.0 for b in made.bases} for side in SIDES}
    for basis in made.bases:
        weights[basis.side][basis.layers[0]] += basis.rank_weight
    for layer in range(3):
        roots = [moments.sensitivity[side, layer].diagonal().sqrt().mean() for side in SIDES]
        assert weights["value"][layer] / weights["key"][layer] == pytest.approx(float(roots[1] / roots[0]))
    # Within a layer and side every number has the same share.
    for basis in made.bases:
        share = basis.rank_weight / basis.width
        assert share == pytest.approx(weights[basis.side][basis.layers[0]] / 96)
    stored = sum(plan.bytes_per_token for plan in made.plan(2))
    assert 0.8 * 3 * 192 < stored <= 3 * 192


class TestBadInput:
    def test_iterator_of_batches(self):
        with pytest.raises(TypeError, match="batches must be a list for method 'recalkv'.*calibrate_values=False"):
            calibrate(tiny_model("llama"), iter(batches()), method="recalkv", progress=False)
        calibrate(tiny_model("llama"), iter(batches()), method="recalkv", calibrate_values=False, progress=False)

    @pytest.mark.parametrize("size", [2, (2, 1), (1, 2)])
    def test_layer_groups(self, size):
        with pytest.raises(ValueError, match="layer_group_size must be 1 or 'auto' for method 'recalkv'"):
            calibrate(tiny_model("llama"), batches(), method="recalkv", layer_group_size=size, progress=False)

    def test_refit_ratio(self):
        with pytest.raises(ValueError, match="refit_ratio must be at least 1, got 0.5"):
            calibrate(tiny_model("llama"), batches(), method="recalkv", refit_ratio=0.5, progress=False)

    def test_refitted_values_of_another_method(self):
        moments = moments_of(tiny_model("llama"), batches())
        with pytest.raises(ValueError, match="refitted belongs to method 'recalkv', got method 'palu'"):
            projections_from_moments(moments, method="palu", refitted=moments)
