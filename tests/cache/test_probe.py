"""What the probe finds in a model: early refusals, and how keys were rotated, in every family.

Encoded keys must be the model's own keys before its rotary function.

Full-rank equality cannot show this: whatever the un-rotation does, re-rotating undoes it. So the
rotary function of each modeling file is spied on, and what the cache encodes in frames of one slot is
compared with the function's input: equal up to one permutation of a head's numbers (DeepSeek-V3 hands
over its interleaved pairs as halves) and the factor that YaRN and longrope leave in the key. Planted
faults must fail the comparison.
"""

import dataclasses
import sys
from collections import defaultdict

import pytest
import torch
from torch import Tensor

from lowrank_cache import LowRankCache
from lowrank_cache.calibration import calibrate
from lowrank_cache.calibration.moments import Moments
from lowrank_cache.kernels.rope import LAYOUTS, angle_tables, rotate
from lowrank_cache.probe import model_shape
from lowrank_cache.shapes import RopeShape, rope_buffer
from tests.oracle.inside import (
    change_ropes,
    keep_first_frequencies,
    plant_frequencies,
    shift_positions,
    watch_encoding,
)
from tests.oracle.models import (
    FAMILIES,
    MORE_FAMILIES,
    REFUSED,
    SMALL_SIZES,
    exact_cache,
    full_rank_projections,
    random_tokens,
    tiny_model,
)
from tests.oracle.states import saved_facts, saved_tensors
from tests.oracle.tolerance import assert_equal_up_to_rotation_rounding
from tests.tools.support_table import refusal_of

SINKS = SMALL_SIZES["num_sink_tokens"]
SWITCH = 24  # tokens after which llama-dynamic and phi3 change their frequencies


class Spy:
    """Notes, per layer, what the model's rotary function is given and what the cache encodes.

    Attributes:
        inputs: Keys before the rotary function, per layer ``[batch, heads, slots, head_dim]``.
        encoded: What is encoded, in its frames, per side and layer, ``[batch, heads, encoded_slots, head_dim]``.
        updates: What ``LowRankCache.update`` was given, per side and layer, all slots.
    """

    def __init__(self, monkeypatch, model):
        self.inputs: dict[int, Tensor] = {}
        self.encoded: dict[tuple[str, int], Tensor] = {}
        self.updates: dict[tuple[str, int], Tensor] = {}
        self._layer = None
        module = sys.modules[type(model).__module__]
        names = [name for name in vars(module) if name.startswith("apply_rotary_pos_emb")]
        assert names, f"{module.__name__} has no rotary function to spy on"
        for name in names:
            monkeypatch.setattr(module, name, self._spied(getattr(module, name)))
        for submodule in model.modules():
            if hasattr(submodule, "layer_idx"):
                submodule.register_forward_pre_hook(self._enter)
        self._patch_cache(monkeypatch)

    def _enter(self, module, args) -> None:
        self._layer = module.layer_idx

    def _spied(self, function):
        def spied(query, key, *args, **kwargs):
            _append(self.inputs, self._layer, key)
            return function(query, key, *args, **kwargs)

        return spied

    def _patch_cache(self, monkeypatch) -> None:
        update = LowRankCache.update

        def note(members, states):
            for (layer, side), part in zip(members, states, strict=True):
                _append(self.encoded, (side, layer), part)

        def spied_update(cache, key_states, value_states, layer_idx, *args, **kwargs):
            _append(self.updates, ("key", layer_idx), key_states)
            _append(self.updates, ("value", layer_idx), value_states)
            return update(cache, key_states, value_states, layer_idx, *args, **kwargs)

        watch_encoding(monkeypatch, note)
        monkeypatch.setattr(LowRankCache, "update", spied_update)


def _append(kept: dict, key, states: Tensor) -> None:
    kept[key] = torch.cat([kept[key], states.detach().clone()], dim=2) if key in kept else states.detach().clone()


