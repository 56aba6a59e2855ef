"""Look-ups through a real cache: key–value lists and needles in prose, generated from a seed.

Scored by the answer's next-token loss and by whether every answer token is the model's first choice.
The wording shares no form with ``calibration.recall``, so that calibrating on recall text is not
calibrating on the test.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

__all__ = ["RecallResult", "RecallSample", "lookup_samples", "needle_samples", "score_recall"]

_COLOURS = "red blue green black white yellow orange purple brown grey pink crimson".split()
_ANIMALS = "tiger eagle shark wolf bear fox owl whale horse moose lynx crane cobra bison".split()


@dataclass(frozen=True)
class RecallSample:
    """A prompt that ends where the answer must begin: ``[tokens]`` and ``[answer_tokens]`` ids."""

    prompt: Tensor
    answer: Tensor


@dataclass(frozen=True)
class RecallResult:
    """Per sample, float64 ``[samples]``: mean loss of the answer's tokens, and 1 for an exact answer."""

    loss: Tensor
    exact: Tensor


def lookup_samples(tokenizer, count: int, entries: int = 22, seed: int = 0) -> list[RecallSample]:
    """Each sample lists ``entries`` similar facts and asks for one of them."""
    samples = []
    for index in range(count):
        draw = random.Random(seed * 1_000_003 + index)
        names = draw.sample([f"{colour} {animal}" for colour in _COLOURS for animal in _ANIMALS], entries)
        codes = {name: str(draw.randrange(10000, 100000)) for name in names}
        facts = "".join(
            f"Agent {name} was given the secret code {code} this morning.\n" for name, code in codes.items()
        )
        asked = draw.choice(names)
        prompt = f"Read the list of agents and codes.\n\n{facts}\nThe secret code that was given to agent {asked} is"
        samples.append(_sample(tokenizer, prompt, f" {codes[asked]}"))
    return samples


def needle_samples(tokenizer, haystack: Tensor, count: int, tokens: int, seed: int = 0) -> list[RecallSample]:
    """Each sample hides one fact in ``tokens`` tokens of prose (``haystack`` ids) and asks for it."""
    samples = []
    for index in range(count):
        draw = random.Random(seed * 1_000_003 + index)
        name, code = f"{draw.choice(_COLOURS)} {draw.choice(_ANIMALS)}", str(draw.randrange(10000, 100000))
        fact = torch.tensor(tokenizer(f"\nThe vault of the {name} opens with the number {code}.\n")["input_ids"])
        question = f"\nWhich number opens the vault of the {name}? The vault of the {name} opens with the number"
        asked = torch.tensor(tokenizer(question)["input_ids"])
        room = tokens - len(fact) - len(asked)
        start = draw.randrange(0, max(1, len(haystack) - room))
        prose = haystack[start : start + room]
        at = draw.randrange(len(prose) // 10, len(prose) * 9 // 10)
        prompt = torch.cat([prose[:at], fact, prose[at:], asked])
        samples.append(RecallSample(prompt, torch.tensor(tokenizer(f" {code}")["input_ids"])))
    return samples


def _sample(tokenizer, prompt: str, answer: str) -> RecallSample:
    return RecallSample(torch.tensor(tokenizer(prompt)["input_ids"]), torch.tensor(tokenizer(answer)["input_ids"]))


@torch.no_grad()
def score_recall(
    model: PreTrainedModel,
    samples: list[RecallSample],
    make_cache: Callable[[], Cache],
    *,
    chunk: int = 32,
    batch: int = 8,
    progress: Callable[[int], object] | None = None,
) -> RecallResult:
    """Stream each prompt ``chunk`` tokens at a time through a fresh cache, then force the answer.

    Samples of a batch are left-padded to one length. Only the last prompt token and the answer's own
    tokens are seen exactly besides what the cache keeps exact.
    """
    losses, exact = [], []
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        length = max(len(sample.prompt) for sample in part)
        answers = max(len(sample.answer) for sample in part)
        ids = torch.zeros(len(part), length + answers, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, sample in enumerate(part):
            begin = length - len(sample.prompt)
            ids[row, begin:length] = sample.prompt
            ids[row, length : length + len(sample.answer)] = sample.answer
            mask[row, begin : length + answers] = 1
        logits = _stream_answer(model, ids.to(model.device), mask.to(model.device), length, make_cache(), chunk)
        for row, sample in enumerate(part):
            steps = logits[row, : len(sample.answer)].double().cpu()
            losses.append(torch.nn.functional.cross_entropy(steps, sample.answer))
            exact.append((steps.argmax(-1) == sample.answer).all().double())
        if progress is not None:
            progress(len(part))
    return RecallResult(torch.stack(losses), torch.stack(exact))


def _stream_answer(model, ids: Tensor, mask: Tensor, length: int, cache: Cache, chunk: int) -> Tensor:
    """Logits that predict the answer, ``[batch, answer_tokens, vocabulary]``."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    edges = [*range(0, length - 1, chunk), length - 1, ids.shape[1]]
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        logits = model(
            input_ids=ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions[:, start:stop],
            past_key_values=cache,
            use_cache=True,
        ).logits
    return logits[:, :-1]
