"""Calibration without gradients."""

import pytest
import torch

from lowrank_cache import LowRankCache
from lowrank_cache.calibration import calibrate
from lowrank_cache.calibration.query_sensitivity import output_gram, record_queries
from tests.oracle.models import random_tokens, tiny_model


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "glm4", "gpt-oss", "phi3"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_calibrates_and_leaves_the_attention_interface_as_it_was(family, implementation):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = tiny_model(family)
    if implementation == "sdpa" and not model._supports_sdpa:
        pytest.skip(f"transformers has no sdpa for {family}")
    model.set_attn_implementation(implementation)
    before = dict(ALL_ATTENTION_FUNCTIONS)
    projections = calibrate(model, [random_tokens(2, 40)], sensitivity="query", progress=False)
    assert dict(ALL_ATTENTION_FUNCTIONS) == before
    assert projections.provenance["sensitivity"] == "query"
    cache = LowRankCache(model, projections, compression_ratio=4, residual_length=4, block_size=4)
    with torch.no_grad():
        assert torch.isfinite(model(random_tokens(1, 30), past_key_values=cache).logits).all()


def test_an_error_in_the_forward_restores_the_attention_interface():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = tiny_model("llama")
    before = dict(ALL_ATTENTION_FUNCTIONS)
    with pytest.raises(KeyError), record_queries(model):
        raise KeyError
    assert dict(ALL_ATTENTION_FUNCTIONS) == before


def test_other_models_are_not_recorded():
    model, other = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad(), record_queries(model) as seen:
        other(random_tokens(1, 5))
        assert not seen
        model(random_tokens(1, 5))
    assert sorted(seen) == [0, 1, 2]


def test_theoutput_gram_is_that_of_the_weight():
    module = tiny_model("llama").model.layers[0].self_attn
    weight = module.o_proj.weight.double()  # [hidden, q_heads * head_dim]
    heads = weight.view(weight.shape[0], 4, 16)
    expected = torch.einsum("hqd,hqe->qde", heads, heads).view(2, 2, 16, 16).sum(1)
    torch.testing.assert_close(output_gram(module, kv_heads=2, value_dim=16), expected, rtol=1e-5, atol=1e-6)


def test_mla_is_refused_by_name():
    with pytest.raises(NotImplementedError, match="sensitivity='gradient'"):
        calibrate(tiny_model("deepseek-v3"), [random_tokens(1, 40)], sensitivity="query", progress=False)
