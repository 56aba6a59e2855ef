"""How Triton kernels take packed tiers as arguments, unpack them in registers, and number their channels.

Kernels walk a latent in chunks of ``CHUNK`` positions. A chunk is the same run of bytes of every token's row of one
tier, with all planes of these bytes: byte ``j`` and plane ``p`` stand at column ``j * planes + p`` of the chunk and
hold the tier's channel ``p * row_bytes + j``. Tiers follow one another from 16 bits down to 2, whatever the order of
the channels, each padded to whole chunks. Latent vectors that only kernels see (absorbed queries, values under
accumulation) are stored by position, so every access to them is aligned and contiguous; ``channel_of`` leads back.

Tier widths are run-time arguments that Triton must not specialise on: one compiled kernel serves all layers. Rows are
given in units of 16 bytes, from which the compiler learns that they are aligned.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowrank_cache.kernels.packed import ROW_BYTES, LatentSide, PackedTier, RotaryFrames

__all__ = [
    "TIER_BITS",
    "TierArguments",
    "block",
    "channel_of",
    "chunk_count",
    "dot_dtype",
    "half_steps",
    "interpreted",
    "layout_names",
    "load_levels",
    "make_tiers",
    "precision",
    "rotary_arguments",
    "three_part_precision",
    "tier_arguments",
    "tier_names",
    "up_proj_arguments",
    "warps",
]

TIER_BITS = (16, 8, 4, 2)

_TIER_INTEGERS = ("row", "codes_batch", "codes_token", "steps_batch", "steps_token")
_LAYOUT_INTEGERS = ("row", "start", "channels")


def tier_names() -> list[str]:
    """Arguments of kernels that read tiers which Triton must not specialise on."""
    return [f"{name}{bits}" for bits in TIER_BITS for name in _TIER_INTEGERS] + ["channels16"]


def layout_names() -> list[str]:
    """Arguments of kernels that map positions to channels which Triton must not specialise on."""
    return [f"{name}{bits}" for bits in TIER_BITS for name in _LAYOUT_INTEGERS]


@dataclass(frozen=True)
class TierArguments:
    """What kernels are given of a latent.

    Attributes:
        read: Keyword arguments of kernels that read tiers: pointers, strides, row lengths.
        layout: Keyword arguments of ``channel_of``.
        rows: Row length by width, in units of 16 bytes.
        unit: Elements of a 16-bit-tier row in 16 bytes: 8, or 4 if it is float32.
    """

    read: dict[str, Tensor | int]
    layout: dict[str, int]
    rows: dict[int, int]
    unit: int

    def chunks(self, chunk: int) -> int:
        """Chunks of ``chunk`` positions that all tiers take."""
        return sum(triton.cdiv(self.row_elements(bits) * max(1, 8 // bits), chunk) for bits in TIER_BITS)

    def row_elements(self, bits: int) -> int:
        return self.rows[bits] * (self.unit if bits == 16 else ROW_BYTES)


def tier_arguments(tiers: tuple[PackedTier, ...]) -> TierArguments:
    """Check that kernels can read ``tiers`` and lay out their arguments.

    Raises:
        ValueError: If a width is missing or comes twice, a tier lacks steps, or rows are not padded and aligned to
            16 bytes.
    """
    by_bits: dict[int, PackedTier] = {}
    starts, start = {}, 0
    for tier in tiers:
        if tier.bits not in TIER_BITS or tier.bits in by_bits:
            raise ValueError(f"tiers must have distinct widths among {TIER_BITS}, got {[one.bits for one in tiers]}")
        by_bits[tier.bits] = tier
        starts[tier.bits] = start
        start += tier.channels
        _check_rows(tier)
    if not by_bits:
        raise ValueError("tiers must hold at least one tier, got none")
    # An absent tier has rows of no length; its pointer is any that is aligned and of the right type.
    anything = next(iter(by_bits.values())).codes
    read: dict[str, Tensor | int] = {}
    layout: dict[str, int] = {}
    rows: dict[int, int] = {}
    unit = 8
    for bits in TIER_BITS:
        found = by_bits.get(bits)
        width = torch.float16 if bits == 16 else torch.uint8
        codes = anything.view(width) if found is None else found.codes
        steps = anything.view(torch.float16)[..., 0] if found is None or found.steps is None else found.steps
        per_row = ROW_BYTES // codes.element_size()
        if bits == 16:
            unit = per_row
        rows[bits] = 0 if found is None else codes.shape[2] // per_row
        read |= {
            f"codes{bits}": codes,
            f"steps{bits}": steps,
            f"row{bits}": rows[bits],
            f"codes_batch{bits}": codes.stride(0) // per_row,
            f"codes_token{bits}": codes.stride(1) // per_row,
            f"steps_batch{bits}": steps.stride(0),
            f"steps_token{bits}": steps.stride(1),
        }
        layout |= {
            f"row{bits}": rows[bits],
            f"start{bits}": starts.get(bits, 0),
            f"channels{bits}": 0 if found is None else found.channels,
        }
    read["channels16"] = layout["channels16"]
    del read["steps16"], read["steps_batch16"], read["steps_token16"]
    return TierArguments(read, layout, rows, unit)


def _check_rows(tier: PackedTier) -> None:
    codes = tier.codes
    size = codes.element_size()
    if tier.bits == 16:
        fits = codes.is_floating_point() and tier.channels <= codes.shape[2]
    else:
        fits = codes.dtype == torch.uint8 and tier.channels * tier.bits <= 8 * codes.shape[2]
        if tier.steps is None or tier.steps.dtype != torch.float16:
            raise ValueError(f"tiers of {tier.bits} bits must have float16 steps, got {tier.steps}")
    strides = [stride for length, stride in zip(codes.shape, codes.stride(), strict=True) if length > 1]
    lengths = [codes.shape[2], *[stride for stride in strides if stride != 1], codes.storage_offset()]
    if not fits or codes.stride(2) != 1 or any(length * size % ROW_BYTES for length in lengths):
        raise ValueError(
            f"codes of the {tier.bits}-bit tier must be rows of {tier.channels} channels padded and aligned to "
            f"{ROW_BYTES} bytes, got {codes.dtype} of shape {tuple(codes.shape)}, strides {codes.stride()} and "
            f"offset {codes.storage_offset()}"
        )


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


def precision(exact: bool) -> str:
    """How products of float32 operands are taken: exactly, or on tensor cores with the 11 bits of float16."""
    if exact or interpreted():
        return "ieee"
    target = triton.runtime.driver.active.get_current_target()
    return "tf32" if target.backend == "cuda" or target.arch == "gfx942" else "ieee"


def three_part_precision() -> str:
    """How products of float32 operands are taken on matrix cores with an error near that of float32."""
    if interpreted() or triton.runtime.driver.active.get_current_target().backend != "cuda":
        return "ieee"  # AMD's matrix cores multiply float32
    return "tf32x3"


# A tier in a kernel is a tuple (codes, steps, row, codes_token, steps_token, channels, chunks): pointers to one row of
# the batch, the row's length and strides in units of 16 bytes, of steps in elements. ``channels`` is 0 where a kernel
# needs it for the 16-bit tier alone.


@triton.jit
def chunk_count(row, unit, BITS: tl.constexpr, CHUNK: tl.constexpr):
    """Chunks of a tier whose rows are ``row`` times 16 bytes, of ``unit`` elements each."""
    COLUMNS: tl.constexpr = CHUNK * BITS // 8 if BITS < 16 else CHUNK
    return tl.cdiv(row * unit, COLUMNS)


@triton.jit
def _make_tier(
    codes, steps, batch, row, codes_batch, codes_token, steps_batch, steps_token, channels,
    BITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    UNIT: tl.constexpr = 128 // codes.dtype.element_ty.primitive_bitwidth
    codes += batch.to(tl.int64) * (codes_batch * UNIT)
    steps += batch.to(tl.int64) * steps_batch
    return codes, steps, row, codes_token, steps_token, channels, chunk_count(row, UNIT, BITS, CHUNK)


@triton.jit
def make_tiers(
    batch, codes16, codes8, codes4, codes2, steps8, steps4, steps2,
    row16, codes_batch16, codes_token16,
    row8, codes_batch8, codes_token8, steps_batch8, steps_token8,
    row4, codes_batch4, codes_token4, steps_batch4, steps_token4,
    row2, codes_batch2, codes_token2, steps_batch2, steps_token2,
    channels16, channels8, channels4, channels2, CHUNK: tl.constexpr,
):  # fmt: skip
    """The four tiers of one row of the batch."""
    return (
        _make_tier(codes16, steps8, batch, row16, codes_batch16, codes_token16, 0, 0, channels16, 16, CHUNK),
        _make_tier(codes8, steps8, batch, row8, codes_batch8, codes_token8, steps_batch8, steps_token8, channels8,
                   8, CHUNK),
        _make_tier(codes4, steps4, batch, row4, codes_batch4, codes_token4, steps_batch4, steps_token4, channels4,
                   4, CHUNK),
        _make_tier(codes2, steps2, batch, row2, codes_batch2, codes_token2, steps_batch2, steps_token2, channels2,
                   2, CHUNK),
    )  # fmt: skip


@triton.jit
def half_steps(tier, token, valid):
    """Half of each token's step, to go with twice the levels: ``[TILE]`` float32, 1 where there is no token."""
    return 0.5 * tl.load(tier[1] + token.to(tl.int64) * tier[4], mask=valid, other=2.0).to(tl.float32)


