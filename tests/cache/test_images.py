"""Vision-language models: wrappers that hand on embeddings and masks, and M-RoPE, where a token has three positions."""

import copy

import pytest
import torch
from transformers import DynamicCache

from lowrank_cache import LowRankCache
from lowrank_cache.positions import PositionTrack
from lowrank_cache.probe import model_shape, position_axes
from tests.oracle.models import (
    M_ROPE,
    WITH_IMAGES,
    exact_cache,
    full_rank_projections,
    image_inputs,
    random_tokens,
    tiny_model,
)

# Rotations and products in float32, over all layers, of logits of about 4.
NOISE = 1e-4
IN_TURN = {
    "qwen2-vl": (0, 0, 1, 1, 1, 2, 2, 2),
    "qwen2.5-vl": (0, 0, 1, 1, 1, 2, 2, 2),
    "qwen3-vl": (0, 1, 2, 0, 1, 2, 0, 0),
    "qwen3.5": (0, 1, 2, 0),
    "glm4v": (0, 0, 1, 1, 1, 2, 2, 2),
}


def _generate(model, cache, inputs, new=14, **options):
    options = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False, **options}
    output = model.generate(**inputs, past_key_values=cache, max_new_tokens=new, **options)
    return output.sequences, torch.stack(output.logits)


def _dynamic(model):
    return DynamicCache(config=model.config.get_text_config(decoder=True))


def _assert_same(one, two):
    assert torch.equal(one[0], two[0])
    assert torch.allclose(one[1], two[1], rtol=0, atol=NOISE)


@pytest.mark.parametrize("family", M_ROPE)
def test_axes_are_those_of_the_model(family):
    found = position_axes(tiny_model(family))
    assert found.count == 3 and found.of_pairs == {"rotary_emb.inv_freq": IN_TURN[family]}


def test_other_models_have_one_position():
    assert position_axes(tiny_model("llama")).count == 1


@pytest.mark.parametrize("family", WITH_IMAGES)
@pytest.mark.parametrize("attend, frame_length", [("auto", 1), ("auto", 4), ("reconstruct", 4)])
def test_text_after_an_image(family, attend, frame_length):
    model = tiny_model(family)
    inputs, cache = image_inputs(model), exact_cache(model, full_rank_projections(family, frame_length), attend=attend)
    _assert_same(_generate(model, _dynamic(model), inputs), _generate(model, cache, inputs))
    assert min(group.tokens for group in cache.groups()) > 12  # the image lies in the latents


@pytest.mark.parametrize("family", M_ROPE)
def test_tables_are_those_of_the_model(family):
    """A cache with other tables would read back what it stored all the same, but compress it badly."""
    model = tiny_model(family)
    decoder, rope, device = model.get_decoder(), model_shape(model).layers[0].key.rope, torch.device("cpu")
    positions = torch.randint(0, 50, (3, 2, 12), generator=torch.Generator().manual_seed(0))
    track = PositionTrack(1, 0, position_axes(model))
    for start, stop in ((0, 5), (5, 12)):
        track.begin(2, stop - start, positions[:, :, start:stop], None, device)
        track.note_frequencies(decoder, rope, start)
    for ours, theirs in zip(
        track.frames(rope, 0, 12, device).tables(),
        decoder.rotary_emb(torch.zeros(1), positions),
        strict=True,
    ):
        by_pair = theirs[..., ::2] if rope.layout == "interleaved" else theirs[..., : ours.shape[2]]
        assert torch.allclose(ours, by_pair, rtol=0, atol=1e-5)


def _next_turn(inputs, sequences):
    """A second question about the same image, which lies in the cache."""
    new = random_tokens(2, 5, seed=3)
    mask = torch.nn.functional.pad(
        inputs["attention_mask"], (0, sequences.shape[1] + 5 - inputs["input_ids"].shape[1]), value=1
    )
    return {"input_ids": torch.cat([sequences, new], dim=1), "attention_mask": mask}


@pytest.mark.parametrize("family", ["qwen2.5-vl", "qwen3-vl", "qwen3.5", "gemma3-vl", "llava", "paligemma"])
def test_a_second_turn(family, tmp_path):
    """On the cache, on a copy, and on one that was saved and loaded."""
    model, projections = tiny_model(family), full_rank_projections(family, 4)
    inputs, outputs = image_inputs(model), []
    for cache in (_dynamic(model), exact_cache(model, projections)):
        with torch.no_grad():
            sequences, _ = _generate(model, cache, inputs)
        caches = [cache, copy.deepcopy(cache)]
        if isinstance(cache, LowRankCache):
            cache.save_pretrained(tmp_path)
            caches.append(LowRankCache.from_pretrained(tmp_path, model, projections))
        outputs += [_generate(model, each, _next_turn(inputs, sequences)) for each in caches]
    for other in outputs[1:]:
        _assert_same(outputs[0], other)


def test_beams():
    model, family = tiny_model("qwen2.5-vl"), "qwen2.5-vl"
    one, two = (
        _generate(model, cache, image_inputs(model), num_beams=3)[0]
        for cache in (_dynamic(model), exact_cache(model, full_rank_projections(family, 4)))
    )
    assert torch.equal(one, two)


@pytest.mark.parametrize("rows", [3, 4], ids=["axes alone", "a row for the mask"])
def test_crop_into_an_image_and_order(rows):
    """Positions follow each other where they are equal on all axes."""
    model, family = tiny_model("qwen3-vl"), "qwen3-vl"
    cache, decoder = exact_cache(model, full_rank_projections(family, 4)), model.get_decoder()
    height, width = torch.arange(6) // 3, torch.arange(6) % 3
    axes = torch.stack([torch.full((6,), 4), 4 + height, 4 + width])
    text = torch.arange(4).expand(3, 4)
    positions = torch.cat([text, axes, 7 + text, 11 + text], dim=1)
    if rows == 4:
        positions = torch.cat([torch.arange(18)[None], positions])
    plain = _dynamic(model)

    def both(start, stop, shift=0):
        place = positions[:, None, start:stop] + shift
        with torch.no_grad():
            one, two = (
                decoder(random_tokens(1, 18)[:, start:stop], position_ids=place, past_key_values=each).last_hidden_state
                for each in (plain, cache)
            )
        assert torch.allclose(one, two, rtol=0, atol=NOISE)

    both(0, 14)
    for each in (plain, cache):
        each.crop(-7)  # into the image
    both(7, 14)
    with pytest.raises(ValueError, match="position_ids must continue the cached tokens"):
        decoder(random_tokens(1, 4), position_ids=positions[:, None, 14:] + 1, past_key_values=cache)
    assert cache.get_seq_length() == 14
    for at in range(14, 18):
        both(at, at + 1)


def test_several_positions_that_nobody_understands():
    model = tiny_model("llama")
    cache = exact_cache(model, full_rank_projections("llama"))
    arguments = {"input_ids": random_tokens(1, 3), "position_ids": torch.arange(9).view(3, 1, 3)}
    with pytest.raises(NotImplementedError, match="several positions for one token"):
        cache.begin_forward(model.get_decoder(), arguments)
    assert cache.get_seq_length() == 0
