"""Attention over packed latents on GPUs: the same function as ``reference.latent_attention``, in Triton kernels.

Five steps: absorb the queries, once per rotary frame; scores; softmax-weighted sums of value latents by chunk of
channels and split of the tokens; combine the splits; up-project. Where a frame holds too few tokens to pay for the
absorption, keys are reconstructed tile by tile instead. Codes are unpacked in registers; keys and values never exist in
memory.

Numbers: float32 queries are computed in float32 throughout. Otherwise products take float16 operands (those with an
up-projection take its dtype, float32 ones at the precision of tensor cores) and float32 sums; levels are exact, and
absorbed queries and weights are rounded to float16. What is designed for which reason: docs/appendix.md, "The Triton
kernels".
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_cache.kernels.packed import LatentSide
from lowrank_cache.kernels.triton_attend import absorb, absorbed_scores, combine, project, reconstructed_scores, weigh
from lowrank_cache.kernels.triton_tiers import (
    TierArguments,
    block,
    check_side,
    dot_dtype,
    precision,
    tier_arguments,
    up_proj_arguments,
    warps,
)

_CHUNK = 128  # positions of a latent that are unpacked at once
_SMALL_CHUNK = 64  # where a tile of the up-projection has to lie beside it
_BLOCK = 64  # slots that are weighed at once
_ABSORBED_BYTES = 32 * 2**20  # of absorbed queries that exist at a time: they should stay in the GPU's L2 cache
_PROGRAMS = 512  # of `weigh` that are worth splitting the tokens for: a few for every multiprocessor
_LOG2E = math.log2(math.e)
_LONGEST_SPLIT = 2048  # slots; shorter splits write more partial sums than is worth their parallelism


@dataclass(frozen=True)
class _Step:
    """What every launch of one call shares."""

    query: Tensor
    key: LatentSide
    value: LatentSide
    keys: TierArguments
    values: TierArguments
    finish: dict[str, Any]  # how scores are capped and masked: arguments of every kernel that computes some
    products: dict[str, Any]  # how products without an up-projection are taken
    rows: int  # query heads times query tokens, query heads of one KV head side by side
    exact: bool  # whether everything is float32
    scaling: float

    @property
    def batch(self) -> int:
        return self.query.shape[0]


class _Wave(NamedTuple):
    """A range of frames whose scores are computed together, cut into tiles of tokens that cross no frame.

    What ``triton_attend._slot_tokens`` takes: ``frame_tiles`` in each frame, ``tiles`` in all of them.
    """

    first_frame: int
    frame_length: int
    frame_tiles: int
    tiles: int
    TILE: int

    @property
    def frames(self) -> int:
        return self.tiles // self.frame_tiles

    @property
    def slots(self) -> int:
        return self.tiles * self.TILE


def latent_attention(
    query: Tensor,
    key: LatentSide,
    value: LatentSide,
    *,
    scaling: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``reference.latent_attention``: same arguments, same results, in float32 whatever ``query`` is.

    ValueError if shapes do not fit together, matrices differ by batch element, or rows of codes are not padded and
    aligned to 16 bytes.
    """
    (batch, q_heads, q_tokens, _), exact = query.shape, query.dtype == torch.float32
    _check(query, key, value)
    output = torch.empty(batch, q_heads, q_tokens, value.up_proj.shape[2], dtype=torch.float32, device=query.device)
    lse = torch.empty(batch, q_heads, q_tokens, dtype=torch.float32, device=query.device)
    if key.tokens == 0:
        return output.zero_(), lse.fill_(-math.inf)
    step = _Step(
        query=query.contiguous(),
        key=key,
        value=value,
        keys=tier_arguments(key.tiers),
        values=tier_arguments(value.tiers),
        finish=_finish_arguments(mask, softcap, query, key.tokens),
        products={"DOT": tl.float32 if exact else tl.float16, "PRECISION": precision(exact)},
        rows=q_heads * q_tokens,
        exact=exact,
        scaling=scaling * _LOG2E if softcap is None else scaling / softcap,
    )
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
        _attend(step, output, lse)
    return output, lse


def _check(query: Tensor, key: LatentSide, value: LatentSide) -> None:
    for name, side in (("key", key), ("value", value)):
        check_side(name, side)
    heads, head_dim = key.up_proj.shape[1:]
    if query.shape[1] % heads or query.shape[3] != head_dim:
        raise ValueError(
            f"query must have a multiple of {heads} heads of {head_dim} numbers, got shape {tuple(query.shape)}"
        )
    if value.up_proj.shape[1] != heads or value.tokens != key.tokens:
        raise ValueError(
            f"value must have {heads} heads and {key.tokens} tokens like key, "
            f"got {value.up_proj.shape[1]} and {value.tokens}"
        )


