"""The Triton kernels of attention over latents against the reference in float64.

In the interpreter on a machine without a GPU, compiled on one with. The interpreter runs programs one after another: it
shows neither races nor what a compiled launch may exceed (``test_aot_gates``).
"""

import dataclasses

import pytest
import torch

pytest.importorskip("triton", reason="the kernels under test need triton")

from lowrank_cache.kernels import triton_decode
from lowrank_cache.kernels.api import attend_stored
from lowrank_cache.kernels.packed import LatentSide, PackedTier, StoredSide
from lowrank_cache.kernels.triton_decode import latent_attention
from lowrank_cache.latents import GrowingTensor
from tests.oracle.latent_sides import (
    BAND_FACTOR,
    attention_band,
    make_rope,
    make_side,
    make_tiers,
    on_device,
    per_batch,
    with_noise,
)

ALL_TIERS = {16: 3, 8: 21, 4: 40, 2: 150}


def check(query, key, value, **arguments):
    """Fail unless the kernels are as near to the float64 truth as their rounding allows."""
    truth, truth_lse, band, lse_band = attention_band(query, key, value, **arguments)
    check_against(truth, truth_lse, band, lse_band, query, key, value, **arguments)


def check_against(truth, truth_lse, band, lse_band, query, key, value, **arguments):
    moved = {name: on_device(argument) for name, argument in arguments.items()}
    output, lse = latent_attention(on_device(query), on_device(key), on_device(value), **moved)
    assert output.dtype == lse.dtype == torch.float32
    output, lse = output.cpu(), lse.cpu()
    assert output.shape == truth.shape and lse.shape == truth_lse.shape
    assert bool(torch.isfinite(output).all()) and not bool(lse.isnan().any())
    assert torch.equal(lse.isneginf(), truth_lse.isneginf())
    error = float((output - truth).abs().max())
    assert error <= band, f"outputs are {error:.3g} from the float64 truth, rounding explains {band:.3g}"
    seen = ~truth_lse.isneginf()
    error = float((lse - truth_lse)[seen].abs().amax()) if bool(seen.any()) else 0.0
    assert error <= lse_band, f"log-sum-exps are {error:.3g} from the float64 truth, rounding explains {lse_band:.3g}"


def case(
    *,
    frame=None,
    layout="half",
    rotary=None,
    head_dim=32,
    value_dim=None,
    heads=2,
    groups=2,
    q_tokens=1,
    tokens=70,
    keys=ALL_TIERS,
    values=None,
    batch=2,
    rope_rows=None,
    query_dtype=torch.float32,
    dtype=torch.float32,
    latent_dtype=torch.float16,
    room=0,
):
    """A query and two sides; ``values=None``: in one latent with the keys."""
    rope = None if frame is None else make_rope(batch, tokens, rotary or head_dim, frame, layout, rope_rows)
    tiers = make_tiers(keys, batch, tokens, seed=1, dtype=latent_dtype, room=room)
    key = make_side(tiers, heads, head_dim, rope, seed=2, dtype=dtype)
    if values is not None:
        tiers = make_tiers(values, batch, tokens, seed=3, dtype=latent_dtype, room=room)
    value = make_side(tiers, heads, value_dim or head_dim, seed=4, dtype=dtype)
    return torch.randn(batch, heads * groups, q_tokens, head_dim).to(query_dtype), key, value


