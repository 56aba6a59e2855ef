"""Rotate latent channels before they are quantized, so that one step serves all of them.

Uniform bits give every channel of a tier the same step. Principal components differ in size by orders of
magnitude, so the largest sets the step and the smallest vanish below it; a Hadamard rotation spreads
each of them over many channels of equal size. It is folded into the bases and costs nothing at run time.
Mathematics: docs/method.md, "Uniform bits".
"""

from functools import reduce

import torch
from torch import Tensor

SCALE_FLOOR = 1e-4  # of the largest channel: what hardly varies is stored, but not blown up on reading


def hadamard_blocks(rank: int) -> list[int]:
    """Block sizes for ``rank`` channels: powers of two, largest first.

    A rank that is a multiple of 16 is cut into blocks of ``16 · 2^k``; another ends in blocks of 8, 4, 2 or 1.
    """
    return [1 << bit for bit in reversed(range(rank.bit_length())) if rank >> bit & 1]


def channel_mixing(size: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    """Matrices that take latents of unit variance to rotated ones of equal size, and back.

    Channels are first given the size they have in the states, then rotated by ``mixed_rotation``. Returns ``mix`` and
    ``unmix``, ``[rank, rank]`` float32, inverse to each other: latents are stored as ``z @ mix``.

    Args:
        size: ``[rank]`` float32, non-negative, descending: root of what a unit of squared latent error costs.
        unit: That size which becomes 1; the same for all bases that share a step.
    """
    size = size.clamp(min=SCALE_FLOOR * float(size.max().clamp(min=1e-30))) / unit
    rotation = mixed_rotation(len(size))
    return size[:, None] * rotation, rotation.T / size


def mixed_rotation(rank: int) -> Tensor:
    """Orthogonal matrix ``[rank, rank]`` float32: channels sorted by size in its rows, rotated ones in its columns.

    Channels are dealt to the blocks in turn, so that each holds large and small ones, then each is rotated.

    Source: Palu (arXiv:2407.21118) and QuaRot (arXiv:2404.00456) for the rotation. Differs: channels are dealt
    over blocks; there the blocks follow the order of the singular values.
    """
    blocks = hadamard_blocks(rank)
    # The k-th of a block's b places stands at (k + 1/2) / b of the way: sorting these deals channels evenly.
    places = torch.cat([(torch.arange(block, device="cpu").double() + 0.5) / block for block in blocks])
    return torch.block_diag(*(_hadamard(block) for block in blocks))[places.argsort(stable=True)]


def _hadamard(block: int) -> Tensor:
    """Sylvester's matrix, orthogonal and symmetric."""
    factors = [torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float32, device="cpu")] * (block.bit_length() - 1)
    return reduce(torch.kron, factors, torch.ones(1, 1, dtype=torch.float32, device="cpu")) / block**0.5
