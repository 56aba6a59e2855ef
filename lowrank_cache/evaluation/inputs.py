"""What a measurement starts from: model and text by name, statistics and bases that its folder keeps, its caches.

A folder's statistics and results are of one model, text and calibration; others are refused, not mixed in.
"""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer import Argument, Option

from lowrank_cache import Projections
from lowrank_cache.artefact import write_files
from lowrank_cache.budget import check_reachable
from lowrank_cache.calibration.api import METHODS, auto_group_size, check_groups
from lowrank_cache.calibration.collect import collect_moments, refit_values
from lowrank_cache.calibration.moments import Moments
from lowrank_cache.calibration.text import bundled_text, mixed_batches
from lowrank_cache.evaluation.caches import CacheEntry, Configuration, cache_entry, make_bases, parse
from lowrank_cache.evaluation.demo import demo_model, hub_answers
from lowrank_cache.probe import model_shape
from lowrank_cache.projections import ARTEFACT
from lowrank_cache.shapes import BOTH, Group, layer_groups

CALIBRATION_TOKENS = 20_480
MOMENTS_FILE = "moments.safetensors"
WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1")
Report = Callable[[str], object]
TEXTS = (
    "a UTF-8 file or dataset:NAME[,config=C][,split=S][,column=T]; by default WikiText-2, or Python's own "
    "documentation where the hub does not answer or datasets is not installed."
)
# Options that several commands share: one name, one meaning.
CalibrateOn = Annotated[str | None, Option("--calibrate-on", "--data", help=f"Text to calibrate on: {TEXTS}")]
EvaluateOn = Annotated[str | None, Option("--evaluate-on", "--text", help=f"Text to evaluate on: {TEXTS}")]
Tokens = Annotated[int, Option(help="Calibration tokens, rounded down to whole windows.")]
RecallShare = Annotated[float, Option(help="Fraction of calibration sequences that are generated look-ups.")]
Sensitivity = Annotated[
    Literal["gradient", "query"], Option(help="query where gradients do not pass through the model.")
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16", "auto"], Option(help="Dtype of the model; auto: the checkpoint's.")
]
Device = Annotated[str | None, Option(help="Torch device; the GPU if there is one.")]


def load_model(
    name: str | None, report: Report, dtype: str = "float32", device: str | None = "cpu"
) -> tuple[Any, Any, str]:
    """A model in eval mode, its tokenizer and its name; the demo's for None.

    Args:
        dtype: By name, or ``"auto"`` for that of the checkpoint.
        device: Of torch; None for the GPU if there is one.
    """
    model: Any
    if name is None:
        model, tokenizer, name = demo_model(report, dtype)
    else:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if model.device != torch.device(device):  # some quantized models refuse even to stay where they are
        model = model.to(device)
    return model.eval(), tokenizer, name


def load_text(name: str | Path | None = None, *, split: str = "train") -> tuple[str, str]:
    """Text and the name of its source.

    Args:
        name: A UTF-8 file, or ``dataset:NAME[,config=C][,split=S][,column=T]`` for a column of a data set of the
            ``datasets`` package, on the hub or in a folder. None for WikiText-2, or, where ``datasets`` is not
            installed or the hub does not answer, ``bundled_text()``; the source then says why.
        split: Of a data set: ``"train"``, ``"validation"`` or ``"test"``. The last fifth of ``bundled_text()`` is
            ``"test"``. A file has none.

    Raises:
        ValueError: If there is no text of that name, or none in it.
        OSError: If it cannot be read.
        ImportError: If it is a data set and ``datasets`` is not installed.
    """
    if name is None:
        name, configuration = WIKITEXT
        if importlib.util.find_spec("datasets") is None:
            reason = "the package datasets is not installed"
        elif not hub_answers(name, "README.md", "dataset"):
            reason = "the hub does not answer"
        else:
            try:
                found = f"{name}, {configuration}, {split}"
                return _dataset_text(f"dataset:{name},config={configuration}", split), found
            except (OSError, RuntimeError) as error:  # the hub answered, but its storage may not
                reason = f"{name} could not be loaded: {error}"
        text = bundled_text()
        end = text.rindex("\n\n", 0, 4 * len(text) // 5)  # what is calibrated on is never what is evaluated on
        part, share = (text[end:].lstrip(), "the last fifth") if split == "test" else (text[:end], "four fifths")
        return part, f"{share} of Python's own documentation ({reason})"
    name = str(name)
    if name.startswith("dataset:"):
        return _dataset_text(name, split), name
    try:
        text = Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} must be UTF-8 text: {error}") from error
    if not text.strip():
        raise ValueError(f"{name} must hold text, got an empty file")
    return text, name