CASES = {
    # Absorbed: frames of 16 and of other lengths, longer and shorter than a tile, the last one cut off.
    "frames of 16, joint": dict(frame=16),
    "frames of 64, separate": dict(frame=64, tokens=150, values={8: 8, 4: 70}, rope_rows=1),
    "frames of 23, interleaved": dict(frame=23, layout="interleaved", values={2: 65}),
    "frames of 100, partly rotary": dict(frame=100, tokens=130, rotary=16, head_dim=48, keys={4: 33}, batch=1),
    "no rotary embedding": dict(keys={8: 16, 2: 64}, values={16: 9}, value_dim=80, groups=3),
    "many heads": dict(frame=32, heads=1, groups=20, keys={4: 64}, values={4: 32}),
    "widest heads": dict(frame=32, head_dim=256, heads=1, keys={4: 40}, values={2: 40}, tokens=20, batch=1),
    "narrowest heads": dict(frame=32, head_dim=16, heads=3, groups=1, keys={2: 40}, values={4: 40}),
    "speculative, one token": dict(frame=64, q_tokens=5, tokens=1, keys={8: 5}, values={4: 3}),
    "16 queries": dict(frame=64, q_tokens=16, heads=1, keys={2: 70}, values={2: 30}, tokens=90, batch=1),
    "order of the tiers": dict(frame=32, keys={2: 30, 16: 5, 8: 20}, values={4: 20, 8: 20}),
    # Reconstructed.
    "every key its rotation": dict(frame=1),
    "every key its rotation, interleaved": dict(frame=1, layout="interleaved", keys={4: 70, 2: 30}, q_tokens=3),
    "every key its rotation, partly": dict(frame=1, rotary=16, head_dim=48, keys={8: 30}, groups=1),
    "every key its rotation, an odd part": dict(frame=1, rotary=12, keys={8: 30}, values={8: 5}, groups=1),
    "every key its rotation, widest heads": dict(frame=1, head_dim=256, heads=1, keys={4: 70}, tokens=20, batch=1),
    "short frames": dict(frame=3, groups=2, q_tokens=2, keys={16: 20, 4: 20}, values={4: 20}),
}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name):
    query, key, value = case(**CASES[name])
    check(query, key, value, scaling=query.shape[3] ** -0.5)


@pytest.mark.parametrize("frame", [1, 32])
@pytest.mark.parametrize(
    "query_dtype, dtype, latent_dtype",
    [
        (torch.float16, torch.float16, torch.float16),
        (torch.bfloat16, torch.float16, torch.float16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float16, torch.float32),
    ],
)
def test_half_precision(frame, query_dtype, dtype, latent_dtype):
    query, key, value = case(
        frame=frame, query_dtype=query_dtype, dtype=dtype, latent_dtype=latent_dtype, keys={16: 10, 4: 40}, batch=1
    )
    check(query, key, value, scaling=query.shape[3] ** -0.5)


@pytest.mark.parametrize("frame", [1, 32])
@pytest.mark.parametrize("shape", [(2, 1, 1, 70), (1, 1, 3, 70), (2, 1, 3, 70), (70,)])
def test_masks(frame, shape):
    query, key, value = case(frame=frame, q_tokens=3, keys={4: 40}, values={8: 10})
    mask = torch.rand(shape) < 0.6
    mask[..., 0] = True
    check(query, key, value, scaling=0.2, mask=mask)


def test_left_padding_and_rows_that_see_nothing():
    query, key, value = case(frame=16, q_tokens=2, keys={4: 40})
    mask = torch.ones(2, 1, 2, 70, dtype=torch.bool)
    mask[0, :, :, :33] = False
    mask[1, :, 1] = False
    check(query, key, value, scaling=0.2, mask=mask)


@pytest.mark.parametrize("frame", [1, 32])
def test_softcap(frame):
    query, key, value = case(frame=frame, keys={4: 40})
    check(query, key, value, scaling=1.0, softcap=3.0)


@pytest.mark.parametrize("frame", [1, 16])
def test_views_of_growing_buffers(frame):
    query, key, value = case(frame=frame, room=13, keys={16: 3, 2: 40, 4: 21}, groups=1)
    assert key.tiers[1].codes.stride(0) > 70 * key.tiers[1].codes.stride(1)
    check(query, key, value, scaling=0.2)
    # And of what the cache really keeps them in.
    growing = GrowingTensor(axis=1, min_room=32)
    for piece in key.tiers[2].codes.split(9, dim=1):
        growing.append(piece)
    tiers = (*key.tiers[:2], dataclasses.replace(key.tiers[2], codes=growing.view()), *key.tiers[3:])
    check(query, dataclasses.replace(key, tiers=tiers), value, scaling=0.2)


