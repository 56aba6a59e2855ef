"""What surrounds one forward of a cache: the hook that announces it, whose thread it is, and how it is undone.

An interrupt at any line of ours leaves a cache as it was, as it would have become, or clearly invalid. A trace function
raises KeyboardInterrupt before the n-th line that a forward, a crop or a reordering runs in this package and in
transformers' caches, which is where a signal may arrive.
"""

import contextlib
import copy
import gc
import os
import random
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

import lowrank_cache
from lowrank_cache import LowRankCache, latent_attention
from lowrank_cache.calibration import calibrate
from lowrank_cache.probe import model_shape
from tests.oracle.inside import wrapped_attention
from tests.oracle.memory import held_bytes
from tests.oracle.models import SMALL_SIZES, exact_cache, full_rank_projections, random_tokens, tiny_model

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


def reconstructed(model):
    return joint(model, attend="reconstruct")


def apart(model):
    return LowRankCache(model, full_rank_projections("llama", 1, 1, False), bits=4, attend="reconstruct", **SMALL_SIZES)


def sliding(model):
    return LowRankCache(model, full_rank_projections("gemma3"), compression_ratio=2, **SMALL_SIZES)


def of_prompts(model):
    return LowRankCache(model, method="xkv", ranks=6, layer_group_size=3, **SMALL_SIZES)


CASES = {
    "joint": ("llama", reconstructed),
    "apart": ("llama", apart),
    "attended": ("llama", joint),
    "xkv": ("llama", of_prompts),
    "sliding": ("gemma3", sliding),
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
    family, make = CASES[case]
    model = tiny_model(family)
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
    family, make = CASES[case]
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
        assert len(cache.groups()) == len(projections.groups())
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
    family, make = CASES[case]
    model, trials = tiny_model(family), 6
    with torch.no_grad():
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


# The hook


def lossy(model, family="llama", **options):
    return LowRankCache(
        model, full_rank_projections(family, 4, 2), **{"compression_ratio": 2, **SMALL_SIZES, **options}
    )


def greedy(model, tokens, cache):
    return model.generate(tokens, past_key_values=cache, max_new_tokens=12, do_sample=False)


def test_hooks_are_counted_and_removed_with_the_last_cache():
    model = tiny_model("llama")
    decoder = model.model
    assert not decoder._forward_pre_hooks
    first, second = lossy(model), lossy(model)
    third = copy.deepcopy(first)
    assert len(decoder._forward_pre_hooks) == 1
    del first, second
    gc.collect()
    assert len(decoder._forward_pre_hooks) == 1
    greedy(model, random_tokens(1, 12), third)  # the copy's own reference keeps it working
    del third
    gc.collect()
    assert not decoder._forward_pre_hooks


def test_the_hook_keeps_neither_model_nor_cache_alive():
    model = tiny_model("llama")
    cache = lossy(model)
    greedy(model, random_tokens(1, 12), cache)
    tensors = [torch.utils.weak.WeakTensorKeyDictionary()]
    tensors[0][model.lm_head.weight] = True
    del model
    gc.collect()
    assert len(tensors[0]) == 0, "a cache must not keep its model alive"
    del cache  # its finalizer must cope with a model that is gone


def test_a_refused_cache_leaves_no_hook():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="bits"):
        lossy(model, bits=5)
    gc.collect()
    assert not model.model._forward_pre_hooks


def test_two_models_and_two_caches_interleave():
    models = [tiny_model("llama"), tiny_model("qwen2")]
    prompts = [random_tokens(1, 20, seed) for seed in (1, 2)]
    families = ("llama", "qwen2")
    alone = [[], []]
    for index, (model, family) in enumerate(zip(models, families, strict=True)):
        cache = lossy(model, family)
        alone[index] = [model(part, past_key_values=cache).logits for part in prompts[index].split(5, dim=1)]
    caches = [[lossy(model, family) for _ in range(2)] for model, family in zip(models, families, strict=True)]
    for step in range(4):
        for index, model in enumerate(models):
            for cache in caches[index]:
                part = prompts[index][:, 5 * step : 5 * step + 5]
                assert torch.equal(model(part, past_key_values=cache).logits, alone[index][step])


