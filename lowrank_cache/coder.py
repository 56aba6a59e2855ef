"""What one store needs of its bases: the matrices that encode tokens and read them back, on the devices of its layers.

A coder holds matrices and does no arithmetic with tokens: that is ``kernels.api``. There are two kinds:
``CalibratedCoder`` here, whose bases serve all tokens, and ``prompt_svd.PromptCoder``, whose bases come from prompts.
"""

import copy
import hashlib
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lowrank_cache.artefact import SavedTensors
from lowrank_cache.basis import Basis
from lowrank_cache.budget import GroupPlan, Ranks
from lowrank_cache.hadamard import channel_mixing
from lowrank_cache.kernels.packed import QUANTIZED_BITS, RotaryFrames
from lowrank_cache.projections import Projections
from lowrank_cache.shapes import Member

__all__ = ["CalibratedCoder", "Coder", "EncodingMatrices", "ReadingMatrices", "calibrated_coders"]


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


class Coder(Protocol):
    """What a ``LatentStore`` asks of its bases.

    Attributes:
        name: For messages.
        members: What a latent holds, in the order in which a forward updates them.
        tiers: ``(bits, channels)`` in the order of the channels; empty if nothing is stored.
        fitted: Whether there are bases.
        one_basis: Whether one basis serves all batch elements, as latent attention needs.
        last: Whether the tokens that are encoded next are the last ones.
        nbytes: Bytes of bases that belong to this cache alone.
    """

    name: str
    members: tuple[Member, ...]
    tiers: tuple[tuple[int, int], ...]

    @property
    def fitted(self) -> bool: ...
    @property
    def one_basis(self) -> bool: ...
    @property
    def last(self) -> bool: ...
    @property
    def nbytes(self) -> int: ...

    def encodes(self, waiting: int) -> bool:
        """Whether tokens may be encoded while ``waiting`` of them lie in the window."""

    def fit(self, states: list[Tensor], frames: list[RotaryFrames | None], used: Tensor) -> None:
        """Make the bases, if there are none, from the tokens that wait.

        Args:
            states: By member ``[batch, heads, tokens, head_dim]``, post-RoPE.
            frames: By member, see ``kernels.reference.encode``.
            used: ``[batch, tokens]`` bool, False for padding and sinks.
        """

    def encoding(self, device: torch.device) -> EncodingMatrices: ...
    def reading(self, member: int, device: torch.device) -> ReadingMatrices: ...
    def on(self, member: int, device: torch.device) -> "Coder":
        """This coder, or one like it, whose matrices for ``member`` lie on ``device``."""

    def forget(self) -> None:
        """Drop bases that belong to the tokens."""

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> None: ...
    def save(self, into: SavedTensors, name: str) -> dict[str, bool]:
        """Add the bases that belong to this cache alone; returns facts for the JSON."""

    def load(self, saved: SavedTensors, name: str, facts: Mapping, batch: int, device: torch.device) -> None:
        """Take what ``save`` added."""


