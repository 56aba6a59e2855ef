"""The contract between calibration, which makes projections, and the cache, which uses them.

A ``Basis`` takes the states of some heads of one layer, or of a group of adjacent layers, to a
latent and back. ``Projections`` are the bases of a whole model with their provenance: saved as
safetensors and JSON, loaded from a folder or the hub.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors
import torch
from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from safetensors.torch import load_file, save
from torch import Tensor

from lowrank_cache.allocation import plan_stores
from lowrank_cache.artefact_config import config_bytes, read_config
from lowrank_cache.atomic import write_files
from lowrank_cache.models import BOTH, SIDES, ModelShape

__all__ = ["Basis", "Projections"]

FORMAT_VERSION = 1
CONFIG_FILE = "projections.json"  # not config.json, which ModelHubMixin deletes before it saves
TENSOR_FILE = "projections.safetensors"
_TENSORS = ("down_proj", "up_proj", "offset", "loss", "constant")


@dataclass(frozen=True)
class Basis:
    """Down- and up-projection of the keys, the values or both of a layer group, for some of its heads.

    With ``x`` the states of one token, ``[width]``, layers outermost, then keys before values, then
    ``heads``, then head_dim:
    ``z = x @ down_proj`` is its latent, of unit variance per channel, and ``x ≈ z @ up_proj +
    constant``. Keys are in their rotary frame (docs/method.md). Channels are sorted by ``loss``,
    descending.

    Attributes:
        side: ``"key"`` or ``"value"``: which argument of ``Cache.update``; ``"both"`` for one latent of
            keys and values.
        layers: Adjacent cache layers that share the latent.
        heads: KV heads of each of these layers (and of each side) that the basis covers, in the order of
            its rows.
        down_proj: ``[width, rank]`` float32.
        up_proj: ``[rank, width]`` float32.
        offset: ``[rank]`` float32, mean of each latent channel.
        loss: ``[rank]`` float32, predicted loss per unit of squared latent error, in nats a token.
        constant: ``[width]`` float32, mean of what the channels cut away by ``truncate`` held; zero at
            full rank.
        rank_weight: For methods that set ranks by projection and not by channel (Palu): this basis'
            share; None where ``loss`` decides.
    """

    side: str
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    down_proj: Tensor
    up_proj: Tensor
    offset: Tensor
    loss: Tensor
    constant: Tensor
    rank_weight: float | None = None

    def __post_init__(self):
        if self.side not in (*SIDES, BOTH):
            raise ValueError(f"side must be 'key', 'value' or 'both', got {self.side!r}")
        width, rank = self.down_proj.shape
        expected = {"up_proj": (rank, width), "offset": (rank,), "loss": (rank,), "constant": (width,)}
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{self.name}: {name} must have shape {list(shape)}, got {list(tensor.shape)}")
        for name in _TENSORS:
            if not bool(torch.isfinite(getattr(self, name)).all()):
                raise ValueError(f"{self.name}: {name} must be finite, got NaN or infinity")

    @property
    def name(self) -> str:
        heads = "-".join(map(str, self.heads))
        return f"{self.side}.layers_{self.layers[0]}_{self.layers[-1]}.heads_{heads}"

    @property
    def width(self) -> int:
        return self.down_proj.shape[0]

    @property
    def rank(self) -> int:
        return self.down_proj.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, name).numel() * getattr(self, name).element_size() for name in _TENSORS)

    def truncate(self, rank: int) -> "Basis":
        """A copy with the first ``rank`` channels; the others are read as their mean."""
        return replace(
            self,
            down_proj=self.down_proj[:, :rank].clone(),
            up_proj=self.up_proj[:rank].clone(),
            offset=self.offset[:rank].clone(),
            loss=self.loss[:rank].clone(),
            constant=self.constant + self.offset[rank:] @ self.up_proj[rank:],
        )


# Filled in by ModelHubMixin when projections are saved.
_CARD = """---
{{ card_data }}
---

# Projections of a low-rank KV cache

Made by the method `{{ method }}` for {{ base_model }} ({{ model_type }}, {{ layers }} compressed layers, frames of
{{ frame_length }}); {{ megabytes }} MB, for compression ratios from {{ ratio }}x on.

```python
from lowrank_cache import LowRankCache, Projections

projections = Projections.from_pretrained("THIS_REPOSITORY")
output = model.generate(**inputs, past_key_values=LowRankCache(model, projections, compression_ratio=8.0))
```

