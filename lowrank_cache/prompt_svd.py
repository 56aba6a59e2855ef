"""Bases made from the prompt itself: one SVD for each row over a group of adjacent layers, no calibration.

The states of all layers of a group, side by side, are one wide matrix per prompt; its leading right
singular vectors are the basis, keys before rotation. They follow from the covariance of the states, so
the tokens × width matrix is never decomposed. Bases belong to rows: they follow them when rows are reordered, are
forgotten with the tokens, and count in ``stored_bytes``. Source: xKV (arXiv:2503.18893). Mathematics and
what differs: docs/method.md, "xKV".
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowrank_cache.allocation import BIT_WIDTHS, Ranks, check_compression_ratio
from lowrank_cache.budget import tier_bytes
from lowrank_cache.hadamard import mixed_rotation
from lowrank_cache.models import SIDES, ModelShape, SideShape, layer_groups
from lowrank_cache.positions import PositionTrack
from lowrank_cache.saved_tensors import SavedTensors
from lowrank_cache.store import LatentStore, StoreOptions

__all__ = ["NEW_TOKENS", "PromptCoder", "PromptStore", "leading_directions", "prompt_ranks", "prompt_stores"]

NEW_TOKENS = ("encode", "exact")
VALUE_SHARE = 1.5  # value rank over key rank, as in the paper
_FIT_TOKENS = 1024  # take a long prompt in pieces: its float32 copies stay small
_ITERATIONS = 4  # of the subspace iteration, each of which squares singular values


class PromptCoder:
    """The bases of one store, one for each row; none until a prompt was seen.

    It stands in for ``latents.Coder``, whose bases serve all rows alike.

    Args:
        members: What the latent holds, from ``ModelShape.members``.
        rank: Channels of the latent; 0 for states that are kept exactly.
        bits: Of every channel; below 16 latents are rotated, see ``hadamard``.
        dtype: In which bases are held; products are float32 in any case.
    """

    def __init__(self, members: list[tuple[int, str, SideShape]], rank: int, bits: int, dtype: torch.dtype):
        self.name = f"{members[0][1]} states of layers {tuple(layer for layer, _, _ in members)}"
        self.members = tuple((layer, side) for layer, side, _ in members)
        self.shapes = tuple(shape for _, _, shape in members)
        self.rank = rank
        self.bits = bits
        self.tiers = ((bits, rank),) if rank else ()
        self.dtype = dtype
        self.forget()

    def forget(self) -> None:
        """Drop the bases: the next prompt makes others."""
        self.up_projs: list[Tensor] = []  # by member [batch, rank, width], orthonormal rows over all members
        self.constants: list[Tensor] = []  # by member [batch, heads, 1, head_dim], mean of the prompt's states
        self.units = torch.empty(0)  # [batch, 1, 1], root mean square of a latent before it is scaled to 1

    @property
    def fitted(self) -> bool:
        return bool(self.up_projs)

    def fit(self, covariance: Tensor, mean: Tensor) -> None:
        """Make the bases from ``[batch, width, width]`` and ``[batch, width]`` float32, all members side by side.

        Raises:
            ValueError: If they are not finite.
        """
        if not bool(torch.isfinite(covariance).all()):
            raise ValueError(f"{self.name} must be finite, got NaN or infinity: the forward overflowed")
        directions, variance = leading_directions(covariance, self.rank)
        if self.bits < 16:
            directions = directions @ mixed_rotation(self.rank).to(directions.device)
        self.units = variance.mean(1).clamp(min=1e-30).sqrt()[:, None, None]
        widths = [shape.width for shape in self.shapes]
        # Contiguous copies: the whole matrix is let go.
        self.up_projs = [part.mT.contiguous().to(self.dtype) for part in directions.split(widths, dim=1)]
        self.constants = [
            part.unflatten(1, (shape.heads, 1, shape.head_dim)).to(self.dtype)
            for part, shape in zip(mean.split(widths, dim=1), self.shapes, strict=True)
        ]

    def encode(self, states: list[Tensor]) -> Tensor:
        """Latents of states: by member ``[batch, heads, tokens, head_dim]`` → ``[batch, tokens, rank]``, float32."""
        rows = [
            (part.float() - mean.float()).transpose(1, 2).flatten(2)
            for part, mean in zip(states, self.constants, strict=True)
        ]
        up_proj = torch.cat(self.up_projs, dim=2).float()
        return torch.cat(rows, dim=2) @ up_proj.mT / self.units

    def decode(self, latents: Tensor, member: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """States of one member: ``[batch, tokens, rank]`` → ``[batch, heads, tokens, head_dim]`` float32.

        The product is taken in ``dtype`` if the bases are held in half precision, see ``latents.Coder.decode``.
        """
        up_proj, shape = self.up_projs[member], self.shapes[member]
        narrow = up_proj.dtype.itemsize == 2 and dtype in (torch.bfloat16, up_proj.dtype)
        product = dtype if narrow else torch.float32
        rows = torch.matmul((latents * self.units).to(product), up_proj.to(product)).float()
        return rows.unflatten(2, (shape.heads, shape.head_dim)).transpose(1, 2) + self.constants[member].float()

    @property
    def weight(self) -> Tensor:
        """``[rank]``: what a squared error in each latent costs, alike for all."""
        return self.units.new_ones(self.rank)

    def to(self, device: torch.device) -> None:
        """Nothing to move: bases are made where the states are."""

    def map_batch(self, function) -> None:
        if not self.fitted:
            return
        self.units = function(self.units)
        self.up_projs = [function(part) for part in self.up_projs]
        self.constants = [function(part) for part in self.constants]

    def save(self, into: SavedTensors, name: str) -> None:
        """Put down the bases of all rows."""
        for member, (up_proj, constant) in enumerate(zip(self.up_projs, self.constants, strict=True)):
            into.put(f"{name}.up_proj.{member}", up_proj)
            into.put(f"{name}.constant.{member}", constant)
        into.put(f"{name}.units", self.units)

    def load(self, saved: SavedTensors, name: str, batch: int, device: torch.device) -> None:
        """Take up what ``save`` put down.

        Raises:
            ValueError: If a tensor is missing, or has another shape or dtype than these bases.
        """
        for member, shape in enumerate(self.shapes):
            size, mean = (batch, self.rank, shape.width), (batch, shape.heads, 1, shape.head_dim)
            self.up_projs.append(saved.take(f"{name}.up_proj.{member}", size, self.dtype, device))
            self.constants.append(saved.take(f"{name}.constant.{member}", mean, self.dtype, device))
        self.units = saved.take(f"{name}.units", (batch, 1, 1), torch.float32, device)

    def tensors(self) -> list[Tensor]:
        """The bases of all rows."""
        return [*self.up_projs, *self.constants, self.units]

    @property
    def nbytes(self) -> int:
        """Bytes of the bases of all rows."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())


