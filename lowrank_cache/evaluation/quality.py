"""The quality table: perplexity and recall of many caches on one model, in one run, resumable.

Every row is one configuration: its size, perplexity and recall are measured together. Results are kept
per row in a JSON Lines file, so that a run that was cut goes on where it stopped.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from lowrank_cache import Projections
from lowrank_cache.cache_argument import cache_argument
from lowrank_cache.evaluation.baselines import tensor_bytes
from lowrank_cache.evaluation.cache_rows import CacheRow, CacheSizes, cache_row
from lowrank_cache.evaluation.perplexity import stream, windows_of
from lowrank_cache.evaluation.recall import QUESTIONS, RecallText, lookup_texts, needle_texts, score_recall
from lowrank_cache.evaluation.results_file import append_result, resume_results

__all__ = [
    "QualityRow",
    "QualitySettings",
    "drift_markdown",
    "markdown",
    "measure",
    "needle_markdown",
    "perplexity_ratio",
]


@dataclass(frozen=True)
class QualitySettings(CacheSizes):
    """What is measured, and how.

    Attributes:
        windows: Windows of evaluation text, evenly spaced; None for all.
        window: Tokens per window.
        prompt: Tokens of the first forward, of windows and look-ups, which are not scored; 0 for ``chunk``, all scored.
        chunk: Tokens per forward.
        batch: Windows or texts per forward.
        lookups: Questions about key–value lists of ``entries``.
        needles: Pairs of tokens of prose, and questions about facts hidden in texts of that length.
        needle_chunk: Tokens per forward of the texts with needles.
    """

    windows: int | None = None
    window: int = 1024
    prompt: int = 0
    chunk: int = 32
    batch: int = 16
    lookups: int = 64
    entries: int = 22
    needles: tuple[tuple[int, int], ...] = ()
    needle_chunk: int = 128
    residual_length: int = 32  # shorter than the default, so that most of a window of text is latents
    block_size: int = 32

    def __post_init__(self):
        for name, questions in (("lookups", self.lookups), *((f"needles of {t}", n) for t, n in self.needles)):
            if questions < 0 or questions % QUESTIONS:
                raise ValueError(f"{name} must be a multiple of {QUESTIONS}, asked of each text, got {questions}")


@dataclass(frozen=True)
class QualityRow:
    """One cache.

    Attributes:
        name: Of the configuration.
        latent_ratio: Full bytes per token at 16 bits over latent bytes per token; None for baselines.
        real_ratio: Full bytes over stored bytes at the end of a window.
        dynamic_ratio: Bytes of the measured ``DynamicCache`` over stored bytes, at the end of a window.
        projection_bytes: Of the truncated bases.
        losses: Mean loss of each window, nats.
        quarter_losses: The same for each quarter of each window: ``[windows][4]``.
        lookup_losses, lookup_exact, needle_losses, needle_exact: Per question; needles in the settings' order.
    """

    name: str
    latent_ratio: float | None
    real_ratio: float
    dynamic_ratio: float
    projection_bytes: int
    losses: list[float]
    quarter_losses: list[list[float]]
    lookup_losses: list[float]
    lookup_exact: list[float]
    needle_losses: list[float]
    needle_exact: list[float]


def measure(
    model: PreTrainedModel,
    tokenizer,
    text: str,
    configurations: dict[str, tuple[Projections | None, dict]],
    settings: QualitySettings,
    results: Path,
    progress: Callable[[str], object] = print,
    identity: Mapping[str, Any] | None = None,
) -> list[QualityRow]:
    """Measure every configuration that ``results`` does not hold yet.

    Args:
        text: Evaluation text; never the one calibrated on.
        configurations: By row name: projections and further arguments of ``LowRankCache``, or None for a
            name in ``BASELINES``. ``"full"`` is always measured, first.
        results: JSON Lines file, one row a line; its first line holds the settings.
        progress: Called with a line of text before each row.
        identity: What else the rows of one file have in common: model, text, bases.

    Raises:
        ValueError: If ``results`` was made with other settings or another identity.
    """
    ids = torch.tensor(tokenizer(text)["input_ids"])
    windows = windows_of(ids, settings.window, settings.windows)
    done = {row["name"]: QualityRow(**row) for row in resume_results(results, {**asdict(settings), **(identity or {})})}
    rows = []
    for name in ["full", *(name for name in configurations if name != "full")]:
        if name not in done:
            progress(f"measuring {name}")
            projections, options = configurations.get(name, (None, {}))
            try:
                row = cache_row(name, projections, options, model, settings.sizes())
                done[name] = _measure_row(row, model, tokenizer, ids, windows, settings)
            except ImportError as error:
                progress(f"skipped {name}: {error}")
                continue
            append_result(results, asdict(done[name]))
        rows.append(done[name])
    return rows


def _measure_row(
    row: CacheRow, model, tokenizer, ids: Tensor, windows: Tensor, settings: QualitySettings
) -> QualityRow:
    caches: list[Cache] = []
    make_cache = row.make_remembering

    def remembered() -> Cache:
        caches[:] = [make_cache()]
        return caches[0]

    losses = stream(model, windows, remembered, chunk=settings.chunk, batch=settings.batch, prompt=settings.prompt)
    losses = losses[:, max(settings.prompt - 1, 0) :]
    stored = tensor_bytes(caches[0])
    last = windows.shape[0] % settings.batch or min(settings.batch, windows.shape[0])
    full, dynamic = _full_bytes(model, last, settings.window)
    texts = lookup_texts(tokenizer, settings.lookups // QUESTIONS, settings.entries)
    lookup = _recall(model, [(texts, settings.chunk)], make_cache, settings.batch, settings.prompt)
    by_length = [needle_texts(tokenizer, ids, count // QUESTIONS, tokens) for tokens, count in settings.needles]
    needle = _recall(model, [(texts, settings.needle_chunk) for texts in by_length], make_cache, settings.batch)
    return QualityRow(
        name=row.name,
        latent_ratio=row.latent_ratio,
        real_ratio=full / stored,
        dynamic_ratio=dynamic / stored,
        projection_bytes=row.projection_bytes,
        losses=losses.mean(1).tolist(),
        quarter_losses=[[float(part.mean()) for part in window.tensor_split(4)] for window in losses],
        lookup_losses=lookup[0],
        lookup_exact=lookup[1],
        needle_losses=needle[0],
        needle_exact=needle[1],
    )


def _recall(
    model, tasks: list[tuple[list[RecallText], int]], make_cache, batch: int, prompt: int = 0
) -> tuple[list[float], list[float]]:
    """Losses and exact answers of all questions of some texts, each list of texts with its chunk."""
    losses: list[float] = []
    exact: list[float] = []
    for texts, chunk in tasks:
        result = score_recall(model, texts, make_cache, chunk=chunk, batch=batch, prompt=prompt)
        losses.extend(result.loss.tolist())
        exact.extend(result.exact.tolist())
    return losses, exact


@torch.no_grad()
def _full_bytes(model: PreTrainedModel, rows: int, tokens: int) -> tuple[int, int]:
    """Bytes of the full cache at 16 bits, and of ``DynamicCache`` as it is, for ``rows`` windows."""
    cache = DynamicCache(config=model.config)
    ids = torch.zeros(1, tokens, dtype=torch.long, device=model.device)
    model(input_ids=ids, **cache_argument(model, cache), logits_to_keep=1)
    numbers = sum(keys.numel() + values.numel() for keys, values, *_ in cache)
    return 2 * numbers * rows, tensor_bytes(cache) * rows


def markdown(rows: list[QualityRow]) -> str:
    """A Markdown table; differences to the full cache with 95 % intervals over windows or questions.

    ``exact`` is the share of exact answers and, in brackets, the share among those that the full cache gives
    exactly.
    """
    lines = [
        "| cache | ratio in latents | real ratio | to DynamicCache | perplexity ratio | look-up loss, nats | exact "
        "| needle loss, nats | exact | bases, MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines.extend("| " + " | ".join(cells) + " |" for cells in _cells(rows))
    return "\n".join(lines)


def needle_markdown(rows: list[QualityRow], needles: tuple[tuple[int, int], ...]) -> str:
    """A Markdown table of the needles' loss and exact answers by the length of their texts."""
    full = rows[0]
    lengths = [f"{tokens:,} tokens, nats | exact" for tokens, _ in needles]
    lines = ["| " + " | ".join(["cache", *lengths]) + " |", "| --- " * (1 + 2 * len(needles)) + "|"]
    for row in rows:
        cells, start = [row.name], 0
        for _, count in needles:
            part = slice(start, start + count)
            cells.append(_difference(row.needle_losses[part], full.needle_losses[part], row is full))
            cells.append(_exact(row.needle_exact[part], full.needle_exact[part], row is full))
            start += count
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def drift_markdown(rows: list[QualityRow]) -> str:
    """A Markdown table of the perplexity ratio to the full cache by quarter of the windows."""
    lines = ["| cache | first quarter | second | third | last |", "| --- | --- | --- | --- | --- |"]
    full = rows[0]
    for row in rows[1:]:
        cells = []
        for quarter in range(4):
            ours, theirs = ([losses[quarter] for losses in entry.quarter_losses] for entry in (row, full))
            mean, half = interval(ours, theirs)
            cells.append(f"x{math.exp(mean):.4f} ± {half:.4f}")
        lines.append("| " + " | ".join([row.name, *cells]) + " |")
    return "\n".join(lines)