def _feed(model, cache, tokens: Tensor, mask: Tensor | None = None) -> None:
    """A prompt of 10 tokens, then chunks of 1 and 3 in turn, so that blocks end anywhere in them."""
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    start = 0
    for step in range(tokens.shape[1]):
        stop = min(start + (10 if step == 0 else 1 + 2 * (step % 2)), tokens.shape[1])
        options = {}
        if mask is not None:
            options = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        with torch.no_grad():
            model(tokens[:, start:stop], past_key_values=cache, **options)
        start = stop
        if stop == tokens.shape[1]:
            return


def _left_padded(tokens: int) -> tuple[Tensor, Tensor]:
    """Three rows with 0, 3 and 7 pads before them."""
    ids, mask = random_tokens(3, tokens), torch.ones(3, tokens, dtype=torch.long)
    mask[1, :3] = mask[2, :7] = 0
    return ids * mask, mask


def _rows(states: Tensor, chosen: Tensor) -> Tensor:
    """``[batch, heads, slots, head_dim]`` → ``[chosen slots * heads, head_dim]``; ``chosen`` ``[batch, slots]``."""
    return states.transpose(1, 2)[chosen].flatten(0, 1)


def _permutation(inputs: Tensor, encoded: Tensor, factors: Tensor) -> Tensor:
    """For each number of the encoded head, the number of the input head that it is ``factors`` times."""
    distances = (encoded.T[:, None] - factors[:, None, None] * inputs.T[None]).abs().amax(-1)
    permutation = distances.argmin(1)
    assert sorted(permutation.tolist()) == list(range(inputs.shape[1])), "encoded keys are no permutation of the input"
    return permutation


def _factors(model, rope: RopeShape, head_dim: int) -> Tensor:
    """What the model's cosine and sine tables multiply each number of a key by, besides rotating it."""
    rotary = model.get_decoder().get_submodule(rope.source.rpartition(".")[0])
    factors = torch.ones(head_dim)
    factors[: rope.rotary_dim] = getattr(rotary, "attention_scaling", 1.0)
    return factors


def _check_cache(model, spy: Spy, mask: Tensor | None = None) -> dict[tuple[str, int], Tensor]:
    """Compare every rotary side of every compressed layer; returns the permutations found."""
    permutations = {}
    for layer in model_shape(model).layers:
        for side in ("key", "value"):
            shape, where = layer.side(side), (side, layer.layer_idx)
            encoded = spy.encoded[where]
            slots = slice(SINKS, SINKS + encoded.shape[2])
            batch = encoded.shape[0]
            chosen = torch.ones(batch, encoded.shape[2], dtype=torch.bool) if mask is None else mask[:, slots].bool()
            if shape.rope is None:
                assert torch.equal(encoded, spy.updates[where][:, :, slots]), f"{where} must be left as it came"
                continue
            source = _rows(spy.inputs[layer.layer_idx][:, :, slots], chosen)
            seen = _rows(encoded, chosen)
            factors = _factors(model, shape.rope, shape.head_dim)
            # From the first rows alone, then checked on all: the permutation is one for all tokens and heads.
            permutation = _permutation(source[:12], seen[:12], factors)
            assert_equal_up_to_rotation_rounding(seen, source[:, permutation] * factors)
            permutations[where] = permutation
    return permutations


def _run(monkeypatch, family: str, tokens: int, padded: bool = False, sabotage=None, joint=None) -> dict:
    projections = full_rank_projections(family, joint=joint)
    model = tiny_model(family)
    cache = exact_cache(model, projections)
    if sabotage is not None:
        sabotage(cache)
    spy = Spy(monkeypatch, model)
    ids, mask = _left_padded(tokens) if padded else (random_tokens(2, tokens), None)
    _feed(model, cache, ids, mask)
    return _check_cache(model, spy, mask)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left_padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_encoded_keys_are_the_rotary_functions_input(monkeypatch, family, padded):
    permutations = _run(monkeypatch, family, 22, padded)
    sides = {side for side, _ in permutations}
    if family == "cohere2":
        assert not sides  # its full-attention layers have no rotary embedding, and are checked to be untouched
    elif family.startswith("deepseek"):
        assert sides == {"value"}  # MLA hands its rotary key over as values
    else:
        assert sides == {"key"}
    for permutation in permutations.values():
        count = len(permutation)
        pairs_to_halves = torch.arange(count).view(-1, 2).T.flatten()
        expected = pairs_to_halves if family.startswith("deepseek") else torch.arange(count)
        assert torch.equal(permutation, expected)


