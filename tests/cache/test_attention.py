"""A model that attends to latents gives what it gives with reconstructed states, in every mode, and is restored."""

import contextlib
import copy
import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from lowrank_cache import LowRankCache, latent_attention, latent_view
from lowrank_cache.calibration import calibrate
from lowrank_cache.kernels import native
from lowrank_cache.latent_view import attended_by
from tests.cache.test_generation import MODES, MORE_MODES, compare
from tests.oracle.inside import forbid_reconstruction
from tests.oracle.integer_attention import attention_in_float64
from tests.oracle.latent_sides import BAND_FACTOR
from tests.oracle.models import (
    FAMILIES,
    MORE_FAMILIES,
    REFUSED,
    SMALL_SIZES,
    exact_cache,
    full_rank_projections,
    random_tokens,
    tiny_model,
)
from tests.oracle.states import saved_tensors
from tests.oracle.tolerance import assert_within_reference_error, rounding_band

# Families of which no layer hands its cache's keys to attention as they are, and why.
RECONSTRUCTED = {
    "deepseek-v3": "expands its latents in between",
    "deepseek-v3-yarn": "expands its latents in between",
    "deepseek-v2": "expands its latents in between",
    "longcat-flash": "expands its latents in between",
    "gemma3n": "other layers reuse the keys",
    "falcon": "does not use transformers' attention interface",
}


@pytest.fixture
def switching():
    """Makes makers of exact caches that also switch the model, for ``test_generation.compare``."""
    handles = []

    def maker(projections, **options):
        def make(model):
            handles.append(latent_attention(model, **options))
            return exact_cache(model, projections)

        return make

    yield maker
    for handle in handles:
        handle.remove()
    assert handles and not registered()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(RECONSTRUCTED)))
def test_generation_mode_equals_dynamic_cache(family, mode, switching):
    compare(family, mode, switching(full_rank_projections(family, 4)), rounding_band(family, 4))


@pytest.mark.parametrize("mode", MORE_MODES)
@pytest.mark.parametrize("family", sorted({*FAMILIES, *MORE_FAMILIES} - set(RECONSTRUCTED)))
def test_pre_rope_keys_equal_dynamic_cache(family, mode, switching):
    compare(family, mode, switching(full_rank_projections(family)), rounding_band(family))


@pytest.mark.parametrize("family", sorted(RECONSTRUCTED))
def test_what_cannot_attend_to_latents_says_so_and_is_left_as_it_was(family):
    model = tiny_model(family)
    before = model.config._attn_implementation
    with pytest.raises(NotImplementedError, match="attention"):
        latent_attention(model)
    assert model.config._attn_implementation == before
    assert not registered()


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_what_the_cache_refuses_is_refused(family):
    with pytest.raises(NotImplementedError):
        latent_attention(tiny_model(family))


