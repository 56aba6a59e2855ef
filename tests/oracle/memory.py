"""What a cache really holds: the tensors reachable from it, found by walking objects and not by asking."""

import weakref

from torch import Tensor, nn

from lowrank_cache import Projections
from lowrank_cache.coder import CalibratedCoder

__all__ = ["held_bytes", "reachable_tensors"]

_NOT_TOKENS = (CalibratedCoder, Projections, nn.Module, type, weakref.ref)  # bases, the model, and what leads to either


def reachable_tensors(root: object) -> list[Tensor]:
    """All tensors reachable from ``root`` through attributes and containers, bases and model apart."""
    found, seen, waiting = [], set(), [root]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, _NOT_TOKENS):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, dict):
            waiting.extend([*item.keys(), *item.values()])
        elif isinstance(item, list | tuple | set | frozenset):
            waiting.extend(item)
        elif hasattr(item, "__dict__"):
            waiting.append(vars(item))
    return found


def held_bytes(root: object) -> int:
    """Bytes of all storages behind ``reachable_tensors``, each counted once and whole, even if a view uses a part.

    Scalars hold no tokens: transformers' sliding layers keep their constant sizes as such.
    """
    tensors = [tensor for tensor in reachable_tensors(root) if tensor.dim() > 0]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())
