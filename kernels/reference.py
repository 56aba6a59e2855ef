"""The specification of the three operations over packed latents, in plain torch and any floating dtype.

Nothing here is fast, and nothing that is fast imports it: an implementation is right when it agrees with this file. It
is run by tests and where ``impl="reference"`` asks for it. The stored format itself is in ``packed``. Mathematics:
docs/method.md, "The quantizer" and "Attending to latents".
"""

import torch
from torch import Tensor

from lowrank_cache.kernels.packed import LatentSide, PackedTier, RotaryFrames, pack_latents
from lowrank_cache.kernels.rope import rotate
from lowrank_cache.kernels.segments import attend


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

    Everything before the codes is computed in float32.

    Args:
        states: By member ``[batch, heads, tokens, head_dim]``, post-RoPE; heads and head_dim may differ.
        constants: By member ``[heads, head_dim]`` or ``[batch, heads, head_dim]`` float32.
        frames: By member; its first frame starts at the first token. None: not rotated.
        down_proj: ``[width, rank]`` or ``[batch, width, rank]``, ``width`` the heads of all members side by side.
        tiers, weight, latent_dtype: See ``packed.pack_latents``.

    Returns:
        One ``PackedTier`` for each of ``tiers``, padded to ``packed.ROW_BYTES``, on the device of ``down_proj``.

    Raises:
        ValueError: If a latent is not finite.
    """
    parts = []
    for member, constant, rope in zip(states, constants, frames, strict=True):
        member = _rotated(member.to(down_proj.device, torch.float32), rope, inverse=True)
        parts.append((member - constant[..., :, None, :]).transpose(1, 2).flatten(2))
    latents = torch.matmul(torch.cat(parts, dim=2), down_proj.float())
    return pack_latents(latents, tiers, weight, latent_dtype)


def _rotated(states: Tensor, rope: RotaryFrames | None, *, inverse: bool = False) -> Tensor:
    """``[batch, heads, tokens, head_dim]``: every token of a frame is rotated alike."""
    if rope is None:
        return states
    cos, sin = (table.to(states.dtype).repeat_interleave(rope.frame_length, dim=1) for table in (rope.cos, rope.sin))
    tokens = states.shape[2]
    return rotate(states, cos[:, None, :tokens], sin[:, None, :tokens], rope.layout, inverse=inverse)


def reconstruct(side: LatentSide, dtype: torch.dtype = torch.float32) -> Tensor:
    """States of one layer and side, post-RoPE: ``[batch, heads, tokens, head_dim]`` in ``dtype``.

    Products and rotations are computed in ``dtype``: float64 gives the truth that implementations are held against.
    """
    latents = side.read(dtype)
    heads, head_dim = side.up_proj.shape[-2:]
    states = torch.matmul(latents, side.up_proj.to(dtype).flatten(-2)).unflatten(2, (heads, head_dim))
    return _rotated(states.transpose(1, 2) + side.constant.to(dtype)[..., :, None, :], side.rope)


def latent_attention(
    query: Tensor,
    key: LatentSide,
    value: LatentSide,
    *,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``segments.attend`` over tokens that exist only as latents.

    Every query stands after every one of these tokens, so causality needs no mask. Arguments and results are those
    of ``attend``, with ``query`` post-RoPE and each side's heads those of ``up_proj``.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    keys, values = reconstruct(key, wide), reconstruct(value, wide)
    return attend(query, keys, values, scaling=scaling, mask=mask, softcap=softcap)