def lossy_logits(model, projections, tokens, chunks, **options):
    sizes = {**SMALL_SIZES, "compression_ratio": 4, **options}
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0  # one padded row
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = LowRankCache(model, projections, **sizes)
    logits, start = [], 0
    with torch.no_grad():
        for chunk in chunks:
            part = slice(start, start + chunk)
            start += chunk
            logits.append(
                model(
                    tokens[:, part],
                    attention_mask=mask[:, :start],
                    position_ids=positions[:, part],
                    past_key_values=cache,
                ).logits
            )
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("options", [{}, {"compression_ratio": 2, "bits": 8}, {"ranks": 0}, {"latent_dtype": None}])
@pytest.mark.parametrize(
    "method, frame_length, groups, joint",
    [
        ("fisher", 1, 1, True),
        ("fisher", 4, 1, False),
        ("fisher", 4, 3, True),
        ("fisher", 16, (1, 3), None),
        ("palu", 1, 1, None),
        ("palu", 4, 1, None),
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_lossy_logits_equal_those_of_reconstructed_states(family, method, frame_length, groups, joint, options):
    model = tiny_model(family)
    batches = [random_tokens(4, 20, seed=seed) for seed in (101, 102)]
    projections = calibrate(
        model,
        batches,
        method=method,
        frame_length=frame_length,
        layer_group_size=groups,
        joint=joint,
        progress=False,
    )
    tokens, chunks = random_tokens(2, 40, seed=6), [9, 1, 1, 4, 17, 1, 1, 6]
    expected = lossy_logits(model, projections, tokens, chunks, **options)
    with latent_attention(model, impl="torch"):
        actual = lossy_logits(model, projections, tokens, chunks, **options)
    # The same numbers in another order. A level that flips on a tie changes a latent by a whole step, so
    # nothing is promised for one number; the bulk must agree to rounding.
    assert float((actual - expected).abs().median()) <= 1e-5 * float(expected.abs().max())
    assert float((actual - expected).norm()) <= 1e-2 * float(expected.norm())


@pytest.mark.parametrize("groups, joint", [(1, False), ((1, 3), None)])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_native_logits_differ_by_what_its_roundings_explain(family, groups, joint, monkeypatch):
    model = tiny_model(family)
    batches = [random_tokens(4, 20, seed=seed) for seed in (101, 102)]
    options = {"frame_length": 16, "layer_group_size": groups, "joint": joint, "progress": False}
    projections = calibrate(model, batches, **options)
    tokens, chunks = random_tokens(2, 40, seed=6), [9, 1, 1, 4, 17, 1, 1, 6]

    def logits(noise):
        served = []

        def attend(query, key, value, *, impl, **options):
            served.append(key.latents is not None and native.serves(query, key, value))
            if noise is None:
                return native.attend(query, key, value, **options)
            return attention_in_float64(query, key, value, noise=noise, **options).float()

        monkeypatch.setattr(latent_view, "attend_stored", attend)
        with latent_attention(model):
            found = lossy_logits(model, projections, tokens, chunks)
        assert any(served)
        return found

    exact = logits(noise=False)
    moved = [logits(noise=True) - exact for _ in range(3)]
    error = logits(noise=None) - exact
    for size in (lambda x: float(x.abs().max()), lambda x: float(x.norm())):
        assert size(error) <= BAND_FACTOR * max(map(size, moved))


class _Shapes(TorchDispatchMode):
    """Shapes of every tensor that any operation makes while active."""

    def __init__(self):
        super().__init__()
        self.made = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.made.add((tuple(tensor.shape), tensor.element_size()))
        return result


def long_decode(model, projections, **options):
    """Shapes made by one decode step over 200 cached tokens."""
    cache = LowRankCache(model, projections, residual_length=8, block_size=8, **options)
    with torch.no_grad():
        model(random_tokens(1, 200), past_key_values=cache)
        with _Shapes() as shapes:
            model(random_tokens(1, 1), past_key_values=cache)
    return shapes.made


def test_decode_makes_no_dense_keys_or_values(monkeypatch):
    model = tiny_model("llama")
    projections = full_rank_projections("llama", 4)

    options = {"ranks": 40, "bits": 8}  # latents of another width than heads, so that shapes tell them apart

    def is_dense(shape):
        # Keys and values of all 180 or more latent tokens, as heads of 16 or as rows of 2 heads.
        return any(size >= 180 for size in shape[:-1]) and shape[-1] in (16, 32)

    # The reconstruct path makes them:
    assert any(is_dense(shape) for shape, _ in long_decode(model, projections, **options))
    forbid_reconstruction(monkeypatch)
    with latent_attention(model):
        dense = [shape for shape, width in long_decode(model, projections, **options) if is_dense(shape) and width > 1]
    assert not dense


def registered():
    names = {*AttentionInterface._global_mapping, *AttentionMaskInterface._global_mapping}
    return {name for name in names if name.startswith("lowrank")}


def test_the_last_handle_restores_model_and_registries():
    model, other = tiny_model("llama"), tiny_model("gemma2")
    first = latent_attention(model)
    with latent_attention(model):
        assert model.config._attn_implementation == "lowrank_latent"
    assert model.config._attn_implementation == "lowrank_latent"
    second = latent_attention(other)
    assert other.config._attn_implementation == "lowrank_latent_over_eager"
    first.remove()
    first.remove()
    assert model.config._attn_implementation == "sdpa" and registered()
    assert attended_by(model.model).layers == frozenset()
    second.remove()
    assert other.config._attn_implementation == "eager" and not registered()


def test_an_error_inside_restores_the_model():
    model = tiny_model("llama")
    with pytest.raises(KeyError), latent_attention(model):
        raise KeyError
    assert model.config._attn_implementation == "sdpa" and not registered()


def test_a_handle_keeps_no_model_alive():
    model = tiny_model("llama")
    handle, alive = latent_attention(model), weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None and not registered()
    handle.remove()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt-oss", "qwen3-next"])
def test_other_caches_are_untouched(family):
    model, tokens = tiny_model(family), random_tokens(2, 20)

    def logits():
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            return torch.cat([model(part, past_key_values=cache).logits for part in tokens.split([13, 1, 6], 1)], 1)

    expected = logits()
    with latent_attention(model):
        assert torch.equal(logits(), expected)
        with torch.no_grad():
            assert torch.isfinite(model(tokens, use_cache=False).logits).all()


def test_a_cache_lives_through_switching():
    model, tokens = tiny_model("llama"), random_tokens(1, 24)
    exact, projections = tiny_model("llama", torch.float64), full_rank_projections("llama", 4)
    cache = exact_cache(model, projections)
    logits = []
    with torch.no_grad():
        for index, part in enumerate(tokens.split(3, 1)):
            if index % 2:
                with latent_attention(model):
                    logits.append(model(part, past_key_values=cache).logits)
            else:
                logits.append(model(part, past_key_values=cache).logits)
        reference, truth = model(tokens).logits, exact(tokens).logits
    assert_within_reference_error(torch.cat(logits, 1), reference, truth, rounding_band("llama", 4))


def test_other_models_with_the_same_cache_class_reconstruct():
    model, other = tiny_model("llama"), tiny_model("llama")
    projections, tokens = full_rank_projections("llama"), random_tokens(1, 20)

    def logits(which):
        cache = exact_cache(which, projections)
        with torch.no_grad():
            return torch.cat([which(part, past_key_values=cache).logits for part in tokens.split([15, 1, 4], 1)], 1)

    expected = logits(other)
    with latent_attention(model):
        assert torch.equal(logits(other), expected)
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_a_deep_copied_model_is_not_switched():
    model = tiny_model("llama")
    with latent_attention(model):
        copied = copy.deepcopy(model)
        cache = exact_cache(copied, full_rank_projections("llama"))
        with torch.no_grad():
            copied(random_tokens(1, 20), past_key_values=cache)
            assert torch.isfinite(copied(random_tokens(1, 1), past_key_values=cache).logits).all()
        assert attended_by(copied.model).layers == frozenset()


def test_bad_arguments():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="impl must be one of .*got 'cuda'"):
        latent_attention(model, impl="cuda")
    with latent_attention(model), pytest.raises(ValueError, match="impl must be 'auto'.*got 'torch'"):
        latent_attention(model, impl="torch")


def test_what_attention_cannot_honour_is_refused():
    model = tiny_model("llama")
    cache = exact_cache(model, full_rank_projections("llama"))
    tokens = random_tokens(1, 20)
    with latent_attention(model), torch.no_grad():
        model(tokens, past_key_values=cache)
        bias = torch.zeros(1, 1, 1, 21)
        bias[..., 5] = -1.5
        with pytest.raises(NotImplementedError, match="attention_mask must be boolean .* got a bias"):
            model(tokens[:, :1], attention_mask=bias, position_ids=torch.tensor([[20]]), past_key_values=cache)
        model.train()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        with pytest.raises(NotImplementedError, match=r"no dropout; call model.eval\(\)"):
            model(tokens[:, :1], past_key_values=cache)
        model.eval()
        assert torch.isfinite(model(tokens[:, :1], past_key_values=cache).logits).all()  # the cache is as before
        assert cache.get_seq_length() == 21


@pytest.mark.parametrize("attend", [False, True], ids=["reconstructed", "attended"])
def test_a_compiled_forward_gives_the_same(attend):
    """The cache breaks the graph; what is around it is compiled. Eager back-end: tracing is what could fail."""
    model, tokens = tiny_model("llama"), random_tokens(1, 24)
    projections = full_rank_projections("llama", 4)

    def logits(forward):
        cache = exact_cache(model, projections)
        with torch.no_grad():
            return torch.cat(
                [forward(part, past_key_values=cache).logits for part in tokens.split([15, 1, 1, 6, 1], 1)], 1
            )

    expected = logits(model)
    torch._dynamo.reset()
    with latent_attention(model) if attend else contextlib.nullcontext():
        torch.testing.assert_close(
            logits(torch.compile(model.forward, backend="eager")), expected, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("new_tokens", ["encode", "exact"])
def test_bases_of_prompts_are_reconstructed(new_tokens):
    """xKV's bases differ by row, which no kernel takes; such a cache goes on as without the switch."""
    model, tokens = tiny_model("llama"), random_tokens(2, 40)

    def logits():
        cache = LowRankCache(model, method="xkv", compression_ratio=2, new_tokens=new_tokens, **SMALL_SIZES)
        with torch.no_grad():
            return torch.cat([model(part, past_key_values=cache).logits for part in tokens.split([32, 1, 7], 1)], 1)

    expected = logits()
    with latent_attention(model):
        assert torch.equal(logits(), expected)


@pytest.mark.parametrize("frame_length, groups", [(1, 1), (4, 3)])
def test_triton_generates_what_torch_does(frame_length, groups):
    """Encoding, decode and long queries, in the interpreter on a machine without a GPU."""
    pytest.importorskip("triton", reason="the kernels under test need triton")
    model, projections = tiny_model("llama"), full_rank_projections("llama", frame_length, groups)
    tokens = random_tokens(1, 32)
    results, caches = [], []
    for impl in ("torch", "triton"):
        caches.append(LowRankCache(model, projections, compression_ratio=3, **SMALL_SIZES))
        with latent_attention(model, impl=impl), torch.no_grad():
            parts = tokens.split([12, 1, 1, 18], 1)  # the last one is longer than the decode kernels take
            results.append(torch.cat([model(part, past_key_values=caches[-1]).logits for part in parts], 1))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3 * float(results[0].abs().max()))
    # Rounding may turn a level at a tie, no more.
    of_torch, of_triton = (saved_tensors(cache) for cache in caches)
    codes = [name for name in of_torch if ".codes." in name]
    assert codes and of_torch.keys() == of_triton.keys()
    for name in codes:
        one, other = of_torch[name], of_triton[name]
        assert one.shape == other.shape and float((one != other).double().mean()) < 1e-3
