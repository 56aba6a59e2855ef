"""What a cache returns and what it writes: its contents, seen from outside."""

import copy
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_cache import LowRankCache
from lowrank_cache.kernels.rope import angle_tables, rotate
from tests.oracle.inside import reconstructing
from tests.oracle.memory import reachable_tensors
from tests.oracle.models import exact_cache, full_rank_projections, random_tokens

__all__ = ["Unchanged", "filled_cache", "latent_states", "past_states", "saved_facts", "saved_tensors", "unrotated"]

States = dict[tuple[int, str], Tensor]


def past_states(model: PreTrainedModel, cache: LowRankCache, batch: int, mask: Tensor | None = None) -> States:
    """What ``update`` returns for the cached tokens, by layer and side ``[batch, heads, slots, head_dim]``.

    The cache is left as it is: a copy reads one token more.

    Args:
        mask: ``[batch, slots]``, zero for padding; None if there is none.
    """
    copied, slots, returned = reconstructing(cache), cache.get_seq_length(), {}
    mask = torch.ones(batch, slots, dtype=torch.long) if mask is None else mask

    def update(key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = LowRankCache.update(copied, key_states, value_states, layer_idx, *args, **kwargs)
        returned[layer_idx, "key"], returned[layer_idx, "value"] = keys[:, :, :slots], values[:, :, :slots]
        return keys, values

    copied.update = update
    with torch.no_grad():
        model(
            random_tokens(batch, 1),
            attention_mask=torch.cat([mask, mask.new_ones(batch, 1)], dim=1),
            position_ids=mask.sum(1, keepdim=True),
            past_key_values=copied,
        )
    return returned


def latent_states(model: PreTrainedModel, cache: LowRankCache, batch: int, mask: Tensor | None = None) -> States:
    """Those of ``past_states`` that are read from latents, by layer and side in the order of the groups."""
    sinks, states = saved_facts(cache)["settings"]["num_sink_tokens"], past_states(model, cache, batch, mask)
    return {
        member: states[member][:, :, sinks : sinks + group.tokens]
        for group in cache.groups()
        for member in group.members
        if group.tokens
    }


def unrotated(model: PreTrainedModel, keys: Tensor, start: int) -> Tensor:
    """Keys before the rotary function of slots from ``start`` on: layout ``half``, no padding, constant frequencies."""
    positions = torch.arange(start, start + keys.shape[2])
    cos, sin = angle_tables(positions, model.get_decoder().rotary_emb.inv_freq)
    return rotate(keys, cos, sin, "half", inverse=True)


def saved_tensors(cache: LowRankCache) -> dict[str, Tensor]:
    """What ``save_pretrained`` writes of a cache, by name: bits and all, without room to grow."""
    with TemporaryDirectory() as folder:
        cache.save_pretrained(folder)
        (path,) = Path(folder).glob("*.safetensors")
        return load_file(path)


def saved_facts(cache: LowRankCache) -> dict[str, Any]:
    """The JSON that ``save_pretrained`` writes of a cache."""
    with TemporaryDirectory() as folder:
        cache.save_pretrained(folder)
        return json.loads((Path(folder) / "lowrank_cache.json").read_text())


def filled_cache(model: PreTrainedModel) -> LowRankCache:
    """A cache of tiny llama with sinks, latents and a window of two rows, the second left-padded by one."""
    cache = exact_cache(model, full_rank_projections("llama"))
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 0] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model(random_tokens(2, 20), attention_mask=mask, position_ids=positions, past_key_values=cache)
    return cache


class Unchanged:
    """Context: what a ``filled_cache`` holds, and what it does next, must be the same afterwards."""

    def __init__(self, model: PreTrainedModel, cache: LowRankCache):
        self.model, self.cache = model, cache
        self.twin = copy.deepcopy(cache)

    def __enter__(self):
        self.before = [tensor.clone() for tensor in reachable_tensors(self.cache)]

    def __exit__(self, error_type, *rest):
        if error_type is not None:
            return
        after = reachable_tensors(self.cache)
        assert len(after) == len(self.before)
        for mine, before in zip(after, self.before, strict=True):
            assert torch.equal(mine.nan_to_num(), before.nan_to_num())  # unused room holds NaN in tests
        assert self.cache.get_seq_length() == self.twin.get_seq_length()
        assert torch.equal(_next_logits(self.model, self.cache), _next_logits(self.model, self.twin))


def _next_logits(model: PreTrainedModel, cache: LowRankCache) -> Tensor:
    past = cache.get_seq_length()
    mask = torch.ones(2, past + 3, dtype=torch.long)
    mask[1, 0] = 0
    positions = (mask.cumsum(1) - 1)[:, past:]
    return model(random_tokens(2, 3), attention_mask=mask, position_ids=positions, past_key_values=cache).logits
