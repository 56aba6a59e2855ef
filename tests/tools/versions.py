"""Run the tests against released versions of transformers or Triton and print what docs/limits.md says.

    python -m tests.tools.versions --write 5.20.2 5.23.0 5.24.0         # into the page
    python -m tests.tools.versions --write --package triton 3.7.1 3.9.0
    python -m tests.tools.versions --quick 5.20.2 5.24.0                # one family, to see whether anything works

Each version is put into a folder of its own by pip, with those of its requirements that the installed packages do not
meet; everything else is the environment's. One of transformers takes as long as `make test`; against Triton the tests
of the kernels are run.
"""

import argparse
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
TESTS = {
    "transformers": ["-n", "2", "--deselect", "tests/project/test_support_table.py"],  # a page of one version
    "triton": ["tests/kernels", "tests/cache/test_attention.py"],
}
ONE_FAMILY = ["tests/cache/test_generation.py", "-k", "llama and (greedy or left_padded or chat)"]
SUMMARY = re.compile(r"(\d+) (passed|failed|skipped|errors?)")


def install(package: str, version: str, folder: Path) -> list[str]:
    """Put a package into ``folder``, and those that it wants in other versions than are installed."""
    _pip(folder, f"{package}=={version}")
    (metadata,) = importlib.metadata.distributions(name=package, path=[str(folder)])
    replaced = []
    for text in metadata.requires or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            fits = requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True)
        except importlib.metadata.PackageNotFoundError:
            fits = False
        if not fits:
            _pip(folder, str(requirement))
            replaced.append(str(requirement))
    return replaced


def _pip(folder: Path, requirement: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", folder]
    subprocess.run([*command, requirement], check=True, stdout=sys.stderr)


def run_tests(folder: Path, chosen: list[str]) -> tuple[str, list[str]]:
    """How many passed, failed and were skipped, and which failed."""
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=no", *chosen]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    failed = [line.split(" ")[1].removeprefix("tests/") for line in lines if line.startswith(("FAILED", "ERROR"))]
    counts = ", ".join(f"{number} {word}" for number, word in SUMMARY.findall(lines[-1] if lines else ""))
    return counts or f"did not run: {done.stderr.strip().splitlines()[-1:]}", failed


def row(package: str, version: str, quick: bool) -> str:
    """A line of the table."""
    with tempfile.TemporaryDirectory() as name:
        replaced = install(package, version, Path(name))
        counts, failed = run_tests(Path(name), ONE_FAMILY if quick else TESTS[package])
    groups = sorted({test.split("::")[0] for test in failed})
    print(f"{version}: {counts} {failed[:20]}", file=sys.stderr)
    others = ", ".join(f"`{requirement}`" for requirement in replaced) or "–"
    return f"| {version} | {others} | {counts} | {', '.join(groups) or '–'} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+")
    parser.add_argument("--package", choices=TESTS, default="transformers")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true", help="Put the section into docs/limits.md.")
    arguments = parser.parse_args()
    rows = [row(arguments.package, version, arguments.quick) for version in arguments.versions]
    command = " ".join(["python -m tests.tools.versions", *sys.argv[1:]])
    head = HEADS[arguments.package].format(command=command, day=date.today(), python=platform.python_version())
    section = "\n".join([head, *rows])
    print(section)
    if arguments.write:
        from tests.tools.docs_sections import write_section  # absent from the path of a script

        write_section("limits.md", f"versions of {arguments.package}", section)


HEADS = {
    "transformers": """\
## Versions of transformers

Printed by `{command}` on {day} with Python {python}:
the tests, except that of the table of supported models, which is of one version. `pyproject.toml` allows the releases
in which they pass. Since 5.24 transformers calls the argument for a cache `cache`; it takes `past_key_values` with a
warning, and both names work.

| transformers | other packages replaced | tests | files with failures |
| --- | --- | --- | --- |""",
    "triton": """\
## Versions of Triton

PyTorch for GPUs brings the one release of Triton that it was built with: PyTorch 2.13 for CUDA brings 3.7.1. Printed by
`{command}` on {day}: the tests of the kernels,
interpreted, and the gates of one shape compiled for sm_80 and gfx942.

| triton | other packages replaced | tests | files with failures |
| --- | --- | --- | --- |""",
}

if __name__ == "__main__":
    main()