class CalibratedCoder:
    """Calibrated bases, truncated to a plan, with channels in tier order. Immutable, so caches and threads share it.

    Several bases (of head groups) become one matrix, with zeros where a channel does not read a head.

    Args:
        plan: The bases and their channels to keep.
        members: What the latent holds, from ``ModelShape.members``.
        dtype: In which the projection matrices are held; products are float32 in any case.
        rotated: Mix each basis' channels by a Hadamard rotation, for one quantized tier that holds them all.
    """

    fitted = one_basis = True
    last = False
    nbytes = 0  # shared: see ``projection_bytes``

    def __init__(
        self,
        plan: GroupPlan,
        members: Sequence[Member],
        dtype: torch.dtype = torch.float32,
        rotated: bool = False,
    ):
        self.name = f"{plan.bases[0].side} states of layers {plan.bases[0].layers}"
        self.members = tuple(members)
        self.tiers = tuple((bits, len(channels)) for bits, channels in plan.tiers)
        kept = torch.tensor(plan.channels, dtype=torch.long)
        self._weight = torch.cat([basis.loss for basis in plan.bases])[kept]
        sizes = self._weight.sqrt()
        unit = None
        if rotated:
            # One size for all bases of the latent: they share a step, and an error counts alike in each.
            unit = max(float(sizes.square().mean().sqrt()), 1e-30) if len(kept) else 1.0
            self._weight = torch.full_like(self._weight, unit**2)
        self._blocks = _blocks(plan, self.members, dtype, sizes, unit)
        # The mean of the states. Latents are of what differs from it, so half precision never has to hold a bias, and
        # channels that are not stored are read as their mean.
        self._constants = [torch.zeros(member.shape.heads, member.shape.head_dim) for member in members]
        for basis in plan.bases:
            widths = [len(basis.heads) * member.shape.head_dim for member in members]
            mean = basis.constant + basis.offset @ basis.up_proj
            for constant, part in zip(self._constants, mean.split(widths), strict=True):
                constant[list(basis.heads)] = part.view(len(basis.heads), -1)
        self._down_proj, up_projs = _assembled(self._blocks, self.members, len(kept))
        for block in self._blocks:
            block.release()
        self._reading = [ReadingMatrices(*pair) for pair in zip(up_projs, self._constants, strict=True)]  # by member

    def encodes(self, waiting: int) -> bool:
        """Always: the bases are there."""
        return True

    def fit(self, states: list[Tensor], frames: list[RotaryFrames | None], used: Tensor) -> None:
        """Nothing to make."""

    def encoding(self, device: torch.device) -> EncodingMatrices:
        """Matrices for latents on ``device``, that of the last member's layer."""
        return EncodingMatrices(self._constants, self._down_proj, self._weight)

    def reading(self, member: int, device: torch.device) -> ReadingMatrices:
        """Matrices of one member on ``device``, that of its layer."""
        return self._reading[member]

    def on(self, member: int, device: torch.device) -> "CalibratedCoder":
        """A coder whose matrices for ``member`` lie on ``device``; itself if they do."""
        last = member == len(self.members) - 1
        if self._reading[member].up_proj.device == device and (not last or self._weight.device == device):
            return self
        moved = copy.copy(self)
        moved._reading = list(self._reading)
        moved._reading[member] = ReadingMatrices(*(matrix.to(device) for matrix in self._reading[member][:2]))
        if last:  # latents lie where the last member's layer computes
            moved._constants = [constant.to(device) for constant in self._constants]
            moved._down_proj, moved._weight = self._down_proj.to(device), self._weight.to(device)
        return moved

    def forget(self) -> None:
        """Nothing to drop: calibrated bases belong to no tokens."""

    def map_batch(self, function: Callable[[Tensor], Tensor]) -> None:
        """Nothing to change."""

    def save(self, into: SavedTensors, name: str) -> dict[str, bool]:
        """Nothing to add: a saved cache names its projections by ``fingerprint``."""
        return {}

    def load(self, saved: SavedTensors, name: str, facts: Mapping, batch: int, device: torch.device) -> None:
        """Nothing to take."""

    @property
    def projection_bytes(self) -> int:
        """Bytes of the truncated bases, on all devices."""
        read = [matrix for matrices in self._reading for matrix in matrices[:2]]
        held = {id(tensor): tensor for tensor in (self._weight, self._down_proj, *self._constants, *read)}
        return sum(tensor.numel() * tensor.element_size() for tensor in held.values())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what latents mean: members, tiers and matrices as they are held, basis by basis.

        The means are left out: ``Projections.truncate`` adds up what it cuts away in another order, so they may
        differ in the last bit.
        """
        members = tuple((member.layer, member.side) for member in self.members)
        digest = hashlib.sha256(repr((members, self.tiers)).encode())
        for block in self._blocks:
            for tensor in block.cut(self._down_proj.cpu(), [matrices.up_proj.cpu() for matrices in self._reading]):
                digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def __deepcopy__(self, memo) -> "CalibratedCoder":
        return self


class _Block:
    """Where one basis stands in a coder's matrices, and its part of them until they are assembled."""

    def __init__(self, basis: Basis, channels: Tensor, members: Sequence[Member], rank: int):
        self.basis_heads = list(basis.heads)
        self.every_head = all(basis.heads == tuple(range(member.shape.heads)) for member in members)
        self.channels = channels  # places among the coder's channels
        self.every_channel = len(channels) == rank
        rows, start = [], 0  # of the coder's down-projection
        for member in members:
            numbers = torch.arange(member.shape.width).view(member.shape.heads, -1)[self.basis_heads]
            rows.append(start + numbers.flatten())
            start += member.shape.width
        self.rows = torch.cat(rows)
        self.dtypes: list[torch.dtype] = []
        self.parts: list[Tensor] = []  # down-projection, then an up-projection for each member

    def hold(self, down_proj: Tensor, up_projs: Sequence[Tensor]) -> None:
        self.parts = [down_proj, *up_projs]
        self.dtypes = [part.dtype for part in self.parts]

    def release(self) -> None:
        self.parts = []

    def cut(self, down_proj: Tensor, up_projs: Sequence[Tensor]) -> list[Tensor]:
        """What ``hold`` was given, out of the coder's matrices, and which heads and channels it is if not all."""
        parts = [down_proj[self.rows][:, self.channels]]
        parts += [up_proj[self.channels][:, self.basis_heads].flatten(1) for up_proj in up_projs]
        places = [] if self.every_head else [torch.tensor(self.basis_heads)]
        places += [] if self.every_channel else [self.channels]
        return [part.to(dtype) for part, dtype in zip(parts, self.dtypes, strict=True)] + places


