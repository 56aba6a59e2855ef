"""Compile every kernel for real cards without one, and judge the result.

    python -P tests/tools/aot_gates.py [--target sm_90 ...] [--shape llama-64 ...] [--jobs 2]
    python -P tests/tools/aot_gates.py --control misaligned|oversized|float32

What is compiled is what would be launched: the public functions run on CPU tensors of real shapes, with a driver that
names another target and launches nothing. So block sizes, strides and alignment are those of the launch code.

Gates, per compiled kernel:

- few spills: at most ``SPILLS`` local loads and stores in the machine code (NVIDIA), no spilled registers and no
  scratch (AMD). ptxas spills a handful by itself, to fit one more block on a multiprocessor;
- shared memory within what a block of the card may have;
- tensor-core instructions if the kernel multiplies matrices;
- wide loads: among the load instructions that come from source lines in ``BULK`` some are 16 bytes wide, and none loads
  a single element. These lines read what grows with the context or with the model; the narrower ones among them come
  from tiles that have no 16 bytes for every thread. Tokens' steps (2 bytes a token and tier), masks, queries and
  rotary tables are small or not contiguous, and are not judged.

Kernels of float32 models are held to shared memory alone: without tensor cores they are slow in any case.

A control compiles what is known to be bad, and must fail: rows of codes that are not aligned, blocks that are too
large, and products of float32.

It must run without ``TRITON_INTERPRET``: interpreted kernels cannot be compiled. Static numbers are no measure of
speed.
"""

import argparse
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from lowrank_cache.kernels import triton_decode
from lowrank_cache.kernels.packed import LatentSide, PackedTier, RotaryFrames, StoredSide, padded_channels
from lowrank_cache.kernels.triton_decode import attend_stored, latent_attention
from lowrank_cache.kernels.triton_encode import encode
from lowrank_cache.kernels.triton_reconstruct import reconstruct

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# KiB of shared memory that one block may have. Sources: CUDA C++ Programming Guide, table "Technical Specifications per
# Compute Capability"; AMD CDNA 3 ISA (64 KiB of LDS).
SHARED_KIB = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}

# Lines of the kernels, by how they start, and the narrowest load in bytes that may come from them: never one element.
BULK = {
    "loaded = tl.load(codes": 4,  # packed latents
    "part = tl.load(absorbed": 8,  # absorbed queries
    "share = tl.load(at": 8,  # weights
    "part = tl.load(at": 8,  # exact tokens, partial sums, attended latents
    "up = tl.load(": 8,  # up-projections
    "up_one = tl.load(": 8,
    "up_two = tl.load(": 8,
    "one = tl.load(": 8,  # states to encode
    "two = tl.load(": 8,
    "both = tl.load(": 8,
    "part = tl.load(rows_at": 4,  # the down-projection
    "z = tl.load(": 8,
}
SPILLS = 32
NO_MATRICES = {"combine", "_quantize"}


@dataclass(frozen=True)
class Shape:
    """A layer and its latents: tiers are channels by bits of keys and of values."""

    q_heads: int
    heads: int
    head_dim: int
    key_tiers: dict[int, int]
    value_tiers: dict[int, int]
    frame_length: int | None  # None: keys without a rotary embedding
    q_tokens: int = 1
    batch: int = 1
    tokens: int = 4096
    layout: str = "half"
    exact: bool = False  # a float32 model


