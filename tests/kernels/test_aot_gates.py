"""Compiled kernels pass the gates of ``aot_gates``, and what is known to be bad does not.

One shape and two targets here; ``make gates`` compiles all shapes for all targets.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels under test need triton")
pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="disassemblers are taken from its x86 wheel")

GATES = Path(__file__).parents[1] / "tools" / "aot_gates.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run the gates in a process of their own: in this one kernels are interpreted."""
    cache = tmp_path_factory.mktemp("triton")

    def run(*arguments: str) -> tuple[int, list[str]]:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(cache)
        command = [sys.executable, "-P", str(GATES), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        lines = [line for line in done.stdout.splitlines() if line.startswith(("ok", "FAIL"))]
        assert lines, done.stdout + done.stderr
        return done.returncode, lines

    return run


@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_kernels_pass(run, target):
    code, lines = run("--target", target, "--shape", "smollm2-64", "smollm2-64-other")
    assert code == 0, "\n".join(lines)
    # Tier widths are run-time arguments: another layer compiles nothing.
    assert not [line for line in lines if "other" in line]
    kernels = {line.split()[3].rstrip(":") for line in lines}
    assert kernels == {"absorb", "absorbed_scores", "weigh", "combine", "project"} | {
        "_reconstruct",
        "_project_down",
        "_quantize",
    }


@pytest.mark.parametrize(
    "control, kernels, reasons",
    [
        ("misaligned", {"absorbed_scores", "weigh"}, ["loads of 1 bytes"]),
        ("oversized", {"absorbed_scores", "weigh"}, ["spills", "shared memory"]),
        ("float32", {"absorb", "absorbed_scores", "weigh", "project"}, ["no tensor-core instructions"]),
    ],
)
def test_a_known_bad_kernel_fails(run, control, kernels, reasons):
    code, lines = run("--target", "sm_89", "--shape", "smollm2-64", "--control", control)
    assert code == 1
    for kernel in kernels:
        (line,) = [line for line in lines if f" {kernel}:" in line]
        assert line.startswith("FAIL") and any(reason in line for reason in reasons), line
