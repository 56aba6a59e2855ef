"""The digest by which a JSON file of an artefact vouches for itself."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

__all__ = ["config_digest"]


def config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of a config but for its own digest, ``config_sha256``; layout and key order do not matter."""
    others = {key: value for key, value in config.items() if key != "config_sha256"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()
