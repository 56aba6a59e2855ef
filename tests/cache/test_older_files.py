"""What an earlier release saved still loads, and goes on with the logits that it went on with then.

The files in ``tests/data`` were written by ``tests/tools/older_files.py``, which says how. They are never written
again: code that cannot read them needs another format version, and a message that says what to do.
"""

import functools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache

from lowrank_cache import LowRankCache, Projections
from lowrank_cache.calibration.api import projections_from_moments
from lowrank_cache.calibration.moments import Moments
from tests.oracle.models import tiny_model
from tests.oracle.tolerance import FLOAT16_ROUNDING, REFERENCE_FACTOR, rounding_band
from tests.tools.older_files import CASES, PARTS, PROMPT, READ_ONLY, Case, forward_parts, padded_text

FOLDER = Path(__file__).parents[1] / "data" / "b096bff"
FAMILIES = sorted({case.family for case in CASES.values()})


@pytest.fixture(scope="module")
def expected():
    return load_file(FOLDER / "expected.safetensors")


def projections_of(case: Case) -> Projections | None:
    return None if case.projections is None else Projections.from_pretrained(FOLDER / "projections" / case.projections)


@functools.cache
def rounds_as_then(name: str) -> bool:
    """Whether this processor multiplies a rotation into the bases with the roundings of the one that saved the file.

    Bases without a rotation are stored as they are used. A fault of the fingerprint, not of this processor.
    """
    try:
        LowRankCache.from_pretrained(
            FOLDER / "caches" / name, tiny_model(CASES[name].family), projections_of(CASES[name])
        )
    except ValueError as error:
        if name == "palu-4bit" and "projections must be those that made the cache" in str(error):
            return False
        raise
    return True


def loaded(name: str, model, **options) -> LowRankCache:
    if not rounds_as_then(name):
        pytest.skip("this processor rounds rotated bases otherwise, and saved caches know them by their last bit")
    return LowRankCache.from_pretrained(FOLDER / "caches" / name, model, projections_of(CASES[name]), **options)


@functools.cache
def full_logits(family: str, dtype: torch.dtype) -> torch.Tensor:
    """Of what follows the prompt, with transformers' own cache."""
    model, (tokens, mask) = tiny_model(family, dtype), padded_text(family)
    parts = (PROMPT, *PARTS)
    return forward_parts(model, DynamicCache(config=model.config), tokens, mask, parts)[:, PROMPT:]


def model_rounding(family: str) -> float:
    """What float32 may move a family's logits by, whatever its cache: see ``tests.oracle.tolerance``."""
    error = full_logits(family, torch.float32).double() - full_logits(family, torch.float64)
    return REFERENCE_FACTOR * float(error.abs().max())


def band(case: Case, **options) -> float:
    method = case.cache.get("method", case.bases.get("method", "fisher"))
    bases = {"layer_group_size": 1, **case.bases, "method": "palu" if method == "xkv" else method}
    return model_rounding(case.family) + rounding_band(case.family, **bases, **options)


def assert_near(actual: torch.Tensor, then: torch.Tensor, allowed: float) -> None:
    assert actual.shape == then.shape
    error = float((actual - then).abs().max())
    assert error <= allowed < 0.1 * float(then.std()), f"logits moved by {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_are_those_of_then(expected, family):
    """If this fails, weights or transformers' arithmetic have changed, and not what is saved."""
    logits = full_logits(family, torch.float32)[:, -1]
    assert_near(logits, expected[f"{family}.full"], model_rounding(family))


@pytest.mark.parametrize("attend", ["reconstruct", "auto"])
@pytest.mark.parametrize("name", CASES)
def test_a_saved_cache_goes_on(expected, name, attend):
    case = CASES[name]
    model, (tokens, mask) = tiny_model(case.family), padded_text(case.family)
    cache = loaded(name, model, attend=attend)
    assert cache.get_seq_length() == PROMPT and all(group.tokens for group in cache.groups())
    logits = forward_parts(model, cache, tokens, mask, PARTS, PROMPT)
    then = expected[f"{name}.logits"]
    assert_near(logits[:, :READ_ONLY], then[:, :READ_ONLY], band(case))
    # Latents are made of numbers that may be rounded the other way now.
    assert_near(logits, then, band(case, rounding=FLOAT16_ROUNDING))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.projections])
def test_saved_projections_make_the_same_cache(expected, name):
    """The prompt is read again: bases, bits and channels are those of then."""
    case = CASES[name]
    model, (tokens, mask) = tiny_model(case.family), padded_text(case.family)
    sizes = {"residual_length": 4, "num_sink_tokens": 2, "block_size": 8}
    cache = LowRankCache(model, projections_of(case), **sizes, **case.cache)
    assert cache.groups() == [group._replace(tokens=0) for group in loaded(name, model).groups()]
    forward_parts(model, cache, tokens, mask, (PROMPT,))
    logits = forward_parts(model, cache, tokens, mask, PARTS, PROMPT)
    assert_near(logits, expected[f"{name}.logits"], band(case, rounding=FLOAT16_ROUNDING))


def test_saved_again_it_is_what_it_was(tmp_path):
    for name, case in CASES.items():
        if not rounds_as_then(name):
            continue
        loaded(name, tiny_model(case.family)).save_pretrained(tmp_path / name)
        (then,), (now,) = ((root / name).glob("*.safetensors") for root in (FOLDER / "caches", tmp_path))
        before, after = load_file(then), load_file(now)
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def test_saved_moments_make_the_same_bases():
    case = CASES["joint"]
    options = {"method": "fisher", "frame_length": 1, **case.bases}
    made = projections_from_moments(Moments.load(FOLDER / "moments.safetensors"), **options)
    then = projections_of(case)
    for one, other in zip(made.bases, then.bases, strict=True):
        # Directions of equal variance may turn, and any may change its sign: what the basis stores may not.
        ours, theirs = one.down_proj @ one.up_proj, other.down_proj @ other.up_proj
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
        torch.testing.assert_close(one.loss, other.loss, rtol=1e-3, atol=1e-5 * float(other.loss.max()))
        torch.testing.assert_close(one.constant, other.constant, rtol=0, atol=1e-5)
