"""Text of other domains than prose in English that a Linux machine already holds: sources and translations."""

import os
import platform
import struct
from pathlib import Path

__all__ = ["machine_text", "message_catalogues", "python_sources"]

LOCALES = Path("/usr/share/locale")  # where the Filesystem Hierarchy Standard puts message catalogues
_SHORTEST_MESSAGE = 60  # characters; shorter ones are labels, names of countries and the like


def machine_text(name: str) -> tuple[str, str] | None:
    """Text and its source for ``"python-sources"`` and ``"messages:LANGUAGE"``, else None."""
    if name == "python-sources":
        return python_sources(), f"sources of Python {platform.python_version()}'s standard library"
    kind, _, language = name.partition(":")
    if kind == "messages":
        return message_catalogues(language), f"message catalogues in {language!r} under {LOCALES}"
    return None


def python_sources() -> str:
    """The standard library's top-level modules, in alphabetical order."""
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(Path(os.__file__).parent.glob("*.py")))


def message_catalogues(language: str, folder: Path = LOCALES) -> str:
    """The translated messages of all installed programs in one language, each once.

    Raises:
        ValueError: If there are none.
    """
    messages: dict[str, None] = {}
    for path in sorted((folder / language / "LC_MESSAGES").glob("*.mo")):
        for message in _translations(path.read_bytes()):
            if len(message) >= _SHORTEST_MESSAGE and " " in message:
                messages[message.strip()] = None
    if not messages:
        raise ValueError(f"language must be one with message catalogues under {folder}, got {language!r}")
    return "\n\n".join(messages)


def _translations(catalogue: bytes) -> list[str]:
    """The translations in a gettext ``.mo`` file, each plural form apart; its header left out."""
    order = "<" if catalogue[:4] == b"\xde\x12\x04\x95" else ">"
    count, originals, translated = struct.unpack_from(f"{order}8xIII", catalogue)
    messages: list[str] = []
    for index in range(count):
        if struct.unpack_from(f"{order}I", catalogue, originals + 8 * index)[0] == 0:
            continue  # the header is the translation of the empty message
        length, start = struct.unpack_from(f"{order}II", catalogue, translated + 8 * index)
        messages += catalogue[start : start + length].decode("utf-8", errors="ignore").split("\0")
    return messages
