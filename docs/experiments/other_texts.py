"""Texts of other kinds than the one calibrated on: sources of Python's library, translated messages of programs."""

import gettext
import os
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["main", "messages", "python_sources"]

LOCALES = Path("/usr/share/locale")  # where the Filesystem Hierarchy Standard puts message catalogues
SHORTEST_MESSAGE = 60  # characters; shorter ones are labels and names


def python_sources() -> str:
    """The modules of this Python's standard library, those in packages apart."""
    paths = sorted(Path(os.__file__).parent.glob("*.py"))
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)


def messages(language: str) -> str:
    """The translated messages of all installed programs in one language, each once."""
    found: dict[str, None] = {}
    for path in sorted((LOCALES / language / "LC_MESSAGES").glob("*.mo")):
        try:
            with path.open("rb") as file:
                catalogue = gettext.GNUTranslations(file)
        except (OSError, ValueError, LookupError):  # damaged, or in an encoding that Python does not know
            continue
        for original, message in catalogue._catalog.items():  # there is no public way to list them
            if original and len(message) >= SHORTEST_MESSAGE and " " in message:
                found[message.strip()] = None
    if not found:
        raise ValueError(f"language must be one with message catalogues under {LOCALES}, got {language!r}")
    return "\n\n".join(found)


def main(
    out: Annotated[Path, typer.Argument(help="File for the text.")],
    language: Annotated[
        str | None, typer.Option(help="Of the translated messages, e.g. de; Python's sources without it.")
    ] = None,
) -> None:
    """Write a text to evaluate on."""
    out.write_text(python_sources() if language is None else messages(language), encoding="utf-8")
    typer.echo(f"{out.stat().st_size:,} bytes of text: 'lowrank-cache eval --evaluate-on {out}' measures on them.")


if __name__ == "__main__":
    typer.run(main)
