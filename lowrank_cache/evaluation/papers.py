"""What the papers say about their methods, checked on small models that this file trains: tables in Markdown.

ReCalKV against Palu, its ablation, its grouping of key heads among all possible ones, its value calibration
after plain and whitened SVDs, and xKV over the latents of an MLA model. Every perplexity is measured through the
real cache, one token a forward and, as in the papers, without sinks and window, so that every past token is read
from latents.
"""

from collections.abc import Callable
from functools import partial
from itertools import combinations
from math import exp
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lowrank_cache import LowRankCache
from lowrank_cache.calibration.api import projections_from_moments, refit_values
from lowrank_cache.calibration.moments import Moments, collect_moments
from lowrank_cache.calibration.palu import head_groups, head_rows
from lowrank_cache.calibration.recalkv import calibrate_once, group_similar_heads, head_similarity
from lowrank_cache.evaluation.machine_text import python_sources
from lowrank_cache.evaluation.perplexity import stream, windows_of
from lowrank_cache.evaluation.quality import interval
from lowrank_cache.evaluation.small_models import WINDOW, byte_tokens, mla_config, multi_head_config, trained
from lowrank_cache.models import SIDES, SideShape, layer_groups, model_shape
from lowrank_cache.projections import Projections

__all__ = ["check_papers"]

EXACT = {"residual_length": 0, "num_sink_tokens": 0, "block_size": 1}
HEAD_GROUP = 4  # of Palu, and of ReCalKV's keys
Report = Callable[[str], object]


