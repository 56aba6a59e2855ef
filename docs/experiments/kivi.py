"""KIVI (arXiv:2402.02750), simulated, beside the caches that ``lowrank-cache eval`` measures: ``kivi-4``, ``kivi-2``.

It has no maintained cache for transformers 5, so its arithmetic is simulated, and the bytes that it would store are
counted by its formula, not from tensors. The times that a report shows for it are those of the simulation.
"""

from functools import partial
from typing import Annotated

import torch
import typer
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from lowrank_cache import cli
from lowrank_cache.evaluation.caches import BASELINES

__all__ = ["SimulatedKiviCache", "main", "register"]


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
            by_group = values[:, :, block].unflatten(3, (-1, self.GROUP))
            self.values[:, :, block] = _asymmetric(by_group, self.bits, axis=4).flatten(3)
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
        residual_length: Most recent tokens kept exactly.
        bits: 2 or 4.
    """

    def __init__(self, model: PreTrainedModel, residual_length: int, bits: int):
        super().__init__(layers=[_KiviLayer(bits, residual_length) for _ in range(model.config.num_hidden_layers)])

    def stored_bytes(self) -> int:
        """What KIVI would store: codes, float16 steps and offsets by 32, the window in the model's dtype."""
        total = 0.0
        for layer in self.layers:
            for states in (layer.keys, layer.values):
                if states is not None:
                    coded = layer.quantized * (layer.bits / 8 + 4 / layer.GROUP)
                    exact = (states.shape[2] - layer.quantized) * states.element_size()
                    total += states[:, :, 0].numel() * (coded + exact)
        return round(total)


def register() -> None:
    """Make ``kivi-4`` and ``kivi-2`` known as baselines in this process."""
    for bits in (4, 2):
        BASELINES[f"kivi-{bits}"] = partial(SimulatedKiviCache, bits=bits)


def main(
    words: Annotated[list[str], typer.Argument(help="A command of lowrank-cache, behind --: -- eval --cache kivi-2")],
) -> None:
    """Run a command of lowrank-cache that knows kivi-4 and kivi-2 too."""
    register()
    cli.app(words)


if __name__ == "__main__":
    typer.run(main)
