"""A model with large constant key biases, as some families with QKV bias have after training.

Their keys carry a constant many times larger than what varies, mostly in the pairs that the rotary
embedding turns slowest. A coder that spends its scale on the constant loses there; this makes one out
of a model without bias and saves it, so that ``lowrank-cache eval FOLDER`` can measure the loss on a real model.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lowrank_cache.evaluation.inputs import load_model

__all__ = ["main", "with_key_bias"]

SLOWEST_PAIRS = 4


@torch.no_grad()
def with_key_bias(model: PreTrainedModel, size: float) -> LlamaForCausalLM:
    """A copy of a Llama-type ``model`` whose keys carry ``size`` in their slowest rotary pairs.

    The bias alternates in sign from head to head. Scores change by a term that hardly depends on the key's
    position, which softmax ignores, so the copy still models text.

    Raises:
        ValueError: If ``model`` is not of Llama type, or has biases already.
    """
    config = model.config
    if config.model_type != "llama" or config.attention_bias:
        raise ValueError(f"model must be a Llama without attention biases, got {config.model_type!r}")
    biased = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "attention_bias": True})).eval()
    missing, unexpected = biased.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and all(name.endswith(".bias") for name in missing)
    half = config.head_dim // 2
    for layer in biased.model.layers:
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            projection.bias.zero_()
        heads = attention.k_proj.bias.view(-1, config.head_dim)
        signs = torch.tensor([1.0, -1.0]).repeat(len(heads))[: len(heads), None]
        heads[:, half - SLOWEST_PAIRS : half] = signs * size
    return biased


def main(
    out: Annotated[Path, typer.Option(help="Folder for the model and its tokenizer.")],
    key_bias: Annotated[float, typer.Option(help="The constant bias on the keys.")],
    model: Annotated[str | None, typer.Argument(help="Name or folder of a model; SmolLM2-135M by default.")] = None,
) -> None:
    """Save MODEL with a constant bias on its keys."""
    loaded, tokenizer, name = load_model(model, typer.echo)
    with_key_bias(loaded, key_bias).save_pretrained(out)
    tokenizer.save_pretrained(out)
    typer.echo(f"{name} with a key bias of {key_bias:g} is in {out}; measure it with 'lowrank-cache eval {out}'.")


if __name__ == "__main__":
    typer.run(main)
