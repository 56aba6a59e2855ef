"""The three operations over packed latents in plain torch: what runs on CPUs, and on any device without Triton.

Agrees with ``reference``, function by function. Mathematics: docs/method.md, "Attending to latents".
"""

import platform
from functools import cache

import torch
from torch import Tensor

from lowrank_cache.kernels.packed import LatentSide, PackedTier, RotaryFrames, pack_latents, tiles
from lowrank_cache.kernels.rope import swap_pairs
from lowrank_cache.kernels.segments import merge, softmax

# Encoded at a time: their float32 copies stay smaller than the states of a long prompt.
_ENCODE_TOKENS = 1024
_GPU_ENCODE_TOKENS = 8192  # more cores to fill
# Numbers (latents, reconstructed states or scores) in one tile: a few MB, which stays in a core's caches.
_TILE_NUMBERS = 2**22
_TILE_SHARE = 256  # of a GPU's bytes of memory one number: few launches, and tiles that fit beside a model


def encode(
    states: list[Tensor],
    constants: list[Tensor],
    frames: list[RotaryFrames | None],
    down_proj: Tensor,
    tiers: tuple[tuple[int, int], ...],
    weight: Tensor,
    latent_dtype: torch.dtype,
) -> tuple[PackedTier, ...]:
    """See ``reference.encode``: same arguments, same results, a piece of the tokens at a time."""
    down_proj, tokens = down_proj.float(), states[0].shape[2]
    pieces, length = [], _GPU_ENCODE_TOKENS if down_proj.is_cuda else _ENCODE_TOKENS
    for start in range(0, tokens, length):
        stop = min(start + length, tokens)
        parts = []
        for member, constant, rope in zip(states, constants, frames, strict=True):
            part = member[:, :, start:stop].to(down_proj.device, torch.float32)
            if rope is not None:
                part = rope.rotated_into(part, start)
            parts.append((part - constant[..., :, None, :]).transpose(1, 2).flatten(2))
        latents = torch.matmul(torch.cat(parts, dim=2), down_proj)
        pieces.append(pack_latents(latents, tiers, weight, latent_dtype))
    return pieces[0] if len(pieces) == 1 else tuple(_joined(tier) for tier in zip(*pieces, strict=True))


def _joined(pieces: tuple[PackedTier, ...]) -> PackedTier:
    steps = [piece.steps for piece in pieces if piece.steps is not None]
    codes = torch.cat([piece.codes for piece in pieces], dim=1)
    return PackedTier(pieces[0].bits, pieces[0].channels, codes, torch.cat(steps, dim=1) if steps else None)


@cache
def _cpu_multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for it; without them such a product takes longer than a float32 one."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def reconstruct(side: LatentSide, dtype: torch.dtype = torch.float32) -> Tensor:
    """See ``reference.reconstruct``; computed in float32, but for the product.

    Where processors multiply ``dtype`` fast and ``up_proj`` is held in half precision, it is taken in ``dtype``, which
    loses a model of that dtype nothing.
    """
    latents, up_proj = side.read_once(), side.up_proj
    fast = dtype == torch.bfloat16 and (latents.is_cuda or _cpu_multiplies_bfloat16())
    fast = fast or (dtype == torch.float16 and latents.is_cuda)
    # bfloat16 holds every float16 number's range; the other way round large entries would overflow.
    narrow = fast and up_proj.dtype.itemsize == 2 and dtype in (torch.bfloat16, up_proj.dtype)
    product = dtype if narrow else torch.float32
    states = torch.matmul(latents.to(product), up_proj.flatten(-2).to(product)).float()
    states = states.unflatten(2, up_proj.shape[-2:]).transpose(1, 2).add_(side.constant[..., :, None, :])
    if side.rope is not None:
        states = side.rope.rotated_out(states)
    return states.to(dtype)


