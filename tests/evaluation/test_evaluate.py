"""The evaluation: every number from a record, every record measured once, for the models that people have."""

import dataclasses
import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache
from typer.testing import CliRunner

from lowrank_cache import LowRankCache, cli
from lowrank_cache.calibration.collect import collect_moments
from lowrank_cache.evaluation.caches import parse
from lowrank_cache.evaluation.evaluate import EvaluationSettings, evaluate
from lowrank_cache.evaluation.streaming import fill, force_answers, stream, windows_of
from lowrank_cache.evaluation.tasks import Prompter, lookup_texts, needle_texts
from lowrank_cache.probe import model_shape
from lowrank_cache.shapes import layer_groups
from tests.evaluation.test_caches import entries_of
from tests.evaluation.test_tasks import prose
from tests.oracle.character_tokenizer import character_tokenizer
from tests.oracle.models import random_tokens, tiny_model, wide_llama

SETTINGS = EvaluationSettings(
    lengths=(2000,), tasks=("multi-key", "tracking"), samples=2, lookups=8, facts=6, needles=((400, 4), (500, 8)),
    windows=3, window=96, chunk=200, batch=2, steps=2, residual_length=8, block_size=8,
)  # fmt: skip
NAMES = ["full", "quantized-fp8", "fisher:4", "xkv:2,groups=2"]
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    model = wide_llama()
    moments = collect_moments(model, [random_tokens(2, 60)], {"both": layer_groups(model_shape(model), "both", 2)})
    entries = entries_of(NAMES, moments, model, SETTINGS.sizes())
    path = tmp_path_factory.mktemp("evaluation") / "samples.jsonl"
    records = evaluate(model, character_tokenizer(), prose(200), entries, SETTINGS, path, {"model": "wide"})
    return model, entries, path, records


def test_everything_is_measured(measured):
    _, _, path, records = measured
    keys = {("window", None, None, index) for index in range(3)} | {("cost", None, 2000, 0)}
    keys |= {("codes", "lookup", 6, index) for index in range(2)} | {("codes", "needle", 400, 0)}
    keys |= {("codes", "needle", 500, index) for index in range(2)}
    keys |= {("answers", task, 2000, index) for task in SETTINGS.tasks for index in range(2)}
    assert {name: set(found) for name, found in records.items()} == dict.fromkeys(NAMES, keys)
    assert len(path.read_text().splitlines()) == 1 + 4 * len(keys)


def test_windows_are_what_the_cache_itself_gives(measured):
    model, entries, _, records = measured
    windows = windows_of(torch.tensor(character_tokenizer()(prose(200))["input_ids"]), 96, 3)
    for entry in entries:
        losses = stream(model, windows, entry.make, chunk=200, batch=2)
        found = [records[entry.name]["window", None, None, index] for index in range(3)]
        assert [one["loss"] for one in found] == pytest.approx(losses.mean(1).tolist(), rel=1e-4)
        last = [one["quarters"][3] for one in found]
        assert last == pytest.approx(losses.tensor_split(4, dim=1)[3].mean(1).tolist(), rel=1e-4)


def test_a_prompt_is_not_scored_and_serves_xkv(tmp_path):
    model, names = wide_llama(), ["full", "xkv:2,groups=3", "xkv:2,groups=3,new=exact"]
    settings = dataclasses.replace(
        SETTINGS, window=48, chunk=8, prompt=32, samples=0, lookups=0, needles=(), lengths=()
    )
    entries = entries_of(names, None, model, settings.sizes())
    records = evaluate(model, character_tokenizer(), prose(200), entries, settings, tmp_path / "samples.jsonl", {})
    windows = windows_of(torch.tensor(character_tokenizer()(prose(200))["input_ids"]), 48, 3)
    for name in names:
        options = parse(name).options() if parse(name) else {}

        def make(options=options):
            if not options:
                return DynamicCache(config=model.config)
            return LowRankCache(model, residual_length=8, block_size=8, **options)

        losses = stream(model, windows, make, chunk=8, batch=2, prompt=32)[:, 31:]
        found = [records[name]["window", None, None, index]["loss"] for index in range(3)]
        assert found == pytest.approx(losses.mean(1).tolist(), rel=1e-5)


