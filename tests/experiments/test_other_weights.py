"""What the experiment on other weights compares."""

import pytest
import torch

from tests.experiments import load
from tests.oracle.models import tiny_model

differences = load("other_weights").differences


def test_differences():
    model = tiny_model("llama")
    same = differences(model, tiny_model("llama"))
    assert same.shape == (6,) and float(same.max()) == 0
    other = tiny_model("llama")
    for layer in other.model.layers:
        layer.self_attn.v_proj.weight.mul_(1.5)
    found = differences(model, other).view(3, 2)
    assert float(found[0, 0]) == 0 and float(found[0, 1]) == pytest.approx(0.5)  # the first layer's keys and values
    assert bool((found[1:] > 0).all()) and found.dtype == torch.float32
