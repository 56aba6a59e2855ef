"""How Triton kernels take packed tiers as arguments, unpack them in registers, and number their channels.

Kernels walk a latent in chunks. A chunk is the same ``COLUMNS`` bytes of every token's row of one tier (numbers at 16
bits), with all planes of these bytes, one after another: plane ``p`` of byte ``j`` of a row is the tier's channel
``p * row_bytes + j``. Planes are multiplied apart, so that unpacking moves nothing between lanes. Tiers follow one
another from 16 bits down to 2, whatever the order of the channels, each padded to whole chunks. Latent vectors that
only kernels see (absorbed queries, values under accumulation) are stored by position, so every access to them is
aligned and contiguous; ``channel_of`` leads back.

Kernels take all tiers of a latent as one argument, a tuple of ``Tier``. Their integers are run-time values that Triton
must not specialise on, see ``unspecialised``: one compiled kernel serves all layers. Rows are given in units of 16
bytes, from which the compiler learns that they are aligned.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_cache.kernels.packed import BIT_WIDTHS, ROW_BYTES, LatentSide, PackedTier, RotaryFrames

COLUMNS = 64  # of a chunk: every token's bytes are loaded 16 at a time by four threads


def unspecialised(number: int) -> int:
    """``number`` as kernels take it inside a tuple; ``plain`` leads back.

    Triton compiles a kernel anew for integers that are 1 or multiples of 16, within tuples whatever
    ``do_not_specialize`` says. What is returned is neither.
    """
    return 2 * number + 3


class Tier(NamedTuple):
    """One tier of a latent in a kernel; integers are ``unspecialised`` in its arguments."""

    codes: Any  # points to the first row
    steps: Any  # points to the first one; any aligned float16 tensor at 16 bits
    row: Any  # length of a row in units of 16 bytes, 0 if the latent has no such tier
    codes_batch: Any  # strides in units of 16 bytes
    codes_token: Any
    steps_batch: Any  # strides in elements
    steps_token: Any
    start: Any  # the tier's first channel in the latent
    channels: Any  # how many it has
    bits: tl.constexpr  # their width
    planes: tl.constexpr  # channels of a byte; 1 at 16 bits


@dataclass(frozen=True)
class TierArguments:
    """What kernels are given of a latent."""

    tiers: tuple[Tier, ...]  # by ``BIT_WIDTHS``
    chunks: int  # of all tiers
    position_blocks: int  # of ``COLUMNS`` positions, that they take


def tier_arguments(tiers: tuple[PackedTier, ...]) -> TierArguments:
    """What kernels take of ``tiers``.

    ValueError if there is no tier, a width comes twice, or rows are not padded and aligned to 16 bytes.
    """
    if not tiers:
        raise ValueError("tiers must hold at least one tier, got none")
    by_bits = {tier.bits: tier for tier in tiers}
    if len(by_bits) < len(tiers):
        raise ValueError(f"tiers must have distinct widths among {BIT_WIDTHS}, got {[one.bits for one in tiers]}")
    starts = dict(zip(by_bits, accumulate((tier.channels for tier in tiers), initial=0), strict=False))
    for tier in tiers:
        codes = tier.codes
        used = [stride for length, stride in zip(codes.shape, codes.stride(), strict=True) if length > 1]
        lengths = [codes.shape[2], *[stride for stride in used if stride != 1], codes.storage_offset()]
        if codes.stride(2) != 1 or any(length * codes.element_size() % ROW_BYTES for length in lengths):
            raise ValueError(
                f"codes of the {tier.bits}-bit tier must be rows of {tier.channels} channels padded and aligned to "
                f"{ROW_BYTES} bytes, got {codes.dtype} of shape {tuple(codes.shape)}, strides {codes.stride()} and "
                f"offset {codes.storage_offset()}"
            )
    # An absent tier has rows of no length; its pointers are any that are aligned and of the right type.
    anything = tiers[0].codes
    arguments, chunks, position_blocks = [], 0, 0
    for bits in BIT_WIDTHS:
        found = by_bits.get(bits)
        codes = anything.view(torch.float16 if bits == 16 else torch.uint8) if found is None else found.codes
        steps = anything.view(torch.float16)[..., 0] if found is None or found.steps is None else found.steps
        unit = ROW_BYTES // codes.element_size()
        row = 0 if found is None else codes.shape[2] // unit
        strides = codes.stride(0) // unit, codes.stride(1) // unit, steps.stride(0), steps.stride(1)
        numbers = row, *strides, starts.get(bits, 0), 0 if found is None else found.channels
        planes = max(1, 8 // bits)
        widths = tl.constexpr(bits), tl.constexpr(planes)
        arguments.append(Tier._make((codes, steps, *map(unspecialised, numbers), *widths)))
        own = -(-row * unit // COLUMNS)
        chunks, position_blocks = chunks + own, position_blocks + own * planes
    return TierArguments(tuple(arguments), chunks, position_blocks)


def check_side(name: str, side: LatentSide) -> None:
    """Raise ValueError if a side's matrices do not fit its tiers, have a wrong head_dim, or differ by batch element."""
    shape, constant = side.up_proj.shape, side.constant.shape
    if len(shape) != 3 or len(constant) != 2:
        raise ValueError(
            f"up_proj and constant of {name} must be [rank, heads, head_dim] and [heads, head_dim] in Triton kernels, "
            f'the same for all batch elements, got {list(shape)} and {list(constant)}; impl="torch" takes one for each'
        )
    rank = sum(tier.channels for tier in side.tiers)
    if shape[0] != rank:
        raise ValueError(f"up_proj of {name} must have {rank} rows like its tiers, got {shape[0]}")
    if shape[2] % 16 or shape[2] > 256:
        raise ValueError(f"head_dim of {name} must be a multiple of 16 up to 256, got {shape[2]}")


