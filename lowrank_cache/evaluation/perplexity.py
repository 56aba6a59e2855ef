"""Perplexity of text streamed through a real cache, chunk by chunk, so that every read is lossy."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from lowrank_cache.cache_argument import cache_argument
from lowrank_cache.evaluation.streaming import chunk_bounds

__all__ = ["stream", "windows_of"]


def windows_of(token_ids: Tensor, tokens: int, count: int | None = None) -> Tensor:
    """Cut ``[n]`` token ids into non-overlapping windows, ``count`` of them evenly spaced (None: all)."""
    available = len(token_ids) // tokens
    if available == 0:
        raise ValueError(f"text must hold at least {tokens} tokens, got {len(token_ids)}")
    windows = token_ids[: available * tokens].view(available, tokens)
    if count is None or count >= available:
        return windows
    return windows[torch.linspace(0, available - 1, count).round().long()]


@torch.no_grad()
def stream(
    model: PreTrainedModel,
    windows: Tensor,
    make_cache: Callable[[], Cache],
    *,
    chunk: int = 32,
    batch: int = 8,
    prompt: int = 0,
    progress: Callable[[int], object] | None = None,
) -> Tensor:
    """Feed each window to the model ``chunk`` tokens at a time through a fresh cache.

    Args:
        model: In eval mode.
        windows: ``[windows, tokens]`` token ids.
        make_cache: Called once per batch of windows.
        chunk: Tokens per forward; a forward sees its own tokens exactly and all others as cached.
        batch: Windows per forward.
        prompt: Tokens of the first forward, 0 for ``chunk``.
        progress: Called with the number of tokens of each finished forward.

    Returns:
        ``[windows, tokens - 1]`` float64 on CPU, next-token losses in nats.
    """
    losses: list[Tensor] = []
    for rows in windows.split(batch):
        cache = make_cache()
        rows = rows.to(model.device)
        batch_losses = []
        for start, stop in chunk_bounds(rows.shape[1], chunk, prompt):
            logits = model(input_ids=rows[:, start:stop], **cache_argument(model, cache), use_cache=True).logits
            targets = rows[:, start + 1 : stop + 1]  # the last token of a window has none
            predictions = logits[:, : targets.shape[1]].flatten(0, 1).float()
            loss = torch.nn.functional.cross_entropy(predictions, targets.flatten(), reduction="none")
            batch_losses.append(loss.view(targets.shape).double().cpu())
            if progress is not None:
                progress((stop - start) * rows.shape[0])
        losses.append(torch.cat(batch_losses, 1))
    return torch.cat(losses)
