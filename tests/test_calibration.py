"""Calibration against direct computation: what a model's cache holds and how the loss depends on it, in float64."""

import pytest
import torch
from transformers import DynamicCache

from lowrank_cache.calibration import calibrate
from lowrank_cache.calibration.fisher import weighted_basis
from lowrank_cache.calibration.moments import collect_moments, layer_groups
from lowrank_cache.kernels.rope import angle_tables, rotate
from lowrank_cache.models import model_shape
from tests.models import random_tokens, tiny_model

SKIPPED = 4


class Captured(DynamicCache):
    """Keeps what each layer was given, with its gradient."""

    def __init__(self, config):
        super().__init__(config=config)
        self.given = {}

    def update(self, key_states, value_states, layer_idx, *args):
        for states in (key_states, value_states):
            states.retain_grad()
        self.given[layer_idx] = (key_states, value_states)
        return super().update(key_states, value_states, layer_idx, *args)


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


def moments_of(model, batches, size=1):
    shape = model_shape(model)
    return collect_moments(model, batches, {side: layer_groups(shape, side, size) for side in ("key", "value")})


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("size", [1, 3])
def test_moments_are_those_of_the_states(family, size):
    moments = moments_of(tiny_model(family), padded_batches(), size)
    rows = direct_rows(tiny_model(family), padded_batches())
    assert moments.tokens == len(rows["key", 0][0]) == 10 + 5 + 1 + 2 * 5
    assert moments.sequences == 5
    for side in ("key", "value"):
        for group in moments.groups[side]:
            states = torch.cat([rows[side, layer][0] for layer in group], dim=1)
            second, mean, sensitivity = moments.of_group(side, group)
            close = {"rtol": 1e-4, "atol": 1e-4 * float((states.T @ states).abs().max()) / len(states)}
            torch.testing.assert_close(second, states.T @ states / len(states), **close)
            torch.testing.assert_close(mean, states.mean(0), rtol=1e-4, atol=1e-4)
            blocks = [rows[side, layer][1].T @ rows[side, layer][1] / len(states) for layer in group]
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
