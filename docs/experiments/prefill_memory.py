"""What a prefill keeps alive: dense keys and values, found by looking for them, and all that torch allocates."""

import gc
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from lowrank_cache import LowRankCache, Projections
from lowrank_cache.evaluation.bench import watch_allocated
from lowrank_cache.evaluation.inputs import Dtype, load_model
from lowrank_cache.probe import cache_argument, model_shape
from lowrank_cache.shapes import SIDES

__all__ = ["PrefillPeak", "main", "prefill_peak"]


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


def main(
    projections: Annotated[str, typer.Argument(help="Folder or hub repository of projections.")],
    model: Annotated[str | None, typer.Option(help="Name or folder of a model; SmolLM2-135M by default.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 4096,
    ratio: Annotated[float, typer.Option(help="Target compression ratio per token in latents.")] = 8.0,
    dtype: Dtype = "bfloat16",
) -> None:
    """Show what a prefill keeps alive in memory with the full cache and with a compressed one, on a CPU."""
    loaded, _, name = load_model(model, typer.echo, dtype)
    bases = Projections.from_pretrained(projections, compression_ratio=ratio)
    prompt = torch.randint(loaded.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    typer.echo(f"{name} in {dtype}, a prompt of {tokens} tokens, {ratio:g}x")
    makers = {
        "full": lambda: DynamicCache(config=loaded.config),
        "low-rank": lambda: LowRankCache(loaded, bases, compression_ratio=ratio),
    }
    for kind, make_cache in makers.items():
        peak = prefill_peak(loaded, make_cache(), prompt)
        typer.echo(
            f"{kind} cache: dense keys and values alive at most {peak.dense / 1e6:.1f} MB, allocated at most "
            f"{peak.allocated / 1e6:.1f} MB, left {peak.left / 1e6:.1f} MB"
        )


if __name__ == "__main__":
    typer.run(main)
