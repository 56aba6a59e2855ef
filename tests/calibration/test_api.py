"""``calibrate`` and ``projections_from_moments``: options, methods, what shares a latent."""

import ast
import dataclasses
from pathlib import Path

import pytest
import torch

from lowrank_cache import LowRankCache, calibration
from lowrank_cache.basis import Basis
from lowrank_cache.calibration import METHODS, Method, api, calibrate
from lowrank_cache.calibration.api import projections_from_moments
from lowrank_cache.calibration.fisher import unit_variance
from tests.calibration.test_collect import moments_of, padded_batches
from tests.oracle.models import tiny_model


def test_calibration_is_deterministic():
    first, second = (calibrate(tiny_model("llama"), padded_batches(), progress=False) for _ in range(2))
    for mine, theirs in zip(first.bases, second.bases, strict=True):
        assert torch.equal(mine.down_proj, theirs.down_proj) and torch.equal(mine.loss, theirs.loss)


def test_projections_apart_from_joint_moments_are_those_calibrated_apart():
    model, batches = tiny_model("llama"), padded_batches()
    joint = moments_of(model, batches, 3, joint=True)
    for method in ("fisher", "palu"):
        for frame_length, size in ((1, 1), (4, 2), (3, (1, 3))):
            options = {"method": method, "frame_length": frame_length, "layer_group_size": size, "joint": False}
            derived = projections_from_moments(joint, **options)
            made = calibrate(tiny_model("llama"), padded_batches(), progress=False, **options)
            assert [basis.name for basis in derived.bases] == [basis.name for basis in made.bases]
            assert {basis.side for basis in derived.bases} == {"key", "value"}
            for ours, theirs in zip(derived.bases, made.bases, strict=True):
                torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-4, atol=1e-6 * float(theirs.loss.max()))
                # Channels of nearly equal loss may come in any rotation; what they keep together may not.
                kept = [basis.down_proj.double() @ basis.up_proj.double() for basis in (ours, theirs)]
                torch.testing.assert_close(*kept, rtol=0, atol=1e-3)
                means = [basis.offset.double() @ basis.up_proj.double() for basis in (ours, theirs)]
                torch.testing.assert_close(*means, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "options, sides",
    [
        ({}, {"both"}),
        ({"layer_group_size": 2}, {"both"}),
        ({"layer_group_size": (2, 2)}, {"key", "value"}),
        ({"method": "palu"}, {"key", "value"}),
        ({"joint": False}, {"key", "value"}),
        ({"joint": True, "frame_length": 4}, {"both"}),
    ],
)
def test_keys_and_values_share_a_latent_by_default(options, sides):
    made = calibrate(tiny_model("llama"), padded_batches(), progress=False, **options)
    assert {basis.side for basis in made.bases} == sides


@pytest.mark.parametrize(
    "options, got",
    [
        ({"layer_group_size": (1, 3)}, r"got method 'fisher' and layer_group_size \(1, 3\)"),
        ({"layer_group_size": (2, 2)}, r"got method 'fisher' and layer_group_size \(2, 2\)"),
        ({"method": "palu"}, "got method 'palu' and layer_group_size 'auto'"),
        ({"method": "palu", "layer_group_size": 2}, "got method 'palu' and layer_group_size 2"),
    ],
)
def test_joint_is_refused_where_it_cannot_be(options, got):
    message = "joint=True needs method 'fisher', one layer_group_size for both sides and as many key as value heads, "
    with pytest.raises(ValueError, match=message + got):
        calibrate(tiny_model("llama"), padded_batches(), joint=True, progress=False, **options)


