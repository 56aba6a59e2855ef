"""What a measurement starts from, whichever command makes it: model, texts, and statistics that its folder keeps.

A folder's statistics and results are of one model, text and calibration; others are refused, not mixed in.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from lowrank_cache.atomic import write_files
from lowrank_cache.calibration.api import auto_group_size, refit_values
from lowrank_cache.calibration.moments import Moments, collect_moments
from lowrank_cache.calibration.recall import mixed_batches
from lowrank_cache.evaluation.text_source import load_text
from lowrank_cache.models import BOTH, layer_groups, model_shape
from lowrank_cache.projections import Projections

__all__ = [
    "MOMENTS_FILE",
    "QualityRun",
    "file_digest",
    "identity_of",
    "moments_digest",
    "moments_of",
    "refitted_of",
]

MOMENTS_FILE = "moments.safetensors"


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


def moments_of(run: QualityRun, path: Path, model, tokenizer, report: Callable[[str], object]) -> Moments:
    """Statistics from the file that ``run`` names, else from ``path``, else calibrated now and kept there.

    Raises:
        ValueError: If those in ``path`` were calibrated otherwise.
    """
    if run.moments:
        report(f"statistics read from {run.moments}")
        return Moments.load(run.moments)
    text, source = load_text(run.calibrate_on, split="validation")
    facts = _calibration_facts(run, model, text)
    if _kept(path, facts):
        report(f"statistics read from {path}")
        return Moments.load(path)
    report(f"calibrating on {run.tokens} tokens, {run.recall_share:.0%} look-ups, the rest from {source}")
    shape = model_shape(model)
    groups = {BOTH: layer_groups(shape, BOTH, auto_group_size(shape, BOTH))}
    batches = mixed_batches(tokenizer, text, tokens=run.tokens, recall_share=run.recall_share)
    with tqdm(desc="calibrating", total=run.tokens, unit=" tokens") as bar:
        moments = collect_moments(model, batches, groups, sensitivity=run.sensitivity, progress=bar.update)
    _keep(path, facts, moments)
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
    """Moments of the stream that ``projections`` compress at ``ratio``; kept in ``out`` for a run that goes on.

    Raises:
        ValueError: If those in ``out`` were calibrated otherwise.
    """
    path = out / f"refitted-{ratio:g}.safetensors"
    text, source = load_text(run.calibrate_on, split="validation")
    facts = {**_calibration_facts(run, model, text), "moments": file_digest(run.moments) if run.moments else None}
    if _kept(path, facts):
        return Moments.load(path)
    report(f"calibrating values in the stream at {ratio:g}x on {run.tokens} tokens, the prose from {source}")
    batches = mixed_batches(tokenizer, text, tokens=run.tokens, recall_share=run.recall_share)
    refitted = refit_values(model, batches, moments, projections, ratio)
    _keep(path, facts, refitted)
    return refitted


def identity_of(run: QualityRun, name: str, model, text: str) -> dict[str, Any]:
    """What measurements of one folder have in common beside the settings: the model and the text.

    Args:
        name: Of the model.
        model: In the dtype and on the device of the measurement.
        text: What is evaluated on.
    """
    return {
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "key_bias": run.key_bias,
        "text_sha256": _text_digest(text),
    }


def moments_digest(run: QualityRun, out: Path) -> str:
    """SHA-256 of the statistics that ``moments_of`` gave for ``out``."""
    return file_digest(run.moments or out / MOMENTS_FILE)


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _calibration_facts(run: QualityRun, model, text: str) -> dict[str, Any]:
    return {
        "model": run.model,
        "model_fingerprint": model_shape(model).fingerprint,
        "key_bias": run.key_bias,
        "text_sha256": _text_digest(text),
        "tokens": run.tokens,
        "recall_share": run.recall_share,
        "sensitivity": run.sensitivity,
    }


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _kept(path: Path, facts: dict[str, Any]) -> bool:
    """Whether ``path`` holds statistics; a file beside it says of what they are."""
    if not path.exists():
        return False
    note = path.with_suffix(".json")
    made = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
    other = [f"{name} {made.get(name, 'unknown')!r} instead of {fact!r}" for name, fact in facts.items()
             if name not in made or made[name] != fact]  # fmt: skip
    if other:
        raise ValueError(
            f"{path} was calibrated with other settings: {', '.join(other)}; name it with --moments to use it, remove "
            "it or name another folder"
        )
    return True


def _keep(path: Path, facts: dict[str, Any], moments: Moments) -> None:
    write_files({path.with_suffix(".json"): json.dumps(facts, indent=1).encode()})
    moments.save(path)
