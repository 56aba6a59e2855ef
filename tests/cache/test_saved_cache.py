"""A saved cache: loaded elsewhere it goes on bit by bit as the original would; nothing else is ever loaded."""

import copy
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicIndexedLayer

from lowrank_cache import LowRankCache, Projections
from lowrank_cache.artefact import config_digest
from lowrank_cache.saved_cache import ARTEFACT
from tests.cache.test_projections import mutate, mutations
from tests.oracle.inside import first_real, forbid_reconstruction
from tests.oracle.models import SMALL_SIZES, full_rank_projections, random_tokens, tiny_model
from tests.oracle.states import saved_facts, saved_tensors

CONFIG_FILE = ARTEFACT.config_file

PROMPT, MORE = 26, 5


def prompt(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask; the first and the last row are left-padded, by different lengths."""
    tokens, mask = random_tokens(batch, PROMPT), torch.ones(batch, PROMPT, dtype=torch.long)
    mask[0, :5] = 0
    mask[-1, :2] = 0
    return tokens, mask


def read(model: PreTrainedModel, cache: LowRankCache, tokens: torch.Tensor, mask: torch.Tensor, new: int = 1):
    """Tokens with ``new`` generated ones, and the logits of these."""
    made = model.generate(
        tokens,
        attention_mask=torch.cat([mask, mask.new_ones(len(mask), tokens.shape[1] - mask.shape[1])], dim=1),
        past_key_values=cache,
        max_new_tokens=new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return made.sequences, torch.stack(made.logits)


def assert_goes_on_alike(one, other, tokens, mask) -> None:
    """Both ``(model, cache)`` read the same further tokens; several at once, then one by one."""
    tokens = torch.cat([tokens, random_tokens(len(tokens), MORE, seed=8)], dim=1)
    assert torch.equal(read(*one, tokens, mask, new=8)[1], read(*other, tokens, mask, new=8)[1])


def projections_of(family: str) -> Projections:
    return full_rank_projections(family, 4, 2)


def make(model: PreTrainedModel, family: str, method: str | None = None, **options) -> LowRankCache:
    options = {"compression_ratio": 3, **SMALL_SIZES, **options}
    return LowRankCache(model, None if method else projections_of(family), method=method, **options)


def load(folder, family: str, method: str | None = None, model=None) -> tuple[PreTrainedModel, LowRankCache]:
    model = model or tiny_model(family)
    return model, LowRankCache.from_pretrained(folder, model, None if method else projections_of(family))


# Each has a state that the others have not: frequencies that change, sliding, convolutions, recurrent states, MLA.
@pytest.mark.parametrize("family", ["llama-dynamic", "gemma3", "lfm2", "qwen3-next", "falcon-h1", "deepseek-v3"])
def test_goes_on_as_the_original_would(tmp_path, family):
    model = tiny_model(family)
    cache = make(model, family)
    tokens, mask = prompt()
    tokens, _ = read(model, cache, tokens, mask, new=3)
    assert all(group.tokens for group in cache.groups())
    cache.save_pretrained(tmp_path)
    assert_goes_on_alike((model, cache), load(tmp_path, family), tokens, mask)


@pytest.mark.parametrize("family, options", [
    ("llama", {"new_tokens": "exact"}), ("deepseek-v3", {"ranks": 6, "bits": 8}), ("gpt-oss", {})
])  # fmt: skip
def test_bases_of_a_prompt_are_saved_with_it(tmp_path, family, options):
    model = tiny_model(family)
    cache = make(model, family, "xkv", **options)
    tokens, mask = prompt()
    tokens, _ = read(model, cache, tokens, mask)
    assert any(group.tokens for group in cache.groups())
    cache.save_pretrained(tmp_path)
    assert_goes_on_alike((model, cache), load(tmp_path, family, "xkv"), tokens, mask)


@pytest.mark.parametrize("options", [
    {"ranks": {0: (7, 9), 2: (4, 5)}}, {"ranks": 6, "bits": 4}, {"latent_dtype": None, "compression_ratio": 1},
    {"num_sink_tokens": 0}, {"residual_length": 0, "latent_dtype": torch.bfloat16},
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_setting_is_kept(tmp_path, options, dtype):
    model = tiny_model("llama", dtype)
    cache = make(model, "llama", **options)
    tokens, mask = prompt()
    tokens, _ = read(model, cache, tokens, mask)
    cache.save_pretrained(tmp_path)
    loaded = load(tmp_path, "llama", model=tiny_model("llama", dtype))
    assert saved_facts(loaded[1])["settings"] == saved_facts(cache)["settings"]
    assert loaded[1].target_compression_ratio == cache.target_compression_ratio
    assert_goes_on_alike((model, cache), loaded, tokens, mask)


def test_attends_to_latents_after_loading_unless_told_otherwise(tmp_path, monkeypatch):
    model = tiny_model("llama")
    cache = make(model, "llama")
    tokens, mask = prompt()
    tokens, _ = read(model, cache, tokens, mask)
    cache.save_pretrained(tmp_path)
    other = load(tmp_path, "llama")
    reconstructed = LowRankCache.from_pretrained(tmp_path, model, projections_of("llama"), attend="reconstruct")
    forbid_reconstruction(monkeypatch)
    assert_goes_on_alike((model, cache), other, tokens, mask)
    with pytest.raises(TypeError, match="not callable"):
        read(model, reconstructed, tokens, mask)


@pytest.mark.parametrize("change", [
    lambda cache: cache.crop(-1), lambda cache: cache.crop(-12), lambda cache: cache.crop(-PROMPT + 1),
    lambda cache: cache.reorder_cache(torch.tensor([2, 2, 0])),
    lambda cache: cache.batch_select_indices(torch.tensor([1, 1, 1])),
])  # fmt: skip
@pytest.mark.parametrize("method", [None, "xkv"])
def test_after_the_cache_was_changed(tmp_path, change, method):
    model = tiny_model("llama")
    cache = make(model, "llama", method)
    tokens = random_tokens(3, PROMPT + 1)
    mask = torch.ones_like(tokens)
    read(model, cache, tokens, mask)
    change(cache)
    cache.save_pretrained(tmp_path)
    tokens = tokens[:, : cache.get_seq_length()]
    assert_goes_on_alike((model, cache), load(tmp_path, "llama", method), tokens, mask[:, : tokens.shape[1]])


@pytest.mark.parametrize("length", [1, 2, 3, 8])
def test_prompts_so_short_that_nothing_is_a_latent(tmp_path, length):
    model = tiny_model("gemma3")
    cache = make(model, "gemma3")
    tokens = random_tokens(2, length)
    with torch.no_grad():
        model(tokens, past_key_values=cache)
    cache.save_pretrained(tmp_path)
    assert_goes_on_alike((model, cache), load(tmp_path, "gemma3"), tokens, torch.ones_like(tokens))


def test_a_row_that_is_padding_so_far(tmp_path):
    model = tiny_model("llama")
    cache = make(model, "llama")
    tokens, mask = random_tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0] = 0
    mask[0, -1:] = 0
    with torch.no_grad():
        model(tokens, attention_mask=mask, past_key_values=cache, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    cache.save_pretrained(tmp_path)
    other = load(tmp_path, "llama")
    assert torch.equal(first_real(other[1]), first_real(cache))
    assert_goes_on_alike((model, cache), other, tokens, mask)


def test_the_original_is_not_touched_and_a_loaded_cache_is_whole(tmp_path, saved):
    model, first = load(saved.folder, "llama")
    tokens, mask = saved.tokens, saved.mask
    first.save_pretrained(tmp_path)
    other, second = load(tmp_path, "llama")
    for name in sorted(path.name for path in saved.folder.iterdir()):
        assert (tmp_path / name).read_bytes() == (saved.folder / name).read_bytes()
    copied = copy.deepcopy(second)
    second.reset()
    assert second.get_seq_length() == 0 and copied.get_seq_length() == first.get_seq_length()
    assert_goes_on_alike((model, first), (other, copied), tokens, mask)


class Saved:
    """A saved cache of tiny llama and what made it."""

    def __init__(self, folder):
        self.folder = folder
        self.model = tiny_model("llama")
        self.cache = make(self.model, "llama")
        tokens, self.mask = prompt()
        self.tokens, self.logits = read(self.model, self.cache, tokens, self.mask)
        self.cache.save_pretrained(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return Saved(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved.folder, tmp_path / "copy")


def test_another_process(saved, tmp_path):
    saved.model.save_pretrained(tmp_path / "model")
    projections_of("llama").save_pretrained(tmp_path / "projections")
    tokens = torch.cat([saved.tokens, random_tokens(3, MORE, seed=8)], dim=1)
    torch.save((tokens, saved.mask), tmp_path / "tokens.pt")
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
from lowrank_cache import LowRankCache, Projections
from tests.cache.test_saved_cache import read
folder, work = sys.argv[1:]
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(f"{work}/model")
model.generation_config.pad_token_id = 0
cache = LowRankCache.from_pretrained(folder, model, Projections.from_pretrained(f"{work}/projections"))
cache.save_pretrained(f"{work}/again")
torch.save(read(model, cache, *torch.load(f"{work}/tokens.pt"), new=8)[0], f"{work}/read.pt")
"""
    command = [sys.executable, "-c", code, str(saved.folder), str(tmp_path)]
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    environment = {**os.environ, "PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert tensor_file(tmp_path / "again").read_bytes() == tensor_file(saved.folder).read_bytes()
    assert facts_of(tmp_path / "again")["base_model"] == "model", "a folder's whole path is nobody's business"
    expected = read(saved.model, copy.deepcopy(saved.cache), tokens, saved.mask, new=8)[0]
    assert torch.equal(torch.load(tmp_path / "read.pt"), expected)


def test_small_enough_to_ship(saved):
    """The file holds the rows in use: no more than the cache without its room to grow, and a header."""
    files = {path.name: path.stat().st_size for path in saved.folder.iterdir()}
    assert len(files) == 2 and CONFIG_FILE in files
    payload = sum(size for name, size in files.items() if name != CONFIG_FILE)
    used = sum(tensor.nbytes for tensor in saved_tensors(saved.cache).values())
    assert used < payload < used + 8192
    assert used < 0.9 * saved.cache.stored_bytes()


def test_facts_say_what_it_is(saved):
    facts = json.loads((saved.folder / CONFIG_FILE).read_text())
    assert facts["format_version"] == 1 and facts["library_version"]
    assert (facts["batch"], facts["tokens"], facts["model_type"]) == (3, saved.cache.get_seq_length(), "llama")
    assert facts["settings"]["compression_ratio"] == 3 and facts["settings"]["latent_dtype"] == "float16"
    used = sum(tensor.nbytes for tensor in saved_tensors(saved.cache).values())
    assert facts["compression_ratio"] == saved.cache.full_bytes() / used


# What is refused


def test_projections_truncated_for_the_ratio_will_do(saved, tmp_path):
    projections = projections_of("llama").truncate(3)
    cache = LowRankCache.from_pretrained(saved.folder, saved.model, projections)
    assert cache.get_seq_length() == saved.cache.get_seq_length()


@pytest.mark.parametrize("other", [
    lambda: full_rank_projections("llama", 1, 2), lambda: full_rank_projections("llama", 4, 2, joint=False),
    lambda: full_rank_projections("llama", 1, 1, method="palu"),
])  # fmt: skip
def test_other_projections(saved, other):
    with pytest.raises(ValueError, match="projections must be those that made the cache|ranks|damaged"):
        LowRankCache.from_pretrained(saved.folder, saved.model, other())


def test_projections_where_none_belong_and_none_where_they_do(saved, tmp_path):
    with pytest.raises(ValueError, match="projections must be those that made this cache, got None"):
        LowRankCache.from_pretrained(saved.folder, saved.model)
    with pytest.raises(TypeError, match="projections must be Projections, a folder or a repository, got int"):
        LowRankCache.from_pretrained(saved.folder, saved.model, 5)
    cache = make(saved.model, "llama", "xkv")
    read(saved.model, cache, *prompt())
    cache.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="projections must be None, for xkv made this cache"):
        LowRankCache.from_pretrained(tmp_path, saved.model, projections_of("llama"))


def test_another_model(saved):
    for family in ("qwen3", "deepseek-v3"):
        with pytest.raises(ValueError, match=rf"does not belong to this model: .*\(llama\) made it.*{family[:4]}"):
            LowRankCache.from_pretrained(saved.folder, tiny_model(family), projections_of(family))


@pytest.mark.parametrize("theta", [9e3, 1e6])
def test_other_rotary_frequencies(saved, theta):
    model, _ = load(saved.folder, "llama")
    rotary = model.model.rotary_emb
    rotary.inv_freq = 1.0 / theta ** (torch.arange(0, 16, 2) / 16)
    before = [*sorted(saved.folder.iterdir())]
    with pytest.raises(
        ValueError, match="the rotary frequencies that made .* must be this model's, and differ by up to"
    ):
        load(saved.folder, "llama", model=model)
    assert before == [*sorted(saved.folder.iterdir())]


def test_another_dtype(saved):
    model = tiny_model("llama", torch.bfloat16)
    with pytest.raises(ValueError, match=r"sinks.0 must be torch.bfloat16 of shape .*, got torch.float32"):
        LowRankCache.from_pretrained(saved.folder, model, projections_of("llama"))


def test_an_empty_cache(tmp_path):
    with pytest.raises(ValueError, match="must hold at least one token to be saved, got an empty cache"):
        make(tiny_model("llama"), "llama").save_pretrained(tmp_path / "empty")
    assert not (tmp_path / "empty").exists()


def test_layers_of_an_unknown_kind(tmp_path):
    model = tiny_model("gemma3")
    cache = make(model, "gemma3")
    read(model, cache, *prompt())
    cache.layers[1] = DynamicIndexedLayer()
    with pytest.raises(NotImplementedError, match="layer 1 is a DynamicIndexedLayer"):
        cache.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_failed_forward_is_undone_first(saved, tmp_path):
    model = tiny_model("llama")
    cache = copy.deepcopy(load(saved.folder, "llama", model=model)[1])
    handle = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        read(model, cache, torch.cat([saved.tokens, random_tokens(3, 2)], 1), saved.mask)
    handle.remove()
    cache.save_pretrained(tmp_path)
    assert_goes_on_alike(load(saved.folder, "llama"), load(tmp_path, "llama"), saved.tokens, saved.mask)


@pytest.mark.parametrize("broken", ["fsync", "replace"])
@pytest.mark.parametrize("call", [1, 2])
def test_a_full_disk_leaves_the_older_cache(saved, copied, monkeypatch, broken, call):
    model, cache = load(saved.folder, "llama")
    cache.crop(-3)
    before = sorted(path.name for path in copied.iterdir())
    original, calls = getattr(os, broken), []

    def fail(*args):
        calls.append(args)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        return original(*args)

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="No space left"):
        cache.save_pretrained(copied)
    monkeypatch.undo()
    assert set(before) <= {path.name for path in copied.iterdir()}
    assert not [path for path in copied.iterdir() if path.name.startswith(".")], "temporary files stay behind"
    assert load(copied, "llama")[1].get_seq_length() == saved.cache.get_seq_length()
    cache.save_pretrained(copied)
    assert load(copied, "llama")[1].get_seq_length() == saved.cache.get_seq_length() - 3
    assert len(list(copied.iterdir())) == 2, "the older cache's tensors stay behind"


