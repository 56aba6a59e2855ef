"""Triton kernels from scores to attention outputs: weigh packed values, combine splits, up-project once.

Values are accumulated as latents, by position (see ``triton_tiers``), and meet the up-projection only at the end.
"""

import triton
import triton.language as tl

from lowrank_cache.kernels.triton_scores import SLOT_INTEGERS, slot_tokens
from lowrank_cache.kernels.triton_tiers import all_chunks, channel_of, chunk_count, half_steps, load_levels

__all__ = ["combine", "project", "weigh"]

# Weights are at most 1, and float16 keeps full precision down to 2**-14: with this factor, down to weights of 2**-29.
_WEIGHT_SCALE = tl.constexpr(32768.0)


@triton.jit
def _weigh_tier(
    tier, batch, chunk, chunk_at, common,
    TILE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Weigh one chunk of a tier by online softmax over ``first_slot`` to ``last_slot``, and store it."""
    (
        positions, write_sums, partial, maxima, sums, scores, slots, row, in_rows, first_slot, last_slot,
        tokens, first_frame, frame_length, frame_tiles,
    ) = common  # fmt: skip
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    accumulated = tl.zeros((ROWS, CHUNK), tl.float32)
    for start in tl.range(first_slot, last_slot, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        token, valid = slot_tokens(slot, slots, tokens, first_frame, frame_length, frame_tiles, TILE)
        inside = in_rows[:, None] & (slot < slots)[None, :]
        part = tl.load(scores + row.to(tl.int64)[:, None] * slots + slot[None, :], mask=inside, other=float("-inf"))
        above = tl.maximum(top, tl.max(part, 1))
        base = tl.where(above == float("-inf"), 0.0, above)
        weights = tl.exp2(part - base[:, None])
        decay = tl.exp2(top - base)
        total = total * decay + tl.sum(weights, 1)
        top = above
        levels = load_levels(tier, batch, token, valid, chunk, BLOCK, CHUNK, DOT)
        if tier.bits < 16:
            scale = half_steps(tier, batch, token, valid)
            unit = tl.max(tl.where(valid, scale, 0.0), 0)
            unit = tl.where(unit > 0, unit, 1.0)
            weights = weights * (scale / unit * _WEIGHT_SCALE)[None, :]
            unit = unit * (1.0 / _WEIGHT_SCALE)
        else:
            weights = weights * _WEIGHT_SCALE
            unit = 1.0 / _WEIGHT_SCALE
        product = tl.dot(weights.to(DOT), levels, input_precision=PRECISION)
        accumulated = accumulated * decay[:, None] + product * unit
    column = chunk_at * CHUNK + tl.arange(0, CHUNK)
    tl.store(partial + row.to(tl.int64)[:, None] * positions + column[None, :], accumulated, mask=in_rows[:, None])
    if write_sums:
        tl.store(maxima + row, top, mask=in_rows)
        tl.store(sums + row, total, mask=in_rows)


@triton.jit(do_not_specialize=[*SLOT_INTEGERS, "row_blocks", "split_blocks", "first_split", "splits"])
def weigh(
    partial,  # [batch, splits, rows, positions] float32
    maxima, sums,  # [batch, splits, rows] float32
    scores,  # [batch, rows, tiles * TILE] float32
    tiers,
    rows, row_blocks, tokens, first_frame, frame_length, frame_tiles, tiles,
    split_blocks,  # blocks of BLOCK slots in a split
    first_split, splits,
    ROWS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax-weighted sum of one chunk of the values' latents over one split of the tokens."""
    chunk, split = tl.program_id(0), tl.program_id(1)
    batch = (tl.program_id(2) // row_blocks).to(tl.int64)
    row = tl.program_id(2) % row_blocks * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    positions = all_chunks(tiers, CHUNK) * CHUNK
    slots = tiles * TILE
    scores += batch * rows * slots
    line = (batch * splits + first_split + split) * rows
    partial, maxima, sums = partial + line * positions, maxima + line, sums + line
    first_slot = split * split_blocks * BLOCK
    last_slot = tl.minimum(first_slot + split_blocks * BLOCK, slots)
    common = (
        positions, chunk == 0, partial, maxima, sums, scores, slots, row, in_rows, first_slot, last_slot,
        tokens, first_frame, frame_length, frame_tiles,
    )  # fmt: skip
    end16 = chunk_count(tiers[0], CHUNK)
    end8 = end16 + chunk_count(tiers[1], CHUNK)
    end4 = end8 + chunk_count(tiers[2], CHUNK)
    # A ladder and no loop over tiers: with branches one after another ptxas takes a quarter more registers.
    if chunk < end16:
        _weigh_tier(tiers[0], batch, chunk, chunk, common, TILE, ROWS, BLOCK, CHUNK, DOT, PRECISION)
    elif chunk < end8:
        _weigh_tier(tiers[1], batch, chunk - end16, chunk, common, TILE, ROWS, BLOCK, CHUNK, DOT, PRECISION)
    elif chunk < end4:
        _weigh_tier(tiers[2], batch, chunk - end8, chunk, common, TILE, ROWS, BLOCK, CHUNK, DOT, PRECISION)
    else:
        _weigh_tier(tiers[3], batch, chunk - end4, chunk, common, TILE, ROWS, BLOCK, CHUNK, DOT, PRECISION)


@triton.jit(do_not_specialize=["rows", "splits", "chunks"])
def combine(
    latents,  # [batch, rows, positions] float32
    lse,  # [batch, rows] float32
    partial,  # [batch, splits, rows, positions]
    maxima, sums,  # [batch, splits, rows]
    rows, splits, chunks,
    SPLITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Join the splits of one row and chunk into normalised latents, and their sums into log-sum-exps."""
    chunk, row, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    top = tl.full((SPLITS,), float("-inf"), tl.float32)
    for start in tl.range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        line = (batch * splits + split) * rows + row
        top = tl.maximum(top, tl.load(maxima + line, mask=split < splits, other=float("-inf")))
    highest = tl.max(top, 0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    joined = tl.zeros((CHUNK,), tl.float32)
    total = tl.zeros((SPLITS,), tl.float32)
    for start in tl.range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        inside = split < splits
        line = (batch * splits + split) * rows + row
        share = tl.exp2(tl.load(maxima + line, mask=inside, other=float("-inf")) - base)
        total += share * tl.load(sums + line, mask=inside, other=0.0)
        at = partial + line[:, None] * (chunks * CHUNK) + column[None, :]
        part = tl.load(at, mask=inside[:, None], other=0.0)
        joined += tl.sum(share[:, None] * part, 0)
    whole = tl.sum(total, 0)
    joined = joined / tl.where(whole > 0, whole, 1.0)
    tl.store(latents + (batch * rows + row) * (chunks * CHUNK) + column, joined)
    if chunk == 0:
        nats = (base + tl.log2(tl.where(whole > 0, whole, 1.0))) * 0.6931471805599453
        tl.store(lse + batch * rows + row, tl.where(whole > 0, nats, float("-inf")))


@triton.jit(do_not_specialize=["head_rows", "heads", "chunks", "up_rank", "up_head"])
def project(
    out,  # [batch, heads * head_rows, HEAD_DIM] float32
    latents,  # [batch, heads * head_rows, positions] float32
    lse,  # [batch, heads * head_rows]
    up_proj,  # [rank, heads, HEAD_DIM]
    constant,  # [heads, HEAD_DIM]
    head_rows, heads,
    chunks,  # of CHUNK positions
    up_rank, up_head,  # strides in units of 8 elements
    tiers,
    HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    LATENT_CHUNK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Up-project the attended latents of one head."""
    batch, head = (tl.program_id(2) // heads).to(tl.int64), tl.program_id(2) % heads
    dims = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    in_head = dims < HEAD_DIM
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    in_rows = row < head_rows
    line = (batch * heads + head) * head_rows + row
    up_proj += head.to(tl.int64) * (up_head * 8)
    product = tl.zeros((ROWS, COLUMNS), tl.float32)
    for chunk in tl.range(0, chunks):
        position = chunk * CHUNK + tl.arange(0, CHUNK)
        channel = channel_of(position, tiers, LATENT_CHUNK)
        at = latents + line[:, None] * (chunks * CHUNK) + position[None, :]
        part = tl.load(at, mask=in_rows[:, None], other=0.0)  # finite at positions without a channel, too
        if DOT == tl.float16:
            part = tl.clamp(part, -65504.0, 65504.0)
        at = up_proj + channel.to(tl.int64)[:, None] * (up_rank * 8) + dims[None, :]
        up = tl.load(at, mask=(channel >= 0)[:, None] & in_head[None, :], other=0.0)
        product = tl.dot(part.to(DOT), up.to(DOT), product, input_precision=PRECISION)
    product += tl.load(constant + head * HEAD_DIM + dims, mask=in_head, other=0.0)[None, :]
    # A query that sees no token has no value, not the mean one.
    seen = tl.load(lse + line, mask=in_rows, other=0.0) != float("-inf")
    product = tl.where(seen[:, None], product, 0.0)
    tl.store(out + line[:, None] * HEAD_DIM + dims[None, :], product, mask=in_rows[:, None] & in_head[None, :])
