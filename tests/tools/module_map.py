"""Who may import whom, and the map of it in docs/contributing.md, which ``python -m tests.tools.module_map`` rewrites.

``ALLOWED`` is the one place that holds the rules; ``tests/project/test_architecture.py`` holds every file against it.
"""

import ast
from pathlib import Path

from tests.tools.docs_sections import write_section

__all__ = ["ALLOWED", "ROOT", "TOUCH_TRANSFORMERS", "module_map", "rule", "sources"]

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "lowrank_cache"

# What each file may import of this project, by module name inside the package; "" is the package itself. A file without
# a line of its own follows its folder's, and may import its folder.
ALLOWED = {
    "lowrank_cache/__init__.py": {"attention", "cache", "projections"},
    "lowrank_cache/cache.py": {
        *("artefact", "attention", "coder", "forward", "latent_view", "layers", "positions", "probe", "projections"),
        *("prompt_svd", "saved_cache", "shapes", "store", "kernels.ambient"),
    },
    "lowrank_cache/layers.py": {"latent_view", "shapes", "store"},
    "lowrank_cache/attention.py": {"kernels.api", "latent_view", "probe"},
    "lowrank_cache/forward.py": {"attention", "positions", "probe", "store"},
    "lowrank_cache/saved_cache.py": {"artefact", "positions", "probe", "shapes", "store"},
    "lowrank_cache/store.py": {
        *("artefact", "coder", "kernels.api", "kernels.packed", "latent_view", "latents", "positions"),
    },
    "lowrank_cache/prompt_svd.py": {"artefact", "budget", "coder", "hadamard", "kernels.packed", "shapes"},
    "lowrank_cache/coder.py": {
        *("artefact", "basis", "budget", "hadamard", "kernels.ambient", "kernels.packed", "projections", "shapes"),
    },
    "lowrank_cache/latent_view.py": {"kernels.api", "kernels.packed"},
    "lowrank_cache/positions.py": {
        *("artefact", "kernels.packed", "kernels.rope", "latents", "shapes"),
    },
    "lowrank_cache/latents.py": {"artefact", "kernels.packed"},
    "lowrank_cache/projections.py": {"artefact", "basis", "budget", "shapes"},
    "lowrank_cache/budget.py": {"basis", "kernels.packed", "shapes"},
    "lowrank_cache/basis.py": {"kernels.ambient", "shapes"},
    "lowrank_cache/probe.py": {"kernels.rope", "shapes"},
    "lowrank_cache/artefact.py": set(),
    "lowrank_cache/hadamard.py": set(),
    "lowrank_cache/shapes.py": set(),
    "lowrank_cache/cli.py": {"", "calibration", "evaluation", "kernels.native", "projections"},
    "lowrank_cache/evaluation/": {
        *(
            "",
            "artefact",
            "attention",
            "budget",
            "calibration",
            "coder",
            "kernels.api",
            "kernels.packed",
            "kernels.rope",
            "kernels.trust",
            "probe",
            "projections",
            "prompt_svd",
        ),
        *("shapes",),
    },
    "kernels/ambient.py": set(),
    "kernels/api.py": {"kernels"},
    "kernels/native.py": {"artefact", "kernels.packed"},
    "kernels/packed.py": {"kernels.rope"},
    "kernels/reference.py": {"kernels.packed", "kernels.rope", "kernels.segments"},
    "kernels/rope.py": set(),
    "kernels/segments.py": set(),
    "kernels/torch_ops.py": {"kernels.packed", "kernels.rope", "kernels.segments"},
    "kernels/triton_attend.py": {"kernels.triton_reconstruct", "kernels.triton_tiers"},
    "kernels/triton_decode.py": {"kernels.packed", "kernels.triton_attend", "kernels.triton_tiers"},
    "kernels/triton_encode.py": {"kernels.packed", "kernels.triton_reconstruct", "kernels.triton_tiers"},
    "kernels/triton_reconstruct.py": {"kernels.packed", "kernels.triton_tiers"},
    "kernels/triton_tiers.py": {"kernels.packed"},
    "kernels/trust.py": {"artefact", "kernels.packed"},
    "calibration/": {"artefact", "basis", "kernels.ambient", "kernels.rope", "probe", "projections", "shapes"},
}
# transformers changes often; a change of it must not reach further than these.
TOUCH_TRANSFORMERS = {
    "lowrank_cache/attention.py",
    "lowrank_cache/cache.py",
    "lowrank_cache/evaluation/",
    "lowrank_cache/layers.py",
    "lowrank_cache/probe.py",
    "lowrank_cache/saved_cache.py",
    "calibration/api.py",
    "calibration/collect.py",
    "calibration/query_sensitivity.py",
}


def sources() -> list[Path]:
    """Every file that is installed, once: the package's kernels and calibration are links to the top-level folders."""
    files = [path for folder in (PACKAGE, "kernels", "calibration") for path in (ROOT / folder).rglob("*.py")]
    return [path for path in files if not {"kernels", "calibration"} & set(path.relative_to(ROOT).parts[1:-1])]


def rule(table, path: Path) -> str | None:
    """The entry of ``table`` for a file, or for the nearest folder that has one."""
    name = path.relative_to(ROOT).as_posix()
    folders = [f"{parent.as_posix()}/" for parent in Path(name).parents]
    return next((entry for entry in (name, *folders) if entry in table), None)


def module_map() -> str:
    """A Markdown table of all files: what each is, by the first line of its docstring, and what it may import."""
    lines, folders = ["| file | what it holds | may import |", "| --- | --- | --- |"], set()
    for path in sorted(sources(), key=lambda path: (path.parent.as_posix(), path.name)):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        first = " ".join(docstring.split("\n\n")[0].split()).replace("|", r"\|").replace("``", "`")
        entry = rule(ALLOWED, path) or ""
        names = ", ".join(f"`{name or PACKAGE}`" for name in sorted(ALLOWED[entry])) or "nothing"
        if entry.endswith("/"):
            if entry not in folders:
                lines.append(f"| `{entry}` | | itself, {names} |")
                folders.add(entry)
            names = f"as `{entry}`"
        lines.append(f"| `{path.relative_to(ROOT).as_posix()}` | {first} | {names} |")
    return "\n".join(lines)


if __name__ == "__main__":
    write_section("contributing.md", "modules", module_map())
