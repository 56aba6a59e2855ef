"""What projections would store at a ratio: tiers, predicted loss and bytes, as a table and a picture."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from lowrank_cache.budget import GroupPlan, full_bytes_per_token
from lowrank_cache.coder import calibrated_coders
from lowrank_cache.evaluation.report import check_installed
from lowrank_cache.projections import Projections
from lowrank_cache.shapes import BOTH

_CURVE_RATIOS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24)


@dataclass(frozen=True)
class Inspection:
    """What some projections store at one ratio."""

    plans: list[GroupPlan]  # in the order of the bases
    basis_bytes: int  # of the bases truncated to this ratio, as a cache holds them
    saved_bytes: int  # of the bases in the artefact, full rank
    full_bytes: int  # per token, full cache at 16 bits

    @property
    def latent_bytes(self) -> int:
        """Bytes per token of all latents."""
        return sum(plan.bytes_per_token for plan in self.plans)

    @property
    def predicted_loss(self) -> float:
        """Nats per token, see docs/method.md, "Spending bits"."""
        return sum(plan.predicted_loss() for plan in self.plans)

    def break_even(self, exact_tokens: int = 4 + 128 + 64, batch: int = 1) -> float:
        """Tokens per sequence beyond which bases and cache together are smaller than the full cache at 16 bits.

        Args:
            exact_tokens: Kept exactly, at 16 bits: sinks, window and a block about to be encoded.
            batch: Sequences that share the bases.

        Returns:
            Infinity if latents take as many bytes as the full cache.
        """
        saved = self.full_bytes - self.latent_bytes
        return exact_tokens + math.ceil(self.basis_bytes / batch / saved) if saved > 0 else math.inf

    def table(self) -> Table:
        """One line per group, and the totals."""
        table = Table(title="what is stored of each token", show_footer=True)
        channels = sum(len(plan.channels) for plan in self.plans)
        totals = {"layers": "all", "side": "", "width": self.full_bytes // 2, "rank": channels, "channels x bits": "",
                  "predicted loss": f"{self.predicted_loss:.3g}", "bytes": self.latent_bytes,
                  "full bytes": self.full_bytes}  # fmt: skip
        for name, total in totals.items():
            table.add_column(name, str(total), justify="left" if total in ("all", "") else "right")
        for plan in self.plans:
            tiers = " ".join(f"{len(channels)}x{bits}" for bits, channels in plan.tiers) or "none"
            width = sum(basis.width for basis in plan.bases)
            cells = [_layers(plan), plan.bases[0].side, str(width), str(len(plan.channels)), tiers]
            table.add_row(*cells, f"{plan.predicted_loss():.3g}", str(plan.bytes_per_token), str(2 * width))
        return table

    def summary(self) -> str:
        """Bytes of the bases, and from which context length on they are earned back."""
        return (
            f"Per token {self.latent_bytes} bytes of latents instead of {self.full_bytes} "
            f"({self.full_bytes / max(self.latent_bytes, 1):.2f}x); sink tokens and window come on top.\n"
            f"Bases: {self.basis_bytes:,} bytes in memory at this ratio, {self.saved_bytes:,} bytes saved.\n"
            f"Bases and cache together are smaller than the full cache beyond {self.break_even():,} tokens of context "
            f"at batch 1, {self.break_even(batch=8):,} at batch 8."
        )


def inspect_projections(projections: Projections, compression_ratio: float = 8.0) -> Inspection:
    """Plan ``projections`` at a ratio.

    Raises:
        ValueError: If the ratio is out of range or cannot be reached.
    """
    coders = calibrated_coders(projections, {}, compression_ratio, None, None, torch.float16)
    basis_bytes = sum(coder.projection_bytes for coder in coders)
    full_bytes = full_bytes_per_token(projections.shape)
    return Inspection(projections.plan(compression_ratio), basis_bytes, projections.nbytes, full_bytes)


def _layers(plan: GroupPlan) -> str:
    first, last = plan.bases[0].layers[0], plan.bases[0].layers[-1]
    return str(first) if first == last else f"{first}-{last}"


def plot_projections(projections: Projections, ratio: float, path: Path) -> None:
    """Write a PNG: the bits of every channel at ``ratio``, and the predicted loss against the ratio."""
    check_installed()
    from matplotlib.figure import Figure

    by_side: dict[str, list[GroupPlan]] = {}
    for plan in projections.plan(ratio):
        by_side.setdefault(plan.bases[0].side, []).append(plan)
    figure = Figure(figsize=(5 * len(by_side) + 5, 5), layout="constrained")
    *pictures, curve = figure.subplots(1, len(by_side) + 1)
    for axis, (side, plans) in zip(pictures, by_side.items(), strict=True):
        options = {"cmap": "viridis", "vmin": 0, "vmax": 16, "interpolation": "nearest", "aspect": "auto"}
        image = axis.imshow(np.stack([_bits(plan) for plan in plans]), extent=(0, 1, len(plans), 0), **options)
        axis.set_yticks(np.arange(len(plans)) + 0.5, [_layers(plan) for plan in plans], fontsize=7)
        axis.set(xlabel="channels of the layer group, by importance", ylabel="layers")
        axis.set_title(f"bits per channel, {'keys and values' if side == BOTH else side + 's'}, {ratio:g}x")
    figure.colorbar(image, ax=pictures[-1], ticks=(0, 2, 4, 8, 16)).set_label("bits")
    reachable = [value for value in _CURVE_RATIOS if value >= projections.min_compression_ratio]
    losses = [sum(plan.predicted_loss() for plan in projections.plan(value)) for value in reachable]
    curve.plot(reachable, losses, marker="o")
    curve.axvline(ratio, color="grey", linestyle=":")
    curve.set(xscale="log", yscale="log", xlabel="compression ratio in latents", ylabel="predicted loss, nats a token")
    curve.set_xticks(reachable, [f"{value}x" for value in reachable], fontsize=8)
    curve.minorticks_off()
    curve.set_title("predicted loss against ratio")
    figure.savefig(path, dpi=120)


def _bits(plan: GroupPlan) -> np.ndarray:
    """``[1000]``: bits over the share of a group's channels, most bits first."""
    bits = np.repeat([width for width, _ in plan.tiers], [len(channels) for _, channels in plan.tiers])
    padded = np.pad(bits, (0, sum(basis.rank for basis in plan.bases) - len(bits)))
    return padded[np.linspace(0, len(padded) - 1, 1000).astype(int)]
