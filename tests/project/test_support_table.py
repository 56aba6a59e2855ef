"""Refused models are refused early and clearly, and docs/limits.md says what the tests find."""

import pytest
import torch

from lowrank_cache import LowRankCache
from lowrank_cache.calibration import calibrate
from lowrank_cache.hooks import hook_count
from lowrank_cache.models import model_shape
from tests.oracle.models import (
    FAMILIES,
    MORE_FAMILIES,
    REFUSED,
    exact_cache,
    full_rank_projections,
    random_tokens,
    tiny_model,
)
from tests.tools.docs_sections import read_section
from tests.tools.support_table import refusal_of, support_section

REASONS = {
    "mistral-all-sliding": "nothing to compress",
    "gpt2": "no rotary position embedding",
    "bloom": "ALiBi",
    "opt": "learned positions",
    "qwen2-vl-text": "M-RoPE",
    "t5": "encoder–decoder",
    "bart": "encoder–decoder",
    "falcon-alibi": "ALiBi",
    "gptj": "precomputed tables",
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


def test_hook_goes_with_the_last_cache():
    model = tiny_model("llama")
    decoder = model.get_decoder()
    first = exact_cache(model, full_rank_projections("llama"))
    second = exact_cache(model, full_rank_projections("llama"))
    assert hook_count(decoder) == 2 and len(decoder._forward_pre_hooks) == 1
    del first
    assert hook_count(decoder) == 1
    del second
    assert hook_count(decoder) == 0 and not decoder._forward_pre_hooks


def test_support_section_is_up_to_date():
    shown = read_section("limits.md", "support")
    assert shown == support_section().strip(), "run `python -m tests.tools.support_table`"
