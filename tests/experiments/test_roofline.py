"""The paper roofline: costs that can be counted by hand, and the command on moments of a tiny model."""

import dataclasses

import pytest
import torch

from lowrank_cache.calibration.collect import collect_moments
from lowrank_cache.probe import model_shape
from lowrank_cache.shapes import BOTH, layer_groups
from tests.experiments import load
from tests.oracle.models import random_tokens, tiny_model

roofline = load("roofline")
CARDS, KernelCost, LatentGroup, Setting = roofline.CARDS, roofline.KernelCost, roofline.LatentGroup, roofline.Setting
LLAMA = roofline.Attention(q_heads=32, heads=8, head_dim=128)
H100 = next(card for card in CARDS if card.name.startswith("H100"))


def one_latent(key_bytes=258, value_bytes=258):
    """256 channels of 4 bits, twice, of all heads."""
    return LatentGroup(8, ((4, 256),), ((4, 256),), key_bytes, value_bytes)


def by_kernel(frame_length):
    return {cost.kernel: cost for cost in roofline.kernel_costs(LLAMA, [one_latent()], frame_length)}


def test_costs_are_those_counted_by_hand():
    costs = by_kernel(64)
    assert costs["scores"].memory == 258 and costs["weigh"].memory == 258
    assert costs["scores"].matrix == 2 * 32 * 256
    assert costs["scores"].unpacked == costs["weigh"].unpacked == 256
    assert costs["absorb"].matrix == 2 * 32 * 128 * 256 / 64
    assert costs["absorb"].l2 == 2 * 32 * 256 / 64
    # Reconstructing multiplies every channel with every number of every head, then 16 rows with every key.
    assert by_kernel(1)["scores"].matrix == 8 * 128 * 2 * (256 + 16)


def test_absorbing_is_cheaper_the_longer_the_frame():
    matrix = [sum(cost.matrix for cost in by_kernel(length).values()) for length in (1, 16, 64, 128)]
    assert matrix == sorted(matrix, reverse=True)


def test_the_scarcest_resource_decides():
    card = dataclasses.replace(H100, memory=1.0, l2=1.0, matrix=1.0, vector=1.0)
    assert KernelCost("any", 0.85, 0.5, 0.1, 0.1, 0).seconds(card) == pytest.approx(1.0)
    assert KernelCost("any", 0.1, 0.1, 1.2, 0.1, 0).seconds(card) == pytest.approx(2.0)
    # The full cache of Llama is bound by memory: 4,096 bytes a token and layer.
    assert roofline.dense_time(LLAMA, H100) == pytest.approx(4096 / (0.85 * H100.memory))


@pytest.fixture(scope="module")
def moments(tmp_path_factory):
    model = tiny_model("llama", torch.float32)
    groups = {BOTH: layer_groups(model_shape(model), BOTH, 2)}
    recorded = collect_moments(model, [random_tokens(2, 40, seed=1)], groups)
    path = tmp_path_factory.mktemp("roofline") / "moments.safetensors"
    recorded.save(path)
    return recorded, path


def test_shares_meet_the_budget(moments):
    recorded, _ = moments
    full = 2 * sum(layer.key.width + layer.value.width for layer in recorded.shape.layers)
    for setting in (Setting(16, 1, 1, False), Setting(1, 2, 1, True), Setting(4, 1, 2, True)):
        share = roofline.measure_shares(recorded, setting, 3.0)
        assert 0 < share.bytes <= full / 3
        assert 0 < sum(share.keys.values()) <= 1 and 0 < sum(share.values.values()) <= 1
    # A joint latent serves both sides.
    assert share.keys == share.values


def test_command(moments, capsys):
    recorded, path = moments
    heads = recorded.shape.layers[0].key.heads
    roofline.main(path, ratio=3, query_heads=2 * heads)
    output = capsys.readouterr().out
    lines = output.splitlines()
    assert "85 % of the memory bandwidth" in output
    assert sum(line.startswith("Least predicted loss") or line.startswith("No setting") for line in lines) == 2
    assert all(output.count(f"| {card.name} |") == 2 for card in CARDS)  # the headers of two tables
    rows = [line for line in lines if line.startswith("| ") and "joint" in line]
    assert len(rows) == 2 * 4 * 3 + 4  # own: three groupings by four frames; Llama: one more grouping
    with pytest.raises(ValueError, match="query_heads must be a multiple of"):
        roofline.main(path, query_heads=2 * heads + 1)
