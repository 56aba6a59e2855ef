"""A model that attends to latents gives what it gives with reconstructed states, in every mode, and stays as it was."""

import contextlib
import copy
import functools
import gc
import pickle
import re
import sys
import warnings
import weakref

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lowrank_cache import LowRankCache, latent_attention, latent_view
from lowrank_cache.attention import attended_layers
from lowrank_cache.calibration import calibrate
from lowrank_cache.kernels import native
from lowrank_cache.probe import decoder_of
from tests.cache.test_generation import MODES, MORE_MODES, compare
from tests.oracle.inside import forbid_reconstruction, wrapped_attention
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
    "bloom": "has attention of its own",
    "falcon-alibi": "has attention of its own",
    "deepseek-v3": "expands its latents in between",
    "deepseek-v3-yarn": "expands its latents in between",
    "deepseek-v2": "expands its latents in between",
    "longcat-flash": "expands its latents in between",
    "gemma3n": "other layers reuse the keys",
    "falcon": "does not use transformers' attention interface",
}


@pytest.fixture(autouse=True)
def _nothing_stays():
    """What any test here leaves installed would be a fault."""
    yield
    gc.collect()
    assert not wrapped_attention()


def attending(family, *options):
    """Makes exact caches of a model, which must attend to latents."""
    projections = full_rank_projections(family, *options)

    def make(model):
        cache = exact_cache(model, projections)
        assert attended_layers(decoder_of(model))
        return cache

    return make


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(RECONSTRUCTED)))
def test_generation_mode_equals_dynamic_cache(family, mode):
    compare(family, mode, attending(family, 4), rounding_band(family, 4))


@pytest.mark.parametrize("mode", MORE_MODES)
@pytest.mark.parametrize("family", sorted({*FAMILIES, *MORE_FAMILIES} - set(RECONSTRUCTED)))
def test_pre_rope_keys_equal_dynamic_cache(family, mode):
    compare(family, mode, attending(family), rounding_band(family))