def unequal_heads(shape):
    """The same model with twice as many value heads of half the size."""

    def other(side):
        return dataclasses.replace(side, heads=2 * side.heads, head_dim=side.head_dim // 2)

    layers = tuple(dataclasses.replace(layer, value=other(layer.value)) for layer in shape.layers)
    return dataclasses.replace(shape, layers=layers)


def test_unequal_heads_are_kept_apart():
    moments = moments_of(tiny_model("llama"), padded_batches())
    moments.shape = unequal_heads(moments.shape)
    with pytest.raises(ValueError, match="joint=True needs .* as many key as value heads"):
        projections_from_moments(moments, layer_group_size=1, joint=True)
    made = projections_from_moments(moments, layer_group_size=1)
    assert [(basis.side, len(basis.heads)) for basis in made.bases] == [("key", 2)] * 3 + [("value", 4)] * 3


def power_bases(moments, groups, frame_length, *, power):
    """Principal components, each number weighted by a power of its own sensitivity."""
    bases = []
    for side, side_groups in groups.items():
        for group in side_groups:
            second, mean, sensitivity = moments.of_group(side, group, frame_length)
            weight = sensitivity.diagonal() ** power
            _, components = torch.linalg.eigh(weight[:, None] * second * weight)
            arrays = unit_variance(weight[:, None] * components, components.T / weight, second, mean)
            bases.append(Basis(side, group, tuple(range(moments.side(side, group).heads)), **arrays))
    return bases


def test_a_method_with_an_option_of_its_own_needs_nothing_but_its_entry(monkeypatch):
    monkeypatch.setitem(METHODS, "power", Method(power_bases, options={"power": 0.5}))
    made = {
        power: calibrate(tiny_model("llama"), padded_batches(), method="power", progress=False, **options)
        for power, options in ((0.5, {}), (0.0, {"power": 0.0}))
    }
    for power, projections in made.items():
        assert projections.method == "power" and projections.provenance["power"] == power
        assert [(basis.side, basis.layers) for basis in projections.bases] == [
            (side, (layer,)) for side in ("key", "value") for layer in range(3)
        ]
        for basis in projections.bases:
            unit = basis.down_proj.double() @ basis.up_proj.double()
            torch.testing.assert_close(unit, torch.eye(basis.width, dtype=torch.float64), rtol=0, atol=1e-3)
    assert not torch.equal(made[0.5].bases[0].down_proj, made[0.0].bases[0].down_proj)
    with pytest.raises(ValueError, match=r"layers is no option of method 'power'; .* it takes power$"):
        calibrate(tiny_model("llama"), padded_batches(), method="power", layers=2, progress=False)


def test_a_method_may_share_latents_group_layers_check_and_ask_for_a_second_pass(monkeypatch):
    given, checked = [], []

    def bases(moments, groups, frame_length, *, refitted):
        given.append(refitted)
        return METHODS["fisher"].bases(refitted or moments, groups, frame_length)

    def check(groups):
        checked.append(groups)

    mine = Method(bases, check=check, group_size=lambda shape, side: 1, refit="twice", refit_ratio=2.0)
    monkeypatch.setitem(METHODS, "mine", mine)
    made = calibrate(tiny_model("llama"), padded_batches(), method="mine", progress=False)
    assert made.provenance["twice"] and made.provenance["refit_ratio"] == 2.0
    assert given[0] is None and given[1] is not None  # the first bases compress the stream of the second pass
    assert checked and all(groups == {side: [(0,), (1,), (2,)] for side in ("key", "value")} for groups in checked)
    with pytest.raises(TypeError, match="batches must be a list for method 'mine'.*or pass twice=False"):
        calibrate(tiny_model("llama"), iter(padded_batches()), method="mine", progress=False)
    once = calibrate(tiny_model("llama"), iter(padded_batches()), method="mine", twice=False, progress=False)
    assert not once.provenance["twice"] and "refit_ratio" not in once.provenance and given[-1] is None
    joint = dataclasses.replace(mine, joint=True, refit=None, group_size=lambda shape, side: 2)
    monkeypatch.setitem(METHODS, "mine", dataclasses.replace(joint, bases=METHODS["fisher"].bases))
    shared = calibrate(tiny_model("llama"), padded_batches(), method="mine", progress=False)
    assert [(basis.side, basis.layers) for basis in shared.bases] == [("both", (0, 1)), ("both", (2,))]


@pytest.mark.parametrize(
    "method, option, takes",
    [
        ("fisher", "head_group_size", "none"),
        ("fisher", "frame_lenght", "none"),
        ("palu", "reorder", "head_group_size"),
        ("palu", "refit_ratio", "head_group_size"),
        ("recalkv", "power", "head_group_size, reorder, calibrate_values, refit_ratio"),
    ],
)
def test_an_option_that_a_method_does_not_take_is_refused_before_the_model_is_run(method, option, takes):
    message = f"^{option} is no option of method '{method}'; beside the options of all methods it takes {takes}$"
    with pytest.raises(ValueError, match=message):
        calibrate(None, None, method=method, progress=False, **{option: 2})


def test_options_of_the_second_pass_are_none_of_projections_from_moments():
    moments = moments_of(tiny_model("llama"), padded_batches())
    with pytest.raises(ValueError, match="refit_ratio is no option .* it takes head_group_size, reorder$"):
        projections_from_moments(moments, method="recalkv", refit_ratio=2.0)


def test_an_unknown_method_is_refused_by_name():
    with pytest.raises(ValueError, match=r"method must be one of \['fisher', 'palu', 'recalkv'\], got 'svd'"):
        calibrate(tiny_model("llama"), padded_batches(), method="svd", progress=False)


def asks_for_a_method(node: ast.AST) -> bool:
    """Whether ``node`` compares a method's name, with a word or with anything."""
    if isinstance(node, ast.MatchValue):
        return isinstance(node.value, ast.Constant) and node.value.value in METHODS
    if not isinstance(node, ast.Compare):
        return False
    named = any(isinstance(part, ast.Constant) and part.value in METHODS for part in ast.walk(node))
    equal = any(isinstance(operator, ast.Eq | ast.NotEq) for operator in node.ops)
    sides = {getattr(side, "id", getattr(side, "attr", None)) for side in (node.left, *node.comparators)}
    return named or (equal and "method" in sides)


@pytest.mark.parametrize(
    "code, asks",
    [
        ("if method == 'recalkv': pass", True),
        ("if self.method != XKV: pass", True),
        ("x = name in ('palu', 'recalkv')", True),
        ("match method:\n    case 'fisher': pass", True),
        ("if method not in METHODS: pass", False),
        ("method = 'fisher'", False),
    ],
)
def test_the_search_for_methods_by_name_finds_them(code, asks):
    assert any(map(asks_for_a_method, ast.walk(ast.parse(code)))) is asks


def test_no_file_but_a_methods_own_asks_which_method_it_is():
    files = sorted(Path(calibration.__file__).parent.glob("*.py"))
    own = {f"{name}.py" for name in METHODS}
    assert own < {path.name for path in files}
    package = Path(calibration.__file__).parents[1]
    files += [*package.glob("*.py"), *package.glob("evaluation/*.py")]
    for path in (path for path in files if path.name not in own):
        asked = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if asks_for_a_method(node)]
        assert not asked, f"{path.name} asks for a method by name in lines {asked}"


