"""Keys or values from packed latents on GPUs: the same function as ``reference.reconstruct``, in Triton kernels.

``reconstruct_pair`` makes one head's states of a tile of tokens in registers, for the kernels that store or score them.
Numbers of a head that rotate together are kept in two tiles, so that rotating is elementwise.
"""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_cache.kernels.packed import LatentSide
from lowrank_cache.kernels.triton_tiers import (
    block,
    check_side,
    chunk_count,
    dot_dtype,
    half_steps,
    interpreted,
    load_codes,
    plane_channels,
    plane_levels,
    precision,
    tier_arguments,
    up_proj_arguments,
    warps,
)

# Arguments of kernels that reconstruct which Triton must not specialise on.
RECONSTRUCT_INTEGERS = ["heads", "tokens", "frame_length", "cos_batch", "up_rank", "up_head"]


@triton.jit
def pair_columns(start, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, PAIRS: tl.constexpr):
    """Columns of a head that rotate together, ``[PAIRS]`` each from pair ``start`` on, and which of them exist.

    Columns beyond the rotation are paired too, and then not rotated. Without ``INTERLEAVED`` both halves are runs.
    """
    pair = start + tl.arange(0, PAIRS)
    if INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    else:
        REST: tl.constexpr = HEAD_DIM // 2 - HALF
        first = tl.where(pair < HALF, pair, pair + HALF)
        second = tl.where(pair < HALF, pair + HALF, pair + HALF + REST)
        if HALF % 8 == 0 and REST % 8 == 0:
            # Runs of eight stay together, which the compiler cannot see.
            first = tl.max_contiguous(tl.multiple_of(first, 8), 8)
            second = tl.max_contiguous(tl.multiple_of(second, 8), 8)
    return first, second, pair < HEAD_DIM // 2


