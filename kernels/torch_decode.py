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
    key_codes = _unpacked(key.tiers)
    value_codes = key_codes if value.tiers is key.tiers else _unpacked(value.tiers)
    scores = (_rebuilt_scores if _rebuilds(query, key) else _absorbed_scores)(query.float() * scaling, key, key_codes)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    highest = scores.amax(-1, keepdim=True)
    if mask is not None:
        highest = torch.where(highest.isneginf(), 0.0, highest)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(-1, keepdim=True)
    output = (_rebuilt_output if _rebuilds(query, value) else _latent_output)(weights, total, value, value_codes)
    # A query that sees nothing has total 0: its output is 0 and its log-sum-exp -inf.
    seen = total if mask is None else torch.where(total == 0, 1.0, total)
    return output.div_(seen), total.log_().add_(highest)[..., 0]


def _unpacked(tiers: tuple[PackedTier, ...]) -> list[Tensor]:
    """Levels of each tier as float32, ``[batch, tokens, channels]``: not yet centred, not yet times the step."""
    planes = []
    for tier in tiers:
        mask = 2**tier.bits - 1
        for shift in range(0, 8 if tier.bits < 8 else 0, tier.bits):
            # Contiguous planes: writing them side by side at once would take several times as long.
            shifted = tier.codes >> shift if shift else tier.codes
            planes.append(shifted & mask if shift + tier.bits < 8 else shifted)
    floats = torch.cat(planes, dim=2).float() if planes else None
    levels, start = [], 0
    for tier in tiers:
        if tier.bits >= 8 or floats is None:
            levels.append(tier.codes[..., : tier.channels].float())
            continue
        levels.append(floats[..., start : start + tier.channels])
        start += tier.codes.shape[2] * 8 // tier.bits
    return levels


def _centre(tier: PackedTier) -> float:
    """The level that stands for zero."""
    return 2 ** (tier.bits - 1) - 0.5


def _latents(tiers: tuple[PackedTier, ...], codes: list[Tensor]) -> Tensor:
    """``reference.read_latents`` of tiers already unpacked."""
    parts = [
        part if tier.steps is None else (part - _centre(tier)) * tier.steps.float()[..., None]
        for tier, part in zip(tiers, codes, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _absorbed_scores(query: Tensor, side: LatentSide, codes: list[Tensor]) -> Tensor:
    """``[batch, q_heads, q_tokens, tokens]`` from scaled queries, without keys.

    A tier's step is one number a token, so it multiplies the finished dot products and not the latents.
    """
    batch, q_heads, q_tokens, _ = query.shape
    tokens, heads = codes[0].shape[1], side.up_proj.shape[1]
    frame = tokens if side.rope is None else side.rope.frame_length
    rotated = query[:, :, None] if side.rope is None else _into_frames(query, side.rope)
    frames = rotated.shape[2]
    # rows of one KV head: batch, frames, its query heads, query tokens
    rows = rotated.unflatten(1, (heads, -1)).permute(1, 0, 3, 2, 4, 5).flatten(1, 4)
    absorbed = torch.bmm(rows, side.up_proj.float().permute(1, 2, 0))  # [heads, rows, rank]
    mean = torch.bmm(rows, side.constant[..., None])
    # [batch · frames, q_heads · q_tokens, rank]
    absorbed, mean = (
        part.unflatten(1, (batch * frames, -1)).transpose(0, 1).flatten(1, 2) for part in (absorbed, mean)
    )
    missing = frames * frame - tokens  # the last frame may be shorter
    scores = mean
    start = 0
    for tier, part in zip(side.tiers, codes, strict=True):
        weights = absorbed[..., start : start + tier.channels]
        start += tier.channels
        framed = _framed(part, batch * frames, missing)
        if tier.steps is None:
            scores = torch.baddbmm(scores, weights, framed.transpose(1, 2))
            continue
        offset = weights.sum(-1, keepdim=True).mul_(-_centre(tier))
        steps = _framed(tier.steps.float()[..., None], batch * frames, missing).transpose(1, 2)
        scores = torch.addcmul(scores, torch.baddbmm(offset, weights, framed.transpose(1, 2)), steps)
    scores = scores.view(batch, frames, q_heads, q_tokens, frame).permute(0, 2, 3, 1, 4).flatten(3)
    return scores[..., :tokens].contiguous() if missing else scores.contiguous()


def _framed(rows: Tensor, frames: int, missing: int) -> Tensor:
    """``[batch, tokens, n]`` cut into ``[batch · frames, frame, n]``, zeros for what is ``missing`` at the end."""
    if missing:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, missing))
    return rows.reshape(frames, -1, rows.shape[2])


