"""Encode states to packed latents and read them back: eager torch, any device, no optional imports.

This file is the specification: a kernel is right when it agrees with it. A token's latent is a row
of channels sorted into tiers by bit width. The 16-bit tier is stored in a floating dtype; the 8, 4
and 2-bit tiers hold symmetric mid-rise levels packed into bytes, with one float16 step per token
and tier. Mathematics: docs/method.md, "The quantizer".
"""

import torch
from torch import Tensor

__all__ = ["QUANTIZED_BITS", "dequantize", "pack", "quantize", "unpack"]

QUANTIZED_BITS = (8, 4, 2)

# Trial steps as fractions of the step at which nothing is clipped: coarse tiers gain from clipping.
_STEP_FRACTIONS = {8: (1.0,), 4: (0.6, 0.7, 0.8, 0.9, 1.0), 2: (0.45, 0.55, 0.65, 0.75, 0.85, 1.0)}


def quantize(latents: Tensor, bits: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each token's channels with one step, chosen to minimise the weighted squared error.

    Level ``q`` in ``[0, 2**bits)`` stands for ``(q - 2**(bits-1) + 0.5) * step`` (mid-rise: zero is
    not a level, so two bits give four useful ones).

    Args:
        latents: ``[batch, tokens, channels]``, float32, finite, about unit variance per channel.
        bits: 8, 4 or 2.
        weight: ``[channels]``, float32, non-negative: what a squared error in each channel costs.

    Returns:
        ``codes``: ``[batch, tokens, channels]`` uint8, and ``steps``: ``[batch, tokens]`` float16.

    Raises:
        ValueError: If ``bits`` is not a quantized width.
    """
    if bits not in QUANTIZED_BITS:
        raise ValueError(f"bits must be one of {QUANTIZED_BITS}, got {bits}")
    half_levels = 2 ** (bits - 1)
    weight = weight / weight.amax(-1, keepdim=True).clamp(min=1e-30)  # only ratios matter; tiny ones would underflow
    # A step below float16's smallest normal number would round to zero and make every level zero.
    unclipped = (latents.abs().amax(-1) / half_levels).clamp_(min=2**-14)
    best_steps, best_error = unclipped, torch.full_like(unclipped, torch.inf)
    for fraction in _STEP_FRACTIONS[bits]:
        steps = unclipped * fraction
        levels = _nearest_level(latents, steps, half_levels)
        if len(_STEP_FRACTIONS[bits]) == 1:
            best_steps = steps
            break
        # The least-squares step for these levels, then the error with it.
        weighted = levels * weight
        fitted = (weighted * latents).sum(-1) / (weighted * levels).sum(-1).clamp_(min=1e-12)
        fitted = fitted.clamp_(min=2**-14)
        error = ((levels * fitted[..., None] - latents).square_() * weight).sum(-1)
        better = error < best_error
        best_steps = torch.where(better, fitted, best_steps)
        best_error = torch.where(better, error, best_error)
    stored_steps = best_steps.clamp(max=torch.finfo(torch.float16).max).to(torch.float16)
    levels = _nearest_level(latents, stored_steps.float(), half_levels)
    return (levels + (half_levels - 0.5)).to(torch.uint8), stored_steps


def _nearest_level(latents: Tensor, steps: Tensor, half_levels: int) -> Tensor:
    levels = torch.floor_(latents / steps[..., None]).add_(0.5)
    return levels.clamp_(min=0.5 - half_levels, max=half_levels - 0.5)


def dequantize(codes: Tensor, steps: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values that ``quantize`` stored: ``[batch, tokens, channels]`` in ``dtype``."""
    offset = 2 ** (bits - 1) - 0.5
    return codes.to(dtype).sub_(offset).mul_(steps[..., None].to(dtype))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack ``bits``-wide codes into bytes, planar within a row.

    Byte ``j`` of a row of ``n`` bytes holds channels ``j, j + n, j + 2n, ...`` from its lowest bits
    up, so that unpacking is one shift and mask per plane and each plane is contiguous.

    Args:
        codes: ``[..., channels]`` uint8, each below ``2**bits``; ``channels`` divisible by ``8/bits``.
        bits: 8, 4 or 2.

    Returns:
        ``[..., channels * bits / 8]`` uint8.
    """
    planes = 8 // bits
    if planes == 1:
        return codes
    codes = codes.unflatten(-1, (planes, -1))
    packed = codes[..., 0, :].clone()
    for plane in range(1, planes):
        packed |= codes[..., plane, :] << (plane * bits)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Undo ``pack``: ``[..., bytes]`` uint8 → ``[..., bytes * 8 / bits]`` uint8."""
    planes = 8 // bits
    if planes == 1:
        return packed
    mask = 2**bits - 1
    return torch.cat([(packed >> (plane * bits)) & mask for plane in range(planes)], dim=-1)
