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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

__all__ = [
    "QUESTIONS", "TASKS", "CodeText", "Haystack", "Prompter", "Question", "Sample", "answer_tokens", "lookup_dataset",
    "lookup_documents", "lookup_texts", "needle_texts", "sample_of", "score",
]  # fmt: skip

QUESTIONS = 4  # of a look-up list or a text with needles; choices of an lm-eval document
_COLOURS = "red blue green black white yellow orange purple brown grey pink crimson".split()
_ANIMALS = "tiger eagle shark wolf bear fox owl whale horse moose lynx crane cobra bison".split()
_NAMES = [f"{colour} {animal}" for colour in _COLOURS for animal in _ANIMALS]
_ASKED = "\nThe secret code that was given to agent {} is"
_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_HOPS = 4  # assignments after the first in a chain of variables
_COMMON = 10  # words to be found in a list
_LONG = 4096  # tokens from which on lists repeat their words more often


@dataclass(frozen=True)
class CodeText:
    """What is read, ``[tokens]`` ids, and questions about it with their answers, ``[tokens]`` ids each."""

    context: Tensor
    questions: tuple[tuple[Tensor, Tensor], ...]


def lookup_texts(tokenizer, count: int, entries: int = 22, seed: int = 0) -> list[CodeText]:
    """Each text lists ``entries`` similar facts; some of them are asked for."""
    texts = []
    for index in range(count):
        draw = random.Random(seed * 1_000_003 + index)
        context, codes = _lookup_list(draw, entries)
        questions = ((_ASKED.format(name), codes[name]) for name in draw.sample(list(codes), QUESTIONS))
        texts.append(CodeText(_ids(tokenizer, context), _pairs(tokenizer, questions)))
    return texts


