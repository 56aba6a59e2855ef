"""``Projections``: the bases of a whole model with their provenance, the contract between calibration and the cache.

Saved as safetensors and JSON, loaded from a folder or the hub.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from lowrank_cache.artefact import Artefact
from lowrank_cache.basis import TENSORS, Basis, basis_name
from lowrank_cache.budget import GroupPlan, Ranks, plan_groups
from lowrank_cache.shapes import SIDES, ModelShape, sides_of

ARTEFACT = Artefact(
    name="projections",
    damaged="damaged projections",
    config_file="projections.json",
    tensor_file="projections.safetensors",
    version=1,
    remedy="calibrate again",
)
# Relative differences of one token's keys and values: the least of any layer, and the median over layers and sides.
# What was measured: docs/cache_contract.md, "Whose projections".
OTHER_WEIGHTS, TUNED_WEIGHTS = 0.9, 0.1
_README = """---
library_name: lowrank-cache
license: apache-2.0
tags:
- kv-cache
- low-rank
- quantization
---

# Projections of a low-rank KV cache

Made by the method `{method}` for {base_model} ({model_type}, {layers} compressed layers, frames of {frame_length});
{megabytes:.1f} MB, for compression ratios from {ratio:g}x on.

```python
from lowrank_cache import LowRankCache, Projections

projections = Projections.from_pretrained("THIS_REPOSITORY")
output = model.generate(**inputs, past_key_values=LowRankCache(model, projections, compression_ratio=8.0))
```

Calibration:

