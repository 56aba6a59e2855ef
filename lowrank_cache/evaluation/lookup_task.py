"""Look-ups as documents of an lm-eval task: generated from a seed, so that the task needs no network."""

import random

from lowrank_cache.evaluation.recall import lookup_list, lookup_question

__all__ = ["lookup_dataset", "lookup_documents"]

CHOICES = 4


def lookup_documents(count: int = 64, entries: int = 22, seed: int = 0) -> list[dict]:
    """Documents with a ``text``, a list and a question, ``choices`` of codes in it, and the right one's index.

    Args:
        count: Of documents.
        entries: Codes in a list, at least 4.
    """
    documents = []
    for index in range(count):
        draw = random.Random(seed * 1_000_003 + index)
        context, codes = lookup_list(draw, entries)
        names = draw.sample(list(codes), CHOICES)
        answer = draw.randrange(CHOICES)
        text = context + lookup_question(names[answer])
        documents.append({"text": text, "choices": [codes[name] for name in names], "answer": answer})
    return documents


def lookup_dataset(count: int = 64, entries: int = 22, seed: int = 0, **_) -> dict:
    """The documents as lm-eval takes them; it passes all arguments of the model and of ``--metadata``."""
    from datasets import Dataset

    return {"test": Dataset.from_list(lookup_documents(count, entries, seed))}
