"""Compiled attention for CPUs, on every instruction set that this machine can run, against float64."""

import dataclasses
import hashlib
import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowrank_cache.kernels import native
from lowrank_cache.kernels.api import attend_stored
from lowrank_cache.kernels.packed import StoredSide
from tests.oracle.integer_attention import attention_in_float64, integer_band
from tests.oracle.latent_sides import make_rope, make_side, make_tiers

COMPILER = native.compiler()
X86 = os.uname().machine == "x86_64"
# What the processor has; the same without AVX-512; AVX2 alone; and what is left for all others.
BUILDS = {
    "native": ["-march=native"],
    "avx2-vnni": ["-march=native", "-mno-avx512f"],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "portable": [],
}
FLAGS = open("/proc/cpuinfo").read() if os.path.exists("/proc/cpuinfo") else ""
RUNNABLE = [name for name in BUILDS if X86 and "avx2" in FLAGS or name in ("native", "portable")]
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """One for all workers of a run: each build is compiled once."""
    shared = tmp_path_factory.getbasetemp().parent / "native"
    shared.mkdir(exist_ok=True)
    return shared


@pytest.fixture(params=RUNNABLE)
def build(request, folder, monkeypatch):
    found = native.load(COMPILER, BUILDS[request.param], folder)
    monkeypatch.setattr(native, "build", lambda: found)
    return request.param


def random_case(
    tokens=300, frame=64, tiers=None, batch=1, q_tokens=1, joint=True, layout="half", q_heads=6, heads=2, head_dim=32,
    value_dim=48, rotary_dim=None, rows=None, sinks=4, tail=19, dtype=torch.float32,
):  # fmt: skip
    tiers = tiers or {8: 5, 4: 19, 2: 70}
    key_tiers = make_tiers(tiers, batch, tokens, room=5)
    value_tiers = key_tiers if joint else make_tiers({4: 11, 2: 3}, batch, tokens, seed=1, room=3)
    rope = None if frame is None else make_rope(batch, tokens, rotary_dim or head_dim, frame, layout, rows)
    sides = []
    for packed, dim, turned in ((key_tiers, head_dim, rope), (value_tiers, value_dim, None)):
        latents = make_side(packed, heads, dim, turned, dtype=torch.float16) if tokens else None
        exact = [torch.randn(batch, heads, count + 3, dim).to(dtype)[:, :, :count] for count in (sinks, tail)]
        sides.append(StoredSide(exact[0], latents, exact[1]))
    return torch.randn(batch, q_heads, q_tokens, head_dim).to(dtype), *sides


def random_masks(query, key, blind=True):
    batch, _, q_tokens, _ = query.shape
    tokens = key.latents.tokens if key.latents is not None else 0
    masks = tuple(torch.rand(batch, 1, q_tokens, n) > 0.4 for n in (key.sinks.shape[2], tokens, key.tail.shape[2]))
    for mask in masks if blind else ():
        mask[0, :, 0] = False  # a query that sees nothing
    return masks


def assert_attends(query, key, value, **options):
    assert native.serves(query, key, value)
    truth, allowed = integer_band(query, key, value, **options)
    actual = native.attend(query, key, value, **options)
    assert actual.dtype == query.dtype and actual.shape == truth.shape
    assert bool(torch.isfinite(actual).all())
    error = float((actual.double() - truth).abs().max())
    assert error <= allowed, f"{error:.3g} from the float64 truth, allowed {allowed:.3g}"


def test_the_truth_is_the_reference():
    query, key, value = random_case(batch=2, q_tokens=3, joint=False)
    masks = random_masks(query, key)
    options = {"scaling": 0.2, "masks": masks, "softcap": 3.0, "sink_logits": torch.randn(6)}
    expected = attend_stored(query.double(), *map(_double, (key, value)), impl="reference", **options)
    torch.testing.assert_close(attention_in_float64(query, key, value, **options), expected)


def _double(side):
    return StoredSide(side.sinks.double(), side.latents, side.tail.double())


@pytest.mark.parametrize("frame", [16, 64, 96, 300, None])
@pytest.mark.parametrize("q_tokens", [1, 3])
def test_frames_and_queries(build, frame, q_tokens):
    query, key, value = random_case(700, frame, q_tokens=q_tokens)
    assert_attends(query, key, value, scaling=0.2)