def _finish_arguments(mask: Tensor | None, softcap: float | None, query: Tensor, tokens: int) -> dict[str, Any]:
    """What ``triton_attend._finish`` takes; ``MASK`` is ``"tokens"`` if all query tokens see the same."""
    kind, strides = "none", [0] * 4
    if mask is not None:
        mask = mask.expand(query.shape[0], 1, query.shape[2], tokens).view(torch.uint8)
        strides = list(mask.stride())
        kind = "tokens" if mask.shape[2] == 1 or strides[2] == 0 else "queries"
    return {
        "mask": query if mask is None else mask,
        "mask_batch": strides[0],
        "mask_query": strides[2],
        "mask_token": strides[3],
        "q_tokens": query.shape[2],
        "factor": 1.0 if softcap is None else softcap * _LOG2E,
        "MASK": kind,
        "SOFTCAP": softcap is not None,
    }


def _attend(step: _Step, output: Tensor, lse: Tensor) -> None:
    rope, tokens = step.key.rope, step.key.tokens
    heads = step.key.up_proj.shape[1]
    # Absorbing costs as much per frame as reconstructing costs per token, times a head's queries.
    reconstructed = rope is not None and rope.frame_length <= step.rows // heads
    frame_length = tokens if rope is None or reconstructed else rope.frame_length
    # The wider a tile of keys, the less often the up-projection is read.
    tile = block(frame_length, 16, 128 if reconstructed and step.query.shape[3] <= 128 else 64)
    # So many frames at a time that their absorbed queries stay small.
    frames, size = triton.cdiv(tokens, frame_length), 4 if step.exact else 2
    at_a_time = max(1, _ABSORBED_BYTES // (step.batch * step.rows * step.keys.chunks(_CHUNK) * _CHUNK * size))
    waves, frame_tiles = [], triton.cdiv(frame_length, tile)
    for first in range(0, frames, at_a_time):
        tiles = min(at_a_time, frames - first) * frame_tiles
        waves.append(_Wave(first, frame_length, frame_tiles, tiles, tile))
    chunks = step.values.chunks(_CHUNK)
    rows = block(step.rows, 16, 64)
    programs = step.batch * triton.cdiv(step.rows, rows) * chunks
    longest = sum(wave.slots for wave in waves) * programs / _PROGRAMS
    split = min(max(triton.cdiv(int(longest), _BLOCK), 1) * _BLOCK, _LONGEST_SPLIT)
    splits = [triton.cdiv(wave.slots, split) for wave in waves]
    partial = step.query.new_empty(step.batch, sum(splits), step.rows, chunks * _CHUNK, dtype=torch.float32)
    maxima = step.query.new_empty(step.batch, sum(splits), step.rows, dtype=torch.float32)
    sums = torch.empty_like(maxima)
    done = 0
    for wave, count in zip(waves, splits, strict=True):
        scores = step.query.new_empty(step.batch, step.rows, wave.slots, dtype=torch.float32)
        if reconstructed:
            _reconstructed_scores(step, wave, scores)
        else:
            _absorbed_scores(step, wave, scores)
        row_blocks = triton.cdiv(step.rows, rows)
        weigh[(chunks, count, step.batch * row_blocks)](
            partial=partial,
            maxima=maxima,
            sums=sums,
            scores=scores,
            tiers=step.values.tiers,
            rows=step.rows,
            row_blocks=row_blocks,
            tokens=tokens,
            split_blocks=split // _BLOCK,
            first_split=done,
            splits=partial.shape[1],
            ROWS=rows,
            BLOCK=_BLOCK,
            CHUNK=_CHUNK,
            # What compilers make of it: at 32 rows 128 threads need a quarter fewer instructions, at 16 they spill.
            num_warps=warps(128 if rows == 32 else 256),
            num_stages=2,
            **step.products,
            **wave._asdict(),
        )
        done += count
    _combine(step, partial, maxima, sums, output, lse)


def _absorbed_scores(step: _Step, wave: _Wave, scores: Tensor) -> None:
    up = up_proj_arguments(step.key)
    head_rows = step.rows // up["heads"]
    chunks = step.keys.chunks(_CHUNK)
    dtype = torch.float32 if step.exact else torch.float16
    absorbed = step.query.new_empty(step.batch, wave.frames, step.rows, chunks * _CHUNK, dtype=dtype)
    bias = step.query.new_empty(step.batch, wave.frames, step.rows, dtype=torch.float32)
    rows = block(wave.frames * head_rows, 16, 32)
    row_blocks = triton.cdiv(wave.frames * head_rows, rows)
    columns = chunks * (_CHUNK // _SMALL_CHUNK)
    # A program keeps its piece of the up-projection and walks over as many blocks of rows as still fill the GPU.
    steps = max(1, min(row_blocks, row_blocks * columns * step.batch * up["heads"] // (2 * _PROGRAMS)))
    absorb[(columns, triton.cdiv(row_blocks, steps), step.batch * up["heads"])](
        absorbed=absorbed,
        bias=bias,
        tiers=step.keys.tiers,
        query=step.query,
        head_rows=head_rows,
        frames=wave.frames,
        first_frame=wave.first_frame,
        chunks=columns,
        steps=steps,
        scaling=step.scaling,
        HEAD_BLOCK=triton.next_power_of_2(up["HEAD_DIM"]),
        ROWS=rows,
        CHUNK=_SMALL_CHUNK,
        LATENT_CHUNK=_CHUNK,
        DOT=tl.float32 if step.exact else dot_dtype(up["up_proj"].dtype),
        PRECISION=precision(step.exact),
        num_warps=warps(128),
        num_stages=1,
        **up,
    )
    rows = block(step.rows, 16, 64 if step.exact else 128)  # float32 tiles take twice the shared memory
    # So many threads that each loads 8 bytes of codes or more.
    threads = min(4 * wave.TILE, 128 if rows < 64 else 256)
    absorbed_scores[(wave.tiles, triton.cdiv(step.rows, rows), step.batch)](
        out=scores,
        absorbed=absorbed,
        bias=bias,
        tiers=step.keys.tiers,
        rows=step.rows,
        tokens=step.key.tokens,
        frames=wave.frames,
        ROWS=rows,
        CHUNK=_CHUNK,
        num_warps=warps(threads),
        num_stages=1 if wave.TILE < 32 else 2,  # 64 threads with a second stage spill on sm_80
        **wave._asdict(),
        **step.products,
        **step.finish,
    )


def _reconstructed_scores(step: _Step, wave: _Wave, scores: Tensor) -> None:
    up = up_proj_arguments(step.key)
    head_rows = step.rows // up["heads"]
    assert step.key.rope is not None
    reconstructed_scores[(wave.tiles, up["heads"], step.batch)](
        out=scores,
        query=step.query,
        tiers=step.keys.tiers,
        head_rows=head_rows,
        tokens=step.key.tokens,
        frame_length=step.key.rope.frame_length,
        scaling=step.scaling,
        PAIRS=block(up["HEAD_DIM"] // 2, 16, 128),
        ROWS=block(head_rows, 16, 64),
        TILE=wave.TILE,
        CHUNK=_SMALL_CHUNK // 2 if step.exact and up["HEAD_DIM"] > 128 else _SMALL_CHUNK,
        UP_DOT=tl.float32 if step.exact else dot_dtype(up["up_proj"].dtype),
        num_warps=warps(128 if up["HEAD_DIM"] <= 64 else 256),
        num_stages=2,
        **up,
        **step.products,
        **step.finish,
    )


def _combine(step: _Step, partial: Tensor, maxima: Tensor, sums: Tensor, output: Tensor, lse: Tensor) -> None:
    splits, chunks = partial.shape[1], partial.shape[3] // _CHUNK
    latents = step.query.new_empty(step.batch, step.rows, partial.shape[3], dtype=torch.float32)
    combine[(chunks, step.rows, step.batch)](
        latents=latents,
        lse=lse,
        partial=partial,
        maxima=maxima,
        sums=sums,
        rows=step.rows,
        splits=splits,
        chunks=chunks,
        SPLITS=16,
        CHUNK=_CHUNK,
        num_warps=warps(128),
    )
    up = up_proj_arguments(step.value)
    head_rows = step.rows // up["heads"]
    rows, columns = block(head_rows, 16, 64), block(up["HEAD_DIM"], 16, 64)
    project[(triton.cdiv(up["HEAD_DIM"], columns), triton.cdiv(head_rows, rows), step.batch * up["heads"])](
        out=output,
        latents=latents,
        lse=lse,
        tiers=step.values.tiers,
        head_rows=head_rows,
        chunks=partial.shape[3] // _SMALL_CHUNK,
        COLUMNS=columns,
        ROWS=rows,
        CHUNK=_SMALL_CHUNK,
        LATENT_CHUNK=_CHUNK,
        DOT=tl.float32 if step.exact else dot_dtype(up["up_proj"].dtype),
        PRECISION=precision(step.exact),
        num_warps=warps(128),
        num_stages=2,
        **{name: up[name] for name in ("up_proj", "up_rank", "up_head", "constant", "heads", "HEAD_DIM")},
    )
