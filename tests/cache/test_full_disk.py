"""A disk that fills while something is saved: the old artefact stays whole, and no part of a new one is left."""

import errno
import os
import resource
from pathlib import Path

import pytest
import torch

from lowrank_cache import Projections
from lowrank_cache.atomic import write_files
from lowrank_cache.calibration import calibrate
from lowrank_cache.calibration.moments import Moments
from tests.oracle.models import full_rank_projections, random_tokens, tiny_model

FULL = OSError(errno.ENOSPC, "No space left on device")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def moments(tmp_path_factory):
    path = tmp_path_factory.mktemp("moments") / "moments.safetensors"
    calibrate(tiny_model("llama"), [random_tokens(2, 12)], save_moments=path, progress=False)
    return Moments.load(path)


def save_projections(folder: Path) -> None:
    full_rank_projections("llama", 1, 1).save_pretrained(folder)


def save_others(folder: Path) -> None:
    full_rank_projections("llama", 4, 2).save_pretrained(folder)


class TestWriteFiles:
    def test_bytes_and_writers(self, tmp_path):
        write_files({tmp_path / "a": b"one", tmp_path / "b": lambda part: part.write_bytes(b"two")})
        assert contents(tmp_path) == {"a": b"one", "b": b"two"}
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644

    @pytest.mark.parametrize("broken", ["first", "second", "fsync"])
    def test_none_is_written_if_one_cannot_be(self, tmp_path, monkeypatch, broken):
        write_files({tmp_path / "a": b"old", tmp_path / "b": b"old"})
        fsync = os.fsync

        def fail(*args):
            raise FULL

        def fail_second(*args):
            monkeypatch.setattr(os, "fsync", fail)
            return fsync(*args)

        if broken == "fsync":
            monkeypatch.setattr(os, "fsync", fail_second)
        first, second = (fail if broken == name else b"new" for name in ("first", "second"))
        with pytest.raises(OSError, match="No space left"):
            write_files({tmp_path / "a": first, tmp_path / "b": second})
        assert contents(tmp_path) == {"a": b"old", "b": b"old"}

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    def test_other_ends(self, tmp_path, error):
        def interrupt(part):
            part.write_bytes(b"half")
            raise error

        with pytest.raises(error):
            write_files({tmp_path / "a": interrupt})
        assert contents(tmp_path) == {}


@pytest.mark.parametrize("call", [1, 2])
def test_projections_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch, call):
    save_others(tmp_path)
    before, calls, write_bytes = contents(tmp_path), [], Path.write_bytes

    def fill_up(path, payload):
        calls.append(path)
        if len(calls) == call:
            write_bytes(path, payload[: len(payload) // 2])
            raise FULL
        return write_bytes(path, payload)

    monkeypatch.setattr(Path, "write_bytes", fill_up)
    with pytest.raises(OSError, match="No space left"):
        save_projections(tmp_path)
    monkeypatch.undo()
    assert contents(tmp_path) == before
    save_projections(tmp_path)
    loaded, expected = Projections.from_pretrained(tmp_path), full_rank_projections("llama", 1, 1)
    assert torch.equal(loaded.bases[0].down_proj, expected.bases[0].down_proj)


def test_a_process_killed_between_two_renames_leaves_what_is_refused(tmp_path, monkeypatch):
    save_others(tmp_path)
    replace, calls = os.replace, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return replace(*args)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_projections(tmp_path)
    with pytest.raises(ValueError, match="is damaged: its SHA-256 is"):
        Projections.from_pretrained(tmp_path)


def test_moments_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch, moments):
    moments.save(tmp_path / "m.safetensors")
    before = contents(tmp_path)

    def fill_up(tensors, part, **options):
        Path(part).write_bytes(b"half")
        raise FULL

    monkeypatch.setattr("lowrank_cache.calibration.moments.save_file", fill_up)
    with pytest.raises(OSError, match="No space left"):
        moments.save(tmp_path / "m.safetensors")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", ["projections", "moments"])
def test_a_real_limit_on_the_size_of_files(tmp_path, kind, moments):
    """The kernel refuses the bytes here, also inside safetensors' own code."""
    save = moments.save if kind == "moments" else full_rank_projections("llama", 1, 1).save_pretrained
    target = tmp_path / "saved"
    target.mkdir()
    path = target / "m.safetensors" if kind == "moments" else target
    save(path)
    before, limits = contents(target), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))  # Python ignores the signal that comes with it
    try:
        with pytest.raises(OSError, match="too large"):
            save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(target) == before