@pytest.mark.parametrize("tiers", [{8: 33}, {4: 33}, {2: 130}, {8: 3, 2: 5}, {8: 48, 4: 224, 2: 704}])
@pytest.mark.parametrize("joint", [True, False])
def test_tiers(build, tiers, joint):
    query, key, value = random_case(tiers=tiers, joint=joint)
    assert_attends(query, key, value, scaling=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(build, dtype):
    query, key, value = random_case(dtype=dtype)
    assert_attends(query, key, value, scaling=0.2)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [12, 32])
def test_layouts_and_partial_rotation(build, layout, rotary_dim):
    query, key, value = random_case(layout=layout, rotary_dim=rotary_dim, batch=2)
    assert_attends(query, key, value, scaling=0.2)


def test_masks_softcap_and_sink_logits(build):
    query, key, value = random_case(batch=3, q_tokens=2)
    masks = random_masks(query, key)
    for options in (
        {"masks": masks},
        {"masks": tuple(mask[:1, :, :1] for mask in masks)},
        {"softcap": 2.0},
        {"sink_logits": 3 * torch.randn(6)},
        {"masks": masks, "softcap": 2.0, "sink_logits": torch.randn(6)},
    ):
        assert_attends(query, key, value, scaling=0.3, **options)


@pytest.mark.parametrize("sizes", [{"tokens": 0}, {"sinks": 0}, {"tail": 1}, {"tail": 700}, {"tokens": 1}])
def test_parts_that_are_empty_or_long(build, sizes):
    query, key, value = random_case(**sizes)
    assert_attends(query, key, value, scaling=0.2)


@pytest.mark.parametrize("heads", [(1, 1), (7, 1), (8, 8), (24, 3), (40, 8)])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 80), (2, 2)])
def test_heads(build, heads, dims):
    query, key, value = random_case(130, q_heads=heads[0], heads=heads[1], head_dim=dims[0], value_dim=dims[1])
    assert_attends(query, key, value, scaling=dims[0] ** -0.5)


def test_threads(build):
    cases = [random_case(600, batch=batch, q_tokens=2) for batch in (1, 2, 3)]
    try:
        torch.set_num_threads(2)
        for query, key, value in cases:
            assert_attends(query, key, value, scaling=0.2, masks=random_masks(query, key, blind=False))
    finally:
        torch.set_num_threads(1)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(0, 600),
    q_tokens=st.integers(1, 4),
    frame=st.sampled_from([None, 16, 17, 64, 128, 400]),
    layout=st.sampled_from(["half", "interleaved"]),
    tiers=st.dictionaries(st.sampled_from([8, 4, 2]), st.integers(1, 150), min_size=1),
    heads=st.sampled_from([(1, 1), (4, 2), (9, 3), (11, 1)]),
    dims=st.sampled_from([(16, 16), (64, 24), (34, 34)]),
    sinks=st.integers(0, 4),
    tail=st.integers(1, 40),
    joint=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_shape(build, batch, tokens, q_tokens, frame, layout, tiers, heads, dims, sinks, tail, joint, masked, seed):
    torch.manual_seed(seed)
    query, key, value = random_case(
        tokens, frame, dict(sorted(tiers.items(), reverse=True)), batch, q_tokens, joint, layout, *heads, *dims,
        sinks=sinks, tail=tail,
    )  # fmt: skip
    masks = random_masks(query, key) if masked else (None, None, None)
    assert_attends(query, key, value, scaling=0.2, masks=masks)


def test_strided_queries_and_batches(build):
    query, key, value = random_case(batch=4, q_tokens=2)
    expected = native.attend(query, key, value, scaling=0.2)
    across = query.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(native.attend(across, key, value, scaling=0.2), expected)
    assert torch.equal(native.attend(query.expand(4, 6, 2, 32)[..., :], key, value, scaling=0.2), expected)


@pytest.mark.parametrize("fault", ["sine", "steps", "constant", "codes", "mask", "tail"])
def test_a_planted_fault_is_caught(build, fault):
    query, key, value = random_case(100, joint=False, tail=60)
    masks = random_masks(query, key, blind=False)
    truth, allowed = integer_band(query, key, value, scaling=0.2, masks=masks)
    latents = key.latents
    if fault == "sine":
        latents = dataclasses.replace(latents, rope=dataclasses.replace(latents.rope, sin=-latents.rope.sin))
    elif fault == "steps":
        tiers = (dataclasses.replace(latents.tiers[0], steps=latents.tiers[0].steps * 2), *latents.tiers[1:])
        latents = dataclasses.replace(latents, tiers=tiers)
    elif fault == "constant":
        latents = dataclasses.replace(latents, constant=latents.constant + 0.3)
    elif fault == "codes":
        moved = dataclasses.replace(latents.tiers[2], codes=latents.tiers[2].codes.roll(1, 1))
        latents = dataclasses.replace(latents, tiers=(*latents.tiers[:2], moved))
    elif fault == "mask":
        masks = (masks[0], masks[1].roll(1, 3), masks[2])
    key = StoredSide(key.sinks, latents, key.tail.roll(1, 2) if fault == "tail" else key.tail)
    actual = native.attend(query, key, value, scaling=0.2, masks=masks)
    assert float((actual.double() - truth).abs().max()) > allowed


