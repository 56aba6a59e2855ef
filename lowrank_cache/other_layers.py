"""The layers that a LowRankCache leaves to transformers' own classes: their tensors to a file and back.

Each kind of layer has state of its own, so only kinds that are known here are saved; others are refused by name.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer

from lowrank_cache.saved_tensors import SavedTensors

__all__ = ["check_savable", "load_layer", "save_layer"]

_KINDS: tuple[type, ...] = (DynamicSlidingWindowLayer, LinearAttentionLayer)
if hasattr(cache_utils, "DummyLayer"):  # since transformers 5.23: layers without attention
    _KINDS += (cache_utils.DummyLayer,)


def check_savable(layer: object, layer_idx: int, slots: int) -> None:
    """Raise NotImplementedError, before anything is written, unless ``save_layer`` keeps all of a layer's state."""
    known = type(layer) in _KINDS
    if isinstance(layer, DynamicSlidingWindowLayer) and isinstance(layer.keys, Tensor):
        known = known and layer.get_seq_length() == slots and layer.keys.shape[2] >= _kept(layer, slots)
    if isinstance(layer, LinearAttentionLayer):
        known = known and all(
            states is None or states.shape[-1] >= (layer.conv_kernel_size[index] or 0)
            for index, states in layer.conv_states.items()
        )
    if not known:
        raise NotImplementedError(f"layer {layer_idx} is a {type(layer).__name__} in a state that cannot be saved")


def save_layer(layer: Any, into: SavedTensors, name: str) -> dict[str, Any]:
    """Put down a layer's tensors; what it kept for undoing speculative tokens is left out."""
    facts: dict[str, Any] = {"kind": type(layer).__name__}
    if isinstance(layer, DynamicSlidingWindowLayer):
        facts["filled"] = layer.is_initialized
        if layer.is_initialized:
            kept = _kept(layer, layer.get_seq_length())
            for part in ("keys", "values"):
                states = getattr(layer, part)
                into.put(f"{name}.{part}", states[:, :, states.shape[2] - kept :])
    elif isinstance(layer, LinearAttentionLayer):
        held = _linear_states(layer)
        for part, states in held.items():
            kind, index = part.split(".")
            size = layer.conv_kernel_size[int(index)] if kind == "conv" else None
            into.put(f"{name}.{part}", states if size is None else states[..., states.shape[-1] - size :])
        facts["states"] = sorted(held)
        facts["seen"] = [index for index, seen in layer.has_previous_state.items() if seen]
    return facts


def load_layer(layer: Any, saved: SavedTensors, name: str, facts: dict[str, Any], batch: int, slots: int, like: Any):
    """Take up into an empty layer what ``save_layer`` put down.

    Args:
        like: The same layer of a cache that holds one token: its shapes, dtypes and devices.

    Raises:
        ValueError: If the layer is of another kind, or a tensor is missing or does not fit.
    """
    if facts["kind"] != type(layer).__name__ or type(layer) not in _KINDS:
        raise ValueError(f"{name} must be a {type(layer).__name__}, got {facts['kind']!r}")
    if isinstance(layer, DynamicSlidingWindowLayer) and facts["filled"] is True:
        taken = []
        for part in ("keys", "values"):
            model = _of(like, part, name)
            size = (batch, model.shape[1], _kept(layer, slots), model.shape[3])
            taken.append(saved.take(f"{name}.{part}", size, model.dtype, model.device))
        layer.lazy_initialization(*taken)
        layer.keys, layer.values = taken
        layer.cumulative_length = slots
    elif isinstance(layer, LinearAttentionLayer):
        present = _linear_states(like)
        if sorted(present) != facts["states"]:
            raise ValueError(f"{name} must have the states {sorted(present)}, got {facts['states']}")
        for part, model in present.items():
            kind, index = part.split(".")
            states = saved.take(f"{name}.{part}", (batch, *model.shape[1:]), model.dtype, model.device)
            if kind == "conv":
                layer.lazy_initialization(conv_states=states, state_idx=int(index))
            else:
                layer.lazy_initialization(recurrent_states=states, state_idx=int(index))
            _linear_states(layer)[part].copy_(states)
        seen = facts["seen"]
        if not all(index in layer.has_previous_state for index in seen):
            raise ValueError(f"{name}.seen must name states of the layer, got {seen}")
        layer.has_previous_state.update(dict.fromkeys(seen, True))


def _kept(layer: DynamicSlidingWindowLayer, slots: int) -> int:
    """Tokens that later forwards can see."""
    return min(slots, layer.sliding_window - 1)


def _linear_states(layer: LinearAttentionLayer) -> dict[str, Tensor]:
    held = {"conv": layer.conv_states, "recurrent": layer.recurrent_states}
    return {
        f"{kind}.{index}": state
        for kind, states in held.items()
        for index, state in states.items()
        if state is not None
    }


def _of(like: Any, part: str, name: str) -> Tensor:
    tensor = getattr(like, part)
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} holds tokens, but this model gives the layer none")
    return tensor
