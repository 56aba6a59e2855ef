"""Encode states to packed latents, read them back and attend over them: eager torch, any device, no optional imports.

This file is the specification: a kernel is right when it agrees with it. A token's latent is a row
of channels sorted into tiers by bit width. The 16-bit tier is stored in a floating dtype; the 8, 4
and 2-bit tiers hold symmetric mid-rise levels packed into bytes, with one float16 step per token
and tier. Mathematics: docs/method.md, "The quantizer" and "Attending to latents".
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowrank_cache.kernels.packed import LatentSide, PackedTier, RotaryFrames, padded_channels
from lowrank_cache.kernels.rope import rotate

__all__ = [
    "QUANTIZED_BITS",
    "attend",
    "dequantize",
    "encode",
    "latent_decode",
    "merge",
    "pack",
    "quantize",
    "read_latents",
    "reconstruct",
    "softmax",
    "unpack",
]

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


def read_latents(tiers: tuple[PackedTier, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Unpack and dequantize all tiers: ``[batch, tokens, rank]`` in ``dtype``."""
    parts = []
    for tier in tiers:
        if tier.steps is None:
            parts.append(tier.codes[..., : tier.channels].to(dtype))
        else:
            codes = unpack(tier.codes, tier.bits)[..., : tier.channels]
            parts.append(dequantize(codes, tier.steps, tier.bits, dtype))
    return torch.cat(parts, dim=-1)


def encode(
    states: list[Tensor],
    constants: list[Tensor],
    frames: list[RotaryFrames | None],
    down_proj: Tensor,
    tiers: tuple[tuple[int, int], ...],
    weight: Tensor,
    latent_dtype: torch.dtype,
) -> tuple[PackedTier, ...]:
    """Latents of states that share one: rotated into their frames, centred, projected, quantized and packed.

    Everything before the codes is computed in float32. A 16-bit tier is cut off at the largest number of its dtype.

    Args:
        states: By member ``[batch, heads, tokens, head_dim]``, post-RoPE; heads and head_dim may differ.
        constants: By member ``[heads, head_dim]`` float32.
        frames: By member; its first frame starts at the first token. None: not rotated.
        down_proj: ``[width, rank]``, ``width`` the heads of all members side by side.
        tiers: ``(bits, channels)`` in the order of the channels, each width once.
        weight: ``[rank]`` float32: what a squared error in each channel costs.
        latent_dtype: Floating dtype of a 16-bit tier.

    Returns:
        One ``PackedTier`` for each of ``tiers``, rows padded to ``packed.ROW_BYTES``.

    Raises:
        ValueError: If a latent is not finite.
    """
    rows = []
    for member, constant, rope in zip(states, constants, frames, strict=True):
        member = member.float()
        if rope is not None:
            cos, sin = _token_tables(rope, member.shape[2], torch.float32)
            member = rotate(member, cos, sin, rope.layout, inverse=True)
        rows.append((member - constant[:, None]).transpose(1, 2).flatten(2))
    latents = torch.matmul(torch.cat(rows, dim=2), down_proj.float())
    if not bool(torch.isfinite(latents).all()):
        raise ValueError("states must be finite, got NaN or infinity: the forward overflowed")
    packed, start = [], 0
    for bits, channels in tiers:
        tier = latents[..., start : start + channels]
        padding = (0, padded_channels(bits, channels) - channels)
        if bits == 16:
            limit = min(torch.finfo(latent_dtype).max, torch.finfo(tier.dtype).max)
            packed.append(PackedTier(bits, channels, pad(tier.clamp(-limit, limit).to(latent_dtype), padding), None))
        else:
            levels, steps = quantize(tier, bits, weight[start : start + channels])
            packed.append(PackedTier(bits, channels, pack(pad(levels, padding), bits), steps))
        start += channels
    return tuple(packed)