LLAMA = partial(Shape, 32, 8, 128, {8: 80, 4: 260, 2: 400}, {8: 40, 4: 240, 2: 460})
QWEN = partial(Shape, 28, 4, 128, {16: 8, 8: 60, 4: 130, 2: 200}, {8: 30, 4: 120, 2: 240})
SMOLLM = partial(Shape, 9, 3, 64, {8: 22, 4: 60, 2: 90}, {8: 10, 4: 50, 2: 100})
WIDE = partial(Shape, 8, 1, 256, {16: 64, 8: 200, 4: 300, 2: 600}, {16: 64, 8: 200, 4: 300, 2: 600})
MLA = Shape(128, 128, 128, {8: 64, 4: 192, 2: 256}, {8: 64, 4: 192, 2: 256}, None)
SHAPES = {
    "llama-64": LLAMA(64),
    "llama-16": LLAMA(16),
    "llama-1": LLAMA(1),
    "llama-64-speculative": LLAMA(64, q_tokens=16),
    "qwen-64": QWEN(64),
    "qwen-1": QWEN(1),
    "smollm2-64": SMOLLM(64),
    # Another layer: other widths, the same kernels.
    "smollm2-64-other": Shape(9, 3, 64, {16: 9, 4: 33, 2: 155}, {8: 128, 2: 1}, 64, tokens=4000),
    "smollm2-16": SMOLLM(16),
    "smollm2-1": SMOLLM(1),
    # DeepSeek-V3: 128 heads of 128 without a rotary embedding over a latent of 512, and its rotary key of 64.
    "mla-nope": MLA,
    "mla-rope": Shape(128, 1, 64, {8: 32, 4: 32}, {8: 32, 4: 32}, 64, layout="interleaved"),
    # Not a model: the widest head, all tiers.
    "wide-64": WIDE(64),
    "wide-1": WIDE(1, layout="interleaved"),
    # Must launch; nothing else is asked of float32.
    "llama-64-float32": LLAMA(64, exact=True),
    "wide-64-float32": WIDE(64, exact=True),
    "wide-1-float32": WIDE(1, exact=True),
    "mla-nope-float32": dataclasses.replace(MLA, exact=True),
}


class _Driver:
    """A driver that names a target; nothing can be launched with it."""

    def __init__(self, number: int, target: GPUTarget):
        self.number, self.target = number, target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.number

    def get_current_stream(self, device):
        return 0


@contextmanager
def compiling_for(target: str):
    """Compile instead of launching; yields the list of ``(kernel name, compiled kernel, constants)``."""
    compiled: dict[str, tuple] = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[kernel.hash] = (self.__name__, kernel)
        return kernel

    triton.runtime.driver.set_active(_Driver(list(TARGETS).index(target), TARGETS[target]))
    JITFunction.run, empty = compile_only, torch.Tensor.new_empty
    torch.Tensor.new_empty = torch.Tensor.new_zeros  # nothing writes results, and encoders check theirs
    try:
        yield compiled
    finally:
        JITFunction.run, torch.Tensor.new_empty = run, empty


def tier(bits: int, channels: int, shape: Shape, misaligned: bool) -> PackedTier:
    row = padded_channels(bits, channels) * bits // 8
    memory = bytearray(shape.batch * shape.tokens * row + 32)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % 16 + (2 if misaligned else 0)
    dtype = torch.float16 if bits == 16 else torch.uint8
    count = shape.batch * shape.tokens * row // dtype.itemsize
    codes = torch.frombuffer(memory, dtype=dtype, offset=start, count=count)
    steps = None if bits == 16 else torch.zeros(shape.batch, shape.tokens, dtype=torch.float16)
    return PackedTier(bits, channels, codes.view(shape.batch, shape.tokens, -1), steps)


