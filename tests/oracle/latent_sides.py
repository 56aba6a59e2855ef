"""Packed keys and values with random contents, and how far rounding may move attention over them."""

import dataclasses

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowrank_cache.kernels.packed import (
    LatentSide,
    PackedTier,
    RotaryFrames,
    pack,
    padded_channels,
    quantize,
    read_latents,
)
from lowrank_cache.kernels.reference import latent_attention
from lowrank_cache.kernels.rope import angle_tables

__all__ = [
    "BAND_FACTOR",
    "assert_decodes_like_the_reference",
    "attention_band",
    "make_rope",
    "make_side",
    "make_tiers",
    "on_device",
    "per_batch",
    "with_noise",
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Two maxima over a few hundred errors of equal size differ by less; the band itself is a maximum over few draws.
BAND_FACTOR = 3.0
FLOAT32_ROUNDING, FLOAT16_ROUNDING, BFLOAT16_ROUNDING = 2.0**-24, 2.0**-11, 2.0**-8


def make_tiers(
    channels: dict[int, int],
    batch: int,
    tokens: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float16,
    room: int = 0,
) -> tuple[PackedTier, ...]:
    """Tiers of normal latents, in the order of ``channels`` (by bits); padding in the 16-bit tier is NaN.

    ``room``: unused tokens at the end of every buffer, filled with what must not be read.
    """
    generator = torch.Generator().manual_seed(seed)
    tiers = []
    for bits, count in channels.items():
        latents = torch.randn(batch, tokens, count, generator=generator) * (
            1 + torch.rand(tokens, 1, generator=generator)
        )
        padding = (0, padded_channels(bits, count) - count)
        if bits == 16:
            codes, steps = pad(latents, padding, value=torch.nan).to(dtype), None
        else:
            levels, steps = quantize(latents, bits, torch.ones(count))
            codes = pack(pad(levels, padding), bits)
            steps = pad(steps, (0, room), value=torch.nan)[:, :tokens]
        codes = pad(codes, (0, 0, 0, room), value=torch.nan if bits == 16 else 255)[:, :tokens]
        tiers.append(PackedTier(bits, count, codes, steps))
    return tuple(tiers)


def make_rope(
    batch: int, tokens: int, rotary_dim: int, frame_length: int, layout: str = "half", rows: int | None = None
) -> RotaryFrames:
    """Tables of frames that start at another position in every row of the batch; ``rows=1``: one for all rows."""
    rows = batch if rows is None else rows
    starts = torch.arange(-(-tokens // frame_length)) * frame_length + 7 * torch.arange(rows)[:, None]
    cos, sin = angle_tables(starts, 50.0 ** (-torch.arange(rotary_dim // 2) * 2 / rotary_dim))
    return RotaryFrames(cos, sin, frame_length, layout)


def make_side(
    tiers: tuple[PackedTier, ...],
    heads: int,
    head_dim: int,
    rope: RotaryFrames | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> LatentSide:
    """A side whose states have about unit variance around a constant as large."""
    generator = torch.Generator().manual_seed(seed)
    rank = sum(tier.channels for tier in tiers)
    up_proj = torch.randn(rank, heads, head_dim, generator=generator) / rank**0.5
    return LatentSide(tiers, up_proj.to(dtype), torch.randn(heads, head_dim, generator=generator), rope)


def on_device(thing):
    """Tensors, sides, tiers and frames on the GPU if there is one, with their strides."""
    if isinstance(thing, torch.Tensor):
        if DEVICE == "cpu":
            return thing
        moved = torch.empty_strided(thing.shape, thing.stride(), dtype=thing.dtype, device=DEVICE)
        return moved.copy_(thing)
    if isinstance(thing, tuple):
        return tuple(on_device(part) for part in thing)
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        changes = {field.name: on_device(getattr(thing, field.name)) for field in dataclasses.fields(thing)}
        return dataclasses.replace(thing, **changes)
    return thing


def per_batch(side: LatentSide) -> LatentSide:
    """``side`` with matrices for every batch element, as bases of prompts are."""
    batch = side.tiers[0].codes.shape[0]
    return dataclasses.replace(
        side, up_proj=torch.stack([side.up_proj] * batch), constant=torch.stack([side.constant] * batch)
    )


def with_noise(side: LatentSide, latents: float, tokens: float = 0.0) -> LatentSide:
    """``side`` in float64 with relative Gaussian noise in every latent, and some that all of a token's share."""
    read = read_latents(side.tiers, torch.float64)
    read = read * (1 + latents * torch.randn_like(read) + tokens * torch.randn_like(read[..., :1]))
    tier = PackedTier(16, read.shape[2], read, None)
    return LatentSide((tier,), side.up_proj.double(), side.constant.double(), side.rope)


def attention_band(
    query: Tensor, key: LatentSide, value: LatentSide, **arguments
) -> tuple[Tensor, Tensor, float, float]:
    """The float64 truth of ``latent_attention``, and how far rounding may move outputs and log-sum-exps.

    A kernel in float32 sums products in any order: noise of one rounding in every latent, times the root of the number
    of summands. In half precision it rounds rotated queries, absorbed queries, weights and attended latents once
    each: noise of that size in the query, in every latent, and in all latents of a token.
    """
    rank = max(side.up_proj.shape[0] for side in (key, value))
    size = FLOAT32_ROUNDING * (rank + query.shape[3]) ** 0.5
    if query.dtype != torch.float32:
        bfloat16 = torch.bfloat16 in (key.up_proj.dtype, value.up_proj.dtype)
        size = BFLOAT16_ROUNDING if bfloat16 else FLOAT16_ROUNDING
    truth, truth_lse = latent_attention(query.double(), key, value, **arguments)
    moved, moved_lse = [], []
    for _ in range(4):
        noisy = query.double() * (1 + size * torch.randn(query.shape, dtype=torch.float64))
        output, lse = latent_attention(noisy, with_noise(key, size), with_noise(value, size, size), **arguments)
        moved.append(float((output - truth).abs().max()))
        seen = ~truth_lse.isneginf()
        moved_lse.append(float((lse - truth_lse)[seen].abs().max()) if bool(seen.any()) else 0.0)
    return truth, truth_lse, BAND_FACTOR * max(moved), BAND_FACTOR * max(moved_lse) + FLOAT32_ROUNDING * 16


def assert_decodes_like_the_reference(decode, query: Tensor, key: LatentSide, value: LatentSide, **options) -> None:
    """Fail unless ``decode`` is as near to the float64 truth as the float32 reference, give or take.

    Errors of sums of a thousand products, taken in another order, differ by a small factor; absorbing
    a query moves a rotation and a product to its side and may double them. Below that stands one rounding of
    the largest number.
    """
    truth = latent_attention(query.double(), key, value, **options)
    reference = latent_attention(query, key, value, **options)
    for actual, expected, exact in zip(decode(query, key, value, **options), reference, truth, strict=True):
        assert actual.dtype == torch.float32 and actual.shape == exact.shape
        assert torch.equal(actual.isneginf(), exact.isneginf())
        finite = ~exact.isneginf()
        assert bool(torch.isfinite(actual[finite]).all())
        if not bool(finite.any()):
            continue
        error = float((actual[finite].double() - exact[finite]).abs().max())
        own = float((expected[finite].double() - exact[finite]).abs().max())
        allowed = 8 * own + 16 * 2.0**-24 * float(exact[finite].abs().max())
        assert error <= allowed, f"{error:.3g} from the float64 truth, allowed {allowed:.3g}"
