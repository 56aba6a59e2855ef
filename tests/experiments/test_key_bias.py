"""A model with large key biases, whose other weights are the same."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.experiments import load
from tests.oracle.character_tokenizer import character_tokenizer
from tests.oracle.models import tiny_model

key_bias = load("key_bias")


def test_a_biased_model_has_the_bias_and_otherwise_the_same_weights():
    model = tiny_model("llama")
    biased = key_bias.with_key_bias(model, 5.0)
    assert torch.equal(biased.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)
    bias = biased.model.layers[1].self_attn.k_proj.bias.view(2, 16)
    assert (bias[0, 4:8] == 5).all() and (bias[1, 4:8] == -5).all() and bias.abs().sum() == 40
    with pytest.raises(ValueError, match="without attention biases"):
        key_bias.with_key_bias(biased, 5.0)


def test_command(tmp_path, capsys):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")
    key_bias.main(tmp_path / "biased", 5.0, str(tmp_path / "model"))
    assert f"lowrank-cache eval {tmp_path / 'biased'}" in capsys.readouterr().out
    biased = AutoModelForCausalLM.from_pretrained(tmp_path / "biased")
    assert biased.model.layers[0].self_attn.k_proj.bias.abs().sum() == 40
