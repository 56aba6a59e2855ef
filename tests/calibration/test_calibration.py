"""Calibration against direct computation: what a model's cache holds and how the loss depends on it, in float64."""

import dataclasses
import itertools

import pytest
import torch
from safetensors.torch import save_file
from transformers import DynamicCache

from lowrank_cache.calibration import calibrate
from lowrank_cache.calibration.api import projections_from_moments
from lowrank_cache.calibration.fisher import weighted_basis
from lowrank_cache.calibration.moments import Moments, collect_moments
from lowrank_cache.kernels.rope import angle_tables, rotate
from lowrank_cache.models import SIDES, layer_groups, model_shape
from tests.oracle.models import random_tokens, tiny_model

SKIPPED = 4


class Captured(DynamicCache):
    """Keeps what each layer was given, with its gradient."""

    def __init__(self, config):
        super().__init__(config=config)
        self.given = {}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        for states in (key_states, value_states):
            states.retain_grad()
        self.given[layer_idx] = (key_states, value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def direct_rows(model, batches):
    """States and gradients of all usable tokens, float64: ``{(side, layer): (states, gradients)}``, keys pre-RoPE."""
    model = model.double()
    inv_freq = model.model.rotary_emb.inv_freq.double()
    rows = {}
    for batch in batches:
        mask = batch["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = Captured(model.config)
        embeddings = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_(True)
        logits = model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, past_key_values=cache
        ).logits
        loss = logits.new_zeros(())
        for row in range(len(mask)):
            for token in range(mask.shape[1] - 1):
                if mask[row, token] and mask[row, token + 1]:
                    target = batch["input_ids"][row, token + 1]
                    loss = loss - logits[row, token].log_softmax(-1)[target]
        loss.backward()
        usable = mask.bool() & (mask.cumsum(1) > SKIPPED)
        cos, sin = angle_tables(positions, inv_freq)
        for layer, given in cache.given.items():
            for side, states in zip(("key", "value"), given, strict=True):
                pair = [states.detach(), states.grad]
                if side == "key":
                    pair = [rotate(each, cos[:, None], sin[:, None], "half", inverse=True) for each in pair]
                pair = [each.transpose(1, 2).flatten(2)[usable] for each in pair]
                before = rows.get((side, layer), [torch.zeros(0, pair[0].shape[1]).double()] * 2)
                rows[side, layer] = [torch.cat(both) for both in zip(before, pair, strict=True)]
    return rows


def padded_batches():
    mask = torch.ones(3, 14, dtype=torch.long)
    mask[1, :5] = 0
    mask[2, :9] = 0  # five real tokens: one is usable
    return [
        {"input_ids": random_tokens(3, 14, seed=1), "attention_mask": mask},
        {"input_ids": random_tokens(2, 9, seed=2), "attention_mask": torch.ones(2, 9, dtype=torch.long)},
    ]


def moments_of(model, batches, size=1, joint=False):
    shape, sides = model_shape(model), ("both",) if joint else ("key", "value")
    return collect_moments(model, batches, {side: layer_groups(shape, side, size) for side in sides})


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_moments_are_those_of_the_states(family, size, joint):
    moments = moments_of(tiny_model(family), padded_batches(), size, joint)
    rows = direct_rows(tiny_model(family), padded_batches())
    assert moments.tokens == len(rows["key", 0][0]) == 10 + 5 + 1 + 2 * 5
    assert moments.sequences == 5
    assert list(moments.groups) == (["both"] if joint else ["key", "value"])
    for side, groups in moments.groups.items():
        for group in groups:
            # Layer by layer; a layer's keys before its values.
            members = [(name, layer) for layer in group for name in (("key", "value") if joint else (side,))]
            states = torch.cat([rows[member][0] for member in members], dim=1)
            second, mean, sensitivity = moments.of_group(side, group)
            close = {"rtol": 1e-4, "atol": 1e-4 * float((states.T @ states).abs().max()) / len(states)}
            torch.testing.assert_close(second, states.T @ states / len(states), **close)
            torch.testing.assert_close(mean, states.mean(0), rtol=1e-4, atol=1e-4)
            blocks = [rows[member][1].T @ rows[member][1] / len(states) for member in members]
            expected = torch.block_diag(*blocks)
            torch.testing.assert_close(sensitivity, expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))


def test_splitting_batches_changes_nothing():
    whole = padded_batches()
    single = [
        {name: tensor[row : row + 1] for name, tensor in batch.items()}
        for batch in whole
        for row in range(len(batch["input_ids"]))
    ]
    one, other = moments_of(tiny_model("llama"), whole), moments_of(tiny_model("llama"), iter(single))
    assert one.tokens == other.tokens and one.predicted == other.predicted
    assert one.loss == pytest.approx(other.loss, rel=1e-5)
    for key, second in one.second.items():
        torch.testing.assert_close(other.second[key], second, rtol=1e-4, atol=1e-4 * float(second.abs().max()))
    for key, sensitivity in one.sensitivity.items():
        bound = 1e-3 * float(sensitivity.abs().max())
        torch.testing.assert_close(other.sensitivity[key], sensitivity, rtol=1e-3, atol=bound)


