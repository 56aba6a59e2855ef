"""Finite latents stay finite however large they are; others never get so far (tests/cache/test_bad_input.py)."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_cache.kernels.reference import QUANTIZED_BITS, dequantize, quantize
from lowrank_cache.latents import PackedLatents

LARGEST = torch.finfo(torch.float32).max
numbers = st.builds(
    lambda sign, exponent: sign * 2.0**exponent, st.sampled_from([-1.0, 0.0, 1.0]), st.floats(-149, 127.99)
)


@pytest.mark.parametrize("bits", QUANTIZED_BITS)
@given(row=st.lists(numbers, min_size=4, max_size=4), weight=st.lists(st.floats(0, 1e3), min_size=4, max_size=4))
def test_quantized_latents_are_finite(bits, row, weight):
    latents = torch.tensor(row, dtype=torch.float32)[None, None]
    codes, steps = quantize(latents, bits, torch.tensor(weight, dtype=torch.float32))
    assert torch.isfinite(steps).all() and (steps > 0).all()
    assert torch.isfinite(dequantize(codes, steps, bits)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1e-45, 1e-8, 7e4, 1e30, LARGEST])
def test_stored_latents_are_finite(size, dtype):
    packed = PackedLatents(((16, 4), (8, 4), (4, 4), (2, 4)), dtype, block_size=2)
    latents = size * torch.sign(torch.randn(2, 3, 16))
    packed.append(latents, torch.ones(16))
    read = packed.read()
    assert torch.isfinite(read).all()
    if size > 1e-8:
        assert torch.equal(read.sign(), latents.sign()), "saturated, and not wrapped around"
