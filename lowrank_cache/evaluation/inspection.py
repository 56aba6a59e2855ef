"""What projections would store at a ratio: tiers, predicted loss and bytes, without a model."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from rich.table import Table

from lowrank_cache.allocation import StorePlan, full_bytes_per_token, plan_stores, predicted_loss
from lowrank_cache.budget import DISTORTION
from lowrank_cache.latents import Coder
from lowrank_cache.projections import Basis, Projections

__all__ = ["Inspection", "StoreRow", "inspect_projections", "three_bit_gain"]


@dataclass(frozen=True)
class StoreRow:
    """One store: keys, values or both of one layer group.

    Attributes:
        bases: Its bases.
        plan: The channels it keeps.
        predicted_loss: Nats per token; see docs/method.md, "Spending bits".
        full_bytes: Of one token in the full cache at 16 bits.
    """

    bases: tuple[Basis, ...]
    plan: StorePlan
    predicted_loss: float
    full_bytes: int


@dataclass(frozen=True)
class Inspection:
    """Every store of some projections at one ratio.

    Attributes:
        rows: In the order of ``Projections.stores``.
        basis_bytes: Of the bases truncated to this ratio, as a cache holds them.
        saved_bytes: Of the bases in the artefact, full rank.
        full_bytes: Per token, full cache at 16 bits.
        three_bit_gain: Share of the predicted loss that channels of 3 bits would save, see ``three_bit_gain``.
    """

    rows: tuple[StoreRow, ...]
    basis_bytes: int
    saved_bytes: int
    full_bytes: int
    three_bit_gain: float

    @property
    def latent_bytes(self) -> int:
        """Bytes per token of all latents."""
        return sum(row.plan.bytes_per_token for row in self.rows)

    def break_even(self, exact_tokens: int = 4 + 128 + 64, batch: int = 1) -> float:
        """Tokens per row beyond which bases and cache together are smaller than the full cache at 16 bits.

        Args:
            exact_tokens: Kept exactly, at 16 bits: sinks, window and a block about to be encoded.
            batch: Rows that share the bases.

        Returns:
            Infinity if latents take as many bytes as the full cache.
        """
        saved = self.full_bytes - self.latent_bytes
        return exact_tokens + math.ceil(self.basis_bytes / batch / saved) if saved > 0 else math.inf

    def table(self) -> Table:
        """One line per store, and the totals."""
        table = Table(title="what is stored of each token", show_footer=True)
        loss = sum(row.predicted_loss for row in self.rows)
        table.add_column("layers", "all")
        table.add_column("side")
        table.add_column("width", str(self.full_bytes // 2), justify="right")
        table.add_column("rank", str(sum(_rank(row.plan) for row in self.rows)), justify="right")
        table.add_column("channels x bits")
        table.add_column("predicted loss", f"{loss:.3g}", justify="right")
        table.add_column("bytes", str(self.latent_bytes), justify="right")
        table.add_column("full bytes", str(self.full_bytes), justify="right")
        for row in self.rows:
            first, last = row.bases[0].layers[0], row.bases[0].layers[-1]
            table.add_row(
                str(first) if first == last else f"{first}-{last}",
                row.bases[0].side,
                str(row.full_bytes // 2),
                str(_rank(row.plan)),
                " ".join(f"{len(channels)}x{bits}" for bits, channels in row.plan.tiers) or "none",
                f"{row.predicted_loss:.3g}",
                str(row.plan.bytes_per_token),
                str(row.full_bytes),
            )
        return table

    def summary(self) -> str:
        """Bytes of the bases, and from which context length on they are earned back."""
        return (
            f"Per token {self.latent_bytes} bytes of latents instead of {self.full_bytes} "
            f"({self.full_bytes / max(self.latent_bytes, 1):.2f}x); sink tokens and window come on top.\n"
            f"Bases: {self.basis_bytes:,} bytes in memory at this ratio, {self.saved_bytes:,} bytes saved.\n"
            f"Bases and cache together are smaller than the full cache beyond {self.break_even():,} tokens of context "
            f"at batch 1, {self.break_even(batch=8):,} at batch 8.\n"
            f"A 3-bit tier would lower the predicted loss by {self.three_bit_gain:.1%} (before its padding and steps)."
        )


def inspect_projections(projections: Projections, compression_ratio: float = 8.0) -> Inspection:
    """Plan ``projections`` at a ratio.

    Raises:
        ValueError: If the ratio is out of range or cannot be reached.
    """
    rows, basis_bytes = [], 0
    stores = projections.stores()
    for store, plan in zip(stores, plan_stores(projections, compression_ratio), strict=True):
        members = projections.shape.members(store[0].side, store[0].layers)
        full_bytes = 2 * sum(shape.width for _, _, shape in members)
        rows.append(StoreRow(store, plan, predicted_loss(store, plan), full_bytes))
        basis_bytes += Coder(store, plan, members, torch.float16).nbytes
    full_bytes = full_bytes_per_token(projections)
    loss = np.concatenate([basis.loss.double().numpy() for basis in projections.bases])
    gain = three_bit_gain(loss, 8 * full_bytes / compression_ratio)
    return Inspection(tuple(rows), basis_bytes, projections.nbytes, full_bytes, gain)


def three_bit_gain(loss: np.ndarray, bits: float) -> float:
    """How much lower the predicted loss would be, at ``bits`` per token, if channels could take 3 bits.

    Padding and steps are left out on both sides: an upper bound of what a tier that packs badly into bytes
    could give. The distortion at 3 bits is that of the best uniform quantizer of a normal variable
    (J. Max, 1960), lowered as steps per token lower those of 2 and 4 bits.
    """
    without = _least_loss(loss, bits, DISTORTION)
    return 1 - _least_loss(loss, bits, {**DISTORTION, 3: 0.0337}) / without if without > 0 else 0.0


def _least_loss(loss: np.ndarray, bits: float, distortion: dict[int, float]) -> float:
    """Least predicted loss with ``bits`` in all: each channel minimises its loss plus a price per bit."""
    widths, factors = np.array(list(distortion)), np.array(list(distortion.values()))
    cheap, dear = 1e-30, float(loss.max()) + 1e-30
    chosen = np.zeros(len(loss), dtype=int)
    for _ in range(100):
        price = (cheap * dear) ** 0.5
        chosen = (loss[:, None] * factors + price * widths).argmin(1)
        if widths[chosen].sum() > bits:
            cheap = price
        else:
            dear = price
    return float((loss * factors[chosen]).sum())


def _rank(plan: StorePlan) -> int:
    return sum(len(channels) for _, channels in plan.tiers)
