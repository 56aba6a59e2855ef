"""One evaluation from names to report: check, load, calibrate what is not ready, measure, write."""

import json
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from lowrank_cache.calibration.api import METHODS
from lowrank_cache.evaluation.cache_rows import CacheRow, cache_row
from lowrank_cache.evaluation.configurations import Configuration, build, parse
from lowrank_cache.evaluation.evaluate import EvaluationSettings, evaluate
from lowrank_cache.evaluation.loading import in_dtype, load_model
from lowrank_cache.evaluation.plots import plot_evaluation
from lowrank_cache.evaluation.report import metrics_of, report_markdown
from lowrank_cache.evaluation.results_file import resume_results
from lowrank_cache.evaluation.run_inputs import (
    MOMENTS_FILE,
    QualityRun,
    file_digest,
    identity_of,
    moments_of,
    refitted_of,
)
from lowrank_cache.evaluation.text_source import load_text
from lowrank_cache.projections import CONFIG_FILE as PROJECTIONS_FILE
from lowrank_cache.projections import Projections

__all__ = ["run_evaluation"]

BITS = (16, 8, 4, 2)
Report = Callable[[str], object]


def run_evaluation(
    out: Path,
    specifications: list[str],
    run: QualityRun,
    settings: EvaluationSettings,
    report: Report,
    *,
    projections: tuple[str, ...] = (),
    device: str | None = None,
) -> None:
    """Write ``config.json``, ``samples.jsonl``, ``metrics.json``, ``report.md`` and ``pareto.png`` into ``out``.

    Bases that are calibrated are kept in ``out/projections``, their statistics in ``out/moments.safetensors``.

    Args:
        specifications: Caches as ``configurations.parse`` reads them; the full cache is always measured, first.
        run: Model, texts and calibration; statistics are taken in float32 unless its dtype is ``"auto"``.
        projections: Folders or hub repositories of ready bases; rows of their methods use them.
        device: Of torch; None for the GPU if there is one.

    Raises:
        ValueError: If a cache cannot be made, with its name, before anything is measured; or if ``out`` holds an
            evaluation with other settings.
    """
    specifications = ["full", *(name for name in dict.fromkeys(specifications) if name != "full")]
    configurations = _checked(specifications)
    ready = _ready(projections, configurations)
    text, source = load_text(run.evaluate_on, split="test")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    out.mkdir(parents=True, exist_ok=True)
    kept = partial(_kept, out / "projections", ready, {})
    missing = [name for name, found in configurations.items() if found and _calibrated(found) and kept(found) is None]
    first_dtype = "float32" if missing and run.dtype != "auto" else run.dtype
    model, tokenizer, name = load_model(run.model, report, first_dtype, device)
    _warn_of_lengths(name, model, settings, report)
    for specification in (one for one in specifications if one not in missing):
        _row(specification, build([specification], None, ready=kept)[specification], model, settings)
    if missing:
        moments = moments_of(run, out / MOMENTS_FILE, model, tokenizer, report)
        refit = partial(refitted_of, run, out, model, tokenizer, moments, report)
        for specification, (made, _) in build(missing, moments, refit).items():
            _keep(out / "projections", configurations[specification], made)
        if run.dtype not in ("auto", "float32") and not getattr(model, "is_quantized", False):
            model = in_dtype(model, run.dtype)
    built = build(specifications, None, ready=kept)
    rows = [_row(specification, built[specification], model, settings) for specification in specifications]
    identity = _identity(name, model, text, run, projections)
    samples = out / "samples.jsonl"
    resume_results(samples, {**settings.fixed(), **identity})  # of other settings: fails before config.json is replaced
    _write_json(out / "config.json", _config(identity, source, specifications, settings))
    with _progress_bar() as progress:
        records = evaluate(model, tokenizer, text, rows, settings, samples, identity, progress)
    _write_report(out, rows, records, report)


def _warn_of_lengths(name: str, model, settings: EvaluationSettings, report: Report) -> None:
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if most is not None and max(settings.lengths) > most:
        report(f"{name} is made for {most} tokens, and lengths go to {max(settings.lengths)}")


def _checked(specifications: list[str]) -> dict[str, Configuration | None]:
    """What each specification says; what no model would make right fails here."""
    configurations = {}
    for specification in specifications:
        configuration = configurations[specification] = parse(specification)
        if configuration is None:
            continue
        if not configuration.compression_ratio >= 1:
            raise ValueError(f"cache must have a ratio of at least 1, got {specification!r}")
        if configuration.bits not in (None, *BITS):
            raise ValueError(f"cache must have bits of {BITS}, got {specification!r}")
    return configurations


