"""Where calibration text comes from, without a network; and the quick hub check."""

import sys
import time
import urllib.error
from types import SimpleNamespace

import pytest

from lowrank_cache.evaluation import hub, text_source


@pytest.fixture
def unreachable(monkeypatch):
    monkeypatch.setattr(text_source.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(text_source, "hub_reachable", lambda path: False)


@pytest.fixture
def reachable(monkeypatch):
    monkeypatch.setattr(text_source, "hub_reachable", lambda path: True)
    monkeypatch.setattr(text_source.importlib.util, "find_spec", lambda name: object())


def test_given_file_comes_first(monkeypatch, reachable, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("Grüße\n", encoding="utf-8")
    assert text_source.load_text(file) == ("Grüße\n", str(file))


@pytest.mark.parametrize(("content", "message"), [(b" \n", "must hold text"), (b"\xff\xfe\x00", "must be UTF-8")])
def test_unusable_file_is_refused(tmp_path, content, message):
    file = tmp_path / "bad.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        text_source.load_text(file)


def test_missing_file_is_an_error_not_another_source(tmp_path, unreachable):
    with pytest.raises(FileNotFoundError):
        text_source.load_text(tmp_path / "absent.txt")


def test_wikitext_when_the_hub_answers(monkeypatch, reachable):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return {"text": ["", " = Title = \n", "A sentence.\n"]}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    text, name = text_source.load_text(split="test")
    assert text == " = Title = \nA sentence.\n"
    assert asked == [(text_source.DATASET, {"split": "test"})] and name.endswith("test")


def test_failing_dataset_falls_back_and_says_why(monkeypatch, reachable):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("cut off")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    text, name = text_source.load_text()
    assert text_source.bundled_text().startswith(text) and "cut off" in name


def test_bundled_text_is_long_and_stable(unreachable):
    whole = text_source.bundled_text()
    parts = {split: text_source.load_text(split=split) for split in ("train", "validation", "test")}
    assert all("Python" in name and "the hub does not answer" in name for _, name in parts.values())
    train, test = parts["train"][0], parts["test"][0]
    assert parts["validation"] == parts["train"]
    assert whole.startswith(train) and whole.endswith(test), "evaluated on what was not calibrated on"
    assert len(whole) - 10 < len(train) + len(test) < len(whole)
    assert len(train) > 400_000  # the demo takes 4,096 tokens of it, calibration 20,000
    assert len(test) > 100_000


def test_without_datasets_it_says_so(monkeypatch, reachable):
    monkeypatch.setattr(text_source.importlib.util, "find_spec", lambda name: None)
    text, name = text_source.load_text(split="test")
    assert text_source.bundled_text().endswith(text) and "the package datasets is not installed" in name


def test_hub_check_is_quick_and_never_raises(monkeypatch):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    for endpoint in ("http://127.0.0.1:9", "not an address"):
        monkeypatch.setattr(hub.constants, "ENDPOINT", endpoint)
        start = time.perf_counter()
        assert hub.hub_reachable("x") is False
        assert time.perf_counter() - start < 5


def test_hub_check_honours_offline_and_status(monkeypatch):
    calls = []

    class Answer(SimpleNamespace):
        def __enter__(self):
            return self

        def __exit__(self, *details):
            return False

    def urlopen(request, timeout):
        calls.append((request.get_method(), request.full_url, timeout))
        if "absent" in request.full_url:
            raise urllib.error.HTTPError(request.full_url, 404, "absent", {}, None)
        return Answer(status=200)

    monkeypatch.setattr(hub.urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(hub.constants, "ENDPOINT", "https://hub.example")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    assert hub.hub_reachable("here", timeout=1) is True
    assert hub.hub_reachable("absent", timeout=1) is False
    assert calls[0] == ("HEAD", "https://hub.example/here", 1)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    calls.clear()
    assert hub.hub_reachable("here") is False and calls == []