@pytest.mark.parametrize("longest, splits", [(16, 10), (64, 3)])
def test_many_splits(monkeypatch, longest, splits):
    query, key, value = case(frame=16, tokens=150, keys={4: 40}, values={8: 20, 2: 70}, batch=1)
    whole = latent_attention(*map(on_device, (query, key, value)), scaling=0.2)
    monkeypatch.setattr(triton_decode, "_PROGRAMS", 1)
    monkeypatch.setattr(triton_decode, "_LONGEST_SPLIT", longest)
    grids = []
    add = triton_decode._Plan._add
    monkeypatch.setattr(
        triton_decode._Plan,
        "_add",
        lambda plan, kernel, grid, *rest: (grids.append(grid), add(plan, kernel, grid, *rest)),
    )
    key = dataclasses.replace(key, plans={})
    check(query, key, value, scaling=0.2)
    assert grids[2][1] == splits
    split = latent_attention(*map(on_device, (query, key, value)), scaling=0.2)
    torch.testing.assert_close(split, whole, rtol=1e-5, atol=1e-5)


def test_scores_far_apart():
    # The softmax must not overflow, nor lose the few tokens that matter.
    query, key, value = case(frame=32, keys={8: 40}, values={8: 20}, batch=1)
    check(query * 40, key, value, scaling=1.0)


def test_steps_of_all_sizes():
    # Tokens a thousand times larger than others: no tier may lose the small ones before they are weighed.
    query, key, value = case(frame=32, keys={8: 40}, values={8: 20, 2: 40}, batch=1, query_dtype=torch.float16)
    sizes = 2.0 ** torch.linspace(-9, 3, 70)
    tiers = tuple(dataclasses.replace(tier, steps=(tier.steps * sizes).half()) for tier in value.tiers)
    check(query, key, dataclasses.replace(value, tiers=tiers), scaling=0.2)


def test_no_tokens():
    query, key, value = case(frame=16)
    empty = tuple(
        PackedTier(tier.bits, tier.channels, tier.codes[:, :0], None if tier.steps is None else tier.steps[:, :0])
        for tier in key.tiers
    )
    key, value = (dataclasses.replace(side, tiers=empty) for side in (key, value))
    output, lse = latent_attention(*map(on_device, (query, key, value)), scaling=1.0)
    assert bool((output == 0).all()) and bool(lse.isneginf().all())


def wrong_sine(query, key, value):
    return query, dataclasses.replace(key, rope=dataclasses.replace(key.rope, sin=-key.rope.sin)), value


def wrong_steps(query, key, value):
    tiers = tuple(
        tier if tier.steps is None else dataclasses.replace(tier, steps=torch.ones_like(tier.steps))
        for tier in value.tiers
    )
    return query, key, dataclasses.replace(value, tiers=tiers)


def wrong_constant(query, key, value):
    return query, dataclasses.replace(key, constant=key.constant.flip(0)), value


def wrong_channel(query, key, value):
    # Two neighbouring channels of the last tier change places.
    up_proj = value.up_proj.clone()
    up_proj[[-1, -2]] = up_proj[[-2, -1]]
    return query, key, dataclasses.replace(value, up_proj=up_proj)


def last_token_lost(query, key, value):
    def shorten(side: LatentSide) -> LatentSide:
        tiers = tuple(
            PackedTier(tier.bits, tier.channels, tier.codes[:, :-1], None if tier.steps is None else tier.steps[:, :-1])
            for tier in side.tiers
        )
        return dataclasses.replace(side, tiers=tiers)

    return query, shorten(key), shorten(value)


@pytest.mark.parametrize("frame", [1, 16])
@pytest.mark.parametrize("plant", [wrong_sine, wrong_steps, wrong_constant, wrong_channel, last_token_lost])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_planted_bug_is_caught(frame, plant, dtype):
    given = case(frame=frame, keys={8: 20, 4: 40}, values={4: 30}, batch=1, query_dtype=dtype, dtype=dtype)
    arguments = {"scaling": 0.2}
    truth = attention_band(*given, **arguments)
    with pytest.raises(AssertionError, match="rounding explains"):
        check_against(*truth, *plant(*given), **arguments)


