"""A property of many rooms: a full-rank LowRankCache generates what DynamicCache generates.

Every family, every generation mode. Sizes are so small (2 sinks, a window of 4, blocks of 3) that most cached tokens
are latents. Each mode runs three times: DynamicCache in float64 (the truth), DynamicCache in float32 (the reference)
and LowRankCache in float32. Tokens must be equal, logits within the tolerance of ``tests.oracle.tolerance``; what
transformers refuses with DynamicCache must be refused alike.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from lowrank_cache import LowRankCache
from tests.oracle.memory import base_tensors, reachable_tensors, storages
from tests.oracle.models import (
    FAMILIES,
    MORE_FAMILIES,
    SMALL_SIZES,
    VOCAB,
    exact_cache,
    full_rank_projections,
    random_tokens,
    tiny_model,
)
from tests.oracle.tolerance import assert_within_reference_error, rounding_band

PROMPT, NEW = 14, 12  # ends past the 24 tokens at which llama-dynamic and phi3 change their frequencies
MakeCache = Callable[[PreTrainedModel], Cache]


@dataclass(frozen=True)
class Outcome:
    """What a mode gave: token sequences and, where the mode reports them, the logits of each step."""

    sequences: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Refusal:
    """The error a mode ended with."""

    type: type
    message: str


def _dynamic(model: PreTrainedModel) -> Cache:
    return DynamicCache(config=model.config)


def _generate(model: PreTrainedModel, tokens: Tensor, cache: Cache, new: int = NEW, **options) -> Outcome:
    options = {"do_sample": False, "max_new_tokens": new, **options}
    result = model.generate(tokens, past_key_values=cache, return_dict_in_generate=True, output_logits=True, **options)
    # Speculative decoding reports a varying number of rows a step; beams report one tensor per step.
    return Outcome(result.sequences, torch.cat([step.flatten(0, -2) for step in result.logits]))


def _greedy(model, make: MakeCache) -> Outcome:
    return _generate(model, random_tokens(2, PROMPT), make(model))


def _sampling(model, make: MakeCache) -> Outcome:
    torch.manual_seed(3)
    return _generate(model, random_tokens(2, PROMPT), make(model), do_sample=True, temperature=0.8, top_k=20)


def _num_return_sequences(model, make: MakeCache) -> Outcome:
    torch.manual_seed(4)
    return _generate(model, random_tokens(2, PROMPT), make(model), do_sample=True, num_return_sequences=3)


def _beam_search(model, make: MakeCache) -> Outcome:
    return _generate(model, random_tokens(2, PROMPT), make(model), num_beams=3, num_return_sequences=2)


def _prompt_lookup(model, make: MakeCache) -> Outcome:
    # A repeating prompt makes proposals; the random model rejects most, so the cache is cropped.
    tokens = random_tokens(1, 5).repeat(1, 3)[:, :PROMPT]
    return _generate(model, tokens, make(model), prompt_lookup_num_tokens=3)


def _assisted_all_accepted(model, make: MakeCache) -> Outcome:
    # The assistant agrees with itself: every candidate is accepted and the cache is cropped by 0.
    return _assisted(model, make, copy.deepcopy(model))


def _assisted_some_rejected(model, make: MakeCache) -> Outcome:
    assistant = copy.deepcopy(model)
    noise = torch.Generator().manual_seed(1)
    for parameter in assistant.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=noise).to(parameter.dtype)
    return _assisted(model, make, assistant)


def _assisted(model, make: MakeCache, assistant) -> Outcome:
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    return _generate(model, random_tokens(1, PROMPT), make(model), assistant_model=assistant)


def _prefill_chunk_size(model, make: MakeCache) -> Outcome:
    return _generate(model, random_tokens(2, PROMPT), make(model), prefill_chunk_size=4)


def _chat(model, make: MakeCache) -> Outcome:
    cache = make(model)
    first = _generate(model, random_tokens(1, 6), cache, new=6)
    longer = torch.cat([first.sequences, random_tokens(1, 5, seed=9)], dim=1)
    second = _generate(model, longer, cache, new=6)
    return Outcome(second.sequences, torch.cat([first.logits, second.logits]))


def _prefix_reuse(model, make: MakeCache) -> Outcome:
    prefix = random_tokens(1, 11)
    cache = make(model)
    with torch.no_grad():
        model(prefix, past_key_values=cache)
    questions = [torch.cat([prefix, random_tokens(1, length, seed=length)], dim=1) for length in (1, 4)]
    # The first answer must leave the prefix as it was for the second.
    answers = [_generate(model, question, copy.deepcopy(cache), new=8) for question in questions]
    assert cache.get_seq_length() == prefix.shape[1]
    sequences = torch.cat([answer.sequences[:, -8:] for answer in answers])
    return Outcome(sequences, torch.cat([answer.logits for answer in answers]))


def _prefix_for_several(model, make: MakeCache) -> Outcome:
    prefix = random_tokens(1, 11)
    cache = make(model)
    with torch.no_grad():
        model(prefix, past_key_values=cache)
    cache.batch_repeat_interleave(3)
    torch.manual_seed(5)
    question = torch.cat([prefix, random_tokens(1, 3, seed=1)], dim=1)
    return _generate(model, question, cache, do_sample=True, num_return_sequences=3, new=8)


def _left_padded(model, make: MakeCache) -> Outcome:
    return _generate(model, **_padded_prompts(), cache=make(model))


def _left_padded_beams(model, make: MakeCache) -> Outcome:
    return _generate(model, **_padded_prompts(), cache=make(model), num_beams=2, new=8)


def _left_padded_chunks(model, make: MakeCache) -> Outcome:
    # Whole chunks of one row are padding.
    return _generate(model, **_padded_prompts(), cache=make(model), prefill_chunk_size=4, new=6)


def _reset_and_reuse(model, make: MakeCache) -> Outcome:
    cache = make(model)
    _generate(model, random_tokens(3, 10, seed=8), cache, new=6)
    cache.reset()
    return _generate(model, random_tokens(2, PROMPT), cache)


PROMPT_LENGTHS = (13, 1, 5, 10)


def _padded_prompts() -> dict[str, Tensor]:
    longest = max(PROMPT_LENGTHS)
    tokens = torch.zeros(len(PROMPT_LENGTHS), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, length in enumerate(PROMPT_LENGTHS):
        tokens[row, longest - length :] = random_tokens(1, length, seed=20 + row)[0]
        mask[row, longest - length :] = 1
    return {"tokens": tokens, "attention_mask": mask}


MODES = {
    mode.__name__.strip("_"): mode
    for mode in (
        _greedy,
        _sampling,
        _num_return_sequences,
        _beam_search,
        _prompt_lookup,
        _assisted_all_accepted,
        _assisted_some_rejected,
        _prefill_chunk_size,
        _chat,
        _prefix_reuse,
        _prefix_for_several,
        _left_padded,
        _left_padded_beams,
        _left_padded_chunks,
        _reset_and_reuse,
    )
}

MORE_MODES = ["left_padded", "beam_search", "prompt_lookup"]


@functools.cache
def _stock(family: str, mode: str, dtype: torch.dtype, attn_implementation: str | None) -> Outcome | Refusal:
    """What a mode gives, or how it ends, with DynamicCache."""
    try:
        return MODES[mode](tiny_model(family, dtype, attn_implementation), _dynamic)
    except Exception as error:  # whatever it is, our cache must meet the same
        return Refusal(type(error), str(error))


def stock_refusals(family: str, modes: list[str]) -> list[str]:
    """Those of ``modes`` that transformers refuses for a family with DynamicCache."""
    return [mode for mode in modes if isinstance(_stock(family, mode, torch.float32, None), Refusal)]


def compare(family: str, mode: str, make: MakeCache, band: float, attn_implementation: str | None = None) -> None:
    """Run one mode with both caches and compare tokens and logits, or refusals."""
    stock = _stock(family, mode, torch.float32, attn_implementation)
    model = tiny_model(family, attn_implementation=attn_implementation)
    if isinstance(stock, Refusal):
        with pytest.raises(stock.type) as refusal:
            MODES[mode](model, make)
        assert str(refusal.value) == stock.message
        pytest.skip(f"transformers refuses this with DynamicCache too: {stock.message.splitlines()[0][:200]}")
    ours = MODES[mode](model, make)
    assert torch.equal(ours.sequences, stock.sequences)
    truth = _stock(family, mode, torch.float64, attn_implementation)
    assert torch.equal(truth.sequences, stock.sequences), "float32 rounding alone changes tokens: choose another seed"
    assert_within_reference_error(ours.logits, stock.logits, truth.logits, band)


def reconstructing(family: str) -> MakeCache:
    """Makes caches that reconstruct keys and values; ``test_attention`` runs the same with attention over latents."""
    projections = full_rank_projections(family)
    return lambda model: exact_cache(model, projections, attend="reconstruct")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_mode_equals_dynamic_cache(family, mode):
    compare(family, mode, reconstructing(family), rounding_band(family))


@pytest.mark.parametrize("mode", MORE_MODES)
@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_more_families_equal_dynamic_cache(family, mode):
    compare(family, mode, reconstructing(family), rounding_band(family))


@pytest.mark.parametrize("mode", ["left_padded", "prompt_lookup"])
@pytest.mark.parametrize(
    "layer_group_size, joint",
    [(1, True), (1, False), (2, True), (2, False), (3, True), ((1, 3), False)],
    ids=lambda option: ("joint" if option else "apart") if isinstance(option, bool) else str(option),
)
@pytest.mark.parametrize("frame_length", [1, 4, 16])
@pytest.mark.parametrize(
    "family, attend",
    [(family, attend) for family in ("llama", "gemma3") for attend in ("auto", "reconstruct")]
    + [("deepseek-v3", "reconstruct")],
)
def test_frames_and_layer_groups_equal_dynamic_cache(family, attend, frame_length, layer_group_size, joint, mode):
    options = (frame_length, layer_group_size, joint)
    projections = full_rank_projections(family, *options)
    compare(family, mode, lambda model: exact_cache(model, projections, attend=attend), rounding_band(family, *options))


@pytest.mark.parametrize("mode", ["left_padded", "beam_search", "prefill_chunk_size"])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("attend", ["auto", "reconstruct"])
def test_attention_implementations_equal_dynamic_cache(attend, attn_implementation, mode):
    projections = full_rank_projections("llama")
    compare(
        "llama",
        mode,
        lambda model: exact_cache(model, projections, attend=attend),
        rounding_band("llama"),
        attn_implementation=attn_implementation,
    )


def _forced(model: PreTrainedModel, cache: Cache, tokens: Tensor, chunks: list[int], **options) -> Tensor:
    """Logits ``[batch, tokens, vocab]`` of given tokens, fed to the model in chunks."""
    assert sum(chunks) == tokens.shape[1]
    with torch.no_grad():
        return torch.cat(
            [model(chunk, past_key_values=cache, **options).logits for chunk in tokens.split(chunks, dim=1)], dim=1
        )


FORCED = 22  # below the 24 tokens at which llama-dynamic and phi3 change their frequencies


def _chunks(prompt: int) -> list[int]:
    """A prompt, then chunks of 1, 1, 3 and 5, then single tokens, ``FORCED`` tokens in all."""
    chunks = [prompt]
    for chunk in (1, 1, 3, 5):
        if sum(chunks) + chunk <= FORCED:
            chunks.append(chunk)
    return chunks + [1] * (FORCED - sum(chunks))


def _check_chunkings(family: str, prompts: range, **sizes) -> None:
    tokens = random_tokens(1, FORCED, seed=2)
    exact = tiny_model(family, torch.float64)
    truth = _forced(exact, _dynamic(exact), tokens, [FORCED])
    model = tiny_model(family)
    reference = _forced(model, _dynamic(model), tokens, [1] * FORCED)
    for prompt in prompts:
        cache = exact_cache(model, full_rank_projections(family), **sizes)
        logits = _forced(model, cache, tokens, _chunks(prompt))
        # Attention over latents joins segments, which rounds once more.
        band = rounding_band(family) * (1 if sizes.get("attend") == "reconstruct" else 1.5)
        assert_within_reference_error(logits, reference, truth, band)
        assert all(group.tokens > 0 for group in cache.groups()), "nothing was compressed, nothing was tested"


@pytest.mark.parametrize("attend", ["auto", "reconstruct"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_prompt_length_around_sinks_window_and_block(family, attend):
    # 2 sinks, 6 with the window, 9 when the first block is encoded, 12 the second.
    _check_chunkings(family, range(1, sum(SMALL_SIZES.values()) + 5), attend=attend)


@pytest.mark.parametrize("sinks, residual, block", [(0, 0, 1), (0, 5, 4), (3, 0, 2), (1, 1, 1), (5, 2, 7)])
@pytest.mark.parametrize("attend", ["auto", "reconstruct"])
def test_every_prompt_length_with_other_sizes(sinks, residual, block, attend):
    sizes = {"num_sink_tokens": sinks, "residual_length": residual, "block_size": block, "attend": attend}
    _check_chunkings("llama", range(1, sinks + residual + block + 3), **sizes)


@pytest.mark.parametrize("attend", ["auto", "reconstruct"])
@pytest.mark.parametrize("family", FAMILIES)
def test_row_of_padded_batch_equals_row_alone(family, attend):
    new = 8  # ends below 24 tokens: a dynamic rotary embedding turns all rows by the longest one's length
    model = tiny_model(family)
    cache = exact_cache(model, full_rank_projections(family), attend=attend)
    batch = _generate(model, **_padded_prompts(), cache=cache, new=new)
    stock = _generate(model, **_padded_prompts(), cache=_dynamic(model), new=new)
    logits, stock_logits = (outcome.logits.view(new, len(PROMPT_LENGTHS), VOCAB) for outcome in (batch, stock))
    for row, length in enumerate(PROMPT_LENGTHS):
        prompt = random_tokens(1, length, seed=20 + row)
        truth, alone = (
            _generate(model, prompt, _dynamic(model), new=new)
            for model in (tiny_model(family, torch.float64), tiny_model(family))
        )
        assert torch.equal(batch.sequences[row, -new:], alone.sequences[0, -new:])
        # transformers' own layers round a batch differently from a row alone too; the worse of both is the measure.
        references = (alone.logits, stock_logits[:, row])
        worse = max(references, key=lambda reference: float((reference - truth.logits).abs().max()))
        assert_within_reference_error(logits[:, row], worse, truth.logits, rounding_band(family))


def test_padding_is_found_without_position_ids():
    # A plain forward with a mask alone: transformers then counts positions from the first slot, padding included.
    prompts = _padded_prompts()
    tokens, mask = prompts["tokens"], prompts["attention_mask"]
    logits = []
    for dtype, make in ((torch.float64, _dynamic), (torch.float32, _dynamic), (torch.float32, None)):
        model = tiny_model("llama", dtype)
        cache = make(model) if make else exact_cache(model, full_rank_projections("llama"))
        steps = [model(tokens, attention_mask=mask, past_key_values=cache).logits[:, -1]]
        for step in range(8):
            grown = torch.nn.functional.pad(mask, (0, step + 1), value=1)
            following = random_tokens(len(tokens), 1, seed=step)
            steps.append(model(following, attention_mask=grown, past_key_values=cache).logits[:, -1])
        logits.append(torch.stack(steps))
    truth, reference, actual = logits
    assert_within_reference_error(actual, reference, truth, rounding_band("llama"))


def test_padding_between_the_turns_of_a_batched_chat():
    # Row 0 says 5 tokens, then 6; row 1 says 9, then 2: both turns are padded to the longer one.
    tokens = random_tokens(2, 15)
    mask = torch.ones_like(tokens)
    mask[0, :4] = mask[1, 9:13] = 0

    def logits(model, cache) -> Tensor:
        parts, stop = [], 0
        with torch.no_grad():
            for chunk in (9, 6, 1, 1, 1, 1, 1, 1):
                start, stop = stop, stop + chunk
                grown = torch.nn.functional.pad(mask, (0, max(0, stop - 15)), value=1)[:, :stop]
                following = torch.nn.functional.pad(tokens, (0, max(0, stop - 15)), value=17)
                positions = (grown.cumsum(1) - 1).clamp(min=0)
                chunk_logits = model(
                    following[:, start:stop],
                    attention_mask=grown,
                    position_ids=positions[:, start:stop],
                    past_key_values=cache,
                ).logits
                parts.append(chunk_logits[grown[:, start:stop].bool()])
        return torch.cat(parts)

    exact, model = tiny_model("llama", torch.float64), tiny_model("llama")
    cache = exact_cache(model, full_rank_projections("llama"))
    actual, reference, truth = logits(model, cache), logits(model, _dynamic(model)), logits(exact, _dynamic(exact))
    assert_within_reference_error(actual, reference, truth, rounding_band("llama"))


def test_sinks_and_window_of_padded_rows_come_back_exactly(monkeypatch):
    # Two channels of 32 lose nearly everything between sinks and window. Layer 0 does not depend on the past.
    returned = {}
    update = LowRankCache.update

    def noted(cache, key_states, value_states, layer_idx, *args, **kwargs):
        returned[layer_idx] = update(cache, key_states, value_states, layer_idx, *args, **kwargs)
        return returned[layer_idx]

    monkeypatch.setattr(LowRankCache, "update", noted)
    model = tiny_model("llama")
    stock = _dynamic(model)
    sinks, window = SMALL_SIZES["num_sink_tokens"], SMALL_SIZES["residual_length"]
    prompts = _padded_prompts()
    ours = LowRankCache(model, full_rank_projections("llama"), ranks=2, attend="reconstruct", **SMALL_SIZES)
    for cache in (ours, stock):
        _generate(model, **prompts, cache=cache, sequence_bias={(17,): 1e4})  # the same tokens for both
    for ours, theirs in zip(returned[0], (stock.layers[0].keys, stock.layers[0].values), strict=True):
        for row, length in enumerate(PROMPT_LENGTHS):
            first = max(PROMPT_LENGTHS) - length
            exact = (ours[row] == theirs[row]).all(-1).all(0)  # [tokens]
            assert exact[first : first + sinks].all() and exact[-window:].all()
            assert not exact[first + sinks : -window - SMALL_SIZES["block_size"]].any()


@pytest.mark.parametrize("attend", ["auto", "reconstruct"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "deepseek-v3"])
def test_lossy_padded_rows_are_as_good_as_rows_alone(family, attend):
    projections = full_rank_projections(family)
    tokens, lengths = random_tokens(3, 60, seed=6), (60, 57, 48)
    mask = torch.ones_like(tokens)
    for row, length in enumerate(lengths):
        mask[row, : 60 - length] = 0
    model = tiny_model(family)

    def logits(cache, tokens, mask) -> Tensor:
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        steps = []
        with torch.no_grad():
            for slot in range(0, 60, 2):
                chunk = slice(slot, slot + 2)
                stop = slot + 2
                out = model(
                    tokens[:, chunk],
                    attention_mask=mask[:, :stop],
                    position_ids=positions[:, chunk],
                    past_key_values=cache,
                )
                steps.append(out.logits)
        return torch.cat(steps, dim=1)

    def lossy() -> LowRankCache:
        return LowRankCache(model, projections, compression_ratio=3, attend=attend, **SMALL_SIZES)

    batch_error = logits(lossy(), tokens, mask) - logits(_dynamic(model), tokens, mask)
    for row, length in enumerate(lengths):
        # Blocks end at other tokens than in the batch, so errors agree in size and not in value.
        alone_tokens = torch.nn.functional.pad(tokens[row : row + 1, 60 - length :], (0, 60 - length), value=1)
        alone_mask = torch.ones_like(alone_tokens)
        alone_error = logits(lossy(), alone_tokens, alone_mask) - logits(_dynamic(model), alone_tokens, alone_mask)
        padded_size = float(batch_error[row, -length:].square().mean())
        alone_size = float(alone_error[0, :length].square().mean())
        assert 0.5 < padded_size / alone_size < 2, (row, padded_size, alone_size)


@pytest.mark.parametrize("attend", ["auto", "reconstruct"])
@pytest.mark.parametrize("frame_length", [1, 4])
@pytest.mark.parametrize("family", ["llama-dynamic", "phi3"])
def test_frequencies_that_change_with_length(family, frame_length, attend):
    # 24 is the switch. Keys keep the frequencies of the forward that made them, as in DynamicCache.
    tokens = random_tokens(1, 44, seed=2)
    for chunks in ([10, 10, *[1] * 24], [21, 1, 5, 5, *[1] * 12], [30, *[1] * 14]):
        exact, model = tiny_model(family, torch.float64), tiny_model(family)
        truth = _forced(exact, _dynamic(exact), tokens, chunks)
        reference = _forced(model, _dynamic(model), tokens, chunks)
        model = tiny_model(family)
        cache = exact_cache(model, full_rank_projections(family, frame_length), attend=attend)
        logits = _forced(model, cache, tokens, chunks)
        assert_within_reference_error(logits, reference, truth, rounding_band(family, frame_length))


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek-v3"])
def test_bfloat16_model_gets_its_very_states_back(family):
    # Latents in float32 carry a bfloat16 state so well that rounding the reconstruction restores every bit.
    model = tiny_model(family, torch.bfloat16)
    stock = _left_padded(model, _dynamic)
    projections = full_rank_projections(family)
    ours = _left_padded(
        model,
        lambda model: exact_cache(model, projections, attend="reconstruct", latent_dtype=torch.float32),
    )
    assert torch.equal(ours.sequences, stock.sequences)
    assert torch.equal(ours.logits, stock.logits)


@pytest.mark.parametrize("attend", ["auto", "reconstruct"])
def test_float64_model_works(attend):
    # Latents keep float32 accuracy in any dtype; the logits show it.
    tokens = random_tokens(1, FORCED, seed=2)
    exact = tiny_model("llama", torch.float64)
    truth = _forced(exact, _dynamic(exact), tokens, [FORCED])
    cache = exact_cache(exact, full_rank_projections("llama"), attend=attend)
    logits = _forced(exact, cache, tokens, _chunks(5))
    # The bases were found in float32 as well: two independent roundings of one size.
    assert_within_reference_error(logits, truth, truth, 2**0.5 * rounding_band("llama"))


def test_deepcopy_shares_bases_and_nothing_else():
    model = tiny_model("llama")
    cache = exact_cache(model, full_rank_projections("llama"))
    with torch.no_grad():
        model(random_tokens(2, 14), past_key_values=cache)
    copied = copy.deepcopy(cache)
    assert storages(base_tensors(cache)) == storages(base_tensors(copied)) != set()
    ours, theirs = (reachable_tensors(each) for each in (cache, copied))
    assert len(storages([*ours, *theirs])) == len(ours) + len(theirs) > 0
    assert copied.stored_bytes() == cache.stored_bytes() and copied.projection_bytes() == cache.projection_bytes()
    with torch.no_grad():  # both serve the same model, and no other
        first, second = (model(random_tokens(2, 3), past_key_values=each).logits for each in (cache, copied))
    assert torch.equal(first, second)


def test_cache_made_with_a_model_serves_its_forward_under_autograd():
    # Without torch.no_grad a stock cache holds graph tensors that deepcopy refuses; ours holds detached ones.
    model = tiny_model("llama").requires_grad_(True)
    cache = exact_cache(model, full_rank_projections("llama"))
    model(random_tokens(1, 14), past_key_values=cache)
    copied = copy.deepcopy(cache)
    assert copied.get_seq_length() == 14


def test_phi3_generate_leaves_any_cache_at_the_switch():
    # Phi3's prepare_inputs_for_generation drops the cache there, whatever its class; said in docs/limits.md.
    model = tiny_model("phi3")
    caches = [_dynamic(model), exact_cache(model, full_rank_projections("phi3"))]
    for cache in caches:
        _generate(model, random_tokens(1, PROMPT), cache, new=16)
        assert cache.get_seq_length() == 24