def tensor_file(folder):
    (path,) = folder.glob("*.safetensors")
    return path


def resign(folder, facts: dict, payload: bytes | None = None) -> None:
    """Write facts, and tensors if given, with digests that are right."""
    if payload is not None:
        tensor_file(folder).unlink()
        facts["tensors_sha256"] = hashlib.sha256(payload).hexdigest()
        (folder / f"lowrank_cache-{facts['tensors_sha256'][:16]}.safetensors").write_bytes(payload)
    facts["config_sha256"] = config_digest(facts)
    (folder / CONFIG_FILE).write_text(json.dumps(facts))


def facts_of(folder) -> dict:
    return json.loads((folder / CONFIG_FILE).read_text())


def test_missing_files(copied, tmp_path):
    tensor_file(copied).unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no saved cache: lowrank_cache-\w+.safetensors is missing"):
        load(copied, "llama")
    (copied / CONFIG_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=f"holds no saved cache: {CONFIG_FILE} is missing"):
        load(copied, "llama")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_version(copied, version):
    resign(copied, {**facts_of(copied), "format_version": version})
    with pytest.raises(ValueError, match=f"has format version {version}, and this release reads version 1"):
        load(copied, "llama")


def test_a_pickle_is_never_opened(copied):
    class Attack:
        def __reduce__(self):
            return (open, (str(copied / "opened"), "w"))

    resign(copied, facts_of(copied), pickle.dumps(Attack()))
    with pytest.raises(ValueError, match="holds a damaged cache: SafetensorError"):
        load(copied, "llama")
    assert not (copied / "opened").exists()


