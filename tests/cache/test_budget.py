"""Spending bits: within the budget, near the optimum, and counted as the tensors really are."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_cache.budget import full_bytes_per_token, spend, tier_bytes, tiers_loss
from lowrank_cache.calibration import calibrate
from lowrank_cache.kernels.packed import pack_latents, padded_channels, read_latents
from lowrank_cache.latents import PackedLatents
from tests.oracle.models import full_rank_projections, random_tokens, tiny_model


@st.composite
def stores(draw, most_channels=40, most_stores=3):
    costs = []
    for _ in range(draw(st.integers(1, most_stores))):
        exponents = draw(st.lists(st.floats(-6, 2), min_size=1, max_size=most_channels))
        loss = np.sort(10.0 ** np.array(exponents))[::-1].copy()
        costs.append(loss)
    return costs


def total_loss(costs, chosen):
    return sum(tiers_loss(cost, tiers) for cost, tiers in zip(costs, chosen, strict=True))


def bytes_of(tiers):
    return sum(tier_bytes(bits, channels) for bits, channels in tiers)


@given(costs=stores(), budget=st.integers(0, 400), levels=st.sampled_from([(16, 8, 4, 2), (16,), (4,), (8, 2)]))
def test_never_over_budget(costs, budget, levels):
    chosen = spend(costs, budget, levels)
    assert sum(map(bytes_of, chosen)) <= budget
    for cost, tiers in zip(costs, chosen, strict=True):
        assert sum(channels for _, channels in tiers) <= len(cost)
        assert all(bits in levels for bits, _ in tiers)


@settings(max_examples=40)
@given(costs=stores(), budgets=st.lists(st.integers(0, 400), min_size=2, max_size=5))
def test_more_bytes_never_lose_much(costs, budgets):
    losses = [total_loss(costs, spend(costs, budget)) for budget in sorted(budgets)]
    whole = sum(float(cost.sum()) for cost in costs)
    # Greedy at the edges of the budget: a larger one may lose a little where the pieces fit worse.
    assert all(later <= earlier + 0.02 * whole for earlier, later in itertools.pairwise(losses))


def best_loss(costs, budget, levels):
    """Least loss within the budget over all choices of all stores (counts in whole rows of 16 bytes)."""
    options = []
    for cost in costs:
        channels = len(cost)
        counts = [
            range(0, channels + padded_channels(bits, 1), padded_channels(bits, 1)) if bits in levels else (0,)
            for bits in (16, 8, 4, 2)
        ]
        choices = {}
        for requested in itertools.product(*counts):
            left, tiers = channels, []
            for bits, count in zip((16, 8, 4, 2), requested, strict=True):
                tiers.append((bits, min(count, left)))
                left -= tiers[-1][1]
            choices[tuple(tiers)] = (bytes_of(tiers), tiers_loss(cost, tiers))
        options.append(list(choices.values()))
    return min(
        sum(loss for _, loss in chosen)
        for chosen in itertools.product(*options)
        if sum(size for size, _ in chosen) <= budget
    )


@settings(max_examples=40)
@given(costs=stores(most_channels=24, most_stores=2), budget=st.integers(16, 120))
def test_near_the_optimum(costs, budget):
    levels = (16, 8, 4, 2)
    ours, best = total_loss(costs, spend(costs, budget, levels)), best_loss(costs, budget, levels)
    whole = sum(float(cost.sum()) for cost in costs)
    assert best - 1e-9 * whole <= ours <= best + 0.05 * whole


def test_one_store_is_solved_exactly():
    cost = np.geomspace(1, 1e-4, 40)
    for budget in (16, 18, 34, 36, 50, 68, 100):
        ours = tiers_loss(cost, spend([cost], budget)[0])
        assert ours == pytest.approx(best_loss([cost], budget, (16, 8, 4, 2)))


def test_the_costlier_store_is_served_first():
    cheap, dear = (np.full(16, value) for value in (0.01, 1.0))
    assert spend([cheap, dear], 18) == [(), ((8, 16),)]


def test_bytes_of_tiers():
    assert [tier_bytes(bits, 1) for bits in (16, 8, 4, 2)] == [16, 18, 18, 18]
    assert [tier_bytes(16, 8), tier_bytes(16, 9), tier_bytes(2, 64), tier_bytes(2, 65), tier_bytes(4, 0)] == [
        16,
        32,
        18,
        34,
        0,
    ]
    assert padded_channels(4, 33) == 64


@given(counts=st.lists(st.integers(0, 70), min_size=4, max_size=4), seed=st.integers(0, 100))
@settings(max_examples=30)
def test_counted_bytes_are_those_of_packed_latents(counts, seed):
    tiers = tuple((bits, count) for bits, count in zip((16, 8, 4, 2), counts, strict=True) if count)
    channels = sum(counts)
    packed = PackedLatents(tiers, torch.float16, block_size=1)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, 5, channels, generator=generator)
    packed.append(pack_latents(latents, packed.tiers, torch.ones(channels), torch.float16), latents.shape[1])
    real = sum(buffer.view()[0, 0].numel() * buffer.view().element_size() for buffer in packed.buffers())
    assert real == bytes_of(tiers)
    if channels:
        read = read_latents(packed.views())
        assert read.shape == latents.shape and float((read - latents).abs().max()) < 4.0


@pytest.mark.parametrize("method", ["fisher", "palu", "recalkv"])
@pytest.mark.parametrize("bits", [None, 16, 8, 4, 2])
@pytest.mark.parametrize("ratio", [1.5, 3.0, 8.0])
def test_plans_keep_to_the_ratio(method, bits, ratio):
    size = 1 if method == "recalkv" else 3
    made = calibrate(tiny_model("llama"), [random_tokens(4, 20)], method=method, layer_group_size=size, progress=False)
    plans = made.plan(ratio, bits=bits)
    stored = sum(plan.bytes_per_token for plan in plans)
    assert 0 < stored <= full_bytes_per_token(made.shape) / ratio
    for store, plan in zip(made.groups(), plans, strict=True):
        channels = [channel for _, tier in plan.tiers for channel in tier]
        assert len(set(channels)) == len(channels) <= sum(basis.rank for basis in store)


def test_ratio_one_keeps_every_channel():
    made = full_rank_projections("llama")
    for store, plan in zip(made.groups(), made.plan(1.0), strict=True):
        assert plan.tiers == ((16, tuple(range(store[0].rank))),)


def test_a_higher_ratio_never_stores_more():
    made = full_rank_projections("llama")
    sizes = [sum(plan.bytes_per_token for plan in made.plan(ratio)) for ratio in (1, 1.5, 2, 3, 4, 6, 8)]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
