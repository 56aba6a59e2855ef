"""Pictures: bits per layer and side, predicted loss against ratio, measured quality against bytes."""

from pathlib import Path
from typing import Any

import numpy as np

from lowrank_cache.allocation import StorePlan, plan_stores, predicted_loss
from lowrank_cache.evaluation.bench import BenchRow
from lowrank_cache.evaluation.quality import QualityRow, perplexity_ratio
from lowrank_cache.models import BOTH
from lowrank_cache.projections import Projections

__all__ = ["plot_bench", "plot_evaluation", "plot_projections", "plot_quality"]

CURVE_RATIOS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24)


def plot_projections(projections: Projections, ratio: float, path: Path) -> None:
    """Write a PNG: the bits of every channel at ``ratio``, and the predicted loss against the ratio.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    plt = _pyplot()
    plans = list(zip(projections.stores(), plan_stores(projections, ratio), strict=True))
    sides = sorted({store[0].side for store, _ in plans})
    figure, axes = plt.subplots(1, len(sides) + 1, figsize=(5 * len(sides) + 5, 5), constrained_layout=True)
    for axis, side in zip(axes[:-1], sides, strict=True):
        picture, layers = _bits_picture([(store, plan) for store, plan in plans if store[0].side == side])
        image = axis.imshow(
            picture,
            aspect="auto",
            cmap="viridis",
            vmin=0,
            vmax=16,
            interpolation="nearest",
            extent=(0, 1, len(layers), 0),
        )
        axis.set_yticks(np.arange(len(layers)) + 0.5, layers, fontsize=7)
        axis.set_xlabel("channels of the layer group, by importance")
        axis.set_ylabel("layers")
        axis.set_title(f"bits per channel, {'keys and values' if side == BOTH else side + 's'}, {ratio:g}x")
    colorbar = figure.colorbar(image, ax=axes[-2], ticks=(0, 2, 4, 8, 16))
    colorbar.set_label("bits")
    reachable = [value for value in CURVE_RATIOS if value >= projections.min_compression_ratio]
    losses = [
        sum(
            predicted_loss(store, plan)
            for store, plan in zip(projections.stores(), plan_stores(projections, value), strict=True)
        )
        for value in reachable
    ]
    axes[-1].plot(reachable, losses, marker="o")
    axes[-1].axvline(ratio, color="grey", linestyle=":")
    axes[-1].set(
        xscale="log", yscale="log", xlabel="compression ratio in latents", ylabel="predicted loss, nats a token"
    )
    axes[-1].set_xticks(reachable, [f"{value}x" for value in reachable], fontsize=8)
    axes[-1].minorticks_off()
    axes[-1].set_title("predicted loss against ratio")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _bits_picture(entries: list[tuple[tuple, StorePlan]]) -> tuple[np.ndarray, list[str]]:
    """``[stores, 1000]`` bits over the share of each store's channels, and a label a store."""
    rows, labels = [], []
    for store, plan in entries:
        bits = np.zeros(sum(basis.rank for basis in store))
        start = 0
        for width, channels in plan.tiers:
            bits[start : start + len(channels)] = width
            start += len(channels)
        rows.append(bits[np.linspace(0, len(bits) - 1, 1000).astype(int)])
        layers = store[0].layers
        labels.append(str(layers[0]) if len(layers) == 1 else f"{layers[0]}–{layers[-1]}")
    return np.stack(rows), labels