@pytest.mark.parametrize("digest", ["../" * 21 + "x", "/etc/passwd", "A" * 64, "", None, ["0" * 64]])
def test_names_from_the_file_are_not_followed(copied, digest):
    resign(copied, {**facts_of(copied), "tensors_sha256": digest})
    with pytest.raises(ValueError, match="tensors_sha256 of .* must be 64 hexadecimal digits"):
        load(copied, "llama")


def test_edited_without_a_digest(copied):
    facts = facts_of(copied)
    facts["settings"]["compression_ratio"] = 4
    (copied / CONFIG_FILE).write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="is damaged or was edited"):
        load(copied, "llama")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", "[" * 100_000, '{"format_version": 1}', "\ud800"])
def test_a_config_that_is_none(copied, text):
    (copied / CONFIG_FILE).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=str(copied)):
        load(copied, "llama")


@pytest.mark.parametrize("edit, message", [
    (lambda facts: facts.update(tokens=facts["tokens"] + 1), "positions must be"),
    (lambda facts: facts.update(batch=0), "batch must be an integer of at least 1, got 0"),
    (lambda facts: facts["stores"][0].update(encoded=10_000), "store.0.encoded must be an integer from 0 to"),
    (lambda facts: facts["stores"][0].update(encoded=facts["stores"][0]["encoded"] - 3), "must be torch"),
    (lambda facts: facts["stores"].pop(), "stores and other_layers must be those"),
    (lambda facts: facts["settings"].update(residual_length=-1), "residual_length must be"),
    (lambda facts: facts["settings"].update(num_sink_tokens=3), "must be"),
    (lambda facts: facts["settings"].update(compression_ratio=5), "projections must be those that made the cache"),
    (lambda facts: facts["settings"].update(latent_dtype="float8"), "damaged cache: AttributeError"),
    (lambda facts: facts["frequencies"].clear(), "frequencies must be of"),
    (lambda facts: next(iter(facts["frequencies"].values())).append(5), "frequencies.* is missing"),
    (lambda facts: facts["other_layers"].update({"1": {"kind": "DummyLayer"}}), "stores and other_layers"),
])  # fmt: skip
def test_facts_that_do_not_fit_the_tensors(copied, edit, message):
    facts = facts_of(copied)
    edit(facts)
    resign(copied, facts)
    with pytest.raises(ValueError, match=message):
        load(copied, "llama")


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 2**70), st.floats(), st.text(max_size=4), st.just([]), st.just({})
)


