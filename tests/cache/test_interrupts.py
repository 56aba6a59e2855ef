"""An interrupt at any line of ours leaves a cache as it was, as it would have become, or clearly invalid.

A trace function raises KeyboardInterrupt before the n-th line that a forward, a crop or a reordering runs in this
package and in transformers' caches, which is where a signal may arrive.
"""

import contextlib
import copy
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

import lowrank_cache
from lowrank_cache import LowRankCache, latent_attention
from lowrank_cache.calibration import calibrate
from tests.oracle.memory import held_bytes
from tests.oracle.models import SMALL_SIZES, full_rank_projections, random_tokens, tiny_model

PACKAGE = str(Path(lowrank_cache.__file__).parent)
TRIALS = 12  # lines tried in each case, spread over all that run


class _Interrupt:
    """While active, raises KeyboardInterrupt before the ``at``-th line; counts lines if ``at`` is None."""

    def __init__(self, at: int | None = None):
        self.at, self.lines, self.where = at, 0, ""

    def __call__(self, frame, event, argument):
        name = frame.f_code.co_filename
        if not (name.startswith(PACKAGE) or name.endswith("transformers/cache_utils.py")):
            return None
        if event == "line":
            if self.lines == self.at:
                self.lines += 1
                self.where = f"{Path(name).name}:{frame.f_lineno}"
                raise KeyboardInterrupt
            self.lines += 1
        return self

    def __enter__(self):
        sys.settrace(self)
        return self

    def __exit__(self, *error):
        sys.settrace(None)


def lines_of(action) -> int:
    with _Interrupt() as counter:
        action()
    return counter.lines


def some_lines(count: int) -> list[int]:
    assert count > TRIALS
    return sorted(random.Random(0).sample(range(count), TRIALS))


def joint(model, **options):
    return LowRankCache(model, full_rank_projections("llama", 4, 3), compression_ratio=3, **SMALL_SIZES, **options)


def apart(model):
    return LowRankCache(model, full_rank_projections("llama", 1, 1, False), bits=4, **SMALL_SIZES)


def sliding(model):
    return LowRankCache(model, full_rank_projections("gemma3"), compression_ratio=2, **SMALL_SIZES)


def of_prompts(model):
    return LowRankCache(model, method="xkv", ranks=6, layer_group_size=3, **SMALL_SIZES)


CASES = {
    "joint": ("llama", joint, False),
    "apart": ("llama", apart, False),
    "attended": ("llama", joint, True),
    "xkv": ("llama", of_prompts, False),
    "sliding": ("gemma3", sliding, False),
}


def filled(model, make, tokens: int) -> LowRankCache:
    """A cache of two rows, the second left-padded by one."""
    cache = make(model)
    if tokens:
        mask = torch.ones(2, tokens, dtype=torch.long)
        mask[1, 0] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        model(random_tokens(2, tokens), attention_mask=mask, position_ids=positions, past_key_values=cache)
    return cache


def go_on(model, cache, pads: int, tokens: int, seed: int = 1) -> torch.Tensor:
    """Logits of more tokens; ``pads``: padding that the second row began with."""
    start = cache.get_seq_length()
    positions = torch.arange(start, start + tokens)[None] - torch.tensor([[0], [pads]])
    mask = torch.ones(2, start + tokens, dtype=torch.long)
    mask[1, :pads] = 0
    with torch.no_grad():
        return model(
            random_tokens(2, tokens, seed), attention_mask=mask, position_ids=positions, past_key_values=cache
        ).logits


@pytest.mark.parametrize("past, tokens", [(0, 12), (17, 7)])
@pytest.mark.parametrize("case", CASES)
def test_an_interrupted_forward_is_undone_or_done(case, past, tokens):
    family, make, attend = CASES[case]
    model = tiny_model(family)
    with latent_attention(model) if attend else contextlib.nullcontext():
        before, pads = filled(model, make, past), min(past, 1)
        done = copy.deepcopy(before)
        count = lines_of(lambda: go_on(model, done, pads, tokens))
        expected = {
            past: go_on(model, copy.deepcopy(before), pads, 3, 2),
            past + tokens: go_on(model, done, pads, 3, 2),
        }
        outcomes = set()
        for at in some_lines(count):
            cache = copy.deepcopy(before)
            with _Interrupt(at) as interrupt, contextlib.suppress(KeyboardInterrupt):
                go_on(model, cache, pads, tokens)
            length = cache.get_seq_length()
            assert length in expected, interrupt.where
            try:
                logits = go_on(model, cache, pads, 3, 2)
            except ValueError as error:
                assert case == "sliding" and "cannot be rolled back; call cache.reset()" in str(error), interrupt.where
                outcomes.add("refused")
                continue
            outcomes.add(length)
            assert torch.equal(logits, expected[length]), interrupt.where
            assert cache.stored_bytes() == held_bytes(cache), interrupt.where
        assert past in outcomes or case == "sliding", "no trial came before the end: nothing was tested"