def rotary_arguments(rope: RotaryFrames | None, anything: Tensor) -> dict[str, Any]:
    """Keyword arguments of every kernel that rotates; ``anything`` is a float32 tensor that stands in for tables."""
    if rope is None:
        return {"cos": anything, "sin": anything, "cos_batch": 0, "HALF": 0, "INTERLEAVED": False}
    cos, sin = rope.cos.contiguous(), rope.sin.contiguous()
    return {
        "cos": cos,
        "sin": sin,
        "cos_batch": 0 if len(cos) == 1 else cos.stride(0),
        "HALF": cos.shape[2],
        "INTERLEAVED": rope.layout == "interleaved",
    }


def up_proj_arguments(side: LatentSide) -> dict[str, Any]:
    """Keyword arguments of every kernel that reads an up-projection, its rotation included."""
    up_proj, constant = side.up_proj, side.constant.contiguous()
    if up_proj.stride(2) != 1 or up_proj.stride(0) % 8 or up_proj.stride(1) % 8 or up_proj.storage_offset() % 8:
        up_proj = up_proj.contiguous()
    return {
        "up_proj": up_proj,
        "up_rank": up_proj.stride(0) // 8,
        "up_head": up_proj.stride(1) // 8,
        "constant": constant,
        "heads": up_proj.shape[1],
        "HEAD_DIM": up_proj.shape[2],
        **rotary_arguments(side.rope, constant),
    }


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU, and not compiled."""
    return not isinstance(channel_of, triton.runtime.jit.JITFunction)


def warps(threads: int) -> int:
    """``num_warps`` for a number of threads of a program, on the current GPU."""
    return threads // (32 if interpreted() else triton.runtime.driver.active.get_current_target().warp_size)


def block(length: int, least: int, most: int) -> int:
    """A power of two that holds ``length``, between ``least`` and ``most``."""
    return min(max(least, triton.next_power_of_2(length)), most)


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """In which type products of matrices of ``dtype`` are taken."""
    if dtype == torch.bfloat16 and interpreted():
        return tl.float32  # the interpreter multiplies the bits of bfloat16 as integers
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(dtype, tl.float32)


def precision(exact: bool, three_parts: bool = False) -> str:
    """How products of float32 operands are taken: exactly, or on tensor cores with the 11 bits of float16.

    ``three_parts`` have an error near that of float32.
    """
    if exact or interpreted():
        return "ieee"
    target = triton.runtime.driver.active.get_current_target()
    if three_parts:
        return "tf32x3" if target.backend == "cuda" else "ieee"  # AMD's matrix cores multiply float32
    return "tf32" if target.backend == "cuda" or target.arch == "gfx942" else "ieee"


@triton.jit
def plain(number):
    """The integer that ``unspecialised`` was given."""
    return (number >> 1) - 1


@triton.jit
def chunk_count(tier, COLUMNS: tl.constexpr):
    """Chunks of a tier."""
    UNIT: tl.constexpr = 128 // tier.codes.dtype.element_ty.primitive_bitwidth
    return tl.cdiv(plain(tier.row) * UNIT, COLUMNS)


@triton.jit
def all_positions(tiers, COLUMNS: tl.constexpr):
    """Positions of all tiers."""
    count = 0
    for number in tl.static_range(len(tiers)):
        count += chunk_count(tiers[number], COLUMNS) * tiers[number].planes
    return count * COLUMNS


@triton.jit
def half_steps(tier, batch, token, valid):
    """Half of each token's step, to go with twice the levels: ``[TILE]`` float32, 1 where there is no token."""
    steps = tier.steps + batch * plain(tier.steps_batch)
    return 0.5 * tl.load(steps + token.to(tl.int64) * plain(tier.steps_token), mask=valid, other=2.0).to(tl.float32)


