"""Calibration keeps sums, not activations."""

import gc
import weakref

import pytest

from lowrank_cache.calibration import calibrate, moments
from tests.oracle.models import random_tokens, tiny_model


@pytest.mark.parametrize("sensitivity", ["gradient", "query"])
def test_nothing_of_a_batch_outlives_it(monkeypatch, sensitivity):
    """A cycle through autograd is never collected, so every recorder must die with its batch, without the collector."""
    recorders: list[weakref.ref] = []
    alive: list[int] = []
    original = moments.Recorder.__init__

    def remember(self, *args):
        original(self, *args)
        alive.append(sum(recorder() is not None for recorder in recorders))
        recorders.append(weakref.ref(self))

    monkeypatch.setattr(moments.Recorder, "__init__", remember)
    gc.disable()
    try:
        batches = (random_tokens(1, 20, seed=seed) for seed in range(4))
        calibrate(tiny_model("llama"), batches, sensitivity=sensitivity, progress=False)
    finally:
        gc.enable()
    assert alive == [0, 0, 0, 0]
    assert all(recorder() is None for recorder in recorders)
