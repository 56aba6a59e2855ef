"""What one store needs of its bases: the matrices that encode tokens and read them back, on the devices of its layers.

A coder holds matrices and does no arithmetic with tokens: that is ``kernels.api``. There are two kinds:
``CalibratedCoder`` here, whose bases serve all tokens, and ``prompt_svd.PromptCoder``, whose bases come from prompts.
"""

import copy
import hashlib
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_cache.artefact import SavedTensors
from lowrank_cache.budget import GroupPlan, Ranks
from lowrank_cache.hadamard import channel_mixing
from lowrank_cache.kernels.ambient import without_autocast
from lowrank_cache.kernels.packed import QUANTIZED_BITS, RotaryFrames
from lowrank_cache.projections import Projections
from lowrank_cache.shapes import BOTH, Member, head_rows


class EncodingMatrices(NamedTuple):
    """What ``kernels.api.encode`` takes of a coder, on the device where latents lie."""

    constants: list[Tensor]  # by member [heads, head_dim], or with a batch axis before
    down_proj: Tensor  # [width, rank], or with a batch axis before
    weight: Tensor  # [rank] float32


class ReadingMatrices(NamedTuple):
    """What reading one member's states takes of a coder, on the device of that member's layer."""

    up_proj: Tensor  # [rank, heads, head_dim], or with a batch axis before
    constant: Tensor  # [heads, head_dim] float32, or with a batch axis before
    scale: Tensor | None = None  # [batch, 1, 1] float32, see ``kernels.packed.LatentSide``


