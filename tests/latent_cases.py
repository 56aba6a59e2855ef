"""Random packed latents for tests of the kernels, and the tolerance they are held to."""

import torch
from torch import Tensor

from lowrank_cache.budget import padded_channels
from lowrank_cache.kernels.packed import LatentSide, PackedTier, RotaryFrames
from lowrank_cache.kernels.reference import latent_decode, pack, quantize
from lowrank_cache.kernels.rope import angle_tables

__all__ = ["assert_decodes_like_the_reference", "make_frames", "make_side", "make_tiers"]


def make_tiers(batch: int, tokens: int, channels: dict[int, int], room: int = 5) -> tuple[PackedTier, ...]:
    """Tiers ``{bits: channels}`` as views of a buffer with ``room`` unused tokens, as a growing cache holds them."""
    tiers = []
    for bits, count in channels.items():
        latents = torch.randn(batch, tokens + room, count)
        padding = (0, padded_channels(bits, count) - count)
        if bits == 16:
            codes = torch.nn.functional.pad(latents, padding).half()
            tiers.append(PackedTier(bits, count, codes[:, :tokens], None))
            continue
        levels, steps = quantize(latents, bits, torch.ones(count))
        codes = pack(torch.nn.functional.pad(levels, padding), bits)
        tiers.append(PackedTier(bits, count, codes[:, :tokens], steps[:, :tokens]))
    return tuple(tiers)


def make_frames(rows: int, tokens: int, frame_length: int, rotary_dim: int, layout: str) -> RotaryFrames:
    """Tables of ``rows`` rows (1: shared by the batch) whose positions start at different numbers."""
    positions = torch.arange(0, tokens, frame_length)[None] + 11 * torch.arange(rows)[:, None] - 1
    inv_freq = 100.0 ** (-torch.arange(rotary_dim // 2) / (rotary_dim // 2))
    return RotaryFrames(*angle_tables(positions, inv_freq), frame_length, layout)


def make_side(
    tiers: tuple[PackedTier, ...], heads: int, head_dim: int, rope: RotaryFrames | None = None, dtype=torch.float16
) -> LatentSide:
    """States of about unit variance."""
    rank = sum(tier.channels for tier in tiers)
    up_proj = (torch.randn(rank, heads, head_dim) / rank**0.5).to(dtype)
    return LatentSide(tiers, up_proj, 0.5 * torch.randn(heads, head_dim), rope)


def assert_decodes_like_the_reference(decode, query: Tensor, key: LatentSide, value: LatentSide, **options) -> None:
    """Fail unless ``decode`` is as near to the float64 truth as the float32 reference, give or take.

    Errors of sums of a thousand products, taken in another order, differ by a small factor; absorbing
    a query moves a rotation and a product to its side and may double them. Below that stands one rounding of
    the largest number.
    """
    truth = latent_decode(query.double(), key, value, **options)
    reference = latent_decode(query, key, value, **options)
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
