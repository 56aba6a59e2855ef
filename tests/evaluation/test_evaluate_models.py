"""The command ``eval`` with the models that people have: 4-bit weights, an adapter, a chat template."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from typer.testing import CliRunner

from lowrank_cache import cli
from lowrank_cache.evaluation.answers import Prompter
from tests.evaluation.test_ruler import prose
from tests.oracle.character_tokenizer import character_tokenizer
from tests.oracle.models import tiny_model

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(prose(200))
    return path


def evaluate(model, out, text, *options):
    """Metrics of the full cache and of ``fisher:2``."""
    result = CliRunner().invoke(cli.app, arguments(model, out, text, *options))
    assert result.exit_code == 0, result.output
    metrics = json.loads((out / "metrics.json").read_text())
    assert list(metrics) == ["full", "fisher:2"]
    return metrics


def arguments(model, out, text, *options):
    given = [
        "eval", model, "--out", out, "--text", text, "--calibrate-on", text, "--tokens", 1024, "--dtype", "float32",
        "--device", "cpu", "--lengths", 1500, "--tasks", "single", "--samples", 1, "--windows", 2, "--window", 64,
        "--residual-length", 8, "--chunk", 200, "--cache", "fisher:2", *options,
    ]  # fmt: skip
    return [str(argument) for argument in given]


def save(model, folder):
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def blockwise_llama():
    """4-bit products on CPUs want widths of whole blocks of 64."""
    config = tiny_model("llama").config
    config.intermediate_size = 128
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.filterwarnings("ignore:bitsandbytes.*an autograd kernel was not registered")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_model(text, tmp_path, kind):
    pytest.importorskip("bitsandbytes")
    whole = save(blockwise_llama(), tmp_path / "whole")
    format = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if kind == "nf4" else {"load_in_8bit": True}
    quantized = AutoModelForCausalLM.from_pretrained(
        whole, quantization_config=BitsAndBytesConfig(**format), dtype=torch.float32, device_map="cpu"
    )
    stored = save(quantized, tmp_path / "quantized")
    by_queries = ["--sensitivity", "query"]  # gradients do not pass through 4-bit weights on CPUs
    metrics = evaluate(stored, tmp_path / "out", text, *by_queries)
    reference = evaluate(whole, tmp_path / "reference", text, *by_queries)
    if kind == "nf4":
        refused = CliRunner().invoke(cli.app, arguments(stored, tmp_path / "refused", text))
        assert refused.exit_code == 1 and "Error: no gradient reached" in refused.output
        assert "Traceback" not in refused.output and "sensitivity='query'" in refused.output
    ours, theirs = (found["full"]["perplexity"]["value"] for found in (metrics, reference))
    assert ours != theirs and ours == pytest.approx(theirs, rel=0.15), "of the quantized weights"


def test_an_adapter(text, tmp_path):
    peft = pytest.importorskip("peft")
    whole = save(blockwise_llama(), tmp_path / "whole")
    torch.manual_seed(0)
    options = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(whole), options)
    adapted.save_pretrained(tmp_path / "adapter")
    character_tokenizer().save_pretrained(tmp_path / "adapter")
    metrics = evaluate(tmp_path / "adapter", tmp_path / "out", text)
    merged = save(adapted.merge_and_unload(), tmp_path / "merged")
    expected = evaluate(merged, tmp_path / "expected", text)
    plain = evaluate(whole, tmp_path / "plain", text)
    value = {name: found["full"]["perplexity"]["value"] for name, found in
             (("adapter", metrics), ("merged", expected), ("plain", plain))}  # fmt: skip
    assert value["adapter"] == pytest.approx(value["merged"], rel=1e-4)
    assert value["adapter"] != pytest.approx(value["plain"], rel=1e-3)
    ratio = {name: found["fisher:2"]["perplexity"]["value"] for name, found in (("a", metrics), ("m", expected))}
    assert ratio["a"] == pytest.approx(ratio["m"], rel=1e-2)


def test_a_chat_template(text, tmp_path, monkeypatch):
    tokenizer = character_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    asked = []
    context = Prompter.context
    monkeypatch.setattr(Prompter, "context", lambda self, text: asked.append(context(self, text)) or asked[-1])
    for name, options, start in (("chat", ["--chat"], "[user]"), ("plain", [], "")):
        asked.clear()
        evaluate(tmp_path / "model", tmp_path / name, text, *options)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["settings"]["chat"] is (name == "chat")
        read = tokenizer.decode(asked[-1])
        assert read.startswith(start) and read.startswith("[user]") is (name == "chat") and len(read) > 1000
    without = CliRunner().invoke(
        cli.app, ["eval", str(save(tiny_model("llama"), tmp_path / "without")), "--out", str(tmp_path / "none"),
                  "--text", str(text), "--chat", "--device", "cpu", "--lengths", "1500", "--cache", "full"]
    )  # fmt: skip
    assert without.exit_code == 1 and "chat needs a tokenizer with a chat template" in without.output
