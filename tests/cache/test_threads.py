"""Threads: each with a model or a cache of its own is safe; one cache in two forwards at once is refused."""

import copy
import gc
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DynamicCache

from lowrank_cache import LowRankCache, latent_attention
from lowrank_cache.calibration import calibrate
from lowrank_cache.hooks import hook_count
from lowrank_cache.models import model_shape
from tests.cache.test_latent_attention import registered
from tests.oracle.models import SMALL_SIZES, exact_cache, full_rank_projections, random_tokens, tiny_model


@pytest.fixture(autouse=True)
def _switch_threads_often():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def at_once(*actions):
    """Results of ``actions``, each in a thread of its own, begun together."""
    barrier = threading.Barrier(len(actions))

    def begin(action):
        barrier.wait()
        return action()

    with ThreadPoolExecutor(len(actions)) as pool:
        return [future.result() for future in [pool.submit(begin, action) for action in actions]]


def lossy(model, family):
    return LowRankCache(model, full_rank_projections(family, 4, 2), compression_ratio=2, **SMALL_SIZES)


def generated(model, cache, seed):
    return model.generate(random_tokens(2, 14, seed), past_key_values=cache, max_new_tokens=8, do_sample=False)


@pytest.mark.parametrize("attend", [False, True])
def test_two_models_in_two_threads(attend):
    families = ("llama", "qwen2")
    models = [tiny_model(family) for family in families]
    for family in families:
        full_rank_projections(family, 4, 2)

    def work(model, family):
        results = []
        for seed in range(3):
            handle = latent_attention(model) if attend else None  # the other thread registers and unregisters too
            results.append(generated(model, lossy(model, family), seed))
            if handle is not None:
                handle.remove()
        return torch.stack(results)

    alone = [work(model, family) for model, family in zip(models, families, strict=True)]
    together = at_once(*(lambda m=model, f=family: work(m, f) for model, family in zip(models, families, strict=True)))
    for one, other in zip(alone, together, strict=True):
        assert torch.equal(one, other)
    assert not registered()
    gc.collect()
    assert [hook_count(model.model) for model in models] == [0, 0]
    assert not any(model.model._forward_pre_hooks for model in models)


def test_two_caches_of_one_model_in_two_threads():
    model = tiny_model("llama")
    alone = [generated(model, lossy(model, "llama"), seed) for seed in (1, 2)]
    together = at_once(*(lambda s=seed: generated(model, lossy(model, "llama"), s) for seed in (1, 2)))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


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
    assert hook_count(model.model) == 1 == len(model.model._forward_pre_hooks)
    assert torch.isfinite(model(random_tokens(1, 9), past_key_values=kept).logits).all()


def test_truncated_bases_are_made_whole_by_two_threads():
    model = tiny_model("llama")
    projections = calibrate(model, [random_tokens(2, 12)], layer_group_size=1, progress=False)

    def stores(ratio):
        return len(LowRankCache(model, projections, compression_ratio=ratio)._stores)

    for step in range(5):
        ratio = 2 + step / 10
        assert at_once(lambda r=ratio: stores(r), lambda r=ratio: stores(r)) == [3, 3]


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


@pytest.mark.parametrize("attend", [False, True])
def test_a_second_forward_at_the_same_time_is_refused_and_harms_nothing(attend):
    model = tiny_model("llama")
    handle = latent_attention(model) if attend else None
    cache, twin = lossy(model, "llama"), lossy(model, "llama")
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
    if handle is not None:
        handle.remove()


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


def test_turns_of_two_generations_with_one_cache_are_refused_by_position():
    model = tiny_model("llama")
    cache = lossy(model, "llama")
    model(random_tokens(1, 12), past_key_values=cache)
    mine = torch.arange(12, 13)[None]
    model(random_tokens(1, 1), position_ids=mine, past_key_values=cache)  # the other generation's step
    with pytest.raises(ValueError, match="position_ids must continue the cached tokens"):
        model(random_tokens(1, 1), position_ids=mine, past_key_values=cache)
