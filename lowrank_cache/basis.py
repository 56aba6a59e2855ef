"""``Basis``: the matrices that take the states of some heads to a latent and back."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowrank_cache.kernels.ambient import without_autocast
from lowrank_cache.shapes import BOTH, SIDES

TENSORS = ("down_proj", "up_proj", "offset", "loss", "constant")  # in the order in which they are saved


def basis_name(side: str, layers: Sequence[int], heads: Sequence[int]) -> str:
    """What messages, and files before each tensor, call a basis."""
    return f"{side}.layers_{layers[0]}_{layers[-1]}.heads_{'-'.join(map(str, heads))}"


@dataclass(frozen=True)
class Basis:
    """Down- and up-projection of the keys, the values or both of a layer group, for some of its heads.

    With ``x`` the states of one token, ``[width]``, layers outermost, then keys before values, heads and
    head_dim, ``z = x @ down_proj`` is its latent, of unit variance per channel, and ``x ≈ z @ up_proj +
    constant``. Keys are in their rotary frame (docs/method.md). Channels descend by ``loss``.

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
        shapes = (width, rank), (rank, width), (rank,), (rank,), (width,)
        for name, shape in zip(TENSORS, shapes, strict=True):
            tensor = getattr(self, name)
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{self.name}: {name} must have shape {list(shape)}, got {list(tensor.shape)}")
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{self.name}: {name} must be finite, got NaN or infinity")

    @property
    def name(self) -> str:
        return basis_name(self.side, self.layers, self.heads)

    @property
    def width(self) -> int:
        return self.down_proj.shape[0]

    @property
    def rank(self) -> int:
        return self.down_proj.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in TENSORS)

    @without_autocast
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
