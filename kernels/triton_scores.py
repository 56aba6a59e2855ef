"""Triton kernels for the scores of queries against packed keys: absorbed by frame, or with keys reconstructed.

Scores leave these kernels in units of log 2, masked, one row per query head and query token. Tokens are cut into tiles
that never cross a frame; a tile's unused slots hold -inf. ``slot_tokens`` finds the token of a slot.
"""

import triton
import triton.language as tl

from lowrank_cache.kernels.triton_reconstruct import RECONSTRUCT_INTEGERS, pair_columns, reconstruct_pair
from lowrank_cache.kernels.triton_tiers import all_chunks, channel_of, chunk_count, half_steps, load_levels

__all__ = ["SLOT_INTEGERS", "absorb", "absorbed_scores", "reconstructed_scores", "slot_tokens"]

_ABSORB_INTEGERS = ["head_rows", "heads", "frames", "first_frame", "cos_batch", "up_rank", "up_head", "chunks", "steps"]
SLOT_INTEGERS = ["rows", "tokens", "first_frame", "frame_length", "frame_tiles", "tiles"]
_MASK_INTEGERS = ["mask_batch", "mask_query", "mask_token"]


@triton.jit
def slot_tokens(slot, slots, tokens, first_frame, frame_length, frame_tiles, TILE: tl.constexpr):
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


@triton.jit
def _add_scores(
    scores, absorbed, in_rows, tier, batch, token, valid,
    TILE: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tier's share to scores ``[TILE, ROWS]``; ``absorbed`` points to each row's first position of the tier."""
    chunks = chunk_count(tier, CHUNK)
    if chunks > 0:
        if tier.bits < 16:
            # In units of this tier's steps, so that one accumulator serves all tiers.
            scale = half_steps(tier, batch, token, valid)
            scores = scores / scale[:, None]
        for chunk in tl.range(0, chunks):
            levels = load_levels(tier, batch, token, valid, chunk, TILE, CHUNK, DOT)
            column = chunk * CHUNK + tl.arange(0, CHUNK)
            part = tl.load(absorbed[:, None] + column[None, :], mask=in_rows[:, None], other=0.0)
            scores = tl.dot(levels, tl.trans(part.to(DOT)), scores, input_precision=PRECISION)
        if tier.bits < 16:
            scores = scores * scale[:, None]
    return scores


@triton.jit(do_not_specialize=[*SLOT_INTEGERS, "frames", "q_tokens", *_MASK_INTEGERS])
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
    token, valid = slot_tokens(slot, tiles * TILE, tokens, first_frame, frame_length, frame_tiles, TILE)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    in_rows = row < rows
    line = (batch * frames + tile // frame_tiles) * rows + row
    at = absorbed + line * (all_chunks(tiers, CHUNK) * CHUNK)
    scores = tl.zeros((TILE, ROWS), tl.float32)
    for number in tl.static_range(len(tiers)):
        scores = _add_scores(scores, at, in_rows, tiers[number], batch, token, valid, TILE, CHUNK, DOT, PRECISION)
        at += chunk_count(tiers[number], CHUNK) * CHUNK
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
