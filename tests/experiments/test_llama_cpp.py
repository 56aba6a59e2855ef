"""Slopes of times against the context."""

import json

import pytest

from tests.experiments import load

llama_cpp = load("llama_cpp")


def test_slopes_of_what_bench_wrote(tmp_path):
    entries = [
        {"name": name, "context": context, "batch": batch, "step_seconds": [9.0, seconds, 0.0]}
        for name, batch, times in (("full", 1, {1024: 0.03, 4096: 0.09}), ("full", 4, {1024: 1.0}))
        for context, seconds in times.items()
    ]
    lines = [json.dumps({"settings": {}}), *map(json.dumps, entries)]
    (tmp_path / "bench.jsonl").write_text("\n".join(lines))
    found = llama_cpp.timed_by_bench(tmp_path, [1024, 4096])
    assert found == {"full": {1024: pytest.approx(30.0), 4096: pytest.approx(90.0)}}
    assert llama_cpp.slope(found["full"]) == pytest.approx(60 / 3.072)
    assert "| full | 30.0 at 1,024 | 90.0 at 4,096 | 19.5 |" in llama_cpp.slopes_table(found).markdown()
