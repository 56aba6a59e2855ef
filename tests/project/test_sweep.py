"""The sweep over transformers' classes tells what works from what is refused, untested or wrong."""

import pytest
import transformers

from lowrank_cache import LowRankCache
from tests.tools.docs_sections import read_section
from tests.tools.sweep import FAULT, LATE, REFUSED, UNTESTED, WORKS, classes, judge, tiny_config


# Plainly; with images; without rotation; with a state beside the tokens; with scores that get a bias.
@pytest.mark.parametrize(
    "name",
    [
        "LlamaForCausalLM",
        "Qwen3VLForConditionalGeneration",
        "OPTForCausalLM",
        "FalconH1ForCausalLM",
        "InklingForConditionalGeneration",
        "DogeForCausalLM",
    ],
)
def test_what_works(name):
    assert judge(name) == (WORKS, "")


@pytest.mark.parametrize(
    "name, kind, reason",
    [
        ("MambaForCausalLM", REFUSED, "nothing to compress"),
        ("XLNetLMHeadModel", UNTESTED, "no tiny configuration"),
        ("NoSuchForCausalLM", UNTESTED, "not installed"),
    ],
)
def test_what_does_not(name, kind, reason):
    verdict = judge(name)
    assert verdict.kind == kind and reason in verdict.reason


def test_other_tokens_are_a_fault(monkeypatch):
    update = LowRankCache.update

    def wrong(self, keys, values, *args, **kwargs):
        keys, values = update(self, keys, values, *args, **kwargs)
        return keys, -values

    monkeypatch.setattr(LowRankCache, "update", wrong)
    assert judge("LlamaForCausalLM") == (FAULT, "other tokens")


def test_a_refusal_in_a_forward_is_late(monkeypatch):
    def refuse(*args, **kwargs):
        raise NotImplementedError("not like this")

    monkeypatch.setattr(LowRankCache, "update", refuse)
    assert judge("LlamaForCausalLM") == (LATE, "not like this")


def test_errors_of_another_kind_are_a_fault(monkeypatch):
    monkeypatch.setattr(LowRankCache, "update", None)
    verdict = judge("LlamaForCausalLM")
    assert verdict.kind == FAULT and verdict.reason.startswith("TypeError")


def test_configurations_are_tiny():
    config = tiny_config(transformers.Gemma3Config)
    assert config.text_config.hidden_size == 64 and config.vision_config.image_size == 8
    assert len(config.text_config.layer_types) == config.text_config.num_hidden_layers == 4


def test_the_table_names_every_class():
    table = read_section("models.md", "classes")
    missing = [name for name in classes() if name not in table]
    if f"transformers {transformers.__version__}." in table:
        assert not missing, "python -m tests.tools.sweep --write"
