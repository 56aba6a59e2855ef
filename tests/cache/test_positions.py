"""Positions of cached tokens: a forward must continue them, and a wrong one leaves the cache as it was."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from lowrank_cache import LowRankCache
from lowrank_cache.artefact import SavedTensors
from lowrank_cache.positions import PADDING, PositionTrack
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


@pytest.mark.parametrize("shape", [(2, 4), (3, 3), (3,), (2, 2, 3), (3, 2, 2)])
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


# One cause, one message, and its cure helps.


def _greedy(model, cache, tokens, **options):
    return model.generate(tokens, past_key_values=cache, max_new_tokens=6, do_sample=False, **options)


def test_the_same_prompt_again(model):
    cache, prompt = exact_cache(model, full_rank_projections("llama")), random_tokens(1, 20)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
    with pytest.raises(ValueError, match=r"bring 20 tokens from the start, and 20 are cached.*cache.crop\(-1\)"):
        _greedy(model, cache, prompt)
    with pytest.raises(ValueError, match=r"at least one token .* got 0: all 20 are cached; call cache.crop\(-1\)"):
        model(prompt[:, :0], past_key_values=cache)
    cache.crop(-1)
    assert torch.equal(_greedy(model, cache, prompt), _greedy(model, None, prompt))


def test_a_prompt_that_begins_like_the_cached_one(model):
    cache, prompt = exact_cache(model, full_rank_projections("llama")), random_tokens(1, 20)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
    with pytest.raises(ValueError, match=r"bring 12 tokens from the start, and 20 are cached.*cache.crop\(-9\)"):
        model(prompt[:, :12], position_ids=torch.arange(12)[None], past_key_values=cache)
    cache.crop(-9)
    assert torch.equal(_greedy(model, cache, prompt[:, :12]), _greedy(model, None, prompt[:, :12]))


def test_use_cache_false(model):
    cache, prompt = exact_cache(model, full_rank_projections("llama")), random_tokens(1, 20)
    with pytest.raises(ValueError, match="bring all 21 tokens again, .* since use_cache=False was asked for"):
        _greedy(model, cache, prompt, use_cache=False)
    cache.reset()
    assert torch.equal(_greedy(model, cache, prompt), _greedy(model, None, prompt))


@pytest.mark.parametrize("columns", [3, 22])
def test_a_mask_that_is_too_short(model, filled, columns):
    mask = torch.ones(2, columns, dtype=torch.long)
    with Unchanged(model, filled):
        with pytest.raises(ValueError, match=f"attention_mask must have 23 columns, .* got {columns}"):
            model.model(random_tokens(2, 3), attention_mask=mask, position_ids=_next(3), past_key_values=filled)


def _recorded(track):
    saved = SavedTensors()
    track.save(saved)
    return saved["positions"].long()


def test_positions_of_several_axes():
    """M-RoPE's rows are one position if they are equal, and are refused if not."""
    track, device = PositionTrack(4, 2), torch.device("cpu")
    track.begin(2, 3, torch.arange(3).expand(4, 2, 3), None, device)
    assert torch.equal(_recorded(track), torch.arange(3).expand(2, 3))
    uneven = torch.arange(3, 6).expand(3, 2, 3) + torch.arange(3)[:, None, None]
    with pytest.raises(NotImplementedError, match="several positions for one token"):
        track.begin(2, 3, uneven, None, device)
    assert track.slots == 3


# What is right is taken, as DynamicCache takes it.


class _Both:
    """The same forwards with a ``DynamicCache`` and a ``LowRankCache`` that loses nothing."""

    def __init__(self, family, model=None):
        self.model = tiny_model(family) if model is None else model
        self.caches = [DynamicCache(config=self.model.config), exact_cache(self.model, full_rank_projections(family))]

    def __call__(self, tokens, mask=None, **options):
        """Compare logits wherever the mask shows the token."""
        given = {"inputs_embeds": tokens} if tokens.is_floating_point() else {"input_ids": tokens}
        with torch.no_grad():
            one, two = (
                self.model(**given, attention_mask=mask, past_key_values=cache, **options).logits
                for cache in self.caches
            )
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            seen = mask[:, -one.shape[1] :].bool()
            one, two = one[seen], two[seen]
        assert torch.isfinite(two).all()
        assert torch.allclose(one, two, rtol=0, atol=2e-3 * float(one.abs().max()))


def _masked(lengths, tokens):
    """A mask in which row ``i`` shows ``lengths[i]`` tokens: the first ones, or with a minus the last."""
    mask = torch.ones(len(lengths), tokens, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, slice(length, None) if length >= 0 else slice(0, tokens + length)] = 0
    return mask


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("counted", [True, False], ids=["positions of slots", "positions of tokens"])
def test_right_padding(family, counted):
    """Later tokens go on from what the row holds, or from the slot, as the caller counts."""
    both, mask = _Both(family), _masked([20, 13], 20)
    both(random_tokens(2, 20), mask)
    for step in range(12):
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        place = torch.tensor([[20], [20]]) + step if counted else mask.sum(1, keepdim=True) - 1
        both(random_tokens(2, 1, seed=step), mask, position_ids=place)