def _dataset_text(specification: str, split: str) -> str:
    """The texts in a column of a data set, with an empty line after those that do not end a line."""
    name, *parts = specification.removeprefix("dataset:").split(",")
    options = {key: value for key, _, value in (part.partition("=") for part in parts)}
    if not name or set(options) - {"config", "split", "column"} or not all(options.values()):
        raise ValueError(f"data set must be dataset:NAME[,config=C][,split=S][,column=T], got {specification!r}")
    if importlib.util.find_spec("datasets") is None:
        raise ImportError(f'{specification!r} needs datasets: pip install "lowrank-cache[data]"')
    from datasets import load_dataset

    loaded = load_dataset(name, options.get("config"), split=options.get("split", split))
    column = options.get("column", "text")
    if column not in loaded.column_names:
        raise ValueError(f"{specification!r} must name a column of {sorted(loaded.column_names)}, got {column!r}")
    return "".join(text if text.endswith("\n") else f"{text}\n\n" for text in loaded[column] if text)


@dataclass(frozen=True)
class Run:
    """Folder, model, texts and calibration of a run; annotated fields are options of the command line."""

    out: Path  # folder of results; statistics and bases that are made are kept there
    model: Annotated[str | None, Argument(help="Name or folder of a model; SmolLM2-135M by default.")] = None
    calibrate_on: CalibrateOn = None  # WikiText-2's validation split
    evaluate_on: EvaluateOn = None  # its test split
    moments: Annotated[Path | None, Option(help="Statistics of an earlier run, not to calibrate again.")] = None
    projections: tuple[str, ...] = ()  # folders or hub repositories of ready bases; entries of their methods use them
    tokens: Tokens = CALIBRATION_TOKENS  # in float32 unless ``dtype`` is ``"auto"``
    recall_share: RecallShare = 0.5
    sensitivity: Sensitivity = "gradient"
    dtype: Dtype = "bfloat16"  # in which the caches are measured
    device: str | None = "cpu"  # of torch; None for the GPU if there is one

    def calibration_text(self) -> tuple[str, str]:
        """What is calibrated on, and the name of its source."""
        return load_text(self.calibrate_on, split="validation")

    def batches(self, tokenizer) -> Iterator[Tensor]:
        """What is calibrated on, as token ids."""
        text, _ = self.calibration_text()
        return mixed_batches(tokenizer, text, tokens=self.tokens, recall_share=self.recall_share)

    def calibration(self) -> dict[str, Any]:
        """What statistics depend on beside model and text."""
        return {name: getattr(self, name) for name in ("tokens", "recall_share", "sensitivity")}


class Prepared(NamedTuple):
    """What a run measures: ``entries`` in the order of their specifications; ``identity`` is common to all results."""

    model: Any
    tokenizer: Any
    name: str
    text: str
    source: str
    entries: list[CacheEntry]
    identity: dict[str, Any]


def prepare(run: Run, specifications: list[str], sizes: dict[str, int], report: Report) -> Prepared:
    """Check, load, calibrate what is not ready, and make every cache once.

    Bases are kept in ``out/projections`` and read from there, so that equal specifications have equal bases however
    they came to be. Specifications are read by ``caches.parse``, and ``sizes`` are those of ``caches.CacheSizes``.

    Raises:
        ValueError: If a cache cannot be made, with its name, before anything is measured.
    """
    parsed = {one: parse(one) for one in specifications}
    calibrated = {one: found for one, found in parsed.items() if found and found.method in METHODS}
    ready = _ready(run, calibrated)
    missing = {found.bases_name: found for found in calibrated.values() if found.bases_name not in ready}
    text, source = load_text(run.evaluate_on, split="test")
    first_dtype = "float32" if missing and run.dtype != "auto" else run.dtype
    model, tokenizer, name = load_model(run.model, report, first_dtype, run.device)
    run.out.mkdir(parents=True, exist_ok=True)

    def entry(one: str) -> CacheEntry:
        found = parsed[one]
        bases, options = (ready.get(found.bases_name), found.options()) if found else (None, {})
        return cache_entry(one, bases, options, model, sizes)

    for one, found in parsed.items():
        if found is None or found.bases_name not in missing:
            entry(one)  # fails before the long calibration
    for one, found in calibrated.items():
        if run.moments is None and found.bases_name in missing:
            try:  # before the long calibration, too
                check_groups(Moments(model_shape(model), _recorded_groups(model)), **found.calibration())
                if found.ranks is None:
                    check_reachable(model_shape(model), found.compression_ratio, found.bits)
            except ValueError as error:
                raise ValueError(f"cache {one!r} cannot be made: {error}") from error
    if missing:
        moments = moments_of(run, model, tokenizer, report)

        def refit(projections: Projections, ratio: float) -> Moments:
            report(f"calibrating values in a stream compressed {ratio:g}x")
            return refit_values(model, run.batches(tokenizer), moments, projections, ratio)

        for bases_name, configuration in missing.items():
            folder = run.out / "projections" / bases_name
            make_bases(configuration, moments, refit).save_pretrained(folder)
            ready[bases_name] = Projections.from_pretrained(folder)
        if run.dtype not in ("auto", "float32"):
            model = None  # makes room for the same one in another dtype
            model, *_ = load_model(run.model, report, run.dtype, run.device)
    entries = [entry(one) for one in specifications]
    return Prepared(model, tokenizer, name, text, source, entries, _identity(run, name, model, text))


