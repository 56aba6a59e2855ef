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
import tomllib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_cache.calibration.text import ids_within, opening_of

QUESTIONS = 4  # of a look-up list or a text with needles; choices of an lm-eval document
_WORDING = tomllib.loads(Path(__file__).with_name("templates").joinpath("tasks.toml").read_text(encoding="utf-8"))
_NAMES = [f"{colour} {animal}" for colour in _WORDING["colours"].split() for animal in _WORDING["animals"].split()]
_HOPS = 4  # assignments after the first in a chain of variables
_COMMON = 10  # words to be found in a list
_LONG = 4096  # tokens from which on lists repeat their words more often


# What is read, ``[tokens]`` ids, and questions about it with their answers, ``[tokens]`` ids each.
CodeText = tuple[Tensor, tuple[tuple[Tensor, Tensor], ...]]


def lookup_texts(tokenizer, count: int, entries: int = 22, seed: int = 0) -> list[CodeText]:
    """Each text lists ``entries`` similar facts; some of them are asked for."""
    lookups = _lookups(count, entries, seed)
    return [(_ids(tokenizer, text), _questions(tokenizer, "lookup", codes)) for _, text, codes in lookups]


def needle_texts(tokenizer, haystack: Tensor, count: int, tokens: int, seed: int = 0) -> list[CodeText]:
    """Each text hides facts in ``tokens`` tokens of prose in all, and all are asked for.

    ``haystack`` are ids of prose, ``[n]``, without an opening.
    """
    texts = []
    for draw in _draws(count, seed):
        codes, facts = _facts(draw, "vault", QUESTIONS)
        needles = [_ids_within(tokenizer, fact) for fact in facts]
        opening = torch.tensor(opening_of(tokenizer), dtype=torch.long)
        room = tokens - len(opening) - sum(map(len, needles))
        start = draw.randrange(0, max(1, len(haystack) - room))
        prose = haystack[start : start + room]
        places = sorted(draw.sample(range(len(prose) // 20, len(prose) * 19 // 20), QUESTIONS))
        first, *parts = prose.tensor_split(places)
        context = torch.cat([opening, first, *chain.from_iterable(zip(needles, parts, strict=True))])
        texts.append((context, _questions(tokenizer, "vault", codes)))
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
        text = context + _WORDING["lookup"]["question"].format(name=list(codes)[answer])
        documents.append({"text": text, "choices": list(codes.values()), "answer": answer})
    return {"test": Dataset.from_list(documents)}


def _draws(count: int, seed: int) -> list[random.Random]:
    return [random.Random(seed * 1_000_003 + index) for index in range(count)]


def _lookups(count: int, entries: int, seed: int) -> Iterator[tuple[random.Random, str, dict[str, str]]]:
    """Texts that list ``entries`` similar facts, and the codes of the names that are asked for."""
    for draw in _draws(count, seed):
        codes, facts = _facts(draw, "lookup", entries)
        asked = draw.sample(list(codes), QUESTIONS)
        yield draw, _WORDING["lookup"]["context"].format(facts="".join(facts)), {name: codes[name] for name in asked}


def _facts(draw: random.Random, kind: str, count: int) -> tuple[dict[str, str], list[str]]:
    """Codes of ``count`` names, and a sentence about each."""
    codes = {name: str(draw.randrange(10000, 100000)) for name in draw.sample(_NAMES, count)}
    return codes, [_WORDING[kind]["fact"].format(name=name, code=code) for name, code in codes.items()]


def _ids(tokenizer, text: str, **options: bool) -> Tensor:
    return torch.tensor(tokenizer(text, **options)["input_ids"])


def _ids_within(tokenizer, text: str) -> Tensor:
    """Ids of what stands inside a longer text."""
    return torch.tensor(ids_within(tokenizer, text), dtype=torch.long)


def _questions(tokenizer, kind: str, codes: dict[str, str]) -> tuple[tuple[Tensor, Tensor], ...]:
    asked = {name: _WORDING[kind]["question"].format(name=name) for name in codes}
    inside = partial(_ids_within, tokenizer)
    return tuple((inside(asked[name]), inside(f" {code}")) for name, code in codes.items())


class Question(NamedTuple):
    """What is asked, how the answer begins, and the strings that the rest of the answer must hold."""

    text: str
    prefix: str
    expected: tuple[str, ...]


Sample = tuple[str, list[Question]]  # a context, and questions that are asked about it independently of each other


class Haystack:
    """A text as prose to hide needles in and as words for lists: ValueError below 20 sentences or 100 words.

    Its language separates words, and ends sentences in a full stop, or lines.
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
    fact = _WORDING["needle"]["fact"]
    needles = [fact.format(name=name, number=number) for name in names for number in numbers[name]]
    places = [draw.random() for _ in needles]
    count = len(haystack.sentences)
    first = draw.randrange(count)
    prose = [haystack.sentences[index % count] for index in range(first, first + size)]
    context = _WORDING["needle"]["context"].format(text=" ".join(_inserted(prose, needles, places)))
    draw.shuffle(names)
    questions = []
    for group in [names[:asked]] if asked == keys else [[name] for name in names[:2]]:
        expected = tuple(number for name in group for number in numbers[name])
        shown = group[0] if len(group) == 1 else f"{', '.join(group[:-1])}, and {group[-1]}"
        questions.append(_question("one" if len(expected) == 1 else "many", expected, names=shown))
    return context, questions


def _question(kind: str, expected: tuple[str, ...], **filled: Any) -> Question:
    return Question(_WORDING[kind]["question"].format(**filled), _WORDING[kind]["prefix"].format(**filled), expected)


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
        value = str(draw.randrange(10000, 100000))
        sources = [value, *(f"VAR {name}" for name in names)]
        chained = [f"VAR {name} = {source}" for name, source in zip(names, sources, strict=False)]
        noise = [_WORDING["noise"]] * lines
        text = "\n".join(_inserted(noise, chained, sorted(draw.random() for _ in chained)))
        parts.append((text, _question("tracking", tuple(names), value=value, count=len(names))))
    return _after_example("tracking", parts, " ".join)


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
        parts.append((_numbered(listed), _question("common", tuple(words[:_COMMON]), count=_COMMON)))
    return _after_example("common", parts, _numbered)


def _after_example(kind: str, parts: list[tuple[str, Question]], write: Callable[[Sequence[str]], str]) -> Sample:
    """The second text with its question, after the first one with its question and answer."""
    (solved, example), (text, question) = parts
    context = _WORDING[kind]["context"]
    answered = f"{context.format(text=solved)}{example.text}{example.prefix} {write(example.expected)}"
    return f"{answered}\n\n{context.format(text=text)}", [question]


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

    Equal ``index`` and ``seed`` give equal samples. ``reserved`` of the tokens are left for what a chat template or the
    tokenizer adds. A ValueError says that not even the shortest context fits.
    """

    def build(size: int) -> Sample:
        return TASKS[task](random.Random(f"{seed} {task} {length} {index}"), haystack, size, length)

    def too_long(size: int) -> bool:
        context, questions = build(size)
        asked = max(count(part.text + part.prefix) + answer_tokens(count, part) for part in questions)
        return count(context) + asked > length - reserved

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
    """Token ids of contexts and of questions about them, as plain text or as one user message of a chat.

    A ValueError says that a chat is asked of a tokenizer without a template, or with one that alters messages.
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

    def context(self, text: str) -> Tensor:
        """``[tokens]`` ids of what is read first; a chat template has written the special ones itself."""
        return _ids(self.tokenizer, self._before + text, add_special_tokens=not self._chat)

    def question(self, text: str, prefix: str) -> Tensor:
        """``[tokens]`` ids of a question about what was read, and of how its answer begins."""
        return _ids(self.tokenizer, text + self._after + prefix, add_special_tokens=False)
