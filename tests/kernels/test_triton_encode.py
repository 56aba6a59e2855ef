"""The Triton encoder against the reference and float64."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton", reason="the kernels under test need triton")

from lowrank_cache.kernels import reference
from lowrank_cache.kernels.packed import read_latents, unpack
from lowrank_cache.kernels.rope import rotate
from lowrank_cache.kernels.triton_encode import encode
from tests.oracle.latent_sides import FLOAT16_ROUNDING, FLOAT32_ROUNDING, make_rope, on_device


def encode_case(members, tiers, batch=2, tokens=21, dtype=torch.float32, latent_dtype=torch.float16, frame=1):
    """Arguments of ``encode``; ``members``: (heads, head_dim, rotary_dim or 0, layout)."""
    states = [torch.randn(batch, heads, tokens, dim).to(dtype) for heads, dim, _, _ in members]
    constants = [torch.randn(heads, dim) for heads, dim, _, _ in members]
    frames = [make_rope(batch, tokens, rotary, frame, layout) if rotary else None for _, _, rotary, layout in members]
    width, rank = sum(heads * dim for heads, dim, _, _ in members), sum(channels for _, channels in tiers)
    return {
        "states": states,
        "constants": constants,
        "frames": frames,
        "down_proj": torch.randn(width, rank) / width**0.5,
        "tiers": tiers,
        "weight": torch.rand(rank) ** 4 * 1e-6 + 1e-9,
        "latent_dtype": latent_dtype,
    }


def exact_latents(case):
    """Latents in float64, before quantization."""
    rows = []
    for states, constant, rope in zip(case["states"], case["constants"], case["frames"], strict=True):
        states = states.double()
        if rope is not None:
            cos, sin = (
                table.double().repeat_interleave(rope.frame_length, 1)[:, None, : states.shape[2]]
                for table in (rope.cos, rope.sin)
            )
            states = rotate(states, cos, sin, rope.layout, inverse=True)
        rows.append((states - constant.double()[:, None]).transpose(1, 2).flatten(2))
    return torch.cat(rows, 2) @ case["down_proj"].double()


def check_encoded(case):
    """Fail unless the kernel's tiers are as good as the reference's, and the same but for ties."""
    moved = {
        name: on_device(tuple(given)) if isinstance(given, list) else on_device(given) for name, given in case.items()
    }
    packed = encode(**moved)
    expected = reference.encode(**case)
    truth = exact_latents(case)
    start = 0
    for tier, other in zip(packed, expected, strict=True):
        tier = dataclasses.replace(tier, codes=tier.codes.cpu(), steps=None if tier.steps is None else tier.steps.cpu())
        assert (tier.bits, tier.channels) == (other.bits, other.channels)
        assert tier.codes.shape == other.codes.shape and tier.codes.dtype == other.codes.dtype
        channels = slice(start, start + tier.channels)
        weight = case["weight"][channels].double()
        errors = [
            ((read_latents((one,), torch.float64) - truth[..., channels]).square() * weight).sum(-1)
            for one in (tier, other)
        ]
        if tier.bits == 16:
            # One rounding to the stored dtype; ties may go either way.
            size = torch.finfo(tier.codes.dtype).eps
            torch.testing.assert_close(
                tier.codes.float(), other.codes.float(), rtol=size, atol=8 * FLOAT32_ROUNDING * 8
            )
        else:
            # Sums in another order move a step by a few roundings of float16 at most, if the search takes the same one;
            # between trials of almost equal error it may take the other.
            torch.testing.assert_close(errors[0], errors[1], rtol=5e-2, atol=0)
            torch.testing.assert_close(errors[0].mean(), errors[1].mean(), rtol=2e-3, atol=0)
            alike = (tier.steps.float() / other.steps.float() - 1).abs() < 4 * FLOAT16_ROUNDING
            assert float(alike.float().mean()) > 0.9
            levels, other_levels = (unpack(one.codes, one.bits)[alike].int() for one in (tier, other))
            assert int((levels - other_levels).abs().max()) <= 1
            assert float((levels != other_levels).float().mean()) < 0.01
            assert bool((levels[..., tier.channels :] == 0).all()), "padding must be zero"
        start += tier.channels


ENCODE_CASES = {
    "one member": dict(members=[(2, 32, 32, "half")], tiers=((16, 3), (8, 21), (4, 40), (2, 70))),
    "keys and values": dict(members=[(3, 16, 16, "half"), (3, 16, 0, "half")], tiers=((8, 9), (2, 33)), frame=8),
    "a layer group": dict(
        members=[(1, 48, 16, "interleaved"), (1, 32, 0, "half")] * 2,
        tiers=((4, 17), (16, 9), (8, 9)),
        tokens=70,
        batch=1,
    ),
    "widest": dict(members=[(1, 256, 256, "half")], tiers=((2, 300),), tokens=3, batch=1),
    "an odd part rotated": dict(members=[(2, 32, 12, "half")], tiers=((8, 40),)),
    "one token": dict(members=[(2, 32, 32, "half")], tiers=((4, 40),), tokens=1, batch=1),
    "bfloat16": dict(members=[(2, 32, 32, "half")], tiers=((16, 5), (4, 40)), dtype=torch.bfloat16),
    "float16": dict(
        members=[(2, 32, 32, "half")], tiers=((16, 5), (4, 40)), dtype=torch.float16, latent_dtype=torch.bfloat16
    ),
}


@pytest.mark.parametrize("name", ENCODE_CASES)
def test_encodes_as_the_reference_does(name):
    check_encoded(encode_case(**ENCODE_CASES[name]))


def test_encodes_views_of_a_window():
    case = encode_case(members=[(2, 32, 32, "half")], tiers=((4, 40),))
    case["states"] = [states[:, :, 3:19] for states in case["states"]]
    assert not case["states"][0].is_contiguous()
    check_encoded(case)


def test_encodes_extremes():
    case = encode_case(members=[(2, 32, 0, "half")], tiers=((16, 8), (8, 8), (2, 40)), batch=1)
    case["states"][0][:, :, 0] = case["constants"][0][:, :]  # latents of zero
    case["states"][0][:, :, 1] *= 1e7  # beyond what float16 holds
    case["states"][0][:, :, 2] = case["constants"][0] + 1e-7
    packed = encode(**{name: on_device(tuple(g)) if isinstance(g, list) else on_device(g) for name, g in case.items()})
    read = read_latents(tuple(on_device_back(tier) for tier in packed), torch.float64)
    expected = read_latents(reference.encode(**case), torch.float64)
    assert bool(torch.isfinite(read).all())
    torch.testing.assert_close(read[:, 1], expected[:, 1], rtol=1e-3, atol=0)
    assert float(read[:, 0].abs().max()) <= 2.0**-14 * 2


def on_device_back(tier):
    return dataclasses.replace(tier, codes=tier.codes.cpu(), steps=None if tier.steps is None else tier.steps.cpu())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_refuses_states_that_are_not_finite(bad):
    case = encode_case(members=[(2, 32, 32, "half")], tiers=((4, 40),))
    case["states"][0][1, 0, 2, 3] = bad
    on_gpu = {
        name: [on_device(one) for one in given] if type(given) is list else on_device(given)
        for name, given in case.items()
    }
    for one, given in ((reference.encode, case), (encode, on_gpu)):
        with pytest.raises(ValueError, match="states must be finite, got NaN or infinity"):
            one(**given)


def test_refuses_matrices_by_batch_element():
    case = encode_case(members=[(2, 32, 32, "half")], tiers=((4, 40),))
    with pytest.raises(ValueError, match=r"down_proj must be \[64, 40\] .* got \[2, 64, 40\]"):
        encode(**case | {"down_proj": torch.stack([case["down_proj"]] * 2)})
    with pytest.raises(ValueError, match=r"constants must be \[2, 32\] .* got \[2, 2, 32\]"):
        encode(**case | {"constants": [torch.stack(case["constants"] * 2)]})


@pytest.mark.parametrize("plant", ["sine", "constant", "weight"])
def test_a_planted_bug_is_caught(plant, monkeypatch):
    case = encode_case(members=[(2, 32, 32, "half")], tiers=((2, 70),))
    right = reference.encode

    def wrong(**given):
        if plant == "sine":
            given["frames"] = [dataclasses.replace(given["frames"][0], sin=-given["frames"][0].sin)]
        elif plant == "constant":
            given["constants"] = [given["constants"][0] * 1.05]
        else:
            given["weight"] = given["weight"].flip(0)
        return right(**given)

    monkeypatch.setattr(reference, "encode", wrong)
    with pytest.raises(AssertionError):
        check_encoded(case)
