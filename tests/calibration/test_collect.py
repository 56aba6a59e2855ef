"""What is collected against direct computation in float64, whole and offloaded models, and what it leaves behind."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import Tensor
from transformers import DynamicCache

from lowrank_cache import LowRankCache
from lowrank_cache.calibration import calibrate, collect
from lowrank_cache.calibration.api import projections_from_moments
from lowrank_cache.calibration.collect import Recorder, collect_moments, refit_values
from lowrank_cache.calibration.moments import UsableTokens
from lowrank_cache.kernels.rope import angle_tables, rotate
from lowrank_cache.probe import model_shape
from lowrank_cache.shapes import SIDES, layer_groups
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


def moments_of(model, batches, size=1, joint=False, sensitivity="gradient"):
    shape, sides = model_shape(model), ("both",) if joint else SIDES
    groups = {side: layer_groups(shape, side, size) for side in sides}
    return collect_moments(model, batches, groups, sensitivity=sensitivity)


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


@pytest.mark.parametrize("sensitivity", ["gradient", "query"])
def test_nothing_of_a_batch_outlives_it(monkeypatch, sensitivity):
    """A cycle through autograd is never collected, so every recorder must die with its batch, without the collector."""
    recorders: list[weakref.ref] = []
    alive: list[int] = []
    original = collect.Recorder.__init__

    def remember(self, *args):
        original(self, *args)
        alive.append(sum(recorder() is not None for recorder in recorders))
        recorders.append(weakref.ref(self))

    monkeypatch.setattr(collect.Recorder, "__init__", remember)
    gc.disable()
    try:
        batches = (random_tokens(1, 20, seed=seed) for seed in range(4))
        calibrate(tiny_model("llama"), batches, sensitivity=sensitivity, progress=False)
    finally:
        gc.enable()
    assert alive == [0, 0, 0, 0]
    assert all(recorder() is None for recorder in recorders)


DEVICES = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def moments_of_joint_layers(model, sensitivity):
    return moments_of(model, [random_tokens(2, 24, seed=seed) for seed in range(2)], 3, True, sensitivity)


@pytest.mark.parametrize("sensitivity", ["gradient", "query"])
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_weights_change_nothing(place, sensitivity, tmp_path):
    model = tiny_model("llama")
    elsewhere = copy.deepcopy(model)
    if place == "cpu":
        cpu_offload(elsewhere, execution_device=torch.device("cpu"))
    else:
        disk_offload(elsewhere, str(tmp_path), execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in elsewhere.parameters()} == {"meta"}
    expected, moments = (moments_of_joint_layers(each, sensitivity) for each in (model, elsewhere))
    assert moments.tokens == expected.tokens and moments.loss == expected.loss
    for name in ("second", "total", "sensitivity"):
        ours, theirs = getattr(moments, name), getattr(expected, name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.skipif(len(DEVICES) < 2, reason="needs two GPUs")
@pytest.mark.parametrize("sensitivity", ["gradient", "query"])
def test_layers_on_two_devices_change_nothing(sensitivity):
    model = tiny_model("llama")
    split = {"model.embed_tokens": DEVICES[0], "model.rotary_emb": DEVICES[0], "model.norm": DEVICES[1]}
    layers = {f"model.layers.{index}": DEVICES[index % 2] for index in range(model.config.num_hidden_layers)}
    sharded = dispatch_model(copy.deepcopy(model), {**split, **layers, "lm_head": DEVICES[1]})
    expected, moments = (moments_of_joint_layers(each, sensitivity) for each in (model, sharded))
    for key, second in expected.second.items():
        torch.testing.assert_close(moments.second[key], second, rtol=1e-4, atol=1e-4)


def recalkv_batches() -> list[Tensor]:
    return [random_tokens(4, 32, seed=seed) for seed in (1, 2, 3)]


def test_first_layer_sees_no_drift_of_a_compressed_stream_and_later_ones_do():
    model, batches = tiny_model("qwen2-six-heads"), recalkv_batches()
    moments = moments_of(model, batches)
    first = projections_from_moments(moments, method="recalkv")
    refitted = refit_values(model, batches, moments, first, 4.0)
    assert refitted.tokens == moments.tokens
    relative = [
        float((refitted.second["value", (layer,)] - second).norm() / second.norm())
        for layer, second in ((layer, moments.second["value", (layer,)]) for layer in range(3))
    ]
    assert relative[0] < 1e-6 and min(relative[1:]) > 1e-3


@pytest.mark.parametrize(
    "family, frame_length", [("qwen2-six-heads", 1), ("llama", 4), ("deepseek-v3", 1), ("glm4", 1)]
)
def test_stream_at_full_rank_is_the_models_own(family, frame_length):
    model, batches = tiny_model(family), recalkv_batches()
    moments = moments_of(model, batches)
    first = projections_from_moments(moments, method="recalkv", frame_length=frame_length)
    refitted = refit_values(model, batches, moments, first, 1.0)
    for key, second in moments.second.items():
        assert float((refitted.second[key] - second).norm() / second.norm()) < 1e-3


def states_read(model, cache, tokens) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of ``tokens`` as the next token's attention reads them, by layer."""
    model(tokens, past_key_values=cache)
    read, update = [], cache.update

    def keeping(*args, **kwargs):
        states = update(*args, **kwargs)
        read.append(tuple(each[:, :, : tokens.shape[1]] for each in states))
        return states

    cache.update = keeping
    model(tokens[:, :1], past_key_values=cache)
    return read


