"""The check of kernels on a GPU: a dry run of all stages here, and what makes it fail."""

import json

import pytest
import torch
from typer.testing import CliRunner

from lowrank_cache.cli import app
from lowrank_cache.evaluation import gpu_check
from lowrank_cache.kernels import trust


@pytest.fixture(autouse=True)
def own_record(monkeypatch, tmp_path):
    pytest.importorskip("triton", reason="the kernels under test need triton")
    monkeypatch.setenv("LOWRANK_CACHE_HOME", str(tmp_path / "home"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would take minutes")
def test_a_dry_run_passes_every_stage_and_records_nothing(tmp_path):
    done = CliRunner().invoke(app, ["gpu-check", "--out", str(tmp_path / "r")])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "r/report.json").read_text())
    assert found["passed"] and found["dry_run"]
    assert all(found[stage]["passed"] for stage in ("facts", "compile", "cache", "operation", "step"))
    report = (tmp_path / "r/report.md").read_text()
    assert report.startswith("# gpu-check: DRY RUN") and "weights alone" in report
    assert not trust._recorded()


def test_a_stage_that_fails_or_hangs_fails_alone(monkeypatch, tmp_path):
    def run(command, *, env, capture_output, text, timeout):
        if "'step'" in command[3]:
            raise gpu_check.subprocess.TimeoutExpired(command, timeout)
        failed = "'cache'" in command[3]
        out = json.dumps({"class": "sm_90", "kernels": 1, "attention_s": 1.0, "encoder_s": 1.0, "microseconds": []})
        return gpu_check.subprocess.CompletedProcess(command, int(failed), "noise\n" + out, "Traceback: wrong token")

    monkeypatch.setattr(gpu_check.subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    done = CliRunner().invoke(app, ["gpu-check", "--out", str(tmp_path)])
    assert done.exit_code == 1
    report = (tmp_path / "report.md").read_text()
    assert report.startswith("# gpu-check: FAILED") and "Traceback: wrong token" in report
    assert "took longer than 120 s" in report and not trust._recorded()
    monkeypatch.setattr(gpu_check, "_MUST_PASS", ("facts", "compile"))
    assert CliRunner().invoke(app, ["gpu-check", "--out", str(tmp_path)]).exit_code == 0
    assert trust._recorded() == {"sm_90": trust.kernels_digest()}
