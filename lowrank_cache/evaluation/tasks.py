"""What is asked of a long context, generated from a seed and, for prose, the evaluation text: no network is needed.

Two kinds. Look-ups and needles have answers of one code each, which are forced: their loss is measured, and whether the
model would choose every token of them. Their wording shares no form with the calibration text, so that calibrating on
that is not calibrating on the test. ``TASKS`` are in the style of RULER (arXiv:2404.06654): answers are generated, and
the score is the share of the expected strings in them. Wording, counts and scoring are RULER's. Differs: the prose is
the evaluation text, the words are that text's own, examples in the prompt are shorter, and two keys of a multi-key
context are asked for.
"""

import random
import re
import string
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "QUESTIONS", "TASKS", "CodeText", "Haystack", "Prompter", "Question", "Sample", "answer_tokens", "lookup_dataset",
    "lookup_texts", "needle_texts", "sample_of", "score",
]  # fmt: skip

QUESTIONS = 4  # of a look-up list or a text with needles; choices of an lm-eval document
_COLOURS = "red blue green black white yellow orange purple brown grey pink crimson".split()
_ANIMALS = "tiger eagle shark wolf bear fox owl whale horse moose lynx crane cobra bison".split()
_NAMES = [f"{colour} {animal}" for colour in _COLOURS for animal in _ANIMALS]
_ASKED = "\nThe secret code that was given to agent {} is"
_VAULT = "The vault of the {0} opens with the number"
_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_HOPS = 4  # assignments after the first in a chain of variables
_COMMON = 10  # words to be found in a list
_LONG = 4096  # tokens from which on lists repeat their words more often


class CodeText(NamedTuple):
    """What is read, ``[tokens]`` ids, and questions about it with their answers, ``[tokens]`` ids each."""

    context: Tensor
    questions: tuple[tuple[Tensor, Tensor], ...]


def lookup_texts(tokenizer, count: int, entries: int = 22, seed: int = 0) -> list[CodeText]:
    """Each text lists ``entries`` similar facts; some of them are asked for."""
    lookups = _lookups(count, entries, seed)
    return [CodeText(_ids(tokenizer, text), _questions(tokenizer, _ASKED, codes)) for _, text, codes in lookups]


