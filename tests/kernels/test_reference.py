"""The reference kernels: packing, quantizing and rotating, against brute force and transformers' own functions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as rotate_interleaved
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rotate_half

from lowrank_cache.budget import DISTORTION
from lowrank_cache.kernels.packed import QUANTIZED_BITS, PackedTier, dequantize, pack, quantize, unpack
from lowrank_cache.kernels.rope import LAYOUTS, angle_tables, rotate

bit_widths = st.sampled_from(QUANTIZED_BITS)


@given(
    bits=bit_widths, batch=st.integers(1, 3), tokens=st.integers(0, 5), granules=st.integers(1, 6), seed=st.integers(0)
)
def test_pack_round_trips(bits, batch, tokens, granules, seed):
    generator = torch.Generator().manual_seed(seed % 2**31)
    channels = granules * 8 // bits
    codes = torch.randint(0, 2**bits, (batch, tokens, channels), dtype=torch.uint8, generator=generator)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (batch, tokens, granules)
    assert torch.equal(unpack(packed, bits), codes)


def test_pack_layout_is_planar():
    codes = torch.arange(8, dtype=torch.uint8) % 4
    # Byte j holds channels j, j + 2, j + 4, j + 6, from its lowest bits up.
    assert pack(codes, 2).tolist() == [0 | 2 << 2 | 0 << 4 | 2 << 6, 1 | 3 << 2 | 1 << 4 | 3 << 6]
    assert pack(codes, 4).tolist() == [0 | 0 << 4, 1 | 1 << 4, 2 | 2 << 4, 3 | 3 << 4]


def brute_force_error(row, bits, weight):
    """Least weighted squared error over a fine grid of steps, levels nearest, float64."""
    levels = torch.arange(2**bits, dtype=torch.float64) - 2 ** (bits - 1) + 0.5
    steps = torch.linspace(0.02, 1.05, 400, dtype=torch.float64) * row.abs().max() / 2 ** (bits - 1)
    values = steps[:, None] * levels
    distance = (row[None, :, None] - values[:, None, :]).square().amin(-1)
    return float((distance * weight).sum(-1).amin())


@pytest.mark.parametrize("bits, slack", [(8, 1.6), (4, 1.15), (2, 1.1)])
@pytest.mark.parametrize("shape", ["normal", "uniform", "outlier"])
def test_quantize_is_near_the_best_step(bits, slack, shape):
    torch.manual_seed(bits)
    rows = torch.rand(10, 64) * 2 - 1 if shape == "uniform" else torch.randn(10, 64)
    if shape == "outlier":
        rows[:, 0] *= 6
    weight = torch.linspace(2, 0.2, 64)
    codes, steps = quantize(rows[None], bits, weight)
    assert codes.dtype == torch.uint8 and steps.dtype == torch.float16 and steps.shape == (1, 10)
    assert int(codes.max()) < 2**bits
    values = dequantize(codes, steps, bits)[0].double()
    ours = ((values - rows.double()).square() * weight.double()).sum(-1)
    best = torch.tensor([brute_force_error(row.double(), bits, weight.double()) for row in rows])
    # On the average over rows; 8 bits take the unclipped step, which costs little there.
    assert float(ours.sum()) <= slack * float(best.sum())
    assert float(ours.sum()) >= 0.999 * float(best.sum()), "no step can beat the grid: the search itself is wrong"


@pytest.mark.parametrize("bits", QUANTIZED_BITS)
def test_quantize_distortion_is_what_the_budget_assumes(bits):
    rows = torch.randn(1, 4000, 64)
    codes, steps = quantize(rows, bits, torch.ones(64))
    error = float((dequantize(codes, steps, bits) - rows).square().mean())
    assert 0.5 * DISTORTION[bits] < error < 2 * DISTORTION[bits]


@given(bits=bit_widths, exponent=st.integers(-10, 8), channels=st.integers(1, 40), seed=st.integers(0, 1000))
def test_quantized_values_are_finite_and_within_one_step(bits, exponent, channels, seed):
    rows = torch.randn(1, 3, channels, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    codes, steps = quantize(rows, bits, torch.ones(channels))
    values = dequantize(codes, steps, bits)
    assert bool(torch.isfinite(values).all()) and bool((steps > 0).all())
    inside = rows.abs() <= steps.float()[..., None] * 2 ** (bits - 1)
    assert bool(((values - rows).abs() <= 0.5001 * steps.float()[..., None] + 1e-12)[inside].all())


@given(bits=bit_widths, seed=st.integers(0, 1000), exponent=st.integers(-18, 6))
def test_only_ratios_of_weights_matter(bits, seed, exponent):
    generator = torch.Generator().manual_seed(seed)
    rows, weight = torch.randn(1, 4, 16, generator=generator), torch.rand(16, generator=generator) + 0.1
    steps = quantize(rows, bits, weight)[1].float()
    torch.testing.assert_close(quantize(rows, bits, weight * 10.0**exponent)[1].float(), steps, rtol=1e-2, atol=0)


def test_a_heavy_channel_is_kept_better():
    rows, weight = torch.randn(1, 500, 32), torch.ones(32)
    even = dequantize(*quantize(rows, 2, weight), 2)
    weight[5] = 100.0
    heavy = dequantize(*quantize(rows, 2, weight), 2)
    errors = [float((values - rows)[..., 5].square().mean()) for values in (even, heavy)]
    assert errors[1] < 0.7 * errors[0]


def test_quantize_rejects_other_widths():
    with pytest.raises(ValueError, match=r"bits must be one of \(8, 4, 2\), got 3"):
        quantize(torch.zeros(1, 1, 8), 3, torch.ones(8))


def test_rows_are_quantized_one_by_one():
    rows, weight = torch.randn(3, 7, 24), torch.rand(24)
    for bits in QUANTIZED_BITS:
        codes, steps = quantize(rows, bits, weight)
        for row in range(3):
            for token in range(7):
                alone = quantize(rows[row : row + 1, token : token + 1], bits, weight)
                assert torch.equal(alone[0][0, 0], codes[row, token]) and torch.equal(alone[1][0, 0], steps[row, token])


def tables(tokens, half, dtype=torch.float32):
    inv_freq = (10000.0 ** (-torch.arange(half) / half)).to(dtype)
    return inv_freq, *angle_tables(torch.arange(tokens) * 37, inv_freq)


@pytest.mark.parametrize("layout, theirs", [("half", rotate_half), ("interleaved", rotate_interleaved)])
def test_rotate_is_that_of_transformers(layout, theirs):
    states = torch.randn(2, 3, 9, 16)
    _, cos, sin = tables(9, 8)
    join = (lambda t: torch.cat([t, t], -1)) if layout == "half" else (lambda t: t.repeat_interleave(2, -1))
    expected, _ = theirs(states, states, join(cos)[None], join(sin)[None])
    torch.testing.assert_close(rotate(states, cos, sin, layout), expected, rtol=1e-6, atol=1e-6)


@given(layout=st.sampled_from(LAYOUTS), half=st.integers(1, 8), rest=st.integers(0, 5), seed=st.integers(0, 1000))
def test_rotate_is_orthogonal_and_inverts(layout, half, rest, seed):
    states = torch.randn(2, 5, 2 * half + rest, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    _, cos, sin = tables(5, half, torch.float64)
    rotated = rotate(states, cos, sin, layout)
    torch.testing.assert_close(rotate(rotated, cos, sin, layout, inverse=True), states)
    torch.testing.assert_close(rotated.norm(dim=-1), states.norm(dim=-1))
    assert torch.equal(rotated[..., 2 * half :], states[..., 2 * half :])
    assert torch.equal(rotated[:, 0], states[:, 0])  # position 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_depend_on_distance_alone(layout):
    query, key = torch.randn(2, 16, dtype=torch.float64)
    inv_freq, _, _ = tables(1, 8, torch.float64)

    def score(query_position, key_position):
        rotated = [
            rotate(states, *angle_tables(torch.tensor(position), inv_freq), layout)
            for states, position in ((query, query_position), (key, key_position))
        ]
        return rotated[0] @ rotated[1]

    torch.testing.assert_close(score(100, 93), score(12, 5))
    assert float((score(100, 93) - score(100, 92)).abs()) > 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_angles_add(layout):
    states = torch.randn(3, 16, dtype=torch.float64)
    inv_freq, _, _ = tables(1, 8, torch.float64)
    steps = [angle_tables(torch.tensor(position), inv_freq) for position in (5, 9, 14)]
    torch.testing.assert_close(
        rotate(rotate(states, *steps[0], layout), *steps[1], layout), rotate(states, *steps[2], layout)
    )


def test_rotate_rejects_what_it_cannot_do():
    _, cos, sin = tables(2, 8)
    with pytest.raises(ValueError, match=r"layout must be one of \('half', 'interleaved'\), got 'neox'"):
        rotate(torch.zeros(2, 16), cos, sin, "neox")
    with pytest.raises(ValueError, match="at least 16 numbers in the last axis, got 15"):
        rotate(torch.zeros(2, 15), cos, sin, "half")


@settings(max_examples=20)
@given(position=st.integers(0, 100_000))
def test_angles_are_those_of_transformers(position):
    inv_freq = 10000.0 ** (-torch.arange(8) / 8)
    cos, sin = angle_tables(torch.tensor([position]), inv_freq)
    angles = torch.tensor([float(position)])[:, None] * inv_freq
    assert torch.equal(cos, angles.cos()) and torch.equal(sin, angles.sin())


@pytest.mark.parametrize(
    "bits, channels, codes, steps, message",
    [
        (3, 8, torch.zeros(1, 5, 16, dtype=torch.uint8), None, r"must be one of \(16, 8, 4, 2\), got 3"),
        (4, 33, torch.zeros(1, 5, 16, dtype=torch.uint8), torch.zeros(1, 5).half(), "room for 33 channels, got"),
        (4, 0, torch.zeros(1, 5, 16, dtype=torch.uint8), torch.zeros(1, 5).half(), "room for 0 channels, got"),
        (8, 8, torch.zeros(5, 16, dtype=torch.uint8), torch.zeros(5).half(), r"\[batch, tokens, row\].*got \[5, 16\]"),
        (16, 8, torch.zeros(1, 5, 16, dtype=torch.uint8), None, "16-bit tier must be floating, got torch.uint8"),
        (
            8,
            8,
            torch.zeros(1, 5, 16, dtype=torch.int8),
            torch.zeros(1, 5).half(),
            "must be torch.uint8, got torch.int8",
        ),
        (8, 8, torch.zeros(1, 5, 16, dtype=torch.uint8), None, "steps must be given below 16 bits"),
        (16, 8, torch.zeros(1, 5, 16), torch.zeros(1, 5).half(), "steps must be given below 16 bits and only there"),
        (2, 8, torch.zeros(1, 5, 16, dtype=torch.uint8), torch.zeros(1, 4).half(), r"shape \[1, 5\], one a token"),
        (2, 8, torch.zeros(1, 5, 16, dtype=torch.uint8), torch.zeros(1, 5), "must be float16 .*got torch.float32"),
    ],
)
def test_tiers_that_cannot_be_read_are_refused(bits, channels, codes, steps, message):
    with pytest.raises(ValueError, match=message):
        PackedTier(bits, channels, codes, steps)
