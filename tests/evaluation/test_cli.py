"""The command line: options reach what they name, and errors are messages."""

import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lowrank_cache import Projections, cli
from lowrank_cache.calibration import calibrate
from lowrank_cache.calibration.moments import Moments
from lowrank_cache.evaluation import inputs
from lowrank_cache.evaluation.bench import BenchSettings
from lowrank_cache.evaluation.demo import DownloadError
from lowrank_cache.evaluation.evaluate import EvaluationSettings
from lowrank_cache.evaluation.inputs import Run
from lowrank_cache.evaluation.streaming import processor
from tests.oracle.models import random_tokens, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def projections(model):
    return calibrate(model, [random_tokens(2, 48, seed=1)], progress=False)


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(("joint", "sides"), [(True, ["both"]), (False, ["key", "value"])])
def test_inspect_prints_a_line_for_each_store(model, tmp_path, monkeypatch, joint, sides):
    monkeypatch.setenv("COLUMNS", "120")  # so wide that no line is folded
    projections = calibrate(model, [random_tokens(2, 48, seed=1)], layer_group_size=2, joint=joint, progress=False)
    projections.save_pretrained(tmp_path)
    result = run("inspect", tmp_path, "--ratio", 3)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("│")]
    assert [line.split("│")[2].strip() for line in lines] == [side for side in sides for _ in range(2)] + [""]
    assert [line.split("│")[1].strip() for line in lines] == ["0-1", "2"] * len(sides) + ["all"]
    assert "smaller than the full cache" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "PROJECTIONS must be a folder or a repository"),
        (("{saved}", "--ratio", "0.5"), "compression_ratio must be at least 1"),
        (("{saved}", "--ratio", "1e9"), "largest reachable ratio"),
        (("{empty}",), "projections.json is missing"),
    ],
)
def test_errors_are_one_message(projections, tmp_path, arguments, message):
    saved, empty = tmp_path / "saved", tmp_path / "empty"
    projections.save_pretrained(saved)
    empty.mkdir()
    result = run("inspect", *(argument.format(saved=saved, empty=empty) for argument in arguments))
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output


def test_download_error_is_a_message_and_a_bug_is_not(monkeypatch):
    def fail(error):
        def run_demo(*args, **kwargs):
            raise error

        monkeypatch.setattr(cli, "run_demo", run_demo)
        return run("demo")

    assert "no network" in fail(DownloadError("no network")).output
    assert isinstance(fail(AttributeError("a bug")).exception, AttributeError)


@pytest.fixture
def text(monkeypatch, model, tmp_path):
    """A text to calibrate on; models and tokenizers are tiny ones, whatever their names."""

    class Tokenizer:
        def __call__(self, text):
            return {"input_ids": [ord(letter) % 100 for letter in text]}

    text = tmp_path / "text.txt"
    text.write_text("Some words to calibrate on, again and again. " * 40)
    monkeypatch.setattr(inputs.AutoTokenizer, "from_pretrained", lambda name: Tokenizer())
    monkeypatch.setattr(inputs.AutoModelForCausalLM, "from_pretrained", lambda name, dtype: model)
    return text


@pytest.mark.parametrize(
    ("given", "expected"), [(None, "auto"), ("5", 5), ("2,5", (2, 5)), ("auto", "auto"), ("1,x", "1,x")]
)
def test_group_size_option(monkeypatch, projections, text, tmp_path, given, expected):
    asked = []
    monkeypatch.setattr(cli.calibration, "calibrate", lambda *given, **options: asked.append(options) or projections)
    option = ["--data", text, "--tokens", 512, *([] if given is None else ["--layer-group-size", given])]
    assert run("calibrate", "tiny", "--out", tmp_path / "out", "--device", "cpu", *option).exit_code == 0
    assert asked[0].get("layer_group_size", "auto") == expected