def _blocks(
    plan: GroupPlan, members: Sequence[Member], dtype: torch.dtype, sizes: Tensor, unit: float | None
) -> list[_Block]:
    """The bases' kept channels; with ``unit``, rotated so that channels of these ``sizes`` get that one."""
    kept = torch.tensor(plan.channels, dtype=torch.long)
    blocks, start = [], 0
    for basis in plan.bases:
        places = ((kept >= start) & (kept < start + basis.rank)).nonzero()[:, 0]
        columns = kept[places] - start
        start += basis.rank
        down, up = basis.down_proj[:, columns], basis.up_proj[columns]
        if unit is not None and len(places):
            mix, unmix = channel_mixing(sizes[places], unit)
            down, up = down @ mix, unmix @ up
        widths = [len(basis.heads) * member.shape.head_dim for member in members]
        block = _Block(basis, places, members, len(kept))
        block.hold(_narrow(down, dtype), [_narrow(part, dtype) for part in up.split(widths, dim=1)])
        blocks.append(block)
    return blocks


def _assembled(blocks: list[_Block], members: Sequence[Member], rank: int) -> tuple[Tensor, list[Tensor]]:
    """Down-projection ``[width, rank]`` and by member the up-projection ``[rank, heads, head_dim]``."""
    wide = [
        torch.float32 if torch.float32 in dtypes else dtypes[0]
        for dtypes in zip(*(b.dtypes for b in blocks), strict=True)
    ]
    down_proj = torch.zeros(sum(member.shape.width for member in members), rank, dtype=wide[0])
    up_projs = [
        torch.zeros(rank, member.shape.heads, member.shape.head_dim, dtype=dtype)
        for member, dtype in zip(members, wide[1:], strict=True)
    ]
    for block in blocks:
        down_proj[block.rows[:, None], block.channels] = block.parts[0].to(wide[0])
        heads = torch.tensor(block.basis_heads)
        for up_proj, part in zip(up_projs, block.parts[1:], strict=True):
            up_proj[block.channels[:, None], heads] = part.unflatten(1, (len(heads), -1)).to(up_proj.dtype)
    return down_proj, up_projs


def _narrow(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """``matrix`` in a smaller ``dtype``, or as it is where that would overflow or lose it to underflow."""
    if dtype.itemsize >= matrix.element_size():
        return matrix
    narrowed = matrix.to(dtype)
    lost = (narrowed.to(matrix.dtype) - matrix).norm()
    return narrowed if bool(lost <= torch.finfo(dtype).eps * matrix.norm()) else matrix


_CODERS: "weakref.WeakKeyDictionary[Projections, dict]" = weakref.WeakKeyDictionary()


def calibrated_coders(
    projections: Projections,
    devices: Mapping[int, torch.device],
    compression_ratio: float,
    ranks: Ranks | None,
    bits: int | None,
    latent_dtype: torch.dtype | None,
) -> list[CalibratedCoder]:
    """A coder for each of ``projections.groups()``, made once for each setting and placement of some projections.

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
    made = _CODERS.setdefault(projections, {})
    if key not in made:
        coders = []  # all or none are remembered: making them may be interrupted, or done by two threads at once
        for plan in projections.plan(compression_ratio, ranks, bits):
            members = projections.shape.members(plan.bases[0].side, plan.bases[0].layers)
            # Channels with a loss of their own keep it: rotation would spread what matters over what does not.
            rotated = bits in QUANTIZED_BITS and all(basis.rank_weight is not None for basis in plan.bases)
            coder = CalibratedCoder(plan, members, dtype, rotated)
            for number, member in enumerate(members):
                coder = coder.on(number, devices.get(member.layer, torch.device("cpu")))
            coders.append(coder)
        made[key] = coders
    return made[key]


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
