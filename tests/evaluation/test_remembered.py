"""The cache that measures remembers what it read: the same states as the product's cache, for less work."""

import pytest
import torch

from lowrank_cache import LowRankCache
from lowrank_cache.evaluation.remembered import RememberingCache
from lowrank_cache.store import LatentStore
from tests.oracle.models import full_rank_projections, random_tokens, tiny_model

SIZES = {"compression_ratio": 4, "residual_length": 4, "num_sink_tokens": 2, "block_size": 4}


def caches(model, joint=True, frame_length=1):
    projections = full_rank_projections("llama", frame_length, 3, joint)
    return [kind(model, projections, **SIZES) for kind in (LowRankCache, RememberingCache)]


def check(model, both, tokens, **arguments):
    """The same logits, up to the order of summation in products of fewer rows."""
    with torch.no_grad():
        product, remembering = (model(tokens, past_key_values=cache, **arguments).logits for cache in both)
    torch.testing.assert_close(remembering, product, rtol=1e-4, atol=1e-5)
    assert both[0].stored_bytes() == both[1].stored_bytes()


@pytest.mark.parametrize("frame_length", [1, 4])
@pytest.mark.parametrize("joint", [True, False])
def test_logits_are_those_of_the_product(joint, frame_length):
    model = tiny_model("llama")
    both = caches(model, joint, frame_length)
    for part in random_tokens(2, 60).split(7, dim=1):
        check(model, both, part)


@pytest.mark.parametrize("new_tokens", ["encode", "exact"])
def test_bases_of_a_prompt_are_those_of_the_product(new_tokens):
    model = tiny_model("llama")
    options = {**SIZES, "method": "xkv", "layer_group_size": 3, "new_tokens": new_tokens}
    both = [kind(model, **options) for kind in (LowRankCache, RememberingCache)]
    for part in random_tokens(2, 80).split([50, 1, 9, 20], dim=1):
        check(model, both, part)
    for cache in both:
        cache.reset()
    check(model, both, random_tokens(3, 60, seed=1))


def test_left_padded_rows():
    model = tiny_model("llama")
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    both = caches(model)
    tokens = random_tokens(2, 40)
    for start in range(0, 40, 8):
        part = slice(start, start + 8)
        check(model, both, tokens[:, part], attention_mask=mask[:, : start + 8], position_ids=positions[:, part])


@pytest.mark.parametrize("kept", [1, 2, 9, 25, 30])
def test_what_is_cropped_away_is_forgotten(kept):
    model = tiny_model("llama")
    both = caches(model)
    check(model, both, random_tokens(2, 20))
    check(model, both, random_tokens(2, 12, seed=1))
    for cache in both:
        cache.crop(kept - 32)
    for seed in (2, 3, 4):
        check(model, both, random_tokens(2, 15, seed=seed))


def test_reset_and_changes_of_the_batch():
    model = tiny_model("llama")
    both = caches(model)
    steps = [
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([3, 0, 1])),
        lambda cache: cache.reset(),
    ]
    for rows, step in zip((2, 2, 4, 3), steps, strict=True):
        for seed in (1, 2):
            check(model, both, random_tokens(rows, 15, seed=seed))
        for cache in both:
            step(cache)
    check(model, both, random_tokens(1, 20))
    check(model, both, random_tokens(1, 5))


def test_a_failed_forward_is_forgotten():
    model = tiny_model("llama")
    both = caches(model)
    check(model, both, random_tokens(2, 30))

    def fail(*_):
        raise RuntimeError("stop")

    hook = model.model.layers[1].register_forward_hook(fail)
    for cache in both:
        with pytest.raises(RuntimeError, match="stop"):
            model(random_tokens(2, 9), past_key_values=cache)
    hook.remove()
    for seed in (5, 6):
        check(model, both, random_tokens(2, 15, seed=seed))


def test_each_token_is_read_once(monkeypatch):
    model, read = tiny_model("llama"), []
    reconstruct = LatentStore._reconstruct

    def count(self, packed, member, new, start=0):
        states = reconstruct(self, packed, member, new, start)
        read.append(states.shape[2])
        return states

    monkeypatch.setattr(LatentStore, "_reconstruct", count)
    sums = []
    for cache in caches(model):
        read.clear()
        for part in random_tokens(1, 80).split(8, dim=1):
            model(part, past_key_values=cache)
        sums.append(sum(read))
    encoded = cache._stores[0].latents.tokens
    assert sums[1] == 6 * (encoded - 8), "the last block is encoded after the last reading"
    assert sums[0] > 3 * sums[1]