class PromptStore(LatentStore):
    """A store whose bases come from the first tokens it encodes.

    They are made when the window would first give tokens away and at least as many tokens as the rank have come
    (a shorter prompt would take less room than its bases), from all tokens then in the window.

    Args:
        coder: Without bases yet; of rank 0 for states that are kept exactly.
        track, options: See ``LatentStore``.
        new_tokens: Whether tokens that come later are encoded with the same bases or kept exactly.
    """

    coder: PromptCoder  # type: ignore[assignment]  # another class with the members that the store uses

    def __init__(self, coder: PromptCoder, track: PositionTrack, options: StoreOptions, new_tokens: str):
        self.new_tokens = new_tokens
        self._fitted_before = False
        super().__init__(coder, track, options)  # type: ignore[arg-type]

    attendable = False  # every row has bases of its own, which no kernel takes

    def clear(self) -> None:
        super().clear()
        self.coder.forget()

    def _encodes(self, waiting: int) -> bool:
        if self.coder.rank == 0 or (self.coder.fitted and self.new_tokens == "exact"):
            return False
        return super()._encodes(waiting) and (self.coder.fitted or waiting >= self.coder.rank)

    def _encode_pending(self) -> None:
        if not self.coder.fitted:
            self._fit([dense for dense in self.pending if dense is not None])
        super()._encode_pending()

    def _last_encoding(self) -> bool:
        return self.new_tokens == "exact"

    def _fit(self, pending: list[Tensor]) -> None:
        """Bases of every row from its real tokens in ``pending``, sinks left out."""
        batch, width = len(pending[0]), sum(shape.width for shape in self.coder.shapes)
        second = pending[-1].new_zeros(batch, width, width, dtype=torch.float32)
        total, count = second.new_zeros(batch, 1, width), second.new_zeros(batch, 1, 1)
        shift, block = None, -(-width // 4)
        for start in range(0, pending[0].shape[2], _FIT_TOKENS):
            part = self._gathered(pending, start, start + _FIT_TOKENS)
            first = self.encoded_end + start
            rows = torch.cat([dense.transpose(1, 2).flatten(2) for dense in self._framed(part, first)], dim=2)
            used = self.track.real_after_sinks(first, first + rows.shape[1], self.options.num_sink_tokens)
            used = used.to(rows.device)[..., None].float()
            unused = bool((used == 0).any())
            if unused:
                rows.mul_(used)
            if shift is None:  # near the mean: a large constant would drown the variation in rounding
                shift = rows.sum(1, keepdim=True) / used.sum(1, keepdim=True).clamp(min=1)
            rows.sub_(shift)
            if unused:
                rows.mul_(used)
            for begin in range(0, width, block):  # at and below the diagonal: the rest is its mirror image
                second[:, begin:, begin : begin + block].baddbmm_(
                    rows[..., begin:].mT, rows[..., begin : begin + block]
                )
            total += rows.sum(1, keepdim=True)
            count += used.sum(1, keepdim=True)
        mean = total / count.clamp(min=1)
        second = second.tril() + second.tril(-1).mT
        covariance = second / count.clamp(min=1) - mean.mT @ mean
        self.coder.fit(covariance, (mean if shift is None else mean + shift)[:, 0])

    def begin(self, impl: str = "torch") -> None:
        self._fitted_before = self.coder.fitted
        super().begin(impl)

    def rollback(self) -> None:
        undone = self._before is not None and not self._fitted_before
        super().rollback()
        if undone:
            self.coder.forget()
            self.latents = None

    def map_batch(self, function) -> None:
        super().map_batch(function)
        self.coder.map_batch(function)

    def save(self, into: SavedTensors, name: str) -> dict[str, Any]:
        if self.coder.fitted:
            self.coder.save(into, name)
        return {**super().save(into, name), "fitted": self.coder.fitted}

    def load(self, saved: SavedTensors, name: str, facts: Mapping[str, Any], likes: list[Tensor]) -> None:
        if facts["fitted"] is True and self.coder.rank:
            self.coder.load(saved, name, self.track.batch or 0, likes[-1].device)
        super().load(saved, name, facts, likes)
        if self.latents is not None and not self.coder.fitted:
            raise ValueError(f"{name} holds latents without the bases that read them")

    @property
    def nbytes(self) -> int:
        """Bytes of latents, sinks, windows and bases, unused room included."""
        return super().nbytes + self.coder.nbytes


def leading_directions(covariance: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The ``rank`` leading eigenvectors and eigenvalues of symmetric matrices, largest first.

    Few of many are found by subspace iteration from a fixed start, which costs ``2 · width² · rank`` operations a
    step; others by a full decomposition.

    Args:
        covariance: ``[batch, width, width]`` float32, positive semi-definite.
        rank: At most ``width``.

    Returns:
        ``[batch, width, rank]`` with orthonormal columns, and ``[batch, rank]``, non-negative.
    """
    width = covariance.shape[-1]
    trial = rank + max(16, rank // 8)
    if 3 * trial >= width:
        values, vectors = torch.linalg.eigh(covariance)
        return vectors[..., -rank:].flip(-1), values[..., -rank:].flip(-1).clamp(min=0)
    start = torch.randn(width, trial, generator=torch.Generator().manual_seed(0))
    subspace = start.to(covariance).expand(len(covariance), -1, -1)
    for _ in range(_ITERATIONS):
        subspace = torch.linalg.qr(covariance @ subspace).Q
    values, inner = torch.linalg.eigh(subspace.mT @ covariance @ subspace)
    return subspace @ inner[..., -rank:].flip(-1), values[..., -rank:].flip(-1).clamp(min=0)


def prompt_stores(
    shape: ModelShape,
    track: PositionTrack,
    options: StoreOptions,
    *,
    compression_ratio: float,
    ranks: Ranks | None,
    bits: int | None,
    layer_group_size: int,
    new_tokens: str,
    devices: Mapping[int, torch.device] | None = None,
) -> list[PromptStore]:
    """A store for the keys and one for the values of every group of ``layer_group_size`` adjacent layers.

    A group ends where the model goes on on another of its ``devices``, of which a warning is given.

    Raises:
        ValueError: If an argument is out of range or the ratio cannot be reached.
    """
    if not isinstance(layer_group_size, int) or isinstance(layer_group_size, bool) or layer_group_size < 1:
        raise ValueError(f"layer_group_size must be an integer of at least 1, got {layer_group_size!r}")
    if new_tokens not in NEW_TOKENS:
        raise ValueError(f"new_tokens must be one of {NEW_TOKENS}, got {new_tokens!r}")
    dtype = options.latent_dtype or torch.float32
    stores = []
    groups = layer_groups(shape, "both", layer_group_size, devices)
    if groups != layer_groups(shape, "both", layer_group_size):
        warnings.warn(f"layer groups were split where layers lie on different devices: {groups}", stacklevel=3)
    for group, pair in prompt_ranks(shape, compression_ratio, ranks, bits, layer_group_size, devices).items():
        for side, rank in zip(SIDES, pair, strict=True):
            coder = PromptCoder(shape.members(side, group), rank, bits or 16, dtype)
            stores.append(PromptStore(coder, track, options, new_tokens))
    return stores


def prompt_ranks(
    shape: ModelShape,
    compression_ratio: float = 8.0,
    ranks: Ranks | None = None,
    bits: int | None = None,
    layer_group_size: int = 4,
    devices: Mapping[int, torch.device] | None = None,
) -> dict[tuple[int, ...], tuple[int, int]]:
    """Key and value rank of every layer group; a rank of 0 keeps that side exactly.

    Without ``ranks``, each group gets its own layers' share of the bytes per token: the largest key rank with a
    value rank of one and a half times it, both at most the group's width. Values that are rotated (MLA models hand
    over their rotary key as values) stay exact, as in the paper, and take their bytes from the latents.

    Raises:
        ValueError: If an argument is out of range or the ratio cannot be reached.
    """
    if bits is not None and (not isinstance(bits, int) or bits not in BIT_WIDTHS):
        raise ValueError(f"bits must be one of {BIT_WIDTHS} or None, got {bits!r}")
    groups = layer_groups(shape, "both", layer_group_size, devices)
    if ranks is not None:
        return _given_ranks(shape, groups, ranks)
    check_compression_ratio(compression_ratio)
    chosen = {}
    for group in groups:
        key, value = (shape.layer(group[0]).side(side) for side in SIDES)
        widths = (key.width * len(group), 0 if value.rope else value.width * len(group))
        if compression_ratio == 1:
            chosen[group] = widths
            continue
        exact = 2 * value.width * len(group) if value.rope else 0
        full = 2 * (key.width + value.width) * len(group)
        pair = _largest_ranks(widths, full / compression_ratio - exact, bits or 16)
        if pair is None:
            least = exact + sum(
                tier_bytes(bits or 16, min(rank, width)) for rank, width in zip((1, 2), widths, strict=True)
            )
            raise ValueError(
                f"compression_ratio {compression_ratio:g} leaves nothing to store for layers {group}; the largest "
                f"reachable ratio is {int(full / least * 100) / 100}"
            )
        chosen[group] = pair
    return chosen


def _largest_ranks(widths: tuple[int, int], budget: float, bits: int) -> tuple[int, int] | None:
    for key_rank in range(max(widths), 0, -1):
        pair = (min(key_rank, widths[0]), min(round(VALUE_SHARE * key_rank), widths[1]))
        if sum(tier_bytes(bits, rank) for rank in pair) <= budget:
            return pair
    return None


def _given_ranks(shape: ModelShape, groups: list, ranks: Ranks) -> dict:
    firsts = [group[0] for group in groups]
    if isinstance(ranks, Mapping) and set(ranks) != set(firsts):
        raise ValueError(f"ranks must name the first layer of each layer group, {firsts}, got {list(ranks)}")
    if not isinstance(ranks, Mapping) and (not isinstance(ranks, int) or isinstance(ranks, bool)):
        raise TypeError(f"ranks must be an integer or a mapping {{layer: (key_rank, value_rank)}}, got {ranks!r}")
    chosen = {}
    for group in groups:
        pair = []
        for index, side in enumerate(SIDES):
            side_shape = shape.layer(group[0]).side(side)
            width, exact = side_shape.width * len(group), side == "value" and side_shape.rope is not None
            rank = ranks[group[0]][index] if isinstance(ranks, Mapping) else 0 if exact else min(ranks, width)
            least, most = (0, 0) if exact else (1, width)
            if not isinstance(rank, int) or isinstance(rank, bool) or not least <= rank <= most:
                kept = " (MLA's rotary key, kept exactly)" if exact else ""
                raise ValueError(
                    f"ranks: {side} states of layers {group}{kept} allow ranks {least} to {most}, got {rank!r}"
                )
            pair.append(rank)
        chosen[group] = tuple(pair)
    return chosen
