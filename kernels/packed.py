"""The format of stored latents, and what the operations over them take.

A token's latent is a row of channels sorted into tiers by bit width. The 16-bit tier is stored in a floating dtype; the
8, 4 and 2-bit tiers hold symmetric mid-rise levels packed into bytes, with one float16 step per token and tier.
Everything here is eager torch on any device. Mathematics: docs/method.md, "The quantizer".
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lowrank_cache.kernels.rope import rotate, spread_tables

BIT_WIDTHS = (16, 8, 4, 2)
QUANTIZED_BITS = BIT_WIDTHS[1:]
STEP_BYTES = 2  # one float16 step per token and quantized tier
ROW_BYTES = 16  # a row of codes that starts on a multiple of it can be loaded 16 bytes at a time

# Trial steps as fractions of the step at which nothing is clipped, which 8 bits keep: coarse tiers gain from clipping.
STEP_FRACTIONS = {8: (1.0,), 4: (0.6, 0.7, 0.8, 0.9, 1.0), 2: (0.45, 0.55, 0.65, 0.75, 0.85, 1.0)}


def padded_channels(bits: int, channels: int) -> int:
    """Channels of a tier after padding its row to ``ROW_BYTES``; a 16-bit tier counts two bytes a channel."""
    granule = ROW_BYTES * 8 // bits
    return -(-channels // granule) * granule


def row_length(bits: int, channels: int) -> int:
    """Elements of ``PackedTier.codes`` a token: numbers at 16 bits, bytes below."""
    return padded_channels(bits, channels) // (1 if bits == 16 else 8 // bits)


def tier_bytes(bits: int, channels: int, latent_dtype: torch.dtype = torch.float16) -> int:
    """Bytes per token of a tier, padding and step included; a 16-bit tier is stored in ``latent_dtype``."""
    if not channels:
        return 0
    return row_length(bits, channels) * (latent_dtype.itemsize if bits == 16 else 1) + (STEP_BYTES if bits < 16 else 0)


@dataclass(frozen=True)
class PackedTier:
    """The channels of a latent that have the same width, for a range of tokens; ValueError unless all is as below."""

    bits: int  # 16, 8, 4 or 2
    channels: int  # in use; a row may be longer, padded to 16 bytes
    # [batch, tokens, row], uint8 as `pack` lays them out, or floating at 16 bits. Rows are contiguous; batch and tokens
    # may be strided (a view of a growing buffer).
    codes: Tensor
    steps: Tensor | None  # [batch, tokens] float16, one a token; None at 16 bits

    def __post_init__(self):
        if self.bits not in BIT_WIDTHS:
            raise ValueError(f"bits of a tier must be one of {BIT_WIDTHS}, got {self.bits!r}")
        codes, steps = self.codes, self.steps
        per_row = 1 if self.bits == 16 else 8 // self.bits
        if codes.dim() != 3 or not 0 < self.channels <= codes.shape[2] * per_row:
            raise ValueError(
                f"codes of a {self.bits}-bit tier must have shape [batch, tokens, row] with room for {self.channels} "
                f"channels, got {list(codes.shape)}"
            )
        if codes.is_floating_point() != (self.bits == 16) or (self.bits < 16 and codes.dtype != torch.uint8):
            expected = "floating" if self.bits == 16 else "torch.uint8"
            raise ValueError(f"codes of a {self.bits}-bit tier must be {expected}, got {codes.dtype}")
        if (steps is None) != (self.bits == 16):
            raise ValueError(f"steps must be given below 16 bits and only there, got {steps!r} at {self.bits} bits")
        if steps is not None and (steps.dtype != torch.float16 or steps.shape != codes.shape[:2]):
            raise ValueError(
                f"steps must be float16 of shape {list(codes.shape[:2])}, one a token, got {steps.dtype} of shape "
                f"{list(steps.shape)}"
            )

    def to(self, device: torch.device) -> "PackedTier":
        """The same tier on ``device``; itself if it lies there."""
        return self if self.codes.device == device else self.mapped(lambda tensor: tensor.to(device))

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "PackedTier":
        """The same tier with ``function`` of its codes and of its steps."""
        return replace(self, codes=function(self.codes), steps=None if self.steps is None else function(self.steps))


@dataclass(frozen=True)
class RotaryFrames:
    """How stored keys are rotated: consecutive tokens in frames, each with the rotation of its first slot."""

    cos: Tensor  # [1 or batch, frames, rotary_dim / 2] float32, of each frame's first position; so is `sin`
    sin: Tensor
    frame_length: int  # token t of the latents lies in frame t // frame_length; the last frame may be shorter
    layout: str  # "half" or "interleaved", see `rope.rotate`
    _made: dict[str | int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    def spread(self, head_dim: int) -> tuple[Tensor, Tensor]:
        """``rope.spread_tables`` as ``[1 or batch, frames, 1, head_dim]``, made once for all layers of a forward."""
        if head_dim not in self._made:
            cos, sin = spread_tables(self.cos, self.sin, head_dim, self.layout)
            self._made[head_dim] = cos[:, :, None], sin[:, :, None]
        return self._made[head_dim]

    def by_token(self) -> tuple[Tensor, Tensor]:
        """Cosine and sine ``[1 or batch, 1, frames * frame_length, rotary_dim / 2]``, made once: one row a token."""
        if self.frame_length == 1:
            return self.cos[:, None], self.sin[:, None]
        if "token" not in self._made:
            cos, sin = (table.repeat_interleave(self.frame_length, dim=1)[:, None] for table in (self.cos, self.sin))
            self._made["token"] = cos, sin
        return self._made["token"]

    def forget_tokens(self) -> None:
        """Drop what ``by_token`` made, as large as one head's dense keys."""
        self._made.pop("token", None)

    def rotated_into(self, states: Tensor, start: int = 0) -> Tensor:
        """``states`` of tokens from ``start`` on, rotated from their positions into their frames.

        They are ``[batch, heads, tokens, head_dim]`` float32, post-RoPE.
        """
        cos, sin = (table[:, :, start : start + states.shape[2]] for table in self.by_token())
        return rotate(states, cos, sin, self.layout, inverse=True)

    def rotated_out(self, states: Tensor) -> Tensor:
        """``states`` of the first tokens, rotated from their frames to their positions; undoes ``rotated_into``."""
        cos, sin = (table[:, :, : states.shape[2]] for table in self.by_token())
        return rotate(states, cos, sin, self.layout)

    def tables(self) -> list[Tensor]:
        """Every tensor that is held."""
        return [self.cos, self.sin, *(table for pair in self._made.values() for table in pair)]