def test_calibration_is_deterministic():
    first, second = (calibrate(tiny_model("llama"), padded_batches(), progress=False) for _ in range(2))
    for mine, theirs in zip(first.bases, second.bases, strict=True):
        assert torch.equal(mine.down_proj, theirs.down_proj) and torch.equal(mine.loss, theirs.loss)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(fails, training):
    model = tiny_model("llama").train(training)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batches = padded_batches()
    if fails:
        batches = [*batches, "text"]
        with pytest.raises(TypeError):
            calibrate(model, batches, progress=False)
    else:
        calibrate(model, batches, progress=False)
    assert model.training is training
    assert all(module.training is training for module in model.modules())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("family, layout", [("llama", "half"), ("glm4", "interleaved")])
@pytest.mark.parametrize("frame_length", [2, 5, 16])
def test_frame_average_is_that_of_rotated_samples(family, layout, frame_length):
    model = tiny_model(family)
    moments = moments_of(model, padded_batches())
    rope = moments.side("key", (1,)).rope
    assert rope.layout == layout
    inv_freq = moments.inv_freq[rope.source]
    plain = moments.of_group("key", (1,))
    framed = moments.of_group("key", (1,), frame_length)
    width = plain[0].shape[0]
    head_dim = moments.side("key", (1,)).head_dim
    rotations = []
    for offset in range(frame_length):
        cos, sin = angle_tables(torch.tensor(offset), inv_freq)
        units = torch.eye(width, dtype=torch.float64).view(width, -1, head_dim)
        rotations.append(rotate(units, cos, sin, layout).reshape(width, width).T)  # x → R x
    for index in (0, 2):
        expected = torch.stack([turn @ plain[index] @ turn.T for turn in rotations]).mean(0)
        torch.testing.assert_close(framed[index], expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))
    torch.testing.assert_close(framed[1], torch.stack([turn @ plain[1] for turn in rotations]).mean(0))
    values = [moments.of_group("value", (1,), length)[0] for length in (1, frame_length)]
    torch.testing.assert_close(*values, rtol=1e-12, atol=1e-12)  # values are never rotated


@pytest.mark.parametrize("family", ["llama", "glm4", "deepseek-v3"])
@pytest.mark.parametrize("frame_length", [2, 5])
def test_frame_average_of_keys_with_values_turns_only_what_the_model_turns(family, frame_length):
    moments = moments_of(tiny_model(family), padded_batches(), 2, joint=True)
    group = (0, 1)
    plain, framed = (moments.of_group("both", group, length) for length in (1, frame_length))
    members = moments.shape.members("both", group)
    assert [(layer, side) for layer, side, _ in members] == [(layer, side) for layer in group for side in SIDES]
    turned_side = "value" if family.startswith("deepseek") else "key"  # MLA hands its rotary key over as values
    rotations = []
    for offset in range(frame_length):
        blocks = []  # x → R x, one number at a time
        for _, side, shape in members:
            block = torch.eye(shape.width, dtype=torch.float64)
            assert (shape.rope is not None) == (side == turned_side)
            if shape.rope is not None:
                half = shape.rope.rotary_dim // 2
                for head in range(shape.heads):
                    for pair, frequency in enumerate(moments.inv_freq[shape.rope.source].tolist()):
                        start = head * shape.head_dim
                        first, second = start + pair, start + pair + half
                        if shape.rope.layout == "interleaved":
                            first, second = start + 2 * pair, start + 2 * pair + 1
                        angle = torch.tensor(offset * frequency, dtype=torch.float64)
                        block[first, first] = block[second, second] = angle.cos()
                        block[first, second], block[second, first] = -angle.sin(), angle.sin()
            blocks.append(block)
        rotations.append(torch.block_diag(*blocks))
    for index in (0, 2):
        expected = torch.stack([turn @ plain[index] @ turn.T for turn in rotations]).mean(0)
        torch.testing.assert_close(framed[index], expected, rtol=1e-9, atol=1e-12 * float(expected.abs().max()))
    torch.testing.assert_close(framed[1], torch.stack([turn @ plain[1] for turn in rotations]).mean(0))
    starts = [0, *itertools.accumulate(shape.width for _, _, shape in members)]
    for (_, side, _), start, stop in zip(members, starts[:-1], starts[1:], strict=True):
        kept = torch.allclose(framed[0][start:stop, start:stop], plain[0][start:stop, start:stop], rtol=1e-12)
        assert kept == (side != turned_side)


