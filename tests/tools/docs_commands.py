"""Whether a shell command in the docs can be run: its command, options, target, extras or file exist."""

import importlib.util
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import typer

from lowrank_cache import cli

ROOT = Path(__file__).resolve().parents[2]


def commands(source: str, variables: dict[str, str] | None = None) -> Iterator[tuple[int, list[str]]]:
    """Line number from 0 and words of each command of a shell block; continued lines are joined, comments dropped.

    ``variables`` holds those of the page: a line that only sets some adds them, and a word ``$NAME`` becomes its words.
    """
    variables = {} if variables is None else variables
    start, joined = 0, ""
    for number, line in enumerate(source.splitlines()):
        start = start if joined else number
        joined += line.removesuffix("\\")
        if line.endswith("\\"):
            continue
        words = shlex.split(joined, comments=True)
        joined = ""
        given = {}
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # variables for this command, or for those that follow
            name, _, given[name] = words.pop(0).partition("=")
        if words:
            yield start, [part for word in words for part in _expanded(word, variables)]
        else:
            variables |= given


def _expanded(word: str, variables: dict[str, str]) -> list[str]:
    return shlex.split(variables[word[1:]]) if word.startswith("$") and word[1:] in variables else [word]


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
    return _usage_problem(command, f"lowrank-cache {words[0]}", words[1:])


def _usage_problem(command, name: str, words: list[str]) -> str | None:
    try:
        command.make_context(name, list(words))
    except Exception as error:  # click's UsageError, or that of the copy which typer brings
        if not hasattr(error, "format_message"):
            raise
        return f"{name}: {error.format_message()}"
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
    if not (ROOT / path).is_file():
        return f"there is no file {path}"
    return _experiment(path, words[1:]) if path.parent == Path("docs/experiments") else None


def _experiment(path: Path, words: list[str]) -> str | None:
    """A script whose ``main`` typer runs, on its own options or on a command of lowrank-cache behind ``--``."""
    if words[:1] == ["--"]:
        return _command_line(words[1:])
    name = f"experiment_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    app = typer.Typer()
    app.command()(module.main)
    return _usage_problem(typer.main.get_command(app), str(path), words)
