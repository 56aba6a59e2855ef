"""Layer groups: how they are cut, what they store, what prefill keeps alive."""

import pytest
import torch

from lowrank_cache import LowRankCache
from lowrank_cache.calibration.api import MAX_GROUP_LAYERS, MAX_GROUP_WIDTH, auto_group_size
from lowrank_cache.probe import model_shape
from lowrank_cache.shapes import LayerShape, ModelShape, SideShape, layer_groups
from tests.cache.test_generation import compare
from tests.oracle.memory import reachable_tensors
from tests.oracle.models import exact_cache, full_rank_projections, random_tokens, tiny_model
from tests.oracle.tolerance import rounding_band


def _shape(layers: int, heads: int, head_dim: int) -> ModelShape:
    side = SideShape(heads, head_dim, None)
    return ModelShape("test", ("full_attention",) * layers, tuple(LayerShape(i, side, side) for i in range(layers)))


@pytest.mark.parametrize(
    "layers, heads, head_dim, expected",
    [(30, 3, 64, 5), (32, 8, 128, 4), (32, 32, 128, 1), (28, 2, 128, 5), (4, 1, 64, 4), (1, 1, 64, 1), (6, 1, 64, 3)],
)
def test_auto_groups_respect_both_limits_and_are_even(layers, heads, head_dim, expected):
    for side in ("key", "value"):
        assert auto_group_size(_shape(layers, heads, head_dim), side) == expected
    assert expected <= MAX_GROUP_LAYERS and (expected == 1 or expected * heads * head_dim <= MAX_GROUP_WIDTH)


@pytest.mark.parametrize(
    "layers, heads, head_dim, expected",
    [(30, 3, 64, 5), (32, 8, 128, 2), (32, 16, 128, 1), (32, 32, 128, 1), (28, 2, 128, 5), (7, 4, 128, 4)],
)
def test_auto_groups_of_keys_with_values_count_both_widths(layers, heads, head_dim, expected):
    assert auto_group_size(_shape(layers, heads, head_dim), "both") == expected
    assert expected <= MAX_GROUP_LAYERS and (expected == 1 or expected * 2 * heads * head_dim <= MAX_GROUP_WIDTH)


def test_groups_are_adjacent_cover_all_layers_and_never_mix_shapes():
    narrow, wide = SideShape(1, 64, None), SideShape(2, 64, None)
    layers = tuple(LayerShape(i, narrow if i < 3 else wide, narrow) for i in range(7))
    shape = ModelShape("test", ("full_attention",) * 7, layers)
    assert layer_groups(shape, "key", 2) == [(0, 1), (2,), (3, 4), (5, 6)]
    assert layer_groups(shape, "value", 3) == [(0, 1, 2), (3, 4, 5), (6,)]
    assert layer_groups(shape, "both", 3) == [(0, 1, 2), (3, 4, 5), (6,)]
    assert layer_groups(shape, "both", 2) == [(0, 1), (2,), (3, 4), (5, 6)]


def test_groups_skip_layers_that_are_not_compressed():
    groups = layer_groups(model_shape(tiny_model("gemma3")), "key", 2)
    compressed = [layer.layer_idx for layer in model_shape(tiny_model("gemma3")).layers]
    assert [layer for group in groups for layer in group] == compressed


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("group", [1, 3])
def test_prefill_keeps_one_groups_dense_states_alive_not_the_models(group, joint):
    """Bytes of long dense tensors that the cache holds, seen after every layer of a prefill."""
    model = tiny_model("llama")
    tokens = 600
    cache = LowRankCache(
        model,
        full_rank_projections("llama", 1, group, joint),
        compression_ratio=8,
        residual_length=4,
        num_sink_tokens=2,
        block_size=4,
    )
    layer = model_shape(model).layers[0]
    dense_layer = 4 * tokens * (layer.key.width + layer.value.width)  # float32
    held: list[int] = []

    def look(*_):
        long = [t for t in reachable_tensors(cache) if t.dim() == 4 and t.shape[2] > tokens // 2]
        held.append(sum(t.numel() * t.element_size() for t in long))

    hooks = [module.register_forward_hook(look) for module in model.model.layers]
    with torch.no_grad():
        model(random_tokens(1, tokens), past_key_values=cache)
    for hook in hooks:
        hook.remove()
    assert len(held) == 3 and max(held) <= group * dense_layer
    assert held[-1] == 0  # the last layer closes its group: nothing dense is left
    if group == 3:
        assert max(held) > dense_layer  # the measurement sees a group waiting for its last layer


def test_values_of_layers_whose_keys_differ_share_a_latent():
    # Every fourth layer of SmolLM3 has no rotary embedding: its keys stand alone, its values need not.
    options = ("smollm3", 1, (1, 4), False)
    projections = full_rank_projections(*options)
    assert [basis.layers for basis in projections.bases if basis.side == "value"] == [(0, 1, 2, 3)]
    compare("smollm3", "left_padded", lambda model: exact_cache(model, projections), rounding_band(*options))
