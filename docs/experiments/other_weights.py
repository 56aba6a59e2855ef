"""How far apart weights are by what they cache of one token: the figures behind a cache's judgement of projections.

    python docs/experiments/other_weights.py MODEL

The model is compared in float32 with itself in other formats, and with random weights.
"""

from typing import Annotated

import torch
import typer
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from lowrank_cache.probe import model_shape, probe_states

__all__ = ["differences", "main"]


def differences(one: PreTrainedModel, other: PreTrainedModel) -> torch.Tensor:
    """Relative differences of one token's keys and values, ``[layers * 2]``: see ``Projections.check_weights``."""
    widths = [width for layer in model_shape(one).layers for width in (layer.key.width, layer.value.width)]
    parts = zip(probe_states(one).split(widths), probe_states(other).split(widths), strict=True)
    return torch.stack([(second - first).norm() / first.norm() for first, second in parts])


def main(model: Annotated[str, typer.Argument(help="Folder or name on the hub.")]) -> None:
    """Print the least and the median difference for each kind of weights."""
    exact = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    kinds = {"bfloat16": {"dtype": torch.bfloat16}, "int8": {"load_in_8bit": True}}
    kinds |= {name: {"load_in_4bit": True, "bnb_4bit_quant_type": name} for name in ("nf4", "fp4")}
    for name, options in kinds.items():
        if "dtype" not in options:
            options = {"quantization_config": BitsAndBytesConfig(**options), "dtype": torch.float32}
        found = differences(exact, AutoModelForCausalLM.from_pretrained(model, **options))
        print(f"{name:9} {found.min():.2f}, {found.median():.2f}", flush=True)
    torch.manual_seed(0)
    found = differences(exact, AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)))
    print(f"{'random':9} {found.min():.2f}, {found.median():.2f}")


if __name__ == "__main__":
    typer.run(main)
