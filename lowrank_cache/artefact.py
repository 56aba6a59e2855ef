"""The one way to disk: a folder with a JSON file that says what it is, and tensors that the JSON names by digest.

Projections, saved caches and moments are written here, whole or not at all: a full disk or a crash leaves what was
there before. What is read is checked before it is used. File names are never taken from a file.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

# What wrong types and sizes in a file may raise where they are used.
DAMAGE: tuple[type[Exception], ...] = (KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError)
DAMAGE += (SafetensorError,)
DOWNLOAD = {"revision", "token", "cache_dir", "local_files_only", "force_download"}


def user_cache() -> Path:
    """Where the user's own files are kept: ``$LOWRANK_CACHE_HOME``, else ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if home := os.environ.get("LOWRANK_CACHE_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lowrank-cache"


def write_files(contents: Mapping[Path, bytes | Callable[[Path], object]]) -> None:
    """Write several files that belong together; if one cannot be written, all stay as they were.

    Each is written under another name and brought to disk; then all are renamed, in the order given, which takes no
    room. A process that is killed may leave files named ``.NAME.*``, which nothing reads, or, between two renames,
    files that do not belong together: one of them should hold a digest of the others.

    ``contents``: what each path shall hold: bytes, or a function that writes to the path it is given. OSError if there
    is no room or no permission; nothing has changed then.
    """
    temporary: dict[Path, str] = {}
    try:
        for path, content in contents.items():
            descriptor, temporary[path] = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            os.close(descriptor)
            if callable(content):
                content(Path(temporary[path]))
            else:
                Path(temporary[path]).write_bytes(content)
            with open(temporary[path], "rb+") as file:
                os.fsync(file.fileno())  # where a full disk shows at the latest
            os.chmod(temporary[path], 0o644)
        for path in contents:
            os.replace(temporary[path], path)
            del temporary[path]
    finally:
        for name in temporary.values():
            Path(name).unlink(missing_ok=True)


@contextmanager
def damage_named(what: str, *also: type[Exception]) -> Iterator[None]:
    """Turn what a damaged file can raise while it is read into a ValueError that begins with ``what`` it is.

    ``also``: errors that mean damage here, beside those of wrong types and sizes.
    """
    try:
        yield
    except (*DAMAGE, *also) as error:
        raise ValueError(f"{what}: {type(error).__name__}: {error}") from error


def integer(number: Any, name: str, least: int = 0, most: int | None = None) -> int:
    """``number`` if it is an integer of at least ``least`` and at most ``most``; else ValueError."""
    whole = isinstance(number, int) and not isinstance(number, bool)
    if not whole or number < least or (most is not None and number > most):
        limits = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be an integer {limits}, got {number!r}")
    return number


class SavedTensors(dict[str, Tensor]):
    """Named tensors on their way to a file or, made of what it held, back; these are checked as they are taken."""

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor, without the unused room of the buffer it may be a view of."""
        self[name] = tensor.detach().cpu().contiguous()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.values())

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Remove a tensor and return it in memory of its own on ``device``; ValueError if it is missing or unlike."""
        tensor = self.pop(name, None)
        if tensor is None:
            raise ValueError(f"tensor {name} is missing")
        if list(tensor.shape) != list(shape) or tensor.dtype != dtype:
            raise ValueError(
                f"tensor {name} must be {dtype} of shape {list(shape)}, got {tensor.dtype} of shape "
                f"{list(tensor.shape)}"
            )
        return tensor.to(device, copy=True)

    def check_empty(self) -> None:
        """Raise ValueError if a tensor was not taken."""
        if self:
            raise ValueError(f"tensors {sorted(self)} belong to nothing")


