"""Triton kernels of attention over packed latents: scores, weighted sums of values, joining splits, outputs.

Queries meet packed keys absorbed by frame, or reconstructed. Scores are in units of log 2, masked, one row per query
head and query token. Tokens are cut into tiles that never cross a frame; a tile's unused slots hold -inf. Values are
accumulated as latents, by position (see ``triton_tiers``), and meet the up-projection only at the end.
"""

import triton
import triton.language as tl

from lowrank_cache.kernels.triton_reconstruct import RECONSTRUCT_INTEGERS, pair_columns, reconstruct_pair
from lowrank_cache.kernels.triton_tiers import all_chunks, channel_of, chunk_count, half_steps, load_levels

_ABSORB_INTEGERS = ["head_rows", "heads", "frames", "first_frame", "cos_batch", "up_rank", "up_head", "chunks", "steps"]
_SLOT_INTEGERS = ["rows", "tokens", "first_frame", "frame_length", "frame_tiles", "tiles"]
_MASK_INTEGERS = ["mask_batch", "mask_query", "mask_token"]
# Weights are at most 1, and float16 keeps full precision down to 2**-14: with this factor, down to weights of 2**-29.
_WEIGHT_SCALE = tl.constexpr(32768.0)


@triton.jit
def _slot_tokens(slot, slots, tokens, first_frame, frame_length, frame_tiles, TILE: tl.constexpr):
    """The tokens of some slots, and whether there is one."""
    tile = slot // TILE
    frame = first_frame + tile // frame_tiles
    token = frame * frame_length + tile % frame_tiles * TILE + slot % TILE
    valid = (slot < slots) & (token < tl.minimum((frame + 1) * frame_length, tokens))
    return token, valid


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


