"""Synthetic long-context tasks in the style of RULER, generated from a seed and a text, without a network.

Needles in prose (one; one of four keys; four values of one key; four keys at once), a chain of variable assignments
in repeated sentences, and the ten most common words of a list. A sample is one context and the questions about it.

Source: RULER (arXiv:2404.06654), whose wording, counts and scoring are taken over. Differs: the prose is the evaluation
text, the words are that text's own, examples in the prompt are shorter, and two keys of a multi-key context are asked
for.
"""

import random
import re
import string
from collections.abc import Callable
from dataclasses import dataclass

from lowrank_cache.evaluation.recall import NAMES

__all__ = ["TASKS", "Haystack", "RulerQuestion", "RulerSample", "answer_tokens", "recall_of", "ruler_sample"]

_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_HOPS = 4  # assignments after the first in a chain of variables
_COMMON = 10  # words to be found in a list
_LONG = 4096  # tokens from which on lists repeat their words more often


@dataclass(frozen=True)
class RulerQuestion:
    """What is asked, how the answer begins, and the strings that the rest of the answer must hold."""

    text: str
    prefix: str
    expected: tuple[str, ...]


@dataclass(frozen=True)
class RulerSample:
    """A context and questions that are asked about it independently of each other."""

    task: str
    length: int
    index: int
    context: str
    questions: tuple[RulerQuestion, ...]


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

    def prose(self, draw: random.Random, sentences: int) -> list[str]:
        """``sentences`` consecutive ones from a random place, beginning again at the text's end."""
        start = draw.randrange(len(self.sentences))
        return [self.sentences[(start + index) % len(self.sentences)] for index in range(sentences)]


Text = tuple[str, tuple[RulerQuestion, ...]]


def _needles(
    keys: int, values: int, asked: int, draw: random.Random, haystack: Haystack, size: int, length: int
) -> Text:
    """``keys`` keys with ``values`` numbers each in ``size`` sentences, and questions for ``asked`` keys at a time."""
    names = [name.replace(" ", "-") for name in draw.sample(NAMES, keys)]
    numbers = {name: tuple(str(draw.randrange(10**6, 10**7)) for _ in range(values)) for name in names}
    needles = [
        f"One of the special magic numbers for {name} is: {number}." for name in names for number in numbers[name]
    ]
    places = [draw.random() for _ in needles]
    text = " ".join(_inserted(haystack.prose(draw, size), needles, places))
    context = (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you "
        f"about the numbers afterwards.\n{text}"
    )
    draw.shuffle(names)
    groups = [names[:asked]] if asked > 1 or keys == 1 else [[name] for name in names[:2]]
    questions = []
    for group in groups:
        expected = tuple(number for name in group for number in numbers[name])
        query = group[0] if len(group) == 1 else f"{', '.join(group[:-1])}, and {group[-1]}"
        if len(expected) == 1:
            start, what = "is the", f"special magic number for {query} mentioned in the provided text"
        else:
            start, what = "are all the", f"special magic numbers for {query} mentioned in the provided text"
        prefix = f" The {what} {start.split()[0]}"
        questions.append(RulerQuestion(f"\nWhat {start} {what}?", prefix, expected))
    return context, tuple(questions)


def _inserted(sentences: list[str], needles: list[str], places: list[float]) -> list[str]:
    """``needles`` at ``places``, fractions of the whole, between ``sentences``."""
    whole = len(sentences)
    for place, needle in sorted(zip(places, needles, strict=True), key=lambda pair: pair[0], reverse=True):
        sentences.insert(round(place * whole), needle)
    return sentences


def _tracking(draw: random.Random, haystack: Haystack, size: int, length: int) -> Text:
    example, shown = _chain(draw, 4)
    context, asked = _chain(draw, size)
    return (
        f"{example}{shown.text}{shown.prefix} {' '.join(shown.expected)}\n\n{context}",
        (asked,),
    )


