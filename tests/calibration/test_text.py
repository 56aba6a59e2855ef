"""Calibration text: generated look-ups among prose."""

import pytest
import torch

from lowrank_cache.calibration.text import ids_within, lookup_text, mixed_batches, opening_of


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


class _Opening:
    """Bytes as tokens, after an opening."""

    bos_token_id = 200

    def __call__(self, text: str) -> dict:
        return {"input_ids": [200, *_tokenizer(text)["input_ids"]]}


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_each_sequence_begins_as_the_tokenizer_begins_a_text(share):
    for batch in mixed_batches(_Opening(), "z" * 20_000, tokens=1600, window=100, recall_share=share):
        assert batch.shape == (1, 100)
        assert batch[0, 0] == 200 and not bool((batch[0, 1:] == 200).any())


def test_openings():
    unused = _Opening()
    unused.bos_token_id = 7  # has one, and does not put it there
    assert (opening_of(_tokenizer), opening_of(_Opening()), opening_of(unused)) == ([], [200], [])
    assert ids_within(_Opening(), "abc") == ids_within(_tokenizer, "abc") == [97, 98, 99]


def test_mixed_batches_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match="recall_share must be in"):
        list(mixed_batches(_tokenizer, "z" * 1000, tokens=500, window=100, recall_share=1.5))
    with pytest.raises(ValueError, match="text must hold at least 400 tokens, got 200"):
        list(mixed_batches(_tokenizer, "z" * 200, tokens=400, window=100, recall_share=0))
    with pytest.raises(ValueError, match="at least one window"):
        list(mixed_batches(_tokenizer, "z" * 200, tokens=50, window=100))
