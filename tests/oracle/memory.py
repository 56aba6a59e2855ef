"""What a cache really holds: the tensors reachable from it, found by walking objects and not by asking."""

import gc
import weakref
from collections.abc import Iterable

from torch import Tensor, nn

from lowrank_cache import Projections
from tests.oracle.inside import CALIBRATED_BASES

__all__ = ["base_tensors", "held_bytes", "live_tensors", "reachable_tensors", "storages"]

_NOT_TOKENS = (Projections, nn.Module, type, weakref.ref)  # the model, and what leads to it


def reachable_tensors(root: object) -> list[Tensor]:
    """All tensors reachable from ``root`` through attributes and containers, calibrated bases and model apart."""
    # What reads latents holds matrices of the bases too.
    bases = [item for item in _walk(root, _NOT_TOKENS) if isinstance(item, CALIBRATED_BASES)]
    theirs = {id(tensor) for tensor in _reachable(bases, _NOT_TOKENS)}
    found = _reachable(root, (*_NOT_TOKENS, *CALIBRATED_BASES))
    return [tensor for tensor in found if id(tensor) not in theirs]


def base_tensors(root: object) -> list[Tensor]:
    """Tensors of the calibrated bases that a cache reads with: what ``reachable_tensors`` leaves out."""
    tokens = {id(tensor) for tensor in reachable_tensors(root)}
    return [tensor for tensor in _reachable(root, _NOT_TOKENS) if id(tensor) not in tokens]


def _reachable(root: object, without: tuple[type, ...]) -> list[Tensor]:
    return [item for item in _walk(root, without) if isinstance(item, Tensor)]


def _walk(root: object, without: tuple[type, ...]) -> list[object]:
    """All that is reachable from ``root`` but through objects of the types ``without``."""
    found, seen, waiting = [], {}, [root]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, without):
            continue
        seen[id(item)] = item  # kept, or another object may get its number
        found.append(item)
        if isinstance(item, Tensor):
            continue
        if isinstance(item, dict):
            waiting.extend([*item.keys(), *item.values()])
        elif isinstance(item, list | tuple | set | frozenset):
            waiting.extend(item)
        elif hasattr(item, "__dict__"):
            waiting.append(vars(item))
    return found


def storages(tensors: Iterable[Tensor]) -> set[int]:
    """Addresses of the memory behind ``tensors``; what shares one is one."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def held_bytes(root: object) -> int:
    """Bytes of all storages behind ``reachable_tensors``, each counted once and whole, even if a view uses a part.

    Scalars hold no tokens: transformers' sliding layers keep their constant sizes as such.
    """
    tensors = [tensor for tensor in reachable_tensors(root) if tensor.dim() > 0]
    behind = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in behind.values())


def live_tensors(known: Iterable[Tensor] = ()) -> list[Tensor]:
    """Every plain tensor of the process: what other tests left of torch.compile's fake ones cannot be searched."""
    gc.collect()
    ids = {id(tensor) for tensor in known}
    tensors = [item for item in gc.get_objects() if isinstance(item, Tensor) and id(item) not in ids]
    return [tensor for tensor in tensors if type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta]
