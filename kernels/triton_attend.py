"""Triton kernels of attention over stored tokens: scores, weighted sums of values, joining splits, outputs.

Queries meet packed keys absorbed by frame, or reconstructed. Scores are in units of log 2, masked, one row per query
head and query token. Tokens are cut into tiles that never cross a frame; a tile's unused slots weigh nothing. A tile's
weights are relative to its own highest score, and meet the other tiles' where values are summed. Values are
accumulated as latents, by position (see ``triton_tiers``), and meet the up-projection only at the end, as do the
tokens that are stored exactly.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from lowrank_cache.kernels.triton_reconstruct import RECONSTRUCT_INTEGERS, pair_columns, reconstruct_pair
from lowrank_cache.kernels.triton_tiers import (
    all_positions,
    channel_of,
    chunk_count,
    half_steps,
    load_codes,
    plain,
    plane_levels,
)

_TILE_INTEGERS = ["rows", "tokens", "frame_length", "frame_tiles", "tiles"]
_MASK_INTEGERS = ["mask_batch", "mask_query", "mask_token"]
# Weights are at most 1, and float16 keeps full precision down to 2**-14: with this factor, down to weights of 2**-29.
_WEIGHT_SCALE = tl.constexpr(32768.0)


class Segment(NamedTuple):
    """One layer's sinks, or its tail, in a kernel; integers are ``unspecialised``.

    A mask comes beside it, ``[batch, q_tokens, tokens]`` of bytes: compiled kernels rely on the alignment of what a
    tuple holds, and a mask may begin anywhere.
    """

    key: Any  # [batch, heads, tokens, dim]; so is `value`
    value: Any
    key_batch: Any  # strides in units of 8 elements
    key_head: Any
    key_token: Any
    value_batch: Any
    value_head: Any
    value_token: Any
    mask_batch: Any  # strides
    mask_query: Any
    mask_token: Any
    tokens: Any  # how many


@triton.jit
def _tile_tokens(tile, tokens, frame_length, frame_tiles, TILE: tl.constexpr):
    """The tokens of a tile's slots, and whether there is one."""
    frame = tile // frame_tiles
    token = frame * frame_length + tile % frame_tiles * TILE + tl.arange(0, TILE)
    return token, token < tl.minimum((frame + 1) * frame_length, tokens)


