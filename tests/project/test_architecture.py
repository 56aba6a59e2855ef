"""Who may import whom, what an import may do, and how the package is installed beside Hugging Face's ``kernels``."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.tools.docs_sections import read_section
from tests.tools.module_map import ALLOWED, ROOT, TOUCH_TRANSFORMERS, module_map, rule, sources

PACKAGE = "lowrank_cache"
TASKS = ROOT / PACKAGE / "evaluation" / "lm_eval_tasks"


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    inside = path.relative_to(ROOT).with_suffix("")
    parts = inside.parts if inside.parts[0] == PACKAGE else (PACKAGE, *inside.parts)
    return ".".join(parts).removesuffix(".__init__")


def imports(path: Path) -> list[tuple[str, bool]]:
    """Absolute module names that a file imports, for types too, and whether at module level."""
    tree = ast.parse(path.read_text())
    inside = {id(node) for outer in ast.walk(tree) if isinstance(outer, ast.FunctionDef) for node in ast.walk(outer)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) not in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: relative imports hide the direction"
            modules = {module_of(source) for source in sources()}
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.append((whole if whole in modules else node.module, id(node) not in inside))
    return found


def own(module: str) -> str | None:
    """``"cache"`` for ``lowrank_cache.cache``, ``""`` for the package, None for others."""
    return module[len(PACKAGE) + 1 :] if module == PACKAGE or module.startswith(f"{PACKAGE}.") else None


def within(inner: str, allowed: str) -> bool:
    return inner == allowed or (allowed != "" and inner.startswith(f"{allowed}."))


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_imports_follow_the_arrows(path):
    entry = rule(ALLOWED, path)
    assert entry is not None, f"{name_of(path)} has no line in ALLOWED: say what it may import"
    folder = module_of(path.parent / "__init__.py")[len(PACKAGE) + 1 :] if entry.endswith("/") else None
    for module, _ in imports(path):
        assert module.split(".")[0] not in ("kernels", "calibration"), f"{name_of(path)} imports top-level {module}"
        name = own(module)
        if name is None or (folder and within(name, folder)):
            continue
        assert any(within(name, allowed) for allowed in ALLOWED[entry]), f"{name_of(path)} may not import {module}"


def test_the_map_in_the_docs_is_that_of_the_rules():
    assert read_section("contributing.md", "modules") == module_map(), "python -m tests.tools.module_map rewrites it"


def test_the_house_stays_small():
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in sources())
    # 52 and 10,800 before the GPU, M-RoPE, ambient state, and what a cache answers to whoever asks.
    assert len(sources()) <= 55 and lines <= 12_800, f"{len(sources())} files of {lines} lines in all"


def test_no_circles():
    modules = {module_of(path): path for path in sources()}
    graph = {}
    for module, path in modules.items():
        # Triton is imported where it is used, and so are the modules that need it.
        lazy = f"{PACKAGE}.kernels.triton_"
        hidden = [
            name for name, at_top in imports(path) if name in modules and not at_top and not name.startswith(lazy)
        ]
        assert not hidden, f"{module} imports {hidden} inside a function"
        graph[module] = {imported for imported, at_top in imports(path) if imported in modules and at_top} - {PACKAGE}
    done = set()
    while len(done) < len(graph):
        ready = {module for module, needs in graph.items() if module not in done and needs <= done | {module}}
        assert ready, f"circle among {sorted(set(graph) - done)}"
        done |= ready


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_transformers_is_touched_in_few_places(path):
    touches = any(module.split(".")[0] == "transformers" for module, _ in imports(path))
    assert not touches or rule(TOUCH_TRANSFORMERS, path), f"{name_of(path)} may not import transformers"


@pytest.mark.parametrize("module", ["projections", "store", "prompt_svd", "kernels.api"])
def test_what_does_without_transformers(module):
    modules = {module_of(path): path for path in sources()}
    done, waiting = set(), {f"{PACKAGE}.{module}"}
    while waiting:
        found = {name for name, _ in imports(modules[waiting.pop()])}
        assert not any(name.split(".")[0] == "transformers" for name in found)
        waiting |= (found & set(modules)) - done - {PACKAGE}
        done |= waiting


def test_kernels_need_torch_alone_and_triton_lazily():
    for path in (ROOT / "kernels").glob("*.py"):
        others = {module.split(".")[0] for module, _ in imports(path)} - {"torch", *sys.stdlib_module_names}
        allowed = {PACKAGE, "triton"} if path.name.startswith("triton_") else {PACKAGE}
        assert others <= allowed, f"{name_of(path)} imports {others}"


def test_lm_eval_is_needed_by_its_own_model_alone():
    ours = {"lowrank_cache/evaluation/lm_eval_model.py"}
    for path in sources():
        names = {module for module, _ in imports(path)}
        needs = any(name.split(".")[0] == "lm_eval" for name in names)
        leads = names & {f"{PACKAGE}.evaluation.lm_eval_model"}
        assert name_of(path) in ours or not (needs or leads), f"{name_of(path)} may not need lm-eval"


def run(code: str, *, python_path=(), cwd=None) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, python_path)), "HF_HUB_OFFLINE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_import_needs_no_triton_and_registers_nothing(tmp_path):
    out = run(
        """
