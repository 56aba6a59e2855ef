"""Attention over sinks, latents and tail in float64, and how far the integer formulation's roundings may move it.

Written from docs/method.md, "Integer attention on CPUs", and not from the code: queries are rotated into every frame
and absorbed, weights are taken tile by tile. Each rounding is uniform noise of one unit.
"""

import torch
from torch import Tensor

from lowrank_cache.kernels.packed import LatentSide, StoredSide, dequantize, unpack
from lowrank_cache.kernels.rope import rotate
from tests.oracle.latent_sides import BAND_FACTOR, FLOAT32_ROUNDING

__all__ = ["attention_in_float64", "integer_band"]

QUERY_LEVELS, MATRIX_LEVELS = 2047, 4095
SCORE_LEVELS = {8: 127 * 128 - 64, 4: 127, 2: 127}
WEIGHT_LEVELS = {8: 65535, 4: 255, 2: 255}
TILE = 256


def attention_in_float64(
    query: Tensor, key: StoredSide, value: StoredSide, *, scaling: float, masks=(None, None, None),
    softcap: float | None = None, sink_logits: Tensor | None = None, noise: bool = False,
) -> Tensor:  # fmt: skip
    """``[batch, q_heads, q_tokens, value_dim]``; arguments as of ``kernels.api.attend_stored``."""
    query = query.double() * scaling
    batch, q_heads, q_tokens, _ = query.shape
    parts = [_by_query_heads(side, q_heads) for side in (key.sinks, key.tail)]
    scores = [torch.einsum("bhqd,bhtd->bhqt", query, part) for part in parts]
    if key.latents is not None:
        scores.insert(1, _latent_scores(query, key.latents, noise))
    seen = masks if key.latents is not None else (masks[0], masks[2])
    for number, mask in enumerate(seen):
        if softcap is not None:
            scores[number] = softcap * torch.tanh(scores[number] / softcap)
        if mask is not None:
            scores[number] = scores[number].masked_fill(~mask, -torch.inf)
    if sink_logits is not None:
        scores.append(sink_logits.double()[None, :, None, None].expand(batch, q_heads, q_tokens, 1))
    weights = torch.nan_to_num(torch.softmax(torch.cat(scores, dim=3), dim=3))
    weights = weights.split([one.shape[3] for one in scores], dim=3)
    values = [_by_query_heads(side, q_heads) for side in (value.sinks, value.tail)]
    output = torch.einsum("bhqt,bhtd->bhqd", weights[0], values[0])
    if value.latents is not None:
        output = output + _latent_values(weights[1], value.latents, key.latents, noise)
    return output + torch.einsum("bhqt,bhtd->bhqd", weights[1 if key.latents is None else 2], values[1])


def _by_query_heads(states: Tensor, q_heads: int) -> Tensor:
    return states.double().repeat_interleave(q_heads // states.shape[1], dim=1)


def _levels(side: LatentSide) -> list[Tensor]:
    """By tier ``[batch, tokens, channels]``: what codes stand for, without the step."""
    ones = [torch.ones_like(tier.steps) for tier in side.tiers]
    return [
        dequantize(unpack(tier.codes, tier.bits), one, tier.bits, torch.float64)[..., : tier.channels]
        for tier, one in zip(side.tiers, ones, strict=True)
    ]


def _rounded(exact: Tensor, levels: int, dim: int, noise: bool) -> Tensor:
    """``exact``, or with what rounding to ``levels`` of the largest along ``dim`` may add."""
    if not noise:
        return exact
    unit = exact.abs().amax(dim, keepdim=True) / levels
    return exact + unit * (torch.rand(exact.shape, dtype=torch.float64) - 0.5)


def _latent_scores(query: Tensor, side: LatentSide, noise: bool) -> Tensor:
    batch, q_heads, q_tokens, head_dim = query.shape
    tokens = side.tokens
    frame = tokens if side.rope is None else side.rope.frame_length
    turned = query[:, None]
    if side.rope is not None:
        cos, sin = (table.double()[:, :, None, None] for table in (side.rope.cos, side.rope.sin))
        turned = rotate(turned.expand(batch, cos.shape[1], -1, -1, -1), cos, sin, side.rope.layout, inverse=True)
    heads = side.up_proj.shape[1]
    up_proj = _rounded(side.up_proj.double(), MATRIX_LEVELS, 2, noise).repeat_interleave(q_heads // heads, dim=1)
    absorbed = torch.einsum("bfhqd,chd->bfhqc", _rounded(turned, QUERY_LEVELS, 4, noise), up_proj)
    constant = side.constant.double().repeat_interleave(q_heads // heads, dim=0)
    by_frame = torch.einsum("bfhqd,hd->bfhq", turned, constant)
    frames = torch.arange(tokens) // frame
    scores = by_frame[:, frames].permute(0, 2, 3, 1)
    for tier, levels, part in zip(
        side.tiers, _levels(side), absorbed.split([tier.channels for tier in side.tiers], dim=4), strict=True
    ):
        part = _rounded(part, SCORE_LEVELS[tier.bits], 4, noise)[:, frames]
        scores = scores + torch.einsum("bthqc,btc->bhqt", part, levels * tier.steps.double()[..., None])
    return scores


def _latent_values(weights: Tensor, side: LatentSide, key: LatentSide, noise: bool) -> Tensor:
    frame = TILE if key.rope is None else key.rope.frame_length
    tile = TILE if frame >= TILE else TILE // frame * frame
    latents = []
    for tier, levels in zip(side.tiers, _levels(side), strict=True):
        stepped = weights * tier.steps.double()[:, None, None]
        tiles = [_rounded(part, WEIGHT_LEVELS[tier.bits], 3, noise) for part in stepped.split(tile, dim=3)]
        latents.append(torch.einsum("bhqt,btc->bhqc", torch.cat(tiles, dim=3), levels))
    group = weights.shape[1] // side.up_proj.shape[1]
    up_proj = side.up_proj.double().repeat_interleave(group, dim=1)
    constant = side.constant.double().repeat_interleave(group, dim=0)
    mean = weights.sum(3, keepdim=True) * constant[None, :, None]
    return torch.einsum("bhqc,chd->bhqd", torch.cat(latents, dim=3), up_proj) + mean


def integer_band(query: Tensor, key: StoredSide, value: StoredSide, **options) -> tuple[Tensor, float]:
    """The float64 truth of ``attend_stored``, and how far an output of the dtype of ``query`` may be from it."""
    truth = attention_in_float64(query, key, value, **options)
    moved = [
        float((attention_in_float64(query, key, value, noise=True, **options) - truth).abs().max()) for _ in range(4)
    ]
    sums = 16 * FLOAT32_ROUNDING * (1 + float(truth.abs().max()))
    rounding = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[query.dtype]
    return truth, BAND_FACTOR * max(moved) + sums + rounding * float(truth.abs().max())