def test_rejects_what_it_cannot_read():
    query, key, value = case(frame=16, keys={4: 40})
    tier = key.tiers[0]

    def with_tier(**changes):
        return dataclasses.replace(key, tiers=(dataclasses.replace(tier, **changes),))

    scattered = torch.stack([tier.codes, tier.codes], dim=-1)[..., 0]
    for codes in (tier.codes[..., :24], tier.codes[..., 1:], scattered):
        with pytest.raises(ValueError, match="codes of the 4-bit tier must be rows of 40 channels padded and aligned"):
            latent_attention(query, with_tier(codes=codes), value, scaling=1.0)
    with pytest.raises(ValueError, match=r"distinct widths among \(16, 8, 4, 2\), got \[4, 4\]"):
        doubled = dataclasses.replace(key, tiers=(tier, tier), up_proj=torch.cat([key.up_proj, key.up_proj]))
        latent_attention(query, doubled, value, scaling=1.0)
    with pytest.raises(ValueError, match="up_proj of value must have 40 rows like its tiers, got 39"):
        latent_attention(query, key, dataclasses.replace(value, up_proj=value.up_proj[1:]), scaling=1.0)
    with pytest.raises(ValueError, match="query must have a multiple of 2 heads of 32 numbers"):
        latent_attention(query[:, :3], key, value, scaling=1.0)
    with pytest.raises(ValueError, match="head_dim of value must be a multiple of 16 up to 256, got 24"):
        latent_attention(query, key, dataclasses.replace(value, up_proj=value.up_proj[..., :24]), scaling=1.0)
    with pytest.raises(ValueError, match="value must have 2 heads and 70 tokens like key, got 1 and 70"):
        latent_attention(query, key, dataclasses.replace(value, up_proj=value.up_proj[:, :1]), scaling=1.0)
    with pytest.raises(ValueError, match="up_proj and constant of value must be .* the same for all batch elements"):
        latent_attention(query, key, per_batch(value), scaling=1.0)
    with pytest.raises(ValueError, match='up_proj and constant of key must be .* got .*; impl="torch" takes one'):
        latent_attention(query, dataclasses.replace(key, constant=per_batch(key).constant), value, scaling=1.0)


def stored_case(sinks=4, tail=70, dtype=torch.float32, **sizes):
    """A query and what a layer holds: ``case`` between exact tokens, views of longer buffers."""
    query, key, value = case(query_dtype=dtype, **sizes)
    batch, heads = query.shape[0], key.up_proj.shape[1]
    stored = []
    for side in (key, value):
        dim = side.up_proj.shape[2]
        exact = [torch.randn(batch, heads, count + 3, dim).to(dtype)[:, :, :count] for count in (sinks, tail)]
        stored.append(StoredSide(exact[0], side, exact[1]))
    return query, *stored


def moved_by(size: float, side: StoredSide) -> StoredSide:
    exact = [
        part.double() * (1 + size * torch.randn(part.shape, dtype=torch.float64)) for part in (side.sinks, side.tail)
    ]
    return StoredSide(exact[0], with_noise(side.latents, size, size), exact[1])