def _into_frames(query: Tensor, rope: RotaryFrames) -> Tensor:
    """``R(-m) query`` for each frame's first position ``m``: ``[batch, q_heads, frames, q_tokens, head_dim]``."""
    spread = query[:, :, None].expand(-1, -1, rope.cos.shape[1], -1, -1)
    return rotate(spread, rope.cos[:, None, :, None], rope.sin[:, None, :, None], rope.layout, inverse=True)


def _rebuilt_scores(query: Tensor, side: LatentSide, codes: list[Tensor]) -> Tensor:
    """``[batch, q_heads, q_tokens, tokens]`` from scaled queries and rebuilt keys."""
    batch, q_heads, q_tokens, head_dim = query.shape
    keys = _rebuilt(side, codes)
    if side.rope is not None:
        cos, sin = side.rope.cos, side.rope.sin
        if side.rope.frame_length > 1:
            cos, sin = (table.repeat_interleave(side.rope.frame_length, 1)[:, : keys.shape[2]] for table in (cos, sin))
        keys = rotate(keys, cos[:, None], sin[:, None], side.rope.layout)
    rows = query.reshape(batch, keys.shape[1], -1, head_dim)
    return torch.matmul(rows, keys.transpose(2, 3)).view(batch, q_heads, q_tokens, -1)


def _rebuilt(side: LatentSide, codes: list[Tensor]) -> Tensor:
    """``[batch, heads, tokens, head_dim]``, keys still in their frames."""
    rank, heads, head_dim = side.up_proj.shape
    states = torch.matmul(_latents(side.tiers, codes), side.up_proj.float().reshape(rank, -1)) + side.constant.flatten()
    return states.unflatten(2, (heads, head_dim)).transpose(1, 2)


def _latent_output(weights: Tensor, total: Tensor, side: LatentSide, codes: list[Tensor]) -> Tensor:
    """``weights @ values``: summed as latents, then up-projected once."""
    batch, q_heads, q_tokens, tokens = weights.shape
    rank, heads, head_dim = side.up_proj.shape
    flat = weights.view(batch, -1, tokens)
    parts = []
    for tier, part in zip(side.tiers, codes, strict=True):
        if tier.steps is None:
            parts.append(torch.bmm(flat, part))
            continue
        stepped = flat * tier.steps.float()[:, None]
        parts.append(torch.baddbmm(stepped.sum(-1, keepdim=True).mul_(-_centre(tier)), stepped, part))
    summed = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    rows = summed.view(batch, heads, -1, rank)
    output = torch.matmul(rows, side.up_proj.float().transpose(0, 1))
    output = torch.addcmul(output, total.view(batch, heads, -1, 1), side.constant[:, None])
    return output.view(batch, q_heads, q_tokens, head_dim)


def _rebuilt_output(weights: Tensor, total: Tensor, side: LatentSide, codes: list[Tensor]) -> Tensor:
    batch, q_heads, q_tokens, tokens = weights.shape
    values = _rebuilt(side, codes)
    output = torch.matmul(weights.view(batch, values.shape[1], -1, tokens), values)
    return output.view(batch, q_heads, q_tokens, -1)
