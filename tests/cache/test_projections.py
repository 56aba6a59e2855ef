"""Projections: saved and loaded bit by bit, closed to damage of any kind, and truncated to a ratio."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowrank_cache import LowRankCache, Projections
from lowrank_cache.calibration import calibrate
from lowrank_cache.projections import ARTEFACT
from tests.oracle.models import full_rank_projections, random_tokens, tiny_model

CONFIG_FILE, TENSOR_FILE = ARTEFACT.config_file, ARTEFACT.tensor_file

SIZES = {"residual_length": 4, "num_sink_tokens": 2, "block_size": 4}
TENSORS = ("down_proj", "up_proj", "offset", "loss", "constant")


def identical(one, other):
    """Whether two ``Projections`` are equal in every bit of every tensor and in every fact."""
    if len(one.bases) != len(other.bases) or one.shape != other.shape:
        return False
    if (one.method, one.frame_length, one.provenance) != (other.method, other.frame_length, other.provenance):
        return False
    for mine, theirs in zip(one.bases, other.bases, strict=True):
        if (mine.side, mine.layers, mine.heads, mine.rank_weight) != (
            theirs.side,
            theirs.layers,
            theirs.heads,
            theirs.rank_weight,
        ):
            return False
        for name in TENSORS:
            a, b = getattr(mine, name), getattr(theirs, name)
            if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a.view(torch.int32), b.view(torch.int32)):
                return False
    return True


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    full_rank_projections("llama", 4, 2).save_pretrained(folder)
    return folder


@pytest.fixture
def copy_of_saved(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


@pytest.mark.parametrize("family", ["llama", "gemma3", "deepseek-v3"])
@pytest.mark.parametrize("method", ["fisher", "palu", "recalkv"])
def test_round_trip(tmp_path, family, method):
    made = calibrate(
        tiny_model(family),
        [random_tokens(4, 20)],
        method=method,
        frame_length=4,
        layer_group_size=2 if method == "fisher" else 1,
        progress=False,
    )
    made.save_pretrained(tmp_path / "new" / "folder")
    for path in (tmp_path / "new" / "folder", str(tmp_path / "new" / "folder")):
        assert identical(Projections.from_pretrained(path), made)


def test_saving_writes_a_model_card_and_nothing_stray(saved):
    assert sorted(path.name for path in saved.iterdir()) == sorted(["README.md", CONFIG_FILE, TENSOR_FILE])
    card = ModelCard.load(saved / "README.md")
    assert card.data.library_name == "lowrank-cache"
    assert "kv-cache" in card.data.tags
    loaded = Projections.from_pretrained(saved)
    assert f"method `{loaded.method}`" in card.text and "from 1x on" in card.text
    assert all(f"- {name}: {fact}\n" in f"{card.text}\n" for name, fact in loaded.provenance.items())
    assert "More Information Needed" not in card.text


def test_saving_twice_gives_the_same_bytes(saved, tmp_path):
    Projections.from_pretrained(saved).save_pretrained(tmp_path)
    for name in (CONFIG_FILE, TENSOR_FILE):
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()


@pytest.mark.parametrize("missing", [CONFIG_FILE, TENSOR_FILE])
def test_a_missing_file(copy_of_saved, missing):
    (copy_of_saved / missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no projections: {missing} is missing"):
        Projections.from_pretrained(copy_of_saved)


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -1])
def test_truncated_tensors(copy_of_saved, kept):
    path = copy_of_saved / TENSOR_FILE
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"{TENSOR_FILE} is damaged: its SHA-256 is .*{CONFIG_FILE} expects"):
        Projections.from_pretrained(copy_of_saved)


def test_one_flipped_bit(copy_of_saved):
    path = copy_of_saved / TENSOR_FILE
    payload = bytearray(path.read_bytes())
    payload[len(payload) // 2] ^= 1
    path.write_bytes(payload)
    with pytest.raises(ValueError, match="is damaged: its SHA-256 is"):
        Projections.from_pretrained(copy_of_saved)


@pytest.mark.parametrize(
    "edit",
    [
        lambda config: config.update(frame_length=1),
        lambda config: config.update(method="palu"),
        lambda config: config["model_shape"].update(model_type="mistral"),
        lambda config: config["bases"][0].update(layers=[1, 0]),
        lambda config: config["bases"].pop(),
        lambda config: config.update(tensors_sha256="0" * 64),
        lambda config: config["provenance"].update(base_model="other"),
    ],
)
def test_an_edited_config(copy_of_saved, edit):
    path = copy_of_saved / CONFIG_FILE
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{CONFIG_FILE} is damaged or was edited"):
        Projections.from_pretrained(copy_of_saved)


def test_another_layout_of_the_same_config_is_fine(saved, copy_of_saved):
    path = copy_of_saved / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    assert identical(Projections.from_pretrained(copy_of_saved), Projections.from_pretrained(saved))


@pytest.mark.parametrize("version", [0, 99, "1", None])
def test_another_format_version(copy_of_saved, version):
    path = copy_of_saved / CONFIG_FILE
    config = json.loads(path.read_text())
    config["format_version"] = version
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"has format version {version}, and this release reads version"):
        Projections.from_pretrained(copy_of_saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", "[" * 100_000, '{"format_version": 1}', "\ud800"])
def test_a_config_that_is_none(copy_of_saved, text):
    (copy_of_saved / CONFIG_FILE).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=str(copy_of_saved)):
        Projections.from_pretrained(copy_of_saved)


def test_an_unknown_argument(saved):
    with pytest.raises(TypeError, match="subfolder"):
        Projections.from_pretrained(saved, subfolder="x")


def test_an_unknown_place_offline(tmp_path):
    with pytest.raises((OSError, ValueError)):
        Projections.from_pretrained("nobody/nothing-at-all", cache_dir=tmp_path, local_files_only=True)


mutations = st.one_of(
    st.tuples(st.just("set"), st.floats(0, 1, exclude_max=True), st.integers(0, 255)),
    st.tuples(st.just("cut"), st.floats(0, 1, exclude_max=True), st.integers(1, 64)),
    st.tuples(st.just("insert"), st.floats(0, 1, exclude_max=True), st.integers(0, 255)),
    st.tuples(st.just("double"), st.floats(0, 1, exclude_max=True), st.integers(1, 64)),
)


def mutate(payload: bytes, kind: str, where: float, what: int) -> bytes:
    at = int(where * len(payload))
    if kind == "set":
        return payload[:at] + bytes([what]) + payload[at + 1 :]
    if kind == "cut":
        return payload[:at] + payload[at + what :]
    if kind == "insert":
        return payload[:at] + bytes([what]) + payload[at:]
    return payload[: at + what] + payload[at:]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from([CONFIG_FILE, TENSOR_FILE]), steps=st.lists(mutations, min_size=1, max_size=3))
def test_no_mutation_loads_other_projections(saved, copy_of_saved, name, steps):
    original = (saved / name).read_bytes()
    mutated = original
    for step in steps:
        mutated = mutate(mutated, *step)
    (copy_of_saved / name).write_bytes(mutated)
    try:
        loaded = Projections.from_pretrained(copy_of_saved)
    except (ValueError, FileNotFoundError):
        pass
    else:
        assert name == CONFIG_FILE or mutated == original
        assert identical(loaded, Projections.from_pretrained(saved))
    finally:
        (copy_of_saved / name).write_bytes(original)


# Truncated to a ratio: the same cache, in less memory.


@pytest.mark.parametrize("frame_length", [1, 4])
@pytest.mark.parametrize("ratio", [2.0, 5.0, 9.0])
def test_a_truncated_artefact_gives_the_same_logits(ratio, frame_length):
    model = tiny_model("qwen2")
    projections = full_rank_projections("qwen2", frame_length)
    truncated = projections.truncate(ratio)
    assert truncated.nbytes < projections.nbytes or ratio == 2  # random weights: every channel is kept at 2x
    tokens = random_tokens(2, 40)
    logits = []
    for bases in (projections, truncated):
        cache = LowRankCache(model, bases, compression_ratio=ratio, **SIZES)
        with torch.no_grad():
            model(tokens[:, :30], past_key_values=cache)
            logits.append(model(tokens[:, 30:], past_key_values=cache).logits)
    # Dropped channels are read as a constant that is summed in another order: rounding only.
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)


def test_a_truncated_artefact_serves_larger_ratios_and_refuses_smaller_ones():
    model, truncated = tiny_model("llama"), full_rank_projections("llama").truncate(4)
    assert LowRankCache(model, truncated, compression_ratio=6).target_compression_ratio == 6
    with pytest.raises(ValueError, match="at least 4, for which these projections were truncated, got 3"):
        LowRankCache(model, truncated, compression_ratio=3)


def test_loading_at_a_ratio_keeps_only_what_the_ratio_needs(tmp_path):
    projections = full_rank_projections("llama", 1, 3)
    projections.save_pretrained(tmp_path / "full")
    loaded = Projections.from_pretrained(tmp_path / "full", compression_ratio=5)
    expected = projections.truncate(5)
    assert loaded.nbytes == expected.nbytes < 0.7 * projections.nbytes
    for one, other in zip(loaded.bases, expected.bases, strict=True):
        assert torch.equal(one.down_proj, other.down_proj)
    loaded.save_pretrained(tmp_path / "small")
    assert Projections.from_pretrained(tmp_path / "small").min_compression_ratio == 5


def test_neither_loading_nor_making_a_cache_decomposes_anything(tmp_path, monkeypatch):
    """All that is slow was done by calibration: a cache only chooses channels."""
    full_rank_projections("llama").save_pretrained(tmp_path)

    def refuse(*args, **kwargs):
        raise AssertionError("a decomposition at load")

    for name in ("eigh", "eigvalsh", "svd", "svdvals", "qr", "cholesky", "inv", "lstsq", "solve"):
        monkeypatch.setattr(torch.linalg, name, refuse)
    loaded = Projections.from_pretrained(tmp_path, compression_ratio=4)
    assert LowRankCache(tiny_model("llama"), loaded, compression_ratio=5).projection_bytes() > 0