CHANGES = {
    "crop": lambda cache: cache.crop(-6),
    "crop into latents": lambda cache: cache.crop(-14),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
    "reset": lambda cache: cache.reset(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("case", ["joint", "apart", "xkv"])
def test_an_interrupted_change_is_undone_done_or_known(case, change):
    family, make, _ = CASES[case]
    model = tiny_model(family)
    mask, text = torch.ones(2, 24, dtype=torch.long), random_tokens(2, 24)

    def forward(cache):
        """Logits of three tokens that continue whatever is cached."""
        start = cache.get_seq_length()
        with torch.no_grad():
            return model(text[:, start : start + 3], attention_mask=mask[:, : start + 3], past_key_values=cache).logits

    before = make(model)
    model(text[:, :18], past_key_values=before)
    done = copy.deepcopy(before)
    count = lines_of(lambda: CHANGES[change](done))
    expected = [forward(copy.deepcopy(before)), forward(done)]
    refused, trials = 0, some_lines(count)
    for at in trials:
        cache = copy.deepcopy(before)
        with _Interrupt(at) as interrupt, contextlib.suppress(KeyboardInterrupt):
            CHANGES[change](cache)
        try:
            logits = forward(cache)
        except ValueError as error:
            assert "was interrupted" in str(error) and "cache.reset()" in str(error), (interrupt.where, error)
            refused += 1
            cache.reset()
            model(text[:, :18], past_key_values=cache)
            assert torch.equal(forward(cache), expected[0]), interrupt.where
        else:
            assert any(logits.shape == other.shape and torch.equal(logits, other) for other in expected), (
                interrupt.where
            )
    assert refused > 0


def test_a_refused_change_is_no_interrupted_one():
    model = tiny_model("gemma3")
    cache = sliding(model)
    model(random_tokens(2, 12), past_key_values=cache)
    with pytest.raises(RuntimeError, match="does not track past states"):
        cache.crop(-2)
    with pytest.raises(IndexError):
        cache.batch_select_indices(torch.tensor([2]))
    assert torch.isfinite(model(random_tokens(2, 2), past_key_values=cache).logits).all()


def test_interrupted_calibration_leaves_the_model_as_it_was():
    model = tiny_model("llama").requires_grad_(True)
    batches = [random_tokens(2, 12)]
    count = lines_of(lambda: calibrate(model, batches, progress=False))
    for at in some_lines(count)[::3]:
        with _Interrupt(at), contextlib.suppress(KeyboardInterrupt):
            calibrate(model, batches, progress=False)
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
        assert not model.training


def test_interrupted_construction_is_not_remembered():
    model = tiny_model("llama")
    projections = calibrate(model, [random_tokens(2, 12)], progress=False)
    text = random_tokens(1, 18)
    count = lines_of(lambda: LowRankCache(model, projections, compression_ratio=4.0))
    settings = 4.1  # each trial's ratio is another one, whose bases have not been made yet
    for at in some_lines(count):
        settings += 0.01
        with _Interrupt(at), contextlib.suppress(KeyboardInterrupt):
            LowRankCache(model, projections, compression_ratio=settings)
        cache = LowRankCache(model, projections, compression_ratio=settings, **SMALL_SIZES)
        assert len(cache._stores) == len(projections.stores())
        model(text, past_key_values=cache)
        assert cache.stored_bytes() == held_bytes(cache) > 0


def _signalled(model, before, ready: int, trials: int) -> None:
    """Decode until SIGINT comes, ``trials`` times, and check after each that the cache went on as if it had not."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    steps = [random_tokens(1, 1, seed) for seed in range(4000)]
    for _ in range(trials):
        cache, start = copy.deepcopy(before), before.get_seq_length()
        with contextlib.suppress(KeyboardInterrupt):
            os.write(ready, b".")
            for step in steps:
                model(step, past_key_values=cache)
        done = cache.get_seq_length() - start
        assert done < len(steps), "no signal came"
        expected = copy.deepcopy(before)
        for step in steps[:done]:
            model(step, past_key_values=expected)
        ours, theirs = (model(random_tokens(1, 3), past_key_values=each).logits for each in (cache, expected))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("case", ["joint", "attended"])
def test_real_signals(case):
    family, make, attend = CASES[case]
    model, trials = tiny_model(family), 6
    with torch.no_grad(), latent_attention(model) if attend else contextlib.nullcontext():
        before = make(model)
        model(random_tokens(1, 12), past_key_values=before)
        reader, writer = os.pipe()
        child = os.fork()  # not a new process, which would take seconds to import
        if child == 0:
            try:
                _signalled(model, before, writer, trials)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        os.close(writer)
        delays = random.Random(0)
        while os.read(reader, 1):  # empty when the child has ended
            time.sleep(delays.uniform(0, 0.03))
            os.kill(child, signal.SIGINT)
        os.close(reader)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
