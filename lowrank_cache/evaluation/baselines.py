"""Caches to compare against, and the bytes that any cache really holds.

transformers' own caches are used as they are. KIVI (arXiv:2402.02750) has no maintained cache for
transformers 5, so its arithmetic is simulated: states are quantized and kept dequantized, and the
bytes it would store are counted by its formula, not from tensors.
"""

from importlib.util import find_spec

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, QuantizedCache
from transformers.cache_utils import DynamicLayer

__all__ = ["BASELINES", "SimulatedKiviCache", "make_baseline", "tensor_bytes"]

BASELINES = ("full", "quantized-fp8", "quantized-4", "quantized-2", "kivi-4", "kivi-2")


def make_baseline(name: str, model: PreTrainedModel, residual_length: int) -> Cache:
    """A fresh cache by its name in ``BASELINES``.

    Raises:
        ValueError: If the name is unknown.
        ImportError: If the baseline's package is not installed.
    """
    kind, _, bits = name.partition("-")
    if name == "full":
        return DynamicCache(config=model.config)
    if name == "quantized-fp8":
        return QuantizedCache("fp8", model.config)
    if kind == "quantized" and bits in ("2", "4"):
        if find_spec("optimum") is None or find_spec("optimum.quanto") is None:
            raise ImportError(f'{name} needs optimum-quanto: pip install "lowrank-cache[quanto]"')
        return QuantizedCache("quanto", model.config, nbits=int(bits), residual_length=residual_length)
    if kind == "kivi" and bits in ("2", "4"):
        return SimulatedKiviCache(model, int(bits), residual_length)
    raise ValueError(f"cache must be one of {BASELINES}, got {name!r}")


def tensor_bytes(cache: Cache) -> int:
    """Bytes of all tensors reachable from a cache, quantized tensor subclasses by their parts."""
    if hasattr(cache, "stored_bytes"):
        return cache.stored_bytes()
    seen: set[int] = set()
    return sum(_bytes(vars(layer), seen) for layer in cache.layers)


def _bytes(value: object, seen: set[int]) -> int:
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, Tensor):
        if type(value) is not Tensor and hasattr(value, "__tensor_flatten__"):
            names, _ = value.__tensor_flatten__()
            return sum(_bytes(getattr(value, name), seen) for name in names)
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(_bytes(part, seen) for part in value.values())
    if isinstance(value, list | tuple):
        return sum(_bytes(part, seen) for part in value)
    return 0


class _KiviLayer(DynamicLayer):
    """Quantizes the oldest ``GROUP`` tokens of its window whenever they are complete."""

    GROUP = 32

    def __init__(self, bits: int, residual_length: int):
        super().__init__()
        self.bits, self.residual_length = bits, residual_length
        self.quantized = 0

    def update(self, key_states, value_states, *args, **kwargs):
        keys, values = super().update(key_states, value_states)
        while keys.shape[2] - self.quantized >= self.residual_length + self.GROUP:
            block = slice(self.quantized, self.quantized + self.GROUP)
            # Out of place: what this update returns must stay exact.
            self.keys, self.values = self.keys.clone(), self.values.clone()
            self.keys[:, :, block] = _asymmetric(keys[:, :, block], self.bits, axis=2)
            self.values[:, :, block] = _asymmetric(
                values[:, :, block].unflatten(3, (-1, self.GROUP)), self.bits, axis=4
            ).flatten(3)
            self.quantized += self.GROUP
        return keys, values


def _asymmetric(states: Tensor, bits: int, axis: int) -> Tensor:
    """``states`` after quantizing to ``2**bits`` levels between their least and largest along ``axis``."""
    wide = states.float()
    low, high = wide.amin(axis, keepdim=True), wide.amax(axis, keepdim=True)
    low = low.to(torch.float16).float()
    step = ((high - low) / (2**bits - 1)).to(torch.float16).float().clamp(min=1e-8)
    return (((wide - low) / step).round().clamp_(0, 2**bits - 1) * step + low).to(states.dtype)


class SimulatedKiviCache(Cache):
    """KIVI: keys by channel over 32 tokens, values by token over 32 channels, a window of recent tokens.

    Args:
        model: Must have full-attention layers and a head_dim divisible by 32.
        bits: 2 or 4.
        residual_length: Most recent tokens kept exactly.
    """

    def __init__(self, model: PreTrainedModel, bits: int, residual_length: int):
        self.kivi_layers = [_KiviLayer(bits, residual_length) for _ in range(model.config.num_hidden_layers)]
        super().__init__(layers=list(self.kivi_layers))

    def stored_bytes(self) -> int:
        """What KIVI would store: codes, float16 steps and offsets by 32, the window in the model's dtype."""
        total = 0.0
        for layer in self.kivi_layers:
            for states in (layer.keys, layer.values):
                if states is None:
                    continue
                numbers = states.numel() / states.shape[2]
                coded = layer.bits / 8 + 4 / layer.GROUP
                total += numbers * layer.quantized * coded
                total += numbers * (states.shape[2] - layer.quantized) * states.element_size()
        return round(total)
