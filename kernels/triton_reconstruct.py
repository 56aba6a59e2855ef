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
    dot_dtype,
    half_steps,
    interpreted,
    layout_names,
    load_levels,
    make_tiers,
    precision,
    tier_arguments,
    tier_names,
    up_proj_arguments,
    warps,
)

__all__ = ["RECONSTRUCT_INTEGERS", "pair_columns", "reconstruct", "reconstruct_pair"]

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
def _add_pair(
    one, two, token, valid, tier, start, first, second, in_pairs, up_proj, up_rank,
    HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    BITS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a tier's share of the states of one head to ``[TILE, PAIRS]`` twice, the members of pairs apart.

    ``start``: the tier's first row of ``up_proj``, which points to the head.
    """
    chunks, channels = tier[6], tier[5]
    PLANES: tl.constexpr = 8 // BITS if BITS < 16 else 1
    UNIT: tl.constexpr = 128 // tier[0].dtype.element_ty.primitive_bitwidth
    if chunks > 0:
        if BITS < 16:
            scale = half_steps(tier, token, valid)
            one, two = one / scale[:, None], two / scale[:, None]
        for chunk in tl.range(0, chunks):
            levels = load_levels(tier, token, valid, chunk, BITS, TILE, CHUNK, DOT)
            local = tl.arange(0, CHUNK)
            column = chunk * (CHUNK // PLANES) + local // PLANES
            channel = local % PLANES * (tier[2] * UNIT) + column
            stored = ((column < tier[2] * UNIT) & (channel < channels))[:, None]
            at = up_proj + (start + channel).to(tl.int64)[:, None] * (up_rank * 8)
            if INTERLEAVED:
                # One contiguous load that is split in registers.
                dims = tl.arange(0, 2 * PAIRS)
                up = tl.load(at + dims[None, :], mask=stored & (dims < HEAD_DIM)[None, :], other=0.0).to(DOT)
                up_one, up_two = tl.split(tl.reshape(up, (CHUNK, PAIRS, 2)))
            else:
                up_one = tl.load(at + first[None, :], mask=stored & in_pairs[None, :], other=0.0).to(DOT)
                up_two = tl.load(at + second[None, :], mask=stored & in_pairs[None, :], other=0.0).to(DOT)
            one = tl.dot(levels, up_one, one, input_precision=PRECISION)
            two = tl.dot(levels, up_two, two, input_precision=PRECISION)
        if BITS < 16:
            one, two = one * scale[:, None], two * scale[:, None]
    return one, two


@triton.jit
def _rotate_pair(one, two, token, valid, cos, sin, frame_length, HALF: tl.constexpr, PAIRS: tl.constexpr):
    """Rotate pairs ``[TILE, PAIRS]`` by their token's frame; ``cos`` and ``sin`` point to the row of the batch."""
    pair = tl.arange(0, PAIRS)
    offset = (token // frame_length).to(tl.int64)[:, None] * HALF + pair[None, :]
    inside = valid[:, None] & (pair < HALF)[None, :]
    c, s = tl.load(cos + offset, mask=inside, other=1.0), tl.load(sin + offset, mask=inside, other=0.0)
    return one * c - two * s, two * c + one * s


@triton.jit
def reconstruct_pair(
    tiers, starts, token, valid, up_proj, up_rank, constant, cos, sin, frame_length,
    HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    TILE: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One head's states of some tokens, rotated: two tiles ``[TILE, PAIRS]`` float32, in columns of ``pair_columns``.

    ``starts``: the tiers' first rows of ``up_proj``. ``up_proj`` and ``constant`` point to the head, ``cos`` and
    ``sin`` to the row of the batch.
    """
    first, second, in_pairs = pair_columns(0, HEAD_DIM, HALF, INTERLEAVED, PAIRS)
    one, two = tl.zeros((TILE, PAIRS), tl.float32), tl.zeros((TILE, PAIRS), tl.float32)
    one, two = _add_pair(one, two, token, valid, tiers[0], starts[0], first, second, in_pairs, up_proj, up_rank,
                         HEAD_DIM, PAIRS, INTERLEAVED, 16, TILE, CHUNK, DOT, PRECISION)  # fmt: skip
    one, two = _add_pair(one, two, token, valid, tiers[1], starts[1], first, second, in_pairs, up_proj, up_rank,
                         HEAD_DIM, PAIRS, INTERLEAVED, 8, TILE, CHUNK, DOT, PRECISION)  # fmt: skip
    one, two = _add_pair(one, two, token, valid, tiers[2], starts[2], first, second, in_pairs, up_proj, up_rank,
                         HEAD_DIM, PAIRS, INTERLEAVED, 4, TILE, CHUNK, DOT, PRECISION)  # fmt: skip
    one, two = _add_pair(one, two, token, valid, tiers[3], starts[3], first, second, in_pairs, up_proj, up_rank,
                         HEAD_DIM, PAIRS, INTERLEAVED, 2, TILE, CHUNK, DOT, PRECISION)  # fmt: skip
    one += tl.load(constant + first, mask=in_pairs, other=0.0)[None, :]
    two += tl.load(constant + second, mask=in_pairs, other=0.0)[None, :]
    if HALF > 0:
        one, two = _rotate_pair(one, two, token, valid, cos, sin, frame_length, HALF, PAIRS)
    return one, two


@triton.jit(do_not_specialize=[*RECONSTRUCT_INTEGERS, *tier_names(), *layout_names()])
def _reconstruct(
    out,  # [batch, heads, tokens, HEAD_DIM]
    up_proj,  # [rank, heads, HEAD_DIM]
    constant,  # [heads, HEAD_DIM]
    cos, sin,  # [1 or batch, frames, HALF]
    codes16, codes8, codes4, codes2, steps8, steps4, steps2,
    heads, tokens, frame_length,
    cos_batch,
    up_rank, up_head,  # strides in units of 8 elements
    row16, codes_batch16, codes_token16, start16, channels16,
    row8, codes_batch8, codes_token8, steps_batch8, steps_token8, start8, channels8,
    row4, codes_batch4, codes_token4, steps_batch4, steps_token4, start4, channels4,
    row2, codes_batch2, codes_token2, steps_batch2, steps_token2, start2, channels2,
    HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    TILE: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One head's states of one tile of tokens."""
    tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    token = tile * TILE + tl.arange(0, TILE)
    valid = token < tokens
    tiers = make_tiers(
        batch, codes16, codes8, codes4, codes2, steps8, steps4, steps2,
        row16, codes_batch16, codes_token16,
        row8, codes_batch8, codes_token8, steps_batch8, steps_token8,
        row4, codes_batch4, codes_token4, steps_batch4, steps_token4,
        row2, codes_batch2, codes_token2, steps_batch2, steps_token2,
        channels16, channels8, channels4, channels2, CHUNK,
    )  # fmt: skip
    one, two = reconstruct_pair(
        tiers, (start16, start8, start4, start2), token, valid,
        up_proj + head.to(tl.int64) * (up_head * 8), up_rank, constant + head * HEAD_DIM,
        cos + batch * cos_batch, sin + batch * cos_batch, frame_length,
        HEAD_DIM, PAIRS, HALF, INTERLEAVED, TILE, CHUNK, DOT, PRECISION,
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
    """States of one layer and side, post-RoPE: ``[batch, heads, tokens, head_dim]`` in ``dtype``.

    float32 states are computed in float32; half-precision ones from products of the dtype of ``up_proj``, float32
    sums and float32 rotations.

    Raises:
        ValueError: If rows of codes are not padded and aligned to 16 bytes.
    """
    arguments, up = tier_arguments(side.tiers), up_proj_arguments(side)
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
            tokens=tokens,
            frame_length=1 if side.rope is None else side.rope.frame_length,
            PAIRS=block(up["HEAD_DIM"] // 2, 16, 128),
            TILE=tile,
            CHUNK=32 if exact and up["HEAD_DIM"] > 128 else 64,  # float32 tiles take twice the shared memory
            DOT=tl.float32 if exact else dot_dtype(up["up_proj"].dtype),
            PRECISION=precision(exact),
            num_warps=warps(256),
            num_stages=2,
            **up,
            **(arguments.layout | arguments.read),
        )
    return states.to(dtype)
