"""Tests see a cache as its users do: one file looks inside, so that a redesign of the core breaks no other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "lowrank_cache"
INSIDE = ROOT / "tests" / "oracle" / "inside.py"
# Of a store of the cache, which has no public door.
OF_STORES = {"coder", "coders", "pending", "windows", "copied_bytes"}
EXEMPT = ("kernels",)  # whose insides these tests are of


def private_names() -> set[str]:
    """Names with one leading underscore that the core defines: functions, classes, attributes and constants."""
    names = set()
    for path in (ROOT / PACKAGE).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    return {name for name in names if name.startswith("_") and not name.startswith("__") and name.strip("_")}


PRIVATE = private_names()


def looks_inside(source: str) -> list[str]:
    """Line and name of every private thing of the core that a test's source uses."""
    tree, found = ast.parse(source), []
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    patched = {
        id(argument)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")).endswith("attr")
        for argument in node.args
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Attribute):
            on_itself = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            names = [] if on_itself and node.attr in own else [node.attr]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) in patched:
            dotted = node.value.split(".")  # monkeypatch.setattr takes names
            names = dotted[1:] if dotted[0] == PACKAGE else [node.value]
        found += [f"{node.lineno}: {name}" for name in names if name in PRIVATE or name in OF_STORES]
    return found


def files() -> list[Path]:
    found = [path for path in (ROOT / "tests").rglob("*.py") if path != INSIDE and path != Path(__file__)]
    return [path for path in found if path.relative_to(ROOT / "tests").parts[0] not in EXEMPT]


@pytest.mark.parametrize("path", files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_only_one_file_looks_inside(path):
    assert not looks_inside(path.read_text()), "say it by public accessors, or add a function to tests/oracle/inside.py"


@pytest.mark.parametrize(
    "source",
    [
        "cache._stores[0]",
        "store.coder.tiers",
        "from lowrank_cache.coder import _narrow",
        "monkeypatch.setattr('lowrank_cache.store.LatentStore._frames', None)",
        "monkeypatch.setattr(LatentStore, '_frames', None)",
        "getattr(store, 'windows')",
    ],
)
def test_what_looks_inside_is_found(source):
    assert looks_inside(source)


def test_every_look_inside_says_why():
    tree = ast.parse(INSIDE.read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert functions and all(ast.get_docstring(node) for node in functions)
