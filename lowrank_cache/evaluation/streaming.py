"""Tokens through a cache, chunk by chunk, so that every later read is of what the cache stores.

This is the way to measure quality: a single long prefill attends exactly to its own tokens and shows no loss,
whatever the cache does.
"""

import copy
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from lowrank_cache import LowRankCache
from lowrank_cache.probe import cache_argument


def windows_of(token_ids: Tensor, tokens: int, count: int | None = None, opening: Sequence[int] = ()) -> Tensor:
    """Cut ``[n]`` token ids into non-overlapping windows, ``count`` of them evenly spaced (None: all).

    Each begins with ``opening``, see ``calibration.text.opening_of``, which counts in its ``tokens``.
    """
    whole, tokens = tokens, tokens - len(opening)
    available = len(token_ids) // tokens
    if available == 0:
        raise ValueError(f"text must hold at least {whole} tokens, got {len(token_ids)}")
    windows = token_ids[: available * tokens].view(available, tokens)
    if count is not None and count < available:
        windows = windows[torch.linspace(0, available - 1, count, dtype=torch.float32, device="cpu").round().long()]
    return torch.cat([windows.new_tensor([opening] * len(windows)).view(len(windows), -1), windows], dim=1)


def _padded(sequences: list[Tensor], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids ``[tokens]`` of sequences, padded on one side, and a mask, 0 for padding: int64 ``[batch, tokens]``."""
    masks = [torch.ones_like(sequence) for sequence in sequences]
    ids, mask = (pad_sequence(part, True, padding_side=side).to(device) for part in (sequences, masks))
    return ids, mask


def feed(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: Cache, *, chunk: int, first: int = 0, **arguments
) -> Iterator[tuple[int, Tensor]]:
    """Feed ``ids`` to the model through ``cache``, ``chunk`` tokens a forward, which sees only its own tokens exactly.

    Args:
        ids: ``[batch, tokens]`` on the model's device.
        mask: ``[batch, cached + tokens]``, 0 for padding, on the same device.
        first: Tokens of the first forward, 0 for ``chunk``.
        arguments: Of every forward, e.g. ``logits_to_keep=1``.

    Yields:
        Of each forward: index of its first token in ``ids``, and logits.
    """
    cached, tokens = mask.shape[1] - ids.shape[1], ids.shape[1]
    arguments |= {**cache_argument(model, cache), "use_cache": True}
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, cached:]
    for start, stop in pairwise(sorted({0, *range(first or chunk, tokens, chunk), tokens})):
        given = {"input_ids": ids[:, start:stop], "position_ids": positions[:, start:stop]}
        yield start, model(**given, attention_mask=mask[:, : cached + stop], **arguments).logits


def _branch(cache: Cache) -> Cache:
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


def _losses(
    model: PreTrainedModel, ids: Tensor, targets: Tensor, mask: Tensor, cache: Cache, *, chunk: int, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Losses of ``targets`` ``[batch, n]``, which follow the first n of ``ids``, that are fed as in ``feed``.

    Float64 in nats, and whether each target is the model's first choice; both ``[batch, n]`` on CPU.
    """
    losses, chosen = [], []
    for start, logits in feed(model, ids, mask, cache, chunk=chunk, first=first):
        wanted = targets[:, start : start + logits.shape[1]]
        logits = logits[:, : wanted.shape[1]]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), reduction="none")
        losses.append(loss.view(wanted.shape).double().cpu())
        chosen.append((logits.argmax(-1) == wanted).cpu())
    return torch.cat(losses, 1), torch.cat(chosen, 1)


@torch.no_grad()
def stream(
    model: PreTrainedModel, windows: Tensor, make_cache: Callable[[], Cache], *, chunk: int = 128, batch: int = 4,
    prompt: int = 0,
) -> Tensor:  # fmt: skip
    """Next-token losses of windows of text, each streamed through a fresh cache.

    Args:
        windows: ``[windows, tokens]`` token ids, ``batch`` of them per forward.
        chunk, prompt: As ``chunk`` and ``first`` in ``feed``.

    Returns:
        ``[windows, tokens - 1]`` float64 on CPU, in nats.
    """
    parts = windows.to(model.device).split(batch)
    options = {"chunk": chunk, "first": prompt}
    losses = [_losses(model, ids, ids[:, 1:], torch.ones_like(ids), make_cache(), **options)[0] for ids in parts]
    return torch.cat(losses)


