"""Attention of one layer in one call of compiled C, for CPUs: integer dot products on the codes (``native.c``).

The source is compiled when it is first needed, by the system's compiler for the processor at hand, and kept in the
user's cache folder. Where nothing compiles, ``library`` is None and ``torch_ops`` computes.
"""

import ctypes
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from ctypes import POINTER, Structure, byref, c_char_p, c_float, c_int32, c_int64, c_void_p
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lowrank_cache.artefact import user_cache
from lowrank_cache.kernels.packed import LatentSide, StoredSide

SOURCE = Path(__file__).with_name("native.c")
_LEAST_FRAME = 16  # shorter ones absorb queries so often that reconstructing is faster
_TILE = 256
_MAX_DIM = 256
_MAX_ROWS = 512  # queries of a sequence, all heads counted; more reconstruct faster
_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_COMPILE_SECONDS = 120


class Native(NamedTuple):
    """The compiled library, or why there is none."""

    library: ctypes.CDLL | None
    description: str  # instruction set and compiler, or the reason


class _Tier(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("codes", "steps")),
        *((name, c_int64) for name in ("batch", "token", "step_batch", "step_token")),
        *((name, c_int32) for name in ("bits", "channels", "row")),
    ]


class _Side(Structure):
    _fields_ = [
        ("tiers", _Tier * 3),
        ("count", c_int64),
        ("up_proj", c_void_p),
        ("up_type", c_int64),
        ("constant", c_void_p),
    ]


class _Exact(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("keys", "values")),
        *((f"{side}_{axis}", c_int64) for side in ("key", "value") for axis in ("batch", "head", "token")),
        ("tokens", c_int64),
        ("mask", c_void_p),
        *((name, c_int64) for name in ("mask_batch", "mask_query")),
    ]


class _Step(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("batch", "q_heads", "q_tokens", "kv_heads", "key_dim", "value_dim", "type")),
        ("query", c_void_p),
        *((name, c_int64) for name in ("query_batch", "query_head", "query_token")),
        ("scaling", c_float),
        ("softcap", c_float),
        ("sink_logits", c_void_p),
        ("exact", _Exact * 2),
        ("tokens", c_int64),
        ("key", _Side),
        ("value", _Side),
        ("mask", c_void_p),
        *((name, c_int64) for name in ("mask_batch", "mask_query")),
        *((name, c_void_p) for name in ("cos", "sin")),
        *((name, c_int64) for name in ("table_batch", "half", "frame", "interleaved")),
        ("output", c_void_p),
        ("scratch", c_void_p),
        *((name, c_int64) for name in ("scratch_bytes", "threads")),
    ]


@cache
def build() -> Native:
    """Compile the library, or load what was compiled before; once a process.

    ``CC`` and ``CFLAGS`` are respected.
    """
    command = compiler()
    if command is None:
        return Native(None, "no C compiler was found; install gcc or clang, or `pip install ziglang`, or set CC")
    problems = []
    for flags in (["-march=native"], ["-mcpu=native"], []):
        try:
            return load(command, flags, _folder())
        except (subprocess.SubprocessError, OSError) as error:
            said = (getattr(error, "stderr", None) or str(error)).strip()
            problems.append(f"{' '.join([*command, *flags])}: {said.partition(chr(10))[0]}")
    return Native(None, "; ".join(problems))


def compiler() -> list[str] | None:
    """The C compiler's command: ``CC``, the system's, or the one that the package ziglang brings."""
    chosen = os.environ.get("CC")
    for name in [chosen] if chosen else ["cc", "gcc", "clang"]:
        if shutil.which(name.split()[0]):
            return name.split()
    return [sys.executable, "-m", "ziglang", "cc"] if not chosen and find_spec("ziglang") else None


def _folder() -> Path:
    """Where libraries are kept: the user's own folder, which nobody else may write."""
    folder = user_cache() / "native"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    facts = folder.stat()
    if facts.st_uid != os.getuid() or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder} must belong to you and be writable by you alone; remove it or chmod 700 it")
    return folder


