"""Positions of cached tokens: a forward must continue them, and a wrong one leaves the cache as it was."""

import pytest
import torch

from lowrank_cache import LowRankCache
from tests.oracle.models import SMALL_SIZES, exact_cache, full_rank_projections, random_tokens, tiny_model
from tests.oracle.states import Unchanged, filled_cache


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture
def filled(model):
    return filled_cache(model)


def _next(tokens):
    """Position ids that continue ``filled``."""
    return torch.tensor([[20], [19]]) + torch.arange(tokens)[None]


@pytest.mark.parametrize("shift", [-20, -1, 1, 100])
@pytest.mark.parametrize("row", [0, 1])
def test_positions_that_do_not_continue(model, filled, shift, row):
    positions = _next(3)
    positions[row] += shift
    expected = 20 - row
    message = f"sequence {row} must have position {expected} at token 0 of this forward, got {expected + shift}"
    with Unchanged(model, filled):
        with pytest.raises(ValueError, match=message):
            model(random_tokens(2, 3), past_key_values=filled, position_ids=positions)


def test_a_shorter_unrelated_prompt(model):
    cache = exact_cache(model, full_rank_projections("llama"))
    model.generate(random_tokens(1, 20), max_new_tokens=4, past_key_values=cache)
    with pytest.raises(ValueError):
        model.generate(random_tokens(1, 8, seed=9), max_new_tokens=4, past_key_values=cache)
    assert cache.get_seq_length() == 23


def test_a_jump_inside_a_forward(model, filled):
    positions = _next(4)
    positions[:, 2:] += 1
    with Unchanged(model, filled):
        with pytest.raises(ValueError, match="sequence 0 must have position 22 at token 2 of this forward, got 23"):
            model(random_tokens(2, 4), past_key_values=filled, position_ids=positions)


@pytest.mark.parametrize("shape", [(2, 4), (3, 3), (3,), (3, 2, 3)])
def test_positions_of_a_wrong_shape(model, filled, shape):
    with Unchanged(model, filled):
        with pytest.raises(ValueError, match=r"position_ids must have shape \[1 or 2, 3\], got"):
            model(random_tokens(2, 3), past_key_values=filled, position_ids=torch.full(shape, 20))


def test_no_tokens(model, filled):
    with Unchanged(model, filled):
        with pytest.raises(ValueError, match="at least one token for a LowRankCache, got 0"):
            model(torch.zeros(2, 0, dtype=torch.long), past_key_values=filled)


@pytest.mark.parametrize("batch", [1, 3])
def test_another_batch_size(model, filled, batch):
    with Unchanged(model, filled):
        with pytest.raises(ValueError, match=f"must be 2, that of the cached tokens, got {batch}; use cache.batch_r"):
            model(random_tokens(batch, 3), past_key_values=filled)


def test_turns_of_two_generations_with_one_cache_are_refused_by_position(model):
    cache = LowRankCache(model, full_rank_projections("llama", 4, 2), compression_ratio=2, **SMALL_SIZES)
    model(random_tokens(1, 12), past_key_values=cache)
    mine = torch.arange(12, 13)[None]
    model(random_tokens(1, 1), position_ids=mine, past_key_values=cache)  # the other generation's step
    with pytest.raises(ValueError, match="position_ids must continue the cached tokens"):
        model(random_tokens(1, 1), position_ids=mine, past_key_values=cache)