@triton.jit
def load_levels(
    tier, token, valid, chunk, BITS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, DOT: tl.constexpr
):
    """One chunk of a tier for some tokens as ``[TILE, CHUNK]``: 16-bit latents as they are, else twice the levels.

    Twice a level is an odd integer of at most 8 bits: exact in every type. Columns that hold no channel are finite.
    """
    codes, row = tier[0], tier[2]
    PLANES: tl.constexpr = 8 // BITS if BITS < 16 else 1
    COLUMNS: tl.constexpr = CHUNK // PLANES
    UNIT: tl.constexpr = 128 // codes.dtype.element_ty.primitive_bitwidth
    column = chunk * COLUMNS + tl.arange(0, COLUMNS)
    offset = token.to(tl.int64) * (tier[3] * UNIT)
    inside = valid[:, None] & (column < row * UNIT)[None, :]
    loaded = tl.load(codes + offset[:, None] + column[None, :], mask=inside, other=0)
    if BITS == 16:
        used = tl.where((column < tier[5])[None, :], loaded, 0.0)
        if DOT == tl.float16 and codes.dtype.element_ty != tl.float16:
            used = tl.clamp(used.to(tl.float32), -65504.0, 65504.0)
        return used.to(DOT)
    else:
        TOP: tl.constexpr = (1 << BITS) - 1
        planes = (tl.arange(0, PLANES) * BITS).to(tl.uint16)
        doubled = ((loaded.to(tl.uint16)[:, :, None] << 1) >> planes[None, None, :]) & (2 * TOP)
        doubled = tl.reshape(doubled, (TILE, CHUNK))
        if DOT == tl.float32:
            return doubled.to(tl.float32) - TOP
        else:
            # float16 with the bits 0x6400 + n is 1024 + n: integers become numbers by an OR, at the full rate.
            halves = (doubled | 0x6400).to(tl.float16, bitcast=True) - (1024 + TOP)
            return halves.to(DOT)