def replaced(node, path: list[float], leaf):
    """``node`` with the part at ``path`` replaced; fractions choose keys."""
    if not path or not isinstance(node, dict | list) or not node:
        return leaf
    key = (sorted(node) if isinstance(node, dict) else range(len(node)))[int(path[0] * len(node))]
    changed = copy.copy(node)
    changed[key] = replaced(node[key], path[1:], leaf)
    return changed


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4), leaf=LEAVES)
def test_no_signed_nonsense_raises_anything_else(saved, copied, path, leaf):
    facts = replaced(facts_of(saved.folder), path, leaf)
    resign(copied, facts)
    try:
        load(copied, "llama", model=saved.model)
    except (ValueError, FileNotFoundError):
        pass


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=st.booleans(), signed=st.booleans(), steps=st.lists(mutations, min_size=1, max_size=3))
def test_no_mutation_loads_another_cache(saved, copied, config, signed, steps):
    path = copied / CONFIG_FILE if config else tensor_file(copied)
    original = mutated = path.read_bytes()
    for step in steps:
        mutated = mutate(mutated, *step)
    if signed and not config:
        resign(copied, facts_of(copied), mutated)
    else:
        path.write_bytes(mutated)
    try:
        loaded = load(copied, "llama", model=saved.model)
    except (ValueError, FileNotFoundError):
        pass
    else:
        assert config or signed or mutated == original
        if not signed:
            one, other = (saved_tensors(cache) for cache in (loaded[1], saved.cache))
            assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    finally:
        shutil.rmtree(copied)
        shutil.copytree(saved.folder, copied)


