"""The quality table: every number from a measurement, resumable, in the words of its command line."""

import dataclasses
import json
from dataclasses import replace

import pytest
import torch
from lowrank_cache.models import layer_groups, model_shape
from transformers import DynamicCache

from lowrank_cache import LowRankCache
from lowrank_cache.calibration.moments import collect_moments
from lowrank_cache.evaluation.baselines import SimulatedKiviCache, make_baseline, tensor_bytes
from lowrank_cache.evaluation.biased_model import with_key_bias
from lowrank_cache.evaluation.configurations import Configuration, build, parse
from lowrank_cache.evaluation.perplexity import stream, windows_of
from lowrank_cache.evaluation.plots import plot_projections, plot_quality
from lowrank_cache.evaluation.quality import (
    QualityRow,
    QualitySettings,
    drift_markdown,
    markdown,
    measure,
    needle_markdown,
)
from lowrank_cache.evaluation.run_inputs import QualityRun, moments_of
from tests.oracle.models import full_rank_projections, random_tokens, tiny_model, wide_llama

SETTINGS = QualitySettings(
    windows=2,
    window=48,
    chunk=8,
    batch=2,
    lookups=8,
    entries=6,
    needles=((400, 4), (500, 8)),
    needle_chunk=50,
    residual_length=8,
    block_size=8,
)
TEXT = "".join(chr(33 + 7 * index % 90) for index in range(600))


def _tokenizer(text: str) -> dict:
    return {"input_ids": [byte % 128 for byte in text.encode()]}


def _configurations(names: list[str]):
    model = wide_llama()
    groups = {"both": layer_groups(model_shape(model), "both", 2)}
    moments = collect_moments(model, [random_tokens(2, 60)], groups)
    return model, build(names, moments)


def test_measures_resumes_and_prints(tmp_path):
    names = ["full", "quantized-fp8", "kivi-2", "fisher:4", "fisher:4,groups=1,frame=4,joint=0"]
    model, configurations = _configurations(names)
    results, said = tmp_path / "results.jsonl", []
    rows = measure(model, _tokenizer, TEXT, configurations, SETTINGS, results, said.append)
    assert [row.name for row in rows] == names
    assert said == [f"measuring {name}" for name in names]
    again = measure(model, _tokenizer, TEXT, configurations, SETTINGS, results, said.append)
    assert again == rows and len(said) == len(names)
    lines = results.read_text().splitlines()
    results.write_text("\n".join(lines[:3]) + "\n")  # cut after two rows
    measure(model, _tokenizer, TEXT, configurations, SETTINGS, results, said.append)
    assert said[len(names) :] == [f"measuring {name}" for name in names[2:]]
    assert all(len(row.lookup_losses) == 8 and len(row.needle_losses) == 12 for row in rows)
    table = markdown(rows)
    assert all(f"| {name} |" in table for name in names) and drift_markdown(rows).count("±") == 4 * 4
    assert all(line.count("|") == 6 for line in needle_markdown(rows, SETTINGS.needles).splitlines())
    plot_quality(rows, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_other_settings_are_not_mixed_into_old_results(tmp_path):
    model, configurations = _configurations(["full"])
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps({"settings": {"windows": 3}}) + "\n")
    with pytest.raises(ValueError, match="was made with other settings"):
        measure(model, _tokenizer, TEXT, configurations, SETTINGS, results)
    results.unlink()
    measure(model, _tokenizer, TEXT, configurations, SETTINGS, results, lambda line: None, {"text_sha256": "1"})
    with pytest.raises(ValueError, match="was made with other settings"):
        measure(model, _tokenizer, TEXT, configurations, SETTINGS, results, identity={"text_sha256": "2"})


