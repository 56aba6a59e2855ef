"""Who computes: one choice by device, torch on GPUs that were not checked, and never a kernel that cannot serve."""

import warnings

import pytest
import torch

from lowrank_cache.kernels import api, reference, torch_ops, trust
from tests.oracle.latent_sides import make_side, make_tiers

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """The choice for a GPU is remembered; tests must not remember each other's."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    trust.serves.cache_clear()
    yield
    trust.serves.cache_clear()


def test_torch_serves_cpus_and_names_are_checked():
    for impl, module in (("auto", torch_ops), ("torch", torch_ops), ("reference", reference)):
        assert api._operations(impl, torch.device("cpu"), 64) is module
    with pytest.raises(ValueError, match=r"impl must be one of \('auto', .*\), got 'cuda'"):
        api._operations("cuda", torch.device("cpu"), 64)


def test_an_unchecked_gpu_gets_torch_and_one_warning():
    with pytest.warns(UserWarning, match="not been checked on a GPU of class sm_90.*impl='triton'"):
        assert api._operations("auto", CUDA, 64) is torch_ops
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert api._operations("auto", CUDA, 64, 128) is torch_ops


def test_a_checked_gpu_gets_kernels_where_heads_fit(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(trust, "CHECKED_CARDS", frozenset({"sm_90"}))
    assert api._operations("auto", CUDA, 64, 256) is api._guarded_triton()
    for sizes in ((8,), (64, 24), (512,)):
        assert api._operations("auto", CUDA, *sizes) is torch_ops
    monkeypatch.setattr(trust, "find_spec", lambda name: None)
    trust.serves.cache_clear()
    assert api._operations("auto", CUDA, 64) is torch_ops, "triton is not installed"


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_bases_of_batch_elements_are_read_by_torch(impl):
    """No kernel takes a basis for each batch element, nor heads wider than 256: asked for, torch reads them."""
    side = make_side(make_tiers({8: 16, 4: 32}, 2, 40), 2, 16)
    own = type(side)(side.tiers, side.up_proj.expand(2, -1, -1, -1), side.constant.expand(2, -1, -1), side.rope)
    expected = reference.reconstruct(side)
    torch.testing.assert_close(api.reconstruct(own, torch.float32, impl=impl), expected, rtol=1e-4, atol=1e-4)