def load(command: list[str], flags: list[str], folder: Path) -> Native:
    """The library for these flags, compiled into ``folder`` unless it lies there already.

    The file's name tells source, compiler and processor. It is written aside and renamed, so processes that start at
    once do not disturb each other, and loaded only if its digest is the one noted when it was made.

    Raises:
        subprocess.SubprocessError, OSError: If it cannot be compiled or loaded.
    """
    extra = os.environ.get("CFLAGS", "").split()
    options = [*flags, "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-w", *extra]
    # All that the preprocessor knows: compiler, version, and the processor's features.
    facts = _run([*command, *flags, "-dM", "-E", "-x", "c", os.devnull])
    name = hashlib.sha256("\0".join([SOURCE.read_text(encoding="utf-8"), facts, *options]).encode()).hexdigest()[:32]
    path, note = folder / f"{name}.so", folder / f"{name}.sha256"
    if not (path.exists() and note.exists() and note.read_text() == _digest(path)):
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            made = _make(command, options, Path(aside))
            digest = made.with_suffix(".sha256")
            digest.write_text(_digest(made))
            os.replace(made, path)
            os.replace(digest, note)
    library = ctypes.CDLL(str(path))
    library.lowrank_scratch.restype = c_int64
    library.lowrank_scratch.argtypes = library.lowrank_attend.argtypes = [POINTER(_Step)]
    library.lowrank_instructions.restype = c_char_p
    version = next((line.split('"')[1] for line in facts.splitlines() if line.startswith("#define __VERSION__")), "")
    return Native(library, f"{library.lowrank_instructions().decode()}, compiled by {command[0]} {version}")


def _make(command: list[str], options: list[str], folder: Path) -> Path:
    """Compile and link: with the threads of torch's own OpenMP, else with OpenMP of its own, else without threads."""
    compiled, linked = folder / "native.o", folder / "native.so"
    last: Exception | None = None
    # Linked without a library of its own, GOMP_parallel is found in torch's: one pool of threads, not two that fight.
    for threads, libraries in (["-fopenmp"], []), (["-fopenmp"], ["-fopenmp"]), ([], []):
        try:
            _run([*command, *options, *threads, "-c", str(SOURCE), "-o", str(compiled)])
            _run([*command, *options, "-shared", str(compiled), "-o", str(linked), *libraries, "-lm"])
            ctypes.CDLL(str(linked), mode=os.RTLD_NOW)
            return linked
        except (subprocess.CalledProcessError, OSError) as error:
            last = error
    assert last is not None
    raise last


def _run(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_COMPILE_SECONDS).stdout


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def serves(query: Tensor, key: StoredSide, value: StoredSide) -> bool:
    """Whether ``attend`` computes these: on a CPU, codes of 8 bits and fewer, frames that are long enough."""
    batch, q_heads, q_tokens, head_dim = query.shape
    exact = (key.sinks, key.tail, value.sinks, value.tail)
    fits = query.device.type == "cpu" and query.dtype in _TYPES and q_heads * q_tokens <= _MAX_ROWS
    fits = fits and all(part.dtype == query.dtype for part in exact) and head_dim <= _MAX_DIM and head_dim % 2 == 0
    fits = fits and value.tail.shape[3] <= _MAX_DIM
    if not fits or key.latents is None or value.latents is None:
        return fits
    rope = key.latents.rope
    if rope is not None and (rope.frame_length < _LEAST_FRAME or rope.cos.dtype != torch.float32):
        return False
    return value.latents.rope is None and all(_plain(side) for side in (key.latents, value.latents))


def _plain(side: LatentSide) -> bool:
    widths = [tier.bits for tier in side.tiers]
    one_basis = side.scale is None and side.up_proj.dim() == 3 and side.constant.dim() == 2
    return one_basis and side.up_proj.dtype in _TYPES and bool(widths) and 16 not in widths


_SCRATCH = threading.local()  # a step's working memory, kept for the next layer


