"""The bench: every row beside its baseline, resumable, with the picture and the op alone."""

import json

import pytest
import torch

from lowrank_cache.evaluation.bench import BenchSettings, bench_markdown, run_bench
from lowrank_cache.evaluation.bench_op import op_markdown, time_ops
from lowrank_cache.evaluation.plots import plot_bench
from tests.oracle.models import full_rank_projections, random_tokens, tiny_model

SETTINGS = BenchSettings(
    contexts=(40, 80), batches=(1, 2), new_tokens=2, warm=1, residual_length=8, num_sink_tokens=2, block_size=8
)


def configurations():
    projections = full_rank_projections("llama", 4)
    options = {"compression_ratio": 4.0, "bits": None, "ranks": None}
    return {
        "full": (None, {}),
        "quantized-fp8": (None, {}),
        "fisher:4,groups=1,frame=4": (projections, options),
        "fisher:4,groups=1,frame=4,attend=0": (projections, options),
        "xkv:4": (None, {**options, "method": "xkv", "layer_group_size": 3}),
    }


def test_every_row_is_measured_beside_the_full_cache_and_resumed(tmp_path):
    model, ids, out = tiny_model("llama"), random_tokens(1, 90)[0], tmp_path / "bench.jsonl"
    said = []
    rows = run_bench(model, ids, configurations(), SETTINGS, out, said.append)
    assert [(row.context, row.batch) for row in rows[::5]] == [(40, 1), (40, 2), (80, 1), (80, 2)]
    assert {row.name for row in rows} == set(configurations())
    assert model.config._attn_implementation == "sdpa"
    for row in rows:
        assert row.prefill_seconds > 0 and len(row.step_seconds) == 2 and row.tokens_per_second > 0
        full = next(other for other in rows if (other.name, other.context, other.batch) == ("full", *key(row)))
        # 4 bytes a number, keys and values of 3 layers of 2 heads of 16
        assert full.stored_bytes == row.batch * (row.context + 3) * 2 * 3 * 32 * 4
        if row.name.startswith("fisher"):
            assert row.stored_bytes < full.stored_bytes
    lines = out.read_text().splitlines()
    assert len(lines) == 1 + len(rows) and json.loads(lines[0])["settings"]["warm"] == 1
    said.clear()
    assert run_bench(model, ids, configurations(), SETTINGS, out, said.append) == rows
    assert not said and len(out.read_text().splitlines()) == len(lines)
    table = bench_markdown(rows).splitlines()
    assert len(table) == 2 + len(rows) and table[2].split("|")[5].strip() == "1.00x"
    plot_bench(rows, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def key(row):
    return row.context, row.batch


def test_a_file_of_other_settings_and_a_short_text_are_refused(tmp_path):
    model, out = tiny_model("llama"), tmp_path / "bench.jsonl"
    with pytest.raises(ValueError, match="ids must hold at least 83 tokens, got 50"):
        run_bench(model, random_tokens(1, 50)[0], {}, SETTINGS, out)
    run_bench(model, random_tokens(1, 90)[0], {}, SETTINGS, out, lambda line: None)
    other = BenchSettings(contexts=(40,), new_tokens=3, warm=1)
    with pytest.raises(ValueError, match="made with other settings"):
        run_bench(model, random_tokens(1, 90)[0], {}, other, out)


@pytest.mark.parametrize("joint", [True, False])
def test_the_op_is_timed_at_the_plan_of_a_layer(joint):
    projections = full_rank_projections("llama", 4, 1, joint)
    row = time_ops("fisher:4", projections, 4.0, 4, context=96, batch=2, dtype=torch.float32, repeats=3)
    assert row.dense_seconds > 0 and row.latent_seconds > 0
    assert "| 96 | 2 | fisher:4 |" in op_markdown([row])
