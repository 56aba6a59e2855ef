"""The synthetic tasks: what they hide can be found, what they ask has one answer, and a seed decides all."""

import random
import re
from collections import Counter

import pytest
import torch

from lowrank_cache.evaluation.tasks import (
    TASKS,
    Haystack,
    Prompter,
    answer_tokens,
    lookup_dataset,
    lookup_texts,
    needle_texts,
    sample_of,
    score,
)
from tests.oracle.character_tokenizer import CHAT_TEMPLATE, character_tokenizer

_WORDS = [first + middle + last for first in "bdfg" for middle in ("ale", "ori", "uma") for last in "knprstlmvz"]


def prose(sentences: int = 60) -> str:
    """Sentences of words from a small vocabulary."""
    draw = random.Random(0)
    return " ".join(" ".join(draw.choices(_WORDS, k=8)).capitalize() + "." for _ in range(sentences))


HAYSTACK = Haystack(prose())


def sample(task: str, length: int = 2000, index: int = 0, seed: int = 0):
    return sample_of(task, len, HAYSTACK, length, index, seed)


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_decides_a_sample(task):
    assert sample(task) == sample(task)
    assert len({sample(task)[0], sample(task, index=1)[0], sample(task, seed=1)[0]}) == 3


@pytest.mark.parametrize("length", [2100, 5000])
@pytest.mark.parametrize("task", TASKS)
def test_a_sample_fills_its_length_with_room_for_question_and_answer(task, length):
    context, questions = sample(task, length)
    asked = max(len(part.text + part.prefix) + answer_tokens(len, part) for part in questions)
    assert length - 250 < len(context) + asked <= length
    shorter, _ = sample_of(task, len, HAYSTACK, length, 0, reserved=150)
    assert len(shorter) + asked <= length - 150


@pytest.mark.parametrize(("task", "keys", "values", "asked"), [
    ("single", 1, 1, [1]), ("multi-key", 4, 1, [1, 1]), ("multi-value", 1, 4, [4]), ("multi-query", 4, 1, [4]),
])  # fmt: skip
def test_needles_are_hidden_and_asked_for(task, keys, values, asked):
    context, questions = sample(task)
    found = re.findall(r"One of the special magic numbers for (\S+) is: (\d{7})\.", context)
    assert len({key for key, _ in found}) == keys and len(found) == len(set(found)) == keys * values
    assert [len(question.expected) for question in questions] == asked
    for question in questions:
        meant = {number for key, number in found if key in question.text}
        assert set(question.expected) == meant and all(
            key in question.prefix for key, _ in found if key in question.text
        )
    assert len({question.text for question in questions}) == len(asked)


def test_a_chain_is_in_order_and_leads_to_its_value():
    for index in range(20):
        context, (question,) = sample("tracking", index=index)
        context = context.split("\n\n", 2)[2]  # after the example
        value = re.search(r"assigned the value (\d+)", question.text)[1]
        known = []
        for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", context):
            assert source == value if not known else source in known
            known.append(name)
        assert known == list(question.expected) and len(known) == 5


@pytest.mark.parametrize(("length", "often", "seldom"), [(2000, 6, 1), (5000, 30, 3)])
def test_common_words_are_the_most_common(length, often, seldom):
    context, (question,) = sample("common", length)
    counts = Counter(re.findall(r"\d+\. (\S+)", context.rpartition("\n")[2]))
    assert set(question.expected) == {word for word, count in counts.items() if count == often}
    assert set(counts.values()) == {often, seldom}


def test_lists_longer_than_the_texts_words_go_on_with_pairs():
    context, (question,) = sample("common", 12_000)
    counts = Counter(re.findall(r"\d+\. (\S+)", context.rpartition("\n")[2]))
    assert len(counts) > len(HAYSTACK.words)
    assert {word for word, _ in counts.most_common(10)} == set(question.expected)


def test_the_score_is_the_share_of_expected_strings():
    assert score(("12", "ab"), "It is AB and 12.") == 1
    assert score(("12", "ab"), "It is AB and 13.") == 0.5
    assert score(("12",), "1 2") == 0


def test_what_does_not_fit_or_is_no_text_is_refused():
    with pytest.raises(ValueError, match="the task 'tracking' fits, got 500"):
        sample("tracking", 500)
    with pytest.raises(ValueError, match="at least 20 sentences and 100 different words"):
        Haystack("One sentence. " * 30)


@pytest.mark.parametrize("chat", [False, True])
def test_context_and_question_are_one_prompt(chat):
    tokenizer = character_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    prompter = Prompter(tokenizer, chat)
    ids = prompter.context("Some text.").tolist() + prompter.question(" What?", "It is").tolist()
    expected = "<user>Some text. What?\n<assistant>It is" if chat else "Some text. What?It is"
    assert tokenizer.decode(ids) == expected
    overhead = len(prompter.context("")) + len(prompter.question("", ""))
    assert overhead == len(expected) - len("Some text. What?It is")


def test_chat_needs_a_template():
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        Prompter(character_tokenizer(), chat=True)


def byte_tokenizer(text: str) -> dict:
    """Bytes as tokens."""
    return {"input_ids": [byte % 128 for byte in text.encode()]}


def test_texts_hold_each_answer_once_and_questions_do_not():
    for tokens, (context_ids, questions) in [
        *((None, text) for text in lookup_texts(byte_tokenizer, 5, entries=8)),
        *((900, text) for text in needle_texts(byte_tokenizer, torch.zeros(3000), 5, 900)),
    ]:
        context = _string(context_ids)
        assert tokens is None or len(context) == tokens
        assert len(questions) == 4
        for question, answer in questions:
            (line,) = [line for line in context.splitlines() if _string(answer) in line]
            name = re.search(r"(\w+ \w+)( opens with the number| is)$", _string(question))[1]
            assert name in line and _string(answer) not in _string(question)


class OpeningTokenizer:
    """Bytes as tokens, after an opening."""

    bos_token_id = 200

    def __call__(self, text: str) -> dict:
        return {"input_ids": [200, *byte_tokenizer(text)["input_ids"]]}


def test_only_contexts_begin_with_an_opening():
    for plain, opened in [
        *zip(lookup_texts(byte_tokenizer, 3, entries=8), lookup_texts(OpeningTokenizer(), 3, entries=8), strict=True),
        *zip(
            needle_texts(byte_tokenizer, torch.zeros(3000), 3, 900),
            needle_texts(OpeningTokenizer(), torch.zeros(3000), 3, 901),
            strict=True,
        ),
    ]:
        assert opened[0][0] == 200 and torch.equal(opened[0][1:].float(), plain[0].float())
        for one, two in zip(plain[1], opened[1], strict=True):
            assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def _string(ids: torch.Tensor) -> str:
    return "".join(map(chr, ids.long().tolist()))


def test_documents_hold_their_answers_and_depend_on_the_seed():
    documents, again, other = (lookup_dataset(6, entries=9, seed=seed)["test"].to_list() for seed in (3, 3, 4))
    assert documents == again != other
    for document in documents:
        facts, _, question = document["text"].partition("\n\n")[2].rpartition("\n")
        name = question.removeprefix("The secret code that was given to agent ").removesuffix(" is")
        assert f"Agent {name} was given the secret code {document['choices'][document['answer']]} this" in facts
        assert all(choice in facts for choice in document["choices"]) and len(set(document["choices"])) == 4
    assert len({document["answer"] for document in documents}) > 1
