"""Look-ups and needles for evaluation: each answer once, and a score that is the model's own loss."""

import re

import pytest
import torch
from transformers import DynamicCache

from lowrank_cache import LowRankCache
from lowrank_cache.calibration import calibrate
from lowrank_cache.evaluation.baselines import make_baseline
from lowrank_cache.evaluation.recall import RecallText, lookup_texts, needle_texts, score_recall
from tests.oracle.models import random_tokens, tiny_model, wide_llama


def _tokenizer(text: str) -> dict:
    """Bytes as tokens."""
    return {"input_ids": [byte % 128 for byte in text.encode()]}


def test_texts_hold_each_answer_once_and_questions_do_not():
    for tokens, text in [
        *((None, text) for text in lookup_texts(_tokenizer, 5, entries=8)),
        *((900, text) for text in needle_texts(_tokenizer, torch.zeros(3000), 5, 900)),
    ]:
        context = _string(text.context)
        assert tokens is None or len(context) == tokens
        assert len(text.questions) == 4
        for question, answer in text.questions:
            (line,) = [line for line in context.splitlines() if _string(answer) in line]
            name = re.search(r"(\w+ \w+)( opens with the number| is)$", _string(question))[1]
            assert name in line and _string(answer) not in _string(question)


def _string(ids: torch.Tensor) -> str:
    return "".join(map(chr, ids.long().tolist()))


def test_the_score_is_the_models_own_loss_on_the_answer():
    """Streamed, padded and batched, or in one forward alone: the same."""
    model = tiny_model("llama")
    lengths = (20, ((3, 3), (9, 1))), (33, ((5, 4), (2, 2))), (41, ((4, 2), (7, 5)))

    def tokens(length):
        return random_tokens(1, length, seed=length)[0]

    texts = [
        RecallText(tokens(context), tuple((tokens(question), tokens(answer)) for question, answer in pairs))
        for context, pairs in lengths
    ]
    result = score_recall(model, texts, lambda: DynamicCache(config=model.config), chunk=7, batch=2)
    asked = [(text.context, *pair) for text in texts for pair in text.questions]
    for (context, question, answer), loss, exact in zip(asked, result.loss, result.exact, strict=True):
        ids = torch.cat([context, question, answer])[None]
        with torch.no_grad():
            logits = model(ids).logits[0, -len(answer) - 1 : -1].double()
        torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, answer), rtol=1e-4, atol=1e-5)
        assert bool(exact) == bool((logits.argmax(-1) == answer).all())


@pytest.mark.parametrize("name", ["full", "quantized-fp8", "quantized-4", "kivi-2", "low-rank"])
def test_a_question_does_not_change_what_the_next_one_sees(name):
    if name == "quantized-4":
        pytest.importorskip("optimum.quanto")
    model = wide_llama()
    projections = calibrate(model, [random_tokens(2, 60)], progress=False)

    def make_cache():
        if name == "low-rank":
            return LowRankCache(model, projections, compression_ratio=4, residual_length=8, block_size=8)
        return make_baseline(name, model, 32)

    tokens = [random_tokens(1, 40, seed=seed)[0] for seed in range(4)]
    context, pairs = torch.cat([tokens[3]] * 3), tuple((each[:35], each[35:]) for each in tokens[:3])
    together = score_recall(model, [RecallText(context, pairs)], make_cache, chunk=16)
    alone = [score_recall(model, [RecallText(context, (pair,))], make_cache, chunk=16) for pair in pairs]
    assert together.loss.tolist() == [float(each.loss) for each in alone]
