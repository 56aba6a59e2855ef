"""Simulated KIVI: its arithmetic and bytes, and as one more baseline of eval."""

import json

import pytest
import torch
from transformers import DynamicCache

from lowrank_cache.evaluation.caches import BASELINES, tensor_bytes
from lowrank_cache.evaluation.streaming import fill, force_answers, greedy_answer
from tests.evaluation.test_tasks import prose
from tests.experiments import load
from tests.oracle.character_tokenizer import character_tokenizer
from tests.oracle.models import random_tokens, wide_llama

kivi = load("kivi")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """``kivi-4`` and ``kivi-2`` are known while a test runs."""
    for name in ("kivi-4", "kivi-2"):
        monkeypatch.setitem(BASELINES, name, None)  # gone again at the end
    kivi.register()


def test_simulated_kivi_quantizes_what_left_its_window_and_counts_three_bits():
    model = wide_llama()
    cache = BASELINES["kivi-2"](model, 32)
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
    assert tensor_bytes(cache) == numbers * 160 * 3 / 8 + numbers * 40 * 4


def test_questions_leave_it_as_it_is():
    model = wide_llama()
    cache = BASELINES["kivi-2"](model, 32)
    fill(model, cache, random_tokens(1, 90)[0], chunk=30)
    question = random_tokens(1, 40, seed=2)[0]
    first = greedy_answer(model, cache, question, 12, set())
    assert greedy_answer(model, cache, question, 12, set()) == first and cache.get_seq_length() == 90
    context, tokens = random_tokens(1, 120)[0], [random_tokens(1, 40, seed=seed)[0] for seed in range(3)]
    pairs = tuple((each[:35], each[35:]) for each in tokens)

    def forced(*questions):
        return force_answers(model, [context], [questions], lambda: BASELINES["kivi-2"](model, 32), chunk=16)[0]

    assert forced(*pairs) == [forced(pair)[0] for pair in pairs]


def test_command(tmp_path):
    wide_llama().save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(prose(200))
    words = f"eval {tmp_path}/model --out {tmp_path}/out --evaluate-on {tmp_path}/text.txt --dtype float32 --device cpu"
    words += " --samples 0 --lookups 0 --lengths 500 --windows 2 --window 64 --residual-length 8 --cache kivi-2"
    with pytest.raises(SystemExit) as ended:
        kivi.main(words.split())
    assert ended.value.code == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(metrics) == ["full", "kivi-2"] and metrics["kivi-2"]["lengths"]["500"]["smaller"] > 4