def _ready(run: Run, calibrated: dict[str, Configuration]) -> dict[str, Projections]:
    """Bases by name: given ones, of which no specification must ask what they already have, and those of the folder."""
    given = {projections.method: projections for projections in map(Projections.from_pretrained, run.projections)}
    if len(given) < len(run.projections):
        raise ValueError(f"projections must have different methods, got {sorted(given)} in {list(run.projections)}")
    unused = set(given) - {found.method for found in calibrated.values()}
    if unused:
        raise ValueError(f"projections must be of a cache's method, got {sorted(unused)} and no such cache")
    ready: dict[str, Projections] = {}
    for specification, found in calibrated.items():
        folder = run.out / "projections" / found.bases_name
        if found.method in given:
            if (found.groups, found.frame, found.joint) != ("auto", None, None):
                raise ValueError(
                    f"cache {specification!r} must not have groups, frame or joint: its bases are those of the "
                    f"projections given for {found.method!r}"
                )
            ready[found.bases_name] = given[found.method]
        elif found.bases_name not in ready and folder.is_dir():
            ready[found.bases_name] = Projections.from_pretrained(folder)
    return ready


def moments_of(run: Run, model, tokenizer, report: Report) -> Moments:
    """Statistics from the file that ``run`` names, else from its folder, else calibrated now and kept there.

    Raises:
        ValueError: If those in the folder were calibrated otherwise, as a file beside them says.
    """
    path = run.moments or run.out / MOMENTS_FILE
    if run.moments is None:
        text, source = run.calibration_text()
        note, shape = path.with_suffix(".json"), model_shape(model)
        facts = {"model": run.model, "text_sha256": _sha256(text), **run.calibration()}
        facts["model_fingerprint"] = shape.fingerprint
        if not path.exists():
            share = f"{run.recall_share:.0%} look-ups, the rest from {source}"
            report(f"calibrating moments on {run.tokens} tokens, {share}")
            groups = _recorded_groups(model)
            with tqdm(desc="calibrating", total=run.tokens, unit=" tokens") as bar:
                options = {"sensitivity": run.sensitivity, "progress": bar.update}
                moments = collect_moments(model, run.batches(tokenizer), groups, **options)
            write_files({note: json.dumps(facts, indent=1).encode()})
            moments.save(path)
            return moments
        found = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
        other = [f"{name} {found.get(name, 'unknown')!r} instead of {facts[name]!r}"
                 for name in facts if found.get(name, "unknown") != facts[name]]  # fmt: skip
        if other:
            raise ValueError(
                f"{path} was calibrated with other settings: {', '.join(other)}; name it with --moments to use it, "
                "remove it or name another folder"
            )
    report(f"statistics read from {path}")
    return Moments.load(path)


def _recorded_groups(model) -> dict[str, list[Group]]:
    """The layers whose statistics are taken together: of what lies within them, bases of any kind can be made."""
    shape = model_shape(model)
    return {BOTH: layer_groups(shape, BOTH, auto_group_size(shape, BOTH))}


def _identity(run: Run, name: str, model, text: str) -> dict[str, Any]:
    """What measurements of one folder have in common beside the settings; ``model`` as it is measured."""
    calibrated_on = run.calibrate_on and _sha256(run.calibration_text()[0])
    # Of projections the file that names all tensors by digest; their name on the hub.
    files = {given: Path(given) / ARTEFACT.config_file for given in run.projections}
    return {
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "text_sha256": _sha256(text),
        "projections": sorted(_digest_of(path) if path.is_file() else given for given, path in files.items()),
        "moments": run.moments and _digest_of(run.moments),
        "calibration": {"text_sha256": calibrated_on, **run.calibration()},
    }


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def resume_results(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The results in a JSON Lines file, whose first line holds the settings; it is begun if there is none.

    A last line that a killed run left without its end is cut off.

    Raises:
        ValueError: If the file was made with other settings.
    """
    header = json.dumps({"settings": settings})
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    complete = text[: text.rfind("\n") + 1] or f"{header}\n"
    first, *lines = complete.splitlines()
    if json.loads(first) != json.loads(header):
        raise ValueError(f"{path} was made with other settings: {first}; remove it or name another folder")
    if complete != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(complete, encoding="utf-8")
    return [json.loads(line) for line in lines]


def append_result(path: Path, result: dict[str, Any]) -> None:
    """Write one result as the file's last line."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