def test_a_deep_copied_model_can_have_caches_of_its_own():
    model, text = tiny_model("gemma3"), random_tokens(1, 20)
    cache = exact_cache(model, full_rank_projections("gemma3"))
    twin = copy.deepcopy(model)  # takes the hook along
    own = exact_cache(twin, full_rank_projections("gemma3"))
    for part in text.split(5, dim=1):
        assert torch.equal(twin(part, past_key_values=own).logits, model(part, past_key_values=cache).logits)


def test_the_hook_goes_at_once_with_the_last_cache():
    model = tiny_model("llama")
    decoder = model.get_decoder()
    first = exact_cache(model, full_rank_projections("llama"))
    second = exact_cache(model, full_rank_projections("llama"))
    assert len(decoder._forward_pre_hooks) == 1
    del first
    assert len(decoder._forward_pre_hooks) == 1
    del second
    assert not decoder._forward_pre_hooks


# Threads


@pytest.fixture
def switching_threads_often():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


often = pytest.mark.usefixtures("switching_threads_often")


def at_once(*actions):
    """Results of ``actions``, each in a thread of its own, begun together."""
    barrier = threading.Barrier(len(actions))

    def begin(action):
        barrier.wait()
        return action()

    with ThreadPoolExecutor(len(actions)) as pool:
        return [future.result() for future in [pool.submit(begin, action) for action in actions]]


def test_fresh_caches_are_served_while_threads_come_and_go():
    """A thread that is about to start has no identity yet, which must not look like the holder of a fresh cache."""
    model, projections, ended = tiny_model("llama"), full_rank_projections("llama"), threading.Event()
    prompt = random_tokens(1, 3)
    expected = model(prompt, past_key_values=exact_cache(model, projections)).logits

    def come_and_go():
        while not ended.is_set():
            threads = [threading.Thread(target=lambda: None) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    def serve():
        with torch.no_grad():
            return [
                torch.allclose(model(prompt, past_key_values=exact_cache(model, projections)).logits, expected)
                for _ in range(200)
            ]

    restless = [threading.Thread(target=come_and_go) for _ in range(2)]
    for thread in restless:
        thread.start()
    try:
        served = at_once(*[serve] * 8)
    finally:
        ended.set()
        for thread in restless:
            thread.join()
    assert all(all(right) for right in served)


def generated(model, cache, seed):
    return model.generate(random_tokens(2, 14, seed), past_key_values=cache, max_new_tokens=8, do_sample=False)


@often
@pytest.mark.parametrize("attend", ["reconstruct", "auto", "handle"])
def test_two_models_in_two_threads(attend):
    families = ("llama", "qwen2")
    models = [tiny_model(family) for family in families]
    for family in families:
        full_rank_projections(family, 4, 2)

    def work(model, family):
        results = []
        for seed in range(3):
            handle = latent_attention(model) if attend == "handle" else None  # the other thread comes and goes too
            option = "auto" if attend == "handle" else attend
            results.append(generated(model, lossy(model, family, attend=option), seed))
            if handle is not None:
                handle.remove()
        return torch.stack(results)

    alone = [work(model, family) for model, family in zip(models, families, strict=True)]
    together = at_once(*(lambda m=model, f=family: work(m, f) for model, family in zip(models, families, strict=True)))
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)
    gc.collect()
    assert not wrapped_attention()
    assert not any(model.model._forward_pre_hooks for model in models)


@often
def test_two_caches_of_one_model_in_two_threads():
    model = tiny_model("llama")
    alone = [generated(model, lossy(model, "llama"), seed) for seed in (1, 2)]
    together = at_once(*(lambda s=seed: generated(model, lossy(model, "llama"), s) for seed in (1, 2)))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


@often
def test_caches_come_and_go_in_many_threads():
    model, projections = tiny_model("llama"), full_rank_projections("llama")

    def come_and_go():
        for _ in range(20):
            cache = exact_cache(model, projections)
            copy.deepcopy(cache)
            del cache

    kept = exact_cache(model, projections)
    at_once(*[come_and_go] * 4)
    gc.collect()
    assert len(model.model._forward_pre_hooks) == len(model.model._forward_hooks) == 1
    assert torch.isfinite(model(random_tokens(1, 9), past_key_values=kept).logits).all()


