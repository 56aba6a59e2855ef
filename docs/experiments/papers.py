"""What the papers say about their methods, checked on small models that this file trains: tables in Markdown.

ReCalKV against Palu, its ablation, its grouping of key heads among all possible ones, its value calibration
after plain and whitened SVDs, and xKV over the latents of an MLA model. Every perplexity is measured through the
real cache, one token a forward and, as in the papers, without sinks and window, so that every past token is read
from latents.

The models read bytes, so they need no tokenizer. A few minutes on one core make them good enough for their keys and
values to have structure; nothing else is expected of them.
"""

import math
import os
from collections.abc import Callable
from functools import partial
from itertools import combinations
from math import exp
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DynamicCache,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from lowrank_cache import LowRankCache
from lowrank_cache.calibration.api import projections_from_moments
from lowrank_cache.calibration.collect import collect_moments, refit_values
from lowrank_cache.calibration.moments import Moments
from lowrank_cache.calibration.palu import head_groups
from lowrank_cache.calibration.recalkv import group_similar_heads, head_similarity
from lowrank_cache.evaluation.inputs import load_text
from lowrank_cache.evaluation.report import paired_interval
from lowrank_cache.evaluation.streaming import stream, windows_of
from lowrank_cache.probe import model_shape
from lowrank_cache.projections import Projections
from lowrank_cache.shapes import SIDES, SideShape, head_rows, layer_groups

__all__ = ["byte_tokens", "calibrate_once", "check_papers", "main", "mla_config", "multi_head_config", "trained"]

WINDOW = 256
_COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4 * WINDOW,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
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
    training, held_out = byte_tokens(load_text(text)[0] if text else _python_sources())
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


def _python_sources() -> str:
    paths = sorted(Path(os.__file__).parent.glob("*.py"))
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


def _projections(
    model, batches, moments: Moments, method: str, ratio: float, reorder: bool = True, calibrate_values: bool = True
) -> Projections:
    """What ``calibrate`` makes, from statistics taken once."""
    options: dict[str, Any] = {"method": method} if method == "palu" else {"method": method, "reorder": reorder}
    made = projections_from_moments(moments, **options)
    if method == "palu" or not calibrate_values:
        return made
    return projections_from_moments(moments, **options, refitted=refit_values(model, batches, moments, made, ratio))


def _row(name: str, losses: Tensor, full: Tensor) -> str:
    mean, low, high = map(exp, paired_interval([(losses - full).mean(1).tolist()]))
    return f"| {name} | {exp(float(losses.mean())):.3f} | x{mean:.4f} [{low:.4f}, {high:.4f}] |"


def _difference(name: str, losses: Tensor, other: Tensor) -> str:
    mean, low, high = paired_interval([(losses - other).mean(1).tolist()])
    return f"{name}: {mean:+.4f} [{low:+.4f}, {high:+.4f}] nats"


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
        rows = head_rows([shape], heads)
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


def calibrate_once(down_proj: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the paper's value calibration: the best up-projection, then its best down-projection.

    ``E|x D U - x|²`` is minimised over ``U`` for the given ``D``, then over ``D`` for that ``U``. After a whitened SVD
    on the same data both are already optimal and nothing changes.

    Args:
        down_proj: ``[width, rank]`` float64, of full column rank.
        second: ``[width, width]`` float64, second moment of the values.

    Returns:
        ``down_proj`` and ``up_proj`` ``[rank, width]``.

    Source: ReCalKV, equations 7 and 8 (7 with the transpose it lacks in print), from Gram matrices instead of tokens.
    """
    projected = second @ down_proj
    up_proj = torch.linalg.solve(down_proj.T @ projected, projected.T)
    return torch.linalg.pinv(up_proj), up_proj


def multi_head_config() -> LlamaConfig:
    """4 layers of 8 KV heads of 24."""
    return LlamaConfig(**_COMMON)


def mla_config() -> DeepseekV3Config:
    """4 layers of multi-head latent attention, 64 numbers of latent and 16 of rotary key, without experts."""
    return DeepseekV3Config(
        **_COMMON,
        first_k_dense_replace=4,
        q_lora_rank=None,
        kv_lora_rank=64,
        qk_rope_head_dim=16,
        qk_nope_head_dim=24,
        v_head_dim=24,
    )


def byte_tokens(text: str) -> tuple[Tensor, Tensor]:
    """Training and held-out token ids of a text: every tenth block of 20,000 bytes is held out."""
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    blocks = data.split(20_000)
    kept = [block for index, block in enumerate(blocks) if index % 10 != 9]
    return torch.cat(kept), torch.cat(blocks[9::10])


def trained(
    config: PretrainedConfig, tokens: Tensor, folder: Path, steps: int, report: Callable[[str], object]
) -> PreTrainedModel:
    """The model in ``folder``, or one trained now for ``steps`` batches of 8 windows and saved there.

    Args:
        tokens: ``[n]`` ids of at least one window.
        report: Called with a line of text now and then.
    """
    if (folder / "config.json").exists():
        return AutoModelForCausalLM.from_pretrained(folder).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    losses: list[float] = []
    for step in range(steps):
        warm, left = min(1.0, (step + 1) / 50), 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = 2e-3 * warm * max(left, 0.05)
        starts = torch.randint(0, len(tokens) - WINDOW, (8,), generator=generator)
        batch = torch.stack([tokens[start : start + WINDOW] for start in starts.tolist()])
        step_loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        step_loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(step_loss.item())
        if (step + 1) % 100 == 0:
            report(
                f"{type(model).__name__}: step {step + 1} of {steps}, loss {sum(losses[-100:]) / 100:.3f} nats a byte"
            )
    model.save_pretrained(folder)
    return model.eval()


def main(
    out: Annotated[Path, typer.Option(help="Folder for the trained models and papers.md; rerunning keeps the models.")],
    text: Annotated[Path | None, typer.Option(help="Text to use instead of Python's own sources.")] = None,
    steps: Annotated[
        int, typer.Option(help="Training batches of the multi-head model; the MLA model gets half.")
    ] = 1200,
    windows: Annotated[int, typer.Option(help="Evaluation windows of 256 bytes.")] = 48,
) -> None:
    """Train two small models and check on them what ReCalKV, Palu and xKV say of their methods."""
    check_papers(out, text, steps=steps, windows=windows, report=typer.echo)


if __name__ == "__main__":
    typer.run(main)