def _cells(rows: list[QualityRow]) -> Iterator[list[str]]:
    full = rows[0]
    for row in rows:
        ratio = "–" if row.latent_ratio is None else f"{row.latent_ratio:.2f}x"
        yield [
            row.name,
            ratio,
            f"{row.real_ratio:.2f}x",
            f"{row.dynamic_ratio:.2f}x",
            f"{math.exp(_mean(full.losses)):.3f}" if row is full else _ratio_cell(row, full),
            _difference(row.lookup_losses, full.lookup_losses, row is full),
            _exact(row.lookup_exact, full.lookup_exact, row is full),
            _difference(row.needle_losses, full.needle_losses, row is full),
            _exact(row.needle_exact, full.needle_exact, row is full),
            f"{row.projection_bytes / 1e6:.1f}",
        ]


def _exact(answers: list[float], baseline: list[float], is_full: bool) -> str:
    if not answers:
        return "–"
    kept = [mine for mine, theirs in zip(answers, baseline, strict=True) if theirs]
    return f"{_mean(answers):.2f}" + (f" ({_mean(kept):.2f})" if kept and not is_full else "")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def interval(values: list[float], baseline: list[float]) -> tuple[float, float]:
    """Mean paired difference and half of its 95 % interval."""
    differences = torch.tensor(values, dtype=torch.float64) - torch.tensor(baseline, dtype=torch.float64)
    spread = float(differences.std()) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return float(differences.mean()), 1.96 * spread


def perplexity_ratio(row: QualityRow, full: QualityRow) -> tuple[float, float]:
    """Perplexity of ``row`` over that of ``full`` on the same windows, and half of its 95 % interval."""
    mean, half = interval(row.losses, full.losses)
    return math.exp(mean), half


def _ratio_cell(row: QualityRow, full: QualityRow) -> str:
    ratio, half = perplexity_ratio(row, full)
    return f"x{ratio:.4f} ± {half:.4f}"


def _difference(losses: list[float], baseline: list[float], is_full: bool) -> str:
    if not losses:
        return "–"
    if is_full:
        return f"{_mean(losses):.3f}"
    mean, half = interval(losses, baseline)
    return f"{mean:+.3f} ± {half:.3f}"
