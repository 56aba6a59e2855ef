"""Text of other domains that the machine holds: sources and message catalogues."""

import struct

import pytest

from lowrank_cache.evaluation.machine_text import message_catalogues
from lowrank_cache.evaluation.text_source import load_text


def catalogue(messages: dict[str, str], order: str = "<") -> bytes:
    """A gettext ``.mo`` file, as ``msgfmt`` lays it out."""
    strings = [text.encode() for text in sorted(messages)] + [messages[text].encode() for text in sorted(messages)]
    count, table, place = len(messages), b"", 28 + 16 * len(messages)
    for text in strings:
        table += struct.pack(f"{order}II", len(text), place)
        place += len(text) + 1
    header = struct.pack(f"{order}IIIIIII", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, 0)
    return header + table + b"".join(text + b"\0" for text in strings)


@pytest.mark.parametrize("order", ["<", ">"])
def test_translations_are_read_once_each_and_labels_left_out(tmp_path, order):
    long, other = "ein langer Satz über eine Datei, die es so nicht gibt, und mehr", "noch ein Satz, " * 8
    folder = tmp_path / "de" / "LC_MESSAGES"
    folder.mkdir(parents=True)
    header = {"": "Content-Type: text/plain; charset=UTF-8, and more of a header than sixty characters"}
    (folder / "a.mo").write_bytes(catalogue({**header, "label": "Datei", "one\0many": f"{long}\0{other}"}, order))
    (folder / "b.mo").write_bytes(catalogue({**header, "again": long}, order))
    assert message_catalogues("de", tmp_path) == f"{long}\n\n{other.strip()}"


def test_a_language_without_catalogues_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="language must be one with message catalogues under .*, got 'xx'"):
        message_catalogues("xx", tmp_path)


def test_sources_of_the_standard_library():
    text, source = load_text("python-sources")
    assert "sources of Python 3." in source and "def dataclass(" in text and len(text) > 1_000_000
