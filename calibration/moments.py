"""The sums that calibration keeps of what a model caches, and the statistics that bases are made of.

For every compressible layer and side, over calibration tokens: the second moment ``C = E[x xᵀ]`` of
the states (keys pre-RoPE), jointly over each layer group; their mean; and the sensitivity
``F = E[g gᵀ]`` with ``g`` the gradient of the summed next-token loss at ``x``, per layer. Nothing
but these sums is kept; ``collect`` runs the model. Mathematics: docs/method.md, "Calibration".
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowrank_cache.artefact import damage_named, write_files
from lowrank_cache.kernels.ambient import without_autocast
from lowrank_cache.kernels.rope import angle_tables, rotate
from lowrank_cache.shapes import SIDES, Group, ModelShape, RopeShape, SideShape

SKIPPED_TOKENS = 4  # a sequence's first real tokens are attention sinks with outlier keys; the cache keeps them exact
_COUNTS = ("tokens", "sequences", "loss", "predicted", "sensitivity_kind")


@dataclass(frozen=True)
class UsableTokens:
    """Which tokens of a batch are counted, and where they stand."""

    positions: Tensor  # [batch, tokens]: how many real tokens stand before each; 0 for leading padding
    usable: Tensor  # [batch, tokens] bool: real tokens that are not sinks

    @classmethod
    def of(cls, attention_mask: Tensor) -> "UsableTokens":
        count = attention_mask.long().cumsum(1)
        return cls((count - 1).clamp(min=0), attention_mask.bool() & (count > SKIPPED_TOKENS))

    def rows(self, states: Tensor, rope: RopeShape | None, inv_freq: Mapping[str, Tensor]) -> Tensor:
        """``[batch, heads, tokens, head_dim]`` post-RoPE → ``[usable tokens, heads * head_dim]`` pre-RoPE, float32."""
        states = states.float()
        if rope is not None:
            cos, sin = angle_tables(self.positions.to(states.device), inv_freq[rope.source].float())
            states = rotate(states, cos[:, None], sin[:, None], rope.layout, inverse=True)
        return states.transpose(1, 2).flatten(2)[self.usable.to(states.device)]


@dataclass
class Moments:
    """Sums over ``tokens`` calibration tokens, float64 on CPU.

    Attributes:
        shape: The model.
        groups: The layer groups of each recorded side; under ``"both"`` keys and values are recorded jointly.
        second: ``[width, width]`` per (side, group): sum of ``x xᵀ``, in the order of ``ModelShape.members``.
        total: ``[width]`` per (side, group): sum of ``x``.
        sensitivity: ``[layer_width, layer_width]`` per (side, layer): sum of ``g gᵀ``.
        inv_freq: Inverse frequencies per rope source.
        loss: Summed next-token loss over ``predicted`` tokens, in nats.
        sensitivity_kind: ``"gradient"`` or ``"query"``.
        probe: See ``Projections``.
    """

    shape: ModelShape
    groups: dict[str, list[Group]]
    second: dict[tuple[str, Group], Tensor] = field(default_factory=dict)
    total: dict[tuple[str, Group], Tensor] = field(default_factory=dict)
    sensitivity: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    inv_freq: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0
    sequences: int = 0
    loss: float = 0.0
    predicted: int = 0
    sensitivity_kind: str = "gradient"
    probe: Tensor | None = None

    @without_autocast
    def add(self, states: dict[str, dict[int, Tensor]], gradients: dict[str, dict[int, Tensor]]) -> None:
        """Add the tokens of one batch: per side and layer ``[tokens, layer_width]``, pre-RoPE."""
        for side, groups in self.groups.items():
            for group in groups:
                members = self.shape.members(side, group)
                rows = torch.cat([states[name][layer] for layer, name, _ in members], dim=1).float()
                key = (side, group)
                self.second[key] = _add(self.second.get(key), rows.T @ rows)
                self.total[key] = _add(self.total.get(key), rows.sum(0))
        for side in SIDES:
            for layer, rows in gradients[side].items():
                rows = rows.float()
                self.sensitivity[side, layer] = _add(self.sensitivity.get((side, layer)), rows.T @ rows)
        self.tokens += next(iter(states["key"].values())).shape[0]

    def of_group(self, side: str, group: Group, frame_length: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Second moment, mean and block-diagonal sensitivity of a group, averaged over a rotary frame.

        ``[width, width]``, ``[width]``, ``[width, width]``, float64.
        """
        rows, recorded = self.rows_of(side, group)
        second = self.second[recorded][rows][:, rows] / self.tokens
        mean = self.total[recorded][rows] / self.tokens
        members = self.shape.members(side, group)
        sensitivity = torch.block_diag(*(self.sensitivity[name, layer] / self.tokens for layer, name, _ in members))
        if frame_length > 1:
            shapes, offsets = [shape for _, _, shape in members], torch.arange(frame_length, device="cpu")
            second = rotation_average(second, shapes, self.inv_freq, offsets)
            sensitivity = rotation_average(sensitivity, shapes, self.inv_freq, offsets)
            mean = rotation_average(mean[:, None], shapes, self.inv_freq, offsets)[:, 0]
        return second, mean, sensitivity

    def rows_of(self, side: str, group: Group) -> tuple[Tensor, tuple[str, Group]]:
        """Where ``group`` lies inside a recorded group that holds it: row numbers, and that group's key."""
        wanted = [(layer, name) for layer, name, _ in self.shape.members(side, group)]
        for recorded_side, groups in self.groups.items():
            for recorded in groups:
                places, start = {}, 0
                for layer, name, shape in self.shape.members(recorded_side, recorded):
                    places[layer, name] = torch.arange(start, start + shape.width, device="cpu")
                    start += shape.width
                if set(wanted) <= set(places):
                    return torch.cat([places[member] for member in wanted]), (recorded_side, recorded)
        raise ValueError(
            f"{side} layers {group} were not recorded jointly; these moments hold the groups {self.groups}"
        )

    def side(self, side: str, group: Group) -> SideShape:
        return self.shape.layer(group[0]).side(side)

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file, so that groups and frames can change without another pass.

        Raises:
            OSError: If it cannot be written; a file that was there stays as it was.
        """
        counts = {name: getattr(self, name) for name in _COUNTS}
        metadata = {"moments": json.dumps({"shape": self.shape.to_dict(), "groups": self.groups, **counts})}
        tensors = {f"second.{side}.{group[0]}": sums for (side, group), sums in self.second.items()}
        tensors |= {f"total.{side}.{group[0]}": sums for (side, group), sums in self.total.items()}
        tensors |= {f"sensitivity.{side}.{layer}": sums for (side, layer), sums in self.sensitivity.items()}
        tensors |= {f"inv_freq.{source}": table.contiguous() for source, table in self.inv_freq.items()}
        tensors |= {} if self.probe is None else {"probe": self.probe}
        try:
            write_files({Path(path): lambda part: save_file(tensors, part, metadata=metadata)})
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from error

    @classmethod
    def load(cls, path: str | Path) -> "Moments":
        """Read what ``save`` wrote.

        Raises:
            ValueError: If the file is damaged or holds something else.
        """
        with damage_named(f"{path} holds no readable moments", ValueError):
            with safe_open(str(path), framework="pt") as file:
                header = json.loads(file.metadata()["moments"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            groups = {side: [tuple(group) for group in recorded] for side, recorded in header["groups"].items()}
            moments = cls(ModelShape.from_dict(header["shape"]), groups, **{name: header[name] for name in _COUNTS})
            for side, recorded in groups.items():
                for group in recorded:
                    moments.second[side, group] = tensors.pop(f"second.{side}.{group[0]}")
                    moments.total[side, group] = tensors.pop(f"total.{side}.{group[0]}")
            for layer in moments.shape.layers:
                for side in SIDES:
                    moments.sensitivity[side, layer.layer_idx] = tensors.pop(f"sensitivity.{side}.{layer.layer_idx}")
            moments.probe = tensors.pop("probe", None)
            moments.inv_freq = {name.removeprefix("inv_freq."): table for name, table in tensors.items()}
            return moments


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    part = part.double().cpu()
    return part if total is None else total.add_(part)


def rotation_average(
    matrix: Tensor, shapes: list[SideShape], inv_freq: Mapping[str, Tensor], offsets: Tensor
) -> Tensor:
    """Mean over ``offsets`` ``o`` of ``R(o) matrix R(o)ᵀ``, ``[..., width, width]``; of ``R(o) matrix`` for one column.

    ``R(o)`` rotates the rows that belong to sides with a rotary embedding, see ``shapes``.
    """
    average = torch.zeros_like(matrix)
    for offset in offsets:
        rotated = _rotate_columns(matrix.mT, shapes, inv_freq, offset).mT
        average += _rotate_columns(rotated, shapes, inv_freq, offset) if matrix.shape[-1] > 1 else rotated
    return average / len(offsets)


def _rotate_columns(matrix: Tensor, shapes: list[SideShape], inv_freq: Mapping[str, Tensor], offset: Tensor) -> Tensor:
    """``matrix R(o)ᵀ``: every row of ``matrix`` is a state of all members."""
    parts = []
    for shape, part in zip(shapes, matrix.split([shape.width for shape in shapes], dim=-1), strict=True):
        if shape.rope is not None:
            cos, sin = angle_tables(offset, inv_freq[shape.rope.source])
            part = rotate(part.unflatten(-1, (-1, shape.head_dim)), cos, sin, shape.rope.layout).flatten(-2)
        parts.append(part)
    return torch.cat(parts, dim=-1)
