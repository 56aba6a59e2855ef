"""Whether a shell command in the docs can be run: its command, options, target, extras or file exist."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import typer

from lowrank_cache import cli

ROOT = Path(__file__).resolve().parents[2]


def commands(source: str) -> Iterator[tuple[int, list[str]]]:
    """Line number from 0 and words of each command of a shell block; continued lines are joined, comments dropped."""
    start, joined = 0, ""
    for number, line in enumerate(source.splitlines()):
        start = start if joined else number
        joined += line.removesuffix("\\")
        if line.endswith("\\"):
            continue
        words = shlex.split(joined, comments=True)
        joined = ""
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # variables for this command
            words.pop(0)
        if words:
            yield start, words


def problem(words: list[str]) -> str | None:
    """What is wrong with a command, or None."""
    checks = {
        "lowrank-cache": _command_line,
        "make": _makefile,
        "pip": _pip,
        "python": _python,
        "ruff": lambda _: None,
        "git": lambda _: None,
    }
    check = checks.get(words[0])
    if check is None:
        return f"{words[0]!r} is none of {sorted(checks)}, whose commands can be checked"
    return check(words[1:])


def _command_line(words: list[str]) -> str | None:
    group = typer.main.get_command(cli.app)
    assert isinstance(group, click.Group) or hasattr(group, "get_command")
    context = group.make_context("lowrank-cache", [], resilient_parsing=True)
    command = group.get_command(context, words[0]) if words else None
    if command is None:
        return f"lowrank-cache has no command {words[:1]}"
    try:
        command.make_context(words[0], words[1:])
    except Exception as error:  # click's UsageError, or that of the copy which typer brings
        if not hasattr(error, "format_message"):
            raise
        return f"lowrank-cache {words[0]}: {error.format_message()}"
    return None


def _makefile(words: list[str]) -> str | None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    missing = [word for word in words if "=" not in word and word not in targets]
    return f"the Makefile has no target {missing[0]}" if missing else None


def _pip(words: list[str]) -> str | None:
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    named = {extra for word in words for extra in re.findall(r"(?:^\.|^lowrank-cache)\[([a-z,-]+)\]", word)}
    missing = {extra for names in named for extra in names.split(",")} - extras
    return f"pyproject.toml has no extra {sorted(missing)}" if missing else None


def _python(words: list[str]) -> str | None:
    words = [word for word in words if word != "-P"]
    path = Path(*words[1].split(".")).with_suffix(".py") if words[0] == "-m" else Path(words[0])
    if words[0] == "-m" and words[1].split(".")[0] != "tests":
        return None
    return None if (ROOT / path).is_file() else f"there is no file {path}"