def check_papers(
    out: Path,
    text: Path | None = None,
    *,
    steps: int = 1200,
    windows: int = 48,
    calibration_windows: int = 96,
    report: Report = print,
) -> None:
    """Train both models unless ``out`` holds them, measure, and write ``out/papers.md``.

    Args:
        text: To train, calibrate and evaluate on, in disjoint parts; None for Python's own sources.
        steps: Training batches of the multi-head model; the MLA model gets half of them.
        windows: Evaluation windows of 256 bytes.
        calibration_windows: Likewise, of the training text.
    """
    out.mkdir(parents=True, exist_ok=True)
    training, held_out = byte_tokens(python_sources() if text is None else text.read_text(encoding="utf-8"))
    evaluation = windows_of(held_out, WINDOW, windows)
    batches = list(windows_of(training, WINDOW, calibration_windows).split(8))
    model = trained(multi_head_config(), training, out / "multi-head", steps, report)
    shape = model_shape(model)
    moments = collect_moments(model, batches, {side: layer_groups(shape, side, 1) for side in SIDES})
    make = partial(_projections, model, batches, moments)
    parts = [
        _compare_with_palu(model, make, evaluation, report),
        *(_ablation(model, make, evaluation, removed, report) for removed in (80, 90)),
        _grouping_errors(moments),
        _value_errors(model, moments),
        _mla(trained(mla_config(), training, out / "mla", steps // 2, report), evaluation, report),
    ]
    table = "\n\n".join(parts) + "\n"
    (out / "papers.md").write_text(table, encoding="utf-8")
    report(table)


def _projections(
    model, batches, moments: Moments, method: str, ratio: float, reorder: bool = True, calibrate_values: bool = True
) -> Projections:
    """What ``calibrate`` makes, from statistics taken once."""
    options: dict[str, Any] = {"method": method, "reorder": reorder}
    made = projections_from_moments(moments, **options)
    if method == "palu" or not calibrate_values:
        return made
    return projections_from_moments(moments, **options, refitted=refit_values(model, batches, moments, made, ratio))


def _row(name: str, losses: Tensor, full: Tensor) -> str:
    mean, half = interval(losses.mean(1).tolist(), full.mean(1).tolist())
    return f"| {name} | {exp(float(losses.mean())):.3f} | x{exp(mean):.4f} ± {half:.4f} |"


def _difference(name: str, losses: Tensor, other: Tensor) -> str:
    mean, half = interval(losses.mean(1).tolist(), other.mean(1).tolist())
    return f"{name}: {mean:+.4f} ± {half:.4f} nats"


def _losses(model: PreTrainedModel, windows: Tensor, options: dict | None, projections=None, prompt: int = 0) -> Tensor:
    def make():
        if options is None:
            return DynamicCache(config=model.config)
        return LowRankCache(model, projections, **{**EXACT, **options})

    losses = stream(model, windows, make, chunk=1, batch=len(windows), prompt=prompt)
    return losses[:, max(prompt - 1, 0) :]


def _compare_with_palu(model, make, windows, report: Report) -> str:
    full = _losses(model, windows, None)
    lines = ["| cache | perplexity of a byte | to the full cache |", "| --- | --- | --- |", _row("full", full, full)]
    notes = []
    for removed in (50, 60, 70):
        ratio = 100 / (100 - removed)
        losses = {}
        for method, name in (("palu", "Palu"), ("recalkv", "ReCalKV")):
            report(f"measuring {name}, {removed} % removed")
            options = {"compression_ratio": ratio, "bits": 16}
            losses[method] = _losses(model, windows, options, make(method, ratio))
            lines.append(_row(f"{name}, {removed} % removed", losses[method], full))
        notes.append(_difference(f"- {removed} %", losses["recalkv"], losses["palu"]))
    return "\n".join([*lines, "", "ReCalKV less Palu, paired over windows:", "", *notes])


def _ablation(model, make, windows, removed: int, report: Report) -> str:
    full = _losses(model, windows, None)
    ratio = 100 / (100 - removed)
    lines = [f"| {removed} % removed | perplexity of a byte | to the full cache |", "| --- | --- | --- |"]
    losses = {}
    for reorder, values in ((False, False), (True, False), (False, True), (True, True)):
        name = {(False, False): "neither", (True, False): "HSR", (False, True): "OVC"}.get((reorder, values), "both")
        report(f"measuring {name}, {removed} % removed")
        made = make("recalkv", ratio, reorder=reorder, calibrate_values=values)
        losses[name] = _losses(model, windows, {"compression_ratio": ratio, "bits": 16}, made)
        lines.append(_row(name, losses[name], full))
    notes = [_difference(f"- {name} less neither", losses[name], losses["neither"]) for name in ("HSR", "OVC", "both")]
    return "\n".join([*lines, "", *notes])


def _grouping_errors(moments: Moments, removed: int = 80) -> str:
    """Share of the keys' energy that two groups of heads lose at the ablation's rank, by how they are chosen."""
    lost: dict[str, list[float]] = {}
    for layer in moments.shape.layers:
        heads = layer.key.heads
        second, mean, _ = moments.of_group("key", (layer.layer_idx,))
        rest = [(0, *others) for others in combinations(range(1, heads), HEAD_GROUP - 1)]
        all_ways = [[first, tuple(sorted(set(range(heads)) - set(first)))] for first in rest]
        errors = [_energy_lost(second, layer.key, groups, removed) for groups in all_ways]
        similar = group_similar_heads(head_similarity(second, mean, heads), HEAD_GROUP)
        for name, error in {
            "adjacent heads (Palu)": _energy_lost(second, layer.key, head_groups(heads, HEAD_GROUP), removed),
            "similar heads (HSR)": _energy_lost(second, layer.key, similar, removed),
            f"mean of all {len(errors)} ways": sum(errors) / len(errors),
            f"best of all {len(errors)} ways": min(errors),
        }.items():
            lost.setdefault(name, []).append(error)
    lines = [f"| groups of {HEAD_GROUP} key heads, {removed} % removed | energy lost |", "| --- | --- |"]
    lines += [f"| {name} | {sum(errors) / len(errors):.5f} |" for name, errors in lost.items()]
    return "\n".join(lines)


def _energy_lost(second: Tensor, shape: SideShape, groups: list[tuple[int, ...]], removed: int) -> float:
    """``second``: ``[width, width]``; principal components of each group, of equal rank for equal groups."""
    lost = 0.0
    for heads in groups:
        rows = head_rows(shape, 1, heads)
        energies = torch.linalg.eigvalsh(second[rows][:, rows])
        lost += float(energies[: round(len(rows) * removed / 100)].sum())
    return lost / float(second.trace())


def _value_errors(model, moments: Moments) -> str:
    """Share of the values' energy that a rank of a quarter loses on the calibration text, mean over layers."""
    shape = moments.shape
    errors: dict[str, list[float]] = {}
    for layer in shape.layers:
        second = _centred(moments, layer.layer_idx)
        weight = model.model.layers[layer.layer_idx].self_attn.v_proj.weight.detach().double()
        rank = layer.value.width // 4
        for start, metric in (("plain SVD", weight @ weight.T), ("whitened SVD", second)):
            down = torch.linalg.eigh(metric)[1][:, -rank:]
            up = down.T
            for step in range(4):
                if step:
                    down, up = calibrate_once(down, second)
                name = start if step == 0 else f"{start}, {step} OVC step{'s' if step > 1 else ''}"
                left = torch.eye(len(second), dtype=torch.float64) - down @ up
                errors.setdefault(name, []).append(float((left.T @ second @ left).trace() / second.trace()))
    lines = ["| values at a quarter of the rank | energy lost |", "| --- | --- |"]
    lines += [f"| {name} | {sum(lost) / len(lost):.6f} |" for name, lost in errors.items()]
    return "\n".join(lines)


def _centred(moments: Moments, layer: int) -> Tensor:
    second, mean, _ = moments.of_group("value", (layer,))
    return second - torch.outer(mean, mean)


def _mla(model: PreTrainedModel, windows: Tensor, report: Report, ratio: float = 3.0) -> str:
    losses = partial(_losses, model, windows, prompt=WINDOW // 2)
    full = losses(None)
    lines = [
        "| MLA model | perplexity of a byte | to the full cache |",
        "| --- | --- | --- |",
        _row("full", full, full),
    ]
    for size in (4, 1):
        for new_tokens in ("encode", "exact"):
            name = f"xKV {ratio:g}x, {size} layer{'s' if size > 1 else ''} a group, new tokens: {new_tokens}"
            report(f"measuring {name}")
            options = {"method": "xkv", "layer_group_size": size, "new_tokens": new_tokens, "compression_ratio": ratio}
            lines.append(_row(name, losses(options), full))
    return "\n".join(lines)
