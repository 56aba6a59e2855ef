"""The text model with three positions a token, and what is measured of it."""

import torch
from transformers import DynamicCache

from tests.experiments import load
from tests.oracle.models import random_tokens, tiny_model

experiment = load("image_positions")


def test_equal_positions_are_plain_ones():
    model = tiny_model("llama")
    other, tokens = experiment.with_three_positions(model), random_tokens(2, 20)
    positions = torch.arange(20).expand(3, 2, -1)
    with torch.no_grad():
        expected, found = model(tokens).logits, other(input_ids=tokens, position_ids=positions).logits
        moved = other(input_ids=tokens, position_ids=positions * torch.tensor([1, 2, 3])[:, None, None]).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((moved - expected).abs().max()) > 1e-2


def test_positions():
    text, image = experiment.positions_of(False), experiment.positions_of(True)
    before, side, after = experiment.BEFORE, experiment.SIDE, experiment.AFTER
    assert text.shape == image.shape == (3, 1, before + side * side + after)
    assert torch.equal(text, torch.arange(text.shape[2]).expand(3, 1, -1))
    assert torch.equal(image[..., :before], text[..., :before])
    assert image[:, 0, before + 2 * side + 5].tolist() == [before, before + 2, before + 5]
    assert image[:, 0, before + side * side].tolist() == [before + side] * 3


def test_the_full_cache_does_not_diverge_from_itself_and_another_does(monkeypatch):
    for name, size in (("BEFORE", 8), ("SIDE", 4), ("AFTER", 40)):
        monkeypatch.setattr(experiment, name, size)
    model = experiment.with_three_positions(tiny_model("llama"))
    ids, positions = random_tokens(1, 64), experiment.positions_of(True)

    class Wrong(DynamicCache):
        def update(self, keys, values, *args, **kwargs):
            return super().update(keys, values * 1.1, *args, **kwargs)

    assert experiment.divergence(model, ids, positions, DynamicCache(config=model.config.get_text_config())) == 0
    assert experiment.divergence(model, ids, positions, Wrong(config=model.config.get_text_config())) > 1e-4
