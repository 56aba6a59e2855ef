"""Text to calibrate and evaluate on: a given file, else WikiText-2, else what Python brings along."""

import importlib
import importlib.util
import inspect
from pathlib import Path

from lowrank_cache.evaluation.hub import hub_reachable
from lowrank_cache.evaluation.machine_text import machine_text

__all__ = ["bundled_text", "dataset_text", "load_text"]

PREFIX = "dataset:"
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
        path: A UTF-8 file to use instead of any other source, one of ``machine_text``'s names, or a data set as
            ``dataset:NAME[,config=C][,split=S][,column=T]``, see ``dataset_text``.
        split: Of WikiText-2: ``"train"``, ``"validation"`` or ``"test"``; of ``bundled_text()``, whose last fifth is
            ``"test"``. The other sources have none.

    Returns:
        The file; else WikiText-2, if ``datasets`` is installed and the hub answers; else the split of
        ``bundled_text()``. And what it is, which says why WikiText-2 is not.

    Raises:
        ValueError: If the file holds no text, or the machine has none of that name.
        OSError: If it cannot be read.
    """
    if path is not None and str(path).startswith(PREFIX):
        return dataset_text(str(path), split), str(path)
    if path is not None:
        return machine_text(str(path)) or (_read(Path(path)), str(path))
    name, configuration = DATASET
    if importlib.util.find_spec("datasets") is None:
        return _bundled_part(split, "the package datasets is not installed")
    if not hub_reachable(f"datasets/{name}/resolve/main/README.md"):
        return _bundled_part(split, "the hub does not answer")
    from datasets import load_dataset

    try:
        rows = load_dataset(name, configuration, split=split)["text"]
    except (OSError, RuntimeError) as error:  # the hub answered, but its storage may not
        return _bundled_part(split, f"{name} could not be loaded: {error}")
    return "".join(rows), f"{name}, {configuration}, {split}"


def dataset_text(specification: str, split: str = "train") -> str:
    """The texts in a column of a data set of the ``datasets`` package, with an empty line between two rows.

    Args:
        specification: ``dataset:NAME`` and, after commas, ``config=``, ``split=`` and ``column=``, which is ``text``
            unless given. ``NAME`` is one on the hub or a folder; rows that end a line are joined as they are.
        split: Used if the specification has none.

    Raises:
        ValueError: If it cannot be read, or there is no such column.
        ImportError: If ``datasets`` is not installed.
    """
    name, *parts = specification.removeprefix(PREFIX).split(",")
    options = {key: value for key, _, value in (part.partition("=") for part in parts)}
    if not name or set(options) - {"config", "split", "column"} or not all(options.values()):
        raise ValueError(f"data set must be {PREFIX}NAME[,config=C][,split=S][,column=T], got {specification!r}")
    if importlib.util.find_spec("datasets") is None:
        raise ImportError(f'{specification!r} needs datasets: pip install "lowrank-cache[data]"')
    from datasets import load_dataset

    rows = load_dataset(name, options.get("config"), split=options.get("split", split))
    column = options.get("column", "text")
    if column not in rows.column_names:
        raise ValueError(f"{specification!r} must name a column of {sorted(rows.column_names)}, got {column!r}")
    return "".join(row if row.endswith("\n") else f"{row}\n\n" for row in rows[column])


def _bundled_part(split: str, reason: str) -> tuple[str, str]:
    """What is calibrated on is never what is evaluated on, as with the splits of a data set."""
    text = bundled_text()
    end = text.rindex("\n\n", 0, 4 * len(text) // 5)
    part, name = (text[end:].lstrip(), "the last fifth") if split == "test" else (text[:end], "four fifths")
    return part, f"{name} of Python's own documentation ({reason})"


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