def latent_attention(
    query: Tensor,
    key: LatentSide,
    value: LatentSide,
    *,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``reference.latent_attention``: same arguments, same results, computed in float32.

    The reference reconstructs every key and value; here that is done only where it is cheaper. With few queries, the
    query is rotated into each frame and absorbed into the up-projection, so a token costs one dot product in latent
    space, and values are summed as latents. Tokens are read tile by tile, so only the scores grow with the context.
    """
    tile = _tile_tokens(query, key, value)
    if key.tokens <= tile:
        return _attend_tile(query, key, value, mask, scaling, softcap)
    return merge([_attend_tile(query, *part, scaling, softcap) for part in tiles(key, value, mask, tile)])


def _tile_tokens(query: Tensor, key: LatentSide, value: LatentSide) -> int:
    """Tokens per tile, a whole number of frames."""
    batch, q_heads, q_tokens, _ = query.shape
    widest = max(side.up_proj.shape[0] + side.constant.numel() * _reconstructs(query, side) for side in (key, value))
    tokens = _tile_numbers(query.device) // (batch * max(widest, q_heads * q_tokens))
    frame = 1 if key.rope is None else key.rope.frame_length
    return max(frame, 64 // frame * frame, tokens // frame * frame)


def _tile_numbers(device: torch.device) -> int:
    if device.type != "cuda":
        return _TILE_NUMBERS
    return torch.cuda.get_device_properties(device).total_memory // _TILE_SHARE


def _reconstructs(query: Tensor, side: LatentSide) -> bool:
    """Whether reconstructing states takes fewer multiply-adds a token than staying in latent space."""
    _, q_heads, q_tokens, head_dim = query.shape
    rank, heads, _ = side.up_proj.shape
    queries = q_heads * q_tokens
    frame = 1 if side.rope is None else side.rope.frame_length
    absorbing = 0.0 if side.rope is None else queries * head_dim * rank / frame
    reconstructing = rank * heads * head_dim + queries * head_dim
    return reconstructing < absorbing + queries * rank


def _attend_tile(
    query: Tensor, key: LatentSide, value: LatentSide, mask: Tensor | None, scaling: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    scores = (_reconstructed_scores if _reconstructs(query, key) else _absorbed_scores)(query.float() * scaling, key)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    weights, lse = softmax(scores, mask)
    output = (_reconstructed_output if _reconstructs(query, value) else _latent_output)(weights, value)
    if mask is not None:  # a query that sees nothing has no mean either
        output = output.masked_fill_(lse.isneginf()[..., None], 0.0)
    return output, lse


def _planes(tier: PackedTier) -> list[Tensor]:
    """Levels as they are coded, neither centred nor times the step: float32 ``[batch, tokens, <= row]`` each.

    Plane ``i`` holds channels ``i * row`` and following, ``row`` being the bytes of a token. Planes stay apart because
    writing them side by side would take as long as a product with them.
    """
    if tier.bits >= 8:
        return [tier.codes[..., : tier.channels].float()]
    row, width = tier.codes.shape[-1], tier.bits
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=tier.codes.device)
    levels = ((tier.codes >> shifts[:, None, None, None]) & (2**width - 1)).float()
    return [
        plane[..., : tier.channels - start] for start, plane in zip(range(0, tier.channels, row), levels, strict=False)
    ]


def _centre(tier: PackedTier) -> float:
    """The level that stands for zero."""
    return 2 ** (tier.bits - 1) - 0.5


def _absorbed_scores(query: Tensor, side: LatentSide) -> Tensor:
    """``[batch, q_heads, q_tokens, tokens]`` from scaled queries, without keys.

    A tier's step is one number a token, so it multiplies the finished dot products and not the latents.
    """
    batch, q_heads, q_tokens, head_dim = query.shape
    rank, heads, _ = side.up_proj.shape
    tokens = side.tokens
    frame = tokens if side.rope is None else side.rope.frame_length
    frames = -(-tokens // frame)
    missing = frames * frame - tokens  # the last frame may be shorter
    # Beside its channels' weights, a row of queries has the sum of each tier's, for the centre, and the mean's score.
    up_proj = side.up_proj.float().flatten(1)
    sizes = [tier.channels for tier in side.tiers]
    sums = [part.sum(0, keepdim=True) for part in up_proj.split(sizes)]
    columns = torch.cat([up_proj, *sums, side.constant.view(1, -1)]).view(-1, heads, head_dim).permute(1, 2, 0)
    rows = query.reshape(batch, heads, -1, head_dim).transpose(0, 1)[:, :, None]
    if side.rope is not None:
        cos, sin = side.rope.spread(head_dim)
        rows = torch.addcmul(rows * cos, swap_pairs(rows, 2 * side.rope.cos.shape[-1], side.rope.layout), sin)
    absorbed = torch.bmm(rows.reshape(heads, -1, head_dim), columns)
    absorbed = absorbed.view(heads, batch * frames, -1, absorbed.shape[-1]).transpose(0, 1).flatten(1, 2)
    scores = absorbed[..., -1:]
    start = 0
    for index, tier in enumerate(side.tiers):
        product = absorbed[..., rank + index, None]
        beta = 0.0 if tier.steps is None else -_centre(tier)
        for plane in _planes(tier):
            weights = absorbed[..., start : start + plane.shape[-1]]
            product = torch.baddbmm(product, weights, _framed(plane, frames, missing).transpose(1, 2), beta=beta)
            start, beta = start + plane.shape[-1], 1.0
        if tier.steps is None:
            scores = product + scores
        else:
            steps = _framed(tier.steps.float()[..., None], frames, missing).transpose(1, 2)
            scores = torch.addcmul(scores, product, steps)
    scores = scores.view(batch, frames, q_heads, q_tokens, frame).permute(0, 2, 3, 1, 4).flatten(3)
    return scores[..., :tokens].contiguous() if missing else scores.contiguous()


def _framed(rows: Tensor, frames: int, missing: int) -> Tensor:
    """``[batch, tokens, n]`` cut into ``[batch · frames, frame, n]``, zeros for what is ``missing`` at the end."""
    if missing:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, missing))
    return rows.reshape(rows.shape[0] * frames, -1, rows.shape[2])


def _reconstructed_scores(query: Tensor, side: LatentSide) -> Tensor:
    """``[batch, q_heads, q_tokens, tokens]`` from scaled queries and reconstructed keys."""
    batch, q_heads, q_tokens, head_dim = query.shape
    keys = reconstruct(side)
    queries = query.reshape(batch, keys.shape[1], -1, head_dim)
    return torch.matmul(queries, keys.transpose(2, 3)).view(batch, q_heads, q_tokens, -1)


def _latent_output(weights: Tensor, side: LatentSide) -> Tensor:
    """``weights @ values``: summed as latents, then up-projected once. Each query's weights sum to 1."""
    batch, q_heads, q_tokens, tokens = weights.shape
    rank, heads, head_dim = side.up_proj.shape
    flat = weights.view(batch, -1, tokens)
    parts = []
    for tier in side.tiers:
        planes = _planes(tier)
        if tier.steps is None:
            parts += [torch.bmm(flat, plane) for plane in planes]
            continue
        stepped = flat * tier.steps.float()[:, None]
        total = stepped.sum(-1, keepdim=True)
        parts += [torch.baddbmm(total, stepped, plane, beta=-_centre(tier)) for plane in planes]
    summed = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    output = torch.matmul(summed.view(batch, heads, -1, rank), side.up_proj.float().transpose(0, 1))
    return output.add_(side.constant[:, None]).view(batch, q_heads, q_tokens, head_dim)


def _reconstructed_output(weights: Tensor, side: LatentSide) -> Tensor:
    batch, q_heads, q_tokens, tokens = weights.shape
    values = reconstruct(side)
    output = torch.matmul(weights.view(batch, values.shape[1], -1, tokens), values)
    return output.view(batch, q_heads, q_tokens, -1)