# The hub


def test_pushed_and_loaded_from_a_repository(saved, tmp_path, monkeypatch):
    calls = {}

    class Api:
        def __init__(self, token=None):
            calls["token"] = token

        def create_repo(self, repo_id, private=None, exist_ok=False):
            calls["repo"] = (repo_id, private, exist_ok)
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, *, repo_id, folder_path, delete_patterns, **options):
            shutil.copytree(folder_path, tmp_path / "hub")
            calls["upload"] = (repo_id, delete_patterns, options)
            return "commit"

    monkeypatch.setattr("lowrank_cache.artefact.HfApi", Api)
    monkeypatch.setattr(
        "lowrank_cache.artefact.snapshot_download",
        lambda name, allow_patterns, **options: calls.setdefault("download", (name, options)) and tmp_path / "hub",
    )
    assert saved.cache.push_to_hub("me/prompt", private=True, token="t", commit_message="one") == "commit"
    assert calls["repo"] == ("me/prompt", True, True) and calls["token"] == "t"
    assert calls["upload"] == ("me/prompt", ["lowrank_cache-*.safetensors"], {"commit_message": "one"})
    card = huggingface_hub.ModelCard.load(tmp_path / "hub" / "README.md")
    assert card.data.library_name == "lowrank-cache" and 'from_pretrained("me/prompt", model, projections)' in card.text
    loaded = LowRankCache.from_pretrained("me/prompt", saved.model, projections_of("llama"), revision="v1")
    name, options = calls["download"]
    assert name == "me/prompt" and options["revision"] == "v1"
    assert loaded.get_seq_length() == saved.cache.get_seq_length()
