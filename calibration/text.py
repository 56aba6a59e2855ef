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


def mixed_batches(
    tokenizer: Callable[[str], Mapping],
    text: str,
    *,
    tokens: int,
    window: int = 512,
    recall_share: float = 0.5,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Calibration sequences: windows of ``text`` and generated look-ups, interleaved.

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
    prose_ids = torch.tensor(tokenizer(text)["input_ids"]) if lookups < sequences else torch.empty(0, dtype=torch.long)
    available = len(prose_ids) // window
    if available < sequences - lookups:
        raise ValueError(f"text must hold at least {(sequences - lookups) * window} tokens, got {len(prose_ids)}")
    starts = torch.linspace(0, len(prose_ids) - window, sequences - lookups).long().tolist()
    done = 0  # look-ups so far
    for index in range(sequences):
        if done < round((index + 1) * lookups / sequences):
            yield _lookup_window(tokenizer, window, seed * 1_000_003 + done)
            done += 1
        else:
            start = starts.pop(0)
            yield prose_ids[None, start : start + window]


def _lookup_window(tokenizer, window: int, seed: int) -> Tensor:
    """A list short enough that its questions fit into the window, more lists if there is room."""
    draw = random.Random(seed)
    ids: list[int] = []
    while len(ids) < window:
        pairs = max(4, (window - len(ids)) // 32)
        ids += tokenizer(lookup_text(draw.randrange(2**31), pairs, max(2, pairs)))["input_ids"]
    return torch.tensor(ids[:window])[None]