@pytest.mark.parametrize("where", ["query", "tail", "steps"])
def test_what_is_not_a_number_comes_out_as_such(build, where):
    query, key, value = random_case(q_heads=2, heads=2)
    if where == "query":
        query[:, 0] = torch.nan
    elif where == "tail":
        key.tail[:, 0, 3, 2] = torch.nan
    else:
        key.latents.tiers[0].steps[:, 5] = torch.nan
    actual = native.attend(query, key, value, scaling=0.2)
    assert bool(actual[:, 0].isnan().all())
    assert bool(torch.isfinite(actual[:, 1]).all()) or where == "steps"


def test_large_scores_do_not_overflow(build):
    query, key, value = random_case(300)
    assert_attends(1e4 * query, key, value, scaling=1.0)


@pytest.mark.parametrize(
    "change",
    [{"frame": 8}, {"tiers": {16: 3, 4: 5}}, {"head_dim": 258}, {"q_tokens": 200}],
    ids=["frame", "16 bits", "head_dim", "queries"],
)
def test_what_it_does_not_serve_goes_to_torch(change):
    query, key, value = random_case(**change)
    assert not native.serves(query, key, value)
    expected = attend_stored(query, key, value, scaling=0.1, impl="torch")
    assert torch.equal(attend_stored(query, key, value, scaling=0.1), expected)
    assert torch.equal(attend_stored(query, key, value, scaling=0.1, impl="native"), expected)


def _start(folder, queue):
    os.environ["XDG_CACHE_HOME"] = folder
    queue.put(native.build.__wrapped__().library is not None)


def test_processes_that_start_at_once_share_one_library(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_start, args=(str(tmp_path), queue)) for _ in range(4)]
    for process in processes:
        process.start()
    assert all(queue.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    names = sorted(path.suffix for path in (tmp_path / "lowrank-cache" / "native").iterdir())
    assert names == [".sha256", ".so"]


def test_a_tampered_library_is_compiled_again(tmp_path):
    native.load(COMPILER, [], tmp_path)
    (path,) = tmp_path.glob("*.so")
    good = hashlib.sha256(path.read_bytes()).hexdigest()
    bad = path.with_suffix(".bad")
    bad.write_bytes(path.read_bytes() + b"tampered")
    os.replace(bad, path)
    assert native.load(COMPILER, [], tmp_path).library is not None
    assert hashlib.sha256(path.read_bytes()).hexdigest() == path.with_suffix(".sha256").read_text()
    assert len(good) == 64


def test_a_failed_compile_leaves_nothing(tmp_path, monkeypatch):
    broken = tmp_path / "native.c"
    broken.write_text("this is not C")
    monkeypatch.setattr(native, "SOURCE", broken)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = native.build.__wrapped__()
    assert found.library is None and "error" in found.description
    assert list((tmp_path / "lowrank-cache" / "native").iterdir()) == []


def test_a_folder_that_others_may_write_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "lowrank-cache" / "native"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = native.build.__wrapped__()
    assert found.library is None and "writable by you alone" in found.description


def test_without_a_compiler_torch_computes_and_one_line_says_so(tmp_path):
    program = """
import warnings, torch
from lowrank_cache.kernels import native
from tests.kernels.test_native import random_case
from lowrank_cache.kernels.api import attend_stored
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    query, key, value = random_case()
    for _ in range(2):
        output = attend_stored(query, key, value, scaling=0.2)
assert torch.equal(output, attend_stored(query, key, value, scaling=0.2, impl="torch"))
print(*(str(one.message) for one in caught if "compiled" in str(one.message)), sep="\\n")
try:
    attend_stored(query, key, value, scaling=0.2, impl="native")
except RuntimeError as error:
    print(error)
"""
    hidden = {**os.environ, "PATH": str(tmp_path), "CC": "", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=hidden, capture_output=True, text=True, timeout=120)
    said = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert len(said) == 2 and all("install gcc or clang" in line for line in said)
    assert said[1].startswith("impl='native' needs a C compiler")