def attend(
    query: Tensor,
    key: StoredSide,
    value: StoredSide,
    *,
    scaling: float,
    masks: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """See ``api.attend_stored``; only where ``serves`` and ``build().library`` say that it can."""
    library = build().library
    assert library is not None
    batch, q_heads, q_tokens, head_dim = query.shape
    kv_heads, value_dim = value.tail.shape[1], value.tail.shape[3]
    held = [query := _rowwise(query)]  # what the pointers point to
    step = _Step(batch, q_heads, q_tokens, kv_heads, head_dim, value_dim, _TYPES[query.dtype], query.data_ptr())
    step.query_batch, step.query_head, step.query_token = query.stride()[:3]
    step.scaling, step.softcap = scaling, softcap or 0.0
    if sink_logits is not None:
        held.append(sink_logits := sink_logits.float().contiguous())
        step.sink_logits = sink_logits.data_ptr()
    sink_mask, latent_mask, tail_mask = masks
    for part, keys, values, mask in (
        (step.exact[0], key.sinks, value.sinks, sink_mask),
        (step.exact[1], key.tail, value.tail, tail_mask),
    ):
        keys, values = _rowwise(keys), _rowwise(values)
        part.keys, part.values, part.tokens = keys.data_ptr(), values.data_ptr(), keys.shape[2]
        part.key_batch, part.key_head, part.key_token, _ = keys.stride()
        part.value_batch, part.value_head, part.value_token, _ = values.stride()
        held += [keys, values, *_set_mask(part, mask, q_tokens)]
    if key.latents is not None and value.latents is not None:
        step.tokens, rope = key.latents.tokens, key.latents.rope
        held += [*_set_side(step.key, key.latents), *_set_side(step.value, value.latents)]
        held += _set_mask(step, latent_mask, q_tokens)
        if rope is None:
            step.frame = max(_TILE, step.tokens)
        else:
            cos, sin = rope.cos.contiguous(), rope.sin.contiguous()
            held += [cos, sin]
            step.cos, step.sin, step.frame = cos.data_ptr(), sin.data_ptr(), rope.frame_length
            step.half, step.interleaved = cos.shape[2], rope.layout == "interleaved"
            step.table_batch = 0 if cos.shape[0] == 1 else cos.stride(0)
    else:
        step.frame = _TILE
    output = query.new_empty(batch, q_tokens, q_heads, value_dim)
    step.output, step.threads = output.data_ptr(), torch.get_num_threads()
    needed = library.lowrank_scratch(byref(step))
    scratch = getattr(_SCRATCH, "memory", None)
    if scratch is None or scratch.numel() < needed:
        _SCRATCH.memory = scratch = torch.empty(needed + needed // 8, dtype=torch.uint8, device="cpu")
    step.scratch, step.scratch_bytes = scratch.data_ptr(), scratch.numel()
    if library.lowrank_attend(byref(step)):
        raise RuntimeError(f"native attention needs {needed} bytes of scratch, got {scratch.numel()}")
    return output.transpose(1, 2)


def _rowwise(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _set_mask(part: _Exact | _Step, mask: Tensor | None, q_tokens: int) -> list[Tensor]:
    if mask is None:
        return []
    mask = _rowwise(mask)
    part.mask = mask.data_ptr()
    part.mask_batch = mask.stride(0) if mask.shape[0] > 1 else 0
    part.mask_query = mask.stride(2) if mask.shape[2] > 1 else 0
    return [mask]


def _set_side(side: _Side, latents: LatentSide) -> list[Tensor]:
    up_proj, constant = latents.up_proj.contiguous(), latents.constant.contiguous()
    side.count = len(latents.tiers)
    side.up_proj, side.up_type, side.constant = up_proj.data_ptr(), _TYPES[up_proj.dtype], constant.data_ptr()
    for to, tier in zip(side.tiers, latents.tiers, strict=False):
        codes, steps = tier.codes, tier.steps
        assert steps is not None
        to.codes, to.steps, to.batch, to.token = codes.data_ptr(), steps.data_ptr(), codes.stride(0), codes.stride(1)
        to.step_batch, to.step_token = steps.stride()
        to.bits, to.channels, to.row = tier.bits, tier.channels, codes.shape[2]
    return [up_proj, constant]
