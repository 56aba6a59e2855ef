"""The docs: commands exist, links lead somewhere, quoted errors are raised, every page is in the navigation."""

import ast
import importlib
import re
import traceback
from pathlib import Path

import pytest
from sybil import Sybil
from sybil.example import SybilFailure
from sybil.parsers.markdown import CodeBlockParser

from tests.tools.docs_commands import commands, problem
from tests.tools.docs_pages import PAGES, PARSERS

ROOT = Path(__file__).resolve().parents[2]
# What a page holds that is made when the site is built.
BUILT = re.compile(r"notebooks/\w+\.md")


def blocks(page: Path, language: str):
    parser = CodeBlockParser(language, lambda example: None)
    return [(example.line, example.parsed) for example in Sybil([parser], path=str(ROOT)).parse(page).examples()]


def text_of(page: Path) -> str:
    """The page without its code."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchor(heading: str) -> str:
    """As GitHub and MkDocs make it."""
    plain = re.sub(r"[^\w\s-]", "", heading.strip().lower())
    return re.sub(r"[-\s]+", "-", plain)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shell_commands_exist(page):
    variables: dict[str, str] = {}
    wrong = [
        f"{page.name}:{line + 1 + offset}: {problem(words)}"
        for line, source in blocks(page, "sh")
        for offset, words in commands(source, variables)
        if problem(words)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("lowrank-cache eval --out x --cache full --no-such-option 1", "No such option"),
        ("lowrank-cache calibrate MODEL", "Missing option"),
        ("lowrank-cache calibrate MODEL --out x --tokens many", "valid integer"),
        ("lowrank-cache nonsense", "no command"),
        ("make nonsense", "no target"),
        ('pip install ".[nonsense]"', "no extra"),
        ("python -m tests.nonsense", "no file"),
        ("python docs/experiments/roofline.py moments.safetensors --no-such-option 1", "No such option"),
        ("curl example.org", "can be checked"),
    ],
)
def test_wrong_commands_are_seen(command, message):
    ((_, words),) = commands(command)
    assert message in problem(words)


def test_continued_lines_keep_the_number_of_their_first():
    assert list(commands("# remark\nA=1 make \\\n  test\n\npip list # and so on")) == [
        (1, ["make", "test"]),
        (4, ["pip", "list"]),
    ]


def test_variables_of_a_page_are_filled_in():
    variables: dict[str, str] = {}
    assert not list(commands('SHARED="--tokens 4 --windows 2"', variables))
    ((_, words),) = commands("OTHER=1 lowrank-cache eval $SHARED --no-such-option", variables)
    assert words == ["lowrank-cache", "eval", "--tokens", "4", "--windows", "2", "--no-such-option"]
    assert variables == {"SHARED": "--tokens 4 --windows 2"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_are_python(page):
    for line, source in blocks(page, "python"):
        try:
            ast.parse(source)
        except SyntaxError as error:
            pytest.fail(f"{page.name}:{line + error.lineno}: {error.msg}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """On GitHub; MkDocs checks them in the site, where anchors that it makes itself exist too."""
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if target.startswith(("http://", "https://")) or BUILT.match(target) or target.startswith("api.md#"):
            continue
        name, _, fragment = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links to {target}"
        if fragment:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert fragment in map(anchor, headings), f"{page.name} links to {target}"


def test_readme_is_read_in_a_minute():
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= 70


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"^ +- [^:#]+: (\S+\.md)$", navigation, re.MULTILINE))
    pages = {page.name for page in PAGES[1:]}
    notebooks = {
        f"notebooks/{path.stem}.md" for path in (ROOT / "docs" / "notebooks").glob("*.py") if path.stem != "pages"
    }
    assert named == pages | notebooks


def raised_messages() -> list[str]:
    """Every string of the package, with ``…`` for what is filled in."""
    messages = []
    for folder in ("lowrank_cache", "calibration", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                    messages.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    messages.append(node.value)
    return messages


def test_quoted_errors_are_raised():
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted, messages = re.findall(r"^### `(.+)`$", text, re.MULTILINE), raised_messages()
    assert len(quoted) > 20
    for heading in quoted:
        pattern = re.compile(".*".join(map(re.escape, heading.split("…"))), re.DOTALL)
        assert any(pattern.fullmatch(message) for message in messages), f"no message reads {heading!r}"


def test_blocks_that_are_not_run_say_why():
    for page in PAGES:
        for comment in re.findall(r"<!--+ *skip.*?-->", page.read_text(encoding="utf-8"), re.DOTALL):
            assert re.fullmatch(r'<!-- skip: next ".+" -->', comment), f"{page.name}: {comment}"


BROKEN = """\
# Page

```python
print("1,000 bytes, 2.0x")
```

```text
1,050 bytes, 2.1x
```

```text
1,050 bits, 2.1x
```

```text
1,500 bytes, 2.0x
```

```sh
lowrank-cache inspect PROJECTIONS
lowrank-cache inspect PROJECTIONS --no-such-option
```

```python
one = 1
one / 0
```
"""


def test_a_broken_block_names_page_and_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(BROKEN)
    printing, same, words, numbers, shell, dividing = Sybil(PARSERS, path=str(tmp_path)).parse(page).examples()
    printing.evaluate()
    same.evaluate()
    for example, line in ((words, 12), (numbers, 16), (shell, 21)):
        with pytest.raises(SybilFailure, match=rf"page\.md:{line}: "):
            example.evaluate()
    with pytest.raises(ZeroDivisionError) as raised:
        dividing.evaluate()
    frame = traceback.extract_tb(raised.value.__traceback__)[-1]
    assert (frame.filename, frame.lineno) == (str(page), 26)


def test_files_that_are_named_exist():
    """Renaming a file leaves its name behind in prose, where no import fails."""
    folders = ("docs", "tests", "lowrank_cache", "kernels", "calibration")
    texts = [ROOT / name for name in ("README.md", "CHANGELOG.md", "Makefile", "pyproject.toml", "mkdocs.yml")]
    texts += [path for folder in folders for end in ("md", "py") for path in (ROOT / folder).rglob(f"*.{end}")]
    named = rf"(?<![\w/.])(?:{'|'.join(folders)})/[\w/.-]*\w\.(?:py|md|png|svg)\b"
    missing = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in texts
        for name in re.findall(named, path.read_text(encoding="utf-8"))
        if "NAME" not in name and not (ROOT / name).exists()
    }
    assert not missing, sorted(missing)


def test_code_that_the_method_names_exists():
    table = (ROOT / "docs" / "method.md").read_text(encoding="utf-8").partition("## Calibration")[0]
    names = re.findall(r"`((?:[a-z_]+\.)+\w+)`", table)
    assert len(names) > 15
    for name in names:
        parts, found = name.split("."), importlib.import_module("lowrank_cache")
        for depth, part in enumerate(parts):
            if not hasattr(found, part):
                importlib.import_module(".".join(["lowrank_cache", *parts[: depth + 1]]))
            found = getattr(found, part)