def needle_texts(tokenizer, haystack: Tensor, count: int, tokens: int, seed: int = 0) -> list[CodeText]:
    """Each text hides facts in ``tokens`` tokens of prose in all (``haystack`` ids), and all are asked for."""
    texts = []
    for draw in _draws(count, seed):
        codes = {name: _code(draw) for name in draw.sample(_NAMES, QUESTIONS)}
        facts = [_ids(tokenizer, f"\n{_VAULT.format(name)} {code}.\n") for name, code in codes.items()]
        room = tokens - sum(map(len, facts))
        start = draw.randrange(0, max(1, len(haystack) - room))
        prose = haystack[start : start + room]
        places = sorted(draw.sample(range(len(prose) // 20, len(prose) * 19 // 20), QUESTIONS))
        first, *parts = prose.tensor_split(places)
        context = torch.cat([first, *chain.from_iterable(zip(facts, parts, strict=True))])
        asked = "\nWhich number opens the vault of the {0}? " + _VAULT
        texts.append(CodeText(context, _questions(tokenizer, asked, codes)))
    return texts


def lookup_dataset(count: int = 64, entries: int = 22, seed: int = 0, **_) -> dict:
    """``count`` documents as lm-eval takes them, each with ``entries`` codes in its list, at least 4.

    Their ``text`` is a list and a question; ``choices`` are codes, ``answer`` is the right one's index. lm-eval passes
    all arguments of the model and of ``--metadata``.
    """
    from datasets import Dataset

    documents = []
    for draw, context, codes in _lookups(count, entries, seed):
        answer = draw.randrange(QUESTIONS)
        text = context + _ASKED.format(list(codes)[answer])
        documents.append({"text": text, "choices": list(codes.values()), "answer": answer})
    return {"test": Dataset.from_list(documents)}


def _draws(count: int, seed: int) -> list[random.Random]:
    return [random.Random(seed * 1_000_003 + index) for index in range(count)]


def _lookups(count: int, entries: int, seed: int) -> Iterator[tuple[random.Random, str, dict[str, str]]]:
    """Texts that list ``entries`` similar facts, and the codes of the names that are asked for."""
    for draw in _draws(count, seed):
        codes = {name: _code(draw) for name in draw.sample(_NAMES, entries)}
        facts = [f"Agent {name} was given the secret code {code} this morning.\n" for name, code in codes.items()]
        asked = draw.sample(list(codes), QUESTIONS)
        yield draw, f"Read the list of agents and codes.\n\n{''.join(facts)}", {name: codes[name] for name in asked}


def _code(draw: random.Random) -> str:
    return str(draw.randrange(10000, 100000))


def _ids(tokenizer, text: str) -> Tensor:
    return torch.tensor(tokenizer(text)["input_ids"])


def _questions(tokenizer, asked: str, codes: dict[str, str]) -> tuple[tuple[Tensor, Tensor], ...]:
    return tuple((_ids(tokenizer, asked.format(name)), _ids(tokenizer, f" {code}")) for name, code in codes.items())


class Question(NamedTuple):
    """What is asked, how the answer begins, and the strings that the rest of the answer must hold."""

    text: str
    prefix: str
    expected: tuple[str, ...]


class Sample(NamedTuple):
    """A context and questions that are asked about it independently of each other."""

    context: str
    questions: list[Question]


class Haystack:
    """A text as prose to hide needles in and as words for lists.

    Args:
        text: In a language that separates words and ends sentences in a full stop, or lines.

    Raises:
        ValueError: If it has fewer than 20 sentences or 100 words.
    """

    def __init__(self, text: str):
        self.sentences = [part.strip() for part in re.split(r"(?<=[.!?])\s+|\n+", text) if part.strip()]
        self.words = sorted(set(re.findall(r"\b[a-z]{4,9}\b", text)))
        if len(self.sentences) < 20 or len(self.words) < 100:
            raise ValueError(
                "the evaluation text must have at least 20 sentences and 100 different words of 4 to 9 letters, "
                f"got {len(self.sentences)} and {len(self.words)}; without tasks (samples of 0) any text will do"
            )


def _needles(
    keys: int, values: int, asked: int, draw: random.Random, haystack: Haystack, size: int, length: int
) -> Sample:
    """``keys`` keys with ``values`` numbers each in ``size`` sentences, and questions for ``asked`` keys at a time."""
    names = [name.replace(" ", "-") for name in draw.sample(_NAMES, keys)]
    numbers = {name: [str(draw.randrange(10**6, 10**7)) for _ in range(values)] for name in names}
    needles = [f"One of the special magic numbers for {name} is: {one}." for name in names for one in numbers[name]]
    places = [draw.random() for _ in needles]
    count = len(haystack.sentences)
    first = draw.randrange(count)
    prose = [haystack.sentences[index % count] for index in range(first, first + size)]
    context = (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you "
        f"about the numbers afterwards.\n{' '.join(_inserted(prose, needles, places))}"
    )
    draw.shuffle(names)
    questions = []
    for group in [names[:asked]] if asked == keys else [[name] for name in names[:2]]:
        expected = tuple(number for name in group for number in numbers[name])
        query = group[0] if len(group) == 1 else f"{', '.join(group[:-1])}, and {group[-1]}"
        start, noun = ("is the", "number") if len(expected) == 1 else ("are all the", "numbers")
        what = f"special magic {noun} for {query} mentioned in the provided text"
        questions.append(Question(f"\nWhat {start} {what}?", f" The {what} {start.split()[0]}", expected))
    return Sample(context, questions)


def _inserted(sentences: list[str], needles: list[str], places: list[float]) -> list[str]:
    """``needles`` at ``places``, fractions of the whole, between ``sentences``."""
    whole = len(sentences)
    for place, needle in sorted(zip(places, needles, strict=True), key=itemgetter(0), reverse=True):
        sentences.insert(round(place * whole), needle)
    return sentences


def _tracking(draw: random.Random, haystack: Haystack, size: int, length: int) -> Sample:
    """A chain of assignments in ``size`` lines of noise, in order, and the question for all its variables."""
    parts = []
    for lines in (4, size):
        names: dict[str, None] = {}
        while len(names) <= _HOPS:
            names["".join(draw.choices(string.ascii_uppercase, k=5))] = None
        value = _code(draw)
        sources = [value, *(f"VAR {name}" for name in names)]
        chained = [f"VAR {name} = {source}" for name, source in zip(names, sources, strict=False)]
        text = "\n".join(_inserted([_NOISE] * lines, chained, sorted(draw.random() for _ in chained)))
        context = f"Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{text}"
        question = f"\nQuestion: Find all variables that are assigned the value {value} in the text above."
        prefix = (
            " Answer: According to the chain(s) of variable assignment in the text above, "
            f"{len(names)} variables are assigned the value {value}, they are:"
        )
        parts.append(Sample(context, [Question(question, prefix, tuple(names))]))
    return _after_example(parts, " ".join)


def _common(draw: random.Random, haystack: Haystack, size: int, length: int) -> Sample:
    """A list in which ten words come more often than ``size`` others, and the question for these ten."""
    order = draw.sample(haystack.words, len(haystack.words))  # the same whatever the size
    while len(order) < _COMMON + size:  # more than the text has: pairs of its words
        order.append("-".join(draw.sample(haystack.words, 2)))
    often, seldom = (30, 3) if length >= _LONG else (6, 1)
    shown = order[: len(haystack.words)][-2 * _COMMON :]
    parts = []
    for words, many, few in ((shown, 3, 1), (order[: _COMMON + size], often, seldom)):
        listed = words[:_COMMON] * many + words[_COMMON:] * few
        draw.shuffle(listed)
        context = (
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
            f"that appear most often.\n{_numbered(listed)}"
        )
        question = f"\nQuestion: What are the {_COMMON} most common words in the above list?"
        prefix = f" Answer: The top {_COMMON} words that appear most often in the list are:"
        parts.append(Sample(context, [Question(question, prefix, tuple(words[:_COMMON]))]))
    return _after_example(parts, _numbered)


def _after_example(parts: list[Sample], write: Callable[[Sequence[str]], str]) -> Sample:
    example, asked = parts
    (shown,) = example.questions
    solved = f"{example.context}{shown.text}{shown.prefix} {write(shown.expected)}"
    return Sample(f"{solved}\n\n{asked.context}", asked.questions)


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{index}. {word}" for index, word in enumerate(words, 1))


TASKS: dict[str, Callable[..., Sample]] = {
    "single": partial(_needles, 1, 1, 1),
    "multi-key": partial(_needles, 4, 1, 1),
    "multi-value": partial(_needles, 1, 4, 1),
    "multi-query": partial(_needles, 4, 1, 4),
    "tracking": _tracking,
    "common": _common,
}
Count = Callable[[str], int]


def sample_of(
    task: str, count: Count, haystack: Haystack, length: int, index: int, seed: int = 0, reserved: int = 0
) -> Sample:
    """The longest sample whose context, one question and answer take at most ``length`` tokens.

    Args:
        count: Gives the tokens of a text.
        index, seed: Equal ones give equal samples.
        reserved: Of the tokens, those to leave for what a chat template or the tokenizer adds.

    Raises:
        ValueError: If not even the shortest context fits.
    """

    def build(size: int) -> Sample:
        draw = random.Random(f"{seed} {task} {length} {index}")
        return TASKS[task](draw, haystack, size, length)

    def too_long(size: int) -> bool:
        sample = build(size)
        asked = max(count(part.text + part.prefix) + answer_tokens(count, part) for part in sample.questions)
        return count(sample.context) + asked > length - reserved

    low = _HOPS + 1
    if too_long(low):
        raise ValueError(f"lengths must be so large that the task {task!r} fits, got {length}")
    while not too_long(2 * low):
        low *= 2
    return build(bisect_left(range(2 * low), True, low, key=too_long) - 1)


def answer_tokens(count: Count, question: Question) -> int:
    """Tokens that an answer may take: half as many again as the expected strings, and 8."""
    return 8 + count(_numbered(question.expected)) * 3 // 2


def score(expected: tuple[str, ...], answer: str) -> float:
    """Share of the expected strings that ``answer`` holds, whatever their case: RULER's score."""
    return sum(part.lower() in answer.lower() for part in expected) / len(expected)


class Prompter:
    """Token ids of contexts and of questions about them, as plain text or as one message of a chat.

    Args:
        tokenizer: Of transformers.
        chat: Put context and question into one user message by the tokenizer's chat template.

    Raises:
        ValueError: If ``chat`` is asked of a tokenizer without a template, or one that alters messages.
    """

    def __init__(self, tokenizer, chat: bool = False):
        self.tokenizer, self._chat, self._before, self._after = tokenizer, chat, "", ""
        if chat:
            if not getattr(tokenizer, "chat_template", None):
                raise ValueError("chat needs a tokenizer with a chat template, and this one has none")
            message = [{"role": "user", "content": "<<question>>"}]
            rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            self._before, found, self._after = rendered.partition("<<question>>")
            if not found:
                raise ValueError("chat needs a chat template that takes a message as it is")

    def count(self, text: str) -> int:
        """Tokens of a text, special ones apart."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def overhead(self) -> int:
        """Tokens that a context and a question take beside their texts."""
        return len(self.context("")) + len(self.question("", ""))

    def context(self, text: str) -> Tensor:
        """``[tokens]`` ids of what is read first; a chat template has written the special ones itself."""
        return self._ids(self._before + text, special=not self._chat)

    def question(self, text: str, prefix: str) -> Tensor:
        """``[tokens]`` ids of a question about what was read, and of how its answer begins."""
        return self._ids(text + self._after + prefix)

    def _ids(self, text: str, special: bool = False) -> Tensor:
        return torch.tensor(self.tokenizer(text, add_special_tokens=special)["input_ids"])
