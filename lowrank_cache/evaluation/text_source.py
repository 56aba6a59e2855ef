"""Text to calibrate and evaluate on: a given file, else WikiText-2, else what Python brings along."""

import importlib
import importlib.util
import inspect
from pathlib import Path

from lowrank_cache.evaluation.hub import hub_reachable
from lowrank_cache.evaluation.machine_text import machine_text

__all__ = ["bundled_text", "load_text"]

DATASET = ("Salesforce/wikitext", "wikitext-2-raw-v1")

# Modules with long docstrings; each adds prose that the language reference's topics do not have.
_DOCUMENTED_MODULES = (
    "argparse",
    "collections",
    "configparser",
    "datetime",
    "decimal",
    "difflib",
    "doctest",
    "email.message",
    "fractions",
    "functools",
    "heapq",
    "ipaddress",
    "itertools",
    "logging",
    "pathlib",
    "pickle",
    "random",
    "statistics",
    "string",
    "textwrap",
    "threading",
    "unittest.mock",
    "zipfile",
)


def load_text(path: str | Path | None = None, *, split: str = "train") -> tuple[str, str]:
    """Text and the name of its source.

    Args:
        path: A UTF-8 file to use instead of any other source, or one of ``machine_text``'s names.
        split: Of WikiText-2: ``"train"``, ``"validation"`` or ``"test"``. The other sources have none.

    Returns:
        The file; else WikiText-2, if ``datasets`` is installed and the hub answers; else
        ``bundled_text()``.

    Raises:
        ValueError: If the file holds no text, or the machine has none of that name.
        OSError: If it cannot be read.
    """
    if path is not None:
        return machine_text(str(path)) or (_read(Path(path)), str(path))
    name, configuration = DATASET
    if importlib.util.find_spec("datasets") is not None and hub_reachable(f"datasets/{name}/resolve/main/README.md"):
        from datasets import load_dataset

        try:
            rows = load_dataset(name, configuration, split=split)["text"]
        except (OSError, RuntimeError) as error:  # the hub answered, but its storage may not
            return bundled_text(), f"Python's own documentation ({name} could not be loaded: {error})"
        return "".join(rows), f"{name}, {configuration}, {split}"
    return bundled_text(), "Python's own documentation (the hub does not answer)"


def bundled_text() -> str:
    """The language reference's topics and docstrings of the standard library, in a fixed order."""
    from pydoc_data.topics import topics

    parts = [topics[name] for name in sorted(topics)]
    for name in _DOCUMENTED_MODULES:
        module = importlib.import_module(name)
        parts.append(inspect.getdoc(module) or "")
        for member_name, member in sorted(vars(module).items()):
            if not member_name.startswith("_") and getattr(member, "__module__", None) == name:
                parts.append(inspect.getdoc(member) or "")
    return "\n\n".join(part.strip() for part in parts if len(part) > 200) + "\n"


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text: {error}") from error
    if not text.strip():
        raise ValueError(f"{path} must hold text, got an empty file")
    return text
