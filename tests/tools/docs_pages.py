"""Execute code blocks of README.md and docs/*.md: ``python -m tests.tools.docs_pages [PAGE ...] [PYTEST OPTION ...]``.

- Blocks of ``python`` run in one namespace for each page, in a copy of the workplace of ``docs_workplace``.
- Blocks of ``sh`` are checked by ``docs_commands``; behind the comment ``<!-- executed -->`` they also run.
- A block of ``text`` is what the block before it printed: same words, numbers within 10 % or one unit of their last
  digit; a line that holds ``…`` may be anything.
- A block that is not run has the reason in front of it: ``<!-- skip: next "reason" -->``.

A failure names page and line. This file is the runner and the pytest plugin that it loads.
"""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, SkipParser

from tests.tools.docs_commands import commands, problem
from tests.tools.docs_workplace import ROOT, WORKPLACE, environment

__all__ = ["PAGES", "PARSERS", "pytest_collect_file"]

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXECUTED = "<!-- executed -->"
TOLERANCE = 0.1
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
_run_python = PythonEvaluator()


def python_block(example: Example) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        _run_python(example)
    print(printed.getvalue(), end="")  # for pytest -rP, which shows an author what to put into the page
    example.document.namespace["_printed"] = printed.getvalue()


def shell_block(example: Example) -> str | None:
    for line, words in commands(example.parsed, example.document.namespace.setdefault("_variables", {})):
        if wrong := problem(words):
            return f"{example.path}:{example.line + 1 + line}: {wrong}"
    if not example.document.text[: example.region.start].rstrip().endswith(EXECUTED):
        return None
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", example.parsed],
        env={**os.environ, "PATH": binaries},
        capture_output=True,
        text=True,
        timeout=300,
    )
    example.document.namespace["_printed"] = done.stdout
    return None if done.returncode == 0 else f"{example.path}:{example.line}: {done.stderr[-2000:]}"


def text_block(example: Example) -> str | None:
    printed, shown = (_lines(text) for text in (example.namespace.get("_printed", ""), example.parsed))
    for number, (theirs, ours) in enumerate(zip(printed, shown, strict=False)):
        if "…" not in ours and not _alike(theirs, ours):
            return f"{example.path}:{example.line + 1 + number}: the block printed {theirs!r}, the page shows {ours!r}"
    if len(printed) != len(shown):
        return f"{example.path}:{example.line}: the block printed {len(printed)} lines, the page shows {len(shown)}"
    return None


def _lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.strip().splitlines() if line.strip()]


def _alike(one: str, other: str) -> bool:
    pairs = zip(_NUMBER.findall(one), _NUMBER.findall(other), strict=False)
    return _NUMBER.sub("#", one) == _NUMBER.sub("#", other) and all(_close(a, b) for a, b in pairs)


def _close(one: str, other: str) -> bool:
    a, b = (float(number.replace(",", "")) for number in (one, other))
    digit = 10.0 ** -len(other.partition(".")[2])
    return abs(a - b) <= max(TOLERANCE * max(a, b), 1.01 * digit)


_folders: list[str] = []


def _enter(namespace: dict) -> None:
    """A folder of its own for each page: hard links, which what saves by renaming leaves alone."""
    if not WORKPLACE.exists():
        raise FileNotFoundError(f"{WORKPLACE} is not there: python -m tests.tools.docs_workplace makes it")
    _folders.append(tempfile.mkdtemp(prefix="page-", dir=WORKPLACE.parent))
    shutil.copytree(WORKPLACE, _folders[-1], copy_function=os.link, dirs_exist_ok=True)
    os.chdir(_folders[-1])


def _leave(namespace: dict) -> None:
    """Also called if ``_enter`` failed: only what that made is removed, never whatever folder is current."""
    os.chdir(ROOT)
    while _folders:
        shutil.rmtree(_folders.pop())


PARSERS = [
    SkipParser(),
    CodeBlockParser("python", python_block),
    CodeBlockParser("sh", shell_block),
    CodeBlockParser("text", text_block),
]
pytest_collect_file = Sybil(
    parsers=PARSERS, path=str(ROOT), filenames=[page.name for page in PAGES], setup=_enter, teardown=_leave
).pytest()


def main(arguments: list[str]) -> int:
    pages = [argument for argument in arguments if argument.endswith(".md")] or [str(page) for page in PAGES]
    options = [argument for argument in arguments if not argument.endswith(".md")]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.tools.docs_pages",
        "-p",
        "no:cacheprovider",
        "--durations=8",
    ]
    return subprocess.run([*command, *options, *pages], cwd=ROOT, env=environment(), check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