def test_statistics_of_other_runs_are_not_taken_for_these(tmp_path):
    model, path = tiny_model("llama"), tmp_path / "moments.safetensors"
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 4)
    run = QualityRun("tiny", text, None, None, 1024, 0.0, "gradient", "float32")
    said = []
    made = moments_of(run, path, model, _tokenizer, said.append)
    again = moments_of(run, path, model, _tokenizer, said.append)
    assert said[0].startswith("calibrating on 1024 tokens") and said[1] == f"statistics read from {path}"
    assert again.tokens == made.tokens
    for change, message in (
        ({"tokens": 512}, "tokens 1024 instead of 512"),
        ({"sensitivity": "query"}, "sensitivity 'gradient' instead of 'query'"),
        ({"model": "other"}, "model 'tiny' instead of 'other'"),
    ):
        with pytest.raises(ValueError, match=f"was calibrated with other settings: {message}; name it with --moments"):
            moments_of(replace(run, **change), path, model, _tokenizer, said.append)
    text.write_text(TEXT * 4 + "More.")
    with pytest.raises(ValueError, match="text_sha256"):
        moments_of(run, path, model, _tokenizer, said.append)
    named = moments_of(replace(run, moments=path, tokens=1), tmp_path / "unused", model, _tokenizer, said.append)
    assert named.tokens == made.tokens


def test_exact_answers_are_counted_in_all_and_where_the_full_cache_is_right():
    def row(name, exact):
        answers = {"lookup_losses": [1.0] * 4, "lookup_exact": exact, "needle_losses": [], "needle_exact": []}
        return QualityRow(name, None, 1.0, 1.0, 0, [1.0, 2.0], [[1.0] * 4] * 2, **answers)

    table = markdown([row("full", [1.0, 1.0, 0.0, 0.0]), row("a", [1.0, 0.0, 1.0, 1.0])]).splitlines()
    assert "| 1.000 | 0.50 |" in table[2] and "| +0.000 ± 0.000 | 0.75 (0.50) |" in table[3]


@pytest.mark.parametrize("wrong", [{"lookups": 6}, {"needles": ((1000, 4), (2000, 3))}, {"lookups": -4}])
def test_questions_come_in_fours(wrong):
    with pytest.raises(ValueError, match="must be a multiple of 4, asked of each text, got"):
        QualitySettings(**wrong)


def test_a_row_is_what_the_cache_itself_gives(tmp_path):
    model, configurations = _configurations(["fisher:4"])
    row = measure(model, _tokenizer, TEXT, configurations, SETTINGS, tmp_path / "r.jsonl")[1]
    projections, options = configurations["fisher:4"]
    ids = torch.tensor(_tokenizer(TEXT)["input_ids"])
    made = []

    def make():
        made.append(LowRankCache(model, projections, residual_length=8, block_size=8, **options))
        return made[-1]

    losses = stream(model, windows_of(ids, 48, 2), make, chunk=8, batch=2)
    assert row.losses == pytest.approx(losses.mean(1).tolist(), rel=1e-6)
    assert row.real_ratio == pytest.approx(made[-1].compression_ratio())
    assert row.projection_bytes == made[-1].projection_bytes()


def test_a_prompt_is_not_scored_and_serves_xkv(tmp_path):
    model, configurations = _configurations(["xkv:2,groups=3", "xkv:2,groups=3,new=exact"])
    settings = dataclasses.replace(SETTINGS, prompt=32)
    rows = measure(model, _tokenizer, TEXT, configurations, settings, tmp_path / "r.jsonl")
    ids = torch.tensor(_tokenizer(TEXT)["input_ids"])
    windows = windows_of(ids, 48, 2)
    for row, options in zip(rows, ({}, *(options for _, options in configurations.values())), strict=True):
        sizes = {"residual_length": 8, "block_size": 8}

        def make(options=options, sizes=sizes):
            return LowRankCache(model, **sizes, **options) if options else DynamicCache(config=model.config)

        losses = stream(model, windows, make, chunk=8, batch=2, prompt=32)[:, 31:]
        assert row.losses == pytest.approx(losses.mean(1).tolist(), rel=1e-5)
    assert rows[1].latent_ratio == pytest.approx(2, rel=0.1) and rows[1].projection_bytes == 0
    assert rows[1].real_ratio < rows[1].latent_ratio  # bases of so short a prompt weigh much


def test_values_of_recalkv_are_refitted_at_the_ratio_of_the_ranks():
    model, _ = _configurations([])
    shape = model_shape(model)
    groups = {side: layer_groups(shape, side, 1) for side in ("key", "value")}
    moments = collect_moments(model, [random_tokens(4, 30)], groups)
    asked = []

    def refit(projections, ratio):
        asked.append(ratio)
        assert projections.method == "recalkv"
        return moments

    built = build(["recalkv:4", "recalkv:12,bits=4", "recalkv:2,bits=4", "recalkv:4,bits=16", "palu:4"], moments, refit)
    assert asked == [4.0, 3.0]  # at 4 bits, 2x keeps every channel; equal bases are made once
    assert built["recalkv:4"][0].provenance["calibrate_values"]
    assert not built["recalkv:2,bits=4"][0].provenance["calibrate_values"]