{provenance}
"""


class Projections:
    """The bases of one model, in the order of ``bases``, and where they come from.

    Args:
        bases: Together they cover every head of every compressible layer once, keys and values.
        shape: Shape of the model they were calibrated on.
        method: Name of the calibration method.
        frame_length: Slots per rotary frame of the keys; 1 stores pre-RoPE keys.
        provenance: JSON-able facts: versions, base model, calibration tokens, seed.
        min_compression_ratio: The ratio for which the bases were truncated; 1 at full rank. Channels for
            smaller ratios are missing.
        probe: What that model caches of one token, see ``probe.probe_states``, by which its weights are known again;
            None if they are not.

    Raises:
        ValueError: If a head is covered twice or not at all, or a basis does not fit ``shape``.
    """

    def __init__(
        self,
        bases: Sequence[Basis],
        shape: ModelShape,
        *,
        method: str,
        frame_length: int = 1,
        provenance: dict | None = None,
        min_compression_ratio: float = 1.0,
        probe: Tensor | None = None,
    ):
        if frame_length < 1:
            raise ValueError(f"frame_length must be at least 1, got {frame_length}")
        self.bases = tuple(bases)
        self.shape = shape
        self.method = method
        self.frame_length = frame_length
        self.provenance = dict(provenance or {})
        self.min_compression_ratio = float(min_compression_ratio)
        self.probe = probe
        _check_coverage(self.bases, shape)

    def groups(self) -> list[tuple[Basis, ...]]:
        """The bases by latent: those of a layer group's keys, values or both."""
        groups: dict[tuple, list[Basis]] = {}
        for basis in self.bases:
            groups.setdefault((basis.side, basis.layers), []).append(basis)
        return [tuple(group) for group in groups.values()]

    def plan(
        self, compression_ratio: float = 8.0, ranks: Ranks | None = None, bits: int | None = None
    ) -> list[GroupPlan]:
        """What a cache with these settings stores of each of ``groups()``, see ``budget.plan_groups``."""
        return plan_groups(self.groups(), self.shape, compression_ratio, ranks, bits, self.min_compression_ratio)

    @property
    def nbytes(self) -> int:
        """Bytes of all bases held here."""
        return sum(basis.nbytes for basis in self.bases)

    def truncate(self, compression_ratio: float) -> "Projections":
        """A copy that holds only what ``LowRankCache`` needs at this ratio or a larger one.

        Raises:
            ValueError: If the ratio is below the one these projections were truncated for, or unreachable.
        """
        plans = self.plan(compression_ratio)
        ranks = {id(basis): rank for plan in plans for basis, rank in zip(plan.bases, plan.ranks(), strict=True)}
        return Projections(
            [basis.truncate(ranks[id(basis)]) for basis in self.bases],
            self.shape,
            method=self.method,
            frame_length=self.frame_length,
            provenance=self.provenance,
            min_compression_ratio=compression_ratio,
            probe=self.probe,
        )

    def check_model(self, shape: ModelShape) -> None:
        """Raise ValueError, naming the first difference, if ``shape`` is not that of these projections."""
        ours, theirs = self.shape.to_dict(), shape.to_dict()
        if ours != theirs:
            raise ValueError(f"projections do not belong to this model: {_first_difference(ours, theirs)}")

    def check_weights(self, probe: Tensor | None) -> float:
        """How far a model's weights are from those that these projections were calibrated on, by one token's states.

        Args:
            probe: ``probe.probe_states`` of the model, whose shape is that of these projections.

        Returns:
            The median over layers and sides of the relative difference; 0 where it is not known.

        Raises:
            ValueError: If the weights are others altogether.
        """
        if self.probe is None or probe is None:
            return 0.0
        widths = [width for layer in self.shape.layers for width in (layer.key.width, layer.value.width)]
        parts = zip(self.probe.split(widths), probe.split(widths), strict=True)
        differences = torch.stack([(two - one).norm() / one.norm().clamp(min=1e-6) for one, two in parts])
        least = float(differences.min())
        if not least <= OTHER_WEIGHTS:
            raise ValueError(
                "projections do not belong to this model: it has the structure of the one they were calibrated on, and "
                f"other weights (keys and values of a token differ by {least:.0%} or more); calibrate on this one"
            )
        return float(differences.median())

    def __repr__(self) -> str:
        return (
            f"Projections(method={self.method!r}, frame_length={self.frame_length}, bases={len(self.bases)}, "
            f"model_type={self.shape.model_type!r}, nbytes={self.nbytes})"
        )

    def save_pretrained(
        self, save_directory: str | Path, *, repo_id: str | None = None, push_to_hub: bool = False, **push: Any
    ) -> str | None:
        """Write to a folder: JSON, safetensors and, unless there is one, a README.

        Args:
            save_directory: Made if there is none. Older projections in it are replaced whole or not at all.
            repo_id, push_to_hub, push: Push the folder too, see ``Artefact.push``; ``repo_id`` is by default the
                folder's name.

        Returns:
            The address of the commit, if it was pushed.

        Raises:
            OSError: If there is no room or no permission.
        """
        tensors = {
            f"{index:04d}.{basis.name}.{name}": getattr(basis, name).contiguous()
            for index, basis in enumerate(self.bases)
            for name in TENSORS
        }
        tensors |= {} if self.probe is None else {"probe": self.probe}
        facts = {
            "method": self.method,
            "frame_length": self.frame_length,
            "provenance": self.provenance,
            "min_compression_ratio": self.min_compression_ratio,
            "probe": self.probe is not None,
            "model_shape": self.shape.to_dict(),
            "model_fingerprint": self.shape.fingerprint,
            "bases": [
                {"side": basis.side, "layers": basis.layers, "heads": basis.heads, "rank_weight": basis.rank_weight}
                for basis in self.bases
            ],
        }
        readme = _README.format(
            method=self.method,
            base_model=self.provenance.get("base_model") or "a model without a name",
            model_type=self.shape.model_type,
            layers=len(self.shape.layers),
            frame_length=self.frame_length,
            megabytes=self.nbytes / 1e6,
            ratio=self.min_compression_ratio,
            provenance="\n".join(f"- {name}: {fact}" for name, fact in self.provenance.items()),
        )
        ARTEFACT.write(save_directory, facts, tensors, readme)
        return ARTEFACT.push(save_directory, repo_id or Path(save_directory).name, **push) if push_to_hub else None

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Save to a repository on the hub and return the commit's address; ``options``: see ``Artefact.push``."""
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return ARTEFACT.push(folder, repo_id, **options)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, compression_ratio: float | None = None, **download: Any
    ) -> "Projections":
        """Load what ``save_pretrained`` wrote, from a folder or from a repository on the hub.

        Args:
            compression_ratio: Load only what this ratio or a larger one needs, see ``truncate``. The file
                is mapped, not read whole, so bases that are cut away take no memory.
            download: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` and ``force_download``.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is damaged, was edited, or has another format version.
        """
        folder, config, tensors = ARTEFACT.read(pretrained_model_name_or_path, **download)
        with ARTEFACT.damage_named(folder, ValueError, RuntimeError):
            projections = _assemble(config, tensors)
        return projections if compression_ratio is None else projections.truncate(compression_ratio)