def test_codes_are_forced_through_the_cache_itself(measured):
    model, entries, _, records = measured
    tokenizer = character_tokenizer()
    haystack = torch.tensor(tokenizer(prose(200))["input_ids"])
    texts = {("lookup", 6): lookup_texts(tokenizer, 2, 6), ("needle", 500): needle_texts(tokenizer, haystack, 2, 500)}
    for (task, length), part in texts.items():
        contexts, questions = zip(*part, strict=True)
        expected = force_answers(model, contexts, questions, entries[2].make, chunk=200)
        for index, answers in enumerate(expected):
            found = records["fisher:4"]["codes", task, length, index]
            assert found["losses"] == pytest.approx([loss for loss, _ in answers], rel=1e-4)
            assert found["exact"] == [float(exact) for _, exact in answers]


def test_bytes_are_those_of_the_cache_itself(measured):
    model, entries, _, records = measured
    cache = entries[2].make()
    fill(model, cache, torch.tensor(character_tokenizer()(prose(200))["input_ids"])[:2003], chunk=200)
    assert records["fisher:4"]["cost", None, 2000, 0]["stored_bytes"] == pytest.approx(cache.stored_bytes(), rel=0.01)


def test_a_second_run_measures_only_what_is_new(measured, tmp_path, monkeypatch):
    model, entries, path, records = measured
    again = tmp_path / "samples.jsonl"
    arguments = (character_tokenizer(), prose(200), entries)
    again.write_text(path.read_text()[:-20])  # a run that was killed while it wrote its last record
    asked = []
    monkeypatch.setattr("lowrank_cache.evaluation.evaluate.fill", lambda *a, **k: (asked.append(1), fill(*a, **k)))
    resumed = evaluate(model, *arguments, SETTINGS, again, {"model": "wide"})
    assert len(asked) == 1 and set(resumed["xkv:2,groups=2"]) == set(records["xkv:2,groups=2"])
    more = dataclasses.replace(SETTINGS, samples=3, tasks=("multi-key",))
    grown = evaluate(model, *arguments, more, again, {"model": "wide"})
    assert len(asked) == 1 + len(entries), "one more context of one task a cache"
    assert all(grown[name][key] == resumed[name][key] for name in NAMES for key in grown[name] if key in resumed[name])
    with pytest.raises(ValueError, match="was made with other settings"):
        evaluate(model, *arguments, dataclasses.replace(SETTINGS, chunk=100), again, {"model": "wide"})
    with pytest.raises(ValueError, match="was made with other settings"):
        evaluate(model, *arguments, SETTINGS, again, {"model": "another"})


@pytest.mark.parametrize(
    "wrong", [{"tasks": ("single", "sums")}, {"samples": -1}, {"chunk": 0}, {"window": 1}, {"steps": 0}]
)
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        EvaluationSettings(**wrong)


@pytest.mark.parametrize("wrong", [{"lookups": 6}, {"needles": ((1000, 4), (2000, 3))}, {"lookups": -4}])
def test_questions_come_in_fours(wrong):
    with pytest.raises(ValueError, match="must be a multiple of 4, asked of each text, got"):
        EvaluationSettings(**wrong)


def run(*arguments):
    return CliRunner().invoke(cli.app, ["eval", *(str(argument) for argument in arguments)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(path / "model")
    character_tokenizer().save_pretrained(path / "model")
    (path / "text.txt").write_text(prose(200))
    return path


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        ("fischer:8", "got 'fischer:8'"),
        ("fisher:0.5", "ratio of at least 1, got 'fisher:0.5'"),
        ("palu:2,bits=3", "bits of .* got 'palu:2,bits=3'"),
    ],
)
def test_a_wrong_cache_fails_by_name_before_any_work(tmp_path, cache, message):
    result = run("no-such-model", "--out", tmp_path / "out", "--cache", "full", "--cache", cache)
    assert result.exit_code == 1 and not (tmp_path / "out").exists()
    assert "no-such-model" not in result.output
    assert re.search(message, result.output)