@torch.no_grad()
def fill(
    model: PreTrainedModel, cache: Cache, ids: Tensor, mask: Tensor | None = None, *, chunk: int, first: int = 0
) -> None:
    """Stream ``[tokens]`` ids, or ``[batch, tokens]`` with a mask, into an empty cache; all as in ``feed``."""
    ids = torch.atleast_2d(ids).to(model.device)
    mask = torch.ones_like(ids) if mask is None else mask
    for _ in feed(model, ids, mask, cache, chunk=chunk, first=first, logits_to_keep=1):
        pass


@torch.no_grad()
def greedy_answer(model: PreTrainedModel, cache: Cache, question: Tensor, limit: int, stop: set[int]) -> list[int]:
    """Token ids of the answer to ``[tokens]`` ids, at most ``limit``; ``cache`` stays as it is.

    The question is one forward; from then on every token is read from what a copy of the cache stores.
    """
    cache = _branch(cache)
    ids, answer, argument = question.to(model.device)[None], [], cache_argument(model, cache)
    for _ in range(limit):
        logits = model(input_ids=ids, **argument, use_cache=True, logits_to_keep=1).logits
        token = int(logits[0, -1].argmax())
        if token in stop:
            break
        answer.append(token)
        ids = torch.tensor([[token]], device=ids.device)
    return answer


@torch.no_grad()
def force_answers(
    model: PreTrainedModel, contexts: list[Tensor], questions: list[tuple[tuple[Tensor, Tensor], ...]],
    make_cache: Callable[[], Cache], *, chunk: int = 128, prompt: int = 0, question_chunk: int | None = None,
) -> list[list[tuple[float, bool]]]:  # fmt: skip
    """Stream contexts as one batch, padded on the left, through a fresh cache, ask, and force each answer.

    Args:
        contexts: ``[tokens]`` ids each.
        questions: Of each context, pairs of a question's and its answer's ``[tokens]`` ids. Each is put to a copy of
            the cache.
        chunk, prompt: As ``chunk`` and ``first`` in ``feed``.
        question_chunk: As ``chunk``, of a question with its answer; None for one forward, which sees them exactly.

    Returns:
        By context and question: mean loss of the answer's tokens in nats, and whether each of them is the model's
        first choice.
    """
    cache = make_cache()
    ids, mask = _padded(contexts, "left", model.device)
    fill(model, cache, ids, mask, chunk=chunk, first=prompt)
    scores: list[list[tuple[float, bool]]] = [[] for _ in contexts]
    for turn in range(max(map(len, questions))):  # the first question of every context, then the second, and so on
        # A context without one left repeats its last, so that the batch stays as it is. Shorter ones are padded on the
        # right, where no earlier token sees it.
        pairs = [asked[min(turn, len(asked) - 1)] for asked in questions]
        ids, real = _padded([torch.cat(pair) for pair in pairs], "right", model.device)
        seen = torch.cat([mask, real[:, :-1]], dim=1)
        step = question_chunk or ids.shape[1]
        losses, chosen = _losses(model, ids[:, :-1], ids[:, 1:], seen, _branch(cache), chunk=step)
        for row, (question, answer) in enumerate(pairs):
            if turn < len(questions[row]):
                part = slice(len(question) - 1, len(question) + len(answer) - 1)
                scores[row].append((losses[row, part].mean().item(), bool(chosen[row, part].all())))
    return scores


def processor() -> str:
    """The processor's name and the vector instructions that torch uses on it: what a time holds for."""
    listed = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)", listed.read_text(encoding="utf-8") if listed.exists() else "", re.M)
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def now(device: torch.device) -> float:
    """Seconds on a clock, once ``device`` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
