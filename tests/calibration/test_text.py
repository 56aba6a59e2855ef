"""Calibration text: generated look-ups among prose."""

import pytest
import torch

from lowrank_cache.calibration.text import lookup_text, mixed_batches


def _tokenizer(text: str) -> dict:
    """Bytes as tokens."""
    return {"input_ids": [byte % 128 for byte in text.encode()]}


def test_lookup_text_asks_only_what_it_stated():
    for seed in range(20):
        text = lookup_text(seed, pairs=6, questions=6)
        lines = text.strip().splitlines()
        assert len(lines) == 12 and text == lookup_text(seed, pairs=6, questions=6)
        stated = " ".join(lines[:6])
        for line in lines[6:]:
            value = line.rstrip('."').split()[-1].strip('"')
            assert value in stated


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_mixed_batches_hold_the_share_they_promise(share):
    prose = "z" * 20_000
    batches = list(mixed_batches(_tokenizer, prose, tokens=1600, window=100, recall_share=share))
    assert [tuple(batch.shape) for batch in batches] == [(1, 100)] * 16
    is_prose = [bool((batch == ord("z")).all()) for batch in batches]
    assert is_prose.count(False) == round(16 * share)
    again = list(mixed_batches(_tokenizer, prose, tokens=1600, window=100, recall_share=share))
    assert all(torch.equal(one, other) for one, other in zip(batches, again, strict=True))


def test_mixed_batches_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match="recall_share must be in"):
        list(mixed_batches(_tokenizer, "z" * 1000, tokens=500, window=100, recall_share=1.5))
    with pytest.raises(ValueError, match="text must hold at least 400 tokens, got 200"):
        list(mixed_batches(_tokenizer, "z" * 200, tokens=400, window=100, recall_share=0))
    with pytest.raises(ValueError, match="at least one window"):
        list(mixed_batches(_tokenizer, "z" * 200, tokens=50, window=100))
