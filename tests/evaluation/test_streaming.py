"""Streaming: the model's own numbers where nothing is lost, and caches that a question leaves as they are."""

import pytest
import torch
from transformers import DynamicCache

from lowrank_cache import LowRankCache
from lowrank_cache.calibration import calibrate
from lowrank_cache.evaluation.caches import BASELINES
from lowrank_cache.evaluation.streaming import fill, force_answers, greedy_answer, stream
from tests.oracle.models import random_tokens, tiny_model, wide_llama


def forced(model, texts, make_cache, chunk):
    contexts, questions = zip(*texts, strict=True)
    return force_answers(model, contexts, questions, make_cache, chunk=chunk)


def test_streaming_the_full_cache_is_the_models_own_loss():
    model = tiny_model("llama")
    windows = random_tokens(3, 40)
    streamed = stream(model, windows, lambda: DynamicCache(config=model.config), chunk=7, batch=2, prompt=11)
    with torch.no_grad():
        logits = model(windows).logits[:, :-1].double()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")
    torch.testing.assert_close(streamed, losses, rtol=1e-4, atol=1e-4)


def test_the_score_is_the_models_own_loss_on_the_answer():
    """Streamed, padded and batched, or in one forward alone: the same."""
    model = tiny_model("llama")
    lengths = (20, ((3, 3), (9, 1))), (33, ((5, 4), (2, 2))), (41, ((4, 2), (7, 5)))

    def tokens(length):
        return random_tokens(1, length, seed=length)[0]

    texts = [
        (tokens(context), tuple((tokens(question), tokens(answer)) for question, answer in pairs))
        for context, pairs in lengths
    ]
    found = [
        score
        for part in (texts[:2], texts[2:])
        for scores in forced(model, part, lambda: DynamicCache(config=model.config), chunk=7)
        for score in scores
    ]
    asked = [(context, *pair) for context, pairs in texts for pair in pairs]
    for (context, question, answer), (loss, exact) in zip(asked, found, strict=True):
        ids = torch.cat([context, question, answer])[None]
        with torch.no_grad():
            logits = model(ids).logits[0, -len(answer) - 1 : -1].double()
        assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, answer)), rel=1e-4, abs=1e-5)
        assert exact == bool((logits.argmax(-1) == answer).all())


@pytest.mark.parametrize("name", ["full", "quantized-fp8", "quantized-4", "low-rank"])
def test_a_question_does_not_change_what_the_next_one_sees(name):
    if name == "quantized-4":
        pytest.importorskip("optimum.quanto")
    model = wide_llama()
    projections = calibrate(model, [random_tokens(2, 60)], progress=False)

    def make_cache():
        if name == "low-rank":
            return LowRankCache(model, projections, compression_ratio=4, residual_length=8, block_size=8)
        return BASELINES[name](model, 32)

    tokens = [random_tokens(1, 40, seed=seed)[0] for seed in range(4)]
    context, pairs = torch.cat([tokens[3]] * 3), tuple((each[:35], each[35:]) for each in tokens[:3])
    (together,) = forced(model, [(context, pairs)], make_cache, chunk=16)
    alone = [forced(model, [(context, (pair,))], make_cache, chunk=16)[0][0] for pair in pairs]
    assert together == alone


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


@pytest.mark.parametrize("name", ["full", "quantized-fp8"])
def test_an_answer_leaves_a_baseline_as_it_is(name):
    model = wide_llama()
    cache = BASELINES[name](model, 32)
    fill(model, cache, random_tokens(1, 90)[0], chunk=30)
    question = random_tokens(1, 40, seed=2)[0]
    first = greedy_answer(model, cache, question, 12, set())
    assert greedy_answer(model, cache, question, 12, set()) == first and cache.get_seq_length() == 90
