"""Tokens into a cache, chunk by chunk, so that every later read is of what the cache stores; and copies of a cache."""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from lowrank_cache import LowRankCache
from lowrank_cache.cache_argument import cache_argument

__all__ = ["branch", "chunk_bounds", "feed", "padded"]


def chunk_bounds(tokens: int, chunk: int, first: int = 0) -> list[tuple[int, int]]:
    """Start and stop of each forward: ``first`` tokens (0 for ``chunk``), then ``chunk`` tokens each."""
    starts = [0, *range(first or chunk, tokens, chunk)]
    return list(zip(starts, [*starts[1:], tokens], strict=True))


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Token ids ``[tokens]`` of several rows as one batch, padded on the left or the right.

    Returns:
        ids and mask, int64 ``[batch, tokens]``; the mask is 0 for padding.
    """
    length = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(len(row))
        ids[index, place] = row
        mask[index, place] = 1
    return ids, mask


def feed(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: Cache, *, chunk: int, first: int = 0, **arguments
) -> Iterator[tuple[int, Tensor]]:
    """Feed ``ids`` to the model through ``cache``, ``chunk`` tokens a forward.

    Args:
        ids: ``[batch, tokens]`` on the model's device.
        mask: ``[batch, cached + tokens]``, 0 for padding, on the same device.
        first: Tokens of the first forward, 0 for ``chunk``.
        arguments: Of every forward, e.g. ``logits_to_keep=1``.

    Yields:
        Of each forward: index of its first token in ``ids``, and logits.
    """
    cached = mask.shape[1] - ids.shape[1]
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, cached:]
    for start, stop in chunk_bounds(ids.shape[1], chunk, first):
        output = model(
            input_ids=ids[:, start:stop],
            attention_mask=mask[:, : cached + stop],
            position_ids=positions[:, start:stop],
            **cache_argument(model, cache),
            use_cache=True,
            **arguments,
        )
        yield start, output.logits


def branch(cache: Cache) -> Cache:
    """A cache that goes on from the same tokens and leaves ``cache`` as it is."""
    if isinstance(cache, LowRankCache):
        return copy.deepcopy(cache)
    # Attention layers of other caches replace their tensors and never write into them; quanto's refuse to be copied.
    copied = copy.copy(cache)
    copied.layers = [
        copy.deepcopy(layer) if isinstance(layer, LinearAttentionCacheLayerMixin) else copy.copy(layer)
        for layer in cache.layers
    ]
    return copied
