"""Rotary position embedding as a pure rotation, in both layouts that transformers models use.

This is the only mathematics shared by the reference, the cache and calibration. Rotations here are
orthogonal: scaling factors such as YaRN's stay inside the numbers that are rotated, so rotating by
``-angles`` always undoes rotating by ``angles``. Mathematics: docs/method.md, "Rotary frames".
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

LAYOUTS = ("half", "interleaved")


def angle_tables(positions: Tensor, inv_freq: Tensor, axes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cosine and sine of ``positions * inv_freq``, computed as transformers' rotary modules do.

    Args:
        positions: ``[..., tokens]`` of any dtype; with ``axes`` ``[..., tokens, several]``.
        inv_freq: ``[rotary_dim / 2]`` radians per position.
        axes: ``[rotary_dim / 2]`` long, which of a token's positions turns each pair (M-RoPE); None if it has one.

    Returns:
        Tables ``[..., tokens, rotary_dim / 2]`` in float32 (float64 if ``inv_freq`` is).
    """
    dtype = torch.promote_types(inv_freq.dtype, torch.float32)
    by_pair = positions[..., None] if axes is None else positions[..., axes]
    angles = by_pair.to(dtype) * inv_freq.to(positions.device, dtype)
    return angles.cos(), angles.sin()


def rotate(states: Tensor, cos: Tensor, sin: Tensor, layout: str, *, inverse: bool = False) -> Tensor:
    """Rotate the first ``2 * cos.shape[-1]`` numbers of the last axis; the rest passes through.

    Args:
        states: ``[..., head_dim]``, floating. float32 or wider is expected of callers that rotate
            stored keys: half precision would round twice.
        cos, sin: ``[..., rotary_dim / 2]``, broadcastable against ``states[..., : rotary_dim / 2]``.
        layout: ``"half"`` pairs numbers ``i`` and ``i + rotary_dim / 2`` (Llama), ``"interleaved"``
            pairs ``2 i`` and ``2 i + 1`` (GLM, Cohere).
        inverse: Rotate by the negative angle.

    Returns:
        A new tensor shaped and typed as ``states``.

    Raises:
        ValueError: If ``layout`` is unknown or the head is narrower than the rotation.

    Source: RoFormer (arXiv:2104.09864), equation 15.
    """
    half = cos.shape[-1]
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    if states.shape[-1] < 2 * half:
        raise ValueError(f"states must have at least {2 * half} numbers in the last axis, got {states.shape[-1]}")
    if inverse:
        sin = -sin
    rotated = torch.empty_like(states)
    first, second = pair_views(states, half, layout)
    out_first, out_second = pair_views(rotated, half, layout)
    torch.mul(first, cos, out=out_first).sub_(second * sin)
    torch.mul(second, cos, out=out_second).add_(first * sin)
    rotated[..., 2 * half :] = states[..., 2 * half :]
    return rotated


def pair_views(states: Tensor, half: int, layout: str) -> tuple[Tensor, Tensor]:
    """The first and the second numbers of all pairs that rotate together, ``[..., half]`` each."""
    if layout == "half":
        return states[..., :half], states[..., half : 2 * half]
    return states[..., 0 : 2 * half : 2], states[..., 1 : 2 * half : 2]


def spread_tables(cos: Tensor, sin: Tensor, head_dim: int, layout: str) -> tuple[Tensor, Tensor]:
    """Tables ``c, s`` ``[..., head_dim]`` with ``rotate(x, ..., inverse=True) == x * c + swap_pairs(x) * s``."""
    passed = head_dim - 2 * cos.shape[-1]
    if layout == "half":
        cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([sin, -sin], dim=-1)
    else:
        cos, sin = cos.repeat_interleave(2, dim=-1), torch.stack([sin, -sin], dim=-1).flatten(-2)
    return pad(cos, (0, passed), value=1.0), pad(sin, (0, passed))


def swap_pairs(states: Tensor, rotary_dim: int, layout: str) -> Tensor:
    """``states`` with the two numbers of each rotated pair exchanged."""
    if layout == "half":
        half = rotary_dim // 2
        return torch.cat([states[..., half:rotary_dim], states[..., :half], states[..., rotary_dim:]], dim=-1)
    pairs = states[..., :rotary_dim].unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.cat([pairs, states[..., rotary_dim:]], dim=-1)