@often
def test_probing_a_model_does_not_disturb_its_use_in_another_thread():
    model, text = tiny_model("llama"), random_tokens(1, 9)
    expected, probing, done = model(text).logits, threading.Event(), threading.Event()

    def pause(module, args):
        if threading.current_thread() is not threading.main_thread():
            probing.set()
            done.wait(60)

    handle = model.model.layers[2].register_forward_pre_hook(pause)
    prober = threading.Thread(target=model_shape, args=(model,))
    prober.start()
    assert probing.wait(60)
    logits = model(text, past_key_values=DynamicCache(config=model.config)).logits
    done.set()
    prober.join()
    handle.remove()
    assert torch.equal(logits, expected)


class InAnotherThread:
    """A forward with ``cache`` that another thread has begun and not ended, until the block ends."""

    def __init__(self, model, cache, error=None):
        self.model, self.cache, self.error = model, cache, error
        self.inside, self.leave = threading.Event(), threading.Event()

    def _wait(self, module, args):
        if threading.current_thread() is self.thread:
            self.inside.set()
            self.leave.wait(60)
            if self.error is not None:
                raise self.error

    def _forward(self):
        try:
            self.logits = self.model(random_tokens(2, 3, 5), past_key_values=self.cache).logits
        except RuntimeError as error:
            assert error is self.error
        self.failed.set()
        self.stay.wait(60)

    def __enter__(self):
        self.failed, self.stay = threading.Event(), threading.Event()
        self.handle = self.model.model.layers[1].register_forward_pre_hook(self._wait)
        self.thread = threading.Thread(target=self._forward)
        self.thread.start()
        assert self.inside.wait(60)
        return self

    def end_forward(self):
        self.leave.set()
        assert self.failed.wait(60)

    def __exit__(self, *error):
        self.end_forward()
        self.stay.set()
        self.thread.join()
        self.handle.remove()


@often
@pytest.mark.parametrize("attend", ["reconstruct", "auto"])
def test_a_second_forward_at_the_same_time_is_refused_and_harms_nothing(attend):
    model = tiny_model("llama")
    cache, twin = lossy(model, "llama", attend=attend), lossy(model, "llama", attend=attend)
    for each in (cache, twin):
        model(random_tokens(2, 12), past_key_values=each)
    with InAnotherThread(model, cache) as other:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="another thread's forward with this cache has not ended"):
                model(random_tokens(2, 3, 6), past_key_values=cache)
        with pytest.raises(ValueError, match="updated outside a forward"):
            cache.update(torch.zeros(2, 2, 3, 16), torch.zeros(2, 2, 3, 16), 1)
    assert torch.equal(other.logits, model(random_tokens(2, 3, 5), past_key_values=twin).logits)
    for each in (cache, twin):
        each.last = model(random_tokens(2, 3, 7), past_key_values=each).logits
    assert torch.equal(cache.last, twin.last)


@often
def test_a_forward_that_failed_in_another_thread():
    model = tiny_model("llama")
    cache, twin = lossy(model, "llama"), lossy(model, "llama")
    for each in (cache, twin):
        model(random_tokens(2, 12), past_key_values=each)
    text = random_tokens(2, 3, 7)
    with InAnotherThread(model, cache, error=RuntimeError("failed")) as other:
        other.end_forward()  # the thread lives on
        with pytest.raises(RuntimeError, match=r"if that forward failed, call cache.crop\(0\) first"):
            model(text, past_key_values=cache)
        cache.crop(0)
        assert torch.equal(model(text, past_key_values=cache).logits, model(text, past_key_values=twin).logits)
    with InAnotherThread(model, cache, error=RuntimeError("failed")):
        pass
    # The thread has ended, so its forward cannot go on.
    assert torch.equal(model(text, past_key_values=cache).logits, model(text, past_key_values=twin).logits)


@often
def test_truncated_bases_are_made_whole_by_two_threads():
    model = tiny_model("llama")
    projections = calibrate(model, [random_tokens(2, 12)], layer_group_size=1, progress=False)

    def stores(ratio):
        return len(LowRankCache(model, projections, compression_ratio=ratio).groups())

    for step in range(5):
        ratio = 2 + step / 10
        assert at_once(lambda r=ratio: stores(r), lambda r=ratio: stores(r)) == [3, 3]
