"""One quality run from texts to table: calibrate once, derive every row's bases, measure, write."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm.auto import tqdm

from lowrank_cache.calibration.api import auto_group_size, refit_values
from lowrank_cache.calibration.moments import Moments, collect_moments
from lowrank_cache.calibration.recall import mixed_batches
from lowrank_cache.evaluation.biased_model import with_key_bias
from lowrank_cache.evaluation.configurations import build
from lowrank_cache.evaluation.loading import in_dtype, load_model
from lowrank_cache.evaluation.plots import plot_quality
from lowrank_cache.evaluation.quality import QualitySettings, drift_markdown, markdown, measure, needle_markdown
from lowrank_cache.evaluation.text_source import load_text
from lowrank_cache.models import BOTH, layer_groups, model_shape
from lowrank_cache.projections import Projections

__all__ = ["QualityRun", "moments_of", "refitted_of", "run_quality"]


@dataclass(frozen=True)
class QualityRun:
    """Model and texts of a run.

    Attributes:
        model: Name or folder; None for the demo's model.
        calibrate_on, evaluate_on: Texts as ``load_text`` takes them; None for WikiText-2 (validation and test).
        moments: File of an earlier run's statistics, which replace calibration; None to calibrate.
        tokens, recall_share, sensitivity: Of calibration, in float32.
        dtype: In which the caches are measured.
        key_bias: Rebuild the model with this constant bias on its keys, see ``biased_model``; 0 for none.
    """

    model: str | None
    calibrate_on: Path | str | None
    evaluate_on: Path | str | None
    moments: Path | None
    tokens: int
    recall_share: float
    sensitivity: str
    dtype: str
    key_bias: float = 0.0


def run_quality(
    out: Path, specifications: list[str], run: QualityRun, settings: QualitySettings, report: Callable[[str], object]
) -> None:
    """Write ``moments.safetensors``, ``results.jsonl``, ``table.md`` and ``quality.png`` into ``out``."""
    model, tokenizer, name = load_model(run.model, report)
    if run.key_bias:
        model = with_key_bias(model, run.key_bias)
        name = f"{name} with a key bias of {run.key_bias:g}"
    out.mkdir(parents=True, exist_ok=True)
    moments = moments_of(run, out / "moments.safetensors", model, tokenizer, report)
    configurations = build(specifications, moments, partial(refitted_of, run, out, model, tokenizer, moments, report))
    text, source = load_text(run.evaluate_on, split="test")
    report(f"{name}, measured in {run.dtype} on {source}")
    model = in_dtype(model, run.dtype)
    rows = measure(model, tokenizer, text, configurations, settings, out / "results.jsonl", report)
    table = f"{markdown(rows)}\n\nBy quarter of the windows:\n\n{drift_markdown(rows)}\n"
    if settings.needles:
        table += f"\nNeedles by length of the text:\n\n{needle_markdown(rows, settings.needles)}\n"
    (out / "table.md").write_text(table, encoding="utf-8")
    report(table)
    try:
        plot_quality(rows, out / "quality.png")
    except ImportError as error:
        report(str(error))


def moments_of(run: QualityRun, path: Path, model, tokenizer, report: Callable[[str], object]) -> Moments:
    """Statistics from the file that ``run`` names, else from ``path``, else calibrated now and kept there."""
    path = run.moments or path
    if run.moments or path.exists():
        report(f"statistics read from {path}")
        return Moments.load(path)
    text, source = load_text(run.calibrate_on, split="validation")
    report(f"calibrating on {run.tokens} tokens, {run.recall_share:.0%} look-ups, the rest from {source}")
    shape = model_shape(model)
    groups = {BOTH: layer_groups(shape, BOTH, auto_group_size(shape, BOTH))}
    batches = mixed_batches(tokenizer, text, tokens=run.tokens, recall_share=run.recall_share)
    with tqdm(desc="calibrating", total=run.tokens, unit=" tokens") as bar:
        moments = collect_moments(model, batches, groups, sensitivity=run.sensitivity, progress=bar.update)
    moments.save(path)
    return moments


def refitted_of(
    run: QualityRun,
    out: Path,
    model,
    tokenizer,
    moments: Moments,
    report: Callable[[str], object],
    projections: Projections,
    ratio: float,
) -> Moments:
    """Moments of the stream that ``projections`` compress at ``ratio``; kept in ``out`` for a run that goes on."""
    path = out / f"refitted-{ratio:g}.safetensors"
    if path.exists():
        return Moments.load(path)
    text, source = load_text(run.calibrate_on, split="validation")
    report(f"calibrating values in the stream at {ratio:g}x on {run.tokens} tokens, the prose from {source}")
    batches = mixed_batches(tokenizer, text, tokens=run.tokens, recall_share=run.recall_share)
    refitted = refit_values(model, batches, moments, projections, ratio)
    refitted.save(path)
    return refitted