def _chain(draw: random.Random, size: int) -> tuple[str, RulerQuestion]:
    """A chain of assignments in ``size`` lines of noise, in order, and the question for all its variables."""
    names: list[str] = []
    while len(names) <= _HOPS:
        name = "".join(draw.choices(string.ascii_uppercase, k=5))
        if name not in names:
            names.append(name)
    value = str(draw.randrange(10000, 100000))
    chain = [
        f"VAR {names[0]} = {value}",
        *(f"VAR {new} = VAR {old}" for old, new in zip(names, names[1:], strict=False)),
    ]
    places = sorted(draw.random() for _ in chain)
    lines = "\n".join(_inserted([_NOISE] * size, chain, places))
    context = f"Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{lines}"
    question = f"\nQuestion: Find all variables that are assigned the value {value} in the text above."
    prefix = (
        " Answer: According to the chain(s) of variable assignment in the text above, "
        f"{len(names)} variables are assigned the value {value}, they are:"
    )
    return context, RulerQuestion(question, prefix, tuple(names))


def _common(draw: random.Random, haystack: Haystack, size: int, length: int) -> Text:
    often, seldom = (30, 3) if length >= _LONG else (6, 1)
    order = draw.sample(haystack.words, len(haystack.words))  # the same whatever the size
    while len(order) < _COMMON + size:  # more than the text has: pairs of its words
        order.append("-".join(draw.sample(haystack.words, 2)))
    example, shown = _word_list(draw, order[: len(haystack.words)][-2 * _COMMON :], 3, 1)
    context, asked = _word_list(draw, order[: _COMMON + size], often, seldom)
    return f"{example}{shown.text}{shown.prefix} {_numbered(list(shown.expected))}\n\n{context}", (asked,)


def _word_list(draw: random.Random, words: list[str], often: int, seldom: int) -> tuple[str, RulerQuestion]:
    listed = words[:_COMMON] * often + words[_COMMON:] * seldom
    draw.shuffle(listed)
    context = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        f"appear most often.\n{_numbered(listed)}"
    )
    question = f"\nQuestion: What are the {_COMMON} most common words in the above list?"
    prefix = f" Answer: The top {_COMMON} words that appear most often in the list are:"
    return context, RulerQuestion(question, prefix, tuple(words[:_COMMON]))


def _numbered(words: list[str]) -> str:
    return " ".join(f"{index}. {word}" for index, word in enumerate(words, 1))


def _of_needles(keys: int, values: int, asked: int) -> Callable[..., Text]:
    return lambda *arguments: _needles(keys, values, asked, *arguments)


TASKS: dict[str, Callable[..., Text]] = {
    "single": _of_needles(1, 1, 1),
    "multi-key": _of_needles(4, 1, 1),
    "multi-value": _of_needles(1, 4, 1),
    "multi-query": _of_needles(4, 1, 4),
    "tracking": _tracking,
    "common": _common,
}


def ruler_sample(
    task: str,
    count: Callable[[str], int],
    haystack: Haystack,
    length: int,
    index: int,
    seed: int = 0,
    reserved: int = 0,
) -> RulerSample:
    """The longest sample whose context, one question and answer take at most ``length`` tokens.

    Args:
        task: One of ``TASKS``.
        count: Tokens of a text.
        index, seed: Equal ones give equal samples.
        reserved: Of the tokens, those to leave for what a chat template or the tokenizer adds.

    Raises:
        ValueError: If not even the shortest context fits.
    """

    def build(size: int) -> RulerSample:
        draw = random.Random(f"{seed} {task} {length} {index}")
        return RulerSample(task, length, index, *TASKS[task](draw, haystack, size, length))

    def fits(size: int) -> bool:
        sample = build(size)
        asked = max(count(part.text + part.prefix) + answer_tokens(count, part) for part in sample.questions)
        return count(sample.context) + asked <= length - reserved

    low, high = _HOPS + 1, 2 * (_HOPS + 1)
    if not fits(low):
        raise ValueError(f"lengths must be so large that the task {task!r} fits, got {length}")
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return build(low)


def answer_tokens(count: Callable[[str], int], question: RulerQuestion) -> int:
    """Tokens that an answer may take: half as many again as the expected strings, and 8."""
    return 8 + count(_numbered(list(question.expected))) * 3 // 2


def recall_of(expected: tuple[str, ...], answer: str) -> float:
    """Share of the expected strings that ``answer`` holds, whatever their case: RULER's score."""
    return sum(part.lower() in answer.lower() for part in expected) / len(expected)
