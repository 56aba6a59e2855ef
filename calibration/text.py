"""Text to calibrate on: prose, some of which is always there, mixed with generated look-ups.

Look-ups are lists of key–value pairs some of which are asked again. Prose rarely asks a model to copy something exact
from far back, so bases calibrated on prose alone spend too few bits on the channels that look-ups need. The effect is
measured in docs/appendix.md, "What calibration reads".
"""

import importlib
import inspect
import random
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

_FIRST = (
    "amber birch cobalt dusty eager faint golden hollow ivory jolly keen lunar misty noble olive pale "
    "quiet rusty silver tidal umber vivid wild young"
).split()
_SECOND = (
    "anchor badger castle dolphin ember falcon garden harbor island jacket kettle lantern meadow needle "
    "otter pepper quarry raven saddle tunnel valley walnut zephyr canyon"
).split()
_PLACES = (
    "Oslo Lima Cairo Quito Perth Turin Kyoto Dakar Leeds Porto Malmo Delhi Boston Havana Tunis Riga Sofia Accra".split()
)

# How a pair is stated, and how it is asked and answered later in the same text.
_FORMS = (
    ("{key}: {value}\n", "{key}: {value}\n"),
    ("The value of {key} is {value}.\n", "What is the value of {key}? It is {value}.\n"),
    ("{key} = {value}\n", "print({key}) -> {value}\n"),
    ("Remember that {key} belongs to {value}.\n", "As noted, {key} belongs to {value}.\n"),
    ('"{key}": "{value}",\n', 'data["{key}"] == "{value}"\n'),
    ("| {key} | {value} |\n", "{key} -> {value}\n"),
)


_DOCUMENTED_MODULES = (
    "argparse collections configparser datetime decimal difflib doctest email.message fractions functools heapq "
    "ipaddress itertools logging pathlib pickle random statistics string textwrap threading unittest.mock zipfile"
).split()


def bundled_text() -> str:
    """The language reference's topics and docstrings of the standard library, in a fixed order."""
    from pydoc_data.topics import topics

    parts = [topics[name] for name in sorted(topics)]
    for name in _DOCUMENTED_MODULES:
        module = importlib.import_module(name)
        members = [one for key, one in sorted(vars(module).items()) if not key.startswith("_")]
        own = [one for one in members if getattr(one, "__module__", None) == name]
        parts += [inspect.getdoc(one) or "" for one in (module, *own)]
    return "\n\n".join(part.strip() for part in parts if len(part) > 200) + "\n"


def lookup_text(seed: int, pairs: int = 24, questions: int = 12) -> str:
    """A list of distinct pairs in one of several forms, then some of them asked and answered."""
    draw = random.Random(seed)
    statement, question = draw.choice(_FORMS)
    keys = draw.sample([f"{first} {second}" for first in _FIRST for second in _SECOND], pairs)
    values = {key: _value(draw) for key in keys}
    stated = [statement.format(key=key, value=value) for key, value in values.items()]
    asked = [question.format(key=key, value=values[key]) for key in draw.choices(keys, k=questions)]
    return "".join(stated + asked)


def _value(draw: random.Random) -> str:
    kind = draw.randrange(4)
    if kind == 0:
        return str(draw.randrange(1000, 1000000))
    if kind == 1:
        return f"{draw.choice(_PLACES)} {draw.randrange(10, 100)}"
    if kind == 2:
        return "".join(draw.choices("ABCDEFGHJKLMNPQRSTUVWXYZ23456789", k=6))
    return f"{draw.choice(_FIRST)} {draw.choice(_SECOND)}"


def opening_of(tokenizer: Callable[[str], Mapping]) -> list[int]:
    """The ids that ``tokenizer`` puts before a text, ``<bos>`` or none: some models lose much without them."""
    bos, ids = getattr(tokenizer, "bos_token_id", None), list(tokenizer("a")["input_ids"])
    return [bos] if bos is not None and ids[:1] == [bos] else []


def ids_within(tokenizer: Callable[[str], Mapping], text: str) -> list[int]:
    """Ids of ``text`` as it stands inside a longer one, without ``opening_of``."""
    ids, opening = list(tokenizer(text)["input_ids"]), opening_of(tokenizer)
    return ids[len(opening) :] if opening and ids[: len(opening)] == opening else ids


def mixed_batches(
    tokenizer: Callable[[str], Mapping],
    text: str,
    *,
    tokens: int,
    window: int = 512,
    recall_share: float = 0.5,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Calibration sequences: windows of ``text`` and generated look-ups, interleaved, each after ``opening_of``.

    Args:
        tokenizer: Called as ``tokenizer(text)["input_ids"]``.
        text: Prose; evenly spaced windows of it are used.
        tokens: Total number of tokens; rounded down to whole windows.
        window: Tokens per sequence.
        recall_share: Fraction of sequences that are look-ups, in [0, 1].
        seed: Of the look-ups.

    Yields:
        LongTensors ``[1, window]``.

    Raises:
        ValueError: If a number is out of range or the text is too short.
    """
    if not 0 <= recall_share <= 1:
        raise ValueError(f"recall_share must be in [0, 1], got {recall_share}")
    sequences = tokens // window
    if sequences == 0:
        raise ValueError(f"tokens must be at least one window of {window}, got {tokens}")
    lookups = round(sequences * recall_share)
    opening = opening_of(tokenizer)
    prose_ids = ids_within(tokenizer, text) if lookups < sequences else []
    inner = window - len(opening)
    available = len(prose_ids) // window
    if available < sequences - lookups:
        raise ValueError(f"text must hold at least {(sequences - lookups) * window} tokens, got {len(prose_ids)}")
    last, count = len(prose_ids) - inner, sequences - lookups
    starts = torch.linspace(0, last, count, dtype=torch.float32, device="cpu").long().tolist()
    done = 0  # look-ups so far
    for index in range(sequences):
        if done < round((index + 1) * lookups / sequences):
            ids = _lookup_window(tokenizer, inner, seed * 1_000_003 + done)
            done += 1
        else:
            start = starts.pop(0)
            ids = prose_ids[start : start + inner]
        yield torch.tensor([opening + ids], dtype=torch.long, device="cpu")


def _lookup_window(tokenizer, window: int, seed: int) -> list[int]:
    """A list short enough that its questions fit into the window, more lists if there is room."""
    draw = random.Random(seed)
    ids: list[int] = []
    while len(ids) < window:
        pairs = max(4, (window - len(ids)) // 32)
        ids += ids_within(tokenizer, lookup_text(draw.randrange(2**31), pairs, max(2, pairs)))
    return ids[:window]
