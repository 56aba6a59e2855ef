"""Look-ups through a real cache: key–value lists and needles in prose, generated from a seed.

Scored by the answer's next-token loss and by whether every answer token is the model's first choice.
The wording shares no form with ``calibration.recall``, so that calibrating on recall text is not
calibrating on the test. Each text is streamed once and asked several times, each time from a copy of the cache.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from lowrank_cache.evaluation.streaming import branch, feed, padded

__all__ = [
    "NAMES",
    "QUESTIONS",
    "RecallResult",
    "RecallText",
    "lookup_list",
    "lookup_question",
    "lookup_texts",
    "needle_texts",
    "score_recall",
]

QUESTIONS = 4  # asked of each text
_COLOURS = "red blue green black white yellow orange purple brown grey pink crimson".split()
_ANIMALS = "tiger eagle shark wolf bear fox owl whale horse moose lynx crane cobra bison".split()
NAMES = [f"{colour} {animal}" for colour in _COLOURS for animal in _ANIMALS]


@dataclass(frozen=True)
class RecallText:
    """What is read, ``[tokens]`` ids, and questions about it with their answers, ``[tokens]`` ids each."""

    context: Tensor
    questions: tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class RecallResult:
    """Per question, float64 ``[texts * questions]``: mean loss of the answer's tokens, and 1 for an exact answer."""

    loss: Tensor
    exact: Tensor


def lookup_list(draw: random.Random, entries: int) -> tuple[str, dict[str, str]]:
    """A text that lists ``entries`` similar facts, and the fact of each name."""
    codes = {name: _code(draw) for name in draw.sample(NAMES, entries)}
    facts = "".join(f"Agent {name} was given the secret code {code} this morning.\n" for name, code in codes.items())
    return f"Read the list of agents and codes.\n\n{facts}", codes


def lookup_question(name: str) -> str:
    """What asks for the fact of a name; the answer follows after a space."""
    return f"\nThe secret code that was given to agent {name} is"


def lookup_texts(tokenizer, count: int, entries: int = 22, seed: int = 0) -> list[RecallText]:
    """Each text lists ``entries`` similar facts; some of them are asked for."""
    texts = []
    for index in range(count):
        draw = random.Random(seed * 1_000_003 + index)
        context, codes = lookup_list(draw, entries)
        questions = ((lookup_question(name), codes[name]) for name in draw.sample(list(codes), QUESTIONS))
        texts.append(RecallText(_ids(tokenizer, context), _questions(tokenizer, questions)))
    return texts


def needle_texts(tokenizer, haystack: Tensor, count: int, tokens: int, seed: int = 0) -> list[RecallText]:
    """Each text hides facts in ``tokens`` tokens of prose in all (``haystack`` ids), and all are asked for."""
    texts = []
    for index in range(count):
        draw = random.Random(seed * 1_000_003 + index)
        codes = {name: _code(draw) for name in draw.sample(NAMES, QUESTIONS)}
        facts = [
            _ids(tokenizer, f"\nThe vault of the {name} opens with the number {code}.\n")
            for name, code in codes.items()
        ]
        questions = (
            (f"\nWhich number opens the vault of the {name}? The vault of the {name} opens with the number", code)
            for name, code in codes.items()
        )
        room = tokens - sum(map(len, facts))
        start = draw.randrange(0, max(1, len(haystack) - room))
        prose = haystack[start : start + room]
        places = sorted(draw.sample(range(len(prose) // 20, len(prose) * 19 // 20), QUESTIONS))
        parts = prose.tensor_split(places)
        context = torch.cat([parts[0], *(part for pair in zip(facts, parts[1:], strict=True) for part in pair)])
        texts.append(RecallText(context, _questions(tokenizer, questions)))
    return texts


def _code(draw: random.Random) -> str:
    return str(draw.randrange(10000, 100000))


def _ids(tokenizer, text: str) -> Tensor:
    return torch.tensor(tokenizer(text)["input_ids"])


def _questions(tokenizer, questions: Iterable[tuple[str, str]]) -> tuple[tuple[Tensor, Tensor], ...]:
    return tuple((_ids(tokenizer, question), _ids(tokenizer, f" {code}")) for question, code in questions)


@torch.no_grad()
def score_recall(
    model: PreTrainedModel,
    texts: list[RecallText],
    make_cache: Callable[[], Cache],
    *,
    chunk: int = 32,
    batch: int = 8,
    prompt: int = 0,
    progress: Callable[[int], object] | None = None,
) -> RecallResult:
    """Stream each context ``chunk`` tokens at a time through a fresh cache, then ask, and force each answer.

    The first forward brings ``prompt`` tokens, if that is not 0.

    Contexts of a batch are left-padded to one length. Only a question's and its answer's own tokens are seen
    exactly besides what the cache keeps exact.
    """
    losses: list[float] = []
    exact: list[bool] = []
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        cache = make_cache()
        mask = _stream_contexts(model, part, cache, chunk, prompt)
        asked = [_ask(model, questions, mask, branch(cache)) for questions in _transposed(part)]
        for scores in zip(*asked, strict=True):  # by text
            losses.extend(loss for loss, _ in scores)
            exact.extend(right for _, right in scores)
        if progress is not None:
            progress(len(part))
    return RecallResult(torch.tensor(losses, dtype=torch.float64), torch.tensor(exact, dtype=torch.float64))


def _transposed(texts: list[RecallText]) -> Iterable[tuple[tuple[Tensor, Tensor], ...]]:
    """The first question of every text, then the second of every text, and so on."""
    return zip(*(text.questions for text in texts), strict=True)


def _stream_contexts(model, texts: list[RecallText], cache: Cache, chunk: int, prompt: int) -> Tensor:
    """Fill ``cache``; returns the mask ``[batch, tokens]`` of what it holds."""
    ids, mask = (tensor.to(model.device) for tensor in padded([text.context for text in texts], "left"))
    for _ in feed(model, ids, mask, cache, chunk=chunk, first=prompt, logits_to_keep=1):
        pass
    return mask


def _ask(model, questions: tuple[tuple[Tensor, Tensor], ...], mask: Tensor, cache: Cache) -> list[tuple[float, bool]]:
    """Loss of the answer and whether it is exact, for one question a row."""
    # Shorter questions are padded on the right, where no earlier token sees it.
    ids, real = (tensor.to(mask.device) for tensor in padded([torch.cat(pair) for pair in questions], "right"))
    ((_, logits),) = feed(model, ids, torch.cat([mask, real], dim=1), cache, chunk=ids.shape[1])
    scores = []
    for row, (question, answer) in enumerate(questions):
        steps = logits[row, len(question) - 1 : len(question) + len(answer) - 1].double().cpu()
        loss = torch.nn.functional.cross_entropy(steps, answer)
        scores.append((loss.item(), bool((steps.argmax(-1) == answer).all())))
    return scores