@triton.jit(do_not_specialize=_ABSORB_INTEGERS)
def absorb(
    absorbed,  # [batch, frames, heads * head_rows, positions]
    bias,  # [batch, frames, heads * head_rows] float32: the constant's share of every score of a frame
    query,  # [batch, heads * head_rows, HEAD_DIM]
    up_proj,  # [rank, heads, HEAD_DIM]
    constant,  # [heads, HEAD_DIM]
    cos, sin,  # [1 or batch, all frames, HALF]
    head_rows,  # query heads of a KV head times query tokens
    heads, frames, first_frame,
    cos_batch,
    up_rank, up_head,  # strides in units of 8 elements
    chunks,  # of CHUNK positions
    steps,  # blocks of rows for each program
    scaling,
    tiers,
    HEAD_DIM: tl.constexpr, HEAD_BLOCK: tl.constexpr,
    HALF: tl.constexpr,  # 0 without a rotary embedding
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr,
    LATENT_CHUNK: tl.constexpr,  # of the positions' numbering; a multiple of CHUNK
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rotate the queries into every frame and multiply them with the up-projection of their head."""
    chunk = tl.program_id(0)
    batch, head = (tl.program_id(2) // heads).to(tl.int64), tl.program_id(2) % heads
    dims = tl.arange(0, HEAD_BLOCK)
    in_head = dims < HEAD_DIM
    position = chunk * CHUNK + tl.arange(0, CHUNK)
    positions = chunks * CHUNK
    channel = channel_of(position, tiers, LATENT_CHUNK)
    up_offset = channel.to(tl.int64) * (up_rank * 8) + head.to(tl.int64) * (up_head * 8)
    up_mask = (channel >= 0)[:, None] & in_head[None, :]
    up = tl.load(up_proj + up_offset[:, None] + dims[None, :], mask=up_mask, other=0.0).to(DOT)
    mean = tl.load(constant + head * HEAD_DIM + dims, mask=in_head, other=0.0)
    query += (batch * heads + head) * head_rows * HEAD_DIM
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
        turned = tl.load(query + row[:, None] * HEAD_DIM + dims[None, :], mask=both, other=0.0).to(tl.float32)
        if HALF > 0:
            both = inside[:, None] & (dims < 2 * HALF)[None, :]
            other = tl.load(query + row[:, None] * HEAD_DIM + partner[None, :], mask=both, other=0.0).to(tl.float32)
            offset = (batch * cos_batch + (first_frame + frame).to(tl.int64) * HALF)[:, None] + angle[None, :]
            turned = turned * tl.load(cos + offset, mask=both, other=1.0)
            turned += other * (sign[None, :] * tl.load(sin + offset, mask=both, other=0.0))
        turned *= scaling
        product = tl.dot(turned.to(DOT), tl.trans(up), input_precision=PRECISION)
        target = (batch * frames + frame) * (heads * head_rows) + head * head_rows + row
        if absorbed.dtype.element_ty == tl.float16:
            product = tl.clamp(product, -65504.0, 65504.0)
        tl.store(
            absorbed + target[:, None] * positions + position[None, :],
            product.to(absorbed.dtype.element_ty),
            mask=inside[:, None],
        )
        if chunk == 0:
            tl.store(bias + target, tl.sum(turned * mean[None, :], 1), mask=inside)


@triton.jit(do_not_specialize=[*_SLOT_INTEGERS, "frames", "q_tokens", *_MASK_INTEGERS])
def absorbed_scores(
    out,  # [batch, rows, tiles * TILE] float32
    absorbed,  # [batch, frames, rows, positions]
    bias,  # [batch, frames, rows] float32
    mask,
    tiers,
    rows,  # query heads times query tokens
    tokens, frames, first_frame, frame_length, frame_tiles, tiles, q_tokens,
    mask_batch, mask_query, mask_token,
    factor,
    ROWS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of one tile of tokens for a block of rows: every code is unpacked once for all query heads."""
    tile, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    slot = tile * TILE + tl.arange(0, TILE)
    token, valid = _slot_tokens(slot, tiles * TILE, tokens, first_frame, frame_length, frame_tiles, TILE)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    line = (batch * frames + tile // frame_tiles) * rows + row
    absorbed += line * (all_chunks(tiers, CHUNK) * CHUNK)
    scores = tl.zeros((TILE, ROWS), tl.float32)
    for number in tl.static_range(len(tiers)):
        chunks = chunk_count(tiers[number], CHUNK)
        if chunks > 0:
            if tiers[number].bits < 16:
                # In units of this tiers[number]'s steps, so that one accumulator serves all tiers.
                scale = half_steps(tiers[number], batch, token, valid)
                scores = scores / scale[:, None]
            for chunk in tl.range(0, chunks):
                levels = load_levels(tiers[number], batch, token, valid, chunk, TILE, CHUNK, DOT)
                column = chunk * CHUNK + tl.arange(0, CHUNK)
                part = tl.load(absorbed[:, None] + column[None, :], mask=in_rows[:, None], other=0.0)
                scores = tl.dot(levels, tl.trans(part.to(DOT)), scores, input_precision=PRECISION)
            if tiers[number].bits < 16:
                scores = scores * scale[:, None]
        absorbed += chunks * CHUNK
    scores += tl.load(bias + line, mask=in_rows, other=0.0)[None, :]
    mask += batch * mask_batch
    scores = _finish(scores, row, token, valid, mask, mask_query, mask_token, q_tokens, factor, MASK, SOFTCAP)
    target = out + (batch * rows + row)[None, :] * (tiles * TILE) + slot[:, None]
    tl.store(target, scores, mask=in_rows[None, :])


@triton.jit(do_not_specialize=["head_rows", "q_tokens", *RECONSTRUCT_INTEGERS, *_MASK_INTEGERS])
def reconstructed_scores(
    out,  # [batch, heads * head_rows, tiles * TILE] float32
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
    ROWS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
    UP_DOT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Reconstruct one head's keys of one tile of tokens, rotate them, and score all of the head's queries."""
    tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    slot = tile * TILE + tl.arange(0, TILE)
    valid = slot < tokens
    one, two = reconstruct_pair(
        tiers, batch, slot, valid,
        up_proj + head.to(tl.int64) * (up_head * 8), up_rank, constant + head * HEAD_DIM,
        cos + batch * cos_batch, sin + batch * cos_batch, frame_length,
        HEAD_DIM, PAIRS, HALF, INTERLEAVED, TILE, CHUNK, UP_DOT, PRECISION,
    )  # fmt: skip
    first, second, in_pairs = pair_columns(0, HEAD_DIM, HALF, INTERLEAVED, PAIRS)
    one, two = one.to(DOT), two.to(DOT)
    mask += batch * mask_batch
    line = (batch * heads + head) * head_rows
    for start in tl.range(0, head_rows, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < head_rows)[:, None] & in_pairs[None, :]
        at = query + (line + row)[:, None] * HEAD_DIM
        q_one = tl.load(at + first[None, :], mask=inside, other=0.0).to(tl.float32) * scaling
        q_two = tl.load(at + second[None, :], mask=inside, other=0.0).to(tl.float32) * scaling
        scores = tl.dot(one, tl.trans(q_one.to(DOT)), input_precision=PRECISION)
        scores = tl.dot(two, tl.trans(q_two.to(DOT)), scores, input_precision=PRECISION)
        scores = _finish(scores, row, slot, valid, mask, mask_query, mask_token, q_tokens, factor, MASK, SOFTCAP)
        target = out + (line + row)[None, :] * (tl.num_programs(0) * TILE) + slot[:, None]
        tl.store(target, scores, mask=(row < head_rows)[None, :])


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
        token, valid = _slot_tokens(slot, slots, tokens, first_frame, frame_length, frame_tiles, TILE)
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


@triton.jit(do_not_specialize=[*_SLOT_INTEGERS, "row_blocks", "split_blocks", "first_split", "splits"])
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
