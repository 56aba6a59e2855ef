"""Everything that must hold before a release: ``make release-check``, or ``python tests/tools/release_check.py``.

Builds sdist and wheel from the files that git knows, checks their metadata, installs both into a fresh virtual
environment with the versions of constraints.txt, and uses them from another folder. Then it runs the tests
against the lowest and the newest transformers and Triton of ``[tool.lowrank-cache]``, which takes most of the time.
"""

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

from packaging.metadata import Metadata

ROOT = Path(__file__).resolve().parents[2]
IMPORTS = """
import importlib.util
import lowrank_cache, lowrank_cache.calibration, lowrank_cache.kernels.reference, lowrank_cache.evaluation.evaluate
assert importlib.util.find_spec("calibration") is None and importlib.util.find_spec("kernels") is None
print(lowrank_cache.__file__)
"""
# Repeated, it is long enough to calibrate on; what the model makes of it does not matter here.
TEXT = "The tide turned at {n}, and the boats that had lain on the mud all {n} hours were afloat again by noon.\n"


def run(command: list, **options) -> str:
    """Output of a command; ends the check if it fails."""
    print("$", *command, flush=True)
    done = subprocess.run(list(map(str, command)), text=True, stdout=subprocess.PIPE, **options)
    if done.returncode:
        sys.exit(f"{done.stdout}\nrelease check failed: {command[0]} ended with {done.returncode}")
    return done.stdout


def check_version(version: str, changelog: str, tags_here: list[str], tags: list[str]) -> None:
    """The newest entry of the changelog, the tag and the version must be one.

    Without a tag on the commit, the newest entry may be "Unreleased", and the version must not have been released.
    """
    headings = re.findall(r"^## \[?([^\]\s]+)\]?(?: - (\d{4}-\d\d-\d\d))?", changelog, flags=re.M)
    newest, date = headings[0]
    released = [tag for tag in tags_here if tag.startswith("v")]
    if released and (released != [f"v{version}"] or newest != version or not date):
        sys.exit(
            f"tag {released}, version {version} and CHANGELOG's newest entry {newest!r} ({date or 'no date'}) differ"
        )
    if not released and f"v{version}" in tags:
        sys.exit(f"v{version} was released from another commit: raise the version in pyproject.toml")
    if not released and newest not in ("Unreleased", version):
        sys.exit(f"CHANGELOG's newest entry must be 'Unreleased' or {version}, got {newest!r}")


def build(folder: Path) -> tuple[Path, Path]:
    """Sdist and, from it, the wheel, of the files that git knows."""
    source = folder / "source"
    source.mkdir()
    archive = folder / "tree.tar"
    run(["git", "-C", ROOT, "archive", "--output", archive, "HEAD"])
    with tarfile.open(archive) as tar:
        tar.extractall(source, filter="tar")  # keeps the links of kernels and calibration
    run([sys.executable, "-m", "build", "--outdir", folder / "dist", source])
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return sdist, wheel


def check_metadata(sdist: Path, wheel: Path, version: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        texts = [archive.read(name)]
        modules = {name for name in archive.namelist() if name.endswith(".py")}
    with tarfile.open(sdist) as archive:
        (name,) = [name for name in archive.getnames() if re.fullmatch(r"[^/]+/PKG-INFO", name)]
        texts.append(archive.extractfile(name).read())
        top = name.split("/")[0]
        inside = {name.removeprefix(f"{top}/") for name in archive.getnames()}
    for text in texts:
        metadata = Metadata.from_email(text, validate=True)
        assert str(metadata.version) == version, f"version {metadata.version}, expected {version}"
        assert metadata.description and metadata.description_content_type == "text/markdown"
        assert metadata.license_expression == "Apache-2.0" and metadata.license_files
    missing = modules - inside
    assert not missing, f"the sdist lacks {sorted(missing)}"
    assert {"LICENSE", "README.md", "pyproject.toml"} <= inside


def use(folder: Path, sdist: Path, wheel: Path, demo: bool) -> None:
    """Install both in turn into an empty environment, and use them from a folder that holds nothing of ours."""
    venv.create(folder / "venv", with_pip=True)
    python, elsewhere = folder / "venv" / "bin" / "python", folder / "elsewhere"
    elsewhere.mkdir()
    pip = [python, "-I", "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
    run([*pip, sdist])
    run([python, "-I", "-c", IMPORTS], cwd=elsewhere)
    run([*pip, "--force-reinstall", "--no-deps", wheel])
    place = run([python, "-I", "-c", IMPORTS], cwd=elsewhere).strip()
    assert place.startswith(str(folder / "venv")), place
    run([python, "-I", "-m", "pip", "check"])
    command = folder / "venv" / "bin" / "lowrank-cache"
    print(run([command, "--help"], cwd=elsewhere), run([command, "env"], cwd=elsewhere))
    if demo:
        run([*pip, f"{wheel}[data]"])
        (elsewhere / "text.txt").write_text("".join(TEXT.format(n=n) for n in range(1200)))
        print(run([command, "demo", "--data", "text.txt"], cwd=elsewhere))


def supported_range(project: dict) -> tuple[str, str]:
    """Lowest and newest transformers of ``[tool.lowrank-cache]``, which ``dependencies`` must agree with."""
    lowest, newest = project["tool"]["lowrank-cache"]["transformers"]
    series, minor = newest.split(".")[:2]
    expected = f"transformers>={lowest},<{series}.{int(minor) + 1}"
    if expected not in project["project"]["dependencies"]:
        sys.exit(f"dependencies must hold {expected!r}, of [tool.lowrank-cache]")
    return lowest, newest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-demo", dest="demo", action="store_false", help="Leave out the demo, which needs a model.")
    parser.add_argument("--no-versions", dest="versions", action="store_false", help="Leave out other releases.")
    arguments = parser.parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    version = project["project"]["version"]
    tags = [run(["git", "-C", ROOT, "tag", *where]).split() for where in (["--points-at", "HEAD"], [])]
    check_version(version, (ROOT / "CHANGELOG.md").read_text(), *tags)
    versions, triton = supported_range(project), project["tool"]["lowrank-cache"]["triton"]
    with tempfile.TemporaryDirectory() as name:
        sdist, wheel = build(Path(name))
        check_metadata(sdist, wheel, version)
        use(Path(name), sdist, wheel, arguments.demo)
    if arguments.versions:
        for package, released in {"transformers": versions, "triton": triton}.items():
            table = run([sys.executable, ROOT / "tests" / "tools" / "versions.py", "--package", package, *released])
            print(table)
            if re.search(r"\b\d+ (failed|error)", table) or "did not run" in table:
                sys.exit(f"release check failed: tests against other releases of {package}")
    print(f"lowrank-cache {version} can be released")


if __name__ == "__main__":
    main()
