"""What a model caches, as plain data: attention layers, their shapes and rotations, and groups of layers.

``probe.model_shape`` finds it out; projections carry it and are compared by it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

SIDES = ("key", "value")
BOTH = "both"  # keys and values of the same layers in one latent
Group = tuple[int, ...]  # adjacent compressible layers


FULL, HYBRID = "full_attention", "hybrid"  # as transformers names what can be compressed


@dataclass(frozen=True)
class RopeShape:
    """How one side of a layer is rotated."""

    layout: str  # "half" or "interleaved", see ``kernels.rope.rotate``
    rotary_dim: int  # how many leading numbers of each head are rotated
    source: str  # dotted path, inside the decoder, of the buffer that holds the inverse frequencies
    dynamic: bool  # whether the model changes that buffer with the length of the context


@dataclass(frozen=True)
class PositionAxes:
    """Which of a token's several positions turns which pair of numbers (M-RoPE: time, height, width)."""

    count: int  # how many positions turn anything; 1: a token has one position
    of_pairs: Mapping[str, tuple[int, ...]]  # by source of frequencies, the axis of each rotated pair


ONE_POSITION = PositionAxes(1, {})


@dataclass(frozen=True)
class SideShape:
    """Shape of what ``Cache.update`` receives as keys or as values: heads, numbers a head, rotation."""

    heads: int
    head_dim: int
    rope: RopeShape | None

    @property
    def width(self) -> int:
        """Numbers per token."""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class LayerShape:
    """One compressible attention layer."""

    layer_idx: int
    key: SideShape
    value: SideShape

    def side(self, name: str) -> SideShape:
        return self.key if name == "key" else self.value


class Member(NamedTuple):
    """The keys or the values of one layer, as part of what a latent holds."""

    layer: int
    side: str  # "key" or "value"
    shape: SideShape


def sides_of(side: str) -> tuple[str, ...]:
    """``"key"`` and ``"value"`` for ``"both"``, else ``side`` alone."""
    return SIDES if side == BOTH else (side,)


@dataclass(frozen=True)
class ModelShape:
    """The cached layers of a model."""

    model_type: str  # ``config.model_type``
    layer_types: tuple[str, ...]  # transformers' type of every cache layer, in order
    layers: tuple[LayerShape, ...]  # the compressible (``FULL`` and ``HYBRID``) ones

    def members(self, side: str, layers: Group) -> list[Member]:
        """What a latent over ``layers`` holds, in the order of a basis' rows.

        ``side`` is ``"key"``, ``"value"`` or ``"both"``, which puts each layer's keys before its values.
        """
        return [Member(index, name, self.layer(index).side(name)) for index in layers for name in sides_of(side)]

    def layer(self, layer_idx: int) -> LayerShape:
        return next(layer for layer in self.layers if layer.layer_idx == layer_idx)

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict) -> "ModelShape":
        def side(fields: dict) -> SideShape:
            rope = RopeShape(**fields["rope"]) if fields["rope"] else None
            sizes = int(fields["heads"]), int(fields["head_dim"])
            if min(sizes) < 1:
                raise ValueError(f"heads and head_dim must be at least 1, got {sizes}")
            return SideShape(*sizes, rope)

        layers = tuple(
            LayerShape(int(layer["layer_idx"]), side(layer["key"]), side(layer["value"])) for layer in fields["layers"]
        )
        return cls(str(fields["model_type"]), tuple(fields["layer_types"]), layers)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the structure: equal for any two models that can share projections."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def layer_groups(
    shape: ModelShape, side: str, size: int, devices: Mapping[int, torch.device] | None = None
) -> list[Group]:
    """Cut the compressible layers into groups of ``size`` adjacent ones; the last may be shorter.

    A group never mixes layers whose states differ in heads, head_dim or rope, nor, with ``devices`` from
    ``probe.layer_devices``, layers of different devices.
    """

    def kind(layer: LayerShape) -> tuple:
        return (devices or {}).get(layer.layer_idx), *(layer.side(name) for name in sides_of(side))

    groups: list[Group] = []
    for _, alike in groupby(shape.layers, kind):
        run = tuple(layer.layer_idx for layer in alike)
        groups += [run[start : start + size] for start in range(0, len(run), size)]
    return groups


def head_rows(sides: Sequence[SideShape], heads: Sequence[int]) -> Tensor:
    """Where ``heads`` of each of ``sides`` stand in their states side by side, in the order of a basis' rows."""
    widths = [side.width for side in sides]
    rows = zip(sides, torch.arange(sum(widths), device="cpu").split(widths), strict=True)
    return torch.cat([own.view(side.heads, -1)[list(heads)].flatten() for side, own in rows])


def rope_buffer(decoder: nn.Module, source: str) -> Tensor:
    """The inverse frequencies that ``RopeShape.source`` names, ``[rotary_dim / 2]``, as they are now."""
    path, _, name = source.rpartition(".")
    return getattr(decoder.get_submodule(path), name)
