"""Whether ``impl="auto"`` means the Triton kernels on a GPU, and what happens where they fail after all.

A class of cards is trusted once ``lowrank-cache gpu-check`` has passed on one: on ours, which this file lists, or on
the user's own, which a file in the user's cache does. On a trusted card the first call of each kind is computed by
torch too, and compared. Whatever goes wrong is answered by torch, then and from then on, with one warning.
"""

import hashlib
import json
import re
import warnings
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lowrank_cache.artefact import user_cache, write_files
from lowrank_cache.kernels.packed import LatentSide, PackedTier, StoredSide, read_latents

# Classes of GPUs on which gpu-check has passed. It has not run to its end on any yet.
CHECKED_CARDS: frozenset[str] = frozenset()
TESTED_TRITON = (3, 6), (3, 9)  # the first and the last minor release
_AMD = ("gfx90a", "gfx942", "gfx950")
_DISTRUSTED: set[torch.device] = set()  # devices on which a kernel failed
_COMPARED: set[tuple] = set()  # kinds of calls that agreed with torch


def card_class(device: torch.device) -> str:
    """What GPUs of one instruction set have in common: ``"sm_90"``, ``"gfx942"``."""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@cache
def kernels_digest() -> str:
    """SHA-256 of the kernels' sources: a pass of other kernels says nothing of these."""
    sources = sorted(Path(__file__).parent.glob("triton_*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def _record() -> Path:
    return user_cache() / "gpu-check.json"


def record_pass(card: str) -> Path:
    """Note for this user that the kernels passed on this class of cards; returns the file."""
    path = _record()
    path.parent.mkdir(parents=True, exist_ok=True)
    passed = {**_recorded(), card: kernels_digest()}
    write_files({path: json.dumps(passed, indent=1).encode()})
    serves.cache_clear()
    return path


def _recorded() -> dict[str, str]:
    """Digests of kernels that passed, by class; a file that cannot be read says nothing."""
    try:
        found = json.loads(_record().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@cache
def serves(device: torch.device) -> bool:
    """Whether ``"auto"`` means Triton on a GPU; asked once for each, and one warning says why not."""
    if find_spec("triton") is None:
        return False
    obstacle = _obstacle(card_class(device))
    if obstacle is not None:
        warnings.warn(
            f"plain torch computes on {device}, since {obstacle}; impl='triton' takes the kernels all the same",
            stacklevel=2,
        )
    return obstacle is None


def _obstacle(card: str) -> str | None:
    if not (card in _AMD or (card.startswith("sm_") and int(card[3:]) >= 80)):
        return f"the Triton kernels need compute capability 8.0 or one of {', '.join(_AMD)}, and it is {card}"
    release = version("triton")
    minor = tuple(int(number) for number in re.findall(r"\d+", release)[:2])
    if not TESTED_TRITON[0] <= minor <= TESTED_TRITON[1]:
        first, last = (".".join(map(str, tested)) for tested in TESTED_TRITON)
        return f"the kernels were tested with Triton {first} to {last}, not with {release}"
    if card not in CHECKED_CARDS and _recorded().get(card) != kernels_digest():
        return f"the kernels have not been checked on a GPU of class {card}: run 'lowrank-cache gpu-check'"
    return None


def guarded(kernels: SimpleNamespace, torch_ops: SimpleNamespace | ModuleType) -> SimpleNamespace:
    """``kernels`` by name, each answered by the one of ``torch_ops`` of the same name where it fails.

    ValueErrors are the caller's, and a lack of memory is nobody's fault: both are raised.
    """
    return SimpleNamespace(
        **{name: _guarded(name, kernel, getattr(torch_ops, name)) for name, kernel in vars(kernels).items()}
    )


def _guarded(name: str, kernel: Callable, fallback: Callable) -> Callable:
    def call(*arguments: Any, **options: Any) -> Any:
        device, kind = _kind(name, arguments)
        if device in _DISTRUSTED:
            return fallback(*arguments, **options)
        try:
            result = kernel(*arguments, **options)
            if kind in _COMPARED:
                return result
            reason = None
        except (ValueError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of the compiler, of the driver, of a launch
            reason = f"{type(error).__name__}: {str(error)[:200]}"
        try:
            expected = fallback(*arguments, **options)
            reason = reason or disagreement(result, expected, kind[2])
        except torch.OutOfMemoryError:
            if reason is not None:
                raise
            return result  # torch needs more room than the kernels: compared another time
        if reason is None:
            _COMPARED.add(kind)
            return result
        _DISTRUSTED.add(device)
        warnings.warn(
            f"the Triton kernels fail on {device} ({name}: {reason}), so plain torch computes there from now on; "
            f"please report what 'lowrank-cache gpu-check' prints",
            RuntimeWarning,
            stacklevel=3,
        )
        return expected

    return call


def _kind(name: str, arguments: tuple) -> tuple[torch.device, tuple]:
    """The device of a call, and the device, name, coarsest dtype, head_dim and widths that it is one of."""
    if name == "encode":
        states, tiers = arguments[0][0], arguments[4]
        return states.device, (states.device, name, states.dtype, states.shape[3], tuple(bits for bits, _ in tiers))
    if name == "reconstruct":
        side, dtype = arguments[0], arguments[1]
    else:
        side, dtype = arguments[1], arguments[0].dtype
        side = side.latents if isinstance(side, StoredSide) else side
    assert isinstance(side, LatentSide)
    up_proj = side.up_proj
    coarse = max(dtype, up_proj.dtype, key=lambda one: torch.finfo(one).eps) if dtype != torch.float32 else dtype
    return up_proj.device, (up_proj.device, name, coarse, up_proj.shape[2], tuple(tier.bits for tier in side.tiers))


def disagreement(result: Any, expected: Any, dtype: torch.dtype) -> str | None:
    """What is wrong with a result, None if it agrees; torch's own roundings are as large as the kernels'."""
    results, wanted = ((one if isinstance(one, tuple) else (one,)) for one in (result, expected))
    if all(isinstance(one, PackedTier) for one in wanted):
        # Another choice among steps that are nearly as good is no fault, and rare.
        results, wanted, bound = (read_latents(results),), (read_latents(wanted),), 0.05
    else:
        # A few roundings of operands, in results that are averages of them.
        bound = 16 * torch.finfo(dtype).eps if dtype != torch.float32 else 2.0**-10
    for one, other in zip(results, wanted, strict=True):
        seen = torch.isfinite(other)
        if not torch.equal(torch.isfinite(one), seen):
            return "numbers that are not finite"
        difference, size = _norm(one[seen].double() - other[seen]), _norm(other[seen])
        if difference > bound * size + 1e-6:
            share = difference / max(size, 1e-30)
            return f"numbers {share:.2g} of their size from torch's, rounding explains {bound:.2g}"
    return None


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.double()))
