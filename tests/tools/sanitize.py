"""Run the tests of compiled attention with the address and undefined-behaviour sanitizers: a part of `make check`."""

import os
import subprocess
import sys
import tempfile

from lowrank_cache.kernels import native

FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -O1"


def main() -> int:
    compiler = native.compiler()
    if compiler is None:
        print("no C compiler: nothing to check")
        return 0
    found = subprocess.run([*compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "CFLAGS": FLAGS,
            "LD_PRELOAD": found.stdout.strip(),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
            "XDG_CACHE_HOME": folder,
            "OMP_NUM_THREADS": "1",
        }
        # Not captured: what a sanitizer says is lost with the process.
        tests = ["tests/kernels/test_native.py", "-q", "-s", "-k", "not process and not compiler and not fault"]
        return subprocess.run([sys.executable, "-P", "-m", "pytest", *tests], env=environment).returncode


if __name__ == "__main__":
    raise SystemExit(main())