@triton.jit
def reconstruct_pair(
    tiers, batch, token, valid, up_proj, up_rank, constant, cos, sin, frame_length,
    HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    TILE: tl.constexpr, COLUMNS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One head's states of some tokens, rotated: two tiles ``[TILE, PAIRS]`` float32, in columns of ``pair_columns``.

    ``up_proj`` and ``constant`` point to the head, ``cos`` and ``sin`` to the row of the batch.
    """
    first, second, in_pairs = pair_columns(0, HEAD_DIM, HALF, INTERLEAVED, PAIRS)
    one, two = tl.zeros((TILE, PAIRS), tl.float32), tl.zeros((TILE, PAIRS), tl.float32)
    for number in tl.static_range(len(tiers)):
        chunks = chunk_count(tiers[number], COLUMNS)
        if chunks > 0:
            if tiers[number].bits < 16:
                scale = half_steps(tiers[number], batch, token, valid)
                one, two = one / scale[:, None], two / scale[:, None]
            for chunk in tl.range(0, chunks):
                codes = load_codes(tiers[number], batch, token, valid, chunk, COLUMNS)
                for plane in tl.static_range(tiers[number].planes):
                    levels = plane_levels(tiers[number], codes, plane, DOT)
                    channel = plane_channels(tiers[number], chunk, plane, COLUMNS)
                    stored = (channel >= 0)[:, None]
                    at = up_proj + channel.to(tl.int64)[:, None] * (up_rank * 8)
                    if INTERLEAVED:
                        # One contiguous load that is split in registers.
                        dims = tl.arange(0, 2 * PAIRS)
                        up = tl.load(at + dims[None, :], mask=stored & (dims < HEAD_DIM)[None, :], other=0.0).to(DOT)
                        up_one, up_two = tl.split(tl.reshape(up, (COLUMNS, PAIRS, 2)))
                    else:
                        up_one = tl.load(at + first[None, :], mask=stored & in_pairs[None, :], other=0.0).to(DOT)
                        up_two = tl.load(at + second[None, :], mask=stored & in_pairs[None, :], other=0.0).to(DOT)
                    one = tl.dot(levels, up_one, one, input_precision=PRECISION)
                    two = tl.dot(levels, up_two, two, input_precision=PRECISION)
            if tiers[number].bits < 16:
                one, two = one * scale[:, None], two * scale[:, None]
    one += tl.load(constant + first, mask=in_pairs, other=0.0)[None, :]
    two += tl.load(constant + second, mask=in_pairs, other=0.0)[None, :]
    if HALF > 0:
        pair = tl.arange(0, PAIRS)
        offset = (token // frame_length).to(tl.int64)[:, None] * HALF + pair[None, :]
        inside = valid[:, None] & (pair < HALF)[None, :]
        c, s = tl.load(cos + offset, mask=inside, other=1.0), tl.load(sin + offset, mask=inside, other=0.0)
        one, two = one * c - two * s, two * c + one * s
    return one, two


@triton.jit(do_not_specialize=RECONSTRUCT_INTEGERS)
def _reconstruct(
    out,  # [batch, heads, tokens, HEAD_DIM]
    up_proj,  # [rank, heads, HEAD_DIM]
    constant,  # [heads, HEAD_DIM]
    cos, sin,  # [1 or batch, frames, HALF]
    tiers,
    heads, tokens, frame_length,
    cos_batch,
    up_rank, up_head,  # strides in units of 8 elements
    HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    TILE: tl.constexpr, COLUMNS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One head's states of one tile of tokens."""
    tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    token = tile * TILE + tl.arange(0, TILE)
    valid = token < tokens
    one, two = reconstruct_pair(
        tiers, batch, token, valid,
        up_proj + head.to(tl.int64) * (up_head * 8), up_rank, constant + head * HEAD_DIM,
        cos + batch * cos_batch, sin + batch * cos_batch, frame_length,
        HEAD_DIM, PAIRS, HALF, INTERLEAVED, TILE, COLUMNS, DOT, PRECISION,
    )  # fmt: skip
    line = (batch * heads + head) * tokens + token
    if INTERLEAVED:
        dims = tl.arange(0, 2 * PAIRS)
        both = tl.reshape(tl.join(one, two), (TILE, 2 * PAIRS))
        inside = valid[:, None] & (dims < HEAD_DIM)[None, :]
        tl.store(out + line[:, None] * HEAD_DIM + dims[None, :], both.to(out.dtype.element_ty), mask=inside)
    else:
        first, second, in_pairs = pair_columns(0, HEAD_DIM, HALF, INTERLEAVED, PAIRS)
        inside = valid[:, None] & in_pairs[None, :]
        tl.store(out + line[:, None] * HEAD_DIM + first[None, :], one.to(out.dtype.element_ty), mask=inside)
        tl.store(out + line[:, None] * HEAD_DIM + second[None, :], two.to(out.dtype.element_ty), mask=inside)


def reconstruct(side: LatentSide, dtype: torch.dtype = torch.float32) -> Tensor:
    """See ``reference.reconstruct``; half-precision states from products of the dtype of ``up_proj``, else float32.

    ValueError if matrices do not fit the tiers or differ by batch element, head_dim is not a multiple of 16 up to 256,
    or rows of codes are not padded and aligned to 16 bytes.
    """
    check_side("side", side)
    tiers, up = tier_arguments(side.tiers).tiers, up_proj_arguments(side)
    batch, tokens, _ = side.tiers[0].codes.shape
    # The interpreter cuts numbers off at bfloat16 instead of rounding.
    stored = torch.float32 if dtype == torch.bfloat16 and interpreted() else dtype
    states = torch.empty(batch, up["heads"], tokens, up["HEAD_DIM"], dtype=stored, device=up["up_proj"].device)
    if tokens == 0:
        return states.to(dtype)
    exact = dtype == torch.float32
    tile = block(tokens, 16, 128 if up["HEAD_DIM"] <= 128 else 64)
    with torch.cuda.device(states.device) if states.is_cuda else nullcontext():
        _reconstruct[(triton.cdiv(tokens, tile), up["heads"], batch)](
            out=states,
            tiers=tiers,
            tokens=tokens,
            frame_length=1 if side.rope is None else side.rope.frame_length,
            PAIRS=block(up["HEAD_DIM"] // 2, 16, 128),
            TILE=tile,
            COLUMNS=16 if up["HEAD_DIM"] > 128 else 32,  # for the 64 KiB of shared memory on AMD's cards
            DOT=tl.float32 if exact else dot_dtype(up["up_proj"].dtype),
            PRECISION=precision(exact),
            num_warps=warps(256),
            num_stages=2,
            **up,
        )
    return states.to(dtype)
