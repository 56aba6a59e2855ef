"""Bases made from the prompt itself: one SVD for each sequence over a group of adjacent layers, no calibration.

The states of all layers of a group, side by side, are one wide matrix per prompt; its leading right
singular vectors are the basis, keys before rotation. They follow from the covariance of the states, so
the tokens × width matrix is never decomposed. Bases belong to batch elements: they follow them when these are
reordered, are forgotten with the tokens, and count in ``stored_bytes``. Source: xKV (arXiv:2503.18893). Mathematics
and what differs: docs/method.md, "xKV".
"""

import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lowrank_cache.artefact import SavedTensors, integer
from lowrank_cache.budget import Ranks, prompt_ranks
from lowrank_cache.coder import Coder, EncodingMatrices, ReadingMatrices
from lowrank_cache.hadamard import mixed_rotation
from lowrank_cache.kernels.packed import RotaryFrames
from lowrank_cache.shapes import BOTH, SIDES, Member, ModelShape, layer_groups

NEW_TOKENS = ("encode", "exact")
_FIT_TOKENS = 1024  # take a long prompt in pieces: its float32 copies stay small
_ITERATIONS = 4  # of the subspace iteration, each of which squares singular values


class PromptCoder(Coder):
    """The bases of one store, one for each batch element; none until a prompt was seen.

    They are made when the window would first give tokens away and at least as many tokens as the rank have come
    (a shorter prompt would take less room than its bases), from all tokens then in the window.

    Args:
        members: What the latent holds, from ``ModelShape.members``.
        rank: Channels of the latent; 0 for states that are kept exactly.
        bits: Of every channel; below 16 latents are rotated, see ``hadamard``.
        dtype: In which bases are held; products are float32 in any case.
        new_tokens: Whether tokens that come later are encoded with the same bases or kept exactly.
    """

    one_basis = False

    def __init__(self, members: Sequence[Member], rank: int, bits: int, dtype: torch.dtype, new_tokens: str = "encode"):
        super().__init__(members, ((bits, rank),) if rank else ())
        self.rank = rank
        self.bits = bits
        self.dtype = dtype
        self.new_tokens = new_tokens
        self.forget()

    def forget(self) -> None:
        """Drop the bases: the next prompt makes others."""
        self.up_projs: list[Tensor] = []  # by member [batch, rank, width], orthonormal rows over all members
        self.constants: list[Tensor] = []  # by member [batch, heads, 1, head_dim], mean of the prompt's states
        self.units = torch.empty(
            0, dtype=torch.float32, device="cpu"
        )  # [batch, 1, 1], root mean square of a latent before it is scaled to 1

    @property
    def fitted(self) -> bool:  # type: ignore[override]  # a property instead of a constant
        return bool(self.up_projs)

    @property
    def last(self) -> bool:  # type: ignore[override]
        return self.new_tokens == "exact"

    def encodes(self, waiting: int) -> bool:
        """Not states that are kept exactly, nor a prompt that is shorter than its bases."""
        if self.fitted:
            return not self.last
        return self.rank > 0 and waiting >= self.rank

    def fit(self, states: list[Tensor], frames: list[RotaryFrames | None], used: Tensor) -> None:
        if not self.fitted:
            self._make(*self._covariance(states, frames, used))

    def _covariance(
        self, states: list[Tensor], frames: list[RotaryFrames | None], used: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Covariance ``[batch, width, width]`` and mean ``[batch, width]`` float32, all members side by side."""
        batch, width = len(states[0]), sum(member.shape.width for member in self.members)
        second = states[-1].new_zeros(batch, width, width, dtype=torch.float32)
        total, count = second.new_zeros(batch, 1, width), second.new_zeros(batch, 1, 1)
        shift, block = None, -(-width // 4)
        for start in range(0, states[0].shape[2], _FIT_TOKENS):
            parts = []
            for dense, rope in zip(states, frames, strict=True):
                dense = dense[:, :, start : start + _FIT_TOKENS].to(second.device, torch.float32)
                dense = dense if rope is None else rope.rotated_into(dense, start)
                parts.append(dense.transpose(1, 2).flatten(2))
            rows = torch.cat(parts, dim=2)
            real = used[:, start : start + _FIT_TOKENS].to(rows.device)[..., None].float()
            if shift is None:  # near the mean: a large constant would drown the variation in rounding
                shift = (rows * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
            rows.sub_(shift).mul_(real)
            for begin in range(0, width, block):  # at and below the diagonal: the rest is its mirror image
                second[:, begin:, begin : begin + block].baddbmm_(
                    rows[..., begin:].mT, rows[..., begin : begin + block]
                )
            total += rows.sum(1, keepdim=True)
            count += real.sum(1, keepdim=True)
        mean = total / count.clamp(min=1)
        second = second.tril() + second.tril(-1).mT
        covariance = second / count.clamp(min=1) - mean.mT @ mean
        return covariance, (mean if shift is None else mean + shift)[:, 0]

    def _make(self, covariance: Tensor, mean: Tensor) -> None:
        if not bool(torch.isfinite(covariance).all()):
            raise ValueError(f"{self.name} must be finite, got NaN or infinity: the forward overflowed")
        directions, variance = leading_directions(covariance, self.rank)
        if self.bits < 16:
            directions = directions @ mixed_rotation(self.rank).to(directions.device)
        shapes = [member.shape for member in self.members]
        widths = [shape.width for shape in shapes]
        self.units = variance.mean(1).clamp(min=1e-30).sqrt()[:, None, None]
        self.constants = [
            part.unflatten(1, (shape.heads, 1, shape.head_dim)).to(self.dtype)
            for part, shape in zip(mean.split(widths, dim=1), shapes, strict=True)
        ]
        # Contiguous copies: the whole matrix is let go.
        self.up_projs = [part.mT.contiguous().to(self.dtype) for part in directions.split(widths, dim=1)]

    def encoding(self, device: torch.device) -> EncodingMatrices:
        up_proj = torch.cat([part.to(device) for part in self.up_projs], dim=2).float()
        constants = [constant.to(device, torch.float32).squeeze(2) for constant in self.constants]
        return EncodingMatrices(constants, up_proj.mT / self.units.to(device), up_proj.new_ones(self.rank))

    def reading(self, member: int, device: torch.device) -> ReadingMatrices:
        shape = self.members[member].shape
        up_proj = self.up_projs[member].to(device).unflatten(2, (shape.heads, shape.head_dim))
        constant = self.constants[member].to(device, torch.float32).squeeze(2)
        return ReadingMatrices(up_proj, constant, self.units.to(device))

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.fitted:
            self.units = function(self.units)
            self.up_projs = [function(part) for part in self.up_projs]
            self.constants = [function(part) for part in self.constants]

    def save(self, into: SavedTensors, name: str) -> dict[str, bool]:
        if self.fitted:
            for member, (up_proj, constant) in enumerate(zip(self.up_projs, self.constants, strict=True)):
                into.add(f"{name}.up_proj.{member}", up_proj)
                into.add(f"{name}.constant.{member}", constant)
            into.add(f"{name}.units", self.units)
        return {"fitted": self.fitted}

    def load(self, saved: SavedTensors, name: str, facts: Mapping, batch: int, device: torch.device) -> None:
        if facts["fitted"] is not True or not self.rank:
            return
        for number, member in enumerate(self.members):
            shape = member.shape
            size, mean = (batch, self.rank, shape.width), (batch, shape.heads, 1, shape.head_dim)
            self.up_projs.append(saved.take(f"{name}.up_proj.{number}", size, self.dtype, device))
            self.constants.append(saved.take(f"{name}.constant.{number}", mean, self.dtype, device))
        self.units = saved.take(f"{name}.units", (batch, 1, 1), torch.float32, device)

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        return sum(tensor.nbytes for tensor in (*self.up_projs, *self.constants, self.units))


def prompt_coders(
    shape: ModelShape,
    devices: Mapping[int, torch.device],
    compression_ratio: float,
    ranks: Ranks | None,
    bits: int | None,
    latent_dtype: torch.dtype | None,
    layer_group_size: int,
    new_tokens: str,
) -> list[PromptCoder]:
    """A coder for the keys and one for the values of every group of ``layer_group_size`` adjacent layers.

    A group ends where the model goes on on another of its ``devices``, of which a warning is given. ValueError if an
    argument is out of range or the ratio cannot be reached.
    """
    integer(layer_group_size, "layer_group_size", 1)
    if new_tokens not in NEW_TOKENS:
        raise ValueError(f"new_tokens must be one of {NEW_TOKENS}, got {new_tokens!r}")
    groups = layer_groups(shape, BOTH, layer_group_size, devices)
    if groups != layer_groups(shape, BOTH, layer_group_size):
        warnings.warn(f"layer groups were split where layers lie on different devices: {groups}", stacklevel=3)
    pairs = prompt_ranks(shape, groups, compression_ratio, ranks, bits)
    return [
        PromptCoder(shape.members(side, group), rank, bits or 16, latent_dtype or torch.float32, new_tokens)
        for group, pair in zip(groups, pairs, strict=True)
        for side, rank in zip(SIDES, pair, strict=True)
    ]


def leading_directions(covariance: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The ``rank`` leading eigenvectors and eigenvalues of symmetric matrices, largest first.

    Of positive semi-definite ``[batch, width, width]`` float32: ``[batch, width, rank]`` with orthonormal columns, and
    ``[batch, rank]``, non-negative. Few of many are found by subspace iteration from a fixed start, which costs
    ``2 · width² · rank`` operations a step; others by a full decomposition.
    """
    width = covariance.shape[-1]
    trial = rank + max(16, rank // 8)
    if 3 * trial >= width:
        values, vectors = torch.linalg.eigh(covariance)
        return vectors[..., -rank:].flip(-1), values[..., -rank:].flip(-1).clamp(min=0)
    start = torch.randn(
        width, trial, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32, device="cpu"
    )
    subspace = start.to(covariance).expand(len(covariance), -1, -1)
    for _ in range(_ITERATIONS):
        subspace = torch.linalg.qr(covariance @ subspace).Q
    values, inner = torch.linalg.eigh(subspace.mT @ covariance @ subspace)
    return subspace @ inner[..., -rank:].flip(-1), values[..., -rank:].flip(-1).clamp(min=0)