def needle_texts(tokenizer, haystack: Tensor, count: int, tokens: int, seed: int = 0) -> list[CodeText]:
    """Each text hides facts in ``tokens`` tokens of prose in all (``haystack`` ids), and all are asked for."""
    texts = []
    for index in range(count):
        draw = random.Random(seed * 1_000_003 + index)
        codes = {name: _code(draw) for name in draw.sample(_NAMES, QUESTIONS)}
        vault = "The vault of the {} opens with the number"
        facts = [_ids(tokenizer, f"\n{vault.format(name)} {code}.\n") for name, code in codes.items()]
        asked = "\nWhich number opens the vault of the {}? "
        questions = [(asked.format(name) + vault.format(name), code) for name, code in codes.items()]
        room = tokens - sum(map(len, facts))
        start = draw.randrange(0, max(1, len(haystack) - room))
        prose = haystack[start : start + room]
        places = sorted(draw.sample(range(len(prose) // 20, len(prose) * 19 // 20), QUESTIONS))
        parts = prose.tensor_split(places)
        context = torch.cat([parts[0], *(part for pair in zip(facts, parts[1:], strict=True) for part in pair)])
        texts.append(CodeText(context, _pairs(tokenizer, questions)))
    return texts


def lookup_documents(count: int = 64, entries: int = 22, seed: int = 0) -> list[dict]:
    """Documents of an lm-eval task: ``text``, a list and a question, ``choices`` of codes, and the right one's index.

    Args:
        count: Of documents.
        entries: Codes in a list, at least 4.
    """
    documents = []
    for index in range(count):
        draw = random.Random(seed * 1_000_003 + index)
        context, codes = _lookup_list(draw, entries)
        names = draw.sample(list(codes), QUESTIONS)
        answer = draw.randrange(QUESTIONS)
        text = context + _ASKED.format(names[answer])
        documents.append({"text": text, "choices": [codes[name] for name in names], "answer": answer})
    return documents


def lookup_dataset(count: int = 64, entries: int = 22, seed: int = 0, **_) -> dict:
    """The documents as lm-eval takes them; it passes all arguments of the model and of ``--metadata``."""
    from datasets import Dataset

    return {"test": Dataset.from_list(lookup_documents(count, entries, seed))}


def _lookup_list(draw: random.Random, entries: int) -> tuple[str, dict[str, str]]:
    """A text that lists ``entries`` similar facts, and the fact of each name."""
    codes = {name: _code(draw) for name in draw.sample(_NAMES, entries)}
    facts = "".join(f"Agent {name} was given the secret code {code} this morning.\n" for name, code in codes.items())
    return f"Read the list of agents and codes.\n\n{facts}", codes


def _code(draw: random.Random) -> str:
    return str(draw.randrange(10000, 100000))


def _ids(tokenizer, text: str) -> Tensor:
    return torch.tensor(tokenizer(text)["input_ids"])


def _pairs(tokenizer, questions: Iterable[tuple[str, str]]) -> tuple[tuple[Tensor, Tensor], ...]:
    return tuple((_ids(tokenizer, question), _ids(tokenizer, f" {code}")) for question, code in questions)


@dataclass(frozen=True)
class Question:
    """What is asked, how the answer begins, and the strings that the rest of the answer must hold."""

    text: str
    prefix: str
    expected: tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    """A context and questions that are asked about it independently of each other."""

    task: str
    length: int
    index: int
    context: str
    questions: tuple[Question, ...]


Text = tuple[str, tuple[Question, ...]]


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


def _needles(
    keys: int, values: int, asked: int, draw: random.Random, haystack: Haystack, size: int, length: int
) -> Text:
    """``keys`` keys with ``values`` numbers each in ``size`` sentences, and questions for ``asked`` keys at a time."""
    names = [name.replace(" ", "-") for name in draw.sample(_NAMES, keys)]
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
        start, noun = ("is the", "number") if len(expected) == 1 else ("are all the", "numbers")
        what = f"special magic {noun} for {query} mentioned in the provided text"
        questions.append(Question(f"\nWhat {start} {what}?", f" The {what} {start.split()[0]}", expected))
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
    return f"{example}{shown.text}{shown.prefix} {' '.join(shown.expected)}\n\n{context}", (asked,)


def _chain(draw: random.Random, size: int) -> tuple[str, Question]:
    """A chain of assignments in ``size`` lines of noise, in order, and the question for all its variables."""
    names: list[str] = []
    while len(names) <= _HOPS:
        name = "".join(draw.choices(string.ascii_uppercase, k=5))
        if name not in names:
            names.append(name)
    value = _code(draw)
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {new} = VAR {old}" for old, new in zip(names, names[1:], strict=False)]
    places = sorted(draw.random() for _ in chain)
    lines = "\n".join(_inserted([_NOISE] * size, chain, places))
    context = f"Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{lines}"
    question = f"\nQuestion: Find all variables that are assigned the value {value} in the text above."
    prefix = (
        " Answer: According to the chain(s) of variable assignment in the text above, "
        f"{len(names)} variables are assigned the value {value}, they are:"
    )
    return context, Question(question, prefix, tuple(names))


def _common(draw: random.Random, haystack: Haystack, size: int, length: int) -> Text:
    often, seldom = (30, 3) if length >= _LONG else (6, 1)
    order = draw.sample(haystack.words, len(haystack.words))  # the same whatever the size
    while len(order) < _COMMON + size:  # more than the text has: pairs of its words
        order.append("-".join(draw.sample(haystack.words, 2)))
    example, shown = _word_list(draw, order[: len(haystack.words)][-2 * _COMMON :], 3, 1)
    context, asked = _word_list(draw, order[: _COMMON + size], often, seldom)
    return f"{example}{shown.text}{shown.prefix} {_numbered(list(shown.expected))}\n\n{context}", (asked,)


def _word_list(draw: random.Random, words: list[str], often: int, seldom: int) -> tuple[str, Question]:
    listed = words[:_COMMON] * often + words[_COMMON:] * seldom
    draw.shuffle(listed)
    context = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        f"appear most often.\n{_numbered(listed)}"
    )
    question = f"\nQuestion: What are the {_COMMON} most common words in the above list?"
    prefix = f" Answer: The top {_COMMON} words that appear most often in the list are:"
    return context, Question(question, prefix, tuple(words[:_COMMON]))


def _numbered(words: list[str]) -> str:
    return " ".join(f"{index}. {word}" for index, word in enumerate(words, 1))


TASKS: dict[str, Callable[..., Text]] = {
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
        task: One of ``TASKS``.
        count: Tokens of a text.
        index, seed: Equal ones give equal samples.
        reserved: Of the tokens, those to leave for what a chat template or the tokenizer adds.

    Raises:
        ValueError: If not even the shortest context fits.
    """

    def build(size: int) -> Sample:
        draw = random.Random(f"{seed} {task} {length} {index}")
        return Sample(task, length, index, *TASKS[task](draw, haystack, size, length))

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


def answer_tokens(count: Count, question: Question) -> int:
    """Tokens that an answer may take: half as many again as the expected strings, and 8."""
    return 8 + count(_numbered(list(question.expected))) * 3 // 2


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

    _QUESTION = "<<question>>"  # where a question will stand in a chat message

    def __init__(self, tokenizer, chat: bool = False):
        self.tokenizer = tokenizer
        self._parts: tuple[str, str] | None = None
        if chat:
            if not getattr(tokenizer, "chat_template", None):
                raise ValueError("chat needs a tokenizer with a chat template, and this one has none")
            message = [{"role": "user", "content": self._QUESTION}]
            rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            before, found, after = rendered.partition(self._QUESTION)
            if not found:
                raise ValueError("chat needs a chat template that takes a message as it is")
            self._parts = (before, after)

    def count(self, text: str) -> int:
        """Tokens of a text, special ones apart."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def overhead(self) -> int:
        """Tokens that a context and a question take beside their texts."""
        return len(self.context("")) + len(self.question("", ""))

    def context(self, text: str) -> Tensor:
        """``[tokens]`` ids of what is read first."""
        if self._parts is None:
            return torch.tensor(self.tokenizer(text)["input_ids"])
        return self._ids(self._parts[0] + text)

    def question(self, text: str, prefix: str) -> Tensor:
        """``[tokens]`` ids of a question about what was read, and of how its answer begins."""
        return self._ids(text + ("" if self._parts is None else self._parts[1]) + prefix)

    def _ids(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"])
