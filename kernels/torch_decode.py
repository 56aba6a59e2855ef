"""Attention over latents in plain torch: the path of CPUs, and of any device without Triton.

Agrees with ``reference.latent_decode``, which rebuilds every key and value; this one does so only where it is
cheaper. With few queries, keys are never rebuilt: the query is rotated into each frame and absorbed into the
up-projection, so a token costs one dot product in latent space, and values are summed as latents. Tokens are
read tile by tile, so nothing grows with the context but the scores. Mathematics: docs/method.md, "Attending
to latents".
"""

from dataclasses import replace

import torch
from torch import Tensor

from lowrank_cache.kernels.packed import LatentSide, PackedTier, RotaryFrames
from lowrank_cache.kernels.reference import merge
from lowrank_cache.kernels.rope import rotate

__all__ = ["latent_decode"]

# Numbers (latents, rebuilt states or scores) in one tile: a few MB, which stays in a core's caches.
_TILE_NUMBERS = 2**22


def latent_decode(
    query: Tensor,
    key: LatentSide,
    value: LatentSide,
    *,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``reference.latent_decode``: same arguments, same results, computed in float32."""
    tile = _tile_tokens(query, key, value)
    parts = []
    for start in range(0, key.tokens, tile):
        stop = min(start + tile, key.tokens)
        visible = None if mask is None else mask[..., start:stop] if mask.shape[-1] > 1 else mask
        parts.append(
            _decode_tile(query, _tokens_of(key, start, stop), _tokens_of(value, start, stop), scaling, visible, softcap)
        )
    return parts[0] if len(parts) == 1 else merge(parts)


def _tile_tokens(query: Tensor, key: LatentSide, value: LatentSide) -> int:
    """Tokens per tile, a whole number of frames."""
    batch, q_heads, q_tokens, _ = query.shape
    widest = max(side.up_proj.shape[0] + side.constant.numel() * _rebuilds(query, side) for side in (key, value))
    tokens = _TILE_NUMBERS // (batch * max(widest, q_heads * q_tokens))
    frame = 1 if key.rope is None else key.rope.frame_length
    return max(frame, 64 // frame * frame, tokens // frame * frame)


def _tokens_of(side: LatentSide, start: int, stop: int) -> LatentSide:
    tiers = tuple(
        replace(tier, codes=tier.codes[:, start:stop], steps=None if tier.steps is None else tier.steps[:, start:stop])
        for tier in side.tiers
    )
    rope = side.rope
    if rope is not None:
        frames = slice(start // rope.frame_length, -(-stop // rope.frame_length))
        rope = replace(rope, cos=rope.cos[:, frames], sin=rope.sin[:, frames])
    return replace(side, tiers=tiers, rope=rope)


def _rebuilds(query: Tensor, side: LatentSide) -> bool:
    """Whether rebuilding states takes fewer multiply-adds a token than staying in latent space."""
    _, q_heads, q_tokens, head_dim = query.shape
    rank, heads, _ = side.up_proj.shape
    rows = q_heads * q_tokens
    frame = 1 if side.rope is None else side.rope.frame_length
    absorbing = 0.0 if side.rope is None else rows * head_dim * rank / frame
    rebuilding = rank * heads * head_dim + rows * head_dim
    return rebuilding < absorbing + rows * rank


def _decode_tile(
    query: Tensor, key: LatentSide, value: LatentSide, scaling: float, mask: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    batch, q_heads, q_tokens, _ = query.shape
    key_latents = _read(key.tiers)
    value_latents = key_latents if value.tiers is key.tiers else _read(value.tiers)
    scores = (_rebuilt_scores if _rebuilds(query, key) else _absorbed_scores)(query.float() * scaling, key, key_latents)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    highest = scores.amax(-1, keepdim=True)
    if mask is not None:
        highest = torch.where(highest.isneginf(), 0.0, highest)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(-1)
    output = (_rebuilt_output if _rebuilds(query, value) else _latent_output)(weights, value, value_latents)
    # A query that sees nothing has total 0: its output is 0 and its log-sum-exp -inf.
    seen = total if mask is None else torch.where(total == 0, 1.0, total)
    return output.div_(seen[..., None]), total.log() + highest[..., 0]


def _read(tiers: tuple[PackedTier, ...]) -> Tensor:
    """``reference.read_latents`` in float32, with one pass over each tier's numbers."""
    batch, tokens, _ = tiers[0].codes.shape
    latents = tiers[0].codes.new_empty(batch, tokens, sum(tier.channels for tier in tiers), dtype=torch.float32)
    start = 0
    for tier in tiers:
        part = latents[..., start : start + tier.channels]
        start += tier.channels
        if tier.steps is None:
            part.copy_(tier.codes[..., : tier.channels])
            continue
        row = tier.codes.shape[2]
        for plane in range(8 // tier.bits):
            here = part[..., plane * row : (plane + 1) * row]
            codes = tier.codes[..., : here.shape[2]]
            if tier.bits < 8:
                codes = (codes >> (plane * tier.bits)) & (2**tier.bits - 1)
            here.copy_(codes)
        steps = tier.steps.float()[..., None]
        torch.addcmul(steps * (0.5 - 2 ** (tier.bits - 1)), part, steps, out=part)
    return latents


def _absorbed_scores(query: Tensor, side: LatentSide, latents: Tensor) -> Tensor:
    """``[batch, q_heads, q_tokens, tokens]`` from scaled queries, without keys."""
    batch, q_heads, q_tokens, head_dim = query.shape
    tokens, (rank, heads, _) = latents.shape[1], side.up_proj.shape
    if side.rope is None:
        frame, rotated = tokens, query[:, :, None]
    else:
        frame = side.rope.frame_length
        rotated = _into_frames(query, side.rope)
    # rows: the query heads of one KV head, and the query tokens of each
    rows = rotated.view(batch, heads, q_heads // heads, -1, q_tokens, head_dim)
    frames = rows.shape[3]
    rows = rows.permute(1, 0, 3, 2, 4, 5).reshape(heads, -1, head_dim)
    absorbed = torch.bmm(rows, side.up_proj.float().permute(1, 2, 0))
    absorbed = absorbed.view(heads, batch * frames, -1, rank).transpose(0, 1).reshape(batch * frames, -1, rank)
    mean = torch.bmm(rows, side.constant[..., None]).view(heads, batch * frames, -1).transpose(0, 1)
    missing = frames * frame - tokens  # the last frame may be shorter
    if missing:
        latents = torch.nn.functional.pad(latents, (0, 0, 0, missing))
    framed = latents.view(batch * frames, frame, rank)
    scores = torch.baddbmm(mean.reshape(batch * frames, -1, 1), absorbed, framed.transpose(1, 2))
    scores = scores.view(batch, frames, q_heads, q_tokens, frame).permute(0, 2, 3, 1, 4)
    return scores.reshape(batch, q_heads, q_tokens, -1)[..., :tokens].contiguous()


def _into_frames(query: Tensor, rope: RotaryFrames) -> Tensor:
    """``R(-m) query`` for each frame's first position ``m``: ``[batch, q_heads, frames, q_tokens, head_dim]``."""
    batch, q_heads, q_tokens, head_dim = query.shape
    frames = rope.cos.shape[1]
    spread = query[:, :, None].expand(batch, q_heads, frames, q_tokens, head_dim)
    return rotate(spread, rope.cos[:, None, :, None], rope.sin[:, None, :, None], rope.layout, inverse=True)


def _rebuilt_scores(query: Tensor, side: LatentSide, latents: Tensor) -> Tensor:
    """``[batch, q_heads, q_tokens, tokens]`` from scaled queries and rebuilt keys."""
    batch, q_heads, q_tokens, head_dim = query.shape
    keys = _rebuilt(side, latents)
    if side.rope is not None:
        cos, sin = side.rope.cos, side.rope.sin
        if side.rope.frame_length > 1:
            cos, sin = (table.repeat_interleave(side.rope.frame_length, 1)[:, : keys.shape[2]] for table in (cos, sin))
        keys = rotate(keys, cos[:, None], sin[:, None], side.rope.layout)
    rows = query.reshape(batch, keys.shape[1], -1, head_dim)
    return torch.matmul(rows, keys.transpose(2, 3)).view(batch, q_heads, q_tokens, -1)


def _rebuilt(side: LatentSide, latents: Tensor) -> Tensor:
    """``[batch, heads, tokens, head_dim]``, keys still in their frames."""
    rank, heads, head_dim = side.up_proj.shape
    states = torch.matmul(latents, side.up_proj.float().reshape(rank, -1)) + side.constant.flatten()
    return states.unflatten(2, (heads, head_dim)).transpose(1, 2)


def _latent_output(weights: Tensor, side: LatentSide, latents: Tensor) -> Tensor:
    """``weights @ values``: summed as latents, then up-projected once."""
    batch, q_heads, q_tokens, tokens = weights.shape
    rank, heads, head_dim = side.up_proj.shape
    summed = torch.bmm(weights.view(batch, -1, tokens), latents)
    rows = summed.view(batch, heads, -1, rank)
    output = torch.matmul(rows, side.up_proj.float().transpose(0, 1))
    output += side.constant[:, None] * weights.sum(-1).view(batch, heads, -1, 1)
    return output.view(batch, q_heads, q_tokens, head_dim)


def _rebuilt_output(weights: Tensor, side: LatentSide, latents: Tensor) -> Tensor:
    batch, q_heads, q_tokens, tokens = weights.shape
    values = _rebuilt(side, latents)
    output = torch.matmul(weights.view(batch, values.shape[1], -1, tokens), values)
    return output.view(batch, q_heads, q_tokens, -1)