@triton.jit
def _local_channel(position, first, row, unit, start, channels, BITS: tl.constexpr, CHUNK: tl.constexpr):
    PLANES: tl.constexpr = 8 // BITS if BITS < 16 else 1
    COLUMNS: tl.constexpr = CHUNK // PLANES
    local = position - first
    column = local // CHUNK * COLUMNS + local % CHUNK // PLANES
    channel = local % PLANES * (row * unit) + column
    stored = (local >= 0) & (column < row * unit) & (channel < channels)
    return tl.where(stored, start + channel, -1)


@triton.jit
def channel_of(
    position,
    row16, start16, channels16, row8, start8, channels8, row4, start4, channels4, row2, start2, channels2,
    UNIT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The channels at some positions of a latent, -1 at positions that only fill up a chunk.

    ``UNIT`` is the number of elements of the 16-bit tier in 16 bytes.
    """
    first8 = chunk_count(row16, UNIT, 16, CHUNK) * CHUNK
    first4 = first8 + chunk_count(row8, 16, 8, CHUNK) * CHUNK
    first2 = first4 + chunk_count(row4, 16, 4, CHUNK) * CHUNK
    in16 = _local_channel(position, 0, row16, UNIT, start16, channels16, 16, CHUNK)
    in8 = _local_channel(position, first8, row8, 16, start8, channels8, 8, CHUNK)
    in4 = _local_channel(position, first4, row4, 16, start4, channels4, 4, CHUNK)
    in2 = _local_channel(position, first2, row2, 16, start2, channels2, 2, CHUNK)
    # A position lies in the row of one tier at most; the others say -1.
    return tl.maximum(tl.maximum(in16, in8), tl.maximum(in4, in2))