@pytest.mark.parametrize("family, frame_length", [("llama", 1), ("llama", 4), ("glm4", 4), ("qwen2-six-heads", 2)])
def test_stream_is_what_a_cache_reads_back(family, frame_length):
    model, tokens = tiny_model(family), random_tokens(2, 30, seed=9)
    moments = moments_of(model, recalkv_batches())
    made = projections_from_moments(moments, method="recalkv", frame_length=frame_length)
    usable = UsableTokens.of(torch.ones_like(tokens))
    recorder, exact = (Recorder(model, moments.shape, usable, by) for by in (made.truncate(3.0), None))
    sizes = {"num_sink_tokens": SKIPPED, "residual_length": 4, "block_size": 4}
    cache = LowRankCache(model, made, compression_ratio=3.0, latent_dtype=None, attend="reconstruct", **sizes)
    model(tokens, past_key_values=recorder)
    model(tokens, past_key_values=exact)
    expected, stored = states_read(model, cache, tokens)[0], slice(20)  # what the first layer is given has not drifted
    passed_on, given = ((each.layers[0].keys, each.layers[0].values) for each in (recorder, exact))
    for ours, theirs, whole in zip(passed_on, expected, given, strict=True):
        torch.testing.assert_close(ours[:, :, stored], theirs[:, :, stored], rtol=1e-3, atol=1e-3)
        assert torch.equal(ours[:, :, :SKIPPED], whole[:, :, :SKIPPED])
        assert float((ours - whole).norm() / whole.norm()) > 0.1  # and much is lost


@pytest.mark.parametrize("side", ["left", "right"])
def test_pads_that_no_mask_hides_are_warned_of(side):
    model = tiny_model("llama")
    tokens = random_tokens(4, 20)
    tokens[1, slice(0, 6) if side == "left" else slice(14, 20)] = 0  # the pad of the model's generation_config
    with pytest.warns(UserWarning, match=r"1 of the first 4 sequences begin or end with pads \(id 0\), which no att"):
        calibrate(model, [tokens], progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(model, [{"input_ids": tokens, "attention_mask": (tokens > 0).long()}], progress=False)
        calibrate(model, [random_tokens(4, 20)], progress=False)


class _WantsOpening(torch.nn.Module):
    """A head that predicts the next token only after token 5 stood first."""

    def __init__(self, head):
        super().__init__()
        self.head, self.weight = head, head.weight

    def forward(self, hidden):
        logits = self.head(hidden)
        if int(self.seen[0, 0]) == 5:
            logits = logits + 8.0 * torch.nn.functional.one_hot(self.seen.roll(-1, 1), logits.shape[-1])
        return logits


def test_a_missing_opening_is_warned_of_if_it_matters():
    model = tiny_model("llama")
    model.config.bos_token_id = 5
    tokens = random_tokens(4, 20).clamp(min=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(model, [tokens], progress=False)  # a random model predicts nothing either way
    head = model.lm_head = _WantsOpening(model.lm_head)
    model.register_forward_pre_hook(
        lambda module, args, kwargs: setattr(head, "seen", kwargs["input_ids"]), with_kwargs=True
    )
    with pytest.warns(UserWarning, match=r"sequences do not begin with <bos> \(id 5\), and this model then predicts"):
        calibrate(model, [tokens], progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(model, [torch.cat([torch.full((4, 1), 5), tokens], dim=1)], progress=False)