@pytest.mark.parametrize("joint", [False, True], ids=["apart", "joint"])
@pytest.mark.parametrize("family", ["llama", "qwen3-next", "deepseek-v3"])
def test_keys_are_un_rotated_with_their_values_and_apart_from_them(monkeypatch, family, joint):
    (side,) = {side for side, _ in _run(monkeypatch, family, 22, padded=True, joint=joint)}
    assert side == ("value" if family == "deepseek-v3" else "key")


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left_padded"])
@pytest.mark.parametrize("family", ["llama-dynamic", "phi3"])
def test_keys_leave_with_the_frequencies_they_came_with(monkeypatch, family, padded):
    # Tokens before the switch are encoded after it, since the window holds them back.
    _run(monkeypatch, family, SWITCH + 20, padded)


ROTARY = [family for family in FAMILIES if family != "cohere2"]


def _other_layout(cache: LowRankCache) -> None:
    def change(side: str, rope: RopeShape | None) -> RopeShape | None:
        return rope and dataclasses.replace(rope, layout=next(layout for layout in LAYOUTS if layout != rope.layout))

    change_ropes(cache, change)


@pytest.mark.parametrize("sabotage", [_other_layout, shift_positions], ids=["layout", "position"])
@pytest.mark.parametrize("family", ROTARY)
def test_planted_fault_is_found(monkeypatch, family, sabotage):
    with pytest.raises(AssertionError, match="permutation|differ"):
        _run(monkeypatch, family, 22, sabotage=sabotage)


def test_planted_rotation_of_a_layer_without_rotary_embedding_is_found(monkeypatch):
    def rotate_anyway(cache):
        rope = RopeShape("interleaved", 16, "rotary_emb.inv_freq", False)
        change_ropes(cache, lambda side, _: rope if side == "key" else None)
        plant_frequencies(cache, "rotary_emb.inv_freq", torch.ones(8))

    with pytest.raises(AssertionError, match="must be left as it came"):
        _run(monkeypatch, "cohere2", 22, sabotage=rotate_anyway)


@pytest.mark.parametrize("family", ["llama-dynamic", "phi3"])
def test_planted_frequencies_of_another_forward_are_found(monkeypatch, family):
    keep_first_frequencies(monkeypatch)
    with pytest.raises(AssertionError, match="permutation|differ"):
        _run(monkeypatch, family, SWITCH + 20)


@pytest.mark.parametrize("frame_length", [4, 16])
@pytest.mark.parametrize("family", ["llama", "llama-yarn", "glm4", "phi3", "deepseek-v3"])
def test_frames_keep_the_rotation_within_the_frame(monkeypatch, family, frame_length):
    model = tiny_model(family)
    cache = exact_cache(model, full_rank_projections(family, frame_length))
    spy = Spy(monkeypatch, model)
    ids, mask = _left_padded(22)
    _feed(model, cache, ids, mask)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for layer in model_shape(model).layers:
        side = "key" if layer.key.rope is not None else "value"
        shape = layer.side(side)
        encoded = spy.encoded[side, layer.layer_idx]
        slots = torch.arange(SINKS, SINKS + encoded.shape[2])
        source = spy.inputs[layer.layer_idx][:, :, slots] * _factors(model, shape.rope, shape.head_dim)
        if family == "deepseek-v3":
            source = source.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        firsts = slots - (slots - SINKS) % frame_length
        inside = positions[:, slots] - positions[:, firsts]
        cos, sin = angle_tables(inside, rope_buffer(model.get_decoder(), shape.rope.source))
        expected = rotate(source, cos[:, None], sin[:, None], shape.rope.layout)
        # A frame that begins with padding keeps its padding's rotation: any angle serves, as long as one is kept.
        chosen = mask[:, slots].bool() & mask[:, firsts].bool()
        assert_equal_up_to_rotation_rounding(_rows(encoded, chosen), _rows(expected, chosen))