class Coder:
    """What a ``LatentStore`` asks of its bases, with the answers of bases that are there and belong to no tokens.

    Attributes:
        name: For messages.
        members: What a latent holds, in the order in which a forward updates them.
        tiers: ``(bits, channels)`` in the order of the channels; empty if nothing is stored.
        one_basis: Whether one basis serves all batch elements, as latent attention needs.
        fitted: Whether there are bases.
        last: Whether the tokens that are encoded next are the last ones.
        nbytes: Bytes of bases that belong to this cache alone.
        projection_bytes: Bytes of bases that caches of the same settings share, on all devices.
        fingerprints: Of calibrated bases, as this version and as older ones take it; empty for others.
    """

    one_basis, fitted, last = True, True, False
    nbytes, projection_bytes = 0, 0
    fingerprints = "", ""

    def __init__(self, members: Sequence[Member], tiers: tuple[tuple[int, int], ...]):
        sides = dict.fromkeys(member.side for member in members)
        layers = tuple(dict.fromkeys(member.layer for member in members))
        self.name = f"{BOTH if len(sides) > 1 else members[0].side} states of layers {layers}"
        self.members = tuple(members)
        self.tiers = tiers

    def encodes(self, waiting: int) -> bool:
        """Whether tokens may be encoded while ``waiting`` of them lie in the window."""
        return True

    def fit(self, states: list[Tensor], frames: list[RotaryFrames | None], used: Tensor) -> None:
        """Make the bases, if there are none, from the tokens that wait.

        Args:
            states: By member ``[batch, heads, tokens, head_dim]``, post-RoPE.
            frames: By member, see ``kernels.reference.encode``.
            used: ``[batch, tokens]`` bool, False for padding and sinks.
        """

    def encoding(self, device: torch.device) -> EncodingMatrices:
        """Matrices for latents on ``device``, that of the last member's layer."""
        raise NotImplementedError

    def reading(self, member: int, device: torch.device) -> ReadingMatrices:
        """Matrices of one member on ``device``, that of its layer."""
        raise NotImplementedError

    def on(self, member: int, device: torch.device) -> "Coder":
        """This coder, or one like it, whose matrices for ``member`` lie on ``device``."""
        return self

    def forget(self) -> None:
        """Drop bases that belong to the tokens."""

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch axis to bases that belong to batch elements."""

    def save(self, into: SavedTensors, name: str) -> dict[str, bool]:
        """Add the bases that belong to this cache alone; returns facts for the JSON."""
        return {}

    def load(self, saved: SavedTensors, name: str, facts: Mapping, batch: int, device: torch.device) -> None:
        """Take what ``save`` added; raises ValueError if a tensor is missing or does not fit."""


class CalibratedCoder(Coder):
    """Calibrated bases, truncated to a plan, with channels in tier order. Immutable, so caches and threads share it.

    Several bases (of head groups) become one matrix, with zeros where a channel does not read a head.

    Args:
        plan: The bases and their channels to keep.
        members: What the latent holds, from ``ModelShape.members``.
        dtype: In which the projection matrices are held; products are float32 in any case.
        rotated: Mix each basis' channels by a Hadamard rotation, for one quantized tier that holds them all.

    Attributes:
        fingerprints: SHA-256 of what latents mean: members, tiers and matrices as they are held, or before they are
            rotated, basis by basis: products differ in the last bit from processor to processor. The means are left out
            for that reason: ``Projections.truncate`` adds up what it cuts away in another order. The second is what
            older versions took: of rotated bases, the products.
    """

    def __init__(
        self, plan: GroupPlan, members: Sequence[Member], dtype: torch.dtype = torch.float32, rotated: bool = False
    ):
        super().__init__(members, tuple((bits, len(channels)) for bits, channels in plan.tiers))
        kept = torch.tensor(plan.channels, dtype=torch.long, device="cpu")
        empty = partial(torch.zeros, dtype=torch.float32, device="cpu")
        weight = torch.cat([basis.loss for basis in plan.bases])[kept]
        sizes, unit = weight.sqrt(), None
        if rotated:
            # One size for all bases of the latent: they share a step, and an error counts alike in each.
            unit = max(float(sizes.square().mean().sqrt()), 1e-30) if len(kept) else 1.0
            weight = torch.full_like(weight, unit**2)
        # The mean of the states. Latents are of what differs from it, so half precision never has to hold a bias, and
        # channels that are not stored are read as their mean.
        constants = [empty(member.shape.heads, member.shape.head_dim) for member in members]
        down_proj = empty(sum(member.shape.width for member in members), len(kept))
        up_projs = [empty(len(kept), member.shape.heads, member.shape.head_dim) for member in members]
        dtypes: list[tuple[torch.dtype, ...]] = []  # by basis, of its down-projection and of its part for each member
        about = repr((tuple(member[:2] for member in members), self.tiers)).encode()
        older, digest = hashlib.sha256(about), hashlib.sha256(about + f"{dtype} rotated".encode() * rotated)
        start = 0
        for basis in plan.bases:
            places = ((kept >= start) & (kept < start + basis.rank)).nonzero()[:, 0]
            columns, heads = kept[places] - start, torch.tensor(basis.heads, dtype=torch.long, device="cpu")
            start += basis.rank
            down, up = basis.down_proj[:, columns], basis.up_proj[columns]
            sources = [down, up]
            if unit is not None and len(places):
                mix, unmix = channel_mixing(sizes[places], unit)
                down, up = down @ mix, unmix @ up
            widths = [len(heads) * member.shape.head_dim for member in members]
            matrices = [_narrow(matrix, dtype) for matrix in (down, *up.split(widths, dim=1))]
            dtypes.append(tuple(matrix.dtype for matrix in matrices))
            rows = head_rows([member.shape for member in members], basis.heads)
            down_proj[rows[:, None], places] = matrices[0].float()
            mean = (basis.constant + basis.offset @ basis.up_proj).split(widths)
            for constant, up_proj, part, matrix in zip(constants, up_projs, mean, matrices[1:], strict=True):
                constant[heads] = part.unflatten(0, (len(heads), -1))
                up_proj[places[:, None], heads] = matrix.unflatten(1, (len(heads), -1)).float()
            all_heads = all(basis.heads == tuple(range(member.shape.heads)) for member in members)
            where = ([] if all_heads else [heads]) + ([] if len(places) == len(kept) else [places])
            _update(older, *matrices, *where)
            _update(digest, *(sources if rotated else matrices), *where)
        self.fingerprints = digest.hexdigest(), older.hexdigest()
        held = [torch.float32 if torch.float32 in of_all else of_all[0] for of_all in zip(*dtypes, strict=True)]
        self._encoding = EncodingMatrices(constants, down_proj.to(held[0]), weight)
        read = zip(up_projs, held[1:], constants, strict=True)
        self._reading = [ReadingMatrices(up_proj.to(dtype), constant) for up_proj, dtype, constant in read]  # by member

    def encoding(self, device: torch.device) -> EncodingMatrices:
        return self._encoding

    def reading(self, member: int, device: torch.device) -> ReadingMatrices:
        return self._reading[member]

    def on(self, member: int, device: torch.device) -> "CalibratedCoder":
        last = member == len(self.members) - 1
        up_proj, constant, _ = self._reading[member]
        constants, down_proj, weight = self._encoding
        if up_proj.device == device and (not last or weight.device == device):
            return self
        moved = copy.copy(self)
        moved._reading = list(self._reading)
        moved._reading[member] = ReadingMatrices(up_proj.to(device), constant.to(device))
        if last:  # latents lie where the last member's layer computes
            there = [constant.to(device) for constant in constants]
            moved._encoding = EncodingMatrices(there, down_proj.to(device), weight.to(device))
        return moved

    @property
    def projection_bytes(self) -> int:  # type: ignore[override]  # a property instead of a constant
        constants, down_proj, weight = self._encoding
        read = [matrix for matrices in self._reading for matrix in matrices[:2]]
        held = {id(tensor): tensor for tensor in (weight, down_proj, *constants, *read)}
        return sum(tensor.numel() * tensor.element_size() for tensor in held.values())

    def __deepcopy__(self, memo) -> "CalibratedCoder":
        return self


def _update(digest: Any, *tensors: Tensor) -> None:
    """Add types, shapes and bytes."""
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())


def _narrow(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """``matrix`` in a smaller ``dtype``, or as it is where that would overflow or lose it to underflow."""
    if dtype.itemsize >= matrix.element_size():
        return matrix
    narrowed = matrix.to(dtype)
    lost = (narrowed.to(matrix.dtype) - matrix).norm()
    return narrowed if bool(lost <= torch.finfo(dtype).eps * matrix.norm()) else matrix


class _Made:
    """The coders made of some projections: those that caches use, and those that were asked for last."""

    def __init__(self) -> None:
        self.used: weakref.WeakValueDictionary[tuple[str, int], CalibratedCoder] = weakref.WeakValueDictionary()
        self.latest: list[CalibratedCoder] = []


_MADE: "weakref.WeakKeyDictionary[Projections, _Made]" = weakref.WeakKeyDictionary()


def living_projections() -> list[Projections]:
    """Those that caches were made with, and that still exist."""
    return list(_MADE)


@without_autocast
def calibrated_coders(
    projections: Projections,
    devices: Mapping[int, torch.device],
    compression_ratio: float,
    ranks: Ranks | None,
    bits: int | None,
    latent_dtype: torch.dtype | None,
) -> list[CalibratedCoder]:
    """A coder for each of ``projections.groups()``, shared by all caches of the same settings and placement.

    Args:
        devices: Of the model's layers, from ``probe.layer_devices``.
        compression_ratio, ranks, bits: See ``budget.plan_groups``.
        latent_dtype: Of the matrices; None for float32.

    Raises:
        ValueError: If an argument is out of range or the ratio cannot be reached.
    """
    _warn_of_borders(projections, devices)
    dtype = latent_dtype or torch.float32
    places = [str(devices.get(layer.layer_idx)) for layer in projections.shape.layers]
    key = repr((compression_ratio if ranks is None else None, ranks, bits, dtype, places))
    made = _MADE.setdefault(projections, _Made())
    coders = [coder for number in range(len(projections.groups())) if (coder := made.used.get((key, number)))]
    if len(coders) < len(projections.groups()):
        coders = []
        for number, plan in enumerate(projections.plan(compression_ratio, ranks, bits)):
            members = projections.shape.members(plan.bases[0].side, plan.bases[0].layers)
            # Channels with a loss of their own keep it: rotation would spread what matters over what does not.
            rotated = bits in QUANTIZED_BITS and all(basis.rank_weight is not None for basis in plan.bases)
            coder = CalibratedCoder(plan, members, dtype, rotated)
            for place, member in enumerate(members):
                coder = coder.on(place, devices.get(member.layer, torch.device("cpu")))
            coders.append(made.used.setdefault((key, number), coder))  # another thread may have been faster
    made.latest = coders
    return coders


def _warn_of_borders(projections: Projections, devices: Mapping[int, torch.device]) -> None:
    """Say which layer groups cross from one device to another: their latents must be copied in every forward."""
    crossing = {
        basis.layers: [str(devices[layer]) for layer in basis.layers]
        for basis in projections.bases
        if len({devices.get(layer) for layer in basis.layers}) > 1
    }
    if crossing:
        layers, where = next(iter(crossing.items()))
        warnings.warn(
            f"{len(crossing)} layer group(s) cross devices, the first being layers {list(layers)} on {where}; their "
            "latents lie on the last layer's device and are copied to the others in every forward. To avoid it, choose "
            "a device_map with borders between groups, or calibrate with layer_group_size=1",
            stacklevel=4,
        )