class TestProjectionsFor:
    """The user's own folder of projections."""

    @pytest.fixture(autouse=True)
    def _home(self, tmp_path, monkeypatch):
        monkeypatch.setenv("LOWRANK_CACHE_HOME", str(tmp_path))

    @staticmethod
    def tokenizer(text):
        return {"input_ids": [ord(letter) % 90 for letter in text]}

    def made(self, monkeypatch, *calls):
        """How many of the calls calibrated."""
        count = []
        real = api.calibrate
        monkeypatch.setattr(api, "calibrate", lambda *args, **options: count.append(1) or real(*args, **options))
        found = [api.projections_for(model, self.tokenizer, tokens=1024, progress=False, **one) for model, one in calls]
        return len(count), found

    def test_the_second_call_reads_what_the_first_one_made(self, monkeypatch):
        count, (one, other) = self.made(monkeypatch, (tiny_model("llama"), {}), (tiny_model("llama"), {}))
        assert count == 1
        for first, second in zip(one.bases, other.bases, strict=True):
            assert torch.equal(first.down_proj, second.down_proj)
        LowRankCache(tiny_model("llama"), other)

    def test_other_weights_options_and_texts_are_made_anew(self, monkeypatch):
        changed = tiny_model("llama")
        with torch.no_grad():
            changed.model.layers[1].self_attn.k_proj.weight.mul_(2)
        text = "It was a dark and stormy night. " * 200
        calls = [({}), {"frame_length": 1}, {"text": text}]
        calls = [(tiny_model("llama"), one) for one in calls] + [
            (changed, {}),
            (tiny_model("llama", torch.float64), {}),
        ]
        count, found = self.made(monkeypatch, *calls)
        assert count == 5 and found[1].frame_length == 1

    def test_damaged_files_are_made_anew(self, monkeypatch, tmp_path):
        self.made(monkeypatch, (tiny_model("llama"), {}))
        (file,) = tmp_path.glob("projections/*/*.safetensors")
        file.write_bytes(file.read_bytes()[:-1])
        assert self.made(monkeypatch, (tiny_model("llama"), {}), (tiny_model("llama"), {}))[0] == 1

    def test_too_short_a_text_is_refused(self):
        with pytest.raises(ValueError, match="text must hold at least"):
            api.projections_for(tiny_model("llama"), self.tokenizer, "short", tokens=1024)
