"""What a prefill keeps alive: dense keys and values, found by looking for them, and all that torch allocates."""

import gc
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from lowrank_cache.cache_argument import cache_argument
from lowrank_cache.evaluation.memory import watch_allocated
from lowrank_cache.models import SIDES, model_shape

__all__ = ["PrefillPeak", "prefill_peak"]


@dataclass(frozen=True)
class PrefillPeak:
    """Bytes during one prefill.

    Attributes:
        dense: Most bytes of dense keys and values of the whole prompt that were alive at once, seen whenever a
            layer hands its states to the cache.
        allocated: Most bytes that torch had allocated at once since the prefill began.
        left: Of those, what the cache holds afterwards.
    """

    dense: int
    allocated: int
    left: int


@torch.no_grad()
def prefill_peak(model: PreTrainedModel, cache: Cache, input_ids: Tensor) -> PrefillPeak:
    """Prefill ``cache`` with ``input_ids`` ``[batch, tokens]`` in one forward, on a CPU, and watch the memory.

    Queries of a model with as many query heads as key heads look like keys, and are counted with them.
    """
    shape, tokens = model_shape(model), input_ids.shape[1]
    kinds = {(layer.side(side).heads, tokens, layer.side(side).head_dim) for layer in shape.layers for side in SIDES}
    seen: list[int] = []
    update = cache.update

    def watched(*args, **kwargs):
        seen.append(_dense_bytes(kinds))
        states = update(*args, **kwargs)
        seen.append(_dense_bytes(kinds))
        return states

    cache.update = watched  # type: ignore[method-assign]
    try:
        with watch_allocated(input_ids.device) as allocated:
            model(input_ids=input_ids, **cache_argument(model, cache), logits_to_keep=1)
    finally:
        del cache.update  # the class' own is there again
    return PrefillPeak(max(seen), allocated.highest, allocated.left)


def _dense_bytes(kinds: set[tuple[int, int, int]]) -> int:
    """Bytes of the storages behind all tensors of the process that have one of these shapes, batch apart."""
    found = [item for item in gc.get_objects() if type(item) is Tensor and item.dim() == 4]
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in found
        if tuple(tensor.shape[1:]) in kinds
    }
    return sum(storages.values())