def test_from_a_model_and_a_text_to_a_report(folder, tmp_path):
    out = tmp_path / "out"
    options = [
        folder / "model", "--out", out, "--evaluate-on", folder / "text.txt", "--calibrate-on", folder / "text.txt",
        "--tokens", 1024, "--dtype", "float32", "--device", "cpu", "--lengths", 2000, "--tasks", "single",
        "--samples", 1, "--lookups", 4, "--windows", 2, "--window", 64, "--residual-length", 8, "--chunk", 200,
    ]  # fmt: skip
    caches = ["--cache", "fisher:3", "--cache", "recalkv:2"]
    unreachable = run(*options, *caches, "--cache", "fisher:1000")
    assert unreachable.exit_code == 1 and "cache 'fisher:1000' cannot be made" in unreachable.output
    assert not (out / "samples.jsonl").exists()
    result = run(*options, *caches)
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} >= {
        "config.json",
        "samples.jsonl",
        "metrics.json",
        "report.md",
        "report.html",
    }
    assert json.loads((out / "config.json").read_text())["caches"] == ["full", "fisher:3", "recalkv:2"]
    assert list(json.loads((out / "metrics.json").read_text())) == ["full", "fisher:3", "recalkv:2"]
    report = (out / "report.md").read_text()
    (out / "moments.safetensors").unlink()  # bases that were kept need no statistics
    again = run(*options, *caches)
    assert again.exit_code == 0 and (out / "report.md").read_text() == report
    (made,) = (path for path in (out / "projections").iterdir() if path.name.startswith("fisher"))
    ready = run(
        *options[:2], tmp_path / "ready", *options[3:], "--projections", made, "--cache", "fisher:3", "--no-attend"
    )
    assert ready.exit_code == 0, ready.output
    assert not (tmp_path / "ready" / "moments.safetensors").exists()
    kept, new = (json.loads((path / "metrics.json").read_text())["fisher:3"] for path in (out, tmp_path / "ready"))
    assert new["perplexity"]["value"] == pytest.approx(kept["perplexity"]["value"], rel=1e-3)
    wrong = run(*options[:2], tmp_path / "wrong", "--projections", made, "--cache", "fisher:3,frame=4")
    assert wrong.exit_code == 1 and "'fisher:3,frame=4' must not have groups, frame or joint" in wrong.output
    unused = run(*options[:2], tmp_path / "wrong", "--projections", made, "--cache", "xkv:3")
    assert unused.exit_code == 1 and "projections must be of a cache's method" in unused.output


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(prose(200))
    return path


def measure(model, out, text, *options):
    """Metrics of the full cache and of ``fisher:2``."""
    result = CliRunner().invoke(cli.app, arguments(model, out, text, *options))
    assert result.exit_code == 0, result.output
    metrics = json.loads((out / "metrics.json").read_text())
    assert list(metrics) == ["full", "fisher:2"]
    return metrics


def arguments(model, out, text, *options):
    given = [
        "eval", model, "--out", out, "--evaluate-on", text, "--calibrate-on", text, "--tokens", 1024, "--dtype",
        "float32", "--device", "cpu", "--lengths", 1500, "--tasks", "single", "--samples", 1, "--lookups", 0,
        "--windows", 2, "--window", 64, "--residual-length", 8, "--chunk", 200, "--cache", "fisher:2", *options,
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
    by_queries = ["--sensitivity", "query"]  # gradients do not pass through 4-bit weights on every CPU
    metrics = measure(stored, tmp_path / "out", text, *by_queries)
    reference = measure(whole, tmp_path / "reference", text, *by_queries)
    if kind == "nf4":
        tried = CliRunner().invoke(cli.app, arguments(stored, tmp_path / "tried", text))
        refused = "Error: no gradient reached" in tried.output and "sensitivity='query'" in tried.output
        assert tried.exit_code == (1 if refused else 0) and "Traceback" not in tried.output
        assert refused or (tmp_path / "tried" / "report.md").exists()
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
    metrics = measure(tmp_path / "adapter", tmp_path / "out", text)
    merged = save(adapted.merge_and_unload(), tmp_path / "merged")
    expected = measure(merged, tmp_path / "expected", text)
    plain = measure(whole, tmp_path / "plain", text)
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
        measure(tmp_path / "model", tmp_path / name, text, *options)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["settings"]["chat"] is (name == "chat")
        read = tokenizer.decode(asked[-1])
        assert read.startswith(start) and read.startswith("[user]") is (name == "chat") and len(read) > 1000
    without = CliRunner().invoke(
        cli.app, ["eval", str(save(tiny_model("llama"), tmp_path / "without")), "--out", str(tmp_path / "none"),
                  "--evaluate-on", str(text), "--chat", "--device", "cpu", "--lengths", "1500", "--cache", "full"]
    )  # fmt: skip
    assert without.exit_code == 1 and "chat needs a tokenizer with a chat template" in without.output