import sys
sys.modules["triton"] = None  # any import of it fails
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING
registries = (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS, DYNAMIC_LAYER_TYPE_MAPPING)
before = [sorted(registry) for registry in registries]
assert all(before)
import lowrank_cache
assert [sorted(registry) for registry in registries] == before
assert not torch.cuda.is_initialized()
heavy = {"lowrank_cache.calibration", "lowrank_cache.cli", "lowrank_cache.evaluation", "datasets", "matplotlib"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
from lowrank_cache.calibration import calibrate
print(lowrank_cache.__all__)
""",
        cwd=tmp_path,
    )
    assert "LowRankCache" in out and "Projections" in out


FAKE_KERNELS = """
class Anything:
    def __init__(self, *args, **kwargs): pass
    def __getattr__(self, name): return Anything()
    def __call__(self, *args, **kwargs): return Anything()
    INFERENCE = TRAINING = TORCH_COMPILE = 0

def use_kernel_forward_from_hub(*args, **kwargs): return lambda decorated: decorated
def use_kernelized_func(*args, **kwargs): return lambda decorated: decorated
def __getattr__(name):
    if name.startswith("__"): raise AttributeError(name)
    return Anything
"""


@pytest.fixture
def site_with_kernels(tmp_path):
    """A folder in which a distribution named ``kernels`` is installed, of the version transformers wants."""
    (tmp_path / "site" / "kernels").mkdir(parents=True)
    (tmp_path / "site" / "kernels" / "__init__.py").write_text(FAKE_KERNELS)
    information = tmp_path / "site" / "kernels-0.18.2.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    (information / "RECORD").write_text("")
    return tmp_path / "site"


IMPORT_BOTH = """
import kernels, sys
assert kernels.__file__ and kernels.__file__.startswith({site!r}), kernels.__file__
from transformers.utils.import_utils import is_kernels_available
assert is_kernels_available(), "transformers must take the fake for the real kernels"
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations import hub_kernels
assert hub_kernels.Device is kernels.Device
import lowrank_cache.kernels.reference, lowrank_cache.kernels.rope, lowrank_cache.calibration
assert lowrank_cache.kernels.reference.__file__.startswith({root!r})
import kernels as again
assert again is kernels
"""


def test_hugging_faces_kernels_wins_in_the_repository_root(site_with_kernels):
    code = IMPORT_BOTH.format(site=str(site_with_kernels), root=str(ROOT))
    run(code, python_path=[ROOT, site_with_kernels], cwd=ROOT)


def test_a_kernels_package_with_an_init_would_break_transformers(site_with_kernels, tmp_path):
    # What the two tests around this one guard against; if it stops failing, they prove nothing.
    (tmp_path / "root" / "kernels").mkdir(parents=True)
    (tmp_path / "root" / "kernels" / "__init__.py").write_text("")
    with pytest.raises(AssertionError, match="CUDAProperties"):
        run(
            "from transformers import LlamaForCausalLM",
            python_path=[tmp_path / "root", site_with_kernels],
            cwd=tmp_path,
        )


def test_without_hugging_faces_kernels_the_root_is_harmless():
    run("from transformers import LlamaForCausalLM; import lowrank_cache.kernels.rope", python_path=[ROOT], cwd=ROOT)


def test_top_level_folders_are_no_packages_of_ours():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for name in ("kernels", "calibration"):
        link = ROOT / PACKAGE / name
        assert link.is_symlink() and os.readlink(link) == f"../{name}", "the link must work in any clone"


def test_this_installation_imports_its_subpackages(tmp_path):
    run(
        "import lowrank_cache.kernels.reference, lowrank_cache.kernels.rope, lowrank_cache.calibration.api",
        cwd=tmp_path,
    )
    code = (
        "import importlib.util as u; print(u.find_spec('calibration'), getattr(u.find_spec('kernels'), 'origin', None))"
    )
    assert run(code, cwd=tmp_path).strip() == "None None", "nothing of ours may be importable at the top level"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The built wheel; the sources are copied first, for a build leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in (PACKAGE, "kernels", "calibration"):
        shutil.copytree(ROOT / name, folder / "source" / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder / "source" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    command += ["--disable-pip-version-check", "-w", folder, folder / "source"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_every_module_and_nothing_at_the_top_level(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {PACKAGE, next(top for top in tops if top.endswith(".dist-info"))}
    tasks = {f"{PACKAGE}/evaluation/lm_eval_tasks/{path.name}" for path in TASKS.glob("*.yaml")}
    assert tasks and {name for name in names if name.endswith(".yaml")} == tasks
    templates = {f"{PACKAGE}/evaluation/templates/{path.name}" for path in TASKS.with_name("templates").iterdir()}
    assert templates and templates <= set(names)
    assert f"{PACKAGE}/kernels/native.c" in names
    assert {name for name in names if name.endswith(".py")} == {
        f"{module_of(path).replace('.', '/')}{'/__init__' if path.name == '__init__.py' else ''}.py"
        for path in sources()
    }


def test_the_wheel_imports(wheel, tmp_path, site_with_kernels):
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    installed = tmp_path / "installed"
    code = IMPORT_BOTH.format(site=str(site_with_kernels), root=str(installed))
    run(code, python_path=[installed, site_with_kernels], cwd=tmp_path)
