"""What the latent operations read: packed tiers, a side's up-projection, and its rotary frames.

Plain holders of tensors, shared by the reference, the torch path and the Triton kernels.
"""

from dataclasses import dataclass

from torch import Tensor

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
    """

    bits: int
    channels: int
    codes: Tensor
    steps: Tensor | None


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

    @property
    def tokens(self) -> int:
        return self.tiers[0].codes.shape[1] if self.tiers else 0