def test_frame_ends_where_frequencies_change(monkeypatch):
    frame_length, switch = 16, 22  # phi3's forward of slots 22 to 24 is the first to go past 24 tokens
    model = tiny_model("phi3")
    cache = exact_cache(model, full_rank_projections("phi3", frame_length))
    spy = Spy(monkeypatch, model)
    _feed(model, cache, random_tokens(2, 44), None)
    for layer in model_shape(model).layers:
        rope = layer.key.rope
        assert saved_facts(cache)["frequencies"][rope.source] == [0, switch]
        short, long = (saved_tensors(cache)[f"frequencies.{rope.source}.{nth}"] for nth in (0, 1))
        encoded = spy.encoded["key", layer.layer_idx]
        slots = torch.arange(SINKS, SINKS + encoded.shape[2])
        firsts = slots - (slots - SINKS) % frame_length
        inside = slots - torch.where(slots >= switch, firsts.clamp(min=switch), firsts)
        inv_freq = torch.where((slots >= switch)[:, None], long, short)
        angles = inside[:, None] * inv_freq
        source = spy.inputs[layer.layer_idx][:, :, slots] * _factors(model, rope, layer.key.head_dim)
        assert_equal_up_to_rotation_rounding(encoded, rotate(source, angles.cos(), angles.sin(), rope.layout))


@pytest.mark.parametrize("family", FAMILIES)
def test_calibration_sees_the_rotary_functions_input(monkeypatch, family):
    recorded = defaultdict(dict)
    add = Moments.add

    def spied_add(moments, states, gradients):
        for side, layers in states.items():
            recorded[side].update(layers)
        add(moments, states, gradients)

    monkeypatch.setattr(Moments, "add", spied_add)
    model = tiny_model(family)
    shape = model_shape(model)
    spy = Spy(monkeypatch, model)
    ids, mask = _left_padded(20)
    calibrate(model, [{"input_ids": ids, "attention_mask": mask}], progress=False)
    usable = mask.bool() & (mask.cumsum(1) > 4)
    for layer in shape.layers:
        side = "key" if layer.key.rope is not None else "value"
        if layer.side(side).rope is None:
            continue
        head_dim = layer.side(side).head_dim
        source = _rows(spy.inputs[layer.layer_idx], usable)
        seen = recorded[side][layer.layer_idx].reshape(-1, head_dim)
        factors = _factors(model, layer.side(side).rope, head_dim)
        permutation = _permutation(source[:12], seen[:12], factors)
        assert_equal_up_to_rotation_rounding(seen, source[:, permutation] * factors)


# What is refused, and what probing leaves behind


REASONS = {
    "mistral-all-sliding": "nothing to compress",
    "ernie4.5-vl": "no known rotary layout",
    "t5": "encoder–decoder",
    "bart": "encoder–decoder",
    "gptj": "no known rotary layout",
    "nanochat": "no known rotary layout",
    "recurrent-gemma": "nothing to compress",
    "mamba": "nothing to compress",
}


@pytest.mark.parametrize("family", REFUSED)
def test_refused_when_the_cache_is_made(family):
    model = tiny_model(family)
    with pytest.raises(NotImplementedError) as refusal:
        LowRankCache(model, full_rank_projections("llama"))
    assert type(model).__name__ in str(refusal.value)
    assert REASONS[family] in str(refusal.value)
    # Asking again gives the same answer, and nothing was left on the model.
    assert refusal_of(model) == str(refusal.value)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family", REFUSED)
def test_refused_when_calibrated(family):
    with pytest.raises(NotImplementedError):
        calibrate(tiny_model(family), [random_tokens(1, 8)], progress=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_probe_finds_the_same_in_half_precision(family, dtype):
    assert model_shape(tiny_model(family, dtype)) == model_shape(tiny_model(family))


def test_probing_leaves_the_model_as_it_was():
    model = tiny_model("llama").train()
    model_shape(model)
    assert model.training
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
