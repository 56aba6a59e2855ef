"""Where texts, statistics and bases come from, without a network, and that equal ones give equal caches."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers

from lowrank_cache import LowRankCache, Projections
from lowrank_cache.calibration.text import bundled_text
from lowrank_cache.evaluation import inputs
from lowrank_cache.evaluation.caches import CacheSizes
from lowrank_cache.evaluation.inputs import MOMENTS_FILE, Run, load_text, moments_of, prepare
from lowrank_cache.evaluation.streaming import stream, windows_of
from tests.evaluation.test_tasks import byte_tokenizer, prose
from tests.oracle.character_tokenizer import character_tokenizer
from tests.oracle.models import tiny_model


@pytest.fixture
def unreachable(monkeypatch):
    monkeypatch.setattr(inputs.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(inputs, "hub_answers", lambda *file: False)


@pytest.fixture
def reachable(monkeypatch):
    monkeypatch.setattr(inputs, "hub_answers", lambda *file: True)
    monkeypatch.setattr(inputs.importlib.util, "find_spec", lambda name: object())


def test_given_file_comes_first(monkeypatch, reachable, tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("Grüße\n", encoding="utf-8")
    assert load_text(file) == ("Grüße\n", str(file))


@pytest.mark.parametrize(("content", "message"), [(b" \n", "must hold text"), (b"\xff\xfe\x00", "must be UTF-8")])
def test_unusable_file_is_refused(tmp_path, content, message):
    file = tmp_path / "bad.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_text(file)


def test_missing_file_is_an_error_not_another_source(tmp_path, unreachable):
    with pytest.raises(FileNotFoundError):
        load_text(tmp_path / "absent.txt")


class Columns(dict):
    """What a data set is here."""

    column_names = ("text",)


def test_wikitext_when_the_hub_answers(monkeypatch, reachable):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return Columns({"text": ["", " = Title = \n", "A sentence.\n"]})

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    text, name = load_text(split="test")
    assert text == " = Title = \nA sentence.\n"
    assert asked == [(inputs.WIKITEXT, {"split": "test"})] and name.endswith("test")


def test_failing_dataset_falls_back_and_says_why(monkeypatch, reachable):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("cut off")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    text, name = load_text()
    assert bundled_text().startswith(text) and "cut off" in name


def test_bundled_text_is_long_and_stable(unreachable):
    whole = bundled_text()
    parts = {split: load_text(split=split) for split in ("train", "validation", "test")}
    assert all("Python" in name and "the hub does not answer" in name for _, name in parts.values())
    train, test = parts["train"][0], parts["test"][0]
    assert parts["validation"] == parts["train"]
    assert whole.startswith(train) and whole.endswith(test), "evaluated on what was not calibrated on"
    assert len(whole) - 10 < len(train) + len(test) < len(whole)
    assert len(train) > 400_000  # the demo takes 4,096 tokens of it, calibration 20,000
    assert len(test) > 100_000


def test_without_datasets_it_says_so(monkeypatch, reachable):
    monkeypatch.setattr(inputs.importlib.util, "find_spec", lambda name: None)
    text, name = load_text(split="test")
    assert bundled_text().endswith(text) and "the package datasets is not installed" in name


def test_texts_of_a_data_set(tmp_path):
    rows = [{"text": "A line.\n", "more": "x"}, {"text": "Another.", "more": "y"}]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    name = f"dataset:{tmp_path / 'set'}"
    assert load_text(name, split="test") == ("A line.\nAnother.\n\n", name)
    assert load_text(f"{name},split=test,column=more")[0] == "x\n\ny\n\n"
    with pytest.raises(ValueError, match="must name a column of"):
        load_text(f"{name},column=words", split="test")
    for wrong in ("dataset:", f"{name},columns=text", f"{name},split"):
        with pytest.raises(ValueError, match="data set must be dataset:NAME"):
            load_text(wrong)


_TEXT = "".join(chr(33 + 7 * index % 90) for index in range(600))


def test_statistics_of_other_runs_are_not_taken_for_these(tmp_path):
    model, path = tiny_model("llama"), tmp_path / MOMENTS_FILE
    text = tmp_path / "text.txt"
    text.write_text(_TEXT * 4)
    run = Run(tmp_path, "tiny", text, tokens=1024, recall_share=0.0, dtype="float32")
    said = []
    made = moments_of(run, model, byte_tokenizer, said.append)
    again = moments_of(run, model, byte_tokenizer, said.append)
    assert said[0].startswith("calibrating moments on 1024 tokens") and said[1] == f"statistics read from {path}"
    assert again.tokens == made.tokens
    for change, message in (
        ({"tokens": 512}, "tokens 1024 instead of 512"),
        ({"sensitivity": "query"}, "sensitivity 'gradient' instead of 'query'"),
        ({"model": "other"}, "model 'tiny' instead of 'other'"),
    ):
        with pytest.raises(ValueError, match=f"was calibrated with other settings: {message}; name it with --moments"):
            moments_of(replace(run, **change), model, byte_tokenizer, said.append)
    text.write_text(_TEXT * 4 + "More.")
    with pytest.raises(ValueError, match="text_sha256"):
        moments_of(run, model, byte_tokenizer, said.append)
    other = replace(run, moments=path, tokens=1, out=tmp_path / "unused")
    named = moments_of(other, model, byte_tokenizer, said.append)
    assert named.tokens == made.tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(path / "model")
    character_tokenizer().save_pretrained(path / "model")
    (path / "text.txt").write_text(prose(200))
    return path


def test_options_are_checked_before_the_long_calibration(folder, tmp_path, monkeypatch):
    """Statistics of seven layers are taken of four and three; a group of three would lie in both."""
    path = tmp_path / "model"
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=7, num_attention_heads=4
        )
    ).save_pretrained(path)
    character_tokenizer().save_pretrained(path)
    monkeypatch.setattr(inputs, "collect_moments", None)
    text = folder / "text.txt"
    run = Run(tmp_path / "out", str(path), text, text, tokens=1024, dtype="float32")
    with pytest.raises(ValueError, match=r"cache 'fisher:8,groups=3' cannot be made: both layers \(3, 4, 5\) were not"):
        prepare(run, ["full", "fisher:8,groups=3"], CacheSizes().sizes(), lambda line: None)
    with pytest.raises(ValueError, match=r"cache 'fisher:5000' cannot be made: .* largest reachable ratio is"):
        prepare(run, ["full", "fisher:5000"], CacheSizes().sizes(), lambda line: None)


def test_equal_specifications_are_equal_caches_however_they_are_asked_for(folder, tmp_path):
    """Calibrated, kept from an earlier run, from statistics, from ready projections: one perplexity."""
    text, sizes = folder / "text.txt", CacheSizes(residual_length=8, block_size=8).sizes()
    run = Run(tmp_path / "first", str(folder / "model"), text, text, tokens=1024, dtype="bfloat16")
    bases = tmp_path / "first" / "projections" / "fisher,groups=auto,frame=auto,joint=auto"
    ways = {
        "calibrated": run,
        "kept": run,
        "from statistics": replace(run, out=tmp_path / "second", moments=tmp_path / "first" / MOMENTS_FILE),
        "given": replace(run, out=tmp_path / "third", projections=(str(bases),)),
    }
    losses = {}
    for way, given in ways.items():
        found = prepare(given, ["full", "fisher:3"], sizes, lambda line: None)
        assert [entry.name for entry in found.entries] == ["full", "fisher:3"] and found.model.dtype == torch.bfloat16
        windows = windows_of(torch.tensor(found.tokenizer(found.text)["input_ids"]), 96, 3)
        losses[way] = stream(found.model, windows, found.entries[1].make).tolist()
        losses[f"{way}, one window a batch"] = stream(found.model, windows, found.entries[1].make, batch=3).tolist()
    own = Projections.from_pretrained(bases)
    losses["by hand"] = stream(
        found.model, windows, lambda: LowRankCache(found.model, own, compression_ratio=3.0, **sizes)
    ).tolist()
    assert not (tmp_path / "third" / MOMENTS_FILE).exists()
    (tmp_path / "other.txt").write_text(prose(199))
    other = prepare(replace(run, calibrate_on=tmp_path / "other.txt"), ["full"], sizes, lambda line: None)
    same = prepare(run, ["full"], sizes, lambda line: None)
    assert other.identity != same.identity, "results of another calibration text are not mixed in"
    for way, found in losses.items():
        assert found == losses["calibrated"], way
