"""Our arithmetic does not follow ambient state: autocast, default dtype, default device, inference mode, and the dtype
of the tokens that came first."""

import ast
import copy
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

import lowrank_cache
from lowrank_cache import LowRankCache
from lowrank_cache.basis import TENSORS
from lowrank_cache.calibration import calibrate
from lowrank_cache.calibration.api import projections_from_moments
from lowrank_cache.calibration.moments import Moments
from lowrank_cache.shapes import SIDES
from tests.oracle.memory import reachable_tensors
from tests.oracle.models import SMALL_SIZES, exact_cache, full_rank_projections, random_tokens, tiny_model


@contextmanager
def _default(setting, value, before):
    setting(value)
    try:
        yield
    finally:
        setting(before)


AMBIENT = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64": lambda: _default(torch.set_default_dtype, torch.float64, torch.float32),
    "float16": lambda: _default(torch.set_default_dtype, torch.float16, torch.float32),
    "meta": lambda: _default(torch.set_default_device, "meta", None),
    "inference mode": torch.inference_mode,
}
SETTINGS = {
    "fisher": (("llama", 4, 2), {"compression_ratio": 3}),
    "16 bits": (("llama", 4, 2), {"compression_ratio": 1, "bits": 16, "latent_dtype": None}),
    "palu": (("llama", 1, 1, False, "palu"), {"compression_ratio": 3, "bits": 4}),
    "recalkv": (("llama", 1, 1, False, "recalkv"), {"compression_ratio": 2}),
    "xkv": (None, {"method": "xkv", "compression_ratio": 2}),
    "xkv, 4 bits": (None, {"method": "xkv", "compression_ratio": 4, "bits": 4}),
}
PREFILL = 40


def _cache(kind, model, attend="auto"):
    of, options = SETTINGS[kind]
    projections = None if of is None else copy.copy(full_rank_projections(*of))  # a copy shares no coders
    return LowRankCache(model, projections, attend=attend, **options, **SMALL_SIZES)


def _updates(kind, ambient):
    """What ``update`` returns in a prefill and in steps that encode, for states that no ambient state touches."""
    model, returned, start = tiny_model("llama"), [], 0
    decoder, draw = model.get_decoder(), torch.Generator("cpu").manual_seed(0)
    with ambient:
        cache = _cache(kind, model, "reconstruct")
        for tokens in (PREFILL, 1, 2, 3):
            given = {
                "input_ids": torch.ones(2, tokens, dtype=torch.long, device="cpu"),
                "position_ids": torch.arange(start, start + tokens, device="cpu").expand(2, -1),
            }
            cache.begin_forward(decoder, given)
            for layer in range(3):
                size = {"generator": draw, "dtype": torch.float32, "device": "cpu"}
                returned += cache.update(*(torch.randn(2, 2, tokens, 16, **size) for _ in SIDES), layer)
            cache.end_forward(decoder, given)
            start += tokens
    return returned


@pytest.mark.parametrize("ambient", AMBIENT)
@pytest.mark.parametrize("kind", SETTINGS)
def test_update(kind, ambient):
    _cache(kind, tiny_model("llama"))  # so that projections are calibrated before
    for one, two in zip(_updates(kind, nullcontext()), _updates(kind, AMBIENT[ambient]()), strict=True):
        assert one.dtype == two.dtype and torch.equal(one, two)


def _steps(ambient, make):
    """Logits of forwards over a cache, within an ambient state."""
    model, logits, start = tiny_model("llama"), [], 0
    with ambient, torch.no_grad():
        cache = make(model)
        for seed, tokens in enumerate([PREFILL, 1, 5, 1]):
            place = torch.arange(start, start + tokens, device="cpu")[None]
            ids = random_tokens(1, tokens, seed=seed)
            logits.append(model(ids, position_ids=place, past_key_values=cache).logits)
            start += tokens
    return logits


