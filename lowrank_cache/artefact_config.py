"""The JSON file of an artefact on disk: it says the format's version and vouches for itself by a digest."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["config_bytes", "config_digest", "read_config"]


def config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of a config but for its own digest, ``config_sha256``; layout and key order do not matter."""
    others = {key: value for key, value in config.items() if key != "config_sha256"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """A config with its digest, as it is written."""
    return json.dumps({**config, "config_sha256": config_digest(config)}, indent=1).encode()


def read_config(path: Path, format_version: int, remedy: str) -> dict[str, Any]:
    """A config of this format, with the digest that it was written with.

    Args:
        path: Of the JSON file.
        format_version: The one that can be read.
        remedy: What makes the artefact anew, for the error that names another version.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is no JSON object, of another format version, damaged or edited.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        digest = config_digest(config) if isinstance(config, dict) else None
    except (ValueError, RecursionError) as error:  # also for text that is not UTF-8, and numbers too long to read
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if digest is None:
        raise ValueError(f"{path} must hold a JSON object, got {type(config).__name__}")
    version = config.get("format_version")
    if version != format_version:
        raise ValueError(
            f"{path} has format version {version}, and this release reads version {format_version}; {remedy} or "
            "install the release that wrote it"
        )
    if digest != config.get("config_sha256"):
        raise ValueError(f"{path} is damaged or was edited: its contents do not match config_sha256")
    return config
