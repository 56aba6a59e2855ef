"""Folders of JSON and safetensors: written whole or not at all, whatever fills the disk, and read with suspicion.

Files made to harm, or damaged at random, with checksums that match: refused by an error that names the folder.
``tests/cache/test_projections.py`` damages files and leaves the checksums as they were.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import pickle
import resource
import shutil
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from lowrank_cache import Projections
from lowrank_cache.artefact import config_digest, write_files
from lowrank_cache.calibration import calibrate
from lowrank_cache.calibration.moments import Moments
from lowrank_cache.projections import ARTEFACT
from tests.oracle.models import full_rank_projections, random_tokens, tiny_model

CONFIG_FILE, TENSOR_FILE = ARTEFACT.config_file, ARTEFACT.tensor_file

MOST_BYTES = 64 << 20  # Python's own; the artefact has a fraction of one MiB


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    full_rank_projections("llama", 1, 2, None, "palu").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def moments(tmp_path_factory):
    path = tmp_path_factory.mktemp("moments") / "moments.safetensors"
    calibrate(tiny_model("llama"), [random_tokens(2, 12)], save_moments=path, progress=False)
    return path


@pytest.fixture
def victim(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "victim")


def seal(folder, config=None, tensors=None) -> None:
    """Write a config or tensors with checksums that match."""
    if tensors is not None:
        (folder / TENSOR_FILE).write_bytes(tensors)
    config = json.loads((folder / CONFIG_FILE).read_text()) if config is None else config
    if isinstance(config, dict):
        config["tensors_sha256"] = hashlib.sha256((folder / TENSOR_FILE).read_bytes()).hexdigest()
        config["config_sha256"] = config_digest(config)
    (folder / CONFIG_FILE).write_text(json.dumps(config))


@contextlib.contextmanager
def refused(folder):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        yield error
    assert str(folder) in str(error.value)


def load_or_refuse(load, folder):
    """What ``load`` gives, None if it refuses as it should; fails for other errors and for memory out of proportion."""
    tracemalloc.start()
    try:
        return load()
    except (ValueError, FileNotFoundError) as error:
        assert str(folder) in str(error), f"{error} does not name {folder}"
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MOST_BYTES, f"{peak:,} bytes"


def assert_sound(projections: Projections) -> None:
    """What was accepted must be finite, float32, and cover the model it says it is for."""
    for basis in projections.bases:
        for name in ("down_proj", "up_proj", "offset", "loss", "constant"):
            tensor = getattr(basis, name)
            assert tensor.dtype == torch.float32 and bool(torch.isfinite(tensor).all())
        assert basis.rank_weight is None or math.isfinite(basis.rank_weight)
    assert projections.frame_length >= 1 and math.isfinite(projections.min_compression_ratio)
    Projections(projections.bases, projections.shape, method=projections.method)


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**63, 10**12, 10**30, -1, float("nan"), float("inf"), 1e308]),
    st.sampled_from(["", "0", "../../etc/passwd", "projections.safetensors", "value", "both", "9" * 5000]),
    st.just([]),
    st.just({}),
    st.just([[[]]]),
    st.just([0, 0]),
)


def places(node, path=()):
    """Paths of every value inside JSON data."""
    yield path
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from places(value, (*path, key))


def change(config, path, kind, value):
    """``config`` with the value at ``path`` replaced, removed or doubled."""
    if not path:
        return value
    parent = config
    for key in path[:-1]:
        parent = parent[key]
    if kind == "remove":
        del parent[path[-1]]
    elif kind == "double" and isinstance(parent, list):
        parent.append(parent[path[-1]])
    else:
        parent[path[-1]] = value
    return config


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), kind=st.sampled_from(["replace", "remove", "double"]), value=ANYTHING)
def test_a_config_of_another_structure(saved, victim, where, kind, value):
    config = json.loads((saved / CONFIG_FILE).read_text())
    paths = [path for path in places(config) if path[:1] not in (("provenance",), ("config_sha256",))]
    seal(victim, change(config, paths[int(where * len(paths))], kind, value))
    loaded = load_or_refuse(lambda: Projections.from_pretrained(victim), victim)
    if loaded is not None:
        assert_sound(loaded)


DAMAGE = ["nan", "inf", "drop", "rename", "short", "int", "half", "double", "flat", "empty", "scalar"]


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.integers(0, 10**6),
    damage=st.sampled_from(
        ["nan", "inf", "drop", "rename", "short", "int", "half", "double", "flat", "empty", "scalar"]
    ),
)
def test_tensors_of_another_kind(saved, victim, name, damage):
    tensors = load_file(saved / TENSOR_FILE)
    name = sorted(tensors)[name % len(tensors)]
    tensor = tensors[name].clone()
    if damage in ("nan", "inf"):
        tensor.view(-1)[-1] = float(damage)
    made = {
        "short": lambda: tensor[:-1],
        "int": lambda: tensor.to(torch.int32),
        "half": tensor.half,
        "double": tensor.double,
        "flat": lambda: tensor.flatten(),
        "empty": lambda: tensor[:0],
        "scalar": lambda: tensor.sum(),
    }
    tensors[name] = made[damage]() if damage in made else tensor
    if damage in ("drop", "rename"):
        taken = tensors.pop(name)
        if damage == "rename":
            tensors[f"../{name}"] = taken
    seal(victim, tensors=save({key: value.contiguous() for key, value in tensors.items()}))
    loaded = load_or_refuse(lambda: Projections.from_pretrained(victim), victim)
    assert loaded is None or (damage == "flat" and tensor.dim() == 1), f"{damage} of {name} was accepted"


HEADERS = [
    struct.pack("<Q", 2**63) + b"{}",
    struct.pack("<Q", 2**40) + b"{}",
    struct.pack("<Q", 10) + b"[" * 10,
    struct.pack("<Q", 100_000) + b"[" * 100_000,
    b'\x4d\0\0\0\0\0\0\0{"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,4611686018427]}}',
    b'\x3d\0\0\0\0\0\0\0{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,999999999]}}',
    b"",
    b"PK\x03\x04",
    pickle.dumps({"a": 1}),
]


@pytest.mark.parametrize("payload", HEADERS, ids=range(len(HEADERS)))
def test_headers_that_lie(victim, moments, tmp_path, payload):
    seal(victim, tensors=payload)
    assert load_or_refuse(lambda: Projections.from_pretrained(victim), victim) is None
    path = tmp_path / "m.safetensors"
    path.write_bytes(payload)
    assert load_or_refuse(lambda: Moments.load(path), path) is None


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=4))
def test_flipped_bits_in_the_header_of_tensors(saved, victim, moments, tmp_path, flips):
    for path, load in (
        (victim, lambda: Projections.from_pretrained(victim)),
        (tmp_path / "m.safetensors", lambda: Moments.load(tmp_path / "m.safetensors")),
    ):
        payload = bytearray((moments if path != victim else saved / TENSOR_FILE).read_bytes())
        header = 8 + struct.unpack("<Q", payload[:8])[0]
        for where, bit in flips:
            payload[int(where * header)] ^= 1 << bit
        if path == victim:
            seal(victim, tensors=bytes(payload))
        else:
            path.write_bytes(payload)
        loaded = load_or_refuse(load, path)
        if isinstance(loaded, Projections):
            assert_sound(loaded)


def test_nothing_is_unpickled(victim, tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").touch, ())

    seal(victim, tensors=pickle.dumps(Trap()))
    (victim / "projections.bin").write_bytes(pickle.dumps(Trap()))
    (victim / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    with refused(victim):
        Projections.from_pretrained(victim)
    path = tmp_path / "moments.safetensors"
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="holds no readable moments"):
        Moments.load(path)
    assert not (tmp_path / "sprung").exists()


def test_a_config_cannot_name_another_file(victim, tmp_path):
    shutil.move(victim / TENSOR_FILE, tmp_path / "elsewhere.safetensors")
    config = json.loads((victim / CONFIG_FILE).read_text())
    for key in ("tensor_file", "weight_map", "tensors"):
        config[key] = "../elsewhere.safetensors"
    config["config_sha256"] = config_digest(config)
    (victim / CONFIG_FILE).write_text(json.dumps(config))
    with refused(victim):
        Projections.from_pretrained(victim)


def test_links_are_followed_as_the_hub_needs(victim, tmp_path):
    """A snapshot of the hub consists of links to files with other names in another folder."""
    for name in (CONFIG_FILE, TENSOR_FILE):
        shutil.move(victim / name, tmp_path / f"blob-{name}")
        (victim / name).symlink_to(tmp_path / f"blob-{name}")
    assert_sound(Projections.from_pretrained(victim))
    (victim / TENSOR_FILE).unlink()
    (victim / TENSOR_FILE).symlink_to("/dev/zero")  # which would never end
    with refused(victim):
        Projections.from_pretrained(victim)


# A disk that fills while something is saved


FULL = OSError(errno.ENOSPC, "No space left on device")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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
    moments = Moments.load(moments)
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
    save = Moments.load(moments).save if kind == "moments" else full_rank_projections("llama", 1, 1).save_pretrained
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