@triton.jit
def load_codes(tier, batch, token, valid, chunk, COLUMNS: tl.constexpr):
    """One chunk of a tier for some tokens, ``[TILE, COLUMNS]``: bytes, or numbers at 16 bits. All are finite."""
    UNIT: tl.constexpr = 128 // tier.codes.dtype.element_ty.primitive_bitwidth
    codes = tier.codes + batch * plain(tier.codes_batch) * UNIT
    column = chunk * COLUMNS + tl.arange(0, COLUMNS)
    offset = token.to(tl.int64) * (plain(tier.codes_token) * UNIT)
    inside = valid[:, None] & (column < plain(tier.row) * UNIT)[None, :]
    loaded = tl.load(codes + offset[:, None] + column[None, :], mask=inside, other=0)
    if tier.bits == 16:
        loaded = tl.where((column < plain(tier.channels))[None, :], loaded, 0.0)
    return loaded


@triton.jit
def plane_levels(tier, codes, plane: tl.constexpr, DOT: tl.constexpr):
    """One plane of what ``load_codes`` loaded: 16-bit latents as they are, else twice the levels.

    Twice a level is an odd integer of at most 8 bits: exact in every type.
    """
    if tier.bits == 16:
        if DOT == tl.float16 and codes.dtype != tl.float16:
            codes = tl.clamp(codes.to(tl.float32), -65504.0, 65504.0)
        return codes.to(DOT)
    else:
        TOP: tl.constexpr = 2**tier.bits - 1
        doubled = ((codes.to(tl.uint16) << 1) >> (plane * tier.bits)) & (2 * TOP)
        if DOT == tl.float32:
            return doubled.to(tl.float32) - TOP
        else:
            # float16 with the bits 0x6400 + n is 1024 + n: integers become numbers by an OR, at the full rate.
            halves = (doubled | 0x6400).to(tl.float16, bitcast=True) - (1024 + TOP)
            return halves.to(DOT)


@triton.jit
def plane_channels(tier, chunk, plane: tl.constexpr, COLUMNS: tl.constexpr):
    """The channels of one plane of a chunk: the latent's ``[COLUMNS]``, -1 where it has none."""
    UNIT: tl.constexpr = 128 // tier.codes.dtype.element_ty.primitive_bitwidth
    row = plain(tier.row) * UNIT
    column = chunk * COLUMNS + tl.arange(0, COLUMNS)
    channel = plane * row + column
    return tl.where((column < row) & (channel < plain(tier.channels)), plain(tier.start) + channel, -1)


@triton.jit
def _channel_of_tier(position, first, tier, COLUMNS: tl.constexpr):
    """The channels at some positions of a latent in which ``tier`` begins at ``first``, -1 where it has none."""
    UNIT: tl.constexpr = 128 // tier.codes.dtype.element_ty.primitive_bitwidth
    local, row = position - first, plain(tier.row) * UNIT
    column = local // (COLUMNS * tier.planes) * COLUMNS + local % COLUMNS
    channel = local // COLUMNS % tier.planes * row + column
    stored = (local >= 0) & (column < row) & (channel < plain(tier.channels))
    return tl.where(stored, plain(tier.start) + channel, -1)


@triton.jit
def channel_of(position, tiers, COLUMNS: tl.constexpr):
    """The channels at some positions of a latent, -1 at positions that only fill up a chunk."""
    first = 0
    channel = tl.full(position.shape, -1, tl.int32)
    for number in tl.static_range(len(tiers)):
        # A position lies in the row of one tier at most; the others say -1.
        channel = tl.maximum(channel, _channel_of_tier(position, first, tiers[number], COLUMNS))
        first += chunk_count(tiers[number], COLUMNS) * (tiers[number].planes * COLUMNS)
    return channel