Calibration:
{% for name, fact in provenance.items() %}
- {{ name }}: {{ fact }}{% endfor %}
"""


class Projections(
    ModelHubMixin,
    library_name="lowrank-cache",
    tags=["kv-cache", "low-rank", "quantization"],
    license="apache-2.0",
    model_card_template=_CARD,
):
    """The bases of one model, in the order of ``bases``, and where they come from.

    Args:
        bases: Together they cover every head of every compressible layer once, keys and values.
        shape: Shape of the model they were calibrated on.
        method: Name of the calibration method.
        frame_length: Slots per rotary frame of the keys; 1 stores pre-RoPE keys.
        provenance: JSON-able facts: versions, base model, calibration tokens, seed.
        min_compression_ratio: The ratio for which the bases were truncated; 1 at full rank. Channels for
            smaller ratios are missing.

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
    ):
        if frame_length < 1:
            raise ValueError(f"frame_length must be at least 1, got {frame_length}")
        self.bases = tuple(bases)
        self.shape = shape
        self.method = method
        self.frame_length = frame_length
        self.provenance = dict(provenance or {})
        self.min_compression_ratio = float(min_compression_ratio)
        self._hub_mixin_config = None  # else ModelHubMixin would write these arguments to a config.json
        _check_coverage(self.bases, shape)

    def stores(self) -> list[tuple[Basis, ...]]:
        """The bases grouped by what is stored together: a layer group's keys, values or both."""
        groups: dict[tuple, list[Basis]] = {}
        for basis in self.bases:
            groups.setdefault((basis.side, basis.layers), []).append(basis)
        return [tuple(group) for group in groups.values()]

    @property
    def nbytes(self) -> int:
        """Bytes of all bases held here."""
        return sum(basis.nbytes for basis in self.bases)

    def truncate(self, compression_ratio: float) -> "Projections":
        """A copy that holds only what ``LowRankCache`` needs at this ratio or a larger one.

        Raises:
            ValueError: If the ratio is below the one these projections were truncated for, or unreachable.
        """
        ranks: dict[int, int] = {}
        for store, plan in zip(self.stores(), plan_stores(self, compression_ratio), strict=True):
            kept = {channel for _, channels in plan.tiers for channel in channels}
            start = 0
            for basis in store:
                # Kept channels are each basis' first ones, whatever the allocation.
                ranks[id(basis)] = sum(start <= channel < start + basis.rank for channel in kept)
                start += basis.rank
        return Projections(
            [basis.truncate(ranks[id(basis)]) for basis in self.bases],
            self.shape,
            method=self.method,
            frame_length=self.frame_length,
            provenance=self.provenance,
            min_compression_ratio=compression_ratio,
        )

    def generate_model_card(self, *args, **kwargs) -> ModelCard:
        """The README.md that is saved beside the bases."""
        facts = {
            "method": self.method,
            "base_model": self.provenance.get("base_model") or "a model without a name",
            "model_type": self.shape.model_type,
            "layers": len(self.shape.layers),
            "frame_length": self.frame_length,
            "megabytes": f"{self.nbytes / 1e6:.1f}",
            "ratio": f"{self.min_compression_ratio:g}",
            "provenance": self.provenance,
        }
        return super().generate_model_card(*args, **{**kwargs, **facts})

    def check_model(self, shape: ModelShape) -> None:
        """Raise ValueError, naming the first difference, if ``shape`` is not that of these projections."""
        ours, theirs = self.shape.to_dict(), shape.to_dict()
        if ours != theirs:
            difference = _first_difference(ours, theirs)
            raise ValueError(f"projections do not belong to this model: {difference}")

    def __repr__(self) -> str:
        return (
            f"Projections(method={self.method!r}, frame_length={self.frame_length}, bases={len(self.bases)}, "
            f"model_type={self.shape.model_type!r}, nbytes={self.nbytes})"
        )

    def _save_pretrained(self, save_directory: Path) -> None:
        tensors = {
            f"{index:04d}.{basis.name}.{name}": getattr(basis, name).contiguous()
            for index, basis in enumerate(self.bases)
            for name in _TENSORS
        }
        payload = save(tensors, metadata={"format": "pt"})
        config = {
            "format_version": FORMAT_VERSION,
            "method": self.method,
            "frame_length": self.frame_length,
            "provenance": self.provenance,
            "min_compression_ratio": self.min_compression_ratio,
            "model_shape": self.shape.to_dict(),
            "model_fingerprint": self.shape.fingerprint,
            "bases": [
                {
                    "side": basis.side,
                    "layers": basis.layers,
                    "heads": basis.heads,
                    "rank_weight": basis.rank_weight,
                }
                for basis in self.bases
            ],
            "tensors_sha256": hashlib.sha256(payload).hexdigest(),
        }
        write_files({save_directory / TENSOR_FILE: payload, save_directory / CONFIG_FILE: config_bytes(config)})

    @classmethod
    def from_pretrained(  # type: ignore[override]  # named arguments instead of model_kwargs
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        compression_ratio: float | None = None,
    ) -> "Projections":
        """Load what ``save_pretrained`` wrote, from a folder or from a repository on the hub.

        Args:
            compression_ratio: Load only what this ratio or a larger one needs, see ``truncate``. The file
                is mapped, not read whole, so bases that are cut away take no memory.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is damaged, was edited, or has another format version.
        """
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            folder = Path(
                snapshot_download(
                    str(pretrained_model_name_or_path),
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                    allow_patterns=[CONFIG_FILE, TENSOR_FILE],
                )
            )
        projections = _read(folder)
        return projections if compression_ratio is None else projections.truncate(compression_ratio)