@triton.jit
def _finish(
    scores, row, token, valid, mask, mask_query, mask_token, q_tokens, factor,
    MASK: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Cap and mask scores ``[TILE, ROWS]``."""
    if SOFTCAP:
        # tanh by its exponential; ``factor`` is the cap in units of log 2
        decay = tl.exp2(-2.8853900817779268 * tl.abs(scores))
        bent = (1.0 - decay) / (1.0 + decay)
        scores = factor * tl.where(scores < 0, -bent, bent)
    if MASK == "tokens":
        valid = valid & (tl.load(mask + token.to(tl.int64) * mask_token, mask=valid, other=0) != 0)
    scores = tl.where(valid[:, None], scores, float("-inf"))
    if MASK == "queries":
        offset = token.to(tl.int64)[:, None] * mask_token + (row % q_tokens)[None, :].to(tl.int64) * mask_query
        seen = tl.load(mask + offset, mask=valid[:, None], other=0) != 0
        scores = tl.where(seen, scores, float("-inf"))
    return scores


@triton.jit
def _store_weights(scores, weights, maxima, sums, line, in_rows, tile, tiles, at_tile, TILE: tl.constexpr):
    """Scores ``[TILE, ROWS]`` of a tile as weights, with their maxima and sums. ``line``: the row over all batches."""
    top = tl.max(scores, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    share = tl.exp2(scores - base[None, :])
    target = weights + line[None, :] * (tiles * TILE) + (tile * TILE + tl.arange(0, TILE))[:, None]
    tl.store(target, (share * _WEIGHT_SCALE).to(weights.dtype.element_ty), mask=in_rows[None, :])
    tl.store(maxima + at_tile, top, mask=in_rows)
    tl.store(sums + at_tile, tl.sum(share, 0), mask=in_rows)


@triton.jit
def _add_exact(
    top, total, summed, query, segment, mask, batch, head, row, q_tokens, scaling, factor,
    HEAD_DIM: tl.constexpr, HEAD_BLOCK: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One segment of exact keys and values, by online softmax. ``query``: ``[ROWS, HEAD_BLOCK]``."""
    dims, value_dims = tl.arange(0, HEAD_BLOCK), tl.arange(0, VALUE_BLOCK)
    keys = segment.key + (batch * plain(segment.key_batch) + head * plain(segment.key_head)) * 8
    values = segment.value + (batch * plain(segment.value_batch) + head * plain(segment.value_head)) * 8
    mask += batch * plain(segment.mask_batch)
    mask_query, mask_token = plain(segment.mask_query), plain(segment.mask_token)
    tokens = plain(segment.tokens)
    for start in tl.range(0, tokens, BLOCK):
        token = start + tl.arange(0, BLOCK)
        valid = token < tokens
        at = keys + (token.to(tl.int64) * (plain(segment.key_token) * 8))[:, None] + dims[None, :]
        part = tl.load(at, mask=valid[:, None] & (dims < HEAD_DIM)[None, :], other=0.0).to(query.dtype)
        scores = tl.dot(part, tl.trans(query), input_precision=PRECISION) * scaling
        scores = _finish(scores, row, token, valid, mask, mask_query, mask_token, q_tokens, factor, MASK, SOFTCAP)
        above = tl.maximum(top, tl.max(scores, 0))
        base = tl.where(above == float("-inf"), 0.0, above)
        share, decay = tl.exp2(scores - base[None, :]), tl.exp2(top - base)
        total = total * decay + tl.sum(share, 0)
        top = above
        at = values + (token.to(tl.int64) * (plain(segment.value_token) * 8))[:, None] + value_dims[None, :]
        part = tl.load(at, mask=valid[:, None] & (value_dims < VALUE_DIM)[None, :], other=0.0).to(query.dtype)
        product = tl.dot(tl.trans(share.to(query.dtype)), part, input_precision=PRECISION)
        summed = summed * decay[:, None] + product
    return top, total, summed


@triton.jit
def _attend_exact(
    block, head, batch, exact, maxima, sums, query, segments, sink_mask, tail_mask,
    head_rows, heads, q_tokens, scaling, factor,
    HEAD_DIM: tl.constexpr, HEAD_BLOCK: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of a block of one head's rows over sinks and tail: sums ``[ROWS, VALUE_DIM]``, not divided."""
    row = block * ROWS + tl.arange(0, ROWS)
    in_rows = row < head_rows
    line = (batch * heads + head) * head_rows + row
    dims, value_dims = tl.arange(0, HEAD_BLOCK), tl.arange(0, VALUE_BLOCK)
    both = in_rows[:, None] & (dims < HEAD_DIM)[None, :]
    rows = tl.load(query + line[:, None] * HEAD_DIM + dims[None, :], mask=both, other=0.0).to(DOT)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    summed = tl.zeros((ROWS, VALUE_BLOCK), tl.float32)
    head = head.to(tl.int64)
    top, total, summed = _add_exact(
        top, total, summed, rows, segments[0], sink_mask, batch, head, row, q_tokens, scaling, factor,
        HEAD_DIM, HEAD_BLOCK, VALUE_DIM, VALUE_BLOCK, BLOCK, MASK, SOFTCAP, PRECISION,
    )  # fmt: skip
    top, total, summed = _add_exact(
        top, total, summed, rows, segments[1], tail_mask, batch, head, row, q_tokens, scaling, factor,
        HEAD_DIM, HEAD_BLOCK, VALUE_DIM, VALUE_BLOCK, BLOCK, MASK, SOFTCAP, PRECISION,
    )  # fmt: skip
    both = in_rows[:, None] & (value_dims < VALUE_DIM)[None, :]
    tl.store(exact + line[:, None] * VALUE_DIM + value_dims[None, :], summed, mask=both)
    tl.store(maxima + line, top, mask=in_rows)
    tl.store(sums + line, total, mask=in_rows)


@triton.jit(
    do_not_specialize=["head_rows", "heads", "q_tokens"], do_not_specialize_on_alignment=["sink_mask", "tail_mask"]
)
def attend_exact(
    exact,  # [batch, heads * head_rows, VALUE_DIM] float32, not divided by the sums
    exact_maxima, exact_sums,  # [batch, heads * head_rows] float32
    query,  # [batch, heads * head_rows, HEAD_DIM]
    segments,  # sinks and tail
    sink_mask, tail_mask,
    head_rows, heads, q_tokens, scaling, factor,
    HEAD_DIM: tl.constexpr, HEAD_BLOCK: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    EXACT_ROWS: tl.constexpr, EXACT_BLOCK: tl.constexpr, EXACT_MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    EXACT_DOT: tl.constexpr, EXACT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention over sinks and tail, by itself."""
    _attend_exact(
        tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64),
        exact, exact_maxima, exact_sums, query, segments, sink_mask, tail_mask,
        head_rows, heads, q_tokens, scaling, factor, HEAD_DIM, HEAD_BLOCK, VALUE_DIM, VALUE_BLOCK,
        EXACT_ROWS, EXACT_BLOCK, EXACT_MASK, SOFTCAP, EXACT_DOT, EXACT_PRECISION,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["head_rows", "heads", "frames", "cos_batch", "up_rank", "up_head", "position_blocks"]
    + ["steps", "q_tokens"],
    do_not_specialize_on_alignment=["sink_mask", "tail_mask"],
)
def absorb(
    absorbed,  # [batch, frames, heads * head_rows, positions]
    bias,  # [batch, frames, heads * head_rows] float32: the constant's share of every score of a frame
    query,  # [batch, heads * head_rows, HEAD_DIM]
    up_proj,  # [rank, heads, HEAD_DIM]
    constant,  # [heads, HEAD_DIM]
    cos, sin,  # [1 or batch, frames, HALF]
    head_rows,  # query heads of a KV head times query tokens
    heads, frames,
    cos_batch,
    up_rank, up_head,  # strides in units of 8 elements
    position_blocks,  # of COLUMNS positions
    steps,  # blocks of rows for each program
    scaling,
    tiers,
    exact, exact_maxima, exact_sums, segments, sink_mask, tail_mask, q_tokens, factor,  # see ``attend_exact``
    HEAD_DIM: tl.constexpr, HEAD_BLOCK: tl.constexpr,
    HALF: tl.constexpr,  # 0 without a rotary embedding
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,  # positions of a program
    COLUMNS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    EXACT: tl.constexpr,  # whether the first of the programs attend exactly
    EXACT_ROWS: tl.constexpr, EXACT_BLOCK: tl.constexpr, EXACT_MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    EXACT_DOT: tl.constexpr, EXACT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Rotate the queries into every frame and multiply them with the up-projection of their head."""
    batch, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    chunk = tl.program_id(2) - EXACT
    positions = position_blocks * COLUMNS
    if chunk >= 0:
        dims = tl.arange(0, HEAD_BLOCK)
        in_head = dims < HEAD_DIM
        position = chunk * CHUNK + tl.arange(0, CHUNK)
        channel = channel_of(position, tiers, COLUMNS)
        up_offset = channel.to(tl.int64) * (up_rank * 8) + head.to(tl.int64) * (up_head * 8)
        up_mask = (channel >= 0)[:, None] & in_head[None, :]
        up = tl.load(up_proj + up_offset[:, None] + dims[None, :], mask=up_mask, other=0.0).to(DOT)
        mean = tl.load(constant + head * HEAD_DIM + dims, mask=in_head, other=0.0)
        own = query + (batch * heads + head) * head_rows * HEAD_DIM
        if HALF > 0:
            if INTERLEAVED:
                angle, partner, sign = dims // 2, dims ^ 1, tl.where(dims % 2 == 0, 1.0, -1.0)
            else:
                angle, sign = dims % HALF, tl.where(dims < HALF, 1.0, -1.0)
                partner = tl.where(dims < HALF, dims + HALF, dims - HALF)
        for step in tl.range(0, steps):
            item = (tl.program_id(1) * steps + step) * ROWS + tl.arange(0, ROWS)  # of this head, over frames
            inside = item < frames * head_rows
            frame, row = item // head_rows, item % head_rows
            both = inside[:, None] & in_head[None, :]
            turned = tl.load(own + row[:, None] * HEAD_DIM + dims[None, :], mask=both, other=0.0).to(tl.float32)
            if HALF > 0:
                both = inside[:, None] & (dims < 2 * HALF)[None, :]
                other = tl.load(own + row[:, None] * HEAD_DIM + partner[None, :], mask=both, other=0.0)
                offset = (batch * cos_batch + frame.to(tl.int64) * HALF)[:, None] + angle[None, :]
                turned = turned * tl.load(cos + offset, mask=both, other=1.0)
                turned += other.to(tl.float32) * (sign[None, :] * tl.load(sin + offset, mask=both, other=0.0))
            turned *= scaling
            product = tl.dot(turned.to(DOT), tl.trans(up), input_precision=PRECISION)
            target = (batch * frames + frame) * (heads * head_rows) + head * head_rows + row
            if absorbed.dtype.element_ty == tl.float16:
                product = tl.clamp(product, -65504.0, 65504.0)
            tl.store(
                absorbed + target[:, None] * positions + position[None, :],
                product.to(absorbed.dtype.element_ty),
                mask=inside[:, None] & (position < positions)[None, :],
            )
            if chunk == 0:
                tl.store(bias + target, tl.sum(turned * mean[None, :], 1), mask=inside)
    elif EXACT and tl.program_id(1) * EXACT_ROWS < head_rows:
        _attend_exact(
            tl.program_id(1), head, batch, exact, exact_maxima, exact_sums, query, segments, sink_mask, tail_mask,
            head_rows, heads, q_tokens, scaling, factor, HEAD_DIM, HEAD_BLOCK, VALUE_DIM, VALUE_BLOCK,
            EXACT_ROWS, EXACT_BLOCK, EXACT_MASK, SOFTCAP, EXACT_DOT, EXACT_PRECISION,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[*_TILE_INTEGERS, "frames", "q_tokens", *_MASK_INTEGERS], do_not_specialize_on_alignment=["mask"]
)
def absorbed_scores(
    weights,  # [batch, rows, tiles * TILE], relative to the tile's highest, times _WEIGHT_SCALE
    maxima, sums,  # [batch, tiles, rows] float32
    absorbed,  # [batch, frames, rows, positions]
    bias,  # [batch, frames, rows] float32
    mask,
    tiers,
    rows,  # query heads times query tokens
    tokens, frames, frame_length, frame_tiles, tiles, q_tokens,
    mask_batch, mask_query, mask_token,
    factor,
    ROWS: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Weights of one tile of tokens for a block of rows: every code is unpacked once for all query heads."""
    tile, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    token, valid = _tile_tokens(tile, tokens, frame_length, frame_tiles, TILE)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    line = (batch * frames + tile // frame_tiles) * rows + row
    absorbed += line * all_positions(tiers, COLUMNS)
    scores = tl.zeros((TILE, ROWS), tl.float32)
    for number in tl.static_range(len(tiers)):
        chunks = chunk_count(tiers[number], COLUMNS)
        if chunks > 0:
            if tiers[number].bits < 16:
                # In units of this tier's steps, so that one accumulator serves all tiers.
                scale = half_steps(tiers[number], batch, token, valid)
                scores = scores / scale[:, None]
            for chunk in tl.range(0, chunks):
                codes = load_codes(tiers[number], batch, token, valid, chunk, COLUMNS)
                for plane in tl.static_range(tiers[number].planes):
                    column = (chunk * tiers[number].planes + plane) * COLUMNS + tl.arange(0, COLUMNS)
                    part = tl.load(absorbed[:, None] + column[None, :], mask=in_rows[:, None], other=0.0)
                    levels = plane_levels(tiers[number], codes, plane, DOT)
                    scores = tl.dot(levels, tl.trans(part.to(DOT)), scores, input_precision=PRECISION)
            if tiers[number].bits < 16:
                scores = scores * scale[:, None]
        absorbed += chunks * tiers[number].planes * COLUMNS
    scores += tl.load(bias + line, mask=in_rows, other=0.0)[None, :]
    mask += batch * mask_batch
    scores = _finish(scores, row, token, valid, mask, mask_query, mask_token, q_tokens, factor, MASK, SOFTCAP)
    at_tile = (batch * tiles + tile) * rows + row
    _store_weights(scores, weights, maxima, sums, batch * rows + row, in_rows, tile, tiles, at_tile, TILE)


@triton.jit(
    do_not_specialize=["head_rows", "q_tokens", *RECONSTRUCT_INTEGERS, *_MASK_INTEGERS],
    do_not_specialize_on_alignment=["mask"],
)
def reconstructed_scores(
    weights,  # [batch, heads * head_rows, tiles * TILE], relative to the tile's highest, times _WEIGHT_SCALE
    maxima, sums,  # [batch, tiles, heads * head_rows] float32
    query,  # [batch, heads * head_rows, HEAD_DIM]
    up_proj,  # [rank, heads, HEAD_DIM]
    constant,  # [heads, HEAD_DIM]
    cos, sin,  # [1 or batch, frames, HALF]
    mask,
    tiers,
    head_rows,  # query heads of a KV head times query tokens
    heads, tokens, frame_length,
    cos_batch,
    up_rank, up_head,  # strides in units of 8 elements
    q_tokens,
    mask_batch, mask_query, mask_token,
    scaling, factor,
    HEAD_DIM: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    UP_DOT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Reconstruct one head's keys of one tile of tokens, rotate them, and weigh them for all of the head's queries."""
    tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    slot = tile * TILE + tl.arange(0, TILE)
    valid = slot < tokens
    one, two = reconstruct_pair(
        tiers, batch, slot, valid,
        up_proj + head.to(tl.int64) * (up_head * 8), up_rank, constant + head * HEAD_DIM,
        cos + batch * cos_batch, sin + batch * cos_batch, frame_length,
        HEAD_DIM, PAIRS, HALF, INTERLEAVED, TILE, COLUMNS, UP_DOT, PRECISION,
    )  # fmt: skip
    first, second, in_pairs = pair_columns(0, HEAD_DIM, HALF, INTERLEAVED, PAIRS)
    one, two = one.to(DOT), two.to(DOT)
    mask += batch * mask_batch
    tiles = tl.num_programs(0)
    for start in tl.range(0, head_rows, ROWS):
        row = start + tl.arange(0, ROWS)
        in_rows = row < head_rows
        line = (batch * heads + head) * head_rows + row
        inside = in_rows[:, None] & in_pairs[None, :]
        at = query + line[:, None] * HEAD_DIM
        q_one = tl.load(at + first[None, :], mask=inside, other=0.0).to(tl.float32) * scaling
        q_two = tl.load(at + second[None, :], mask=inside, other=0.0).to(tl.float32) * scaling
        scores = tl.dot(one, tl.trans(q_one.to(DOT)), input_precision=PRECISION)
        scores = tl.dot(two, tl.trans(q_two.to(DOT)), scores, input_precision=PRECISION)
        scores = _finish(scores, row, slot, valid, mask, mask_query, mask_token, q_tokens, factor, MASK, SOFTCAP)
        at_tile = (batch * tiles + tile) * heads * head_rows + head * head_rows + row
        _store_weights(scores, weights, maxima, sums, line, in_rows, tile, tiles, at_tile, TILE)


@triton.jit
def _highest(maxima, first_tile, last_tile, row, in_rows, rows, ROWS: tl.constexpr):
    """The highest score of each row in some tiles; 0 where it sees none."""
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    for start in tl.range(first_tile, last_tile, 16):
        tile = start + tl.arange(0, 16)
        inside = (tile < last_tile)[:, None] & in_rows[None, :]
        part = tl.load(maxima + tile[:, None] * rows + row[None, :], mask=inside, other=float("-inf"))
        top = tl.maximum(top, tl.max(part, 0))
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _weigh_tier(
    tier, batch, chunk, position, common,
    TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum one chunk of a tier over tiles ``first_tile`` to ``last_tile``, and store it from ``position`` on."""
    (
        positions, partial, weights, maxima, row, in_rows, rows, first_tile, last_tile,
        tokens, frame_length, frame_tiles, tiles,
    ) = common  # fmt: skip
    base = _highest(maxima, first_tile, last_tile, row, in_rows, rows, ROWS)
    unit = tl.max(tl.zeros((256,), tl.float32), 0)
    if tier.bits < 16:
        # Steps go into the weights, relative to the largest, so that float16 holds them.
        first = first_tile // frame_tiles * frame_length
        last = tl.minimum(((last_tile - 1) // frame_tiles + 1) * frame_length, tokens)
        for start in tl.range(first, last, 256):
            token = start + tl.arange(0, 256)
            steps = half_steps(tier, batch, token, token < last)
            unit = tl.maximum(unit, tl.max(tl.where(token < last, steps, 0.0), 0))
        unit = tl.where(unit > 0, unit, 1.0)
    else:
        unit += 1.0
    sum0 = tl.zeros((ROWS, COLUMNS), tl.float32)
    sum1, sum2, sum3 = sum0, sum0, sum0
    for tile in tl.range(first_tile, last_tile):
        token, valid = _tile_tokens(tile, tokens, frame_length, frame_tiles, TILE)
        at = weights + row.to(tl.int64)[:, None] * (tiles * TILE) + (tile * TILE + tl.arange(0, TILE))[None, :]
        share = tl.load(at, mask=in_rows[:, None], other=0.0).to(tl.float32)
        factor = tl.exp2(tl.load(maxima + tile * rows + row, mask=in_rows, other=float("-inf")) - base)
        share = share * factor[:, None]
        if tier.bits < 16:
            share = share * (half_steps(tier, batch, token, valid) / unit)[None, :]
        share = share.to(DOT)
        codes = load_codes(tier, batch, token, valid, chunk, COLUMNS)
        sum0 = tl.dot(share, plane_levels(tier, codes, 0, DOT), sum0, input_precision=PRECISION)
        if tier.planes > 1:
            sum1 = tl.dot(share, plane_levels(tier, codes, 1, DOT), sum1, input_precision=PRECISION)
        if tier.planes > 2:
            sum2 = tl.dot(share, plane_levels(tier, codes, 2, DOT), sum2, input_precision=PRECISION)
            sum3 = tl.dot(share, plane_levels(tier, codes, 3, DOT), sum3, input_precision=PRECISION)
    unit = unit * (1.0 / _WEIGHT_SCALE)
    target = partial + row.to(tl.int64)[:, None] * positions + (position + tl.arange(0, COLUMNS))[None, :]
    tl.store(target, sum0 * unit, mask=in_rows[:, None])
    if tier.planes > 1:
        tl.store(target + COLUMNS, sum1 * unit, mask=in_rows[:, None])
    if tier.planes > 2:
        tl.store(target + 2 * COLUMNS, sum2 * unit, mask=in_rows[:, None])
        tl.store(target + 3 * COLUMNS, sum3 * unit, mask=in_rows[:, None])


@triton.jit(do_not_specialize=[*_TILE_INTEGERS, "row_blocks", "split_tiles"])
def weigh(
    partial,  # [batch, splits, rows, positions] float32
    split_maxima, split_sums,  # [batch, splits, rows] float32
    weights,  # [batch, rows, tiles * TILE]
    maxima, sums,  # [batch, tiles, rows] float32
    tiers,
    rows, row_blocks, tokens, frame_length, frame_tiles, tiles,
    split_tiles,  # tiles in a split
    ROWS: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Weighted sum of one chunk of the values' latents over one split of the tokens."""
    chunk, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch = (tl.program_id(2) // row_blocks).to(tl.int64)
    row = tl.program_id(2) % row_blocks * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    positions = all_positions(tiers, COLUMNS)
    first_tile = split * split_tiles
    last_tile = tl.minimum(first_tile + split_tiles, tiles)
    weights += batch * rows * (tiles * TILE)
    maxima, sums = maxima + batch * tiles * rows, sums + batch * tiles * rows
    line = (batch * splits + split) * rows
    if chunk == 0:
        base = _highest(maxima, first_tile, last_tile, row, in_rows, rows, ROWS)
        total = tl.zeros((ROWS,), tl.float32)
        for start in tl.range(first_tile, last_tile, 16):
            tile = start + tl.arange(0, 16)
            inside = (tile < last_tile)[:, None] & in_rows[None, :]
            at = tile[:, None] * rows + row[None, :]
            share = tl.exp2(tl.load(maxima + at, mask=inside, other=float("-inf")) - base[None, :])
            total += tl.sum(share * tl.load(sums + at, mask=inside, other=0.0), 0)
        tl.store(split_maxima + line + row, tl.where(total > 0, base, float("-inf")), mask=in_rows)
        tl.store(split_sums + line + row, total, mask=in_rows)
    common = (
        positions, partial + line * positions, weights, maxima, row, in_rows, rows, first_tile, last_tile,
        tokens, frame_length, frame_tiles, tiles,
    )  # fmt: skip
    end16 = chunk_count(tiers[0], COLUMNS)
    end8 = end16 + chunk_count(tiers[1], COLUMNS)
    end4 = end8 + chunk_count(tiers[2], COLUMNS)
    at4, at2 = end8 * COLUMNS, (2 * end4 - end8) * COLUMNS
    # A ladder and no loop over tiers: with branches one after another ptxas takes a quarter more registers.
    if chunk < end16:
        _weigh_tier(tiers[0], batch, chunk, chunk * COLUMNS, common, TILE, ROWS, COLUMNS, DOT, PRECISION)
    elif chunk < end8:
        _weigh_tier(tiers[1], batch, chunk - end16, chunk * COLUMNS, common, TILE, ROWS, COLUMNS, DOT, PRECISION)
    elif chunk < end4:
        local = chunk - end8
        _weigh_tier(tiers[2], batch, local, at4 + local * 2 * COLUMNS, common, TILE, ROWS, COLUMNS, DOT, PRECISION)
    else:
        local = chunk - end4
        _weigh_tier(tiers[3], batch, local, at2 + local * 4 * COLUMNS, common, TILE, ROWS, COLUMNS, DOT, PRECISION)


@triton.jit(do_not_specialize=["rows", "splits", "position_blocks"])
def combine(
    latents,  # [batch, rows, positions] float32
    lse,  # [batch, rows] float32, in units of log 2
    partial,  # [batch, splits, rows, positions]
    split_maxima, split_sums,  # [batch, splits, rows]
    rows, splits,
    position_blocks,  # of COLUMNS positions
    SPLITS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Join the splits of one row and block of positions into normalised latents, and their sums into log-sum-exps."""
    chunk, row, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    top = tl.full((SPLITS,), float("-inf"), tl.float32)
    for start in tl.range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        line = (batch * splits + split) * rows + row
        top = tl.maximum(top, tl.load(split_maxima + line, mask=split < splits, other=float("-inf")))
    highest = tl.max(top, 0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    column = chunk * COLUMNS + tl.arange(0, COLUMNS)
    joined = tl.zeros((COLUMNS,), tl.float32)
    total = tl.zeros((SPLITS,), tl.float32)
    for start in tl.range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        inside = split < splits
        line = (batch * splits + split) * rows + row
        share = tl.exp2(tl.load(split_maxima + line, mask=inside, other=float("-inf")) - base)
        total += share * tl.load(split_sums + line, mask=inside, other=0.0)
        at = partial + line[:, None] * (position_blocks * COLUMNS) + column[None, :]
        part = tl.load(at, mask=inside[:, None], other=0.0)
        joined += tl.sum(share[:, None] * part, 0)
    whole = tl.sum(total, 0)
    joined = joined / tl.where(whole > 0, whole, 1.0)
    tl.store(latents + (batch * rows + row) * (position_blocks * COLUMNS) + column, joined)
    if chunk == 0:
        sum_log = base + tl.log2(tl.where(whole > 0, whole, 1.0))
        tl.store(lse + batch * rows + row, tl.where(whole > 0, sum_log, float("-inf")))


@triton.jit(
    do_not_specialize=["head_rows", "heads", "position_blocks", "up_rank", "up_head", "q_tokens"]
    + ["out_batch", "out_head", "out_token"],
    do_not_specialize_on_alignment=["sink_logits"],
)
def project(
    out,  # [batch, heads * head_rows / q_tokens, q_tokens, HEAD_DIM], strided
    total_lse,  # [batch, heads * head_rows] float32, in nats, of all tokens; not written if EXACT
    latents,  # [batch, heads * head_rows, positions] float32
    lse,  # [batch, heads * head_rows] of the latents, in units of log 2
    up_proj,  # [rank, heads, HEAD_DIM]
    constant,  # [heads, HEAD_DIM]
    exact, exact_maxima, exact_sums,  # what ``attend_exact`` wrote
    sink_logits,  # [heads * head_rows / q_tokens], in nats
    head_rows, heads, q_tokens,
    position_blocks,  # of COLUMNS positions
    up_rank, up_head,  # strides in units of 8 elements
    out_batch, out_head, out_token,
    tiers,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr, SINK_LOGITS: tl.constexpr,
):  # fmt: skip
    """Up-project the attended latents of one head, and join them with what was attended exactly."""
    batch, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    dims = tl.program_id(2) * DIMS + tl.arange(0, DIMS)
    in_head = dims < HEAD_DIM
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    in_rows = row < head_rows
    line = (batch * heads + head) * head_rows + row
    up_proj += head.to(tl.int64) * (up_head * 8)
    product = tl.zeros((ROWS, DIMS), tl.float32)
    for block in tl.range(0, position_blocks):
        position = block * COLUMNS + tl.arange(0, COLUMNS)
        channel = channel_of(position, tiers, COLUMNS)
        at = latents + line[:, None] * (position_blocks * COLUMNS) + position[None, :]
        part = tl.load(at, mask=in_rows[:, None], other=0.0)  # finite at positions without a channel, too
        if DOT == tl.float16:
            part = tl.clamp(part, -65504.0, 65504.0)
        at = up_proj + channel.to(tl.int64)[:, None] * (up_rank * 8) + dims[None, :]
        up = tl.load(at, mask=(channel >= 0)[:, None] & in_head[None, :], other=0.0)
        product = tl.dot(part.to(DOT), up.to(DOT), product, input_precision=PRECISION)
    product += tl.load(constant + head * HEAD_DIM + dims, mask=in_head, other=0.0)[None, :]
    own = tl.load(lse + line, mask=in_rows, other=float("-inf"))
    top = own
    logits = own
    if EXACT:
        exact_top = tl.load(exact_maxima + line, mask=in_rows, other=float("-inf"))
        top = tl.maximum(top, exact_top)
    if SINK_LOGITS:
        logits = tl.load(sink_logits + (head * head_rows + row) // q_tokens, mask=in_rows, other=float("-inf"))
        logits = logits.to(tl.float32) * 1.4426950408889634
        top = tl.maximum(top, logits)
    top = tl.where(top == float("-inf"), 0.0, top)
    # A query that sees no latent has no value of them, not the mean one.
    share = tl.exp2(own - top)
    total = share
    product = product * share[:, None]
    if EXACT:
        share = tl.exp2(exact_top - top)
        total += share * tl.load(exact_sums + line, mask=in_rows, other=0.0)
        at = exact + line[:, None] * HEAD_DIM + dims[None, :]
        part = tl.load(at, mask=in_rows[:, None] & in_head[None, :], other=0.0)
        product += share[:, None] * part
    if SINK_LOGITS:
        total += tl.exp2(logits - top)
    product = product / tl.where(total > 0, total, 1.0)[:, None]
    number = head * head_rows + row
    at = batch * out_batch + (number // q_tokens).to(tl.int64) * out_head + (number % q_tokens) * out_token
    inside = in_rows[:, None] & in_head[None, :]
    tl.store(out + at[:, None] + dims[None, :], product.to(out.dtype.element_ty), mask=inside)
    if not EXACT:
        nats = (top + tl.log2(tl.where(total > 0, total, 1.0))) * 0.6931471805599453
        tl.store(total_lse + line, tl.where(total > 0, nats, float("-inf")), mask=in_rows)