def test_rows_that_ended_early_and_are_hidden_later():
    both, mask = _Both("llama"), _masked([-20, -17], 20)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    both(random_tokens(2, 20), mask, position_ids=position)
    for step in range(8):  # row 1 generates padding from the third on, and nobody hides it
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        both(random_tokens(2, 1, seed=step), mask, position_ids=(mask.cumsum(1) - 1)[:, -1:])
    mask[1, 23:] = 0  # another turn, which counts again
    mask = torch.cat([mask, mask.new_ones(2, 6)], dim=1)
    both(random_tokens(2, 6, seed=20), mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, -6:])


def test_positions_that_count_padding():
    both, mask = _Both("llama"), _masked([-20, -13], 20)
    both(random_tokens(2, 20), mask)  # without position_ids the model counts slots
    for step in range(12):
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        both(random_tokens(2, 1, seed=step), mask)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("boolean", [True, False], ids=["bool", "float"])
def test_prepared_masks(family, boolean):
    """What the wrappers of vision-language models hand to their decoder: one mask, or one by kind of layer."""
    model = tiny_model(family, attn_implementation="sdpa" if boolean else "eager")
    both, mask, start = _Both(family, model), _masked([-20, -13], 20), 0
    for step, tokens in enumerate([20, *[1] * 8, 5, 1]):
        if step:
            mask = torch.cat([mask, mask.new_ones(2, tokens)], dim=1)
        position = (mask.cumsum(1) - 1).clamp(min=0)[:, start:]
        prepared = []
        for cache in both.caches:
            make = {
                "config": model.config, "inputs_embeds": torch.zeros(2, tokens, 64), "attention_mask": mask,
                "past_key_values": cache, "position_ids": position,
            }  # fmt: skip
            full = create_causal_mask(**make)
            kinds = {"full_attention": full}
            if family == "gemma3":
                kinds["sliding_attention"] = create_sliding_window_causal_mask(**make)
            prepared.append(kinds if family == "gemma3" else full)
        seen = mask[:, start:].bool()
        with torch.no_grad():
            one, two = (
                model.model(
                    random_tokens(2, tokens, seed=step), attention_mask=masks, position_ids=position,
                    past_key_values=cache,
                ).last_hidden_state[seen]
                for masks, cache in zip(prepared, both.caches, strict=True)
            )  # fmt: skip
        assert torch.allclose(one, two, rtol=0, atol=2e-3 * float(one.abs().max()))
        start += tokens


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_nothing_that_padding_holds_reaches_a_row(family):
    both = _Both(family)
    mask = _masked([-20, -13], 20)

    def poison(module, args, output):
        if output.shape[1] == 20:
            output = output.clone()
            output[1, :7] = float("nan")
        return output

    hooks = [layer.self_attn.k_proj.register_forward_hook(poison) for layer in both.model.model.layers]
    hooks += [layer.self_attn.v_proj.register_forward_hook(poison) for layer in both.model.model.layers]
    position = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        both.model(random_tokens(2, 20), attention_mask=mask, position_ids=position, past_key_values=both.caches[1])
    for hook in hooks:
        hook.remove()
    both.model(random_tokens(2, 20), attention_mask=mask, position_ids=position, past_key_values=both.caches[0])
    for step in range(12):
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        both(random_tokens(2, 1, seed=step), mask, position_ids=(mask.cumsum(1) - 1)[:, -1:])


def test_rounds_of_embeddings():
    both = _Both("llama")
    embed = both.model.get_input_embeddings()
    for seed, tokens in enumerate([20, 1, 7, 1, 1]):
        both(embed(random_tokens(2, tokens, seed=seed)))


@given(
    st.lists(st.tuples(st.integers(1, 6), st.lists(st.booleans(), min_size=12, max_size=12)), min_size=1, max_size=5)
)
@settings(deadline=None, max_examples=60)
def test_any_padding_anywhere_is_taken(rounds):
    """Whatever each round hides, positions of visible tokens that count slots, or visible tokens, are accepted."""
    for counted in (True, False):
        track, mask, device = PositionTrack(4, 2), torch.zeros(2, 0, dtype=torch.bool), torch.device("cpu")
        for tokens, shown in rounds:
            mask = torch.cat([mask, torch.tensor(shown[: 2 * tokens]).view(2, tokens)], dim=1)
            position = torch.arange(mask.shape[1]).expand(2, -1) if counted else (mask.cumsum(1) - 1).clamp(min=0)
            recorded = position[:, -tokens:]
            track.begin(2, tokens, recorded, mask.long(), device)
            assert torch.equal(_recorded(track)[:, -tokens:], torch.where(mask[:, -tokens:], recorded, PADDING))
