"""The bench: every entry beside its baseline, resumable, with the floor and the picture."""

import json

import pytest
from transformers import DynamicCache

from lowrank_cache.evaluation.bench import WEIGHTS_ALONE, BenchSettings, bench, bench_table, plot_bench, run_bench
from lowrank_cache.evaluation.caches import CacheEntry, cache_entry
from lowrank_cache.evaluation.inputs import Run
from lowrank_cache.evaluation.streaming import processor
from tests.oracle.character_tokenizer import character_tokenizer
from tests.oracle.models import full_rank_projections, random_tokens, tiny_model

SETTINGS = BenchSettings(
    contexts=(40, 80), batches=(1, 2), new_tokens=2, warm=1, residual_length=8, num_sink_tokens=2, block_size=8
)


def caches_of(model):
    projections = full_rank_projections("llama", 4)
    options = {"compression_ratio": 4.0, "bits": None, "ranks": None}
    configurations = {
        "full": (None, {}),
        "quantized-fp8": (None, {}),
        "fisher:4,groups=1,frame=4": (projections, options),
        "fisher:4,groups=1,frame=4,attend=0": (projections, options),
        "xkv:4": (None, {**options, "method": "xkv", "layer_group_size": 3}),
    }
    made = [cache_entry(name, *found, model, SETTINGS.sizes()) for name, found in configurations.items()]
    return [*made, CacheEntry(WEIGHTS_ALONE, lambda attend=True: DynamicCache(config=model.config), None, 0)]


def test_every_entry_is_measured_beside_the_full_cache_and_resumed(tmp_path):
    model, ids, out = tiny_model("llama"), random_tokens(1, 90)[0], tmp_path / "bench.jsonl"
    said, caches = [], caches_of(model)
    rows = run_bench(model, ids, caches, SETTINGS, out, said.append)
    assert [(row.context, row.batch) for row in rows[::6]] == [(40, 1), (40, 2), (80, 1), (80, 2)]
    assert {row.name for row in rows} == {entry.name for entry in caches}
    assert model.config._attn_implementation == "sdpa"
    for row in rows:
        assert row.prefill_seconds > 0 and len(row.step_seconds) == 2 and row.tokens_per_second > 0
        full = next(other for other in rows if (other.name, other.context, other.batch) == ("full", *key(row)))
        # 4 bytes a number, keys and values of 3 layers of 2 heads of 16
        assert full.stored_bytes == row.batch * (row.context + 3) * 2 * 3 * 32 * 4
        if row.name.startswith("fisher"):
            assert row.stored_bytes < full.stored_bytes
        if row.name == WEIGHTS_ALONE:  # one token, and those that were decoded
            assert row.stored_bytes == row.batch * 4 * 2 * 3 * 32 * 4
    lines = out.read_text().splitlines()
    assert len(lines) == 1 + len(rows) and json.loads(lines[0])["settings"]["warm"] == 1
    said.clear()
    assert run_bench(model, ids, caches, SETTINGS, out, said.append) == rows
    assert not said and len(out.read_text().splitlines()) == len(lines)
    table = bench_table(rows).markdown().splitlines()
    assert len(table) == 2 + len(rows) and table[2].split("|")[5].strip() == "1.00x"
    assert all("| – | – |" in line for line in table if WEIGHTS_ALONE in line)
    plot_bench(rows, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def key(row):
    return row.context, row.batch


def test_a_file_of_other_settings_and_a_short_text_are_refused(tmp_path):
    model, out = tiny_model("llama"), tmp_path / "bench.jsonl"
    with pytest.raises(ValueError, match="ids must hold at least 83 tokens, got 50"):
        run_bench(model, random_tokens(1, 50)[0], [], SETTINGS, out)
    full = caches_of(model)[:1]
    run_bench(model, random_tokens(1, 90)[0], full, SETTINGS, out, lambda line: None)
    other = BenchSettings(contexts=(40,), new_tokens=3, warm=1)
    with pytest.raises(ValueError, match="made with other settings"):
        run_bench(model, random_tokens(1, 90)[0], full, other, out)


def test_a_folder_names_its_processor_and_is_of_no_other(tmp_path, monkeypatch):
    """Times of one processor do not carry to another: a table says where it was measured, and mixes no two."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    character_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("Some words of text. " * 20)
    run, said = Run(tmp_path / "out", str(tmp_path / "model"), evaluate_on=tmp_path / "text.txt", dtype="float32"), []
    bench(run, [WEIGHTS_ALONE], SETTINGS, said.append)
    table = (tmp_path / "out" / "table.md").read_text()
    assert processor() in table.splitlines()[0] and "float32" in table.splitlines()[0]
    assert f"| {WEIGHTS_ALONE} |" in table and table.strip() in said
    monkeypatch.setattr("lowrank_cache.evaluation.bench.processor", lambda: "another")
    with pytest.raises(ValueError, match="made with other settings"):
        bench(run, [WEIGHTS_ALONE], SETTINGS, said.append)