def plot_quality(rows: list[QualityRow], path: Path) -> None:
    """Write a PNG: perplexity ratio, look-up loss and exact answers against stored bytes, one line per family."""
    plt = _pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(19, 5), constrained_layout=True)
    full, others = rows[0], rows[1:]
    families: dict[str, list[QualityRow]] = {}
    for row in others:
        families.setdefault(_family(row.name), []).append(row)
    for family, members in families.items():
        members = sorted(members, key=lambda row: row.real_ratio)
        stored = [100 / row.real_ratio for row in members]
        excess = [max(perplexity_ratio(row, full)[0] - 1, 1e-4) for row in members]
        axes[0].plot(stored, excess, marker="o", label=family)
        if members[0].lookup_losses and full.lookup_losses:
            recall = [np.mean(row.lookup_losses) - np.mean(full.lookup_losses) for row in members]
            axes[1].plot(stored, recall, marker="o", label=family)
            axes[2].plot(stored, [np.mean(row.lookup_exact) for row in members], marker="o", label=family)
    if full.lookup_exact:
        axes[2].axhline(np.mean(full.lookup_exact), color="grey", linestyle=":", label="full")
    axes[0].set(yscale="log", ylabel="perplexity ratio − 1")
    axes[1].set(ylabel="look-up loss above the full cache, nats a token")
    axes[2].set(ylabel="share of exact answers")
    for axis in axes:
        axis.set(xscale="log", xlabel="stored bytes at the end of a window, % of the full cache at 16 bits")
        axis.grid(alpha=0.3)
        _percent_ticks(axis)
        if axis.lines:
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_bench(rows: list[BenchRow], path: Path) -> None:
    """Write a PNG: decoded tokens a second and stored bytes against the context, a row for each batch size."""
    plt = _pyplot()
    batches = sorted({row.batch for row in rows})
    figure, axes = plt.subplots(len(batches), 2, figsize=(13, 4.5 * len(batches)), squeeze=False, layout="constrained")
    for (speed, size), batch in zip(axes, batches, strict=True):
        for name in dict.fromkeys(row.name for row in rows):
            members = sorted(
                (row for row in rows if row.name == name and row.batch == batch), key=lambda row: row.context
            )
            if not members:
                continue
            contexts = [row.context for row in members]
            speed.plot(contexts, [row.tokens_per_second for row in members], marker="o", label=name)
            size.plot(contexts, [row.stored_bytes / 1e6 for row in members], marker="o", label=name)
        speed.set_ylim(bottom=0)
        speed.set(title=f"batch {batch}", xscale="log", xlabel="tokens in the cache", ylabel="decoded tokens a second")
        size.set(xscale="log", yscale="log", xlabel="tokens in the cache", ylabel="bytes of the cache, MB")
        for axis in (speed, size):
            ticks = sorted({row.context for row in rows})
            axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_evaluation(metrics: dict[str, dict[str, Any]], path: Path) -> None:
    """Write a PNG: perplexity ratio and task scores of an evaluation (``report``) against stored bytes.

    A line joins the caches that no other one beats in both size and quality. The perplexity stands over the bytes
    at the longest length, scores over those at their own.
    """
    plt = _pyplot()
    lengths = list(dict.fromkeys(length for entry in metrics.values() for length in entry["lengths"]))
    panels: list[tuple[str, str, str, bool]] = [
        ("perplexity", lengths[-1], "perplexity ratio to the full cache", False)
    ]
    panels += [("score", length, f"mean score at {int(length):,} tokens", True) for length in lengths]
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 5), squeeze=False, layout="constrained")
    for axis, (what, length, label, higher) in zip(axes[0], panels, strict=True):
        points = [point for name in metrics if (point := _pareto_point(metrics[name], name, what, length))]
        for name, size, value in points:
            axis.plot(size, value, "o")
            axis.annotate(name, (size, value), textcoords="offset points", xytext=(4, 4), fontsize=7)
        front = _front([(size, value if higher else -value) for _, size, value in points])
        axis.plot([size for size, _ in front], [value if higher else -value for _, value in front], color="grey", lw=1)
        axis.set(xscale="log", ylabel=label, xlabel=f"stored bytes at {int(length):,} tokens, % of the full cache")
        axis.grid(alpha=0.3)
        _percent_ticks(axis)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _pareto_point(entry: dict[str, Any], name: str, what: str, length: str) -> tuple[str, float, float] | None:
    """Name, percentage of the full cache's bytes, and value; None for what was not measured."""
    at = entry["lengths"].get(length, {})
    value = at.get("score") if what == "score" else (entry["perplexity"] or {}).get("ratio", 1.0)
    if "smaller" not in at or value is None or (what == "perplexity" and entry["perplexity"] is None):
        return None
    return name, 100 / at["smaller"], value


def _front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points with no other one at most as large and at least as good, by size."""
    front: list[tuple[float, float]] = []
    for size, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or value > front[-1][1]:
            front.append((size, value))
    return front


def _percent_ticks(axis) -> None:
    """Ticks on a logarithmic x axis that stay apart, within what is drawn."""
    low, high = axis.get_xlim()
    ticks = [tick for tick in (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150) if low <= tick <= high]
    axis.set_xticks(ticks, [f"{tick} %" for tick in ticks])
    axis.set_xticks([], minor=True)


def _family(name: str) -> str:
    """A configuration's name without its ratio: ``fisher:8,groups=1`` → ``fisher groups=1``."""
    head, *options = name.split(",")
    method = head.partition(":")[0]
    return " ".join([method.rpartition("-")[0] if method.startswith(("kivi", "quantized")) else method, *options])


def _pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'lowrank-cache[plot]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