@dataclass(frozen=True)
class Artefact:
    """A kind of folder: its file names, the version of its format, and the words that messages use.

    The JSON is replaced last, and vouches for itself and for the tensors by SHA-256. ``*`` in the tensors' name stands
    for the beginning of their digest, so that an older file stays valid until the JSON names the new one.
    """

    name: str  # as in "holds no NAME"
    damaged: str  # as in "holds DAMAGED"
    config_file: str  # the JSON
    tensor_file: str  # the safetensors
    version: int  # of the format: the one that can be read
    remedy: str  # what makes the artefact anew, for the error that names another version

    def write(
        self, folder: str | Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], readme: str | None = None
    ) -> None:
        """Write to ``folder``, which is made if there is none; if anything fails, an older artefact in it stays valid.

        Args:
            facts: JSON-able; the format's version and the digests are added.
            tensors: Everything else, on the CPU.
            readme: Written as README.md unless there is one.

        Raises:
            OSError: If there is no room or no permission.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        payload = save(dict(tensors), metadata={"format": "pt"})
        digest = hashlib.sha256(payload).hexdigest()
        config = {"format_version": self.version, **facts, "tensors_sha256": digest}
        text = json.dumps({**config, "config_sha256": config_digest(config)}, indent=1)
        current = folder / self.tensor_file.replace("*", digest[:16])
        files: dict[Path, bytes | Callable[[Path], object]] = {current: payload}
        if readme is not None and not (folder / "README.md").exists():
            files[folder / "README.md"] = readme.encode()
        write_files({**files, folder / self.config_file: text.encode()})
        for path in folder.glob(self.tensor_file):  # of the artefact that was replaced, or of a save that was killed
            if path != current:
                path.unlink(missing_ok=True)

    def read(self, name_or_path: str | Path, **download: Any) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
        """What ``write`` wrote, from a folder or from a repository on the hub, whole and undamaged.

        Args:
            download: Options of ``huggingface_hub.snapshot_download``, those in ``DOWNLOAD``.

        Returns:
            Where it lies, its facts, and its tensors, which are mapped: pages are read when they are used.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is damaged, was edited, or has another format version.
            TypeError: If an option is unknown.
        """
        if unknown := sorted(set(download) - DOWNLOAD):
            raise TypeError(f"options of loading must be among {sorted(DOWNLOAD)}, got {unknown}")
        folder = Path(name_or_path)
        if not folder.is_dir():
            wanted = [self.config_file, self.tensor_file]
            folder = Path(snapshot_download(str(name_or_path), allow_patterns=wanted, **download))
        self._check_there(folder / self.config_file)
        config = self._read_config(folder / self.config_file)
        digest = config.get("tensors_sha256")
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError(
                f"tensors_sha256 of {folder / self.config_file} must be 64 hexadecimal digits, got {digest!r}"
            )
        path = folder / self.tensor_file.replace("*", digest[:16])
        self._check_there(path)
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != digest:
            raise ValueError(f"{path} is damaged: its SHA-256 is {found}, {self.config_file} expects {digest}")
        with self.damage_named(folder):
            return folder, config, load_file(path)

    def damage_named(self, folder: str | Path, *also: type[Exception]):
        """See ``damage_named``; for what is read out of ``folder``."""
        return damage_named(f"{folder} holds {self.damaged}", *also)

    def push(self, folder: str | Path, repo_id: str, **options: Any) -> str:
        """Upload ``folder`` to a repository on the hub, made if there is none; returns the address of the commit.

        ``options``: ``private``, ``token``, ``revision``, ``create_pr`` and ``commit_message`` of ``huggingface_hub``.
        """
        api = HfApi(token=options.pop("token", None))
        repository = api.create_repo(repo_id, private=options.pop("private", None), exist_ok=True).repo_id
        replaced = [self.tensor_file] if "*" in self.tensor_file else None
        return str(api.upload_folder(repo_id=repository, folder_path=folder, delete_patterns=replaced, **options))

    def _check_there(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path.parent} holds no {self.name}: {path.name} is missing")

    def _read_config(self, path: Path) -> dict[str, Any]:
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            digest = config_digest(config) if isinstance(config, dict) else None
        except (ValueError, RecursionError) as error:  # also for text that is not UTF-8, and numbers too long to read
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        if digest is None:
            raise ValueError(f"{path} must hold a JSON object, got {type(config).__name__}")
        found = config.get("format_version")
        if found != self.version:
            raise ValueError(
                f"{path} has format version {found}, and this release reads version {self.version}; {self.remedy} or "
                "install the release that wrote it"
            )
        if digest != config.get("config_sha256"):
            raise ValueError(f"{path} is damaged or was edited: its contents do not match config_sha256")
        return config


def config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of a config but for its own digest, ``config_sha256``; layout and key order do not matter."""
    others = {key: value for key, value in config.items() if key != "config_sha256"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()
