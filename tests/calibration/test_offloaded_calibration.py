"""Calibrating a model whose weights are elsewhere: offloaded to the CPU or to disk, or split over devices."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model

from lowrank_cache.calibration.moments import collect_moments
from lowrank_cache.models import layer_groups, model_shape
from tests.oracle.models import random_tokens, tiny_model

DEVICES = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def moments_of(model, sensitivity):
    shape = model_shape(model)
    batches = [random_tokens(2, 24, seed=seed) for seed in range(2)]
    return collect_moments(model, batches, {"both": layer_groups(shape, "both", 3)}, sensitivity=sensitivity)


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
    expected, moments = moments_of(model, sensitivity), moments_of(elsewhere, sensitivity)
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
    expected, moments = moments_of(model, sensitivity), moments_of(sharded, sensitivity)
    for key, second in expected.second.items():
        torch.testing.assert_close(moments.second[key], second, rtol=1e-4, atol=1e-4)
