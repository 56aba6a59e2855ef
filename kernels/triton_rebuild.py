"""Rebuild one head's keys or values from packed latents in registers, for the kernels that score or store them.

Numbers of a head that rotate together are kept in two tiles, so that rotating is elementwise.
"""

import triton
import triton.language as tl

from lowrank_cache.kernels.triton_tiers import half_steps, load_levels

__all__ = ["REBUILD_INTEGERS", "pair_columns", "rebuild_pair"]

# Arguments of kernels that rebuild which Triton must not specialise on.
REBUILD_INTEGERS = ["heads", "tokens", "frame_length", "cos_batch", "up_rank", "up_head"]


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
def rebuild_pair(
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
