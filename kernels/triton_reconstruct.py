"""Keys or values from packed latents on GPUs: the same function as ``reference.reconstruct``, in one Triton kernel."""

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_cache.kernels.packed import LatentSide
from lowrank_cache.kernels.triton_scores import REBUILD_INTEGERS, pair_columns, rebuild_pair
from lowrank_cache.kernels.triton_tiers import (
    block,
    dot_dtype,
    interpreted,
    layout_names,
    make_tiers,
    precision,
    tier_arguments,
    tier_names,
    up_proj_arguments,
    warps,
)

__all__ = ["reconstruct"]


@triton.jit(do_not_specialize=[*REBUILD_INTEGERS, *tier_names(), *layout_names()])
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
    one, two = rebuild_pair(
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