def side(tiers: dict[int, int], shape: Shape, rotary: bool, misaligned: bool) -> LatentSide:
    packed = tuple(tier(bits, channels, shape, misaligned) for bits, channels in tiers.items())
    up_proj = torch.zeros(sum(tiers.values()), shape.heads, shape.head_dim, dtype=torch.float16)
    rope = None
    if rotary and shape.frame_length is not None:
        table = torch.zeros(1, -(-shape.tokens // shape.frame_length), shape.head_dim // 2)
        rope = RotaryFrames(table, table, shape.frame_length, shape.layout)
    return LatentSide(packed, up_proj, torch.zeros(shape.heads, shape.head_dim), rope)


def compile_shape(shape: Shape, control: str | None = None) -> None:
    """Call every public function once, as for a bfloat16 model; with a control only attention, done wrong."""
    dtype = torch.float32 if shape.exact or control == "float32" else torch.bfloat16
    query = torch.zeros(shape.batch, shape.q_heads, shape.q_tokens, shape.head_dim, dtype=dtype)
    key = side(shape.key_tiers, shape, True, control == "misaligned")
    value = side(shape.value_tiers, shape, False, control == "misaligned")
    mask = torch.ones(shape.batch, 1, 1, shape.tokens, dtype=torch.bool)
    if control == "oversized":
        triton_decode.COLUMNS = 512
    if control:
        latent_attention(query, key, value, scaling=0.1, mask=mask)
        return
    exact = torch.zeros(2, shape.batch, shape.heads, 8, shape.head_dim, dtype=dtype)
    stored = [StoredSide(exact[0], one, exact[1]) for one in (key, value)]
    masks = mask[..., :8], mask, mask[..., :8]
    attend_stored(query, *stored, scaling=0.1, masks=masks, softcap=None, sink_logits=None)
    reconstruct(key, dtype)
    reconstruct(value, dtype)
    states = torch.zeros(shape.batch, shape.heads, 128, shape.head_dim, dtype=dtype)
    encode(
        [states, states],
        [key.constant, value.constant],
        [None if key.rope is None else dataclasses.replace(key.rope, frame_length=64), None],
        torch.zeros(2 * shape.heads * shape.head_dim, sum(shape.key_tiers.values()), dtype=torch.float16),
        tuple(shape.key_tiers.items()),
        torch.ones(sum(shape.key_tiers.values())),
        torch.float16,
    )


@dataclass
class Report:
    """Static numbers of one compiled kernel."""

    kernel: str
    registers: int
    spills: int
    shared: int
    matrix_instructions: int
    loads: dict[str, Counter] = field(default_factory=dict)  # bytes of load instructions by source line

    def breaches(self, target: str, exact: bool) -> list[str]:
        found = []
        if self.shared > SHARED_KIB[target] * 1024:
            found.append(f"shared memory {self.shared} above {SHARED_KIB[target]} KiB")
        if exact:
            return found
        if self.spills > (0 if target.startswith("gfx") else SPILLS):
            found.append(f"spills ({self.spills})")
        if not self.matrix_instructions and self.kernel not in NO_MATRICES:
            found.append("no tensor-core instructions")
        bulk = [
            (line, width, least)
            for line, widths in self.loads.items()
            for start, least in BULK.items()
            for width in widths
            if line.startswith(start)
        ]
        if not any(width >= 16 for _, width, _ in bulk):
            found.append("no load of 16 bytes")
        found += [f"loads of {width} bytes in '{line}'" for line, width, least in bulk if width < least]
        return found


def measure(name: str, kernel, target: str) -> Report:
    """Read the static numbers off a compiled kernel."""
    if target.startswith("gfx"):
        code = kernel.asm["amdgcn"]
        number = lambda field: int(re.search(rf"\.{field}:\s+(\d+)", code)[1])  # noqa: E731
        spills = number("vgpr_spill_count") + number("private_segment_fixed_size")
        matrices = len(re.findall(r"\bv_mfma_\w+", code))
        return Report(name, number("vgpr_count"), spills, kernel.metadata.shared, matrices, loads_by_line(code))
    code = kernel.asm["ptx"]
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
        machine = subprocess.run([tools / "nvdisasm", "-c", file.name], capture_output=True, text=True).stdout
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    spills = len(re.findall(r"\b(?:STL|LDL)\b", machine))
    matrices = len(re.findall(r"\bmma\.sync|\bwgmma\.mma_async|\btcgen05\.mma", code))
    assert "EXIT" in machine, "the machine code could not be read"
    return Report(name, registers, spills, kernel.metadata.shared, matrices, loads_by_line(code))


_LOAD = re.compile(
    r"\bld\.global(?P<modifiers>[.\w]*)\.[bus](?P<bits>\d+)\b"
    r"|\bcp\.async\.c[ag]\.shared\.global\s.*?\],\s*0x(?P<copied>[0-9a-f]+)"
    r"|\b(?:buffer|global)_load_(?P<amd>\w+)"
)
_AMD_BYTES = {"ubyte": 1, "sbyte": 1, "ushort": 2, "sshort": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


def loads_by_line(assembly: str) -> dict[str, Counter]:
    """Widths in bytes of the load instructions of each source line, by the line's text."""
    files = dict(re.findall(r"\.file\s+(\d+)\s+(.+)", assembly))
    sources: dict[str, list[str]] = {}
    found: dict[str, Counter] = {}
    line = "?"
    asm_lines = 0
    for instruction in assembly.splitlines():
        # Within a block of inline assembly line numbers count on from the block's own.
        if "inline asm" in instruction:
            asm_lines = "begin" in instruction
        elif asm_lines == 2 and ".loc" in instruction:
            continue
        if location := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", instruction):
            number, at = location[1], int(location[2])
            if number not in sources:
                path = Path(*re.findall(r'"([^"]*)"', files[number]))
                sources[number] = path.read_text().splitlines() if path.exists() else []
            line = sources[number][at - 1].strip() if 0 < at <= len(sources[number]) else "?"
            asm_lines *= 2
        elif load := _LOAD.search(instruction):
            if load["bits"]:
                vector = re.search(r"\.v(\d)", load["modifiers"])
                width = int(load["bits"]) // 8 * (int(vector[1]) if vector else 1)
            elif load["copied"]:
                width = int(load["copied"], 16)
            else:
                amd = re.sub(r"_lds.*|_d16.*", "", load["amd"])
                width = _AMD_BYTES.get(amd, 1)
            found.setdefault(line, Counter())[width] += 1
    return found


def check(target: str, shapes: list[str], control: str | None) -> int:
    """Print a line per compiled kernel; the number of kernels that breach a gate."""
    bad = 0
    seen: set[str] = set()
    for name in shapes:
        with compiling_for(target) as compiled:
            compile_shape(SHAPES[name], control)
        for key, (kernel_name, kernel) in compiled.items():
            if key in seen:
                continue
            seen.add(key)
            report = measure(kernel_name, kernel, target)
            breaches = report.breaches(target, SHAPES[name].exact)
            bad += bool(breaches)
            print(
                f"{'FAIL' if breaches else 'ok  '} {target} {name} {kernel_name}: {report.registers} registers, "
                f"{report.shared} bytes shared, {report.matrix_instructions} matrix instructions"
                f"{': ' + '; '.join(breaches) if breaches else ''}",
                flush=True,
            )
    return bad


def check_in_parallel(targets: list[str], jobs: int, rest: list[str]) -> int:
    """``check`` in one process per target, ``jobs`` at a time; the number of targets that fail."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}

        def run(target: str) -> int:
            command = [sys.executable, "-P", __file__, "--target", target, *rest]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            print(done.stdout + (done.stderr if done.returncode > 1 or not done.stdout else ""), end="", flush=True)
            return done.returncode

        with ThreadPoolExecutor(jobs) as pool:
            return sum(bool(code) for code in pool.map(run, targets))


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--target", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--control", choices=["misaligned", "oversized", "float32"])
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET must be unset: interpreted kernels cannot be compiled")
    torch.set_num_threads(1)
    if len(given.target) == 1:
        return check(given.target[0], given.shape, given.control)
    rest = ["--shape", *given.shape, *(["--control", given.control] if given.control else [])]
    return check_in_parallel(given.target, given.jobs, rest)


if __name__ == "__main__":
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what triton 3.9 does unasked, and warns about
    sys.exit(bool(main()))