@pytest.mark.parametrize("ambient", ["float64", "float16", "inference mode"])
@pytest.mark.parametrize("attend", ["auto", "reconstruct"])
def test_forwards(attend, ambient):
    make = partial(_cache, "fisher", attend=attend)
    for one, two in zip(_steps(nullcontext(), make), _steps(AMBIENT[ambient](), make), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("attend", ["auto", "reconstruct"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_forwards_under_autocast(family, attend):
    """What the model computes is rounded; what the cache adds is nothing, within that rounding."""
    model = tiny_model(family)
    caches = [DynamicCache(config=model.config)]
    caches += [exact_cache(model, full_rank_projections(family), attend=attend), caches[0]]
    exact, plain = [], []
    for number, cache in enumerate(caches):
        cache.reset()
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=number < 2):
            for seed, tokens in enumerate([PREFILL, 1, 5, 1]):
                logits = model(random_tokens(1, tokens, seed=seed), past_key_values=cache).logits.float()
                (plain, exact, plain)[number].append(logits)
    rounded, true = plain[:4], plain[4:]
    for one, two, three in zip(rounded, exact, true, strict=True):
        noise = float((one - three).norm())
        assert float((two - three).norm()) <= 2 * noise and float((two - one).norm()) <= 2 * noise


@pytest.mark.parametrize("ambient", ["float64", "float16", "inference mode"])
@pytest.mark.parametrize("method", ["fisher", "palu", "recalkv"])
def test_calibration(method, ambient):
    model, batches = tiny_model("llama"), [random_tokens(4, 20)]
    expected = calibrate(model, batches, method=method, progress=False)
    with AMBIENT[ambient]():
        found = calibrate(model, [random_tokens(4, 20)], method=method, progress=False)
    assert _same_bases(expected, found)


def _same_bases(expected, found):
    return all(
        one.dtype == two.dtype and torch.equal(one, two)
        for first, second in zip(expected.bases, found.bases, strict=True)
        for one, two in ((getattr(first, name), getattr(second, name)) for name in TENSORS)
    )


@pytest.mark.parametrize("sensitivity", ["gradient", "query"])
def test_the_arithmetic_of_calibration_under_autocast(sensitivity, tmp_path):
    """The model's forward is the caller's, and may be rounded; the moments that come of it are not, nor the bases."""
    model, path = tiny_model("llama"), tmp_path / "moments"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = calibrate(model, [random_tokens(4, 20)], sensitivity=sensitivity, save_moments=path, progress=False)
    outside = projections_from_moments(Moments.load(path))
    assert _same_bases(inside, outside)
    plain = calibrate(model, [random_tokens(4, 20)], sensitivity=sensitivity, progress=False)
    for one, two in zip(inside.bases, plain.bases, strict=True):
        assert one.down_proj.dtype == two.down_proj.dtype == torch.float32


@pytest.mark.parametrize("attend", ["auto", "reconstruct"])
@pytest.mark.parametrize("latent_dtype", [None, torch.float32])
@pytest.mark.parametrize("first, then", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_model_that_is_converted(first, then, latent_dtype, attend):
    """Tokens that follow are as exact as if the first ones had had their dtype."""
    logits = []
    for kind in (DynamicCache, LowRankCache):
        model = tiny_model("llama", first)
        if kind is DynamicCache:
            cache = DynamicCache(config=model.config)
        else:
            p = full_rank_projections("llama")
            cache = exact_cache(model, p, latent_dtype=latent_dtype, attend=attend, residual_length=8)
        with torch.no_grad():
            model(random_tokens(2, 12), past_key_values=cache)
            model.to(then)
            if kind is DynamicCache:  # which keeps the dtypes apart, and fails
                for layer in cache.layers:
                    layer.keys, layer.values = layer.keys.to(then), layer.values.to(then)
            for seed in range(12):
                found = model(random_tokens(2, 1, seed=seed), past_key_values=cache).logits
        logits.append(found.float())
    most = 2e-3 if then == torch.float32 and latent_dtype is not None else 0.05
    assert float((logits[0] - logits[1]).abs().max()) <= most * float(logits[0].abs().max())


def test_windows_and_sinks_take_the_wider_dtype():
    model = tiny_model("llama", torch.bfloat16)
    cache = LowRankCache(model, full_rank_projections("llama"), compression_ratio=1, num_sink_tokens=30)
    with torch.no_grad():
        model(random_tokens(2, 10), past_key_values=cache)
        model.float()
        for seed in range(30):
            model(random_tokens(2, 1, seed=seed), past_key_values=cache)
    exact = {tensor.dtype for tensor in reachable_tensors(cache) if tensor.dim() == 4}
    assert exact == {torch.float32}


FACTORIES = {"zeros", "ones", "empty", "full", "arange", "tensor", "eye", "rand", "randn", "linspace", "randint"}
OF_ANY_DTYPE = {"arange", "randint"}  # integers, whatever the default


@pytest.mark.parametrize("folder", ["", "kernels", "calibration"])
def test_whatever_makes_a_tensor_names_its_device_and_dtype(folder):
    missing = []
    for path in (Path(lowrank_cache.__file__).parent / folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                module, name = ast.unparse(node.func.value), node.func.attr
                if module == "torch" and name in FACTORIES:
                    needed = {"device"} if name in OF_ANY_DTYPE else {"device", "dtype"}
                    lacking = needed - {keyword.arg for keyword in node.keywords}
                    missing += [f"{path.name}:{node.lineno} {name} names no {word}" for word in sorted(lacking)]
    assert not missing
