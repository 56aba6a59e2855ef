"""hf-lowrank: lm-eval's numbers where nothing is lost, others where latents are read, for every kind of request."""

import json
import logging
import subprocess
import sys

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lowrank_cache.evaluation.lm_eval_model import TASKS, LowRankLM, register
from tests.oracle.character_tokenizer import character_tokenizer
from tests.oracle.models import full_rank_projections, tiny_model

TEXT = "".join(chr(33 + (7 * index * index) % 90) for index in range(400))
SIZES = {"residual_length": 4, "num_sink_tokens": 2, "block_size": 3, "chunk": 5}
EXACT = {"compression_ratio": 1.0, "latent_dtype": None, **SIZES}
PAIRS = [
    (TEXT[:60], TEXT[60:75]),
    (TEXT[:60], "xy"),
    (TEXT[:60], "z"),
    (TEXT[100:131], TEXT[131:150]),
    (TEXT[200:290], "a"),
    ("a", TEXT[300:320]),
    ("", TEXT[320:330]),
]


def models(batch_size=1, **options):
    """lm-eval's own model, and ours over full-rank projections."""
    shared = {"tokenizer": character_tokenizer(), "batch_size": batch_size, "max_length": 128}
    model = tiny_model("llama")
    return HFLM(model, **shared), LowRankLM(model, projections=full_rank_projections("llama"), **shared, **options)


def requests(kind, arguments):
    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("options", [EXACT, {"cache": "full", **SIZES}, {"attend": False, **EXACT}])
def test_loglikelihoods_are_lm_evals_where_nothing_is_lost(options, batch_size):
    theirs, ours = models(batch_size, **options)
    expected = theirs.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    found = ours.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-4, abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_a_greedy_continuation_is_known_as_one():
    theirs, ours = models(**EXACT)
    (text,) = theirs.generate_until(requests("generate_until", [(TEXT[:50], {"until": [], "max_gen_toks": 8})]))
    pairs = requests("loglikelihood", [(TEXT[:50], text), (TEXT[:50], text[:-1] + "~")])
    assert [greedy for _, greedy in ours.loglikelihood(pairs, disable_tqdm=True)] == [True, False]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_rolling_loglikelihoods_are_lm_evals_where_nothing_is_lost(batch_size):
    theirs, ours = models(batch_size, **EXACT)
    texts = [(TEXT[:300],), (TEXT[5:90],)]  # the first is longer than the model's context
    expected = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    found = ours.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_generated_text_is_lm_evals_where_nothing_is_lost(batch_size):
    theirs, ours = models(batch_size, **EXACT)
    asked = [(TEXT[:60], {"until": [], "max_gen_toks": 12}), (TEXT[90:131], {"until": [], "max_gen_toks": 12})]
    expected = theirs.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert ours.generate_until(requests("generate_until", asked), disable_tqdm=True) == expected


def test_what_is_read_from_latents_differs_and_what_is_kept_exactly_does_not():
    pairs = requests("loglikelihood", [(TEXT[:90], TEXT[90:110]), (TEXT[:4], TEXT[4:6])])
    theirs, ours = models(**{**SIZES, "compression_ratio": 8.0})
    expected = theirs.loglikelihood(pairs, disable_tqdm=True)
    found = ours.loglikelihood(pairs, disable_tqdm=True)
    assert abs(found[0][0] - expected[0][0]) > 0.1
    assert found[1][0] == pytest.approx(expected[1][0], abs=1e-4)
    (rolling,) = ours.loglikelihood_rolling(requests("loglikelihood_rolling", [(TEXT[:100],)]), disable_tqdm=True)
    (exact,) = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", [(TEXT[:100],)]), disable_tqdm=True)
    assert abs(rolling - exact) > 0.1


def test_requests_that_read_no_latent_are_warned_of(caplog):
    _, ours = models(compression_ratio=8.0)
    with caplog.at_level(logging.WARNING):
        ours.loglikelihood(requests("loglikelihood", [(TEXT[:20], "a")]), disable_tqdm=True)
    assert "none reads a latent" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": "fullest"}, "cache must be 'lowrank' or one of"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"batch_size": "auto"}, "batch_size must be a number"),
        ({"projections": None}, "exactly one of projections and method"),
        ({"compression_ratio": 0.5}, "compression_ratio must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    given = {"tokenizer": character_tokenizer(), "projections": full_rank_projections("llama"), **options}
    with pytest.raises(ValueError, match=message):
        LowRankLM(tiny_model("llama"), **given)


def test_beams_are_refused():
    _, ours = models(**EXACT)
    asked = [(TEXT[:60], {"until": [], "max_gen_toks": 3, "num_beams": 2})]
    with pytest.raises(NotImplementedError, match="without beams"):
        ours.generate_until(requests("generate_until", asked), disable_tqdm=True)


def test_the_tasks_run_without_a_network():
    torch.manual_seed(0)
    _, ours = models(batch_size=2, **SIZES, compression_ratio=4.0)
    ours._max_length = 512
    tasks = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"count": 3, "entries": 4})
    found = simple_evaluate(
        ours, tasks=["lowrank_lookups", "lowrank_lookups_generate"], task_manager=tasks, bootstrap_iters=0
    )
    assert found["n-samples"]["lowrank_lookups"]["effective"] == 3
    assert 0 <= found["results"]["lowrank_lookups"]["acc,none"] <= 1
    assert found["results"]["lowrank_lookups_generate"]["exact_match,strip"] in (0, 1 / 3, 2 / 3, 1)


def test_the_documented_command(tmp_path):
    model, folder = tiny_model("llama"), tmp_path / "model"
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    full_rank_projections("llama").save_pretrained(tmp_path / "projections")
    arguments = f"pretrained={folder},projections={tmp_path}/projections,compression_ratio=4,chunk=16,max_length=2048"
    command = [
        sys.executable,
        "-m",
        "lowrank_cache.evaluation.lm_eval_model",
        "--model",
        "hf-lowrank",
        "--device",
        "cpu",
    ]
    command += ["--model_args", arguments, "--tasks", "lowrank_lookups", "--output_path", str(tmp_path / "out")]
    command += ["--metadata", json.dumps({"count": 2, "entries": 5})]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "hf-lowrank" in done.stdout and "lowrank_lookups" in done.stdout
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["lowrank_lookups"]["sample_len"] == 2


def test_registering_twice_is_harmless():
    register()
    register()
