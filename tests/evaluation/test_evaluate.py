"""The evaluation: every number from a record, every record measured once, and intervals that hold the truth."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch
from lowrank_cache.models import layer_groups, model_shape
from transformers import DynamicCache
from typer.testing import CliRunner

from lowrank_cache import cli
from lowrank_cache.calibration.moments import collect_moments
from lowrank_cache.evaluation.answers import fill, greedy_answer
from lowrank_cache.evaluation.baselines import make_baseline
from lowrank_cache.evaluation.bootstrap import paired_interval
from lowrank_cache.evaluation.cache_rows import cache_row
from lowrank_cache.evaluation.configurations import build
from lowrank_cache.evaluation.evaluate import EvaluationSettings, evaluate
from lowrank_cache.evaluation.perplexity import stream, windows_of
from lowrank_cache.evaluation.plots import plot_evaluation
from lowrank_cache.evaluation.report import metrics_of, report_markdown
from lowrank_cache.evaluation.text_source import load_text
from tests.evaluation.test_ruler import prose
from tests.oracle.character_tokenizer import character_tokenizer
from tests.oracle.models import random_tokens, tiny_model, wide_llama

SETTINGS = EvaluationSettings(
    lengths=(2000,), tasks=("multi-key", "tracking"), samples=2, windows=3, window=96, chunk=200, batch=2, steps=2,
    residual_length=8, block_size=8,
)  # fmt: skip
NAMES = ["full", "kivi-2", "fisher:4", "xkv:2,groups=2"]
CONFIG = {
    "model": "wide",
    "dtype": "float32",
    "device": "cpu",
    "text": "prose",
    "settings": dataclasses.asdict(SETTINGS),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    model = wide_llama()
    moments = collect_moments(model, [random_tokens(2, 60)], {"both": layer_groups(model_shape(model), "both", 2)})
    built = build(NAMES, moments)
    rows = [cache_row(name, *built[name], model, SETTINGS.sizes()) for name in NAMES]
    path = tmp_path_factory.mktemp("evaluation") / "samples.jsonl"
    seen = []
    records = evaluate(
        model, character_tokenizer(), prose(200), rows, SETTINGS, path, {"model": "wide"}, lambda *a: seen.append(a)
    )
    return model, rows, path, records, seen


def test_everything_is_measured_and_the_progress_ends_at_its_total(measured):
    _, _, path, records, seen = measured
    keys = {("window", None, None, index) for index in range(3)} | {("cost", None, 2000, 0)}
    keys |= {("answers", task, 2000, index) for task in SETTINGS.tasks for index in range(2)}
    assert {name: set(found) for name, found in records.items()} == dict.fromkeys(NAMES, keys)
    assert len(path.read_text().splitlines()) == 1 + 4 * len(keys)
    done, totals = [part[1] for part in seen], {part[2] for part in seen}
    assert done == sorted(done) and totals == {done[-1]} and done[0] == 0


def test_windows_are_what_the_cache_itself_gives(measured):
    model, rows, _, records, _ = measured
    windows = windows_of(torch.tensor(character_tokenizer()(prose(200))["input_ids"]), 96, 3)
    for row in rows:
        losses = stream(model, windows, row.make, chunk=200, batch=2).mean(1)
        found = [records[row.name]["window", None, None, index]["loss"] for index in range(3)]
        assert found == pytest.approx(losses.tolist(), rel=1e-4)


def test_bytes_are_those_of_the_cache_itself(measured):
    model, rows, _, records, _ = measured
    cache = rows[2].make()
    fill(model, cache, torch.tensor(character_tokenizer()(prose(200))["input_ids"])[:2003], chunk=200)
    assert records["fisher:4"]["cost", None, 2000, 0]["stored_bytes"] == pytest.approx(cache.stored_bytes(), rel=0.01)


def test_a_second_run_measures_only_what_is_new(measured, tmp_path, monkeypatch):
    model, rows, path, records, _ = measured
    again = tmp_path / "samples.jsonl"
    arguments = (character_tokenizer(), prose(200), rows)
    again.write_text(path.read_text()[:-20])  # a run that was killed while it wrote its last record
    asked = []
    monkeypatch.setattr("lowrank_cache.evaluation.evaluate.fill", lambda *a, **k: (asked.append(1), fill(*a, **k)))
    resumed = evaluate(model, *arguments, SETTINGS, again, {"model": "wide"})
    assert len(asked) == 1 and set(resumed["xkv:2,groups=2"]) == set(records["xkv:2,groups=2"])
    more = dataclasses.replace(SETTINGS, samples=3, tasks=("multi-key",))
    grown = evaluate(model, *arguments, more, again, {"model": "wide"})
    assert len(asked) == 1 + len(rows), "one more context of one task a cache"
    assert all(grown[name][key] == resumed[name][key] for name in NAMES for key in grown[name] if key in resumed[name])
    with pytest.raises(ValueError, match="was made with other settings"):
        evaluate(model, *arguments, dataclasses.replace(SETTINGS, chunk=100), again, {"model": "wide"})
    with pytest.raises(ValueError, match="was made with other settings"):
        evaluate(model, *arguments, SETTINGS, again, {"model": "another"})


def test_the_report_says_what_the_records_say(measured, tmp_path):
    _, rows, _, records, _ = measured
    metrics = json.loads(json.dumps(metrics_of(rows, records)))
    losses = {
        name: [found["window", None, None, index]["loss"] for index in range(3)] for name, found in records.items()
    }
    kivi = metrics["kivi-2"]
    assert metrics["full"]["perplexity"] == {"value": pytest.approx(math.exp(sum(losses["full"]) / 3)), "windows": 3}
    ratio = math.exp(sum(losses["kivi-2"]) / 3 - sum(losses["full"]) / 3)
    assert kivi["perplexity"]["ratio"] == pytest.approx(ratio)
    assert kivi["perplexity"]["low"] <= ratio <= kivi["perplexity"]["high"]
    at = kivi["lengths"]["2000"]
    assert at["fill_seconds"] is None and metrics["fisher:4"]["lengths"]["2000"]["fill_seconds"] > 0
    scores = [record["score"] for key, record in records["kivi-2"].items() if key[0] == "answers"]
    assert at["score"] == pytest.approx(sum(scores) / 4) and at["samples"] == 4
    assert at["smaller"] > 2 and metrics["full"]["lengths"]["2000"]["smaller"] == 1
    table = report_markdown(metrics, CONFIG)
    assert all(f"| {name} |" in table for name in NAMES) and "## Tasks at 2,000 tokens" in table
    widths = [line.count("|") for line in table.splitlines() if line.startswith("|")]
    assert widths == [7] * 6 + [4] * 6 + [5] * 6  # three tables of four caches
    plot_evaluation(metrics, tmp_path / "pareto.png")
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_an_interval_holds_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(1)
    held = 0
    for index in range(300):
        part = paired_interval([generator.exponential(size=40), generator.normal(1, 2, size=60)], draws=500, seed=index)
        assert part.low <= part.mean <= part.high
        held += part.low <= 1 <= part.high
    assert 0.9 < held / 300 < 0.985


def test_strata_count_alike_and_equal_differences_have_no_spread():
    part = paired_interval([[1.0], [0.0, 0.0, 0.0]])
    assert (part.mean, part.low, part.high) == (0.5, 0.5, 0.5)
    assert paired_interval([[0.0, 1.0]], seed=3) == paired_interval([[0.0, 1.0]], seed=3)
    for empty in ([], [[1.0], []]):
        with pytest.raises(ValueError, match="must have samples in each stratum"):
            paired_interval(empty)


@pytest.mark.parametrize("family", ["llama", "qwen3-next", "gemma3", "lfm2"])
def test_answers_are_those_of_generate_and_leave_the_cache_as_it_is(family):
    model = tiny_model(family)
    context, question = random_tokens(1, 50, seed=1), random_tokens(1, 6, seed=2)
    expected = model.generate(torch.cat([context, question], 1), max_new_tokens=7, do_sample=False)[0, 56:].tolist()
    cache = DynamicCache(config=model.config)
    fill(model, cache, context[0], chunk=13)
    for _ in range(2):
        assert greedy_answer(model, cache, question[0], 7, set()) == expected
    assert cache.get_seq_length() == 50
    assert greedy_answer(model, cache, question[0], 7, {expected[3]}) == expected[: expected.index(expected[3])]


@pytest.mark.parametrize("name", ["full", "quantized-fp8", "kivi-2"])
def test_an_answer_leaves_a_baseline_as_it_is(name):
    model = wide_llama()
    cache = make_baseline(name, model, 32)
    fill(model, cache, random_tokens(1, 90)[0], chunk=30)
    question = random_tokens(1, 40, seed=2)[0]
    first = greedy_answer(model, cache, question, 12, set())
    assert greedy_answer(model, cache, question, 12, set()) == first and cache.get_seq_length() == 90


@pytest.mark.parametrize(
    "wrong", [{"tasks": ("single", "sums")}, {"samples": -1}, {"chunk": 0}, {"window": 1}, {"steps": 0}]
)
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
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
        folder / "model", "--out", out, "--text", folder / "text.txt", "--calibrate-on", folder / "text.txt",
        "--tokens", 1024, "--dtype", "float32", "--device", "cpu", "--lengths", 2000, "--tasks", "single",
        "--samples", 1, "--windows", 2, "--window", 64, "--residual-length", 8, "--chunk", 200,
    ]  # fmt: skip
    caches = ["--cache", "fisher:3", "--cache", "recalkv:2"]
    unreachable = run(*options, *caches, "--cache", "fisher:1000")
    assert unreachable.exit_code == 1 and "cache 'fisher:1000' cannot be made" in unreachable.output
    assert not (out / "samples.jsonl").exists()
    result = run(*options, *caches)
    assert result.exit_code == 0, result.output
    assert {path.name for path in out.iterdir()} >= {"config.json", "samples.jsonl", "metrics.json", "report.md"}
    assert json.loads((out / "config.json").read_text())["caches"] == ["full", "fisher:3", "recalkv:2"]
    assert list(json.loads((out / "metrics.json").read_text())) == ["full", "fisher:3", "recalkv:2"]
    report = (out / "report.md").read_text()
    (out / "moments.safetensors").unlink()  # bases that were kept need no statistics
    again = run(*options, *caches)
    assert again.exit_code == 0 and (out / "report.md").read_text() == report
    (made,) = (path for path in (out / "projections").iterdir() if path.name.startswith("fisher"))
    ready = run(
        *options[:2], tmp_path / "ready", *options[3:], "--projections", made, "--cache", "fisher:3", "--attend"
    )
    assert ready.exit_code == 0, ready.output
    assert not (tmp_path / "ready" / "moments.safetensors").exists()
    kept, new = (json.loads((path / "metrics.json").read_text())["fisher:3"] for path in (out, tmp_path / "ready"))
    assert new["perplexity"]["value"] == pytest.approx(kept["perplexity"]["value"], rel=1e-3)
    wrong = run(*options[:2], tmp_path / "wrong", "--projections", made, "--cache", "fisher:3,frame=4")
    assert wrong.exit_code == 1 and "'fisher:3,frame=4' must not have groups, frame or joint" in wrong.output
    unused = run(*options[:2], tmp_path / "wrong", "--projections", made, "--cache", "xkv:3")
    assert unused.exit_code == 1 and "projections must be of a cache's method" in unused.output


def test_texts_of_a_data_set(tmp_path):
    rows = [{"text": "A line.\n", "more": "x"}, {"text": "Another.", "more": "y"}]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    name = f"dataset:{tmp_path / 'set'}"
    assert load_text(name, split="test") == ("A line.\nAnother.\n\n", name)
    assert load_text(f"{name},split=test,column=more")[0] == "x\n\ny\n\n"
    with pytest.raises(ValueError, match="must name a column of"):
        load_text(f"{name},column=words", split="test")
    for wrong in ("dataset:", f"{name},columns=text", f"{name},split"):
        with pytest.raises(ValueError, match="data set must be dataset:NAME"):
            load_text(wrong)
