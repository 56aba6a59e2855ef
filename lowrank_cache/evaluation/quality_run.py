"""One quality run from texts to table: calibrate once, derive every row's bases, measure, write."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from lowrank_cache.evaluation.biased_model import with_key_bias
from lowrank_cache.evaluation.configurations import build
from lowrank_cache.evaluation.loading import in_dtype, load_model
from lowrank_cache.evaluation.plots import plot_quality
from lowrank_cache.evaluation.quality import QualitySettings, drift_markdown, markdown, measure, needle_markdown
from lowrank_cache.evaluation.run_inputs import (
    MOMENTS_FILE,
    QualityRun,
    identity_of,
    moments_digest,
    moments_of,
    refitted_of,
)
from lowrank_cache.evaluation.text_source import load_text

__all__ = ["run_quality"]


def run_quality(
    out: Path, specifications: list[str], run: QualityRun, settings: QualitySettings, report: Callable[[str], object]
) -> None:
    """Write ``moments.safetensors``, ``results.jsonl``, ``table.md`` and ``quality.png`` into ``out``."""
    model, tokenizer, name = load_model(run.model, report)
    if run.key_bias:
        model = with_key_bias(model, run.key_bias)
        name = f"{name} with a key bias of {run.key_bias:g}"
    out.mkdir(parents=True, exist_ok=True)
    moments = moments_of(run, out / MOMENTS_FILE, model, tokenizer, report)
    configurations = build(specifications, moments, partial(refitted_of, run, out, model, tokenizer, moments, report))
    text, source = load_text(run.evaluate_on, split="test")
    report(f"{name}, measured in {run.dtype} on {source}")
    model = in_dtype(model, run.dtype)
    identity = {**identity_of(run, name, model, text), "moments": moments_digest(run, out)}
    rows = measure(model, tokenizer, text, configurations, settings, out / "results.jsonl", report, identity)
    table = f"{markdown(rows)}\n\nBy quarter of the windows:\n\n{drift_markdown(rows)}\n"
    if settings.needles:
        table += f"\nNeedles by length of the text:\n\n{needle_markdown(rows, settings.needles)}\n"
    (out / "table.md").write_text(table, encoding="utf-8")
    report(table)
    try:
        plot_quality(rows, out / "quality.png")
    except ImportError as error:
        report(str(error))
