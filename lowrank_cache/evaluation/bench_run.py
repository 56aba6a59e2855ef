"""One bench from model to table, JSON and picture."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from lowrank_cache.evaluation.bench import BenchRow, BenchSettings, bench_markdown, run_bench
from lowrank_cache.evaluation.bench_op import op_markdown, time_ops
from lowrank_cache.evaluation.configurations import build, parse
from lowrank_cache.evaluation.loading import in_dtype, load_model
from lowrank_cache.evaluation.plots import plot_bench
from lowrank_cache.evaluation.run_inputs import MOMENTS_FILE, QualityRun, identity_of, moments_digest, moments_of
from lowrank_cache.evaluation.text_source import load_text

__all__ = ["bench"]


def bench(
    out: Path, specifications: list[str], run: QualityRun, settings: BenchSettings, report: Callable[[str], object]
) -> None:
    """Write ``bench.jsonl``, ``bench.json``, ``table.md``, ``op.md`` and ``bench.png`` into ``out``.

    A specification may end in ``,attend=0``: the same cache, keys and values rebuilt in every step.
    """
    model, tokenizer, name = load_model(run.model, report)
    out.mkdir(parents=True, exist_ok=True)
    moments = moments_of(run, out / MOMENTS_FILE, model, tokenizer, report)
    plain = {specification: specification.removesuffix(",attend=0") for specification in specifications}
    built = build(list(plain.values()), moments)
    configurations = {specification: built[plain[specification]] for specification in specifications}
    text, source = load_text(run.evaluate_on, split="test")
    model = in_dtype(model, run.dtype)
    longest = max(settings.contexts) + settings.warm + settings.new_tokens
    ids = torch.tensor(tokenizer(text[: 12 * longest])["input_ids"])
    report(f"{name} in {run.dtype}, {settings.threads} thread(s), text from {source}")
    identity = {**identity_of(run, name, model, text), "moments": moments_digest(run, out)}
    rows = run_bench(model, ids, configurations, settings, out / "bench.jsonl", report, identity)
    table = bench_markdown(rows)
    (out / "table.md").write_text(table + "\n", encoding="utf-8")
    (out / "bench.json").write_text(json.dumps([_summary(row) for row in rows], indent=1), encoding="utf-8")
    report(table)
    ops = _ops(model, configurations, settings)
    if ops:
        (out / "op.md").write_text(ops + "\n", encoding="utf-8")
        report(f"\nAttention over one layer's latents alone:\n\n{ops}")
    try:
        plot_bench(rows, out / "bench.png")
    except ImportError as error:
        report(str(error))


def _summary(row: BenchRow) -> dict:
    return {**asdict(row), "tokens_per_second": row.tokens_per_second}


def _ops(model, configurations: dict, settings: BenchSettings) -> str:
    """The table of the operation alone, for per-layer bases: what other layers share is not one layer's."""
    rows = []
    for specification, (projections, options) in configurations.items():
        configuration = parse(specification.removesuffix(",attend=0"))
        if configuration is None or configuration.groups != 1 or specification.endswith(",attend=0"):
            continue
        if projections is None:  # xkv, whose rows have bases of their own, does not attend to latents
            continue
        heads = model.config.get_text_config(decoder=True).num_attention_heads
        rows += [
            time_ops(specification, projections, options["compression_ratio"], heads, context, batch, model.dtype)
            for context in settings.contexts
            for batch in settings.batches
        ]
    return op_markdown(rows) if rows else ""
