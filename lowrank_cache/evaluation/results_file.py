"""A JSON Lines file of results that a later run goes on with: its first line holds the settings, one result a line."""

import json
from pathlib import Path
from typing import Any

__all__ = ["append_result", "resume_results"]


def resume_results(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The results that ``path`` holds; the file is begun if there is none.

    A last line that a killed run left without its end is cut off.

    Raises:
        ValueError: If the file was made with other settings.
    """
    header = json.loads(json.dumps({"settings": settings}))
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    complete = text[: text.rfind("\n") + 1]
    if complete != text:
        path.write_text(complete, encoding="utf-8")
    if not complete:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(header) + "\n", encoding="utf-8")
        return []
    first, *lines = complete.splitlines()
    if json.loads(first) != header:
        raise ValueError(f"{path} was made with other settings: {first}; remove it or name another folder")
    return [json.loads(line) for line in lines]


def append_result(path: Path, result: dict[str, Any]) -> None:
    """Write one result as the file's last line."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