def _assemble(config: dict[str, Any], tensors: dict[str, Tensor]) -> Projections:
    bases = []
    for index, fields in enumerate(config["bases"]):
        layers, heads = tuple(map(int, fields["layers"])), tuple(map(int, fields["heads"]))
        prefix = f"{index:04d}.{basis_name(fields['side'], layers, heads)}"
        arrays = {name: tensors[f"{prefix}.{name}"] for name in TENSORS}
        wrong = {name: array.dtype for name, array in arrays.items() if array.dtype != torch.float32}
        if wrong or arrays["down_proj"].dim() != 2:
            raise ValueError(f"{prefix} must be float32 with a matrix down_proj, got {wrong or 'another shape'}")
        weight = fields["rank_weight"]
        bases.append(
            Basis(fields["side"], layers, heads, **arrays, rank_weight=None if weight is None else _finite(weight))
        )
    shape = ModelShape.from_dict(config["model_shape"])
    probe, widths = tensors.get("probe"), [layer.key.width + layer.value.width for layer in shape.layers]
    if (probe is not None) != bool(config.get("probe")):  # older files say nothing and hold none
        raise ValueError("probe must be there if, and only if, the JSON says so")
    if probe is not None:
        if probe.dtype != torch.float32 or list(probe.shape) != [sum(widths)]:
            raise ValueError(f"probe must be float32 of [{sum(widths)}], got {probe.dtype} of {list(probe.shape)}")
        if not bool(torch.isfinite(probe).all()):
            raise ValueError("probe must be finite, got NaN or infinity")
    return Projections(
        bases,
        shape,
        method=str(config["method"]),
        frame_length=int(config["frame_length"]),
        provenance=config["provenance"],
        min_compression_ratio=_finite(config["min_compression_ratio"]),
        probe=probe,
    )


def _finite(number: Any) -> float:
    if not isinstance(number, int | float) or not math.isfinite(number):
        raise ValueError(f"a finite number was expected, got {number!r}")
    return float(number)


def _check_coverage(bases: tuple[Basis, ...], shape: ModelShape) -> None:
    layers = {layer.layer_idx: layer for layer in shape.layers}
    covered: dict[tuple[str, int], list[int]] = {}
    for basis in bases:
        unknown = [index for index in basis.layers if index not in layers]
        if unknown:
            raise ValueError(f"{basis.name}: layers {unknown} are not compressible layers of the model")
        if list(basis.layers) != sorted(set(basis.layers)):
            raise ValueError(f"{basis.name}: layers must be in ascending order, each once, got {basis.layers}")
        if len({tuple(layers[index].side(side) for side in sides_of(basis.side)) for index in basis.layers}) != 1:
            raise ValueError(f"{basis.name}: grouped layers must have equal heads, head_dim and rope")
        members = shape.members(basis.side, basis.layers)
        width = sum(len(basis.heads) * member.head_dim for _, _, member in members)
        if basis.width != width:
            raise ValueError(f"{basis.name}: down_proj must have {width} rows, got {basis.width}")
        for index, side, _ in members:
            covered.setdefault((side, index), []).extend(basis.heads)
    for index, layer in layers.items():
        for side in SIDES:
            heads, count = sorted(covered.get((side, index), [])), layer.side(side).heads
            if len(heads) != count or heads != list(range(count)):
                # A damaged file may say any number.
                expected = list(range(count)) if count < 1000 else f"0 to {count - 1}"
                raise ValueError(
                    f"bases must cover each {side} head of layer {index} once, heads {expected}, got {heads}"
                )


def _first_difference(ours, theirs, path: str = "") -> str:
    pairs: list[tuple] = []
    if isinstance(ours, dict) and isinstance(theirs, dict):
        pairs = [(f"{path}.{key}".lstrip("."), ours[key], theirs.get(key)) for key in ours]
    elif isinstance(ours, list | tuple) and isinstance(theirs, list | tuple) and len(ours) == len(theirs):
        pairs = [(f"{path}[{index}]", *both) for index, both in enumerate(zip(ours, theirs, strict=True))]
    for place, one, other in pairs:
        if one != other:
            return _first_difference(one, other, place)
    return f"they were calibrated with {path} = {ours!r}, the model has {theirs!r}"
