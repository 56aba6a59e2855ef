"""What the latent operations read: packed tiers, a side's up-projection, and its rotary frames.

Plain holders of tensors, shared by the reference, the torch path and the Triton kernels.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lowrank_cache.kernels.rope import spread_tables

__all__ = ["ROW_BYTES", "LatentSide", "PackedTier", "RotaryFrames", "padded_channels"]

ROW_BYTES = 16  # a row of codes that starts on a multiple of it can be loaded 16 bytes at a time


def padded_channels(bits: int, channels: int) -> int:
    """Channels of a tier after padding its row to ``ROW_BYTES``; a 16-bit tier counts two bytes a channel."""
    granule = ROW_BYTES * 8 // bits
    return -(-channels // granule) * granule


@dataclass(frozen=True)
class PackedTier:
    """The channels of a latent that have the same width, for a range of tokens.

    Attributes:
        bits: 16, 8, 4 or 2.
        channels: In use; a row may be longer, padded to 16 bytes.
        codes: ``[batch, tokens, row]``: uint8 as ``reference.pack`` lays them out, or floating at 16 bits. Rows are
            contiguous; batch and tokens may be strided (a view of a growing buffer).
        steps: ``[batch, tokens]`` float16, one a token; None at 16 bits.

    Raises:
        ValueError: If the width is unknown, or the tensors are not as above: a row too short for its channels,
            another dtype, steps of other tokens.
    """

    bits: int
    channels: int
    codes: Tensor
    steps: Tensor | None

    def __post_init__(self):
        if self.bits not in (16, 8, 4, 2):
            raise ValueError(f"bits of a tier must be one of (16, 8, 4, 2), got {self.bits!r}")
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
        if self.codes.device == device:
            return self
        return replace(self, codes=self.codes.to(device), steps=None if self.steps is None else self.steps.to(device))


@dataclass(frozen=True)
class RotaryFrames:
    """How stored keys are rotated: consecutive tokens in frames, each with the rotation of its first slot.

    Attributes:
        cos, sin: ``[1 or batch, frames, rotary_dim / 2]`` float32, of each frame's first position.
        frame_length: Tokens per frame; token ``t`` of the latents lies in frame ``t // frame_length``. The last
            frame may be shorter.
        layout: ``"half"`` or ``"interleaved"``, see ``rope.rotate``.
    """

    cos: Tensor
    sin: Tensor
    frame_length: int
    layout: str
    _spread: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    def spread(self, head_dim: int) -> tuple[Tensor, Tensor]:
        """``rope.spread_tables`` as ``[1 or batch, frames, 1, head_dim]``, made once for all layers of a forward."""
        if head_dim not in self._spread:
            cos, sin = spread_tables(self.cos, self.sin, head_dim, self.layout)
            self._spread[head_dim] = cos[:, :, None], sin[:, :, None]
        return self._spread[head_dim]

    def tables(self) -> list[Tensor]:
        """Every tensor that is held."""
        return [self.cos, self.sin, *(table for pair in self._spread.values() for table in pair)]


@dataclass(frozen=True)
class LatentSide:
    """One layer's keys or values as they are stored: ``x = latent @ up_proj + constant``, keys in their frames.

    Attributes:
        tiers: The latent's channels in order. Keys and values that share a latent hold the same tiers.
        up_proj: ``[rank, heads, head_dim]``, float32 or half precision.
        constant: ``[heads, head_dim]`` float32, the calibrated mean.
        rope: None for values and for keys without a rotary embedding.
    """

    tiers: tuple[PackedTier, ...]
    up_proj: Tensor
    constant: Tensor
    rope: RotaryFrames | None = None

    def between(self, start: int, stop: int) -> "LatentSide":
        """A view of tokens ``start`` to ``stop``; ``start`` must be the first of a frame."""
        tiers = tuple(
            replace(
                tier, codes=tier.codes[:, start:stop], steps=None if tier.steps is None else tier.steps[:, start:stop]
            )
            for tier in self.tiers
        )
        rope = self.rope
        if rope is not None:
            frames = slice(start // rope.frame_length, -(-stop // rope.frame_length))
            rope = RotaryFrames(rope.cos[:, frames], rope.sin[:, frames], rope.frame_length, rope.layout)
        return replace(self, tiers=tiers, rope=rope)

    @property
    def tokens(self) -> int:
        return self.tiers[0].codes.shape[1] if self.tiers else 0