def _calibrated(configuration: Configuration) -> bool:
    return configuration.method in METHODS


def _ready(names: tuple[str, ...], configurations: dict[str, Configuration | None]) -> dict[str, Projections]:
    """Given projections by method; rows must not ask of them what they already have."""
    ready: dict[str, Projections] = {}
    for name in names:
        loaded = Projections.from_pretrained(name)
        if loaded.method in ready:
            raise ValueError(f"projections must have different methods, got {loaded.method!r} twice in {list(names)}")
        ready[loaded.method] = loaded
    for specification, configuration in configurations.items():
        if configuration is None or configuration.method not in ready:
            continue
        if (configuration.groups, configuration.frame, configuration.joint) != ("auto", 1, None):
            raise ValueError(
                f"cache {specification!r} must not have groups, frame or joint: its bases are those of the projections "
                f"given for {configuration.method!r}"
            )
    unused = set(ready) - {found.method for found in configurations.values() if found is not None}
    if unused:
        raise ValueError(f"projections must be of a cache's method, got {sorted(unused)} and no such cache")
    return ready


def _kept(
    folder: Path, given: dict[str, Projections], loaded: dict[str, Projections], configuration: Configuration
) -> Projections | None:
    """Given projections by method, or those that an earlier run has kept in ``folder``, which are ``loaded`` once."""
    if configuration.method in given:
        return given[configuration.method]
    name = configuration.bases_name
    if name not in loaded and (folder / name).is_dir():
        loaded[name] = Projections.from_pretrained(folder / name)
    return loaded.get(name)


def _keep(folder: Path, configuration: Configuration | None, projections: Projections | None) -> None:
    if configuration is not None and projections is not None:
        projections.save_pretrained(folder / configuration.bases_name)


def _row(specification: str, built: tuple[Projections | None, dict], model, settings: EvaluationSettings) -> CacheRow:
    try:
        return cache_row(specification, *built, model, settings.sizes())
    except (ValueError, NotImplementedError, ImportError) as error:
        raise type(error)(f"cache {specification!r} cannot be made: {error}") from error


def _identity(name: str, model, text: str, run: QualityRun, projections: tuple[str, ...]) -> dict[str, Any]:
    """What measurements of one report folder have in common, beside the settings."""
    return {
        **identity_of(run, name, model, text),
        "projections": sorted(_projections_digest(found) for found in projections),
        "moments": None if run.moments is None else file_digest(run.moments),
        "calibration": {
            "text": None if run.calibrate_on is None else str(run.calibrate_on),
            "tokens": run.tokens,
            "recall_share": run.recall_share,
            "sensitivity": run.sensitivity,
        },
    }


def _projections_digest(name: str) -> str:
    """Of the file that names all tensors by digest; of projections on the hub, their name."""
    path = Path(name) / PROJECTIONS_FILE
    return file_digest(path) if path.is_file() else name


def _config(identity: dict, source: str, specifications: list[str], settings: EvaluationSettings) -> dict[str, Any]:
    versions = {
        "python": platform.python_version(),
        **{name: version(name) for name in ("lowrank-cache", "torch", "transformers")},
    }
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    if identity["device"] == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    return {
        **identity,
        "text": source,
        "caches": specifications,
        "settings": asdict(settings),
        "versions": versions,
        "machine": machine,
    }


@contextmanager
def _progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar over tokens, whose number is known when the first cache begins."""
    with tqdm(desc="evaluating", unit=" tokens", unit_scale=True) as bar:

        def update(name: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_description(name or "evaluated", refresh=False)
            bar.update(done - bar.n)

        yield update


def _write_report(out: Path, rows: list[CacheRow], records: dict, report: Report) -> None:
    metrics = metrics_of(rows, records)
    _write_json(out / "metrics.json", metrics)
    table = report_markdown(metrics, json.loads((out / "config.json").read_text(encoding="utf-8")))
    try:
        plot_evaluation(metrics, out / "pareto.png")
        table += "\n![Quality against stored bytes](pareto.png)\n"
    except ImportError as error:
        report(str(error))
    (out / "report.md").write_text(table, encoding="utf-8")
    report(table)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