def test_projections_apart_from_joint_moments_are_those_calibrated_apart():
    model, batches = tiny_model("llama"), padded_batches()
    joint = moments_of(model, batches, 3, joint=True)
    for method in ("fisher", "palu"):
        for frame_length, size in ((1, 1), (4, 2), (3, (1, 3))):
            options = {"method": method, "frame_length": frame_length, "layer_group_size": size, "joint": False}
            derived = projections_from_moments(joint, **options)
            made = calibrate(tiny_model("llama"), padded_batches(), progress=False, **options)
            assert [basis.name for basis in derived.bases] == [basis.name for basis in made.bases]
            assert {basis.side for basis in derived.bases} == {"key", "value"}
            for ours, theirs in zip(derived.bases, made.bases, strict=True):
                torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-4, atol=1e-6 * float(theirs.loss.max()))
                # Channels of nearly equal loss may come in any rotation; what they keep together may not.
                kept = [basis.down_proj.double() @ basis.up_proj.double() for basis in (ours, theirs)]
                torch.testing.assert_close(*kept, rtol=0, atol=1e-3)
                means = [basis.offset.double() @ basis.up_proj.double() for basis in (ours, theirs)]
                torch.testing.assert_close(*means, rtol=1e-3, atol=1e-3)


def test_smaller_joint_groups_are_parts_of_larger_ones():
    small, large = (moments_of(tiny_model("llama"), padded_batches(), size, joint=True) for size in (1, 3))
    for layer in (0, 1, 2):
        for side in ("key", "value", "both"):
            for ours, theirs in zip(small.of_group(side, (layer,)), large.of_group(side, (layer,)), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("sensitivity", ["gradient", "query"])
@pytest.mark.parametrize("joint, size", [(True, 2), (False, 2), (False, (1, 3))])
def test_saved_moments_give_the_same_projections(tmp_path, joint, size, sensitivity):
    path = tmp_path / "moments.safetensors"
    options = {"layer_group_size": size, "joint": joint}
    made = calibrate(
        tiny_model("llama"), padded_batches(), sensitivity=sensitivity, save_moments=path, progress=False, **options
    )
    loaded = Moments.load(path)
    assert list(loaded.groups) == (["both"] if joint else ["key", "value"])
    again = projections_from_moments(loaded, provenance=made.provenance, **options)
    assert again.provenance == made.provenance and again.shape == made.shape
    assert [basis.name for basis in again.bases] == [basis.name for basis in made.bases]
    for ours, theirs in zip(again.bases, made.bases, strict=True):
        for name in ("down_proj", "up_proj", "offset", "loss"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
    loaded.save(tmp_path / "twice.safetensors")
    assert (tmp_path / "twice.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("damage", ["text", "truncated", "other tensors"])
def test_moments_that_cannot_be_read(tmp_path, damage):
    path = tmp_path / "moments.safetensors"
    if damage == "text":
        path.write_text("no moments")
    elif damage == "truncated":
        moments_of(tiny_model("llama"), padded_batches(), joint=True).save(path)
        path.write_bytes(path.read_bytes()[:-100])
    else:
        save_file({"second.both.0": torch.zeros(2, 2)}, str(path))
    with pytest.raises(ValueError, match="moments.safetensors holds no readable moments: "):
        Moments.load(path)


@pytest.mark.parametrize(
    "options, got",
    [
        ({"layer_group_size": (1, 3)}, r"got method 'fisher' and layer_group_size \(1, 3\)"),
        ({"layer_group_size": (2, 2)}, r"got method 'fisher' and layer_group_size \(2, 2\)"),
        ({"method": "palu"}, "got method 'palu' and layer_group_size 'auto'"),
        ({"method": "palu", "layer_group_size": 2}, "got method 'palu' and layer_group_size 2"),
    ],
)
def test_joint_is_refused_where_it_cannot_be(options, got):
    message = "joint=True needs method 'fisher', one layer_group_size for both sides and as many key as value heads, "
    with pytest.raises(ValueError, match=message + got):
        calibrate(tiny_model("llama"), padded_batches(), joint=True, progress=False, **options)


def unequal_heads(shape):
    """The same model with twice as many value heads of half the size."""

    def other(side):
        return dataclasses.replace(side, heads=2 * side.heads, head_dim=side.head_dim // 2)

    layers = tuple(dataclasses.replace(layer, value=other(layer.value)) for layer in shape.layers)
    return dataclasses.replace(shape, layers=layers)


def test_unequal_heads_are_kept_apart():
    moments = moments_of(tiny_model("llama"), padded_batches())
    moments.shape = unequal_heads(moments.shape)
    with pytest.raises(ValueError, match="joint=True needs .* as many key as value heads"):
        projections_from_moments(moments, layer_group_size=1, joint=True)
    made = projections_from_moments(moments, layer_group_size=1)
    assert [(basis.side, len(basis.heads)) for basis in made.bases] == [("key", 2)] * 3 + [("value", 4)] * 3


def test_moments_recorded_apart_refuse_joint_projections_by_name():
    apart = moments_of(tiny_model("llama"), padded_batches(), 3)
    with pytest.raises(ValueError, match=r"both layers \(0, 1\) were not recorded jointly; .* hold the groups .*'key'"):
        projections_from_moments(apart, layer_group_size=2)
    joint = moments_of(tiny_model("llama"), padded_batches(), 2, joint=True)
    with pytest.raises(ValueError, match=r"both layers \(0, 1, 2\) were not recorded jointly; .*'both': \[\(0, 1\)"):
        projections_from_moments(joint, layer_group_size=3)
    with pytest.raises(ValueError, match=r"value layers \(0, 1, 2\) were not recorded jointly"):
        projections_from_moments(joint, layer_group_size=(1, 3))


@pytest.mark.parametrize(
    "options, sides",
    [
        ({}, {"both"}),
        ({"layer_group_size": 2}, {"both"}),
        ({"layer_group_size": (2, 2)}, {"key", "value"}),
        ({"method": "palu"}, {"key", "value"}),
        ({"joint": False}, {"key", "value"}),
        ({"joint": True, "frame_length": 4}, {"both"}),
    ],
)
def test_keys_and_values_share_a_latent_by_default(options, sides):
    made = calibrate(tiny_model("llama"), padded_batches(), progress=False, **options)
    assert {basis.side for basis in made.bases} == sides


def random_moments(width, tokens=4000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix, blame = torch.randn(2, width, width, generator=generator, dtype=torch.float64)
    states = torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ mix + 2.0
    gradients = 0.1 * torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ blame
    return states, gradients


def basis_of(states, gradients):
    second, sensitivity = states.T @ states / len(states), gradients.T @ gradients / len(gradients)
    arrays = weighted_basis(second, states.mean(0), sensitivity)
    return [arrays[name] for name in ("down_proj", "up_proj", "offset", "loss")], second, sensitivity


def test_full_rank_basis_inverts():
    (down, up, _, _), _, _ = basis_of(*random_moments(24))
    torch.testing.assert_close(down.double() @ up.double(), torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-4)
    torch.testing.assert_close(up.double() @ down.double(), torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-4)


def test_latents_have_unit_variance_and_the_stated_mean():
    states, gradients = random_moments(24)
    (down, _, offset, loss), _, _ = basis_of(states, gradients)
    latents = states @ down.double()
    torch.testing.assert_close(latents.mean(0), offset.double(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(latents.var(0), torch.ones(24, dtype=torch.float64), rtol=1e-2, atol=1e-2)
    assert bool((loss.diff() <= 0).all()), "channels must be sorted by loss"


def test_loss_is_the_weighted_error_of_dropping_a_channel():
    states, gradients = random_moments(16)
    (down, up, offset, loss), _, sensitivity = basis_of(states, gradients)
    down, up, offset = down.double(), up.double(), offset.double()
    for channel in range(16):
        latents = states @ down
        latents[:, channel] = offset[channel]  # a dropped channel is read as its mean
        error = latents @ up - states
        predicted = ((error @ sensitivity) * error).sum(-1).mean()
        torch.testing.assert_close(predicted, loss[channel].double(), rtol=1e-3, atol=1e-9)


def test_losses_are_the_weighted_moment_diagonalised():
    states, gradients = random_moments(16)
    centred = states - states.mean(0)  # with no mean, variance and second moment are the same
    (_, _, _, loss), second, sensitivity = basis_of(centred, gradients)
    values, vectors = torch.linalg.eigh(sensitivity)
    root = vectors * values.sqrt() @ vectors.T
    expected = torch.linalg.eigvalsh(root @ second @ root).flip(0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=1e-9)


def test_no_other_basis_of_the_rank_has_less_weighted_error():
    states, gradients = random_moments(12)
    centred = states - states.mean(0)
    (down, up, _, _), second, sensitivity = basis_of(centred, gradients)

    def weighted_error(projector):
        error = torch.eye(12, dtype=torch.float64) - projector
        return float((error.T @ second @ error @ sensitivity).trace())

    ours = weighted_error(down[:, :5].double() @ up[:5].double())
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        noise = 0.05 * torch.randn(2, 12, 12, generator=generator, dtype=torch.float64)
        other = (down.double() + noise[0] * down.double().abs().mean())[:, :5]
        # The best up-projection for that down-projection, in the same weighted sense, is least squares.
        fit = torch.linalg.solve(other.T @ second @ other, other.T @ second)
        assert weighted_error(other @ fit) >= ours * (1 - 1e-9)
