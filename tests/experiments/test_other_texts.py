"""Texts of other kinds: sources and translated messages."""

import struct

import pytest

from tests.experiments import load

other_texts = load("other_texts")


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
def test_translations_are_read_once_each_and_labels_left_out(monkeypatch, tmp_path, order):
    monkeypatch.setattr(other_texts, "LOCALES", tmp_path)
    long, other = "ein langer Satz über eine Datei, die es so nicht gibt, und mehr", "noch ein Satz, " * 8
    folder = tmp_path / "de" / "LC_MESSAGES"
    folder.mkdir(parents=True)
    header = {"": "Content-Type: text/plain; charset=UTF-8\nX-More: of a header than sixty characters"}
    (folder / "a.mo").write_bytes(catalogue({**header, "label": "Datei", "one\0many": f"{long}\0{other}"}, order))
    (folder / "b.mo").write_bytes(catalogue({**header, "again": long}, order))
    (folder / "damaged.mo").write_bytes(catalogue({**header, "third": other * 2}, order)[:60])
    assert other_texts.messages("de") == f"{long}\n\n{other.strip()}"


def test_a_language_without_catalogues_is_refused_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr(other_texts, "LOCALES", tmp_path)
    with pytest.raises(ValueError, match="language must be one with message catalogues under .*, got 'xx'"):
        other_texts.messages("xx")


def test_command(tmp_path, capsys):
    other_texts.main(tmp_path / "python.txt")
    text = (tmp_path / "python.txt").read_text(encoding="utf-8")
    assert "def dataclass(" in text and len(text) > 1_000_000
    assert f"--evaluate-on {tmp_path / 'python.txt'}" in capsys.readouterr().out