def check_stored(query, key, value, **options):
    """As ``check``, for latents and exact tokens together: each number that is rounded is moved by as much."""
    size = {torch.float32: 2.0**-24 * 30, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[query.dtype]
    exact = [moved_by(0.0, side) for side in (key, value)]
    truth = attend_stored(query.double(), *exact, impl="reference", **options)
    moved = []
    for _ in range(4):
        noisy = query.double() * (1 + size * torch.randn(query.shape, dtype=torch.float64))
        sides = [moved_by(size, side) for side in (key, value)]
        moved.append(float((attend_stored(noisy, *sides, impl="reference", **options) - truth).abs().max()))
    options = {name: on_device(option) for name, option in options.items()}
    given = on_device(query), on_device(key), on_device(value)
    for _ in range(2):  # the second call takes the plan of the first
        output = attend_stored(*given, impl="triton", **options)
        assert output.dtype == query.dtype and output.transpose(1, 2).is_contiguous()
        error = float((output.cpu().double() - truth).abs().max())
        allowed = BAND_FACTOR * max(moved)
        assert error <= allowed, f"{error:.3g} from the float64 truth, rounding explains {allowed:.3g}"


def masks_of(query, key, queries):
    batch, q_tokens = query.shape[0], query.shape[2] if queries else 1
    counts = key.sinks.shape[2], key.latents.tokens, key.tail.shape[2]
    masks = tuple(torch.rand(batch, 1, q_tokens, count) > 0.4 for count in counts)
    for mask in masks:
        mask[0, :, 0] = False  # a query that sees nothing
    return tuple(mask.expand(batch, 1, query.shape[2], -1) for mask in masks)


STORED_CASES = {
    "frames of 16": dict(frame=16),
    "frames of 100, a short tail": dict(frame=100, tokens=130, tail=1, sinks=0, rotary=16, head_dim=48, keys={4: 33}),
    "wider values, no rotary embedding": dict(keys={8: 16, 2: 64}, values={16: 9}, value_dim=80, groups=3),
    "every key its rotation": dict(frame=1),
    "five queries": dict(frame=64, q_tokens=5, groups=5, keys={8: 5}, values={4: 3}),
    "16 queries of every key its rotation": dict(frame=1, q_tokens=16, tokens=20, keys={8: 30}),
}


@pytest.mark.parametrize("name", STORED_CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_exact_tokens_beside_latents(name, dtype):
    query, key, value = stored_case(dtype=dtype, **STORED_CASES[name])
    check_stored(query, key, value, scaling=query.shape[3] ** -0.5)


@pytest.mark.parametrize("frame", [1, 32])
@pytest.mark.parametrize("queries", [False, True])
def test_masks_softcap_and_sink_logits_of_stored_tokens(frame, queries):
    sizes = dict(frame=frame, q_tokens=3, heads=1, tokens=40, keys={8: 5, 4: 40}, tail=20)
    query, key, value = stored_case(**sizes)
    masks, logits = masks_of(query, key, queries), torch.randn(2)
    check_stored(query, key, value, scaling=0.3, masks=masks, softcap=3.0)
    check_stored(query, key, value, scaling=0.3, masks=masks, sink_logits=logits)


@pytest.mark.parametrize("frame", [1, 32])
def test_one_mask_for_all_elements_and_queries(frame):
    query, key, value = stored_case(frame=frame, q_tokens=3, heads=1, tokens=40, keys={4: 40}, tail=20)
    masks = tuple(mask[:1, :, :1] for mask in masks_of(query, key, False))
    assert [mask.shape[:3] for mask in masks] == [(1, 1, 1)] * 3
    check_stored(query, key, value, scaling=0.3, masks=masks)


def test_one_plan_for_equal_calls_and_another_for_others():
    query, key, value = on_device(stored_case(frame=32))
    masks = on_device(masks_of(query, key, False))
    for count, options in ((1, {}), (1, {}), (2, {"masks": masks}), (3, {"softcap": 2.0}), (3, {"masks": masks})):
        attend_stored(query, key, value, scaling=0.2, impl="triton", **options)
        assert len(key.latents.plans) == count
    other = dataclasses.replace(value, latents=dataclasses.replace(value.latents))
    expected = attend_stored(query, key, other, scaling=0.2, impl="torch")
    actual = attend_stored(query, key, other, scaling=0.2, impl="triton")
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_queries_and_tails_that_begin_anywhere():
    query, key, value = stored_case(frame=32, head_dim=32, batch=1)
    odd = torch.randn(query.numel() + 1)[1:].view(query.shape)
    tails = [torch.randn(side.tail.numel() + 1)[1:].view(side.tail.shape) for side in (key, value)]
    key, value = (dataclasses.replace(side, tail=tail) for side, tail in zip((key, value), tails, strict=True))
    check_stored(odd, key, value, scaling=0.2)