@pytest.mark.parametrize("method", ["palu", "recalkv"])
def test_calibrate_with_other_methods(text, tmp_path, method):
    out, moments = tmp_path / "out", tmp_path / "moments.safetensors"
    options = ["--refit-ratio", 2] if method == "recalkv" else ["--no-joint"]
    result = run(
        "calibrate", "tiny", "--out", out, "--data", text, "--tokens", 256, "--window", 64, "--device", "cpu",
        "--method", method, "--save-moments", moments, *options,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    made = Projections.from_pretrained(out)
    assert made.method == method and made.provenance.get("refit_ratio") == (2 if method == "recalkv" else None)
    assert Moments.load(moments).tokens == made.provenance["calibration_tokens"]


def test_keys_and_values_apart_on_demand(text, tmp_path):
    sides = {}
    for joint in ("--joint", "--no-joint"):
        options = ["--tokens", 256, "--window", 64, "--device", "cpu", joint]
        assert run("calibrate", "tiny", "--out", tmp_path / joint, "--data", text, *options).exit_code == 0
        sides[joint] = {basis.side for basis in Projections.from_pretrained(tmp_path / joint).bases}
    assert sides == {"--joint": {"both"}, "--no-joint": {"key", "value"}}


@pytest.mark.parametrize("command", [
    ["calibrate", "tiny", "--out", "x"], ["bench", "--out", "x"], ["eval", "tiny", "--out", "x"],
])  # fmt: skip
def test_a_wrong_dtype_is_named_before_any_work(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    result = run(*command, "--dtype", "fp16")
    words = " ".join(result.output.replace("│", " ").split())
    assert result.exit_code == 2 and not list(tmp_path.iterdir())
    assert "'--dtype'" in words and "'fp16' is not one of 'float32', 'bfloat16', 'float16', 'auto'" in words


def test_calibrate_saves_projections_with_their_text(text, tmp_path):
    out = tmp_path / "out"
    result = run(
        "calibrate", "tiny", "--out", out, "--data", text, "--tokens", 256, "--window", 64,
        "--layer-group-size", "1,2", "--device", "cpu", "--seed", 3, "--recall-share", 0.25, "--sensitivity", "query",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    config = json.loads((out / "projections.json").read_text())
    facts = {"text": str(text), "seed": 3, "recall_share": 0.25, "sensitivity": "query"}
    assert facts.items() <= config["provenance"].items()
    assert re.search(r"Calibrated in \d+ s on \d+ threads", result.output)
    assert max(len(basis["layers"]) for basis in config["bases"] if basis["side"] == "value") == 2
    assert max(len(basis["layers"]) for basis in config["bases"] if basis["side"] == "key") == 1


@pytest.fixture
def asked(monkeypatch):
    """What ``eval`` and ``bench`` are asked to do, instead of doing it."""
    calls = []
    for name in ("run_evaluation", "run_bench"):
        monkeypatch.setattr(cli, name, lambda *arguments: calls.append(arguments[:3]))
    return calls


@pytest.mark.parametrize(("given", "expected"), [([], ()), (["1024:16", "4096:8"], ((1024, 16), (4096, 8)))])
def test_needles_option(asked, given, expected):
    assert run("eval", *(word for pair in given for word in ("--needles", pair))).exit_code == 0
    assert asked[0][2].needles == expected


@pytest.mark.parametrize("wrong", ["1024", "1024:", "a:4", "1024:4:4"])
def test_wrong_needles_are_refused_by_name(asked, wrong):
    result = run("eval", "--needles", "512:8", "--needles", wrong)
    assert result.exit_code == 1 and "needles must be TOKENS:QUESTIONS" in result.output and not asked


def test_the_commands_defaults_are_those_of_the_settings(asked):
    """One set of defaults: of the library for caches, of the settings and of a run for all else."""
    for command, out, settings in (("eval", "eval", EvaluationSettings()), ("bench", "bench", BenchSettings())):
        assert run(command).exit_code == 0
        given, _, found = asked.pop()
        assert found == settings
        assert given == Run(Path("artefacts") / out, device=None)
    assert inputs.CALIBRATION_TOKENS in cli.calibrate.__defaults__


@pytest.mark.parametrize("command", ["eval", "bench"])
def test_every_shared_option_reaches_the_run(asked, command):
    options = [
        "a-model", "--out", "o", "--calibrate-on", "c", "--evaluate-on", "e", "--moments", "m", "--projections", "p",
        "--projections", "q", "--tokens", 7, "--recall-share", 0.25, "--sensitivity", "query", "--dtype", "float32",
        "--device", "cpu", "--residual-length", 16, "--block-size", 8, "--cache", "xkv:2",
    ]  # fmt: skip
    result = run(command, *options)
    assert result.exit_code == 0, result.output
    given, caches, settings = asked[0]
    assert given == Run(Path("o"), "a-model", "c", "e", Path("m"), ("p", "q"), 7, 0.25, "query", "float32", "cpu")
    assert caches == ["xkv:2"] and (settings.residual_length, settings.block_size) == (16, 8)


@pytest.mark.parametrize(("command", "wrong"), [("eval", "lengths"), ("bench", "contexts"), ("bench", "batches")])
def test_numbers_are_positive(asked, command, wrong):
    result = run(command, f"--{wrong}", "16,0")
    assert result.exit_code == 1 and f"{wrong} must be positive integers separated by commas" in result.output


def test_former_names_of_texts_still_work(asked):
    assert run("eval", "--text", "t.txt").exit_code == 0
    assert asked[0][0].evaluate_on == "t.txt"


def test_env_names_every_version_a_report_needs():
    out = run("env").output
    assert f"torch {version('torch')}" in out and f"transformers {version('transformers')}" in out
    assert "lowrank-cache " in out and "accelerators: " in out and "Python 3." in out
    assert f"processor: {processor()}" in out