def _read(folder: Path) -> Projections:
    for name in (CONFIG_FILE, TENSOR_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no projections: {name} is missing")
    config = read_config(folder / CONFIG_FILE, FORMAT_VERSION, remedy="calibrate again")
    with open(folder / TENSOR_FILE, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    expected = config.get("tensors_sha256")
    if found != expected:
        raise ValueError(f"{folder / TENSOR_FILE} is damaged: its SHA-256 is {found}, {CONFIG_FILE} expects {expected}")
    try:
        return _assemble(config, load_file(folder / TENSOR_FILE))  # mapped: pages are read when used
    except (*_DAMAGE, safetensors.SafetensorError, RuntimeError) as error:
        raise ValueError(f"{folder} holds damaged projections: {type(error).__name__}: {error}") from error


# What wrong types and sizes in a file may raise where they are used.
_DAMAGE = (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError)


def _assemble(config: dict, tensors: dict[str, Tensor]) -> Projections:
    bases = []
    for index, fields in enumerate(config["bases"]):
        layers, heads = tuple(map(int, fields["layers"])), tuple(map(int, fields["heads"]))
        prefix = f"{index:04d}.{fields['side']}.layers_{layers[0]}_{layers[-1]}.heads_{'-'.join(map(str, heads))}"
        arrays = {name: tensors[f"{prefix}.{name}"] for name in _TENSORS}
        wrong = {name: array.dtype for name, array in arrays.items() if array.dtype != torch.float32}
        if wrong or arrays["down_proj"].dim() != 2:
            raise ValueError(f"{prefix} must be float32 with a matrix down_proj, got {wrong or 'another shape'}")
        weight = fields["rank_weight"]
        bases.append(
            Basis(fields["side"], layers, heads, **arrays, rank_weight=None if weight is None else _finite(weight))
        )
    return Projections(
        bases,
        ModelShape.from_dict(config["model_shape"]),
        method=str(config["method"]),
        frame_length=int(config["frame_length"]),
        provenance=config["provenance"],
        min_compression_ratio=_finite(config["min_compression_ratio"]),
    )


def _finite(number) -> float:
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
        sides = SIDES if basis.side == BOTH else (basis.side,)
        if len({tuple(layers[index].side(side) for side in sides) for index in basis.layers}) != 1:
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
                raise ValueError(
                    f"bases must cover each {side} head of layer {index} once, heads {_listed(count)}, got {heads}"
                )


def _listed(heads: int) -> str:
    return str(list(range(heads))) if heads < 1000 else f"0 to {heads - 1}"  # the number may come from a damaged file


def _first_difference(ours, theirs, path: str = "") -> str:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in ours:
            if ours[key] != theirs.get(key):
                return _first_difference(ours[key], theirs.get(key), f"{path}.{key}".lstrip("."))
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple) and len(ours) == len(theirs):
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            if one != other:
                return _first_difference(one, other, f"{path}[{index}]")
    return f"they were calibrated with {path} = {ours!r}, the model has {theirs!r}"
