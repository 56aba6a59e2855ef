"""The files of a saved cache: JSON that says what it is, and one safetensors file that the JSON names by digest.

Replacing the JSON is the one step that makes a saved cache valid. A process that dies earlier leaves the older one
as it was, and at most a file that nothing names. File names are never read from a file.
"""

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors
from huggingface_hub import HfApi, snapshot_download
from safetensors.torch import load, save

from lowrank_cache.artefact_config import config_bytes, read_config
from lowrank_cache.atomic import write_files
from lowrank_cache.saved_tensors import SavedTensors

__all__ = ["CONFIG_FILE", "damage_named", "push_folder", "read_folder", "write_folder"]

FORMAT_VERSION = 1
CONFIG_FILE = "lowrank_cache.json"
_TENSOR_FILES = "lowrank_cache-*.safetensors"
_CARD = """---
library_name: lowrank-cache
tags:
- kv-cache
---

# A compressed prompt

The KV cache of {tokens} tokens in {batch} row(s), {megabytes:.2f} MB, for {base_model} ({model_type}).

```python
from lowrank_cache import LowRankCache

cache = LowRankCache.from_pretrained("{repository}", model{projections})
```
"""


def write_folder(folder: str | Path, facts: dict[str, Any], tensors: SavedTensors) -> None:
    """Write a cache; if anything fails, an older one in the same folder stays valid.

    Args:
        folder: Made if there is none.
        facts: JSON-able; the format's and the library's version and digests are added.
        tensors: Everything else.

    Raises:
        OSError: If there is no room or no permission.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    payload = save(tensors.all(), metadata={"format": "pt"})
    digest = hashlib.sha256(payload).hexdigest()
    config = {
        "format_version": FORMAT_VERSION,
        "library_version": version("lowrank-cache"),
        **facts,
        "tensors_sha256": digest,
    }
    current = folder / _tensor_file(digest)
    write_files({current: payload, folder / CONFIG_FILE: config_bytes(config)})
    for path in folder.glob(_TENSOR_FILES):  # of the cache that was replaced, or of a save that was killed
        if path != current:
            path.unlink(missing_ok=True)


def push_folder(folder: str | Path, repo_id: str, facts: dict[str, Any], **options: Any) -> str:
    """Upload a saved cache with a short README to a repository on the hub, which is made if there is none.

    Args:
        options: ``private``, ``token``, ``revision`` and ``commit_message`` of ``huggingface_hub``.

    Returns:
        The address of the commit.
    """
    api = HfApi(token=options.pop("token", None))
    repository = api.create_repo(repo_id, private=options.pop("private", None), exist_ok=True).repo_id
    size = sum(path.stat().st_size for path in Path(folder).iterdir())
    card = _CARD.format(
        repository=repository,
        megabytes=size / 1e6,
        projections=", projections" if facts["projections_fingerprint"] else "",
        **{name: facts[name] for name in ("tokens", "batch", "base_model", "model_type")},
    )
    (Path(folder) / "README.md").write_text(card, encoding="utf-8")
    patterns = [_TENSOR_FILES]  # tensors of the cache that is replaced
    return str(api.upload_folder(repo_id=repository, folder_path=folder, delete_patterns=patterns, **options))


def read_folder(name_or_path: str | Path, **download: Any) -> tuple[str, dict[str, Any], SavedTensors]:
    """What ``write_folder`` wrote, from a folder or from a repository on the hub, whole and undamaged.

    Args:
        download: Options of ``huggingface_hub.snapshot_download``.

    Returns:
        Where it lies, its facts, and its tensors.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, was edited, or has another format version.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(name_or_path), allow_patterns=[CONFIG_FILE, _TENSOR_FILES], **download))
    config_path = folder / CONFIG_FILE
    if not config_path.is_file():
        raise FileNotFoundError(f"{folder} holds no saved cache: {CONFIG_FILE} is missing")
    with damage_named(folder):
        config = read_config(config_path, FORMAT_VERSION, remedy="make the cache again")
        digest = config["tensors_sha256"]
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError(f"tensors_sha256 of {config_path} must be 64 hexadecimal digits, got {digest!r}")
        path = folder / _tensor_file(digest)
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no saved cache: {path.name} is missing")
        payload = path.read_bytes()
        found = hashlib.sha256(payload).hexdigest()
        if found != digest:
            raise ValueError(f"{path} is damaged: its SHA-256 is {found}, {CONFIG_FILE} expects {digest}")
        return str(folder), config, SavedTensors(load(payload))


@contextmanager
def damage_named(folder: str | Path) -> Iterator[None]:
    """Turn what a damaged file can raise in the middle of reading it into a ValueError that names the folder."""
    try:
        yield
    except (KeyError, TypeError, IndexError, AttributeError, OverflowError, safetensors.SafetensorError) as error:
        raise ValueError(f"{folder} holds a damaged cache: {type(error).__name__}: {error}") from error


def _tensor_file(digest: str) -> str:
    return _TENSOR_FILES.replace("*", digest[:16])
