"""States to packed latents on GPUs: the same function as ``reference.encode``, in two Triton kernels.

The first rotates the rows of one member into their frames, subtracts the mean, multiplies with the down-projection and
adds to the latents of the members before it. The second searches each token's step of one tier and packs the codes.
Products are those of float32 operands: for half-precision states on NVIDIA in three parts on tensor cores, whose error
is near that of float32.
"""

from contextlib import nullcontext
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from lowrank_cache.kernels.packed import (
    BIT_WIDTHS,
    STEP_FRACTIONS,
    PackedTier,
    RotaryFrames,
    pack_latents,
    padded_channels,
)
from lowrank_cache.kernels.triton_reconstruct import pair_columns
from lowrank_cache.kernels.triton_tiers import block, plain, precision, rotary_arguments, unspecialised, warps

_ALIGNMENT = 16  # channels of the buffer of latents; every tier starts on a multiple of it
_BEYOND = 2**29  # a channel that no latent has


@triton.jit(
    do_not_specialize=["heads", "tokens", "batch_stride", "head_stride", "token_stride", "frame_length", "cos_batch"]
    + ["rank", "down_stride", "row"]
)
def _project_down(
    latents,  # [batch, tokens, row] float32
    states,  # [batch, heads, tokens, HEAD_DIM]
    constant,  # [heads, HEAD_DIM]
    cos, sin,  # [1 or batch, frames, HALF]
    down_proj,  # [heads * HEAD_DIM, rank]
    heads, tokens,
    batch_stride, head_stride, token_stride,  # in units of 8 elements
    frame_length, cos_batch, rank,
    down_stride,  # in units of 8 elements
    row,  # in units of 16 elements
    gaps,  # of the second and later tiers, unspecialised: the first channel, columns that stay empty before it
    HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, ADD: tl.constexpr,
    TILE: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One member's share of one chunk of the channels, for one tile of tokens."""
    tile, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    token = tile * TILE + tl.arange(0, TILE)
    valid = token < tokens
    channel = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    in_rank = channel < down_stride * 8
    at = states + batch * (batch_stride * 8) + token.to(tl.int64)[:, None] * (token_stride * 8)
    cos, sin = cos + batch * cos_batch, sin + batch * cos_batch
    turn = (token // frame_length * HALF)[:, None]  # 32 bits: registers are scarce here
    product = tl.zeros((TILE, CHUNK), tl.float32)
    BLOCKS: tl.constexpr = (HEAD_DIM // 2 + PAIRS - 1) // PAIRS  # of pairs in a head
    for step in tl.range(0, heads * BLOCKS):
        head, start = step // BLOCKS, step % BLOCKS * PAIRS
        first, second, in_pairs = pair_columns(start, HEAD_DIM, HALF, INTERLEAVED, PAIRS)
        member = at + head_stride.to(tl.int64) * 8 * head
        if INTERLEAVED:
            dims = 2 * start + tl.arange(0, 2 * PAIRS)
            both = tl.load(member + dims[None, :], mask=valid[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
            one, two = tl.split(tl.reshape(both.to(tl.float32), (TILE, PAIRS, 2)))
        else:
            inside = valid[:, None] & in_pairs[None, :]
            one = tl.load(member + first[None, :], mask=inside, other=0.0).to(tl.float32)
            two = tl.load(member + second[None, :], mask=inside, other=0.0).to(tl.float32)
        if HALF > 0:
            pair = start + tl.arange(0, PAIRS)
            turning = valid[:, None] & (pair < HALF)[None, :]
            c = tl.load(cos + turn + pair[None, :], mask=turning, other=1.0)
            s = tl.load(sin + turn + pair[None, :], mask=turning, other=0.0)
            one, two = one * c + two * s, two * c - one * s
        mean = tl.load(constant + head * HEAD_DIM + first, mask=in_pairs, other=0.0)
        one = tl.where(in_pairs[None, :], one - mean[None, :], 0.0)
        mean = tl.load(constant + head * HEAD_DIM + second, mask=in_pairs, other=0.0)
        two = tl.where(in_pairs[None, :], two - mean[None, :], 0.0)
        down = down_proj + down_stride.to(tl.int64) * 8 * head * HEAD_DIM
        used = in_pairs[:, None] & in_rank[None, :]
        rows_at = down + (first[:, None] * (down_stride * 8) + channel[None, :])
        part = tl.load(rows_at, mask=used, other=0.0).to(tl.float32)
        product = tl.dot(one, part, product, input_precision=PRECISION)
        rows_at = down + (second[:, None] * (down_stride * 8) + channel[None, :])
        part = tl.load(rows_at, mask=used, other=0.0).to(tl.float32)
        product = tl.dot(two, part, product, input_precision=PRECISION)
    column = channel
    for number in tl.static_range(len(gaps)):
        column += tl.where(channel >= plain(gaps[number][0]), plain(gaps[number][1]), 0)
    target = latents + (batch * tokens + token)[:, None] * (row * 16) + column[None, :]
    stored = valid[:, None] & (channel < rank)[None, :]
    if ADD:
        product += tl.load(target, mask=stored, other=0.0)
    tl.store(target, product, mask=stored)


@triton.jit
def _nearest_level(latents, steps, HALF_LEVELS: tl.constexpr):
    level = tl.floor(tl.div_rn(latents, tl.broadcast_to(steps[:, None], latents.shape))) + 0.5
    return tl.clamp(level, 0.5 - HALF_LEVELS, HALF_LEVELS - 0.5)


@triton.jit(do_not_specialize=["tokens", "row", "channels", "width"])
def _quantize(
    codes,  # [batch * tokens, width] uint8
    steps,  # [batch * tokens] float16
    latents,  # of the tier's first channel; rows of ``row``
    weight,  # [channels], at most 1
    tokens,  # in all rows of the batch
    row, width,  # in units of 16
    channels,
    BITS: tl.constexpr, FRACTIONS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Quantize and pack one tier of one tile of tokens, see ``reference.quantize``."""
    PLANES: tl.constexpr = 8 // BITS
    HALF_LEVELS: tl.constexpr = 1 << (BITS - 1)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    valid = token < tokens
    at = latents + token.to(tl.int64)[:, None] * (row * 16)
    padded = width * 16 * PLANES
    chunks = tl.cdiv(padded, CHUNK)
    largest = tl.zeros((TILE,), tl.float32)
    for chunk in tl.range(0, chunks):
        channel = chunk * CHUNK + tl.arange(0, CHUNK)
        z = tl.load(at + channel[None, :], mask=valid[:, None] & (channel < padded)[None, :], other=0.0)
        largest = tl.maximum(largest, tl.max(tl.where((channel < channels)[None, :], tl.abs(z), 0.0), 1))
    # A step below float16's smallest normal number would round to zero and make every level zero.
    best = tl.maximum(largest / HALF_LEVELS, 6.103515625e-05)
    if BITS < 8:
        unclipped = best
        best_error = tl.full((TILE,), float("inf"), tl.float32)
        for number in tl.static_range(len(FRACTIONS)):
            trial = unclipped * FRACTIONS[number]
            # The least-squares step for the levels of this trial, then the error with it.
            along = tl.zeros((TILE,), tl.float32)
            squares = tl.zeros((TILE,), tl.float32)
            for chunk in tl.range(0, chunks):
                channel = chunk * CHUNK + tl.arange(0, CHUNK)
                z = tl.load(at + channel[None, :], mask=valid[:, None] & (channel < padded)[None, :], other=0.0)
                z = tl.where((channel < channels)[None, :], z, 0.0)  # padding is not set, and may be NaN
                cost = tl.load(weight + channel, mask=channel < channels, other=0.0)
                level = _nearest_level(z, trial, HALF_LEVELS)
                along += tl.sum(level * cost[None, :] * z, 1)
                squares += tl.sum(level * level * cost[None, :], 1)
            fitted = tl.maximum(along / tl.maximum(squares, 1e-12), 6.103515625e-05)
            error = tl.zeros((TILE,), tl.float32)
            for chunk in tl.range(0, chunks):
                channel = chunk * CHUNK + tl.arange(0, CHUNK)
                z = tl.load(at + channel[None, :], mask=valid[:, None] & (channel < padded)[None, :], other=0.0)
                z = tl.where((channel < channels)[None, :], z, 0.0)
                cost = tl.load(weight + channel, mask=channel < channels, other=0.0)
                off = _nearest_level(z, trial, HALF_LEVELS) * fitted[:, None] - z
                error += tl.sum(off * off * cost[None, :], 1)
            better = error < best_error
            best, best_error = tl.where(better, fitted, best), tl.where(better, error, best_error)
    kept = tl.minimum(best, 65504.0).to(tl.float16)
    tl.store(steps + token, kept, mask=valid)
    kept = kept.to(tl.float32)
    COLUMNS: tl.constexpr = CHUNK // PLANES
    for chunk in tl.range(0, tl.cdiv(width * 16, COLUMNS)):
        column = chunk * COLUMNS + tl.arange(0, COLUMNS)
        inside = valid[:, None] & (column < width * 16)[None, :]
        byte = tl.zeros((TILE, COLUMNS), tl.int32)
        for plane in tl.static_range(PLANES):
            channel = plane * (width * 16) + column
            z = tl.load(at + channel[None, :], mask=inside, other=0.0)
            code = (_nearest_level(z, kept, HALF_LEVELS) + (HALF_LEVELS - 0.5)).to(tl.int32)
            byte |= tl.where((channel < channels)[None, :], code, 0) << (plane * BITS)
        target = codes + token.to(tl.int64)[:, None] * (width * 16) + column[None, :]
        tl.store(target, byte.to(tl.uint8), mask=inside)


def encode(
    states: list[Tensor],
    constants: list[Tensor],
    frames: list[RotaryFrames | None],
    down_proj: Tensor,
    tiers: tuple[tuple[int, int], ...],
    weight: Tensor,
    latent_dtype: torch.dtype,
) -> tuple[PackedTier, ...]:
    """See ``reference.encode``; one basis and one mean for all batch elements, and ValueError if shapes do not fit."""
    width = sum(member.shape[1] * member.shape[3] for member in states)
    rank = sum(channels for _, channels in tiers)
    if down_proj.shape != (width, rank) or len({bits for bits, _ in tiers}) < len(tiers) or not tiers:
        raise ValueError(
            f"down_proj must be [{width}, {rank}] for these states and tiers of distinct widths, "
            f'got {list(down_proj.shape)} and {tiers}; impl="torch" takes a matrix for each batch element'
        )
    for member, constant in zip(states, constants, strict=True):
        if constant.shape != (member.shape[1], member.shape[3]):
            raise ValueError(
                f"constants must be [{member.shape[1]}, {member.shape[3]}] like heads and head_dim of their states, "
                f'the same for all batch elements, got {list(constant.shape)}; impl="torch" takes one for each'
            )
    with torch.cuda.device(states[0].device) if states[0].is_cuda else nullcontext():
        latents = _latents(states, constants, frames, down_proj, tiers)
        costs = weight.split([channels for _, channels in tiers])
        packed: list[PackedTier] = []
        for (bits, channels), tier, cost in zip(tiers, latents, costs, strict=True):
            if bits == 16:
                packed += pack_latents(tier, ((bits, channels),), cost, latent_dtype)
            else:
                packed.append(_pack(tier, bits, cost))
    return tuple(packed)


def _latents(
    states: list[Tensor],
    constants: list[Tensor],
    frames: list[RotaryFrames | None],
    down_proj: Tensor,
    tiers: tuple[tuple[int, int], ...],
) -> tuple[Tensor, ...]:
    """By tier ``[batch, tokens, channels]`` float32: views of one buffer, in which gaps between tiers are not set."""
    batch, _, tokens, _ = states[0].shape
    sizes = [channels for _, channels in tiers]
    empty = [-(-padded_channels(*tier) // _ALIGNMENT) * _ALIGNMENT - tier[1] for tier in tiers]  # columns behind each
    rank, row = sum(sizes), sum(sizes) + sum(empty)
    latents = states[0].new_empty(batch, tokens, row, dtype=torch.float32)
    gaps = [*zip(accumulate(sizes), empty, strict=True)][:-1] + [(_BEYOND, 0)] * (len(BIT_WIDTHS) - len(tiers))
    # Rows of the matrix are read 16 bytes at a time.
    if rank % 8 or not down_proj.is_contiguous() or down_proj.storage_offset() % 8:
        down_proj = pad(down_proj, (0, -rank % 8)).contiguous()
    start = 0
    for number, (member, constant, rope) in enumerate(zip(states, constants, frames, strict=True)):
        heads, head_dim = member.shape[1], member.shape[3]
        strides = [member.stride(axis) for axis in range(3)]
        if member.stride(3) != 1 or any(stride % 8 for stride in strides) or member.storage_offset() % 8:
            member = member.contiguous()
        tile, chunk = block(tokens, 16, 32 if head_dim <= 128 else 16), 64
        _project_down[(triton.cdiv(rank, chunk), triton.cdiv(tokens, tile), batch)](
            latents=latents,
            states=member,
            constant=constant.contiguous(),
            down_proj=down_proj[start : start + heads * head_dim],
            heads=heads,
            tokens=tokens,
            batch_stride=member.stride(0) // 8,
            head_stride=member.stride(1) // 8,
            token_stride=member.stride(2) // 8,
            frame_length=1 if rope is None else rope.frame_length,
            rank=rank,
            down_stride=down_proj.stride(0) // 8,
            row=row // _ALIGNMENT,
            gaps=tuple((unspecialised(start), unspecialised(columns)) for start, columns in gaps),
            HEAD_DIM=head_dim,
            PAIRS=block(head_dim // 2, 16, 64),
            ADD=number > 0,
            TILE=tile,
            CHUNK=chunk,
            PRECISION=precision(member.dtype == torch.float32, three_parts=True),
            num_warps=warps(256),
            num_stages=2,
            **rotary_arguments(rope, constant),
        )
        start += heads * head_dim
    return latents.split([columns for both in zip(sizes, empty, strict=True) for columns in both], dim=2)[::2]


def _pack(tier: Tensor, bits: int, weight: Tensor) -> PackedTier:
    if not bool(torch.isfinite(tier).all()):
        raise ValueError("states must be finite, got NaN or infinity: the forward overflowed")
    batch, tokens, channels = tier.shape
    width = padded_channels(bits, channels) * bits // 8
    codes = torch.empty(batch, tokens, width, dtype=torch.uint8, device=tier.device)
    steps = torch.empty(batch, tokens, dtype=torch.float16, device=tier.device)
    weight = weight / weight.amax().clamp(min=1e-30)  # only ratios matter; tiny ones would underflow
    tile = block(batch * tokens, 1, 16)
    _quantize[(triton.cdiv(batch * tokens, tile),)](
        codes=codes,
        steps=steps,
        latents=tier,
        weight=weight,
        tokens=batch * tokens,
        row=tier.stride(1) // _ALIGNMENT,
        width=width // 16,
        channels=channels,
        BITS=bits,
        FRACTIONS=STEP_FRACTIONS[bits],
        TILE=tile,
        CHUNK=128,
        num_warps=warps(128),
    )
    return PackedTier(bits, channels, codes, steps)