@dataclass(frozen=True)
class LatentSide:
    """One layer's keys or values as they are stored: ``x = latent @ up_proj + constant``, keys in their frames."""

    tiers: tuple[PackedTier, ...]  # channels in order; keys and values that share a latent hold the same
    # [rank, heads, head_dim], float32 or half precision; with a batch axis before where each element has its own basis
    up_proj: Tensor
    constant: Tensor  # [heads, head_dim] or [batch, heads, head_dim] float32, the mean of the states
    rope: RotaryFrames | None = None  # None for values and for keys without a rotary embedding
    scale: Tensor | None = None  # [batch, 1, 1] float32: what latents are multiplied with; None for 1
    size: tuple[int, int] = (0, 0)  # batch elements and tokens, where no channel is stored and `tiers` cannot tell
    # What reading the tiers gave, kept for the other sides that are given the same dict.
    shared: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)
    # What an implementation laid out for calls with this very side, by kind of call.
    plans: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def between(self, start: int, stop: int) -> "LatentSide":
        """A view of tokens ``start`` to ``stop``; ``start`` must be the first of a frame."""
        tiers = tuple(tier.mapped(lambda tensor: tensor[:, start:stop]) for tier in self.tiers)
        rope = self.rope
        if rope is not None:
            frames = slice(start // rope.frame_length, -(-stop // rope.frame_length))
            rope = RotaryFrames(rope.cos[:, frames], rope.sin[:, frames], rope.frame_length, rope.layout)
        return replace(self, tiers=tiers, rope=rope, size=(self.size[0], stop - start), shared={}, plans={})

    @property
    def tokens(self) -> int:
        return self.tiers[0].codes.shape[1] if self.tiers else self.size[1]

    def read(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The latents, dequantized: ``[batch, tokens, rank]`` in ``dtype``."""
        if not self.tiers:
            return self.up_proj.new_zeros(*self.size, 0, dtype=dtype)
        latents = read_latents(self.tiers, dtype)
        return latents if self.scale is None else latents * self.scale.to(dtype)

    def read_once(self) -> Tensor:
        """``read`` in float32, kept in ``shared``."""
        if "latents" not in self.shared:
            self.shared["latents"] = self.read()
        return self.shared["latents"]


@dataclass(frozen=True)
class StoredSide:
    """One layer's keys or values, at the time of its update."""

    sinks: Tensor  # [batch, heads, sinks, head_dim] exact
    latents: LatentSide | None  # the tokens between sinks and tail; None while there are none
    tail: Tensor  # [batch, heads, tokens, head_dim] exact: the window and the forward's own tokens


def tiles(
    key: LatentSide, value: LatentSide, mask: Tensor | None, length: int
) -> Iterator[tuple[LatentSide, LatentSide, Tensor | None]]:
    """Keys, values and mask ``[..., tokens]`` or ``[..., 1]`` by tiles of ``length`` tokens, whole frames."""
    for start in range(0, key.tokens, length):
        stop = min(start + length, key.tokens)
        seen = mask if mask is None or mask.shape[-1] == 1 else mask[..., start:stop]
        yield key.between(start, stop), value.between(start, stop), seen


def pack_latents(
    latents: Tensor, tiers: tuple[tuple[int, int], ...], weight: Tensor, latent_dtype: torch.dtype
) -> tuple[PackedTier, ...]:
    """Quantize and pack every tier. A 16-bit tier is cut off at the largest number of its dtype.

    Args:
        latents: ``[batch, tokens, rank]`` float32.
        tiers: ``(bits, channels)`` in the order of the channels, each width once.
        weight: ``[rank]`` float32: what a squared error in each channel costs.
        latent_dtype: Floating dtype of a 16-bit tier.

    Raises:
        ValueError: If a latent is not finite.
    """
    if not bool(torch.isfinite(latents).all()):
        raise ValueError("states must be finite, got NaN or infinity: the forward overflowed")
    packed, sizes = [], [channels for _, channels in tiers]
    for (bits, channels), tier, cost in zip(tiers, latents.split(sizes, -1), weight.split(sizes), strict=True):
        padding = (0, padded_channels(bits, channels) - channels)
        if bits == 16:
            limit = min(torch.finfo(latent_dtype).max, torch.finfo(tier.dtype).max)
            packed.append(PackedTier(bits, channels, pad(tier.clamp(-limit, limit).to(latent_dtype), padding), None))
        else:
            levels, steps = quantize(tier, bits, cost)
            packed.append(PackedTier(bits, channels, pack(pad(levels, padding), bits), steps))
    return tuple(packed)


def quantize(latents: Tensor, bits: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize each token's channels with one step, chosen to minimise the weighted squared error.

    Level ``q`` in ``[0, 2**bits)`` stands for ``(q - 2**(bits-1) + 0.5) * step`` (mid-rise: zero is
    not a level, so two bits give four useful ones).

    Args:
        latents: ``[batch, tokens, channels]``, float32, finite, about unit variance per channel.
        bits: 8, 4 or 2.
        weight: ``[channels]``, float32, non-negative: what a squared error in each channel costs.

    Returns:
        ``codes``: ``[batch, tokens, channels]`` uint8, and ``steps``: ``[batch, tokens]`` float16.

    Raises:
        ValueError: If ``bits`` is not a quantized width.
    """
    if bits not in QUANTIZED_BITS:
        raise ValueError(f"bits must be one of {QUANTIZED_BITS}, got {bits}")
    half_levels = 2 ** (bits - 1)
    weight = weight / weight.amax(-1, keepdim=True).clamp(min=1e-30)  # only ratios matter; tiny ones would underflow
    # A step below float16's smallest normal number would round to zero and make every level zero.
    unclipped = (latents.abs().amax(-1) / half_levels).clamp_(min=2**-14)
    best_steps, best_error = unclipped, torch.full_like(unclipped, torch.inf)
    for fraction in STEP_FRACTIONS[bits] if bits < 8 else ():
        levels = _nearest_level(latents, unclipped * fraction, half_levels)
        # The least-squares step for these levels, then the error with it.
        weighted = levels * weight
        fitted = (weighted * latents).sum(-1) / (weighted * levels).sum(-1).clamp_(min=1e-12)
        fitted = fitted.clamp_(min=2**-14)
        error = ((levels * fitted[..., None] - latents).square_() * weight).sum(-1)
        better = error < best_error
        best_steps = torch.where(better, fitted, best_steps)
        best_error = torch.where(better, error, best_error)
    stored_steps = best_steps.clamp(max=torch.finfo(torch.float16).max).to(torch.float16)
    levels = _nearest_level(latents, stored_steps.float(), half_levels)
    return (levels + (half_levels - 0.5)).to(torch.uint8), stored_steps


def _nearest_level(latents: Tensor, steps: Tensor, half_levels: int) -> Tensor:
    levels = torch.floor_(latents / steps[..., None]).add_(0.5)
    return levels.clamp_(min=0.5 - half_levels, max=half_levels - 0.5)


def dequantize(codes: Tensor, steps: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values that ``quantize`` stored: ``[batch, tokens, channels]`` in ``dtype``."""
    offset = 2 ** (bits - 1) - 0.5
    return codes.to(dtype).sub_(offset).mul_(steps[..., None].to(dtype))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack ``bits``-wide codes into bytes, planar within a row.

    Byte ``j`` of a row of ``n`` bytes holds channels ``j, j + n, j + 2n, ...`` from its lowest bits
    up, so that unpacking is one shift and mask per plane and each plane is contiguous.

    Args:
        codes: ``[..., channels]`` uint8, each below ``2**bits``; ``channels`` divisible by ``8/bits``.
        bits: 8, 4 or 2.

    Returns:
        ``[..., channels * bits / 8]`` uint8.
    """
    planes = 8 // bits
    if planes == 1:
        return codes
    codes = codes.unflatten(-1, (planes, -1))
    packed = codes[..., 0, :].clone()
    for plane in range(1, planes):
        packed |= codes[..., plane, :] << (plane * bits)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Undo ``pack``: ``[..., bytes]`` uint8 → ``[..., bytes * 8 / bits]`` uint8."""
    planes = 8 // bits
    if planes == 1:
        return packed
    mask = 2**bits - 1
    return torch.cat([(packed >> (plane * bits)) & mask for plane in range(planes)], dim=-1)


def read_latents(tiers: tuple[PackedTier, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Unpack and dequantize all tiers: ``[batch, tokens, rank]`` in ``dtype``."""
    parts = []
    for tier in tiers:
        if tier.steps is None:
            parts.append(tier.codes[..., : tier.channels].to(dtype))
        else:
            codes = unpack(tier.codes, tier.bits)[..., : tier.channels]
            parts.append(dequantize(codes, tier.steps, tier.bits, dtype))
    return torch.cat(parts, dim=-1)