def test_streaming_the_full_cache_is_the_models_own_loss():
    model = tiny_model("llama")
    windows = random_tokens(3, 40)
    streamed = stream(model, windows, lambda: DynamicCache(config=model.config), chunk=7, batch=2, prompt=11)
    with torch.no_grad():
        logits = model(windows).logits[:, :-1].double()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")
    torch.testing.assert_close(streamed, losses, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "specification, expected",
    [
        ("full", None),
        ("fisher:8.5", Configuration("fisher", 8.5)),
        ("fisher:10,groups=1,frame=16,joint=0", Configuration("fisher", 10, 1, 16, False)),
        ("palu:2,bits=4,groups=auto,ranks=9", Configuration("palu", 2, "auto", 1, None, 4, 9)),
        ("xkv:8,bits=4,groups=2,new=exact", Configuration("xkv", 8, 2, bits=4, new="exact")),
    ],
)
def test_specifications(specification, expected):
    assert parse(specification) == expected


@pytest.mark.parametrize(
    "wrong", ["fisher", "fisher:x", "nothing:8", "fisher:8,speed=1", "quantized-3", "fisher:8,groups=a"]
)
def test_wrong_specifications_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match="cache must be one of"):
        parse(wrong)


def test_simulated_kivi_quantizes_what_left_its_window_and_counts_three_bits():
    model = wide_llama()
    cache = SimulatedKiviCache(model, bits=2, residual_length=32)
    exact = DynamicCache(config=model.config)
    tokens = random_tokens(1, 200)
    with torch.no_grad():
        for start in range(0, 200, 40):
            for each in (cache, exact):
                model(tokens[:, start : start + 40], past_key_values=each)
    layer, truth = cache.layers[0], exact.layers[0]
    assert layer.quantized == 160
    assert not torch.equal(layer.keys[:, :, :160], truth.keys[:, :, :160])
    assert torch.equal(layer.keys[:, :, 160:], truth.keys[:, :, 160:])
    # Four levels over each range: no error above half a step, which is a third of the range.
    values = truth.values[:, :, :160].unflatten(3, (-1, 32))
    bound = (values.amax(4) - values.amin(4)) / 6 * 1.01 + 1e-3  # float16 steps and offsets
    assert ((layer.values[:, :, :160].unflatten(3, (-1, 32)) - values).abs().amax(4) <= bound).all()
    numbers = 2 * sum(layer.keys[:, :, 0].numel() for layer in cache.layers)
    assert cache.stored_bytes() == numbers * 160 * 3 / 8 + numbers * 40 * 4


def test_bytes_of_baselines_are_those_of_their_tensors():
    model = tiny_model("llama")
    full, fp8 = make_baseline("full", model, 8), make_baseline("quantized-fp8", model, 8)
    with torch.no_grad():
        for cache in (full, fp8):
            model(random_tokens(2, 50), past_key_values=cache)
    numbers = 3 * 2 * 2 * 50 * 2 * 16
    assert tensor_bytes(full) == 4 * numbers
    assert numbers <= tensor_bytes(fp8) <= numbers + 200  # one scale a layer and side
    with pytest.raises(ValueError, match="cache must be one of"):
        make_baseline("kivi-3", model, 8)


def test_a_biased_model_has_the_bias_and_otherwise_the_same_weights():
    model = tiny_model("llama")
    biased = with_key_bias(model, 5.0)
    assert torch.equal(biased.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight)
    bias = biased.model.layers[1].self_attn.k_proj.bias.view(2, 16)
    assert (bias[0, 4:8] == 5).all() and (bias[1, 4:8] == -5).all() and bias.abs().sum() == 40
    with pytest.raises(ValueError, match="without attention biases"):
        with_key_bias(biased, 5.0)


@pytest.mark.parametrize("joint", [True, False])
def test_projections_are_drawn(tmp_path, joint):
    projections = full_rank_projections("llama", 1, 3 if joint else (3, 3))
    plot_projections(projections.truncate(2), 4, tmp_path / "bits.png")
    assert (tmp_path / "bits.png").stat().st_size > 5000