@pytest.mark.parametrize("family", sorted(RECONSTRUCTED))
def test_what_cannot_attend_to_latents_says_so_once_and_reconstructs(family):
    model, projections = tiny_model(family), full_rank_projections(family)
    with pytest.warns(UserWarning, match="reconstructs keys and values of .*attention") as warned:
        cache = exact_cache(model, projections)
        copy.deepcopy(cache)
        exact_cache(model, projections)
    assert len(warned) == 1 and warned[0].filename == sys.modules[exact_cache.__module__].__file__
    assert not attended_layers(decoder_of(model)) and not wrapped_attention()
    with pytest.raises(NotImplementedError, match="attention"):
        latent_attention(model)
    assert not wrapped_attention()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact_cache(tiny_model(family), projections, attend="reconstruct")


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
    expected = lossy_logits(model, projections, tokens, chunks, attend="reconstruct", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # also where there are no latents to attend to
        LowRankCache(model, projections, **{"compression_ratio": 4, **options})
    with latent_attention(model, impl="torch"):
        actual = lossy_logits(model, projections, tokens, chunks, **options)
    # The same numbers in another order. A level that flips on a tie changes a latent by a whole step, so
    # nothing is promised for one number; the bulk must agree to rounding.
    assert float((actual - expected).abs().median()) <= 1e-5 * float(expected.abs().max())
    assert float((actual - expected).norm()) <= 1e-2 * float(expected.norm())


@pytest.mark.skipif(native.compiler() is None, reason="no C compiler")
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

    # The reconstruct path makes them, even under a handle:
    with latent_attention(model):
        assert any(is_dense(shape) for shape, _ in long_decode(model, projections, attend="reconstruct", **options))
    forbid_reconstruction(monkeypatch)
    made = long_decode(model, projections, **options)
    assert not [shape for shape, width in made if is_dense(shape) and width > 1]


def test_wrappers_stand_while_somebody_uses_them():
    model, other = tiny_model("llama"), tiny_model("gemma2")
    before = dict(AttentionInterface._global_mapping)
    gemma2 = sys.modules[type(other).__module__].__name__
    cache, tokens = exact_cache(model, full_rank_projections("llama")), random_tokens(1, 12)
    model(tokens, past_key_values=cache)
    assert wrapped_attention() == {"sdpa"}
    copied, handle = copy.deepcopy(cache), latent_attention(other)
    del cache
    last = exact_cache(other, full_rank_projections("gemma2"))
    other(tokens, past_key_values=last)
    assert wrapped_attention() == {"sdpa", gemma2}
    assert model.config._attn_implementation == "sdpa" and other.config._attn_implementation == "eager"
    del copied, last
    assert wrapped_attention() == {"sdpa", gemma2}
    handle.remove()
    handle.remove()
    assert not wrapped_attention() and AttentionInterface._global_mapping == before


def test_an_error_inside_leaves_nothing():
    model = tiny_model("llama")
    with pytest.raises(KeyError), latent_attention(model):
        model(random_tokens(1, 12), past_key_values=exact_cache(model, full_rank_projections("llama")))
        assert wrapped_attention()
        raise KeyError
    assert not wrapped_attention() and model.config._attn_implementation == "sdpa"


def test_a_probe_that_fails_leaves_nothing(monkeypatch):
    model = tiny_model("llama")
    LowRankCache(model, full_rank_projections("llama"), attend="reconstruct")  # the other probe is through
    with monkeypatch.context() as patch:
        patch.setattr(type(model.model.layers[1].mlp), "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            latent_attention(model)
    assert not wrapped_attention()
    latent_attention(model).remove()


def test_a_lost_handle_is_not_left_on():
    model = tiny_model("llama")
    for _ in range(2):
        handle = latent_attention(model, impl="torch")  # a notebook cell, executed twice
    handle.remove()
    latent_attention(model, impl="reference").remove()


def test_a_handle_keeps_no_model_alive():
    model = tiny_model("llama")
    handle, alive = latent_attention(model), weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
    handle.remove()
    assert not wrapped_attention()


def steps(model, cache, parts, tokens=None):
    """Logits of 24 tokens in parts."""
    tokens = random_tokens(1, 24) if tokens is None else tokens
    with torch.no_grad():
        return torch.cat([model(part, past_key_values=cache).logits for part in tokens.split(parts, 1)], 1)


def assert_as_without_a_cache(logits, **options):
    model, exact = tiny_model("llama", **options), tiny_model("llama", torch.float64, **options)
    tokens = random_tokens(1, 24)
    with torch.no_grad():
        reference, truth = model(tokens).logits, exact(tokens).logits
    assert_within_reference_error(logits, reference, truth, rounding_band("llama", 4))


def halved(module, query, key, value, attention_mask, **kwargs):
    """A user's own attention, which is another function."""
    return sdpa_attention_forward(module, query, key, value / 2, attention_mask, **kwargs)


@pytest.fixture
def own_function():
    AttentionInterface.register("mine", halved)
    AttentionMaskInterface.register("mine", sdpa_mask)
    yield "mine"
    del AttentionInterface._global_mapping["mine"], AttentionMaskInterface._global_mapping["mine"]


@pytest.mark.parametrize("change", [
    lambda model, name: model.set_attn_implementation(name),
    lambda model, name: setattr(model.config, "_attn_implementation", name),
])  # fmt: skip
@pytest.mark.parametrize("name", ["eager", "sdpa"])
@pytest.mark.parametrize("handle", [False, True])
def test_attention_may_be_changed_in_mid_chat(monkeypatch, name, change, handle):
    forbid_reconstruction(monkeypatch)
    first = {"eager": "sdpa", "sdpa": "eager"}[name]
    model = tiny_model("llama", attn_implementation=first)
    held = latent_attention(model) if handle else None
    cache, tokens = exact_cache(model, full_rank_projections("llama", 4)), random_tokens(1, 24)
    before = steps(model, cache, [12, 1, 2], tokens[:, :15])
    change(model, name)
    assert_as_without_a_cache(torch.cat([before, steps(model, cache, [1, 1, 7], tokens[:, 15:])], 1))
    del held
    assert model.config._attn_implementation == name, "what the user set stays"


def test_flash_masks_are_read(monkeypatch):
    """Flash attention needs a GPU; its masks are of two axes, or None where nothing is padded."""
    flash = transformers.masking_utils.flash_attention_mask

    def flash_on_a_cpu(module, query, key, value, attention_mask, **kwargs):
        assert attention_mask is None or attention_mask.dim() == 2
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
        if attention_mask is not None:
            mask = mask & attention_mask.bool()[:, None, None]
            mask = mask | ~mask.any(-1, keepdim=True)  # padding sees all, and nobody reads it
        return sdpa_attention_forward(module, query, key, value, mask.expand(len(query), 1, -1, -1), **kwargs)

    flash_on_a_cpu.__module__ = "transformers.integrations.flash_attention"
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", flash_on_a_cpu)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "flash_attention_2", flash)
    model = tiny_model("llama")
    options = {"tokens": random_tokens(2, 24), "chunks": [9, 1, 1, 4, 9]}
    projections = full_rank_projections("llama", 4)
    expected = lossy_logits(model, projections, **options, compression_ratio=1, latent_dtype=None)
    model.config._attn_implementation = "flash_attention_2"
    forbid_reconstruction(monkeypatch)
    logits = lossy_logits(model, projections, **options, compression_ratio=1, latent_dtype=None)
    torch.testing.assert_close(logits[0, 3:], expected[0, 3:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1], expected[1], rtol=1e-4, atol=1e-4)


def test_a_function_of_the_users_own_is_called_for_all_that_is_not_latents(own_function):
    model, tokens = tiny_model("llama"), random_tokens(1, 24)
    projections = full_rank_projections("llama", 4)
    cache = exact_cache(model, projections)
    steps(model, cache, [12, 1], tokens[:, :13])
    model.set_attn_implementation(own_function)
    twin = exact_cache(model, projections, attend="reconstruct")
    plain, full = model(tokens).logits, DynamicCache(config=model.config)
    # It may compute something else than attention, so latents alone are not enough for it:
    with pytest.warns(UserWarning, match="'mine' is not a function of transformers.*latent_attention") as warned:
        again = steps(model, exact_cache(model, projections), [12, 1, 11], tokens)
        steps(model, cache, [2, 9], tokens[:, 13:])
    assert len(warned) == 1
    torch.testing.assert_close(again, steps(model, twin, [12, 1, 11], tokens), rtol=0, atol=0)
    torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-4)
    with latent_attention(model):  # who insists gets latents, and the function for all else
        assert attended_layers(model.model) == {0, 1, 2}
        torch.testing.assert_close(model(tokens).logits, plain, rtol=0, atol=0)
        torch.testing.assert_close(steps(model, full, [13, 11], tokens), plain, rtol=1e-4, atol=1e-4)
        attended = steps(model, exact_cache(model, projections), [12, 1, 11], tokens)
        torch.testing.assert_close(attended[:, :12], plain[:, :12], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(attended[:, 12:], plain[:, 12:], rtol=1e-2, atol=1e-2)
    del cache
    assert AttentionInterface._global_mapping[own_function] is halved


def test_others_may_take_the_place_meanwhile():
    """A wrapper around ours, and a function in our place, stay; ours serves latents again, and harms nobody after."""
    model, projections = tiny_model("llama"), full_rank_projections("llama", 4)
    stock, called = AttentionInterface._global_mapping["sdpa"], []
    cache, tokens = exact_cache(model, projections), random_tokens(1, 24)
    first = steps(model, cache, [12, 1], tokens[:, :13])
    ours = AttentionInterface._global_mapping["sdpa"]

    @functools.wraps(ours)
    def theirs(*args, **kwargs):
        called.append(1)
        return ours(*args, **kwargs)

    try:
        AttentionInterface.register("sdpa", theirs)
        assert_as_without_a_cache(torch.cat([first, steps(model, cache, [1, 10], tokens[:, 13:])], 1))
        called.clear()
        model(tokens)
        del cache
        gc.collect()
        assert AttentionInterface._global_mapping["sdpa"] is theirs
        model(tokens)
        assert len(called) == 6
        other = tiny_model("llama")
        cache = exact_cache(other, projections)
        assert attended_layers(other.model) == {0, 1, 2}  # whichever wrapper the probe meets first
        assert_as_without_a_cache(steps(other, cache, [12, 1, 11], tokens))
        AttentionInterface.register("sdpa", theirs)  # after our last look
        del cache
        gc.collect()
        assert AttentionInterface._global_mapping["sdpa"] is theirs
    finally:
        AttentionInterface.register("sdpa", stock)


def test_an_interface_of_a_modeling_file_comes_first(monkeypatch):
    """Some files override entries for themselves; there the wrapper must stand, and the table of all stay as it is."""
    model, interface = tiny_model("llama"), AttentionInterface()
    stock = AttentionInterface._global_mapping["sdpa"]
    interface["sdpa"] = stock
    monkeypatch.setattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS", interface)
    forbid_reconstruction(monkeypatch)
    cache = exact_cache(model, full_rank_projections("llama", 4))
    assert_as_without_a_cache(steps(model, cache, [12, 1, 11]))
    assert not wrapped_attention() and interface["sdpa"] is not stock
    del cache
    gc.collect()
    assert interface["sdpa"] is stock


@pytest.mark.parametrize("copying", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copied_model_is_an_ordinary_one(copying):
    model, tokens = tiny_model("llama"), random_tokens(1, 24)
    cache = exact_cache(model, full_rank_projections("llama", 4))
    with latent_attention(model):
        steps(model, cache, [12, 1], tokens[:, :13])
        copied = copying(model)
    del cache, model
    gc.collect()
    assert not wrapped_attention() and not attended_layers(copied.model)
    assert copied.config._attn_implementation == "sdpa"
    assert torch.isfinite(copied.generate(tokens, max_new_tokens=2)).all()
    assert_as_without_a_cache(steps(copied, exact_cache(copied, full_rank_projections("llama", 4)), [12, 1, 11]))


def test_two_models_may_share_a_config():
    model, other, projections = tiny_model("llama"), tiny_model("llama"), full_rank_projections("llama", 4)
    for module in other.modules():
        if getattr(module, "config", None) is not None:
            module.config = model.config
    one, two = exact_cache(model, projections), exact_cache(other, projections)
    parts = random_tokens(1, 24).split([15, 9], 1)
    logits = [[steps(each, cache, [12, 1, 2], parts[0])] for each, cache in ((model, one), (other, two))]
    model.set_attn_implementation("eager")
    logits[1].append(steps(other, two, [2, 7], parts[1]))
    del two
    logits[0].append(steps(model, one, [2, 7], parts[1]))
    for each in logits:
        assert_as_without_a_cache(torch.cat(each, 1))


@pytest.mark.parametrize("layers", [[0], [2], [0, 1, 2]])
def test_latents_that_attention_did_not_read_raise(layers):
    """Whatever leads attention past the wrapper: no result comes of it, and the cache is as it was."""
    model, tokens = tiny_model("llama"), random_tokens(1, 24)
    cache = exact_cache(model, full_rank_projections("llama", 4))
    first = steps(model, cache, [12, 1], tokens[:, :13])
    attentions = [model.model.layers[layer].self_attn for layer in layers]
    for attention in attentions:
        attention.config = copy.copy(attention.config)
        attention.config._attn_implementation_internal = "eager"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=re.escape(f"layers {layers} did not read") + ".*attend='reconstruct'"):
            steps(model, cache, [1], tokens[:, 13:14])
    assert cache.get_seq_length() == 13
    for attention in attentions:
        attention.config = model.config
    assert_as_without_a_cache(torch.cat([first, steps(model, cache, [1, 10], tokens[:, 13:])], 1))


def test_a_forward_without_some_layers_raises():
    """Early exit, or a model that was pruned: cached tokens of the other layers would be missing."""
    model, tokens = tiny_model("llama"), random_tokens(1, 24)
    for attend in ("auto", "reconstruct"):
        cache = exact_cache(model, full_rank_projections("llama", 4), attend=attend)
        first = steps(model, cache, [12, 1], tokens[:, :13])
        model.config.num_hidden_layers = 2
        with pytest.raises(RuntimeError, match=r"ended a forward without layers \[2\]"):
            steps(model, cache, [1], tokens[:, 13:14])
        model.config.num_hidden_layers = 3
        assert_as_without_a_cache(torch.cat([first, steps(model, cache, [1, 10], tokens[:, 13:])], 1))


@pytest.mark.parametrize("by_config", [False, True])
def test_output_attentions_reconstructs(by_config):
    model, tokens = tiny_model("llama", attn_implementation="eager"), random_tokens(1, 14)
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    expected = model.generate(tokens, output_attentions=True, **options)
    cache = exact_cache(model, full_rank_projections("llama", 4))
    if by_config:
        model.config.output_attentions = True
    else:
        options["output_attentions"] = True
    with pytest.warns(UserWarning, match="no weights for output_attentions"):
        made = model.generate(tokens, past_key_values=cache, **options)
    assert torch.equal(made.sequences, expected.sequences)
    if not by_config:
        assert [len(step) for step in made.attentions] == [3] * 4
        for step, stock in zip(made.attentions, expected.attentions, strict=True):
            torch.testing.assert_close(step, stock, rtol=1e-4, atol=1e-5)
    model.config.output_attentions = False
    assert attended_layers(model.model) == {0, 1, 2}


def test_gradients_reconstruct():
    model = tiny_model("llama").requires_grad_(True)
    cache = exact_cache(model, full_rank_projections("llama", 4))
    with pytest.warns(UserWarning, match=r"no gradients; use torch.no_grad\(\)"):
        model(random_tokens(1, 12), past_key_values=cache)
    model(random_tokens(1, 1), past_key_values=cache).logits.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", ["flex_attention", "paged|sdpa"])
def test_flex_attention_and_continuous_batching_reconstruct(name):
    """The masks of the one are blocks, and the other has pages. A fresh cache, and one in mid-chat."""
    model = tiny_model("llama")
    cache = exact_cache(model, full_rank_projections("llama"))
    assert attended_layers(model.model)
    model.config._attn_implementation = name
    message = re.escape(f"{name!r} works on masks or pages of its own")
    with pytest.warns(UserWarning, match=message):
        assert not attended_layers(model.model)
    other = tiny_model("llama")
    exact_cache(other, full_rank_projections("llama"), attend="reconstruct")  # the probe, before flex compiles
    other.config._attn_implementation = name
    with pytest.warns(UserWarning, match=message):
        exact_cache(other, full_rank_projections("llama"))
    with pytest.raises(NotImplementedError, match=message):
        latent_attention(other)
    del cache


def test_nothing_is_installed_for_what_reconstructs():
    model, tokens = tiny_model("llama"), random_tokens(1, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        caches = [
            exact_cache(model, full_rank_projections("llama"), attend="reconstruct"),
            LowRankCache(model, full_rank_projections("llama"), ranks=0, **SMALL_SIZES),
            LowRankCache(model, method="xkv", compression_ratio=2, **SMALL_SIZES),
        ]
    for cache in caches:
        for each in (cache, copy.deepcopy(cache)):
            steps(model, each, [33, 1, 6], tokens)
            assert not wrapped_attention()


def test_a_compiled_model_that_has_no_cache_of_ours_is_untouched():
    """One graph, the same results, and no compilation for each cache that comes and goes."""
    model, other, tokens = tiny_model("llama"), tiny_model("llama"), random_tokens(1, 24)
    projections = full_rank_projections("llama", 4)
    for name in ("sdpa", "eager"):
        for each in (model, other):
            each.set_attn_implementation(name)
        torch._dynamo.reset()
        compilations = []

        def backend(graph, inputs, seen=compilations):
            seen.append(graph)
            return graph.forward

        with torch.no_grad():
            expected = other(tokens, use_cache=False).logits
        compiled = torch.compile(other.forward, backend=backend, fullgraph=True)
        for _ in range(10):
            for cache in (exact_cache(model, projections), None):
                with torch.no_grad():
                    if cache is not None:
                        steps(model, cache, [12, 1, 11], tokens)
                    del cache
                    torch.testing.assert_close(compiled(tokens, use_cache=False).logits, expected, rtol=0, atol=0)
            cache = exact_cache(model, projections)
            steps(model, cache, [12, 1, 11], tokens)
            assert wrapped_attention()
            with torch.no_grad():
                torch.testing.assert_close(compiled(tokens, use_cache=False).logits, expected, rtol=0, atol=0)
            del cache
        assert len(compilations) <= 3


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt-oss", "qwen3-next"])
def test_other_caches_are_untouched(family):
    model, tokens = tiny_model(family), random_tokens(2, 20)

    def logits():
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            return torch.cat([model(part, past_key_values=cache).logits for part in tokens.split([13, 1, 6], 1)], 1)

    expected = logits()
    cache = exact_cache(model, full_rank_projections(family))
    with torch.no_grad():
        model(tokens, past_key_values=cache)
    assert wrapped_attention()
    assert torch.equal(logits(), expected)
    with torch.no_grad():
        assert torch.isfinite(model(tokens, use_cache=False).logits).all()


def test_a_cache_lives_through_handles():
    model, tokens = tiny_model("llama"), random_tokens(1, 24)
    cache, logits = exact_cache(model, full_rank_projections("llama", 4)), []
    for impl, part in zip(("auto", "torch", "reference", None) * 2, tokens.split(3, 1), strict=True):
        with latent_attention(model, impl=impl) if impl else contextlib.nullcontext():
            logits.append(steps(model, cache, [3], part))
    assert_as_without_a_cache(torch.cat(logits, 1))


def test_bad_arguments():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="impl must be one of .*got 'cuda'"):
        latent_attention(model, impl="cuda")
    with latent_attention(model), pytest.raises(ValueError, match="impl must be 'auto'.*got 'torch'"):
        latent_attention(model, impl="torch")
    with pytest.raises(ValueError, match="attend must be 'auto' or 'reconstruct', got 'torch'"):
        exact_cache(model, full_rank_projections("llama"), attend="torch")


def test_what_attention_cannot_honour_is_refused():
    model = tiny_model("llama")
    cache = exact_cache(model, full_rank_projections("llama"))
    tokens = random_tokens(1, 20)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
        bias = torch.zeros(1, 1, 1, 21)
        bias[..., 5] = -1.5
        for mask, message in (
            (bias, "must be boolean .* got a bias"),
            (torch.ones(1, 1, 1, 20, dtype=torch.bool), r"must have shape \[batch, 1, 1, 21\], got \[1, 1, 1, 20\]"),
            (torch.ones(1, 4, 1, 21, dtype=torch.bool), r"must have shape .* got \[1, 4, 1, 21\]"),
        ):
            with pytest.raises(NotImplementedError, match=f"attention_mask {message}.*attend='reconstruct'"):
                model(tokens[:, :1], attention_mask=mask, position_ids=torch.tensor([[20]]), past_key_values=cache)
        model.train()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        with pytest.raises(NotImplementedError, match=r"no dropout; call model.eval\(\), .*attend='reconstruct'"):
            model(tokens[:, :1], past_key_values=cache)
        model.eval()
        assert torch.isfinite(model(tokens[:, :1], past_key_values=cache).logits).all()  # the cache is as before
        assert cache.get_seq_length() == 21


@pytest.mark.parametrize("attend", ["reconstruct", "auto"])
def test_a_compiled_forward_gives_the_same(attend):
    """The cache breaks the graph; what is around it is compiled. Eager back-end: tracing is what could fail."""
    model, tokens = tiny_model("llama"), random_tokens(1, 24)
    projections = full_rank_projections("llama", 4)

    def logits(forward):
        cache = exact_cache(model, projections, attend=attend)
        with torch.no_grad():
            return torch.cat(
                [forward(part, past_key_values=cache).logits for part in tokens.split([15, 1, 1, 6, 1], 1)], 1
            )

    expected = logits(model)
    torch._dynamo.reset()
    torch.testing.assert_close(logits(torch.compile(model.forward, backend="eager")), expected, rtol=1e-4, atol=1e-4)


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


def test_kernels_of_a_gpu_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"impl='triton' must be used for a model on a GPU, got one on \['cpu'\]"):
        latent_attention(tiny_model("llama"), impl="triton")