def _token_tables(rope: RotaryFrames, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``[1 or batch, 1, tokens, rotary_dim / 2]``: every token of a frame is rotated alike."""
    cos, sin = (
        table.to(dtype).repeat_interleave(rope.frame_length, dim=1)[:, None, :tokens] for table in (rope.cos, rope.sin)
    )
    return cos, sin


def reconstruct(side: LatentSide, dtype: torch.dtype = torch.float32) -> Tensor:
    """States of one layer and side, post-RoPE: ``[batch, heads, tokens, head_dim]`` in ``dtype``.

    Products and rotations are computed in ``dtype``: float64 gives the truth that kernels are held against.
    """
    latents = read_latents(side.tiers, dtype)
    rank, heads, head_dim = side.up_proj.shape
    states = torch.matmul(latents, side.up_proj.to(dtype).reshape(rank, -1)).unflatten(2, (heads, head_dim))
    states = states.transpose(1, 2) + side.constant.to(dtype)[:, None]
    if side.rope is None:
        return states
    cos, sin = _token_tables(side.rope, latents.shape[1], dtype)
    return rotate(states, cos, sin, side.rope.layout)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over one segment of the tokens, and what ``merge`` needs to join it with others.

    Args:
        query: ``[batch, q_heads, q_tokens, head_dim]``, post-RoPE.
        keys: ``[batch, heads, tokens, head_dim]``, dtype of ``query``; each serves ``q_heads / heads`` adjacent
            query heads.
        values: ``[batch, heads, tokens, value_dim]``.
        scaling: Factor of the scores.
        mask: bool, broadcastable to ``[batch, 1, q_tokens, tokens]``; True where a query sees a token.
        softcap: ``s`` becomes ``softcap · tanh(s / softcap)`` (Gemma 2).

    Returns:
        Output ``[batch, q_heads, q_tokens, value_dim]`` and log-sum-exp of the scores
        ``[batch, q_heads, q_tokens]``, in the dtype of ``query`` but at least float32. A query that sees no token
        has output 0 and log-sum-exp -inf.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    batch, q_heads, q_tokens, head_dim = query.shape
    heads = keys.shape[1]
    # Query heads of one KV head side by side: no key is repeated.
    rows = query.to(wide).reshape(batch, heads, -1, head_dim)
    scores = (torch.matmul(rows, keys.to(wide).transpose(2, 3)) * scaling).view(batch, q_heads, q_tokens, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights, lse = softmax(scores, mask)
    output = torch.matmul(weights.view(batch, heads, rows.shape[2], -1), values.to(wide))
    return output.view(batch, q_heads, q_tokens, -1), lse


def softmax(scores: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Softmax over the last axis, zeros where a query sees nothing, and its log-sum-exp (-inf there).

    ``mask`` is as ``attend`` describes it.
    """
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = torch.softmax(scores, dim=-1)
    if mask is not None:
        weights = weights.nan_to_num_(nan=0.0)
    # The highest score's weight is 1 / sum(exp(scores - highest)).
    lse = scores.amax(-1) - weights.amax(-1).log_()
    return weights, lse if mask is None else lse.nan_to_num_(nan=-torch.inf, posinf=-torch.inf)


def latent_decode(
    query: Tensor,
    key: LatentSide,
    value: LatentSide,
    *,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``attend`` over tokens that exist only as latents.

    Every query stands after every one of these tokens, so causality needs no mask. Arguments and results are those
    of ``attend``, with ``query`` post-RoPE and each side's heads those of ``up_proj``.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    keys, values = reconstruct(key, wide), reconstruct(value, wide)
    return attend(query, keys, values, scaling=scaling, mask=mask, softcap=softcap)


def merge(segments: list[tuple[Tensor, Tensor]], sink_logits: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Join the results of ``attend`` over disjoint segments into attention over all of their tokens.

    Args:
        segments: Outputs ``[batch, q_heads, q_tokens, value_dim]`` and log-sum-exps ``[batch, q_heads, q_tokens]``.
        sink_logits: ``[q_heads]``, learned scores of a token without a value (gpt-oss).

    Returns:
        Output and log-sum-exp over all segments, shaped alike. A query that sees nothing has output 0.
    """
    output, total = segments[0]
    for part, lse in segments[1:]:
        joint = torch.logaddexp(total, lse)
        output = torch.lerp(output, part, _share(lse, joint)[..., None])
        total = joint
    if sink_logits is not None:
        joint = torch.logaddexp(total, sink_logits.to(total)[:, None])
        output = output * _share(total, joint)[..., None]
        total = joint
    return output, total


def _share(lse: Tensor, joint: Tensor) -> Tensor:
    """``exp(lse) / exp(joint)``; 0 where both are -inf."""
    return (lse - joint).exp_().nan_to_num_(nan=0.0)
